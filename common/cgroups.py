"""The limits of this process's control groups, which a container or a scheduler sets on CPU time and memory."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60  # bytes; version 1 writes a number near 2**63 where there is no limit


def group_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of the groups around it, for versions 1 and 2.

    controller: version 1's name, "cpu" or "memory". Inside a container the named folder may be
    missing: the root then stands for it.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = ROOT / controllers if controllers else ROOT
        folder = root / path.lstrip("/")
        while folder != root and folder.is_relative_to(root):
            yield folder
            folder = folder.parent
        yield root


def read_numbers(path: Path) -> list[int] | None:
    """Return the numbers in a control group's file, or None if it is missing or holds `max`."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return None


def cpu_quota() -> float | None:
    """Return how many CPUs' worth of time this process may use, or None if that is not limited."""
    quotas = []
    for folder in group_folders("cpu"):
        limit = read_numbers(folder / "cpu.max")  # version 2: quota and period in one file
        if limit is None:
            quota = read_numbers(folder / "cpu.cfs_quota_us")
            period = read_numbers(folder / "cpu.cfs_period_us")
            limit = quota + period if quota and period else None
        if limit and limit[0] > 0:
            quotas.append(limit[0] / limit[1])
    return min(quotas, default=None)


def free_memory() -> int | None:
    """Return the bytes that this process's control groups leave free, or None if they set no limit.

    Cached files count as free, because the kernel drops them when memory is needed.
    """
    left = []
    for folder in group_folders("memory"):
        limit = read_numbers(folder / "memory.max") or read_numbers(
            folder / "memory.limit_in_bytes"
        )
        used = read_numbers(folder / "memory.current") or read_numbers(
            folder / "memory.usage_in_bytes"
        )
        if limit and used and limit[0] < UNLIMITED:
            left.append(max(0, limit[0] - used[0] + cached_bytes(folder / "memory.stat")))
    return min(left, default=None)


def cached_bytes(stat: Path) -> int:
    """Return the bytes of cached files that memory.stat reports, those in use apart."""
    try:
        rows = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
