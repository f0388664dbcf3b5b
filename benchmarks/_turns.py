"""Timing that the benchmarks share."""

import time

import numpy as np


def in_turns(works, rounds):
    """{side: median seconds} of {side: function}: the sides take turns; a first turn of each does not count."""
    seconds = {side: [] for side in works}
    for _ in range(rounds + 1):
        for side, work in works.items():
            began = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - began)
    return {side: float(np.median(times[1:])) for side, times in seconds.items()}
