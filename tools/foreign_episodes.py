"""Foreign episodes on their way into D_e: held against the domain, and each added once."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.episode_file import (
    IMPORT_SEED,
    ONLINE_SEED,
    EpisodeInfo,
    episode_files,
    episode_folders,
    episode_ids,
    open_episode,
    write_episode,
)
from common.errors import UserError
from domains import load_domain


class DemoFolder:
    """One task's folder of D_e, into which foreign episodes are added, each once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.added = 0
        self.present = 0
        self.differing: list[Path] = []
        self.by_origin = {}
        self.by_action = {}  # imports from before the header had `origin`
        imported = [k for k in episode_ids(folder) if IMPORT_SEED <= k < ONLINE_SEED]
        for k in imported:
            path = folder / f"{k:06d}.safetensors"
            handle, header = open_episode(path)
            if "origin" in header:
                self.by_origin[header["origin"]] = path
            else:
                self.by_action[handle.get_tensor("action").tobytes()] = path
        self.next_id = max(imported, default=IMPORT_SEED - 1) + 1

    def add(
        self, image: np.ndarray, action: np.ndarray, reward: np.ndarray, info: EpisodeInfo
    ) -> None:
        """Write an episode under the next number, if none of its origin is there.

        image (T, H, W, 3) uint8; action (T, A) float32; reward (T,) float32.
        """
        path = self.by_origin.get(info.origin) or self.by_action.get(action.tobytes())
        if path is not None:
            self.compare(path, image, action, reward)
            return
        info.seed = self.next_id
        path = self.folder / f"{self.next_id:06d}.safetensors"
        write_episode(path, image, action, reward, info)
        self.by_origin[info.origin] = path
        self.next_id += 1
        self.added += 1

    def compare(
        self, path: Path, image: np.ndarray, action: np.ndarray, reward: np.ndarray
    ) -> None:
        """Count the episode at `path` as present if it holds this content, else as differing."""
        if same_content(path, image, action, reward):
            self.present += 1
        else:
            self.differing.append(path)


def same_content(path: Path, image: np.ndarray, action: np.ndarray, reward: np.ndarray) -> bool:
    """Return whether an episode file holds these arrays."""
    handle, _ = open_episode(path)
    stored = [handle.get_tensor(name) for name in ("image", "action", "reward")]
    return all(np.array_equal(a, b) for a, b in zip(stored, (image, action, reward)))


def digest(
    instruction: str, action: np.ndarray, images: Iterable[np.ndarray] = ()
) -> "hashlib._Hash":
    """Return the running SHA-256 of an episode's instruction, action and images, to which more images can be added."""
    running = hashlib.sha256(json.dumps([instruction, action.shape]).encode())
    running.update(np.ascontiguousarray(action, np.float32).tobytes())
    for image in images:
        running.update(np.ascontiguousarray(image).tobytes())
    return running


def print_result(name: str, place: Path, added: int, present: int, differing: list[Path]) -> None:
    """Print how many episodes were added. Raises UserError if some differ from those that are there."""
    print(f"{place}: {added} episodes added, {present} were there already")
    if differing:
        raise UserError(
            f"{len(differing)} episodes of {name} differ from what is there, such as {differing[0]}, and were not "
            f"imported: use the arguments of the first import, remove those files, or use another --data"
        )


def check_fits(args, action_dim: int) -> None:
    """Raise UserError if images of --image-size or actions do not fit the domain or what D_e holds of it."""
    wanted = domain_action_dim(args)
    for folder in episode_folders(Path(args.data) / args.domain):
        path = episode_files(folder)[0]
        handle, _ = open_episode(path)
        size = handle.get_slice("image").get_shape()[1]
        wanted = wanted or handle.get_slice("action").get_shape()[1]
        if size != args.image_size:
            raise UserError(
                f"{path} holds {size}x{size} images, but --image-size is {args.image_size}: use {size}"
            )
    if not wanted:
        raise UserError(
            f"domains/{args.domain}.py cannot be loaded in this environment, so the action's dimensions cannot be "
            f"checked: set --action-dim to those of the domain"
        )
    if action_dim != wanted:
        raise UserError(
            f"{args.dataset} has actions of {action_dim} dimensions, but {args.domain} has {wanted}: "
            f"choose another --action-key, or convert the data set first"
        )


def domain_action_dim(args) -> int:
    """Return the dimensions of the domain's action, or --action-dim if the domain needs packages that are missing."""
    try:
        domain = load_domain(args.domain)
    except ImportError:  # LeRobot's interpreter lacks the packages of some domains
        return args.action_dim
    if args.task not in domain.EXPERT_TASKS:
        known = ", ".join(domain.EXPERT_TASKS)
        raise UserError(
            f"--task must be an expert task of {args.domain} (got {args.task}): known are {known}"
        )
    env = domain.make(args.task, args.image_size)
    dim = env.action_space.shape[0]
    env.close()
    return dim
