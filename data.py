"""
Episodes on disk, and the data set that the SFT stages draw from.

An episode is one safetensors file (the whole interface between collecting, RL and SFT, in simulation and on a robot):

    image  (T, H, W, 3) uint8     what the policy saw before each decision
    action (T, A) float32         the label at that moment, in [-1, 1]: D_e the expert's clean action, D_rl the policy's
                                  mean; what was executed may have had noise on top (see stage0_sft.py, stage_rl.py)
    reward (T,) float32           1 where the decision succeeded, else 0
    header: strings               format, domain, task, instruction, source (expert or online), success, seed,
                                  executed (1: `action` is what was done, as SACfD and a robot store it), protocol
                                  (the domain's, JSON; null where nobody knows it), versions (JSON)

Frames are read when they are used: a data set of any size costs memory only for those of a batch.

With `--cache` the SFT stages keep beside the episodes what a frozen vision tower and Q-Former make of each image:
<task>/.tokens-<key>/000017.safetensors, q (T, Q, D) bfloat16, 160 KB an image at the paper's size. Such a folder can be
deleted at any time.

python data.py import --from minari --dataset USER/DATASET --domain NAME       demonstrations into D_e
python data.py import --from lerobot --dataset USER/DATASET --domain NAME --task TASK       the same
python data.py export --to lerobot --data runs/D_e/NAME --out FOLDER       and back, bit for bit, with `import`
"""

from run import Refusal, alone_in, main, ranks, read_json, together, versions, whole, write_json  # isort: skip  first, for Ctrl-C while torch is imported

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tokens
from tqdm import tqdm

FORMAT = "ire-vla episode 1"

# Every initial state is drawn from a seed, and each use has seeds of its own, so that none can leak into another.
EXPERT_SEED = 0  # D_e: attempt k of a task starts from EXPERT_SEED + k
IMPORT_SEED = 100_000  # D_e, from elsewhere: a number for each episode, not a seed that was used
ONLINE_SEED = 1_000_000  # D_rl: attempt k starts from ONLINE_SEED + k
BORROW_SEED = 1_500_000  # stage 1's attempts under other sentences
RL_SEED = 2_000_000  # stage 1's training environments
EVAL_SEED = 9_000_000  # evaluation: the same episodes at every stage and for every method


def write_episode(
    path, image, action, reward, *, domain, task, instruction, source, seed, protocol, executed=False, made_by=None
):
    """Write one episode whole or not at all.

    image (T, H, W, 3) uint8, action (T, A) float32 in [-1, 1], reward (T,) float32. executed: is `action` what was
    done? Else it is what expert or policy would do, without the noise. made_by: versions, if not these.
    Raises ValueError for what is not an episode (shapes, NaN), Refusal when the disk is full.
    """
    image, action = np.ascontiguousarray(image, np.uint8), np.ascontiguousarray(action, np.float32)
    reward = np.ascontiguousarray(reward, np.float32)
    if image.ndim != 4 or image.shape[-1] != 3 or action.ndim != 2 or not len(image) == len(action) == len(reward):
        raise ValueError(f"not an episode: image {image.shape}, action {action.shape}, reward {reward.shape}")
    if not np.isfinite(action).all() or np.abs(action).max() > 1:
        raise ValueError(f"{path}: actions must be finite and in [-1, 1]")
    header = {
        "format": FORMAT, "domain": domain, "task": task, "instruction": instruction, "source": source,
        "success": str(int(reward.max() > 0)), "seed": str(seed), "executed": str(int(executed)),
        "protocol": json.dumps(protocol, sort_keys=True),
        "versions": json.dumps(made_by or versions()),
    }  # fmt: skip
    with whole(path) as tmp:
        save_file({"image": image, "action": action, "reward": reward}, tmp, header)


def open_episode(path):
    """(handle, header) of an episode file, memory-mapped; `handle.get_slice("image")[t]` reads one frame.

    Raises Refusal for a file that is cut short or is not an episode.
    """
    try:
        handle = safe_open(path, framework="np")
        header = handle.metadata() or {}
        if header.get("format") != FORMAT:
            raise Refusal(f"{path} is not an episode of this project ({FORMAT!r}): move it out of that folder")
        T, _, _, C = handle.get_slice("image").get_shape()
        if C != 3 or handle.get_slice("action").get_shape()[0] != T or handle.get_slice("reward").get_shape() != [T]:
            raise Refusal(f"{path}: image, action and reward differ in length: delete it and collect again")
    except (SafetensorError, ValueError, OSError) as error:
        raise Refusal(f"{path} is not a whole episode file ({error}): delete it and collect again") from error
    return handle, header


class Frames:
    """An episode file's pictures, (T, H, W, 3) uint8, each read when it is asked for.

    Not through the memory map: for a random frame of 12 KB that would fetch what lies around it too, a file at a time,
    and a large data set would need more maps than Linux gives a process (results/benchmarks/loading.json).
    """

    def __init__(self, path, shape):
        with open(path, "rb") as f:  # a safetensors file: the header's length, the header, the tensors
            length = int.from_bytes(f.read(8), "little")
            self.at = 8 + length + json.loads(f.read(length))["image"]["data_offsets"][0]
        self.path, self.shape, self.size = path, tuple(shape), int(np.prod(shape[1:]))

    def __getitem__(self, which):
        """Frame t, or frames begin:end."""
        begin, end, _ = (slice(which, which + 1) if isinstance(which, int) else which).indices(self.shape[0])
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, (end - begin) * self.size, self.at + begin * self.size)
        finally:
            os.close(descriptor)
        frames = np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
        return frames[0] if isinstance(which, int) else frames


def open_tokens(path):
    """The memory-mapped handle of a file of image tokens, or None where there is no whole one."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        return None


def episode_files(folder):
    """The episodes in `folder`, sorted paths; a file whose name is no number is somebody's own."""
    return sorted(p for p in Path(folder).glob("[0-9]*.safetensors") if p.stem.isdecimal())


def attempts(folder):
    """The attempts whose episodes are in `folder`, as sorted numbers: 000017.safetensors is attempt 17."""
    return sorted(int(p.stem) for p in episode_files(folder))


class Episodes:
    """The frames of some folders of episodes, drawn at random: D_e, or D_e + D_rl.

    folders: {folder: weight}; a frame's chance is its folder's weight over the number of frames in the folder, so a
    task with long episodes counts no more than one with short ones. domain: the domain's module, for checking.
    """

    def __init__(self, folders, domain, image_size):
        self.paths, self.images, self.actions, self.instructions = [], [], [], []  # an entry for each episode
        self.episode, self.frame, chance = [], [], []  # for each frame
        name, protocol = domain.__name__.split(".")[-1], json.dumps(domain.PROTOCOL, sort_keys=True)
        for folder, weight in folders.items():
            begin = len(self.frame)
            for path in episode_files(folder):
                handle, header = open_episode(path)
                for key, want in (("domain", name), ("protocol", protocol)):
                    if header[key] not in (want, "null"):  # null: imported, by somebody who knows that it fits
                        raise Refusal(
                            f"{path} was recorded with {key} {header[key]}, but this is {want}: delete its folder "
                            f"and give the command again, so that it is collected anew"
                        )
                frames = Frames(path, handle.get_slice("image").get_shape())
                T, H, W, _ = frames.shape
                if (image_size, image_size) != (H, W):
                    raise Refusal(f"{path} holds {H}x{W} images, but --image-size is {image_size}: use the same, or "
                                  f"delete its folder to collect again")  # fmt: skip
                action = handle.get_tensor("action")
                if not np.isfinite(action).all():
                    raise Refusal(f"{path} holds actions that are not finite: delete it and collect again")
                if self.actions and action.shape[1] != (A := self.actions[0].shape[1]):
                    raise Refusal(f"{path} holds actions of {action.shape[1]} dimensions, the ones before it of {A}: "
                                  f"delete it and collect again")  # fmt: skip
                self.frame += range(T)
                self.episode += [len(self.images)] * T
                self.paths.append(path)
                self.images.append(frames)
                self.actions.append(action)
                self.instructions.append(header["instruction"])
            if len(self.frame) == begin:
                raise Refusal(f"{folder} holds no episodes: give the command that collects them again")
            chance += [weight / (len(self.frame) - begin)] * (len(self.frame) - begin)
        self.frame, self.episode = np.array(self.frame), np.array(self.episode)
        self.cumulative = np.cumsum(chance) / np.sum(chance)

    def __len__(self):
        return len(self.frame)

    @torch.no_grad()
    def cache(self, vla):
        """Put vla.image_tokens(image) in the place of every image, from files beside the episodes; makes those that are
        missing, damaged, or of other pictures, each process its share. They are the pictures as recorded, so with a
        cache there is no image augmentation: a VLM that has seen the world does not need it.

        Raises Refusal where SFT trains what makes them, and where a random sample of the files says something else.
        """
        if any(w.requires_grad for w in vla.image_side().values()):
            raise Refusal("--cache is for a frozen vision tower and Q-Former: delete the stage's .partial "
                          "folder, and leave --cache out or give stage 0 a pre-trained --vlm and --lora-targets "
                          "language")  # fmt: skip
        (rank, world), key, found = ranks(), vla.image_key(), []
        kept = [path.parent / f".tokens-{key}" / path.name for path in self.paths]
        with alone_in(self.paths[0].parents[1]) if rank == 0 else contextlib.nullcontext():  # runs may share D_e
            together()
            for e in tqdm(range(rank, len(kept), world), desc="image tokens", disable=rank > 0):
                with open(self.paths[e], "rb") as f:
                    about = {"episode": hashlib.file_digest(f, "sha256").hexdigest()}
                if (tokens := open_tokens(kept[e])) and tokens.metadata() == about:
                    found.append(e)
                    continue
                images = self.images[e][:].copy()  # what was read is read-only, and torch warns of that
                q = [vla.image_tokens(x) for x in np.split(images, range(32, len(images), 32))]
                with whole(kept[e]) as tmp:
                    save_tokens({"q": torch.cat(q).bfloat16().cpu()}, tmp, about)
            together()
        rng = np.random.default_rng()  # another sample each time; nothing that is trained depends on it
        for e in rng.choice(found, min(8, len(found)), replace=False):
            t = int(rng.integers(len(self.actions[e])))
            want = vla.image_tokens(self.images[e][t : t + 1].copy())[0].float().cpu()  # (Q, D)
            error = (open_tokens(kept[e]).get_slice("q")[t].float() - want).norm() / want.norm()
            if not error < 0.05:  # bfloat16's rounding, also another machine's, is far below
                raise Refusal(f"{kept[e]} is not what this VLM makes of {self.paths[e]}: delete {kept[e].parent}")
        self.images = [open_tokens(path).get_slice("q") for path in kept]

    def batch(self, rng, n, rank=0, world=1):
        """n random frames: image (n, H, W, 3) uint8 or, once `cache` was called, their tokens (n, Q, D) bfloat16;
        instructions (n strings), action (n, A) float32. Of several processes that draw the same n, this one gets each
        `world`-th from `rank` on."""
        index = np.searchsorted(self.cumulative, rng.random(n))
        index = index[np.lexsort((self.frame[index], self.episode[index]))]  # neighbours on disk are read together
        index = index[rank::world]
        episode, frame = self.episode[index], self.frame[index]
        image = [self.images[e][int(t)] for e, t in zip(episode, frame)]
        image = torch.stack(image) if torch.is_tensor(image[0]) else np.stack(image)
        action = np.stack([self.actions[e][t] for e, t in zip(episode, frame)])
        return image, [self.instructions[e] for e in episode], action


# ----------------------------------------------------------------------------------------------------------------------
# Interchange

ABOUT = "meta/ire-vla.json"  # in a LeRobot data set made here: each episode's file and header


def lerobot_dataset():
    """LeRobot's own class. Its library and this project pin different releases, so only these two commands need it."""
    try:
        import datasets
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise Refusal(f"lerobot cannot be imported here ({error}): it wants a venv of its own, see the README's "
                      f"Interchange") from error  # fmt: skip
    datasets.disable_progress_bars()  # one for each episode, beside ours
    return LeRobotDataset


def export_episodes(out: str, data: str, to: Literal["lerobot"] = "lerobot", fps: int = 10):
    """Write episodes as a LeRobot data set (v3, images as PNG, so that nothing is lost); `import` reads it back.

    Args:
        out: the data set's new folder.
        data: every episode under this folder: a domain's D_e, a task's, or a run's D_rl.
        to: the format.
        fps: decisions a second; LeRobot wants to know, this project does not.
    """
    out, partial = Path(out), Path(out).with_name(f".{Path(out).name}.partial")
    if out.exists():
        raise Refusal(f"{out} is there already: delete it, or give another --out")
    LeRobotDataset, dataset, about = lerobot_dataset(), None, []
    paths = [p for p in sorted(Path(data).rglob("[0-9]*.safetensors")) if not p.parent.name.startswith(".")]  # tokens
    for path in tqdm(paths, desc=str(out)):
        handle, header = open_episode(path)
        image, action, reward = (handle.get_tensor(name) for name in ("image", "action", "reward"))
        features = {
            "observation.image": {"dtype": "image", "shape": image.shape[1:], "names": ["height", "width", "channels"]},
            "action": {"dtype": "float32", "shape": action.shape[1:], "names": None},
            "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        }
        if dataset is None:
            shutil.rmtree(partial, ignore_errors=True)
            dataset, first = LeRobotDataset.create(out.name, fps, features, root=partial, use_videos=False), features
        if features != first:
            raise Refusal(f"{path} has images or actions of another size than {paths[0]}, and a LeRobot data set has "
                          f"one of each: give --data one domain's or one task's folder")  # fmt: skip
        for o, a, r in zip(image, action, reward):
            dataset.add_frame({"observation.image": o, "action": a, "next.reward": r[None],
                               "task": header["instruction"]})  # fmt: skip
        dataset.save_episode()
        about.append({"path": str(path.relative_to(data)), "header": header})
    if not about:
        raise Refusal(f"{data} holds no episodes: give --data a folder that does")
    dataset.finalize()
    write_json(partial / ABOUT, about)
    os.replace(partial, out)
    print(f"{out}: {len(about)} episodes")


def import_episodes(
    dataset: str, source: Annotated[Literal["lerobot", "minari"], tyro.conf.arg(name="from")], domain: str = "",
    data: str = "runs/D_e", task: str = "", image_size: int = 64, image_key: str = "", action_key: str = "action",
):  # fmt: skip
    """Add a LeRobot or Minari data set's episodes to D_e; they count among a task's demonstrations.

    Args:
        dataset: a LeRobot data set's folder or hub name, or Minari's name for one.
        source: whose data set it is.
        domain: domains/<name>.py; needless for what `export` wrote.
        data: D_e's folder. What `export` wrote gets back the paths that it had under export's --data.
        task: LeRobot: the domain's task that it shows; needless for what `export` wrote.
        image_size: pixels of the square image; what `export` wrote keeps its own.
        image_key: LeRobot: the camera; empty: the only one.
        action_key: LeRobot: the action, of the domain's kind, in [-1, 1].
    """
    if source == "minari":
        import_minari(dataset, domain, data, image_size)
    else:
        import_lerobot(dataset, domain, data, task, image_size, image_key, action_key)


def import_seed(dataset, e):
    """The number of a foreign data set's episode e: a thousand for each --dataset, so that two of a task do not get in
    each other's way."""
    return IMPORT_SEED + 1000 * (zlib.crc32(dataset.encode()) % 800) + e


def import_lerobot(dataset, domain, data, task, image_size, image_key, action_key):
    """The episodes of a LeRobot data set. Those that `export` wrote are what they were, header and all; of others the
    last decision is taken to be the one that succeeds. No episode that is there already is replaced."""
    name, root, LeRobotDataset = dataset, Path(data), lerobot_dataset()
    local = (Path(name) / "meta/info.json").exists()
    try:
        where = dict(repo_id=Path(name).name, root=name) if local else dict(repo_id=name)
        dataset = LeRobotDataset(**where, video_backend="pyav")  # which brings FFmpeg along
    except Exception as error:  # noqa: BLE001  whatever the library or the network has to say
        said = " ".join(str(error).split())
        raise Refusal(f"{name} is no LeRobot data set (version 3) that can be read ({said})") from error
    ours = read_json(dataset.root / ABOUT) if (dataset.root / ABOUT).exists() else None
    cameras = [image_key] if image_key else dataset.meta.camera_keys
    if len(cameras) != 1 or not {*cameras, action_key} <= set(dataset.features):
        raise Refusal(f"{name} has {', '.join(dataset.features)}: name its --image-key and --action-key")
    if ours is None and not (domain and task):
        raise Refusal(f"{name} was not exported from here: give the --domain and the --task that it shows")
    if ours is None and not (Path(__file__).parent / "domains" / f"{domain}.py").exists():
        raise Refusal(f"there is no domains/{domain}.py: give one of those that are there as --domain")
    if ours is not None and len(ours) != dataset.num_episodes:
        raise Refusal(f"{name} was changed since {ABOUT} was written: delete that file to import it as a foreign one")
    made, frames = 0, (dataset[i] for i in range(len(dataset)))
    for e, episode in groupby(tqdm(frames, desc=name, total=len(dataset)), lambda frame: int(frame["episode_index"])):
        episode = list(episode)
        image = torch.stack([frame[cameras[0]] for frame in episode])  # (T, 3, H, W) in [0, 1]
        action = torch.stack([frame[action_key] for frame in episode]).float()  # (T, A)
        if not action.abs().max() <= 1:  # nor NaN
            raise Refusal(f"{name} has actions outside [-1, 1] in episode {e}: save it with each dimension divided by "
                          f"what the domain's action of 1 means in its units, then import that")  # fmt: skip
        if ours is not None:
            header, path = ours[e]["header"], root / ours[e]["path"]
            if not path.resolve().is_relative_to(root.resolve()):
                raise Refusal(f"{name} wants to write {path}, outside of {root}: do not trust it")
            reward = [float(frame["next.reward"]) for frame in episode]
            about = {key: header[key] for key in ("domain", "task", "instruction", "source", "seed")}
            about |= {"protocol": json.loads(header["protocol"]), "made_by": json.loads(header["versions"])}
            about |= {"executed": header.get("executed") == "1"}
        else:
            seed = import_seed(name, e)
            path, reward = root / domain / task / f"{seed:06d}.safetensors", np.eye(len(episode))[-1]
            about = dict(domain=domain, task=task, instruction=episode[0]["task"], source="expert", seed=seed)
            about |= {"protocol": None}
            side = min(image.shape[-2:])  # the middle square, then resized as VLA.preprocess does
            top, left = ((n - side) // 2 for n in image.shape[-2:])
            image = image[..., top : top + side, left : left + side]
            image = F.interpolate(image, (image_size, image_size), mode="bicubic", antialias=True).clamp(0, 1)
        if not path.exists():
            image = (image * 255).round().byte().permute(0, 2, 3, 1)  # exact for what was a byte
            write_episode(path, image.numpy(), action.numpy(), reward, **about)
            made += 1
    print(f"{data}: {made} of {dataset.num_episodes} episodes; the others were there already")


def import_minari(dataset, domain, data, image_size):
    """The episodes of a Minari data set, in the domain's pictures and actions. Downloads it where it is missing."""
    from domains import load_domain

    module = load_domain(domain)  # before minari, which would have MuJoCo draw on a screen
    import minari

    if not hasattr(module, "from_minari"):
        raise Refusal(f"domains/{domain}.py does not say how Minari's episodes are read: give it a from_minari")
    try:
        episodes = minari.load_dataset(dataset, download=True)
    except Exception as error:  # noqa: BLE001  whatever the library or the network has to say
        raise Refusal(f"the data set {dataset} cannot be had ({error}): see `minari list remote`") from error
    made = {task: 0 for task in module.EXPERT_TASKS}
    for episode in tqdm(episodes.iterate_episodes(), desc=dataset, total=episodes.total_episodes):
        for task, image, action, reward in module.from_minari(episode, image_size):
            seed = import_seed(dataset, episode.id)
            path = Path(data) / domain / task / f"{seed:06d}.safetensors"
            if not path.exists():
                write_episode(
                    path, image, action, reward, domain=domain, task=task, instruction=module.INSTRUCTIONS[task],
                    source="expert", seed=seed, protocol=module.PROTOCOL,
                )  # fmt: skip
                made[task] += 1
    print(f"{data}/{domain}: {', '.join(f'{n} {task}' for task, n in made.items())}; others were there already")


COMMANDS = {"import": import_episodes, "export": export_episodes}

if __name__ == "__main__":
    main(lambda _: tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__), None)
