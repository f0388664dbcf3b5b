"""LeRobot data sets (version 3): import and export. `args` is always that of tools/convert.py."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.episode_file import (
    EpisodeInfo,
    episode_files,
    episode_folders,
    open_episode,
    write_episode,
)
from common.errors import UserError
from common.files import folder_lock, read_json, write_json
from tools.foreign_episodes import DemoFolder, check_fits, digest, print_result

ABOUT = "meta/ire-vla.json"  # in a data set that `export` wrote: each episode's file and header


def lerobot_dataset() -> type:
    """Return LeRobot's class. Raises UserError if it is missing: its library and this project pin other releases."""
    try:
        import datasets
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise UserError(
            f"lerobot cannot be imported here ({error}): it needs a Python environment of its own, see docs/data.md"
        ) from error
    datasets.disable_progress_bars()  # one for each episode, next to ours
    return LeRobotDataset


def open_lerobot(name: str):
    """Return a LeRobot data set by its folder or hub name. Raises UserError."""
    dataset_class = lerobot_dataset()
    local = (Path(name) / "meta/info.json").exists()
    if not local and (Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise UserError(
            f"{name} is not a LeRobot data set (version 3): {name}/meta/info.json is missing"
        )
    where = {"repo_id": Path(name).name, "root": name} if local else {"repo_id": name}
    try:
        return dataset_class(**where, video_backend="pyav")  # which includes FFmpeg
    except Exception as error:  # noqa: BLE001  the library and the network raise many kinds
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} is not a LeRobot data set (version 3) that can be read ({reason})"
        ) from error


class LeRobotEpisodes:
    """A LeRobot data set's episodes: instruction and action of all, images as they are read."""

    def __init__(self, dataset, image_key: str, action_key: str):
        self.dataset = dataset
        self.image_key = image_key
        names = ["episode_index", "task_index", action_key]
        columns = dataset.hf_dataset.select_columns(names).with_format("numpy")[:]
        self.episode = np.asarray(columns["episode_index"]).reshape(-1)
        action = np.asarray(columns[action_key], np.float32)
        # (frames, A); LeRobot drops the dimension of a 1-D action
        self.action = action.reshape(len(action), -1)
        instructions = list(dataset.meta.tasks.index)
        self.instruction = [
            instructions[int(i)] for i in np.asarray(columns["task_index"]).reshape(-1)
        ]
        # An episode's frames follow each other.
        numbers, first = np.unique(self.episode, return_index=True)
        self.frames = {
            int(e): rows
            for e, rows in zip(numbers, np.split(np.arange(len(self.episode)), first[1:]))
        }

    def rows(self, e: int) -> np.ndarray:
        """Return the numbers of episode e's frames."""
        return self.frames[e]

    def images(self, e: int) -> Iterator[torch.Tensor]:
        """Yield episode e's images one by one, (3, H, W) in [0, 1]."""
        for i in self.rows(e):
            yield self.dataset[int(i)][self.image_key]

    def episode_instruction(self, e: int) -> str:
        """Return the instruction of episode e. Raises UserError if it has several."""
        found = sorted({self.instruction[i] for i in self.rows(e)})
        if len(found) > 1:
            raise UserError(
                f"episode {e} has {len(found)} instructions ({'; '.join(found)}): split it first"
            )
        return found[0]


def to_bytes(image: torch.Tensor) -> np.ndarray:
    """Return an image (3, H, W) in [0, 1] as (H, W, 3) uint8. This is exact for what was a byte."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def resize(image: torch.Tensor, size: int) -> torch.Tensor:
    """Return the middle square of an image (3, H, W), resized to (3, size, size) as VLA.preprocess does."""
    H, W = image.shape[1:]
    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    square = image[None, :, top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1)[0]


def choose_camera(args, dataset) -> str:
    """Return the name of the camera. Raises UserError if --image-key or --action-key does not name one."""
    cameras = list(dataset.meta.camera_keys)
    others = [name for name in dataset.features if name not in cameras]
    image_key = args.image_key or (cameras[0] if len(cameras) == 1 else "")
    if image_key not in cameras:
        problem = (
            f"--image-key {args.image_key} is not a camera"
            if args.image_key
            else "--image-key is missing"
        )
        raise UserError(
            f"{problem} of {args.dataset}: use one of {', '.join(cameras) or '(it has none)'}"
        )
    if args.action_key not in others:
        raise UserError(
            f"--action-key {args.action_key} is not in {args.dataset}: use one of {', '.join(others)}"
        )
    channels = [n for n in dataset.features[image_key]["shape"] if n == 3]
    if not channels:
        raise UserError(
            f"{image_key} of {args.dataset} is not a colour image: use another --image-key"
        )
    return image_key


def choose_episodes(args, episodes: LeRobotEpisodes) -> dict[int, str]:
    """Return {episode: instruction} of those to import. Raises UserError if it is unclear which show the task."""
    instructions = {e: episodes.episode_instruction(e) for e in episodes.frames}
    known = sorted(set(instructions.values()))
    listed = "; ".join(f"{text!r}" for text in known)
    if args.instruction:
        unknown = [text for text in args.instruction if text not in known]
        if unknown:
            raise UserError(
                f"--instruction {unknown[0]!r} is not in {args.dataset}: it has {listed}"
            )
        instructions = {e: text for e, text in instructions.items() if text in args.instruction}
    elif len(known) > 1:
        raise UserError(
            f"{args.dataset} has {len(known)} instructions ({listed}), and --task {args.task} is one task: "
            f"choose those that mean it with --instruction"
        )
    if any(not text.strip() for text in instructions.values()):
        raise UserError(
            f"{args.dataset} has an episode without an instruction, which the VLM cannot read: add one"
        )
    return instructions


def fit_actions(args, action: np.ndarray) -> np.ndarray:
    """Return the actions (frames, A) in [-1, 1], by --scale and --clip. Raises UserError if they are not."""
    A = action.shape[1]
    if not np.isfinite(action).all():
        raise UserError(f"{args.dataset} has actions that are not finite: remove those episodes")
    if args.scale:
        if len(args.scale) not in (1, A) or not all(0 < s < np.inf for s in args.scale):
            raise UserError(f"--scale must be one number > 0, or {A} of them (got {args.scale})")
        action = (action / np.array(args.scale)).astype(np.float32)
    low = action.min()
    high = action.max()
    if not args.clip and max(-low, high) > 1:
        largest = " ".join(f"{value:.4g}" for value in np.abs(action).max(axis=0))
        raise UserError(
            f"{args.dataset} has actions from {low:.4g} to {high:.4g}, outside [-1, 1]: use --clip if its environment "
            f"clips them, as Meta-World's does; otherwise use --scale with the value of the domain's action of 1 in "
            f"each dimension (the largest here: {largest})"
        )
    return action.clip(-1, 1)


def import_foreign(args, dataset) -> None:
    """Add the episodes of a LeRobot data set of other origin. Each is taken to succeed in its last step."""
    for flag, value in (("--domain", args.domain), ("--task", args.task)):
        if not value:
            raise UserError(f"{flag} is missing: {args.dataset} names no expert task")
    if args.image_size < 1:
        raise UserError(f"--image-size must be at least 1 (got {args.image_size})")
    image_key = choose_camera(args, dataset)
    episodes = LeRobotEpisodes(dataset, image_key, args.action_key)
    check_fits(args, episodes.action.shape[1])
    chosen = choose_episodes(args, episodes)
    rows = np.isin(episodes.episode, list(chosen))
    action = episodes.action.copy()
    action[rows] = fit_actions(args, action[rows])

    root = Path(args.data) / args.domain
    with folder_lock(root):
        folder = DemoFolder(root / args.task)
        for e, instruction in tqdm(chosen.items(), desc=args.dataset):
            running = digest(instruction, episodes.action[episodes.rows(e)])
            # Allocated at once: small arrays that stay between large ones that go would fragment
            # memory.
            image = np.empty((len(episodes.rows(e)), args.image_size, args.image_size, 3), np.uint8)
            for t, frame in enumerate(episodes.images(e)):
                running.update(to_bytes(frame).tobytes())
                image[t] = to_bytes(resize(frame, args.image_size))
            info = EpisodeInfo(
                domain=args.domain,
                task=args.task,
                instruction=instruction,
                source="expert",
                seed=0,
                protocol=None,
                origin=running.hexdigest(),
            )
            reward = np.eye(len(image), dtype=np.float32)[-1]
            folder.add(image, action[episodes.rows(e)], reward, info)
    print_result(args.dataset, folder.folder, folder.added, folder.present, folder.differing)


def import_exported(args, dataset, about: list[dict]) -> None:
    """Add the episodes that `export` wrote: the same files, header and all. None that is there is replaced."""
    if len(about) != dataset.num_episodes:
        raise UserError(
            f"{args.dataset} has changed since {ABOUT} was written: delete that file to import it as foreign"
        )
    root = Path(args.data)
    for episode in about:
        path = root / episode["path"]
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{args.dataset} would write {path}, outside of {root}: do not trust it"
            )
    (image_key,) = dataset.meta.camera_keys
    episodes = LeRobotEpisodes(dataset, image_key, "action")
    reward = np.asarray(
        dataset.hf_dataset.select_columns(["next.reward"]).with_format("numpy")[:]["next.reward"]
    )
    folder = DemoFolder(root)
    for e, episode in enumerate(tqdm(about, desc=args.dataset)):
        rows = episodes.rows(e)
        image = np.stack([to_bytes(frame) for frame in episodes.images(e)])
        arrays = (image, episodes.action[rows], reward[rows].reshape(-1).astype(np.float32))
        path = root / episode["path"]
        if path.exists():
            folder.compare(path, *arrays)
            continue
        header = episode["header"]
        info = EpisodeInfo(
            domain=header["domain"],
            task=header["task"],
            instruction=header["instruction"],
            source=header["source"],
            seed=int(header["seed"]),
            protocol=json.loads(header["protocol"]),
            executed=header.get("executed") == "1",
            made_by=json.loads(header["versions"]),
            origin=header.get("origin", ""),
            noise=json.loads(header.get("noise", "null")),
        )
        write_episode(path, *arrays, info)
        folder.added += 1
    print_result(args.dataset, root, folder.added, folder.present, folder.differing)


def export_lerobot(args) -> None:
    """Write every episode under --data, also in folders that are links, as one LeRobot data set."""
    if args.fps < 1:
        raise UserError(f"--fps must be at least 1 (got {args.fps})")
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} already exists: delete it, or use another --out")
    paths = [path for folder in episode_folders(args.data) for path in episode_files(folder)]
    if not paths:
        raise UserError(f"{args.data} holds no episodes: use a folder with episodes as --data")
    dataset_class = lerobot_dataset()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    first = lerobot_features(paths[0])
    dataset = dataset_class.create(out.name, args.fps, first, root=partial, use_videos=False)
    about = []
    for path in tqdm(paths, desc=str(out)):
        if lerobot_features(path) != first:
            raise UserError(
                f"{path} has images or actions of another size than {paths[0]}, and a LeRobot data set has one of "
                f"each: use the folder of one domain or task as --data"
            )
        handle, header = open_episode(path)
        image, action, reward = (handle.get_tensor(name) for name in ("image", "action", "reward"))
        for o, a, r in zip(image, action, reward):
            frame = {
                "observation.image": o,
                "action": a,
                "next.reward": r[None],
                "task": header["instruction"],
            }
            dataset.add_frame(frame)
        dataset.save_episode()
        about.append({"path": str(path.relative_to(args.data)), "header": header})
    dataset.finalize()
    write_json(partial / ABOUT, about)
    os.replace(partial, out)
    print(f"{out}: {len(about)} episodes")


def lerobot_features(path: Path) -> dict[str, dict]:
    """Return LeRobot's description of an episode file's tensors."""
    handle, _ = open_episode(path)
    image = tuple(handle.get_slice("image").get_shape()[1:])
    action = tuple(handle.get_slice("action").get_shape()[1:])
    return {
        "observation.image": {
            "dtype": "image",
            "shape": image,
            "names": ["height", "width", "channels"],
        },
        "action": {"dtype": "float32", "shape": action, "names": None},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    }


def import_lerobot(args) -> None:
    """Add the episodes of a LeRobot data set. args: tools/convert.py's Import."""
    dataset = open_lerobot(args.dataset)
    about = Path(dataset.root) / ABOUT
    if about.exists():
        import_exported(args, dataset, read_json(about))
    else:
        import_foreign(args, dataset)
