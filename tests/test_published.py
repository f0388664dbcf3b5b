"""The checkpoints in pretrained/ are small, load, and do what their cards say."""

import pytest
from conftest import ROOT

from common.files import read_json
from common.rates import all_tasks, splits, wilson
from domains import load_domain
from evaluate import evaluate
from model import VLA

FOLDERS = sorted(path.parent for path in ROOT.glob("pretrained/*/heads.safetensors"))
EPISODES = 25  # of each task, as in the README's table


def size(folder):
    """Return a folder's size in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_published_checkpoint_is_small_and_measured(folder):
    """At most 3 MB, it loads, and its evaluation has every task of today's protocol."""
    assert size(folder) <= 3
    vla = VLA.load(folder)
    domain = load_domain(vla.config["domain"])
    result = read_json(folder / "eval.json")
    assert result["tasks"].keys() == set(all_tasks(domain))
    assert all(len(row["success"]) == EPISODES for row in result["tasks"].values())
    assert "Success rates" in (folder / "README.md").read_text()


def test_all_of_them_fit_into_a_repository():
    assert FOLDERS and size(ROOT / "pretrained") <= 25


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_published_checkpoint_repeats_its_evaluation(folder):
    """Each split's rate is inside the published interval, and nearly every episode ends as it did."""
    vla = VLA.load(folder)
    domain = load_domain(vla.config["domain"])
    published = read_json(folder / "eval.json")["tasks"]
    repeated = evaluate(vla, domain, all_tasks(domain), EPISODES)
    same = 0
    for tasks in splits(domain).values():
        ends = [
            [end for task in tasks for end in result[task]["success"]]
            for result in (published, repeated)
        ]
        same += sum(a == b for a, b in zip(*ends))
        low, high = wilson(sum(ends[0]), len(ends[0]))
        assert low <= sum(ends[1]) / len(ends[1]) <= high
    # All of them on the machine that made the checkpoint. Elsewhere an image may round to another grey.
    assert same >= 0.95 * EPISODES * len(all_tasks(domain))
