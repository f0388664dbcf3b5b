"""What this process may use of the machine, and where it may draw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import cgroups, cpus

ROOT = Path(__file__).parent.parent


@pytest.fixture
def machine(monkeypatch):
    """A machine with 64 CPUs, no control groups and no launcher."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(cgroups, "MEMBERSHIP", Path("/nowhere"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return monkeypatch


def test_cpus_are_the_fewest_of_all_limits(machine):
    """Affinity, control group quota and the number of local processes each lower the count. It is never 0."""
    assert cpus.usable_cpus() == 64
    machine.setenv("LOCAL_WORLD_SIZE", "4")
    assert cpus.usable_cpus() == 16
    machine.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert cpus.usable_cpus() == 1
    machine.setenv("LOCAL_WORLD_SIZE", "")
    assert cpus.usable_cpus() == 2
    machine.setattr(cpus, "cpu_quota", lambda: 0.5)
    assert cpus.usable_cpus() == 1


GROUPS = {  # version, place: /proc/self/cgroup, files
    "2, in a group": ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n",
                      "a/memory.max": "3000\n", "a/memory.current": "2000\n",
                      "a/memory.stat": "anon 1500\ninactive_file 500\n"}),
    "2, in a container": ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": "3000\n", "memory.current": "2000\n",
                          "memory.stat": "inactive_file 500\n"}),
    "1, in a container": ("4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n2:pids:/\n",
                          {"cpu,cpuacct/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                           "memory/memory.limit_in_bytes": "3000\n", "memory/memory.usage_in_bytes": "2000\n",
                           "memory/memory.stat": "total_inactive_file 500\n"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPS)
def test_limits_of_control_groups_are_read(kind, machine, tmp_path):
    """The limit of this group or of one around it, in versions 1 and 2, also where only the root is visible."""
    membership, files = GROUPS[kind]
    (tmp_path / "membership").write_text(membership)
    machine.setattr(cgroups, "MEMBERSHIP", tmp_path / "membership")
    machine.setattr(cgroups, "ROOT", tmp_path)
    assert cgroups.cpu_quota() is None and cgroups.free_memory() is None
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroups.cpu_quota() == 1.5 and cpus.usable_cpus() == 2
    assert cgroups.free_memory() == 1500


def test_figures_are_drawn_whatever_the_back_end(tmp_path):
    """A notebook passes on a back end of its own, which is not installed here."""
    code = "from common.figures import pyplot; pyplot().figure().savefig(__import__('sys').argv[1])"
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.png"], cwd=ROOT, env=env, check=True)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
