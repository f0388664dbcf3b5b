"""What the benchmarks share: sides that take turns, and the rows of results/benchmarks/."""

import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def in_turns(works, rounds):
    """{side: median seconds} of {side: function}: the sides take turns; a first turn of each does not count."""
    seconds = {side: [] for side in works}
    for _ in range(rounds + 1):
        for side, work in works.items():
            began = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - began)
    return {side: float(np.median(times[1:])) for side, times in seconds.items()}


def row(ours, theirs, ratio):
    """Two measurements and how they compare, to three digits; whole numbers from 100 on."""
    values = {"ours": ours, "theirs": theirs, "ratio": ratio}
    return {key: round(value) if value >= 100 else float(f"{value:.3g}") for key, value in values.items()}


def keep(name, rows):
    """Print {what was measured: row} and write it into results/benchmarks/<name>.json, whose other rows stay."""
    from run import read_json, write_json  # not at the top: it imports torch, and a simulator's process needs none

    for what, values in rows.items():
        print(f"{what}: {values}", flush=True)
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, (read_json(path) if path.exists() else {}) | rows)
