"""Whatever interrupts the loop, the same command again ends as if nothing had."""

import random
import re
import shlex
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from conftest import STAGE_FILES, Project, check_run, episodes, files, kill, leftovers, warm_python

from data import attempts
from domains import metaworld
from run import read_tensors


def killed_often(folder, domain, kills, seconds, seed):
    """Gives the smoke command again and again, killing it at random instants of an undisturbed run's length."""
    project, draw = Project(folder), random.Random(seed)
    for _ in range(kills):
        process = project.start("bash", "loop.sh", domain, "1", python=warm_python(), SMOKE="1", STATE_EVERY="0.2")
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
    assert attempts(run / "D_rl/blue")
    assert episodes(tmp_path / "runs/D_e-smoke") == episodes(whole.folder / "runs/D_e-smoke")
    for name in ("heads.safetensors", "vlm/model.safetensors"):
        assert (run / "0-sft" / name).read_bytes() == (whole.folder / "runs/toy-seed0-smoke/0-sft" / name).read_bytes()
    # RL may have lost unsaved steps and so may end elsewhere; what follows from its end is decided again, and what is
    # finished is left alone
    killed = files(run)
    shutil.rmtree(run / "1-sft")
    project.must("bash", "loop.sh", "toy", "1", SMOKE="1")
    again = files(run)
    finished = [name for name in killed if not name.startswith(("1-sft/", "report"))]
    assert len(finished) > 20
    for name in [*finished, "1-sft/heads.safetensors", "1-sft/vlm/model.safetensors"]:
        assert again[name] == killed[name], name


@pytest.mark.slow
def test_metaworld_loop_killed_20_times(tmp_path):
    """The same on Meta-World's own physics and pictures, at 20 instants."""
    killed_often(tmp_path, "metaworld", 20, 100, seed=1)
    stages = ["0-sft", "1-rl-button-press-new", "1-sft"]
    check_run(tmp_path, metaworld, stages, 2, tmp_path / "runs/D_e-smoke/metaworld")


CRASH = """
import os, signal, sys
from pathlib import Path
if __name__ == "__main__":
    target, times, call, *sys.argv = sys.argv[1:]
replace, seen = os.replace, []
def crash(source, to):
    if Path(to).name == target and (seen.append(to) or len(seen) == int(times)):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, to)
if __name__ == "__main__":  # not in the processes that record
    os.replace = crash
    import stage0_sft
    exec(call)
"""
STORY = "stage0_sft.main(stage0_sft.story, stage0_sft.tyro.cli(stage0_sft.Args))"
RECORD = "stage0_sft.record(('toy', 'red', 64, 0.2, 0.0, Path('D_e/toy/red'), 1))"


def test_kill_in_the_middle_of_a_write(tmp_path, toy):
    """Killed after a file or folder is written and before it has its name, stage 0 ends as if that had not happened."""
    project = Project(tmp_path)
    (tmp_path / "crash.py").write_text(CRASH)
    stage0 = ["stage0_sft.py", "--domain", "toy", "--data", "D_e", "--out", "runs/0-sft"]
    stage0 += ["--demos", "2", "--steps", "30", "--batch", "8", "--episodes", "1"]
    for target, times, call in (
        ("000001.safetensors", 1, RECORD), ("stage.json", 1, STORY), ("state.safetensors", 1, STORY),
        ("state.safetensors", 3, STORY), ("0-sft", 1, STORY), ("eval.json", 1, STORY),
    ):  # fmt: skip
        code, out, err = project.run("python", "crash.py", target, times, call, *stage0, STATE_EVERY="0")
        assert code == -signal.SIGKILL, out + err
    project.must("python", *stage0)
    assert not leftovers(tmp_path / "runs") + leftovers(tmp_path / "D_e")
    assert attempts(tmp_path / "D_e/toy/red") == attempts(tmp_path / "D_e/toy/green") == [0, 1]
    read_tensors(tmp_path / "runs/0-sft/heads.safetensors")
    assert STAGE_FILES - {"log.jsonl"} <= set(files(tmp_path / "runs/0-sft"))


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
    if stage in ("RL blue", "evaluate"):  # simulators begin without torch
        simulators = psutil.Process(process.pid).children(recursive=True)
        simulators = [p for p in simulators if "forkserver" in " ".join(p.cmdline())]
        assert len(simulators) > 2 and not any("torch" in m.path for p in simulators for m in p.memory_maps())
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
