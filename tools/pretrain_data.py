"""The scenes of the pre-training on disk: drawn once by worker processes, in shards, and read as batches.

A shard is a folder with one .npy file for each array of tools/pretrain_scenes.py, complete or absent.
"""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import make_folder
from common.processes import preload_in_workers, starting_workers

SHARD = 1000  # scenes
ARRAYS = ("images", "parts", "depth", "tables", "gripper")


def write_shard(job: tuple[str, int, int, int]) -> None:
    """Draw the scenes of one shard and write its folder. job: root, seed, number of the shard, niceness."""
    root, seed, shard, niceness = job
    os.nice(max(0, niceness - os.nice(0)))
    # Here, because MuJoCo is needed in the workers alone.
    from tools.pretrain_scenes import draw_scenes

    tmp = Path(root) / f".{shard:05d}.{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    make_folder(tmp)
    for name, array in draw_scenes(seed, shard, SHARD).items():
        np.save(tmp / f"{name}.npy", array)
    os.replace(tmp, shard_folder(root, shard))


def shard_folder(root: str | Path, shard: int) -> Path:
    """Return the folder of a shard."""
    return Path(root) / f"{shard:05d}"


def draw_missing(root: str | Path, seed: int, shards: int, processes: int, niceness: int) -> None:
    """Draw the shards 0 .. shards - 1 that are missing in `root`. A killed run keeps its complete shards."""
    make_folder(root)
    missing = [i for i in range(shards) if not shard_folder(root, i).exists()]
    if not missing:
        return
    for left in Path(root).glob(".*"):
        shutil.rmtree(left, ignore_errors=True)
    preload_in_workers("tools.pretrain_scenes")
    jobs = [(str(root), seed, shard, niceness) for shard in missing]
    with starting_workers():
        pool = multiprocessing.get_context("forkserver").Pool(processes)
    with pool:
        done = pool.imap_unordered(write_shard, jobs)
        for _ in tqdm(done, desc=f"scenes, {SHARD} each", total=shards, initial=shards - len(jobs)):
            pass


class Scenes:
    """The scenes on disk, as batches."""

    def __init__(self, root: str | Path, shards: int):
        self.arrays = {
            name: [
                np.load(shard_folder(root, i) / f"{name}.npy", mmap_mode="r") for i in range(shards)
            ]
            for name in ARRAYS
        }
        self.size = shards * SHARD

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays of some scenes, by their numbers."""
        indices = np.sort(indices)  # near each other on disk
        return {
            name: np.stack([shards[i // SHARD][i % SHARD] for i in indices])
            for name, shards in self.arrays.items()
        }
