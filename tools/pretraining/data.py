"""The scenes of the pre-training on disk: drawn once by worker processes, in shards, and read as batches.

A shard is a folder with one .npy file for each array of tools/pretraining/scenes.py, complete or absent.
"""

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.demonstrations import stop_pool
from common.errors import UserError
from common.files import make_folder
from common.processes import starting_workers

SHARD = 1000  # scenes
ARRAYS = ("images", "parts", "depth", "tables", "gripper")


def write_shard(job: tuple[str, int, int, int]) -> None:
    """Draw the scenes of one shard and write its folder. job: root, seed, number of the shard, niceness."""
    root, seed, shard, niceness = job
    os.nice(max(0, niceness - os.nice(0)))
    # Here, because MuJoCo is needed in the workers alone.
    from tools.pretraining.scenes import draw_scenes

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
    jobs = [(str(root), seed, shard, niceness) for shard in missing]
    with starting_workers():
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver"))
        drawn = [pool.submit(write_shard, job) for job in jobs]
    try:
        bar = tqdm(
            as_completed(drawn), f"scenes, {SHARD} each", total=shards, initial=shards - len(jobs)
        )
        for shard in bar:
            shard.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that draws scenes was killed, most often because memory ran out: use a smaller --threads, and "
            "the same command resumes"
        ) from error
    finally:
        stop_pool(pool)


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
