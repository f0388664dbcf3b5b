"""The episode file: write, read, check. data.py describes the format.

This file does not import torch, so that the processes that record episodes start quickly.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.errors import UserError
from common.files import atomic_write, check_links
from common.versions import versions

FORMAT = "ire-vla episode 1"
HEADER = {"domain", "task", "instruction", "protocol"}  # entries that every reader uses

# Every initial state is drawn from a seed. Each use has its own range of seeds, so that none leaks
# into another.
EXPERT_SEED = 0  # D_e: attempt k of a task starts from EXPERT_SEED + k
IMPORT_SEED = 100_000  # imported D_e: a number for each episode, not a seed that was used
ONLINE_SEED = 1_000_000  # D_rl: attempt k starts from ONLINE_SEED + k
FALLBACK_SEED = 1_500_000  # stage 1's attempts with the instructions of other tasks
RL_SEED = 2_000_000  # stage 1's training environments
EVAL_SEED = 9_000_000  # evaluation: the same episodes after every stage and for every method


@dataclass
class EpisodeInfo:
    """The header of an episode file."""

    domain: str
    task: str
    instruction: str
    source: str  # "expert" or "online"
    seed: int
    protocol: Mapping | None  # the domain's PROTOCOL; None if it is not known
    executed: bool = False  # whether `action` includes the noise, as executed
    made_by: Mapping | None = None  # package versions, if not the installed ones
    origin: str = ""  # digest of the foreign episode that was imported
    noise: Mapping | None = None  # a scripted expert's action_noise_std and random_burst_prob


def write_episode(
    path: str | Path, image: object, action: object, reward: object, info: EpisodeInfo
) -> None:
    """Write one episode file atomically.

    image (T, H, W, 3) uint8; action (T, A) float32 in [-1, 1]; reward (T,) float32. Raises
    ValueError for wrong shapes, NaN or actions outside [-1, 1], and UserError when the disk is
    full.
    """
    image = np.ascontiguousarray(image, np.uint8)
    action = np.ascontiguousarray(action, np.float32)
    reward = np.ascontiguousarray(reward, np.float32)
    same_length = len(image) == len(action) == len(reward)
    if image.ndim != 4 or image.shape[-1] != 3 or action.ndim != 2 or not same_length:
        raise ValueError(
            f"not an episode: image {image.shape}, action {action.shape}, reward {reward.shape}"
        )
    if not np.isfinite(action).all() or np.abs(action).max() > 1:
        raise ValueError(f"{path}: actions must be finite and in [-1, 1]")
    header = {
        "format": FORMAT,
        "domain": info.domain,
        "task": info.task,
        "instruction": info.instruction,
        "source": info.source,
        "success": str(int(reward.max() > 0)),
        "seed": str(info.seed),
        "executed": str(int(info.executed)),
        "protocol": json.dumps(info.protocol, sort_keys=True),
        "versions": json.dumps(info.made_by or versions()),
    }
    if info.origin:
        header["origin"] = info.origin
    if info.noise:
        header["noise"] = json.dumps(info.noise, sort_keys=True)
    with atomic_write(path) as tmp:
        save_file({"image": image, "action": action, "reward": reward}, tmp, header)


def open_episode(path: str | Path) -> tuple[safe_open, dict[str, str]]:
    """Return (handle, header) of an episode file, memory-mapped. `handle.get_slice("image")[t]` reads one frame.

    Raises UserError for a file that is truncated or is not an episode, and OSError if it cannot be read.
    """
    check_links(path)
    with open(path, "rb"):  # its error has the cause and the file's name
        pass
    try:
        handle = safe_open(path, framework="np")
        header = handle.metadata() or {}
        if header.get("format") != FORMAT:
            raise UserError(
                f"{path} is not an episode of this project ({FORMAT!r}): move it out of that folder"
            )
        if not header.keys() >= HEADER:
            raise UserError(
                f"{path} lacks {min(HEADER - header.keys())} in its header: delete it and collect again"
            )
        json.loads(header["protocol"])
        image, action, reward = (handle.get_slice(name) for name in ("image", "action", "reward"))
        T, _, _, C = image.get_shape()
        if C != 3 or (action.get_shape()[0], *reward.get_shape()) != (T, T) or T == 0:
            raise UserError(
                f"{path}: image, action and reward differ in length; delete the file and collect again"
            )
        if (image.get_dtype(), action.get_dtype(), len(action.get_shape())) != ("U8", "F32", 2):
            raise UserError(
                f"{path}: image must be uint8 and action (T, A) float32 (got {image.get_dtype()} and "
                f"{action.get_shape()} {action.get_dtype()}): convert it with write_episode of common/episode_file.py"
            )
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete episode file ({error}): delete it and collect again"
        ) from error
    return handle, header


def episode_files(folder: str | Path) -> list[Path]:
    """Return the episode files in `folder`, sorted. Files with other names than 000017.safetensors are ignored."""
    return sorted(Path(folder).glob(f"{'[0-9]' * 6}.safetensors"))


def episode_folders(root: str | Path) -> list[Path]:
    """Return the folders under `root`, itself included, that hold episode files, sorted. Links to folders are followed.

    Hidden folders, such as the token cache's, are ignored.
    """
    found = []
    visited = set()
    for place, names, _ in os.walk(root, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        real = os.path.realpath(place)
        if real in visited:  # a link to a folder around it
            names.clear()
        elif episode_files(place):
            found.append(Path(place))
        visited.add(real)
    return sorted(found)


def episode_ids(folder: str | Path) -> list[int]:
    """Return the attempts whose episodes are in `folder`, sorted: 000017.safetensors is attempt 17."""
    return sorted(int(p.stem) for p in episode_files(folder))


def executed_episodes(folder: str | Path) -> list[safe_open]:
    """Return the open files of the episodes in `folder` whose `action` is what was executed.

    A critic can learn from these alone. The episodes that PPO's stage 1 records at its end hold the
    policy's mean.
    """
    opened = [open_episode(Path(folder) / f"{k:06d}.safetensors") for k in episode_ids(folder)]
    # Older files lack the entry.
    return [handle for handle, header in opened if header.get("executed", "1") == "1"]


class FrameReader:
    """The images of an episode file, (T, H, W, 3) uint8, each read on access.

    They are not read through the memory map. A random frame of 12 KB would also fetch its
    neighbours, and a large data set would need more maps than Linux allows a process
    (results/benchmarks/loading.json).
    """

    def __init__(self, path: Path, shape: tuple[int, ...]):
        # A safetensors file: the header's length in 8 bytes, the header, the tensors.
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        self.offset = 8 + length + header["image"]["data_offsets"][0]
        self.path = path
        self.shape = tuple(shape)
        self.frame_bytes = int(np.prod(shape[1:]))

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """Return frame t (H, W, 3), or frames begin:end (n, H, W, 3)."""
        frames = slice(index, index + 1) if isinstance(index, int) else index
        begin, end, _ = frames.indices(self.shape[0])
        fd = os.open(self.path, os.O_RDONLY)
        try:
            content = os.pread(
                fd, (end - begin) * self.frame_bytes, self.offset + begin * self.frame_bytes
            )
        finally:
            os.close(fd)
        images = np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])
        return images[0] if isinstance(index, int) else images
