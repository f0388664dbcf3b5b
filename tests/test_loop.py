"""The whole loop: every stage and file, and every command that it or a page names."""

import functools
import inspect
import json
import re
import shlex
import shutil
import stat
import sys
from importlib import import_module
from pathlib import Path

import docstring_parser
import pytest
import torch
import tyro
from conftest import ROOT, Project, check_run, command, files, one_sentence
from safetensors.torch import load_file

from common.cli import parse
from common.files import write_json
from domains import metaworld


def vlm(stage):
    """Return the VLM's weights of a finished stage."""
    return load_file(stage / "vlm/model.safetensors")


def differ(one, other):
    return any(not torch.equal(one[k], other[k]) for k in one)


def test_smoke_loop_on_metaworld(tmp_path):
    """`SMOKE=1 bash loop.sh metaworld 1`: all 40 tasks, every stage, every file."""
    project = Project(tmp_path)
    out = project.must("bash", "loop.sh", "metaworld", "1", SMOKE="1")
    stages = ["0-sft", "1-rl-button-press-new", "1-sft"]
    assert metaworld.RL_TASKS[0] in stages[1]
    run = check_run(tmp_path, metaworld, stages, 2, tmp_path / "runs/D_e-smoke/metaworld")
    assert str(run.relative_to(tmp_path) / "report.md") in out and all(
        f"| {s} |" in out for s in stages
    )


def test_ppo_replay_is_a_variant_of_the_same_loop(undisturbed):
    """METHOD=ppo-replay with START=: the same stage 0, PPO through all of the VLA, the same stage 2.

    With `--freeze-vlm`, iRe-VLA-freeze, stage 2 keeps the parent's VLM bit for bit.
    """
    project, _ = undisturbed
    how = {
        "METHOD": "ppo-replay",
        "START": "runs/bead-seed0-smoke/0-sft",
        "RL": "--env-steps 400 --warmup 0",
    }
    project.must("bash", "loop.sh", "bead", "1", SMOKE="1", **how)
    run = project.folder / "runs/bead-ppo-replay-seed0-smoke"
    stages = ["0-sft", "1-rl-blue", "1-sft"]
    report = json.loads((run / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == stages and report["method"] == "ppo-replay"
    vlms = [vlm(run / stage) for stage in stages]
    assert all(differ(a, b) for a, b in zip(vlms, vlms[1:]))
    more = {"steps": 5, "batch": 16, "episodes": 0, "data": "runs/D_e-smoke", "freeze_vlm": True}
    project.must(*command("stage_sft.py", parent=run / "1-rl-blue", out=run / "1-frozen", **more))
    assert not differ(vlms[1], vlm(run / "1-frozen"))


def test_rl_alone_learns_task_after_task(undisturbed):
    """METHOD=rl-lora: PPO through one LoRA, without stage 2, each stage from the last, evaluated on all tasks."""
    project, _ = undisturbed
    start = "runs/bead-seed0-smoke/0-sft"
    how = {"METHOD": "rl-lora", "START": start, "RL": "--env-steps 400 --warmup 0"}
    project.must("bash", "loop.sh", "bead", "2", SMOKE="1", **how)
    run = project.folder / "runs/bead-rl-lora-seed0-smoke"
    report = json.loads((run / "report.json").read_text())
    stages = [stage["name"] for stage in report["stages"]]
    assert stages[0] == "0-sft" and [s.split("-")[1] for s in stages[1:]] == ["rl", "rl"]
    assert report["method"] == "rl-lora" and {len(s["splits"]) for s in report["stages"]} == {3}
    parents = [json.loads((run / s / "config.json").read_text())["parent"] for s in stages[1:]]
    assert [Path(parent).name for parent in parents] == stages[:2]
    # The start's whole VLM stays, and one adapter on it is trained from task to task.
    backbones = [vlm(run / stage) for stage in stages]
    assert not any(differ(backbones[0], other) for other in backbones[1:])
    adapters = [load_file(run / s / "adapter_model.safetensors") for s in stages[1:]]
    assert differ(*adapters) and all(a.count_nonzero() for a in adapters[1].values())


def test_fig_4_compares_three_ways_of_rl(undisturbed):
    """fig4.sh: from random weights and from stage 0 with everything trained, and the head alone; one figure of all."""
    project, _ = undisturbed
    start = "runs/bead-seed0-smoke/0-sft"
    budget = "--env-steps 300 --envs 4 --rollout 16 --warmup 0"
    out = project.must("bash", "tools/fig4.sh", "bead", start, RL=budget)
    run = project.folder / "runs/fig4-bead-seed0"
    assert out.strip().endswith("curves.png") and (run / "curves.png").read_bytes().startswith(
        b"\x89PNG"
    )
    for arm, parent, moves in (
        ("scratch", run / "untrained", True),
        ("sft-whole", project.folder / start, True),
        ("sft-head", project.folder / start, False),
    ):
        assert differ(vlm(parent), vlm(run / arm / "blue")) is moves, arm


def test_a_stage_without_evaluation_has_no_row_but_costs(undisturbed, tmp_path):
    """After `--episodes 0` the report has no rates for the stage. Its minutes and steps are in the next row."""
    project, _ = undisturbed
    run = shutil.copytree(project.folder / "runs/bead-seed0-smoke", tmp_path / "run")
    before = json.loads((run / "report.json").read_text())["stages"]
    (run / "1-rl-blue/eval.json").unlink()
    project.must("python", "report.py", "--run", run)
    first, last = json.loads((run / "report.json").read_text())["stages"]
    assert (first, last["name"], last["splits"]) == (before[0], "1-sft", before[2]["splits"])
    assert last["env_steps"] == before[1]["env_steps"] > 0
    assert last["seconds"] == pytest.approx(before[1]["seconds"] + before[2]["seconds"], abs=0.2)
    assert last["vlm_forwards"] == before[1]["vlm_forwards"] + before[2]["vlm_forwards"]
    assert before[1]["vlm_forwards"] > before[1]["env_steps"] and last["peak_gb"] > 0.1
    summary = run / "1-rl-blue/summary.json"  # of a version that did not count
    summary.write_text(
        json.dumps(
            {k: v for k, v in json.loads(summary.read_text()).items() if k != "vlm_forwards"}
        )
    )
    project.must("python", "report.py", "--run", run)
    assert "vlm_forwards" not in json.loads((run / "report.json").read_text())["stages"][1]
    assert "not counted" in project.must(
        "python", "-m", "tools.compare", "table", run, "--out", tmp_path
    )
    for stage in ("0-sft", "1-sft"):
        (run / stage / "eval.json").unlink()
    code, _, err = project.run("python", "report.py", "--run", run)
    assert code != 0 and "evaluate.py" in err and "Traceback" not in err


def test_other_arguments_are_refused(undisturbed):
    """The same run with another VLM or seed is not mixed with what is there; the difference is named."""
    project, _ = undisturbed
    before = files(project.folder / "runs/bead-seed0-smoke")
    loop = ["bash", "loop.sh", "bead", "1"]
    sentence = one_sentence(
        project.run(*loop, SMOKE="1", SEED="3", VLM="/else", RUN="bead-seed0-smoke")
    )
    assert "seed: then 0, now 3" in sentence and "vlm: then tiny, now /else" in sentence
    sentence = one_sentence(project.run(*loop, RUN="bead-seed0-smoke"))  # not a smoke run
    assert "steps: then 60" in sentence
    assert files(project.folder / "runs/bead-seed0-smoke") == before


# ----------------------------------------------------------------------------------------------------------------------
# Commands

SCRIPTS = [
    "stage0_sft",
    "stage_rl",
    "stage_sft",
    "evaluate",
    "report",
    "tools.plan",
    "tools.check_domain",
]


def source_of(words):
    """Return (file, module, other words) of Python's arguments."""
    if words[0] != "-m":
        return ROOT / words[0], words[0].removesuffix(".py"), words[1:]
    path = ROOT / words[1].replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), words[1], words[2:]


def check_flags(words):
    """Check that a script has all flags of a command line. Its arguments may be incomplete."""
    path, _, words = source_of(words)
    source = path.read_text()
    if words and not words[0].startswith("--"):  # a command of several, or a positional argument
        assert re.search(rf'"{words[0]}"|def {words[0]}\(|Positional', source), (
            f"{path} has no argument {words[0]}"
        )
    for flag in [word.split("=")[0] for word in words if word.startswith("--")]:
        name = flag.removeprefix("--")
        assert f'"{flag}"' in source or re.search(rf"\b{name.replace('-', '_')}: ", source), (
            f"{path} has no {flag}"
        )


def parses(words):
    """Parse a command line of Python by the script's own arguments. Exits for wrong ones."""
    path, name, rest = source_of(words)
    if "import argparse" in path.read_text():  # the parser is made where it runs
        return check_flags(words)
    module = import_module(name)
    if hasattr(module, "Args"):
        return tyro.cli(module.Args, args=rest)
    functions = getattr(
        module, "COMMANDS", vars(module)
    )  # parse the arguments of one of several, and do nothing
    return tyro.cli(
        functools.wraps(functions[rest[0]])(lambda *args, **kwargs: kwargs), args=rest[1:]
    )


FOREIGN = ("franka_server.py",)  # scripts of other projects


def written_commands():
    """Yield (command, whether it is a line of its own) of docstrings, of heads of shell scripts and of pages."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("*.md")]
    for folder in ("common", "domains", "robot", "tools", "benchmarks", "docs", "results"):
        sources += [p for kind in ("py", "sh", "md") for p in (ROOT / folder).rglob(f"*.{kind}")]
    script = r"python \w+\.py|python -m (?:tools|robot|benchmarks|domains)\.\w+|bash [\w/]+\.sh"
    line = re.compile(rf"(^[#\s$]*|`)((?:[A-Z_]+=\S+ )*(?:{script})(?: [^\n`]*)?)(?:$|`)", re.M)
    for path in sources:
        text = re.sub(r"\s*\\{1,2}\n[#\s]*", " ", path.read_text())  # a command of several lines
        for start, words in line.findall(text):
            words = re.split(r"\s{2,}|\s#|\s&", words)[0].strip()
            if (
                "..." not in words
                and "{" not in words
                and not any(name in words for name in FOREIGN)
            ):
                yield pytest.param(words, start != "`", id=f"{path.relative_to(ROOT)}:{words[:40]}")


@pytest.fixture
def stand_in(tmp_path):
    """A project, an interpreter that only writes down its arguments, and a function that returns those."""
    project = Project(tmp_path)
    heard = tmp_path / "heard"
    fake = tmp_path / "fake-python"
    write_down = f'printf "%q " "$@" >> {heard}; echo >> {heard}'
    tasks = '[ "$2" = tools.lookup ] && printf "task-a\\ntask-b\\n"'
    fake.write_text(f"#!/bin/bash\n{write_down}\n{tasks}\nexit 0\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    return project, fake, lambda: [shlex.split(line) for line in heard.read_text().splitlines()]


def name_of(words):
    """Return the script or module that Python's arguments run."""
    return words[1] if words[0] == "-m" else words[0]


@pytest.mark.parametrize(
    "env", [{}, {"SMOKE": "1"}, {"SEED": "7", "RUN": "mine", "VLM": "a/b", "SMOKE": "0"}]
)
def test_every_command_of_the_loop_parses(env, stand_in):
    """loop.sh runs Algorithm 1 in its order, each stage with the one before it as parent, by arguments that exist."""
    project, fake, heard = stand_in
    project.must("bash", "loop.sh", "metaworld", "3", PYTHON=str(fake), **env)
    commands = [words for words in heard() if "tools.lookup" not in words]
    parsed = [(name_of(words), parses(words)) for words in commands]
    stages = [(name, a) for name, a in parsed if name.startswith("stage")]
    assert [name for name, _ in stages] == ["stage0_sft.py", *["stage_rl.py", "stage_sft.py"] * 3]
    assert all(b.parent == a.out for (_, a), (_, b) in zip(stages, stages[1:]))
    assert len({a.out for _, a in stages}) == 7 and {a.domain for _, a in stages} == {"metaworld"}
    assert {a.seed for _, a in stages} == {int(env.get("SEED", 0))} and stages[0][1].vlm == env.get(
        "VLM", "tiny"
    )
    assert [a.task for name, a in stages if name == "stage_rl.py"] == ["task-a", "task-b", "task-a"]
    assert [name for name, _ in parsed if not name.startswith("stage")] == [
        "tools.plan",
        "report.py",
        "evaluate.py",
    ]
    assert parsed[-1][1].video.endswith("video.mp4")
    smoke = env.get("SMOKE") == "1"
    assert (stages[0][1].steps == 60) is smoke and ("smoke" in stages[0][1].out) is smoke


@pytest.mark.parametrize(
    "method, stages, flag",
    [
        ("sft-only", ["stage0_sft.py", "stage_sft.py"], ""),
        ("ire-vla-freeze", ["stage0_sft.py", "stage_rl.py", "stage_sft.py"], "--freeze-vlm"),
        ("ppo-replay", ["stage0_sft.py", "stage_rl.py", "stage_sft.py"], "--train-vlm"),
    ],
)
def test_the_baselines_are_variants_of_the_same_loop(method, stages, flag, stand_in):
    """METHOD= leaves out stage 1 or adds one flag."""
    project, fake, heard = stand_in
    how = {"METHOD": method, "SFT_ARGS": "--episodes=0", "RL": "--episodes 0"}
    out = project.must("bash", "loop.sh", "metaworld", "1", PYTHON=str(fake), **how)
    assert (
        "evaluate.py --checkpoint" in out and heard()[-1][0] != "report.py"
    )  # nothing to report is not an error
    started = [words for words in heard() if words[0].startswith("stage")]
    assert [words[0] for words in started] == stages
    assert [flag in words for words in started].count(True) == bool(flag)
    assert all(parses(words) for words in started)


def test_wrong_settings_of_the_loop(stand_in):
    """Each is refused with one sentence that names it: METHOD, START, PYTHON, and fig4.sh's checkpoint."""
    project, fake, _ = stand_in

    def sentence(*words, **env):
        result = project.run("bash", *words, **{"PYTHON": str(fake), **env})
        assert result[0] == 2
        return one_sentence(result)

    loop = ("loop.sh", "bead", "1")
    assert "ppo-replay" in sentence(*loop, METHOD="magic")
    assert "START=nowhere" in sentence(*loop, START="nowhere")
    for start in "ab":
        write_json(project.folder / start / "config.json", {})
        (project.folder / start / "heads.safetensors").write_text(start)
    write_json(project.folder / "other/config.json", {"domain": "toy"})
    assert "START=other is a checkpoint of toy, not of bead" in sentence(*loop, START="other")
    entries = {"domain": "bead", "args": {"domain": "bead"}}  # as in a checkpoint, twice
    write_json(project.folder / "a/config.json", entries)
    project.must("bash", *loop, START="a", PYTHON=str(fake))
    assert (project.folder / "runs/bead-seed0/0-sft/heads.safetensors").read_text() == "a"
    project.must("bash", *loop, START="a", PYTHON=str(fake))
    assert "START=b" in sentence(*loop, START="b")
    assert "nowhere" in sentence("tools/fig4.sh", "bead", "nowhere")
    assert "PYTHON=/no/python" in sentence(*loop, PYTHON="/no/python")
    for words in ((), ("metaworld", "1", "more"), ("metaworld", "four")):
        code, out, _ = project.run("bash", "loop.sh", *words, PYTHON=str(fake))
        assert code == 2 and "bash loop.sh metaworld" in out
    show = 'source tools/settings.sh bead 1; echo "smoke: $SMOKE."'
    for value, smoke in {
        "": "",
        " off": "",
        "N": "",
        "False ": "",
        "TRUE": "1",
        "yes": "1",
    }.items():
        out = project.must("bash", "-c", show, PYTHON=str(fake), SMOKE=value)
        assert f"smoke: {smoke}." in out, value


def test_sft_stages_are_launched_elsewhere(stand_in):
    """SFT_LAUNCH= precedes the SFT stages and nothing else."""
    project, fake, heard = stand_in
    project.must(
        "bash", "loop.sh", "metaworld", "1", PYTHON=str(fake), SFT_LAUNCH=f"{fake} launched -n 2"
    )
    launched = [words[3] for words in heard() if words[0] == "launched"]
    assert launched == ["stage0_sft.py", "stage_sft.py"]
    others = {name_of(words) for words in heard()} - {"launched"}
    assert others == {"tools.lookup", "tools.plan", "stage_rl.py", "report.py", "evaluate.py"}


@pytest.mark.parametrize("command, complete", list(written_commands()))
def test_every_written_command_parses(command, complete, stand_in):
    """A command in a docstring, in loop.sh or on a page has arguments that exist."""
    project, fake, heard = stand_in
    env, program, words = re.fullmatch(r"((?:[A-Z_]+=\S+ )*)(python|bash) (.*)", command).groups()
    words = shlex.split(words)
    assert source_of(words)[0].exists()
    if program == "python":
        (parses if complete else check_flags)(words)
    elif words[0] == "loop.sh" and len(words) > 1:
        given = dict(e.split("=", 1) for e in shlex.split(env))
        if "START" in given:
            write_json(project.folder / given["START"] / "config.json", {})
        project.must("bash", *words, **{**given, "PYTHON": str(fake)})
        for started in heard():
            if "tools.lookup" not in started:
                parses(started)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_argument(script, capsys, monkeypatch):
    """--help prints the docstring as it is, and the meaning of each argument."""
    module = import_module(script)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        parse(module.Args, module.__doc__)
    text = capsys.readouterr().out
    assert end.value.code == 0 and module.__doc__.strip() in text
    source = (
        (ROOT / f"{script.replace('.', '/')}.py")
        .read_text()
        .split("class Args:")[1]
        .split("\n\n")[0]
    )
    for field in filter(str.strip, source.splitlines()):
        assert re.search(r"  # \w", field), f"{script}: {field.strip()} is not explained"


@pytest.mark.parametrize("script", ["real_robot", "tools.compare"])
def test_help_of_each_command_explains_every_argument(script):
    """A line of its own for each argument in the docstring's Args, which tyro prints."""
    module = import_module(script)
    commands = re.search(r"parse_command\(\[(.*?)\]", Path(module.__file__).read_text()).group(1)
    for name in commands.split(", "):
        command = getattr(module, name)
        explained = {
            p.arg_name: p.description for p in docstring_parser.parse(command.__doc__).params
        }
        for argument in inspect.signature(command).parameters:
            assert explained.get(argument), f"{script} {name}: {argument} is not explained"


@pytest.mark.parametrize("words", ["real_robot.py", "-m tools.compare", "-m robot.sim"])
def test_help_of_several_commands_is_quick(words, project):
    """--help imports neither torch nor transformers, and `| head` ends it without a traceback."""
    script = f"{sys.executable} {words} --help"
    process = project.start("bash", "-c", f"{script} | head -n 1", PYTHONPROFILEIMPORTTIME="1")
    out, err = process.communicate(timeout=120)
    assert len(out.splitlines()) == 1 and "Traceback" not in err and "BrokenPipe" not in err
    imported = {
        line.split("|")[-1].strip() for line in err.splitlines() if line.startswith("import time:")
    }
    assert imported and not imported & {"torch", "transformers"}
