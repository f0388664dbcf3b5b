"""Shared by the benchmarks: sides that take turns, and the rows of results/benchmarks/."""

import time
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from common.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "benchmarks"


def take_turns(sides: dict[Hashable, Callable], rounds: int) -> dict[Hashable, float]:
    """Return {side: median seconds of its function}.

    The functions take turns for `rounds` rounds, after a first round that does not count.
    """
    seconds = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, work in sides.items():
            began = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - began)
    return {side: float(np.median(times[1:])) for side, times in seconds.items()}


def samples_per_second(log: list[dict], batch: int) -> float:
    """Return the speed of SFT by its log, a line every 50 steps. The first 50 steps do not count."""
    first, last = log[0], log[2]
    return batch * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])


def row(ours: float, theirs: float, ratio: float) -> dict[str, float]:
    """Return two measurements and their ratio to three digits, and as integers from 100 on."""
    values = {"ours": ours, "theirs": theirs, "ratio": ratio}
    return {
        key: round(value) if value >= 100 else float(f"{value:.3g}")
        for key, value in values.items()
    }


def save_rows(name: str, rows: dict[str, dict]) -> None:
    """Print {measurement: row}, and add the rows to results/benchmarks/<name>.json."""
    for measurement, values in rows.items():
        print(f"{measurement}: {values}", flush=True)
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read_json(path) if path.exists() else {}
    write_json(path, before | rows)
