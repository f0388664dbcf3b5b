"""However the loop is interrupted, the same command ends as if nothing had happened."""

import random
import re
import shlex
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from conftest import (
    STAGE_FILES,
    Project,
    check_run,
    command,
    episodes,
    files,
    kill,
    leftovers,
    warm_python,
)

from common.episode_file import episode_ids
from common.files import read_tensors
from domains import metaworld


def killed_often(folder, domain, kills, seconds, seed):
    """Repeat the smoke command, killed at random instants of an undisturbed run's length. Return the project."""
    project = Project(folder)
    draw = random.Random(seed)
    loop = ["bash", "loop.sh", domain, "1"]
    for _ in range(kills):
        process = project.start(*loop, python=warm_python(), SMOKE="1", SAVE_INTERVAL="0.2")
        try:
            process.communicate(timeout=draw.uniform(1, seconds))
        except subprocess.TimeoutExpired:
            kill(process, signal.SIGKILL).communicate()
        else:
            assert process.returncode == 0
            assert list(folder.glob("runs/*/report.png"))
            shutil.rmtree(folder / "runs")  # it had finished: once more from the beginning
    project.must(*loop, SMOKE="1", SAVE_INTERVAL="0.2")
    return project


def test_loop_killed_at_random_instants(undisturbed, tmp_path, bead):
    """SIGKILL of everything, then the same command: a complete run, the same D_e, the same weights after SFT."""
    whole, seconds = undisturbed
    project = killed_often(tmp_path, "bead", 2, 0.7 * seconds, seed=0)
    stages = ["0-sft", "1-rl-blue", "1-sft"]
    data = "runs/D_e-smoke"
    run = check_run(tmp_path, bead, stages, 2, tmp_path / data / "bead")
    check_run(whole.folder, bead, stages, 2, whole.folder / data / "bead")
    assert episode_ids(run / "D_rl/blue")
    assert episodes(tmp_path / data) == episodes(whole.folder / data)
    for name in ("heads.safetensors", "vlm/model.safetensors"):
        other = whole.folder / "runs/bead-seed0-smoke/0-sft" / name
        assert (run / "0-sft" / name).read_bytes() == other.read_bytes()
    # RL may have lost unsaved steps, and so may end elsewhere. The next stage depends on its end alone, and finished
    # stages are left alone.
    killed = files(run)
    shutil.rmtree(run / "1-sft")
    project.must("bash", "loop.sh", "bead", "1", SMOKE="1")
    again = files(run)
    finished = [name for name in killed if not name.startswith(("1-sft/", "report"))]
    assert len(finished) > 20
    for name in [*finished, "1-sft/heads.safetensors", "1-sft/vlm/model.safetensors"]:
        assert again[name] == killed[name], name


@pytest.mark.slow
def test_metaworld_loop_killed_20_times(tmp_path):
    """The same on Meta-World's own physics and images, at 20 instants."""
    killed_often(tmp_path, "metaworld", 20, 100, seed=1)
    stages = ["0-sft", "1-rl-button-press-new", "1-sft"]
    check_run(tmp_path, metaworld, stages, 2, tmp_path / "runs/D_e-smoke/metaworld")


CRASH = """
import os, runpy, signal, sys
from pathlib import Path

replace, seen = os.replace, []

def crash(source, to):
    if Path(to).name == target:
        seen.append(to)
        if len(seen) == int(times):
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, to)

if __name__ == "__main__":  # not in the processes that record
    target, times, *sys.argv = sys.argv[1:]
    os.replace = crash
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
RECORD = """
import sys
from pathlib import Path
from common.demonstrations import Recording, record_attempt
from domains import bead

recording = Recording(bead.make, bead.expert, "bead", bead.INSTRUCTIONS, bead.PROTOCOL, 64, 0.2, 0.0, Path("D_e/bead"))
record_attempt(recording, "red", 1)
"""


def test_kill_in_the_middle_of_a_write(tmp_path):
    """Killed after a file or folder is written and before it has its name, stage 0 ends as if nothing had happened."""
    project = Project(tmp_path)
    (tmp_path / "crash.py").write_text(CRASH)
    (tmp_path / "record.py").write_text(RECORD)
    small = {"demos": 2, "steps": 30, "batch": 8, "episodes": 1}
    stage0 = command("stage0_sft.py", domain="bead", data="D_e", out="runs/0-sft", **small)
    for target, times, script in (
        ("000001.safetensors", 1, ["record.py"]),
        ("stage.json", 1, stage0[1:]),
        ("state.safetensors", 1, stage0[1:]),
        ("state.safetensors", 3, stage0[1:]),
        ("0-sft", 1, stage0[1:]),
        ("eval.json", 1, stage0[1:]),
    ):
        code, out, err = project.run(
            "python", "crash.py", target, times, *script, SAVE_INTERVAL="0"
        )
        assert code == -signal.SIGKILL, out + err
    project.must(*stage0)
    assert not leftovers(tmp_path / "runs") + leftovers(tmp_path / "D_e")
    assert (
        episode_ids(tmp_path / "D_e/bead/red") == episode_ids(tmp_path / "D_e/bead/green") == [0, 1]
    )
    read_tensors(tmp_path / "runs/0-sft/heads.safetensors")
    assert STAGE_FILES - {"log.jsonl"} <= set(files(tmp_path / "runs/0-sft"))


def running(process, log, bar):
    """Wait until a progress bar has moved."""
    shown = re.compile(bar + r":.* [1-9]\d*/")
    while not (log.exists() and shown.search(log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)


def ended(process):
    """Whether all of a process group has ended, within 5 seconds: environments may take a moment."""
    for _ in range(50):
        try:
            kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


BARS = {
    "collect": "D_e: expert episodes",
    "SFT": "stage 0 SFT",
    "RL": "RL blue",
    "evaluate": "evaluate",
}


def stopped_command(step, checkpoint):
    """Return a long command for each of BARS."""
    stage0 = {"domain": "bead", "data": "D_e", "out": "runs/0-sft"}
    return {
        "collect": command("stage0_sft.py", **stage0, demos=5000, steps=1),
        "SFT": ["bash", "loop.sh", "bead", "1"],
        "RL": command("stage_rl.py", domain="bead", task="blue", parent=checkpoint, out="runs/1"),
        "evaluate": command("evaluate.py", checkpoint=checkpoint, episodes=5000, out="result.json"),
    }[step]


@pytest.mark.parametrize("step", BARS)
def test_ctrl_c(step, tmp_path, checkpoint):
    """SIGINT as a terminal sends it: the command ends in seconds, without traceback, and says how to go on."""
    project = Project(tmp_path)
    log = tmp_path / "stderr"
    words = stopped_command(step, checkpoint)
    script = shlex.join(words).replace("python ", '"$PYTHON" ', 1)
    process = project.start("bash", "-c", f"set -e; {script} 2> {log}; echo not reached")
    running(process, log, BARS[step])
    if step in ("RL", "evaluate"):  # environments start without torch
        workers = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in workers if "forkserver" in " ".join(p.cmdline())]
        assert len(workers) > 2 and not any(
            "torch" in m.path for p in workers for m in p.memory_maps()
        )
    time.sleep(0.5)
    began = time.time()
    kill(process, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    printed = log.read_text()
    assert time.time() - began < 10 and process.returncode != 0 and "not reached" not in out
    assert "Traceback" not in printed + out and "Error" not in printed, printed
    assert "Rerun the" in printed and " ".join(words) in printed
    assert ("resume" in printed) is (step != "evaluate")
    assert ended(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_stops_a_stage_as_ctrl_c_does(number, tmp_path, checkpoint):
    """SIGTERM and SIGHUP of the stage alone: one sentence, no traceback, and no process is left."""
    project = Project(tmp_path)
    log = tmp_path / "stderr"
    words = shlex.join(stopped_command("RL", checkpoint)).replace("python ", 'exec "$PYTHON" ', 1)
    process = project.start("bash", "-c", f"{words} 2> {log}")
    running(process, log, BARS["RL"])
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    printed = log.read_text()
    assert (
        process.returncode == 128 + number
        and "Traceback" not in printed + out
        and "Error" not in printed
    ), printed
    assert "Rerun the same command to resume" in printed
    assert ended(process)
