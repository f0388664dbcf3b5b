"""Random frames a second from a set of episodes larger than the memory that may hold it, beside .npz files.

The set: some Meta-World episodes recorded here by the expert, copied until a format has --gb of pictures. Ours draws by
data.Episodes.batch from safetensors files, by pread; theirs loads each drawn frame's episode from one .npz file,
plain or compressed, as collected data is often kept. Each side is a process of its own; they take turns; medians over
rounds of the frames a second of some batches.

A side's process, with what the system keeps of its files in memory, may take --limit GB, by a memory cgroup of its own.
Where none can be made (not root, or a container that forbids it), the kept pages of all files are dropped before each
round instead (posix_fadvise): no round then finds in memory what an earlier one has read. The output says which it was.

LeRobot's reader is a side where --lerobot names an interpreter that has it: lerobot (0.3 and 0.4) wants torch below 2.8
and does not install beside requirements.txt (README, Interchange). Its set is made by `data.py export`, which takes
longer than all the rest; a batch is as many of its data set's items, stacked.
Writes results/benchmarks/loading.json. Takes three times --gb of disk for as long as it runs, up to five with LeRobot.

python benchmarks/loading.py
python benchmarks/loading.py --lerobot .venv-lerobot/bin/python --gb 0.5 --limit 2
python benchmarks/loading.py --gb 0.2 --limit 0.6 --batches 2          a try
"""

import argparse
import itertools
import os
import shutil
import subprocess
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


def lerobots(folder):
    """LeRobot's own reader, an item at a time as torch's DataLoader would ask for them."""
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(folder.name, root=folder)

    def batch(rng, n):
        items = [dataset[int(i)] for i in rng.integers(0, len(dataset), n)]
        return [torch.stack([item[key] for item in items]) for key in ("observation.image", "action")]

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
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def serve(side, folder, limit, n):
    """A side's process: writes its cgroup's folder, then frames a second of as many batches as each line asks for."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    group = confine(limit)
    drop(folder)
    batch, rng = side(folder), np.random.default_rng()
    print(group or "", file=answers, flush=True)
    for line in sys.stdin:
        if group is None:
            drop(folder)
        began = time.perf_counter()
        for _ in range(int(line)):
            batch(rng, n)
        print(int(line) * n / (time.perf_counter() - began), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=5, help="GB of pictures in the set")
    parser.add_argument("--limit", type=float, default=1, help="GB of memory for a side and its files' pages")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="batches of ours in a round; theirs draw a tenth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=str(ROOT), help="on the disk to be measured; a folder is made in there")
    parser.add_argument("--lerobot", help="an interpreter that has lerobot: its reader too")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the process of one side
    args = parser.parse_args()
    readers = {"ours": ours, "npz": theirs, "npz compressed": theirs, "LeRobot": lerobots}
    if args.side:
        return serve(readers[args.side], Path(args.folder), args.limit, args.batch)

    sides = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        frames = write(Path(folder), args.gb)
        if args.lerobot:
            about = ["--to", "lerobot", "--data", f"{folder}/ours", "--out", f"{folder}/LeRobot"]
            subprocess.run([args.lerobot, ROOT / "data.py", "export", *about], check=True)
            os.environ["HF_HOME"] = f"{folder}/LeRobot/cache"  # it unpacks its files into there
        os.sync()
        for name in [name for name in readers if name != "LeRobot" or args.lerobot]:
            command = [args.lerobot if name == "LeRobot" else sys.executable, __file__, "--side", name]
            command += ["--folder", f"{folder}/{name}", "--limit", str(args.limit), "--batch", str(args.batch)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            sides[name] = (process, args.batches if name == "ours" else -(-args.batches // 10), [])
        groups = [process.stdout.readline().strip() for process, _, _ in sides.values()]
        for _ in range(args.rounds + 1):
            for process, batches, rates in sides.values():
                print(batches, file=process.stdin, flush=True)
                rates.append(float(process.stdout.readline()))
        for process, _, _ in sides.values():
            process.communicate()
        for group in filter(None, groups):
            Path(group).rmdir()

    held = f"{args.limit:g} GB of memory" if all(groups) else "pages dropped before each round"
    print(f"{args.gb:g} GB, {frames:,} frames of {SIZE} px; {held}")
    rate = {name: float(np.median(rates[1:])) for name, (*_, rates) in sides.items()}
    for name in list(sides)[1:]:
        what = f"random frames/s of {args.gb:g} GB, {held}, beside {name.replace('npz', '.npz')}"
        keep("loading", {what: row(rate["ours"], rate[name], rate["ours"] / rate[name])})


if __name__ == "__main__":
    main()
