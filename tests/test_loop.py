"""The whole loop: every stage and file, whatever interrupts it, and every command that it or a page names."""

import functools
import json
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, Project, files, kill
from safetensors.torch import load_file

from data import ONLINE_SEED, attempts, open_episode
from domains import metaworld
from evaluate import all_tasks
from model import VLA
from run import read_tensors

STAGE_FILES = {"config.json", "heads.safetensors", "vlm/model.safetensors", "log.jsonl", "eval.json", "summary.json"}


def leftovers(folder):
    """What a finished command must not leave behind."""
    return [p for p in folder.rglob("*") if re.search(r"^\.|tmp|partial|state", p.name)]


def check_run(folder, domain, stages, demos, data):
    """Everything that a finished run consists of is there and readable, and nothing else is."""
    name, run = domain.__name__.split(".")[-1], folder / "runs" / f"{domain.__name__.split('.')[-1]}-seed0-smoke"
    assert sorted(p.name for p in run.iterdir()) == sorted([*stages, "D_rl", "report.json", "report.md", "report.png"])
    for stage in stages:
        assert not STAGE_FILES - set(files(run / stage)), stage
        assert VLA.load(run / stage, name).config["domain"] == name
        steps = [json.loads(line)["step"] for line in (run / stage / "log.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), f"{stage}/log.jsonl repeats itself"
        assert set(json.loads((run / stage / "eval.json").read_text())["tasks"]) == set(all_tasks(domain))
    report = json.loads((run / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == stages and report["domain"] == name
    for stage in report["stages"]:
        assert sum(split["episodes"] for split in stage["splits"].values()) == len(all_tasks(domain))
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all(s in (run / "report.md").read_text() for s in stages)
    assert [s for s in stages if (run / s / "README.md").exists()] == stages[-1:]  # the model card
    assert stages[-1] in (run / stages[-1] / "README.md").read_text()
    assert not leftovers(folder / "runs")
    for task in domain.EXPERT_TASKS:
        assert len(attempts(data / task)) >= demos, task
    for path in [*data.rglob("*"), *(run / "D_rl").rglob("*")]:
        if path.is_file():
            handle, header = open_episode(path)
            assert header["success"] == "1" and handle.get_tensor("reward")[-1] == 1
            assert int(header["seed"]) % ONLINE_SEED == int(path.stem)
    return run


def episodes(folder):
    """What the episode files under a folder hold (safetensors' header has no fixed order): {path: content}."""
    opened = {p.relative_to(folder): open_episode(p) for p in Path(folder).rglob("*.safetensors")}
    names = ("image", "action", "reward")
    return {p: (header, *(handle.get_tensor(n).tobytes() for n in names)) for p, (handle, header) in opened.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A toy project in which the smoke loop has run once from beginning to end, and how long that took."""
    project, began = Project(tmp_path_factory.mktemp("undisturbed")), time.time()
    project.must("bash", "loop.sh", "toy", "1", SMOKE="1")
    return project, time.time() - began


def test_smoke_loop_on_metaworld(tmp_path):
    """`SMOKE=1 bash loop.sh metaworld 1`: all 40 tasks, every stage, every file; given again, it changes nothing."""
    project = Project(tmp_path)
    out = project.must("bash", "loop.sh", "metaworld", "1", SMOKE="1")
    stages = ["0-sft", "1-rl-button-press-new", "1-sft"]
    assert metaworld.RL_TASKS[0] in stages[1]
    run = check_run(tmp_path, metaworld, stages, 2, tmp_path / "runs/D_e-smoke/metaworld")
    assert str(run.relative_to(tmp_path) / "report.md") in out and all(f"| {s} |" in out for s in stages)
    before = {k: v for k, v in files(run).items() if not k.startswith("report")}
    project.must("bash", "loop.sh", "metaworld", "1", SMOKE="1")
    assert {k: v for k, v in files(run).items() if not k.startswith("report")} == before


def test_ppo_replay_is_a_variant_of_the_same_loop(undisturbed):
    """METHOD=ppo-replay with START=: the given stage 0, PPO through all of the VLA, the same stage 2; and
    iRe-VLA-freeze's flag: the VLM is bit for bit the parent's."""
    project, _ = undisturbed
    project.must("bash", "loop.sh", "toy", "1", SMOKE="1", METHOD="ppo-replay", START="runs/toy-seed0-smoke/0-sft")
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
    budget = "--env-steps 900 --envs 4 --rollout 16 --warmup 0"
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


def killed_often(folder, domain, kills, seconds, seed):
    """Gives the smoke command again and again, killing it at random instants of an undisturbed run's length."""
    project, draw = Project(folder), random.Random(seed)
    for _ in range(kills):
        process = project.start("bash", "loop.sh", domain, "1", SMOKE="1", STATE_EVERY="0.2")
        try:
            process.communicate(timeout=draw.uniform(1, seconds))
        except subprocess.TimeoutExpired:
            kill(process, signal.SIGKILL).communicate()
        else:
            assert process.returncode == 0
            if not list(folder.glob("runs/*/report.png")):
                raise AssertionError("ended without a report")
            shutil.rmtree(folder / "runs")  # it had finished: once more from the beginning
    project.must("bash", "loop.sh", domain, "1", SMOKE="1", STATE_EVERY="0.2")
    return project


def test_loop_killed_at_random_instants(undisturbed, tmp_path, toy):
    """SIGKILL of everything, the same command again: a complete run, the same D_e, the same weights after SFT."""
    whole, seconds = undisturbed
    project = killed_often(tmp_path, "toy", 3, 0.7 * seconds, seed=0)
    stages = ["0-sft", "1-rl-blue", "1-sft"]
    run = check_run(tmp_path, toy, stages, 2, tmp_path / "runs/D_e-smoke/toy")
    check_run(whole.folder, toy, stages, 2, whole.folder / "runs/D_e-smoke/toy")
    assert episodes(tmp_path / "runs/D_e-smoke") == episodes(whole.folder / "runs/D_e-smoke")
    for name in ("heads.safetensors", "vlm/model.safetensors"):
        assert (run / "0-sft" / name).read_bytes() == (whole.folder / "runs/toy-seed0-smoke/0-sft" / name).read_bytes()
    # RL may have lost unsaved steps and so may end elsewhere; what follows from its end is decided again
    killed = files(run / "1-sft")
    shutil.rmtree(run / "1-sft")
    project.must("bash", "loop.sh", "toy", "1", SMOKE="1")
    again = files(run / "1-sft")
    assert all(again[name] == killed[name] for name in ("heads.safetensors", "vlm/model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["metaworld"])
def test_metaworld_loop_killed_20_times(domain, tmp_path):
    """The same on Meta-World's own physics and pictures, at 20 instants."""
    killed_often(tmp_path, domain, 20, 100, seed=1)
    stages = ["0-sft", "1-rl-button-press-new", "1-sft"]
    check_run(tmp_path, metaworld, stages, 2, tmp_path / "runs/D_e-smoke/metaworld")


CRASH = """
import os, signal, sys
from pathlib import Path
target, times, call, *sys.argv = sys.argv[1:]
replace, seen = os.replace, []
def crash(source, to):
    if Path(to).name == target and (seen.append(to) or len(seen) == int(times)):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, to)
os.replace = crash
import stage0_sft
exec(call)
"""
STORY = "stage0_sft.main(stage0_sft.story, stage0_sft.tyro.cli(stage0_sft.Args))"
RECORD = "stage0_sft.record(('toy', 'red', 64, 0.2, 0.0, Path('D_e/toy/red'), 1))"


def test_kill_in_the_middle_of_a_write(tmp_path, toy):
    """Killed after a file or folder is written and before it has its name, stage 0 ends as if that had not happened."""
    project = Project(tmp_path)
    stage0 = ["stage0_sft.py", "--domain", "toy", "--data", "D_e", "--out", "runs/0-sft"]
    stage0 += ["--demos", "2", "--steps", "30", "--batch", "8", "--episodes", "1"]
    for target, times, call in (
        ("000001.safetensors", 1, RECORD), ("stage.json", 1, STORY), ("state.safetensors", 1, STORY),
        ("state.safetensors", 3, STORY), ("0-sft", 1, STORY), ("eval.json", 1, STORY),
    ):  # fmt: skip
        code, out, err = project.run("python", "-c", CRASH, target, times, call, *stage0, STATE_EVERY="0")
        assert code == -signal.SIGKILL, out + err
    project.must("python", *stage0)
    assert not leftovers(tmp_path / "runs") + leftovers(tmp_path / "D_e")
    assert attempts(tmp_path / "D_e/toy/red") == attempts(tmp_path / "D_e/toy/green") == [0, 1]
    read_tensors(tmp_path / "runs/0-sft/heads.safetensors")
    assert STAGE_FILES - {"log.jsonl"} <= set(files(tmp_path / "runs/0-sft"))


def test_other_arguments_are_refused(undisturbed):
    """The same run with another VLM or seed is not mixed with what is there; the difference is named."""
    project, _ = undisturbed
    before = files(project.folder / "runs/toy-seed0-smoke")
    code, _, err = project.run("bash", "loop.sh", "toy", "1", SMOKE="1", SEED="3", VLM="/else", RUN="toy-seed0-smoke")
    assert code != 0 and "seed: 0 then, 3 now" in err and "vlm: tiny then, /else now" in err and "Traceback" not in err
    code, _, err = project.run("bash", "loop.sh", "toy", "1", RUN="toy-seed0-smoke")  # not a smoke run
    assert code != 0 and "steps: 60 then" in err and "Traceback" not in err
    assert files(project.folder / "runs/toy-seed0-smoke") == before


@pytest.mark.parametrize("stage", ["collect", "stage 0 SFT", "RL blue", "evaluate"])
def test_ctrl_c(stage, tmp_path, checkpoint):
    """SIGINT as a terminal sends it: ends in seconds, non-zero, without traceback, and says how to go on."""
    project, log = Project(tmp_path), tmp_path / "stderr"
    small = ["--domain", "toy", "--data", "D_e", "--out", "runs/0-sft"]
    command = {
        "collect": ["python", "stage0_sft.py", *small, "--demos", "5000", "--steps", "1"],
        "stage 0 SFT": ["bash", "loop.sh", "toy", "1"],
        "RL blue": ["python", "stage_rl.py", *small[:2], "--task", "blue", "--parent", checkpoint, "--out", "runs/1"],
        "evaluate": ["python", "evaluate.py", "--checkpoint", checkpoint, "--episodes", "5000", "--out", "result.json"],
    }[stage]
    bar = {"collect": "D_e: expert episodes", "evaluate": "evaluate"}.get(stage, stage)
    script = shlex.join(map(str, command)).replace("python ", '"$PYTHON" ', 1)
    process = project.start("bash", "-c", f"set -e; {script} 2> {log}; echo not reached")
    shown = re.compile(bar + r":.* [1-9]\d*/")
    while not (log.exists() and shown.search(log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    time.sleep(0.5)
    began = time.time()
    kill(process, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    said = log.read_text()
    assert time.time() - began < 10 and process.returncode != 0 and "not reached" not in out
    assert "Traceback" not in said + out and "Error" not in said, said
    assert "same command" in said and " ".join(map(str, command)) in said
    try:
        kill(process, 0)
    except ProcessLookupError:
        return
    time.sleep(5)  # simulators may take a moment to see that they are alone
    with pytest.raises(ProcessLookupError):
        kill(process, 0)


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
    """(where, command) of every command in a docstring, in loop.sh's head and, where it exists, in the README."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("domains/*.py"), *ROOT.glob("*.md")]
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
    project.must("bash", "loop.sh", "metaworld", "1", PYTHON=str(fake), METHOD=method)
    said = [words for words in heard() if words[0].startswith("stage")]
    assert [words[0] for words in said] == stages and [flag in words for words in said].count(True) == bool(flag)
    assert all(parses(words) for words in said)
    code, _, err = project.run("bash", "loop.sh", "toy", "1", METHOD="magic", PYTHON=str(fake))
    assert code == 2 and "ppo-replay" in err


@pytest.mark.parametrize("command", list(written_commands()))
def test_every_written_command_parses(command, stand_in):
    """A command that a docstring, loop.sh or the README tells the user to give has arguments that exist."""
    project, fake, heard = stand_in
    *env, program, script = shlex.split(command)[: 2 + len(re.findall(r"^(?:[A-Z]+=\S+ )*", command)[0].split())]
    words = shlex.split(command)[len(env) + 1 :]
    if program == "python":
        parses(words)
    elif script == "loop.sh" and len(words) == 3 and words[2].isdigit():
        project.must("bash", *words, **{**dict(e.split("=", 1) for e in env), "PYTHON": str(fake)})
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
