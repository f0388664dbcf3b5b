"""tools/compare.py: the table counts every episode, runs that cannot be compared are refused, pictures are drawn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from common.errors import UserError
from common.files import write_json
from common.rates import splits, wilson
from domains import kitchen, metaworld
from tools.compare import (
    curves_figure,
    learned,
    pooled,
    read_runs,
    rounds,
    rounds_figure,
    success_by_round,
    table,
    table_text,
)

PNG = b"\x89PNG"
EPISODES = 25


def stage(name: str, domain, outcomes: dict[str, np.ndarray], **costs) -> dict:
    """Return a stage of report.json. outcomes: {task: 0 or 1 for each episode}."""

    def count(tasks):
        successes = int(sum(outcomes[task].sum() for task in tasks))
        return {"successes": successes, "episodes": EPISODES * len(tasks)}

    return {
        "name": name,
        "splits": {split: count(tasks) for split, tasks in splits(domain).items()},
        "tasks": {task: count([task]) for task in outcomes},
        "outcomes": {task: "".join(map(str, outcomes[task])) for task in outcomes},
        **costs,
    }


def write_report(folder: Path, domain, method: str, seed: int, stages: list[dict]) -> Path:
    """Write report.json into the folder, and return the folder."""
    report = {
        "domain": domain.NAME,
        "method": method,
        "seed": seed,
        "vlm": "tiny",
        "versions": {},
        "protocol": {},
    }
    write_json(folder / "report.json", report | {"stages": stages})
    return folder


def random_outcomes(domain, rng) -> dict[str, np.ndarray]:
    return {
        task: rng.integers(0, 2, EPISODES) for tasks in splits(domain).values() for task in tasks
    }


@pytest.fixture
def three_runs(tmp_path):
    """iRe-VLA with seeds 0 and 1, SFT alone with seed 1 from the same stage 0: folders, {(method, seed): outcomes}."""
    rng = np.random.default_rng(0)
    starts = {seed: random_outcomes(kitchen, rng) for seed in (0, 1)}
    ends = {}
    folders = []
    for method, seed in (("ire-vla", 0), ("ire-vla", 1), ("sft-only", 1)):
        ends[method, seed] = random_outcomes(kitchen, rng)
        cost = {"seconds": 600.0 * (seed + 1), "env_steps": 1000 * (seed + 1), "vlm_forwards": 5000}
        cost["peak_gb"] = 0.5 + seed
        stages = [
            stage("0-sft", kitchen, starts[seed], **cost),
            stage("2-sft", kitchen, ends[method, seed], **cost),
        ]
        if (method, seed) == ("ire-vla", 0):
            del stages[1]["vlm_forwards"]  # a run that did not count them
        folders.append(write_report(tmp_path / f"{method}-{seed}", kitchen, method, seed, stages))
    return folders, ends


def test_the_table_counts_every_episode(three_runs, tmp_path):
    """Seeds are pooled, pairs are taken seed by seed, and costs are means over the seeds that counted them."""
    folders, ends = three_runs
    text = table_text(folders)
    rows = {
        line.split(" | ")[0]: line.strip(" |").split(" | ")
        for line in text.splitlines()
        if line[:2] == "| "
    }
    row = rows["| ire-vla (0, 1)"]
    each = [
        np.mean([ends["ire-vla", seed][task] for task in kitchen.EXPERT_TASKS]) for seed in (0, 1)
    ]
    assert row[1].startswith(f"{np.mean(each):.2f} [")
    assert row[1].endswith(f"seeds {min(each):.2f} to {max(each):.2f}")
    assert row[-4:] == ["30", "3,000", "10,000", "1.5"]

    def unseen(method):
        return np.concatenate([ends[method, 1][task] for task in kitchen.UNSEEN_TASKS])

    k = (unseen("ire-vla") > unseen("sft-only")).sum()
    n = (unseen("ire-vla") != unseen("sft-only")).sum()
    p = min(1, 2 * sum(math.comb(n, i) for i in range(min(k, n - k) + 1)) / 2**n)
    assert f"| ire-vla against sft-only | unseen | {k} | {n - k} | {p:.2g} |" in text

    table(tuple(map(str, folders)), str(tmp_path))
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "table.png").read_bytes().startswith(PNG)


def test_pooled_rates_have_wilson_intervals(three_runs):
    """The pooled rate is that of all episodes; the interval is the one scipy computes."""
    folders, ends = three_runs
    runs = read_runs(folders[:2])
    rate, low, high, each = pooled([run.stages[-1] for run in runs], kitchen.UNSEEN_TASKS)
    outcomes = [
        np.concatenate([ends["ire-vla", seed][task] for task in kitchen.UNSEEN_TASKS])
        for seed in (0, 1)
    ]
    assert each == pytest.approx([x.mean() for x in outcomes])
    assert rate == pytest.approx(np.mean(outcomes))
    together = np.concatenate(outcomes)
    interval = binomtest(int(together.sum()), len(together)).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx(tuple(interval), abs=1e-3)
    for k in (0, 19, 25):
        assert wilson(k, 25) == pytest.approx(
            tuple(binomtest(k, 25).proportion_ci(method="wilson")), abs=1e-3
        )


def test_runs_that_cannot_be_compared_are_refused(three_runs):
    """A later stage of one run is left out. A missing or other stage 0 and a second run of a seed are errors."""
    folders, _ = three_runs
    text = table_text(folders)
    first = json.loads((folders[0] / "report.json").read_text())
    longer = first | {"stages": [*first["stages"], {**first["stages"][0], "name": "3-sft"}]}
    write_json(folders[0] / "report.json", longer)
    assert table_text(folders) == text
    with pytest.raises(UserError, match="second sft-only of seed 1"):
        table_text([*folders, folders[2]])
    last = json.loads((folders[2] / "report.json").read_text())
    start, end = last["stages"]
    for stages, message in (
        ([start], "as many rounds"),
        ([end], "0-sft"),
        ([first["stages"][0], end], "different stage 0"),
    ):
        write_json(folders[2] / "report.json", last | {"stages": stages})
        with pytest.raises(UserError, match=message):
            table_text(folders)
    write_json(folders[2] / "report.json", last | {"protocol": {"horizon": 1}})
    with pytest.raises(UserError, match="protocol"):
        table_text(folders)
    with pytest.raises(UserError, match="report.py --run"):
        table_text([folders[0].parent])
    with pytest.raises(UserError, match="no folder"):
        table_text([])


def test_success_over_the_rounds_is_drawn(tmp_path):
    """`rounds`: stages 2 are rounds, seeds may lack some, RL stages are left out; one method a picture."""
    rng = np.random.default_rng(0)
    folders = []
    for seed, names in (
        (0, ["0-sft", "2-sft"]),
        (1, ["0-sft", "1-rl-button-press-new", "1-sft", "2-sft"]),
    ):
        stages = [stage(name, metaworld, random_outcomes(metaworld, rng)) for name in names]
        folders.append(write_report(tmp_path / f"run-{seed}", metaworld, "ire-vla", seed, stages))
    run = read_runs(folders)[1]
    rates = success_by_round(run, "rl")
    assert list(rates) == [0, 1, 2]
    assert rates[1] == pytest.approx(run.stages[2]["splits"]["rl"]["successes"] / (EPISODES * 5))
    rounds(tuple(map(str, folders)), str(tmp_path))
    assert (tmp_path / "rounds.png").read_bytes().startswith(PNG)
    rounds_figure(folders[:1], tmp_path / "one.png")
    other = write_report(tmp_path / "other", metaworld, "sft-only", 1, run.stages)
    with pytest.raises(UserError, match="sft-only"):
        rounds_figure([*folders, other], tmp_path / "none.png")
    short = write_report(tmp_path / "short", metaworld, "ire-vla", 2, run.stages[:1])
    with pytest.raises(UserError, match="share no two"):
        rounds_figure([*folders, short], tmp_path / "none.png")


def test_success_by_the_number_of_tasks_learned(tmp_path):
    """`learned`: an RL task counts as learned from its round on; a stage on its own task alone is left out."""
    rng = np.random.default_rng(0)
    folders = []
    ends = {}
    for method, names in (
        ("ire-vla", ["0-sft", "1-rl-button-press-new", "1-sft", "2-sft"]),
        ("rl-lora", ["0-sft", "1-rl-button-press-new", "2-rl-drawer-open-new"]),
    ):
        outcomes = {name: random_outcomes(metaworld, rng) for name in names}
        if method == "ire-vla":
            outcomes[names[1]] = {"button-press-new": np.ones(EPISODES, int)}
        stages = [stage(n, metaworld, o) for n, o in outcomes.items() if len(o) > 1]
        only = [n for n, o in outcomes.items() if len(o) == 1]
        stages[1:1] = [{**stages[0], "name": n, "tasks": {}, "outcomes": {}} for n in only]
        ends[method] = outcomes[names[-1]]
        folders.append(str(write_report(tmp_path / method, metaworld, method, 0, stages)))
    learned(tuple(folders), str(tmp_path))
    parts = (tmp_path / "learned.md").read_text().split("## ")
    for title, tasks in (
        ("RL tasks learned so far", metaworld.RL_TASKS[:2]),
        ("RL tasks still to come", metaworld.RL_TASKS[2:]),
        ("Unseen tasks", metaworld.UNSEEN_TASKS),
    ):
        part = next(part for part in parts if part.startswith(title))
        assert "| method (seeds) | 0 | 1 | 2 |" in part
        for method, end in ends.items():
            row = next(line for line in part.splitlines() if line.startswith(f"| {method} (1)"))
            rate = np.mean([end[task] for task in tasks])
            assert row.strip(" |").split(" | ")[-1].startswith(f"{rate:.2f} [")
    with pytest.raises(UserError, match="share no two"):
        learned((str(write_report(tmp_path / "one", metaworld, "ire-vla", 1, stages[:1])),))


def test_curves_need_finished_rl_stages(tmp_path):
    """`curves`: a panel for each task; a folder without a curve is named."""
    stages = [
        tmp_path / arm / task for arm in ("scratch", "sft-head") for task in ("drawer", "door")
    ]
    for folder in stages:
        write_json(folder / "summary.json", {"task": folder.name})
        rows = [{"step": step, "success": step / 300} for step in (100, 200, 300)]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves_figure(stages, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    write_json(stages[0] / "summary.json", {})  # of an SFT stage
    for folder in (stages[0], tmp_path):
        with pytest.raises(UserError, match="no training curve"):
            curves_figure([folder], tmp_path / "none.png")
