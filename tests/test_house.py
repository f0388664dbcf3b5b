"""Each file is in its room: which folder may import which, and what the top level holds."""

import ast
import re
import shutil
import subprocess
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

ROOMS = ("common", "robot", "domains", "tools", "benchmarks", "tests")
MAY_IMPORT = {  # folder: the folders that its files may import; "" is the top level
    "": {"", "common", "domains", "robot"},
    "domains": {"common", "robot", "domains"},
    "robot": {"common", "robot"},
    "common": {"common"},
    "tools": {"", "common", "domains", "robot", "tools"},
    "benchmarks": {"", "common", "domains", "robot", "tools", "benchmarks"},
}
TOP_LEVEL = {  # what is not in README's table of files
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "pyproject.toml",
    "requirements.txt",
    "requirements-dev.txt",
    "test.sh",
    "docs",
    "benchmarks",
    "results",
    "pretrained",
    "tests",
    "findings",
}
MAX_LINES = 600


def module_name(path):
    """Return a file's dotted name: robot/sim/world.py is robot.sim.world, and a package is its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def product_modules():
    """Return {dotted name: path} of the project's Python files, without tests."""
    paths = list(ROOT.glob("*.py"))
    for room in ROOMS[:-1]:
        paths += (ROOT / room).rglob("*.py")
    return {module_name(path): path for path in paths}


MODULES = product_modules()


def room_of(name):
    """Return the folder of a module, "" for the top level."""
    first = name.split(".")[0]
    return first if first in ROOMS else ""


def imports(path, source=None):
    """Return the project's modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test does not follow"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in MODULES or name in ROOMS}
    return found


def wrong_imports(name, imported):
    """Return the imported modules that this module's folder may not import."""
    return sorted(other for other in imported if room_of(other) not in MAY_IMPORT[room_of(name)])


def test_imports_run_downwards():
    """A file imports only from the folders that MAY_IMPORT lists for its own."""
    wrong = {name: wrong_imports(name, imports(path)) for name, path in MODULES.items()}
    assert not {name: others for name, others in wrong.items() if others}


def test_no_import_cycle():
    """No module imports itself through others, not even inside a function."""
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    for name in graph:  # a module's package is imported before it, and that is not a cycle
        graph[name] = {other for other in graph[name] if not f"{name}.".startswith(f"{other}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_wrong_import_is_found():
    """From common/ to the top level, at its top or inside a function; from the top level to tools/."""
    source = "import os\nfrom common import files\ndef f():\n    from model import VLA\n    import domains.panda\n"
    found = imports(None, source)
    assert {"common", "common.files", "model", "domains.panda"} <= found
    assert wrong_imports("common.new", found) == ["domains.panda", "model"]
    assert wrong_imports("model", {"tools.plan", "robot.env"}) == ["tools.plan"]
    assert wrong_imports("robot.env", {"domains.panda"}) == ["domains.panda"]


def tracked():
    """Return the paths that git tracks. Skips where this is not a clone."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    return subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")


def test_the_top_level_is_the_paper():
    """The top level holds the files of README's table, and the few that every repository has."""
    table = (ROOT / "README.md").read_text().split("## Reading order")[1].split("\n## ")[0]
    listed = {name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", table, re.M)}
    assert {"loop.sh", "model.py", "domains"} <= listed
    entries = {path.split("/")[0] for path in tracked() if path and not path.startswith(".")}
    assert not entries - listed - TOP_LEVEL, "neither in README's table nor in TOP_LEVEL"
    assert not listed - entries, "in README's table, but not there"


def test_no_file_is_long():
    """A product file has at most 600 lines."""
    scripts = [path for room in ("", "tools") for path in (ROOT / room).glob("*.sh")]
    lines = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for path in [*MODULES.values(), *scripts]
    }
    assert not {path: n for path, n in lines.items() if n > MAX_LINES}
