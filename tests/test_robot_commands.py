"""real_robot.py's commands: check, collect, train, evaluate, classifier, as functions and as processes."""

import contextlib
import json
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from robots import lockstep_process, realtime, refused, start

import model
import real_robot
from common.episode_file import EVAL_SEED, ONLINE_SEED, episode_ids, open_episode
from domains import panda
from model import VLA


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained policy of the panda's format."""
    folder = tmp_path_factory.mktemp("policy") / "0-sft"
    torch.manual_seed(0)
    make_checkpoint(folder)
    return folder


def make_checkpoint(folder):
    config = model.VLAConfig(vlm="tiny", domain="panda", action_dim=7, image_size=64)
    words = " ".join(panda.INSTRUCTIONS.values()).split()
    VLA.create(config, words, folder).save(folder)


def run(*command, timeout=120, **env):
    """(exit code, stdout, stderr) of a command of real_robot.py."""
    process = start("real_robot.py", *command, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


# ----------------------------------------------------------------------------------------------------------------------
# check


def test_check_moves_nothing(robot_server, capsys, monkeypatch):
    """`check` reads, prints and ends; if something is wrong, it says so in a sentence."""
    robot_server.post("sim/reset", {"task": "pick-can", "seed": 0}, 10)
    before = robot_server.json("sim/look")
    real_robot.check()
    out = capsys.readouterr().out
    assert "Nothing was moved" in out and robot_server.json("sim/look") == before
    assert "hil-serl could report this number too" in out  # 0.08 alone does not tell
    monkeypatch.setenv("ROBOT_GRIPPER", "robotiq")
    assert "serl or hil-serl" in refused(real_robot.check)  # a fraction is never a raw number
    monkeypatch.setenv("ROBOT_GRIPPER", "serl")
    robot_server.order("frozen_camera")
    assert "frozen" in refused(real_robot.check)
    robot_server.order("frozen_camera", 0)
    monkeypatch.setenv("ROBOT_FRONT", "webcam:0")
    assert "webcam:0" in refused(real_robot.check)
    monkeypatch.setitem(real_robot.sys.modules, "pyrealsense2", None)  # not installed
    monkeypatch.setenv("ROBOT_FRONT", "realsense:123")
    assert "pyrealsense2" in refused(real_robot.check)


@pytest.mark.parametrize(
    "kind, value, words",
    [
        ("nan", 9, "not finite"),
        ("no_state", 9, "has not received a state"),
        ("error", 9, "500"),
        ("hang", 30, "lost"),
        ("frozen_state", 1, "state topic is dead"),
    ],
)
def test_check_says_what_is_wrong_in_one_sentence(kind, value, words):
    """As a process, as a user runs it: one line on stderr, no traceback, exit code not 0."""
    with realtime() as (server, client):
        client.order(kind, value)
        code, out, err = run("check", ROBOT_URL=server.url)
        assert code == 1 and "Nothing was moved" not in out
        assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_check_knows_a_ready_robot_and_one_that_is_not(monkeypatch, capsys):
    """In real time: alive passes; a stopped controller, an arm that somebody moves and one outside its box do not."""
    with realtime() as (server, client):
        monkeypatch.setenv("ROBOT_URL", server.url)
        real_robot.check()
        assert "ready" in capsys.readouterr().out
        client.post("stopimp", timeout=10)
        assert "controller is stopped" in refused(real_robot.check)
        client.post("startimp", timeout=10)
        server.do(
            lambda world: world.start_joint_controller([0, -0.785, 0, -2.356, 0, 1.571, 0.785])
        )
        time.sleep(1.5)
        assert "although nothing is commanded" in refused(real_robot.check)
        time.sleep(11)
        server.do(lambda world: world.start_impedance())
        time.sleep(0.3)
        message = refused(real_robot.check)  # Franka's own ready pose
        assert "outside its box" in message and "by hand" in message and "/jointreset" in message


def test_check_of_another_gripper(monkeypatch, capsys):
    """Each gripper passes under its name; a raw 255 is only a Robotiq's; a raw 1 is said to be ambiguous."""
    with realtime("robotiq") as (server, client):
        monkeypatch.setenv("ROBOT_URL", server.url)
        monkeypatch.setenv("ROBOT_GRIPPER", "robotiq")
        client.post("activate_gripper")
        for position in (1, 255):
            client.post("move_gripper", {"gripper_pos": position})
            time.sleep(0.8)
            real_robot.check()
            out = capsys.readouterr().out
            assert "ready" in out and ("hil-serl could report this number too" in out) == (
                position == 1
            )
        monkeypatch.setenv("ROBOT_GRIPPER", "hil-serl")
        assert "set ROBOT_GRIPPER to robotiq" in refused(real_robot.check)


def test_help_is_there_at_once():
    """No torch is imported, and the example commands can be copied."""
    process = start("-c", "import real_robot, sys; print('torch' in sys.modules)")
    assert process.communicate(timeout=60)[0] == "False\n"
    code, out, _ = run("--help")
    assert (
        code == 0
        and "    python real_robot.py evaluate --checkpoint C --task pick-eggplant\n" in out
    )
    for name in ("collect", "train", "evaluate", "classifier"):
        assert name in out


# ----------------------------------------------------------------------------------------------------------------------
# collect and evaluate


class Expert:
    """Stands in for VLA: the scripted expert, which may do something at step 5 of an episode."""

    config = {"image_size": 64}
    made = []
    at_step_5 = None

    @classmethod
    def load(cls, *_):
        return cls()

    def encode(self, images, instructions):
        return torch.zeros(1, 1, 1), torch.ones(1, 1)

    def act(self, h, mask):
        env = self.made[-1]
        if env.tracking.steps == 5 and type(self).at_step_5:
            type(self).at_step_5()
        return torch.from_numpy(panda.expert(env))[None]


@pytest.fixture
def expert(monkeypatch):
    """The expert as every checkpoint's policy."""
    make = panda.make
    monkeypatch.setattr(
        panda, "make", lambda *args: Expert.made.append(make(*args)) or Expert.made[-1]
    )
    monkeypatch.setattr(model, "VLA", Expert)
    yield Expert
    Expert.at_step_5 = None
    Expert.made.clear()


def test_collecting_survives_faults_and_restarts(robot_server, tmp_path, expert):
    """`collect` keeps whole successes only: a faulted episode leaves no file, an error loses nothing, and the same
    command goes on to the number asked for."""

    def collect():
        real_robot.collect("none", "pick-carrot", str(tmp_path), successes=3, std=0.1)

    faults = ["nan", "user_stop"]  # the first is over by itself, the second waits for an operator
    expert.at_step_5 = lambda: faults and robot_server.order(faults.pop(0))
    assert "does not follow" in refused(collect)
    assert episode_ids(tmp_path) == []
    robot_server.order("user_stop", 0)
    robot_server.post("clearerr")

    def ctrl_c():
        expert.at_step_5 = None
        raise KeyboardInterrupt

    expert.at_step_5 = ctrl_c
    with pytest.raises(SystemExit) as stop:
        collect()
    assert stop.value.code == 130
    collect()
    assert len(episode_ids(tmp_path)) == 3
    for path in tmp_path.iterdir():
        handle, header = open_episode(path)
        assert (header["domain"], header["task"], header["success"]) == (
            "panda",
            "pick-carrot",
            "1",
        )
        assert (
            handle.get_slice("image").get_shape()[1:] == [64, 64, 3]
            and handle.get_tensor("reward")[-1] == 1
        )
        action = handle.get_tensor("action")
        assert (
            action.shape[1] == 7 and 0 < (np.abs(action[:, 6]) < 0.999).mean() < 1
        )  # explored, and executed so
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir())
    collect()
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir()) == before


def test_evaluate_resumes_from_its_outcomes(robot_server, tmp_path, expert, capsys):
    """With --out it goes on where it stopped; another evaluation's file is refused; a stop says what is kept."""
    out = tmp_path / "outcomes.json"
    real_robot.evaluate("none", "pick-carrot", 1, str(out))
    (first,) = json.loads(out.read_text())["outcomes"]
    real_robot.evaluate("none", "pick-carrot", 2, str(out))
    rows = json.loads(out.read_text())["outcomes"]
    assert rows[0] == first and [row["seed"] for row in rows] == [EVAL_SEED, EVAL_SEED + 1]
    assert "outcomes.json" in refused(real_robot.evaluate, "none", "pick-can", 1, str(out))

    def ctrl_c():
        raise KeyboardInterrupt

    expert.at_step_5 = ctrl_c
    capsys.readouterr()
    for path, words in ((str(out), f"resume from {out}"), ("", "nothing is kept without --out")):
        with pytest.raises(SystemExit):
            real_robot.evaluate("none", "pick-carrot", 3, path)
        err = capsys.readouterr().err
        assert words in err and "SIGINT" in err and "pick-carrot" in err


def test_evaluate_never_reports_fewer_episodes_as_done(robot_server, expert):
    """If faults end every attempt, that is an error, not a success rate."""
    expert.at_step_5 = lambda: robot_server.order("nan")
    assert "0 of 2 episodes" in refused(real_robot.evaluate, "none", "pick-carrot", 2)


def test_outputs_and_numbers_are_checked_before_a_persons_work(tmp_path):
    """A folder as a file, a file as a folder, damaged outcomes, impossible numbers: refused without a robot."""
    (tmp_path / "file").write_text("[]")
    for words, call in {
        "is a folder": lambda: real_robot.evaluate("c", "pick-can", out=str(tmp_path)),
        "not a JSON object": lambda: real_robot.evaluate(
            "c", "pick-can", out=str(tmp_path / "file")
        ),
        "--episodes": lambda: real_robot.evaluate("c", "pick-can", episodes=0),
        "--std": lambda: real_robot.collect("c", "pick-can", str(tmp_path / "x"), std=float("nan")),
        "unknown task": lambda: real_robot.train("c", "pick-cat", str(tmp_path / "x/1-rl")),
    }.items():
        assert words in refused(call)
    assert (tmp_path / "file").read_text() == "[]"


def test_an_interruption_outside_an_episode_holds_the_arm_too(
    robot_server, tmp_path, expert, monkeypatch
):
    """Ctrl-C while a file is written: the environment is closed before the command ends."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(real_robot, "write_episode", interrupted)
    with pytest.raises(SystemExit):
        real_robot.collect("none", "pick-carrot", str(tmp_path), successes=1)
    assert not expert.made[-1].commanded  # close has held the arm
    panda.make("pick-can").close()


def test_frames_are_never_overwritten(robot_server, tmp_path, expert):
    """After a restart the attempts are numbered after the last episode and the last image, failures included."""
    out = tmp_path / "D_rl"
    frames = tmp_path / "frames"
    for name, seed in (("success", ONLINE_SEED), ("failure", ONLINE_SEED + 7)):
        (frames / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(frames / name / f"pick-carrot-{seed}.png")
    (frames / "failure/pick-carrot-blurred.png").write_bytes(b"")
    (frames / "failure/pick-can-9999999.png").write_bytes(b"")
    real_robot.collect("none", "pick-carrot", str(out), successes=1, frames=str(frames))
    assert episode_ids(out) == [8]
    assert (frames / f"success/pick-carrot-{ONLINE_SEED + 8}.png").exists()
    with Image.open(frames / f"failure/pick-carrot-{ONLINE_SEED + 7}.png") as image:
        assert image.size == (4, 4)


@pytest.mark.parametrize("signals", [[signal.SIGHUP], [signal.SIGINT] * 3])
def test_a_signal_ends_evaluate_with_a_held_arm(signals, checkpoint, monkeypatch):
    """In the middle of an episode, as a process: held, one sentence, 128 + the signal, however often it is sent."""
    with realtime() as (server, _):
        aimed = []
        aim = server.world.aim
        monkeypatch.setattr(server.world, "aim", lambda pose: aimed.append(pose) or aim(pose))
        command = ("real_robot.py", "evaluate", "--checkpoint", checkpoint, "--task", "pick-can")
        process = start(*command, ROBOT_URL=server.url)
        deadline = time.monotonic() + 120
        while len(aimed) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in signals:
            os.kill(process.pid, number)
            time.sleep(0.02)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signals[0], err
        assert f"stopped by {signals[0].name}" in err and "without --out" in err
        assert "Traceback" not in err and "ordered to hold" in out


# ----------------------------------------------------------------------------------------------------------------------
# train


def test_train_needs_successes_to_start_from(tmp_path):
    assert "0 of the 20" in refused(real_robot.train, "none", "pick-can", str(tmp_path / "1-rl"))


def record_demonstrations(folder, number):
    """Successes of the expert, cheaply: one episode under many names."""
    env = panda.make("pick-carrot")
    obs, _ = env.reset(seed=0)
    episode = {"image": [], "action": [], "reward": []}
    done = False
    while not done:
        action = panda.expert(env)
        episode["image"].append(obs)
        obs, reward, success, truncated, _ = env.step(action)
        episode["action"].append(action)
        episode["reward"].append(reward)
        done = success or truncated
    env.close()
    for k in range(number):
        info = real_robot.EpisodeInfo(
            "panda",
            "pick-carrot",
            "pick up the carrot",
            "online",
            ONLINE_SEED + k,
            panda.PROTOCOL,
            executed=True,
        )
        real_robot.write_episode(folder / f"{k:06d}.safetensors", *episode.values(), info)


def env_steps_saved(out):
    """Environment steps of the saved state next to `out`."""
    from common.files import read_tensors

    path = out.with_name(f".{out.name}.partial") / "state.safetensors"
    if not path.exists():
        return -1
    return json.loads(read_tensors(path)[1]["counters"])["env_steps"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, None])
def test_training_on_a_robot_keeps_an_operator_s_work(checkpoint, tmp_path, signum, robot_server):
    """Ctrl-C, kill or a dead server: the episodes so far are in the saved state, and the same command resumes from
    there, to the end of its --env-steps."""
    record_demonstrations(tmp_path / "D_rl/pick-carrot", 20)
    out = tmp_path / "1-rl"
    command = [
        "train",
        "--checkpoint",
        checkpoint,
        "--task",
        "pick-carrot",
        "--out",
        out,
        "--env-steps",
        130,
    ]
    with lockstep_process() if signum else dying_server() as url:
        process = start(
            "real_robot.py", *command, ROBOT_URL=url, SAVE_INTERVAL="3600", OMP_NUM_THREADS="1"
        )
        deadline = time.monotonic() + 240
        while env_steps_saved(out) < 30 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        saved = env_steps_saved(out)
        assert saved >= 30, process.communicate(timeout=60)
        if signum == signal.SIGINT:
            os.killpg(
                process.pid, signum
            )  # a terminal's Ctrl-C reaches the environment's process too
        elif signum:
            os.kill(process.pid, signum)
        else:
            url.kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == (128 + signum if signum else 1), err
        assert "Traceback" not in err
        assert env_steps_saved(out) >= saved
    if signum != signal.SIGTERM:
        return
    code, _, err = run(*command, timeout=300, ROBOT_URL=robot_server.url)
    assert code == 0, err
    assert json.loads((out / "summary.json").read_text())["env_steps"] >= 130


class DyingServer(str):
    """A lock-step server's URL; `kill` ends the server at once."""


@contextlib.contextmanager
def dying_server():
    from robot.sim.process import SimProcess

    child = SimProcess()
    url = DyingServer(child.url)
    url.kill = child.process.kill
    yield url
    child.process.wait(10)


def test_every_command_of_the_page_is_one_that_exists():
    """docs/real_robot.md names only flags and commands that real_robot.py has."""
    page = (real_robot.Path(real_robot.__file__).parent / "docs/real_robot.md").read_text()
    names = set(re.findall(r"python real_robot\.py (\w+)", page))
    assert names <= {"check", "collect", "train", "evaluate", "classifier"} and len(names) >= 4
