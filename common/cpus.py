"""How many CPUs this process may use, which is often fewer than the machine has."""

import math
import os

from common.cgroups import cpu_quota


def usable_cpus() -> int:
    """Return the number of CPUs for this process: the least of affinity, control group quota and machine.

    Where a launcher such as torchrun has started several processes on this machine, each gets its
    share.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    quota = cpu_quota()
    if quota is not None:
        count = min(count, math.ceil(quota))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    if processes.isdecimal() and int(processes) > 1:
        count //= int(processes)
    return max(1, count)
