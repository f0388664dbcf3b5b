"""Random frames a second from a set of episodes larger than the memory that may hold it, beside .npz files.

The set: some Meta-World episodes recorded here by the expert, copied until a format has --gb of pictures. Ours draws by
data.Episodes.batch from safetensors files, memory-mapped; theirs loads each drawn frame's episode from one .npz file,
plain or compressed, as collected data is often kept. Each side is a process of its own; they take turns; medians over
rounds of the frames a second of some batches.

A side's process, with what the system keeps of its files in memory, may take --limit GB, by a memory cgroup of its own.
Where none can be made (not root, or a container that forbids it), the kept pages of all files are dropped before each
round instead (posix_fadvise): no round then finds in memory what an earlier one has read. The output says which it was.

LeRobot's reader is not among the sides: lerobot (0.3 and 0.4) wants torch below 2.8 and does not install beside
requirements.txt.
Writes results/benchmarks/loading.json. Takes three times --gb of disk for as long as it runs.

python benchmarks/loading.py
python benchmarks/loading.py --gb 0.2 --limit 0.6 --batches 2          a try
"""

import argparse
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks._turns import keep, row  # noqa: E402

TASKS, SIZE = ["drawer-open", "door-open", "button-press", "window-open"], 64


def write(folder, gigabytes):
    """The set in three formats, folder/<format>/<task>/000000..., and the number of its frames."""
    from data import open_episode
    from stage0_sft import record

    originals, frames = [], 0
    for task in TASKS:
        where = {name: folder / name / task for name in ("ours", "npz", "npz compressed")}
        for path in where.values():
            path.mkdir(parents=True)
        record(("metaworld", task, SIZE, 0.0, 0.0, where["ours"], 0))  # the expert's first attempt, without noise
        episode, _ = open_episode(where["ours"] / "000000.safetensors")
        image, action = episode.get_tensor("image"), episode.get_tensor("action")
        np.savez(where["npz"] / "000000.npz", image=image, action=action)
        np.savez_compressed(where["npz compressed"] / "000000.npz", image=image, action=action)
        originals.append((where, image.nbytes, len(image)))
    size = 0
    for k in itertools.count():
        for where, nbytes, length in originals:
            if size > 1e9 * gigabytes:
                return frames
            for path in where.values() if k else ():
                first = next(path.glob("000000.*"))
                shutil.copy(first, path / f"{k:06d}{first.suffix}")
            size, frames = size + nbytes, frames + length


def ours(folder):
    from data import Episodes
    from domains import metaworld as domain

    data = Episodes({folder / task: 1.0 for task in TASKS}, domain, SIZE)
    return data.batch


def theirs(folder):
    """Each episode with a drawn frame is loaded once for a batch; which frame of it, its own length says."""
    paths = sorted(folder.glob("*/*.npz"))

    def batch(rng, n):
        images, actions, loaded, e = [], [], None, None
        for drawn in np.sort(rng.integers(0, len(paths), n)):
            if drawn != e:
                with np.load(paths[e := drawn]) as file:
                    loaded = file["image"], file["action"]
            t = rng.integers(0, len(loaded[0]))
            images.append(loaded[0][t])
            actions.append(loaded[1][t])
        return np.stack(images), np.stack(actions)

    return batch


def confine(gigabytes):
    """Put this process into a memory cgroup of its own; returns its folder, or None where that is not possible."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        if not (Path(root) / "cgroup.procs").exists():
            continue
        group = Path(root) / f"loading-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(int(1e9 * gigabytes)))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return group
        except OSError:
            group.rmdir() if group.exists() else None
    return None


def drop(folder):
    """Forget the files' pages, which are on disk by now."""
    for path in folder.glob("*/*"):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def serve(side, folder, limit, n, pipe):
    """Frames a second of as many batches as the pipe asks for, until it asks for none."""
    group = confine(limit)
    drop(folder)
    batch, rng = side(folder), np.random.default_rng()
    pipe.send(group)
    while batches := pipe.recv():
        if group is None:
            drop(folder)
        began = time.perf_counter()
        for _ in range(batches):
            batch(rng, n)
        pipe.send(batches * n / (time.perf_counter() - began))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=5, help="GB of pictures in the set")
    parser.add_argument("--limit", type=float, default=1, help="GB of memory for a side and its files' pages")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="batches of ours in a round; theirs draw a tenth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=str(ROOT), help="on the disk to be measured; a folder is made in there")
    args = parser.parse_args()

    spawn, sides = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        frames = write(Path(folder), args.gb)
        os.sync()
        for name in ("ours", "npz", "npz compressed"):
            pipe, far_end = spawn.Pipe()
            side = (ours if name == "ours" else theirs, Path(folder) / name, args.limit, args.batch, far_end)
            process = spawn.Process(target=serve, args=side, daemon=True)
            process.start()
            sides[name] = (process, pipe, args.batches if name == "ours" else -(-args.batches // 10), [])
        groups = [pipe.recv() for _, pipe, _, _ in sides.values()]
        for _ in range(args.rounds + 1):
            for _, pipe, batches, rates in sides.values():
                pipe.send(batches)
                rates.append(pipe.recv())
        for process, pipe, _, _ in sides.values():
            pipe.send(0)
            process.join()
        for group in filter(None, groups):
            group.rmdir()

    held = f"{args.limit:g} GB of memory" if all(groups) else "pages dropped before each round"
    print(f"{args.gb:g} GB, {frames:,} frames of {SIZE} px; {held}")
    rate = {name: float(np.median(rates[1:])) for name, (*_, rates) in sides.items()}
    for name in ("npz", "npz compressed"):
        what = f"random frames/s of {args.gb:g} GB, {held}, beside .{name}"
        keep("loading", {what: row(rate["ours"], rate[name], rate["ours"] / rate[name])})


if __name__ == "__main__":
    main()
