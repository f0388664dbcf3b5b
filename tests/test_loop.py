"""The whole loop: every stage and file, and every command that it or a page names."""

import functools
import json
import math
import re
import shlex
import shutil
import stat
from importlib import import_module

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, Project, check_run, files
from safetensors.torch import load_file
from scipy.stats import binomtest

from domains import kitchen, metaworld
from evaluate import splits, wilson
from report import Args, pooled, story, table
from run import Refusal, write_json


def test_smoke_loop_on_metaworld(tmp_path):
    """`SMOKE=1 bash loop.sh metaworld 1`: all 40 tasks, every stage, every file."""
    project = Project(tmp_path)
    out = project.must("bash", "loop.sh", "metaworld", "1", SMOKE="1")
    stages = ["0-sft", "1-rl-button-press-new", "1-sft"]
    assert metaworld.RL_TASKS[0] in stages[1]
    run = check_run(tmp_path, metaworld, stages, 2, tmp_path / "runs/D_e-smoke/metaworld")
    assert str(run.relative_to(tmp_path) / "report.md") in out and all(f"| {s} |" in out for s in stages)


def test_ppo_replay_is_a_variant_of_the_same_loop(undisturbed):
    """METHOD=ppo-replay with START=: the given stage 0, PPO through all of the VLA, the same stage 2; and
    iRe-VLA-freeze's flag: the VLM is bit for bit the parent's."""
    project, _ = undisturbed
    how = dict(METHOD="ppo-replay", START="runs/toy-seed0-smoke/0-sft", RL="--env-steps 400 --warmup 0")
    project.must("bash", "loop.sh", "toy", "1", SMOKE="1", **how)
    run, stages = project.folder / "runs/toy-ppo-replay-seed0-smoke", ["0-sft", "1-rl-blue", "1-sft"]
    report = json.loads((run / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == stages and report["method"] == "ppo-replay"
    vlms = [load_file(run / s / "vlm/model.safetensors") for s in stages]
    assert all(any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(vlms, vlms[1:]))
    project.must(
        "python", "stage_sft.py", "--domain", "toy", "--data", "runs/D_e-smoke", "--parent", run / "1-rl-blue", "--out",
        run / "1-frozen", "--freeze-vlm", "--steps", "5", "--batch", "16", "--episodes", "0",
    )  # fmt: skip
    frozen = load_file(run / "1-frozen/vlm/model.safetensors")
    assert all(torch.equal(vlms[1][k], frozen[k]) for k in frozen)


def test_fig_4_compares_three_ways_of_rl(undisturbed):
    """fig4.sh: from nothing and from stage 0 with everything trained, and the head alone; one picture of all."""
    project, _ = undisturbed
    budget = "--env-steps 300 --envs 4 --rollout 16 --warmup 0"
    out = project.must("bash", "fig4.sh", "toy", "runs/toy-seed0-smoke/0-sft", RL=budget)
    run = project.folder / "runs/fig4-toy-seed0"
    assert out.strip().endswith("curves.png") and (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    vlm = lambda folder: load_file(folder / "vlm/model.safetensors")  # noqa: E731
    for arm, parent, moves in (("scratch", "untrained", True), ("sft-whole", "", True), ("sft-head", "", False)):
        before = vlm(run / parent if parent else project.folder / "runs/toy-seed0-smoke/0-sft")
        after = vlm(run / arm / "blue")
        assert any(not torch.equal(before[k], after[k]) for k in before) is moves, arm


def test_a_stage_without_evaluation_has_no_row_but_costs(undisturbed, tmp_path):
    """After `--episodes 0` the report has no rates for the stage; its minutes and steps are in the next row."""
    project, _ = undisturbed
    run = shutil.copytree(project.folder / "runs/toy-seed0-smoke", tmp_path / "run")
    before = json.loads((run / "report.json").read_text())["stages"]
    (run / "1-rl-blue/eval.json").unlink()
    project.must("python", "report.py", "--run", run)
    first, last = json.loads((run / "report.json").read_text())["stages"]
    assert (first, last["name"], last["splits"]) == (before[0], "1-sft", before[2]["splits"])
    assert last["env_steps"] == before[1]["env_steps"] > 0
    assert last["seconds"] == pytest.approx(before[1]["seconds"] + before[2]["seconds"], abs=0.2)
    assert last["vlm_forwards"] == before[1]["vlm_forwards"] + before[2]["vlm_forwards"]
    assert before[1]["vlm_forwards"] > before[1]["env_steps"] and last["peak_gb"] > 0.1
    summary = run / "1-rl-blue/summary.json"  # of a version that did not count: then its row has no count either
    summary.write_text(json.dumps({k: v for k, v in json.loads(summary.read_text()).items() if k != "vlm_forwards"}))
    project.must("python", "report.py", "--run", run)
    assert "vlm_forwards" not in json.loads((run / "report.json").read_text())["stages"][1]
    assert "not counted" in project.must("python", "report.py", "--table", run, "--out", tmp_path)
    for stage in ("0-sft", "1-sft"):
        (run / stage / "eval.json").unlink()
    code, _, err = project.run("python", "report.py", "--run", run)
    assert code != 0 and "evaluate.py" in err and "Traceback" not in err


def test_the_table_counts_every_episode(tmp_path):
    """report.py --table: seeds pooled, pairs seed by seed, costs of those that counted them, as counted here."""
    rng, names = np.random.default_rng(0), [t for group in splits(kitchen).values() for t in group]
    runs, won, folders = [("ire-vla", 0), ("ire-vla", 1), ("sft-only", 1)], {}, []
    for m, seed in runs:
        stages = []
        for stage in ("0-sft", "2-sft"):
            x = won.get(("ire-vla", seed, "0-sft")) if stage == "0-sft" else None  # a seed's methods have one stage 0
            x = won[m, seed, stage] = x or {t: rng.integers(0, 2, 25) for t in names}
            tasks = {t: {"successes": int(x[t].sum()), "episodes": 25} for t in names}
            outcomes = {t: "".join(map(str, x[t])) for t in names}
            stages.append({"name": stage, "tasks": tasks, "outcomes": outcomes, "seconds": 600.0 * (seed + 1)})
            stages[-1] |= {"env_steps": 1000 * (seed + 1), "vlm_forwards": 5000, "peak_gb": 0.5 + seed}
        if (m, seed) == ("ire-vla", 0):
            del stages[1]["vlm_forwards"]
        folders.append(tmp_path / f"{m}-{seed}")
        write_json(folders[-1] / "report.json", {
            "domain": "kitchen", "method": m, "seed": seed, "vlm": "tiny", "protocol": {}, "stages": stages,
        })  # fmt: skip
    text = table(folders)
    rows = {line.split(" | ")[0]: line.strip(" |").split(" | ") for line in text.splitlines() if line[:2] == "| "}
    both = [won["ire-vla", s, "2-sft"] for s in (0, 1)]
    each = [np.mean([x[t] for t in kitchen.EXPERT_TASKS]) for x in both]
    row = rows["| ire-vla (0, 1)"]
    assert row[1].startswith(f"{np.mean(each):.2f} [") and row[1].endswith(f"{min(each):.2f} to {max(each):.2f}")
    assert row[-4:] == ["30", "3,000", "10,000", "1.5"]
    a, b = (np.concatenate([won[m, 1, "2-sft"][t] for t in kitchen.UNSEEN_TASKS]) for m in ("ire-vla", "sft-only"))
    k, n = (a > b).sum(), (a != b).sum()
    p = min(1, 2 * sum(math.comb(n, i) for i in range(min(k, n - k) + 1)) / 2**n)
    assert f"| ire-vla against sft-only | unseen | {k} | {n - k} | {p:.2g} |" in text
    longer = json.loads((folders[0] / "report.json").read_text())  # a later stage of one run is left out
    write_json(folders[0] / "report.json", longer | {"stages": [*longer["stages"], {**stages[0], "name": "3-sft"}]})
    assert table(folders) == text
    story(Args(table=tuple(map(str, folders)), out=str(tmp_path)))
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    mean, low, high, seeds = pooled([(None, stages[0]), (None, stages[1])], kitchen.UNSEEN_TASKS)
    x = [np.mean([won["sft-only", 1, s][t] for t in kitchen.UNSEEN_TASKS]) for s in ("0-sft", "2-sft")]
    assert seeds == pytest.approx(x) and mean == pytest.approx(np.mean(x)) and low < mean < high
    for k in (0, 19, 25):
        assert wilson(k, 25) == pytest.approx(tuple(binomtest(k, 25).proportion_ci(method="wilson")), abs=1e-3)
    with pytest.raises(Refusal, match="second sft-only of seed 1"):
        table([*folders, folders[2]])
    last = json.loads((folders[2] / "report.json").read_text())
    for left, said in ((last["stages"][:1], "many rounds"), (last["stages"][1:], "0-sft"),
                       ([longer["stages"][0], last["stages"][1]], "another stage 0")):  # fmt: skip
        write_json(folders[2] / "report.json", last | {"stages": left})
        with pytest.raises(Refusal, match=said):
            table(folders)


def test_other_arguments_are_refused(undisturbed):
    """The same run with another VLM or seed is not mixed with what is there; the difference is named."""
    project, _ = undisturbed
    before = files(project.folder / "runs/toy-seed0-smoke")
    code, _, err = project.run("bash", "loop.sh", "toy", "1", SMOKE="1", SEED="3", VLM="/else", RUN="toy-seed0-smoke")
    assert code != 0 and "seed: 0 then, 3 now" in err and "vlm: tiny then, /else now" in err and "Traceback" not in err
    code, _, err = project.run("bash", "loop.sh", "toy", "1", RUN="toy-seed0-smoke")  # not a smoke run
    assert code != 0 and "steps: 60 then" in err and "Traceback" not in err
    assert files(project.folder / "runs/toy-seed0-smoke") == before


# ----------------------------------------------------------------------------------------------------------------------
# Commands

SCRIPTS = ["stage0_sft", "stage_rl", "stage_sft", "evaluate", "report", "plan"]


def parses(words):
    """A script's own arguments accept a command line; prints what is wrong and exits otherwise."""
    module = import_module(words[0].removesuffix(".py"))
    if hasattr(module, "COMMANDS"):  # a script with several steps: parse the step's arguments, and do nothing
        step = module.COMMANDS[words[1]]
        return tyro.cli(functools.wraps(step)(lambda *_, **given: given), args=words[2:])
    return tyro.cli(module.Args, args=words[1:])


def written_commands():
    """(where, command) of every command in a docstring, in the head of a shell script and in the READMEs."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("domains/*.py")]
    sources += [*ROOT.glob("*.md"), *ROOT.glob("results/*.md")]
    line = re.compile(r"^[#\s$]*((?:[A-Z]+=\S+ )*(?:python \w+\.py|bash \w+\.sh)(?: [^\n`]*)?)", re.M)
    for path in sources:
        for match in line.finditer(path.read_text()):
            yield pytest.param(re.split(r"\s{2,}|\s#", match[1])[0].strip(), id=f"{path.name}:{match[1][:40]}")


@pytest.fixture
def stand_in(tmp_path):
    """A project whose interpreter only writes down what it was told to run: the project, and how to read that."""
    project, heard = Project(tmp_path), tmp_path / "heard"
    fake = tmp_path / "fake-python"
    write_down = f'printf "%q " "$@" >> {heard}; echo >> {heard}'
    fake.write_text(f'#!/bin/bash\n{write_down}\n[ "$1" = -c ] && echo a-task; exit 0\n')
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    return project, fake, lambda: [shlex.split(line) for line in heard.read_text().splitlines()]


@pytest.mark.parametrize("env", [{}, {"SMOKE": "1"}, {"SEED": "7", "RUN": "mine", "VLM": "a/b"}])
def test_every_command_of_the_loop_parses(env, stand_in):
    """loop.sh runs Algorithm 1 in its order, each stage with the one before it as parent, by arguments that exist."""
    project, fake, heard = stand_in
    project.must("bash", "loop.sh", "metaworld", "2", PYTHON=str(fake), **env)
    commands = [words for words in heard() if words[0].endswith(".py")]
    parsed = [(words[0], parses(words)) for words in commands]
    stages = [(name, a) for name, a in parsed if name.startswith("stage")]
    assert [name for name, _ in stages] == ["stage0_sft.py", *["stage_rl.py", "stage_sft.py"] * 2]
    assert all(b.parent == a.out for (_, a), (_, b) in zip(stages, stages[1:]))
    assert len({a.out for _, a in stages}) == 5 and {a.domain for _, a in stages} == {"metaworld"}
    assert {a.seed for _, a in stages} == {int(env.get("SEED", 0))} and stages[0][1].vlm == env.get("VLM", "tiny")
    assert parsed[0][0] == "plan.py" and parsed[-1][0] == "report.py"


@pytest.mark.parametrize(
    "method, stages, flag",
    [("sft-only", ["stage0_sft.py", "stage_sft.py"], ""),
     ("ire-vla-freeze", ["stage0_sft.py", "stage_rl.py", "stage_sft.py"], "--freeze-vlm"),
     ("ppo-replay", ["stage0_sft.py", "stage_rl.py", "stage_sft.py"], "--train-vlm")],
)  # fmt: skip
def test_the_baselines_are_variants_of_the_same_loop(method, stages, flag, stand_in):
    """METHOD= leaves out stage 1 or adds one flag; an unknown one is refused with the names of those that are known."""
    project, fake, heard = stand_in
    out = project.must(
        "bash", "loop.sh", "metaworld", "1", PYTHON=str(fake), METHOD=method, SFT_ARGS="--episodes=0", RL="--episodes 0"
    )
    assert "evaluate.py --checkpoint" in out and heard()[-1][0] != "report.py"  # nothing to report is no error
    said = [words for words in heard() if words[0].startswith("stage")]
    assert [words[0] for words in said] == stages and [flag in words for words in said].count(True) == bool(flag)
    assert all(parses(words) for words in said)
    code, _, err = project.run("bash", "loop.sh", "toy", "1", METHOD="magic", PYTHON=str(fake))
    assert code == 2 and "ppo-replay" in err
    code, _, err = project.run("bash", "loop.sh", "toy", "1", START="nowhere", PYTHON=str(fake))
    assert code == 2 and "START=nowhere" in err
    for start in "ab":
        write_json(project.folder / start / "config.json", {})
        (project.folder / start / "heads.safetensors").write_text(start)
    assert project.run("bash", "loop.sh", "toy", "1", START="a", PYTHON=str(fake))[0] == 0
    code, _, err = project.run("bash", "loop.sh", "toy", "1", START="b", PYTHON=str(fake))
    assert code == 2 and "START=b" in err
    code, _, err = project.run("bash", "fig4.sh", "toy", "nowhere", PYTHON=str(fake))
    assert code == 2 and "nowhere" in err
    code, _, err = project.run("bash", "loop.sh", "toy", "1", PYTHON="/no/python")
    assert code == 2 and "PYTHON=/no/python" in err


def test_sft_stages_are_launched_elsewhere(stand_in):
    """SFT_LAUNCH= stands before the SFT stages and before nothing else."""
    project, fake, heard = stand_in
    project.must("bash", "loop.sh", "metaworld", "1", PYTHON=str(fake), SFT_LAUNCH=f"{fake} launched -n 2")
    launched = [words[3] for words in heard() if words[0] == "launched"]
    assert launched == ["stage0_sft.py", "stage_sft.py"]
    assert {words[0] for words in heard()} == {"launched", "plan.py", "-c", "stage_rl.py", "report.py"}


@pytest.mark.parametrize("command", list(written_commands()))
def test_every_written_command_parses(command, stand_in):
    """A command that a docstring, loop.sh or the README tells the user to give has arguments that exist."""
    project, fake, heard = stand_in
    *env, program, script = shlex.split(command)[: 2 + len(re.findall(r"^(?:[A-Z]+=\S+ )*", command)[0].split())]
    words = shlex.split(command)[len(env) + 1 :]
    if program == "python":
        parses(words)
    elif script == "loop.sh" and len(words) == 3 and words[2].isdigit():
        given = dict(e.split("=", 1) for e in env)
        if "START" in given:
            write_json(project.folder / given["START"] / "config.json", {})
        project.must("bash", *words, **{**given, "PYTHON": str(fake)})
        for said in heard():
            if said[0].endswith(".py"):
                parses(said)
    else:
        assert (ROOT / script).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_argument(script, capsys):
    """--help says what a script does and what each of its arguments means."""
    module = import_module(script)
    with pytest.raises(SystemExit) as end:
        tyro.cli(module.Args, args=["--help"], description=module.__doc__)
    text = capsys.readouterr().out
    assert end.value.code == 0 and "Eq." in text or script in ("evaluate", "report", "plan")
    source = (ROOT / f"{script}.py").read_text().split("class Args:")[1].split("\n\n")[0]
    for field in filter(str.strip, source.splitlines()):
        assert re.search(r"  # \w", field), f"{script}.py: {field.strip()} is not explained"
