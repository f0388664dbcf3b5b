"""The report, facts for shell scripts, requirements."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, one_sentence, refused

import report
from common.files import read_json, write_json
from model import VLA
from tools import check_domain, lookup, publish


def test_facts_for_shell_scripts(tmp_path, capsys):
    """tools.lookup prints a domain's RL tasks, and an entry of a checkpoint's config.json."""
    lookup.main(lookup.RLTasks("kitchen"))
    assert capsys.readouterr().out.split() == ["slide-door-open-red", "left-door-open-new"]
    write_json(
        tmp_path / "config.json", {"domain": "d", "weights": "vlm", "action_dim": 2, "vlm": "tiny"}
    )
    lookup.main(lookup.Config(str(tmp_path), "vlm"))
    assert capsys.readouterr().out == "tiny\n"
    assert "unknown domain" in refused(lookup.main, lookup.RLTasks("kitchn"))
    assert "no entry size" in refused(lookup.main, lookup.Config(str(tmp_path), "size"))


@pytest.fixture
def run(tmp_path):
    """A finished run of the kitchen, as far as a report reads it."""
    tasks = {}
    for name in report.all_tasks(report.load_domain("kitchen")):
        tasks[name] = {"success": [1, 0, 1], "env_steps": [5, 80, 7]}
    for stage in ("0-sft", "1-rl-slide-door-open-red", "1-sft"):
        folder = tmp_path / "run" / stage
        config = {
            "domain": "kitchen",
            "weights": "vlm",
            "action_dim": 7,
            "image_size": 64,
            "vlm": "tiny",
        }
        write_json(folder / "config.json", config)
        write_json(folder / "stage.json", {"args": {"seed": 3}})
        write_json(
            folder / "summary.json",
            {"seconds": 60.0, "env_steps": 100, "vlm_forwards": 5, "peak_gb": 0.5},
        )
        write_json(
            folder / "eval.json",
            {"protocol": {"horizon": 80}, "versions": {"torch": "2"}, "tasks": tasks},
        )
    return tmp_path / "run"


def test_a_report_counts_and_draws(run, capsys, monkeypatch):
    """Successes by split and task, costs of stages without an evaluation, a picture, a model card that runs."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    (run / "1-rl-slide-door-open-red/eval.json").unlink()
    report.main(report.Args(str(run)))
    made = json.loads((run / "report.json").read_text())
    assert [s["name"] for s in made["stages"]] == ["0-sft", "1-sft"] and made["seed"] == 3
    assert made["stages"][0]["splits"]["expert"] == {"successes": 10, "episodes": 15}
    assert (made["stages"][1]["seconds"], made["stages"][1]["env_steps"]) == (120, 200)
    assert "| 1-sft | 0.67 [0.42, 0.85] |" in capsys.readouterr().out
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    card = (run / "1-sft/README.md").read_text()
    assert "with torch.no_grad():" in card and "base_model" not in card
    for code in re.findall(r"```python\n(.*?)```", card, re.S):
        compile(code, "README.md", "exec")


def test_a_report_that_cannot_be_made_names_the_cause(run, tmp_path, monkeypatch):
    """No run, no stage, no evaluation, a missing task, a read-only folder: one sentence, before the work."""
    before = sorted(run.rglob("*"))
    assert "has no finished stage" in refused(report.main, report.Args(str(tmp_path / "nothing")))
    monkeypatch.setattr(report, "check_writable", refuse_to_write)
    assert "read-only" in refused(report.main, report.Args(str(run)))
    assert sorted(run.rglob("*")) == before
    path = run / "0-sft/eval.json"
    evaluated = json.loads(path.read_text())
    del evaluated["tasks"]["knob-on"]
    write_json(path, evaluated)
    monkeypatch.undo()
    assert "knob-on" in refused(report.main, report.Args(str(run)))
    for path in run.glob("*/eval.json"):
        path.unlink()
    sentence = refused(report.main, report.Args(str(run)))
    assert "evaluate.py" in sentence and "resume" not in sentence


@pytest.mark.parametrize(
    "name, entry, value",
    [
        ("eval.json", "tasks", []),
        ("eval.json", "tasks", {"knob-on": {"success": [None]}}),
        ("eval.json", "protocol", None),
        ("summary.json", "env_steps", None),
        ("stage.json", "args", None),
        ("config.json", "vlm", 3),
    ],
)
def test_a_report_of_files_of_another_form(name, entry, value, run):
    """The file is named. An evaluation is made again, and no trained stage is to be deleted."""
    path = run / "0-sft" / name
    write_json(path, json.loads(path.read_text()) | {entry: value})
    sentence = refused(report.main, report.Args(str(run)))
    assert str(path) in sentence
    assert ("evaluate.py" in sentence) == (name == "eval.json")
    path.write_text("{")
    assert "delete its folder" not in refused(report.main, report.Args(str(run)))


def test_experts_do_not_move_a_real_robot(monkeypatch):
    """check_domain is refused before it connects."""
    monkeypatch.setenv("ROBOT_URL", "http://127.0.0.1:9/")
    assert "ROBOT_URL is set" in refused(check_domain.main, check_domain.Args("panda"))
    monkeypatch.delenv("ROBOT_URL")
    assert "--episodes" in refused(check_domain.main, check_domain.Args("toy", episodes=0))


@pytest.mark.filterwarnings("error")
def test_a_contact_sheet_names_the_splits_that_there_are(tmp_path):
    """Without RL tasks the legend has an entry of its colour for each other split."""
    domain = SimpleNamespace(EXPERT_TASKS=["a"], RL_TASKS=[], UNSEEN_TASKS=["b", "c"])
    images = {task: np.zeros((8, 8, 3), np.uint8) for task in "abc"}
    check_domain.contact_sheet(domain, images, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_a_report_leaves_another_run_s_card_alone(run, tmp_path):
    """After START= and --episodes 0, stage 0 is the last evaluated stage, and a link to where it was trained."""
    shutil.rmtree(run / "1-rl-slide-door-open-red")
    shutil.rmtree(run / "1-sft")
    shutil.move(run / "0-sft", tmp_path / "other")
    (run / "0-sft").symlink_to(tmp_path / "other")
    (tmp_path / "other/README.md").write_text("the other run's card")
    report.main(report.Args(str(run)))
    assert (run / "report.md").exists()
    assert (tmp_path / "other/README.md").read_text() == "the other run's card"


def refuse_to_write(folder, remedy):
    raise report.UserError(f"{folder} is read-only")


@pytest.mark.skipif(os.geteuid() != 0, reason="may not mount a file system")
def test_a_report_in_a_read_only_run(run, tmp_path):
    """A run on a file system that cannot be written."""
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        shutil.copytree(run, place / "run")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert f"{place / 'run'} is not writable" in refused(
            report.main, report.Args(str(place / "run"))
        )
    finally:
        subprocess.run(["umount", place], check=True)


def test_requirements_are_exact_and_split():
    """Everything is pinned, and what only tests need is apart."""
    run, dev = (
        Path(ROOT / name).read_text().split()
        for name in ("requirements.txt", "requirements-dev.txt")
    )
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in [*run, *dev])
    assert not set(run) & set(dev) and any(line.startswith("pytest==") for line in dev)


def test_a_negative_number_of_episodes_is_not_published(checkpoint, tmp_path):
    """It is refused before anything is written."""
    args = publish.Args(str(checkpoint), str(tmp_path / "out"), episodes=-1)
    assert "--episodes" in refused(publish.main, args)
    assert not (tmp_path / "out").exists()


def test_a_published_checkpoint_acts_as_its_original(project, checkpoint, tmp_path):
    """Half of the size, nearly the same actions, a model card, and weights that later stages train in float32."""
    out = tmp_path / "published"
    project.must(
        "python", "-m", "tools.publish", "--checkpoint", checkpoint, "--out", out, "--episodes", "2"
    )
    size, before = (
        sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        for folder in (out, checkpoint)
    )
    assert size < 0.55 * before
    vla, original = VLA.load(out), VLA.load(checkpoint)
    assert {p.dtype for p in vla.parameters()} == {torch.float32}
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    with torch.no_grad():
        actions = [v.act(*v.encode(images, ["push the red bead"] * 4)) for v in (vla, original)]
    torch.testing.assert_close(*actions, atol=0.05, rtol=0)
    card = (out / "README.md").read_text()
    assert "bfloat16" in card and "Still a success 20 steps later: expert 0." in card
    rows = read_json(out / "eval.json")["tasks"].values()
    assert all(h <= s for row in rows for h, s in zip(row["held"], row["success"], strict=True))
    again = project.run(
        "python", "-m", "tools.publish", "--checkpoint", checkpoint, "--out", out, "--episodes", "0"
    )
    assert "is not empty" in one_sentence(again)
