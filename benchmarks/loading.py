"""Compare random frames a second, from a set of episodes larger than memory, with .npz files and LeRobot's reader.

    python -m benchmarks.loading
    python -m benchmarks.loading --lerobot .venv-lerobot/bin/python --gb 0.5 --limit 2
    python -m benchmarks.loading --gb 0.2 --limit 0.6 --batches 2          a quick try

The set consists of Meta-World episodes recorded here by the expert, copied until a format holds
--gb of images. Ours draws with EpisodeDataset.batch from safetensors files, by pread. Theirs loads
the episode of each drawn frame from an .npz file, plain or compressed, as collected data is often
kept. Each side is a process of its own. The sides take turns; the numbers are medians over rounds
of the frames a second of some batches.

A side's process, including the pages of its files that the system keeps in memory, may use --limit
GB, in a memory control group of its own. Where none can be made (not root, or a container that
forbids it), the pages of all files are dropped before each round instead (posix_fadvise), so no
round profits from an earlier one. The output names the method.

LeRobot's reader is a side if --lerobot names an interpreter that has it: lerobot (0.3 and 0.4)
needs torch below 2.8 and does not install together with requirements.txt (docs/data.md).
`tools.convert export` makes its set, which takes longer than everything else. A batch is that many
items of its data set, stacked.

Writes results/benchmarks/loading.json. Needs three times --gb of disk while it runs, and up to five
with LeRobot.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks._turns import ROOT, row, save_rows

TASKS = ["drawer-open", "door-open", "button-press", "window-open"]
IMAGE_SIZE = 64
CGROUPS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))


# ----------------------------------------------------------------------------------------------------------------------
# The set


def write_originals(folder: Path) -> list[tuple[dict[str, Path], int, int]]:
    """Record one episode per task, in three formats. Return ({format: folder}, bytes of images, frames) of each."""
    from common.demonstrations import Recording, record_attempt
    from common.episode_file import open_episode
    from domains import load_domain

    domain = load_domain("metaworld")
    recording = Recording(
        make=domain.make,
        expert=domain.expert,
        domain=domain.NAME,
        instructions=domain.INSTRUCTIONS,
        protocol=domain.PROTOCOL,
        image_size=IMAGE_SIZE,
        action_noise_std=0.0,
        random_burst_prob=0.0,
        root=folder / "ours",
    )
    originals = []
    for task in TASKS:
        where = {name: folder / name / task for name in ("ours", "npz", "npz compressed")}
        for path in where.values():
            path.mkdir(parents=True)
        record_attempt(recording, task, 0)
        episode, _ = open_episode(where["ours"] / "000000.safetensors")
        image = episode.get_tensor("image")
        action = episode.get_tensor("action")
        np.savez(where["npz"] / "000000.npz", image=image, action=action)
        np.savez_compressed(where["npz compressed"] / "000000.npz", image=image, action=action)
        originals.append((where, image.nbytes, len(image)))
    return originals


def write_set(folder: Path, gigabytes: float) -> int:
    """Write the set as folder/<format>/<task>/000000..., and return its number of frames."""
    originals = write_originals(folder)
    frames = 0
    size = 0
    for k in itertools.count():
        for where, nbytes, length in originals:
            if size > 1e9 * gigabytes:
                return frames
            if k:
                for path in where.values():
                    first = next(path.glob("000000.*"))
                    shutil.copy(first, path / f"{k:06d}{first.suffix}")
            size += nbytes
            frames += length


# ----------------------------------------------------------------------------------------------------------------------
# Readers: each returns a function (rng, n) that draws a batch


def our_reader(folder: Path) -> Callable:
    from data import EpisodeDataset
    from domains import load_domain

    data = EpisodeDataset(
        {folder / task: 1.0 for task in TASKS}, load_domain("metaworld"), IMAGE_SIZE
    )
    return data.batch


def npz_reader(folder: Path) -> Callable:
    """Load each episode of a batch once, and draw a frame of it."""
    paths = sorted(folder.glob("*/*.npz"))

    def batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        images = []
        actions = []
        loaded = None
        for drawn in np.sort(rng.integers(0, len(paths), n)):
            if drawn != loaded:
                with np.load(paths[drawn]) as file:
                    image = file["image"]
                    action = file["action"]
                loaded = drawn
            t = rng.integers(0, len(image))
            images.append(image[t])
            actions.append(action[t])
        return np.stack(images), np.stack(actions)

    return batch


def lerobot_reader(folder: Path) -> Callable:
    """Draw one item at a time, as torch's DataLoader would."""
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(folder.name, root=folder)

    def batch(rng: np.random.Generator, n: int) -> list:
        items = [dataset[int(i)] for i in rng.integers(0, len(dataset), n)]
        return [
            torch.stack([item[key] for item in items]) for key in ("observation.image", "action")
        ]

    return batch


READERS = {
    "ours": our_reader,
    "npz": npz_reader,
    "npz compressed": npz_reader,
    "LeRobot": lerobot_reader,
}


# ----------------------------------------------------------------------------------------------------------------------
# A side's process


def limit_memory(gigabytes: float) -> Path | None:
    """Put this process into a memory control group of its own. Return its folder, or None if that is not possible."""
    for root, limit in CGROUPS:
        if not (Path(root) / "cgroup.procs").exists():
            continue
        group = Path(root) / f"loading-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(int(1e9 * gigabytes)))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return group
        except OSError:
            if group.exists():
                group.rmdir()
    return None


def drop_pages(folder: Path) -> None:
    """Forget the pages of the folder's files, which are on disk by now."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def serve(name: str, folder: Path, limit: float, n: int) -> None:
    """Print the control group's folder. Then, for each line (a number of batches), print the frames a second."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # for whatever a library prints
    group = limit_memory(limit)
    drop_pages(folder)
    batch = READERS[name](folder)
    rng = np.random.default_rng()
    print(group or "", file=answers, flush=True)
    for line in sys.stdin:
        if group is None:
            drop_pages(folder)
        began = time.perf_counter()
        for _ in range(int(line)):
            batch(rng, n)
        print(int(line) * n / (time.perf_counter() - began), file=answers, flush=True)


class Side:
    """A side's process, and the frames a second that it has measured."""

    def __init__(self, name: str, folder: str, args: argparse.Namespace):
        self.batches = args.batches if name == "ours" else -(-args.batches // 10)
        self.rates = []
        interpreter = args.lerobot if name == "LeRobot" else sys.executable
        command = [
            interpreter,
            "-m",
            "benchmarks.loading",
            "--side",
            name,
            "--folder",
            f"{folder}/{name}",
        ]
        command += ["--limit", str(args.limit), "--batch", str(args.batch)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)

    def read(self) -> str:
        return self.process.stdout.readline().strip()

    def measure(self) -> None:
        print(self.batches, file=self.process.stdin, flush=True)
        self.rates.append(float(self.read()))


def run_sides(folder: str, args: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """Return ({side: median frames a second}, the sides' control groups)."""
    sides = {
        name: Side(name, folder, args) for name in READERS if name != "LeRobot" or args.lerobot
    }
    groups = [side.read() for side in sides.values()]
    for _ in range(args.rounds + 1):
        for side in sides.values():
            side.measure()
    for side in sides.values():
        side.process.communicate()
    for group in filter(None, groups):
        Path(group).rmdir()
    return {name: float(np.median(side.rates[1:])) for name, side in sides.items()}, groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=5, help="GB of images in the set")
    parser.add_argument(
        "--limit", type=float, default=1, help="GB of memory for a side, its files' pages included"
    )
    parser.add_argument("--batch", type=int, default=256, help="frames per batch")
    parser.add_argument(
        "--batches", type=int, default=20, help="batches of ours in a round; theirs draw a tenth"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument(
        "--folder", default=str(ROOT), help="folder on the disk to measure; a folder is made in it"
    )
    parser.add_argument("--lerobot", help="interpreter that has lerobot, to measure its reader too")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # runs the process of one side
    args = parser.parse_args()
    if args.side:
        serve(args.side, Path(args.folder), args.limit, args.batch)
        return

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        frames = write_set(Path(folder), args.gb)
        if args.lerobot:
            export = [args.lerobot, "-m", "tools.convert", "export", "--to", "lerobot"]
            export += ["--data", f"{folder}/ours", "--out", f"{folder}/LeRobot"]
            subprocess.run(export, cwd=ROOT, check=True)
            # LeRobot unpacks its files into this folder.
            os.environ["HF_HOME"] = f"{folder}/LeRobot/cache"
        os.sync()
        rates, groups = run_sides(folder, args)

    method = f"{args.limit:g} GB of memory" if all(groups) else "pages dropped before each round"
    print(f"{args.gb:g} GB, {frames:,} frames of {IMAGE_SIZE} px; {method}")
    ours = rates.pop("ours")
    for name, theirs in rates.items():
        other = name.replace("npz", ".npz")
        measurement = f"random frames/s of {args.gb:g} GB, {method}, compared with {other}"
        save_rows("loading", {measurement: row(ours, theirs, ours / theirs)})


if __name__ == "__main__":
    main()
