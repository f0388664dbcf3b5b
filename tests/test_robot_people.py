"""Operators, their keys and mice, cameras, rewards, and signals."""

import os
import pty
import signal
import sys
import termios
import threading
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from robots import (
    FORWARD,
    LIMITS,
    calm,
    drive,
    human,
    realtime,
    refused,
    start,
)
from safetensors.torch import save_file

import robot.cameras
from domains import panda
from robot.cameras import UsbCamera, crop_and_shrink
from robot.classifier import SuccessClassifier, train_classifier
from robot.limits import Fault, FaultKind
from robot.operator import HumanOperator, Keyboard, SpaceMouse
from robot.server import RobotConfig, parse_state
from robot.signals import STOP_SIGNALS, SignalExit, delay_signals, stop_on_signals

# ----------------------------------------------------------------------------------------------------------------------
# Operators


def test_an_operator_takes_over_and_that_is_stored(robot_server):
    """The operator's action is executed, and info["executed"], hence the file, holds it; space stops the arm."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    env.operator = operator = human()
    typed = operator.keyboard.typed
    close = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
    held = [0, 0, 0, 0, 0, 0, -1]
    for keys, asked, executed in (
        ("", FORWARD, FORWARD),
        ("c", FORWARD, [0, 0, 0, 0, 0, 0, 1]),
        ("aw", FORWARD, [0.5, 0.5, 0, 0, 0, 0, 1]),
        ("kf", FORWARD, [0, 0, -0.5, 0, 0, 0, -1]),
        ("c", FORWARD, FORWARD),
        *[("", close, close)] * 6,
        ("c", FORWARD, held),  # taking over opens nothing that is closed
        ("r", FORWARD, [0, 0, 0.5, 0, 0, 0, -1]),
        ("o", FORWARD, [0, 0, 0, 0, 0, 0, 1]),
    ):
        typed[:] = [keys]
        assert np.allclose(env.step(asked)[4]["executed"], executed), keys
    typed[:] = ["", "c"]  # during a step: for the next one
    assert np.allclose(env.step(FORWARD)[4]["executed"], [0, 0, 0, 0, 0, 0, 1])
    assert np.allclose(env.step(FORWARD)[4]["executed"], FORWARD)
    typed[:] = ["n"]
    _, reward, success, truncated, info = env.step(FORWARD)
    assert (reward, success, truncated) == (0.0, False, True) and "fault" not in info
    env.begin_episode()
    typed[:] = ["y"]
    _, reward, success, truncated, _ = env.step(FORWARD)
    assert (reward, success, truncated) == (1.0, True, False)
    for keys in ([" "], ["", " "]):  # before the action is sent, and during the step
        env.begin_episode()
        operator.pressed = operator.pending_keys = ""
        typed[:] = keys
        *_, truncated, info = env.step(FORWARD)
        assert (
            truncated
            and "operator stopped" in info["fault"]
            and env.fault.needs_operator
            and not typed
        )
    env.close()


def test_an_episode_can_start_in_the_operator_s_hands(robot_server):
    """c before Enter at the last prompt: no action of the policy is executed. Other keys typed there are dropped."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    env.operator = operator = human()
    operator.keyboard.answers = ["", "yc w"]
    env.reset(seed=0)
    _, _, success, truncated, info = env.step(FORWARD)
    assert np.allclose(info["executed"], [0, 0, 0, 0, 0, 0, 1]) and not success and not truncated
    operator.keyboard.answers = ["c"]
    env.reset(seed=0)
    operator.keyboard.answers = [""]
    env.reset(seed=0)
    assert np.allclose(
        env.step(FORWARD)[4]["executed"], FORWARD
    )  # control does not outlast an episode
    env.close()


def test_space_stops_the_way_home_too(robot_server):
    """The way home is announced, and the space bar ends it; what was being driven goes back to the policy."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    drive(env, np.array([1, 1, -1, 0, 0, 1, 1], np.float32), 12)
    env.begin_episode()
    env.operator = operator = human(["", "", *[""] * 20, " "])
    operator.keyboard.driving = True
    operator.helped = True
    env.episodes = 1
    with pytest.raises(Fault, match="operator stopped") as fault:
        operator.prepare(env, 0)
    said = operator.keyboard.said
    assert fault.value.kind is FaultKind.OPERATOR and len(said) == 1 and "goes home" in said[0]
    assert not operator.keyboard.driving and operator.keyboard.asked == []
    env.hold()
    assert np.linalg.norm(env.state.position - LIMITS.home) > 0.05
    env.close()


def test_a_dry_run_announces_no_motion(robot_server, monkeypatch):
    """Its prompts do not say that the gripper opens and the arm goes home."""
    monkeypatch.setenv("ROBOT_DRY", "1")
    env = panda.make("pick-red-block")
    env.operator = operator = human()
    env.reset(seed=0)
    assert "nothing is sent" in operator.keyboard.asked[0] and "goes home" not in "".join(
        operator.keyboard.asked
    )
    env.close()


def test_the_keys_are_explained_once_and_only_when_they_are_needed():
    """`train` makes an environment to look at before the one that it uses."""
    operator = human()
    robot = types.SimpleNamespace(
        server=types.SimpleNamespace(dry=False), episodes=0, task="pick-can", go_home=lambda: None
    )
    assert operator.keyboard.said == []
    for _ in range(2):
        operator.prepare(robot, 0)
    assert operator.keyboard.said == [Keyboard.HELP]


def test_keys():
    """What is typed is read without waiting; `ask` waits for Enter; closing gives the terminal back as it was."""
    person, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    keys = Keyboard(os.ttyname(terminal))
    assert keys.keys() == ""
    os.write(person, b"wy")
    assert keys.keys() == "wy" and keys.keys() == ""
    threading.Timer(0.2, os.write, (person, b"x\n")).start()
    began = time.monotonic()
    assert keys.ask("Ready?") == "x"
    assert time.monotonic() - began > 0.1 and b"Ready?" in os.read(person, 100)
    keys.close()
    assert termios.tcgetattr(terminal) == before
    assert "terminal" in refused(Keyboard, "/nowhere")
    os.close(person)
    os.close(terminal)


def test_a_terminal_that_is_gone_is_a_fault():
    """Neither reading keys nor waiting for Enter goes on forever when the terminal was closed."""
    person, terminal = pty.openpty()
    keys = Keyboard(os.ttyname(terminal))
    os.close(person)
    for read in (keys.keys, lambda: keys.ask("Ready?")):
        with pytest.raises(Fault, match="terminal is gone") as fault:
            read()
        assert fault.value.kind is FaultKind.FATAL
    keys.close()
    os.close(terminal)


def test_a_spacemouse_that_is_let_go_of(monkeypatch):
    """It reports faster than steps are made: what it said while it was pushed does not move the arm afterwards."""

    def state(y):
        return types.SimpleNamespace(x=0, y=y, z=0, roll=0, pitch=0, yaw=0, buttons=[0, 0])

    reports = []
    device = types.SimpleNamespace(read=lambda: reports.pop(0) if reports else state(0.0))
    monkeypatch.setitem(sys.modules, "pyspacemouse", types.SimpleNamespace(open=lambda: device))
    mouse = SpaceMouse()
    reports += [state(1.0)] * 10_000
    time.sleep(0.2)
    assert np.allclose(mouse.action("", -1.0), [-1, 0, 0, 0, 0, 0, -1])
    reports[:] = [state(1.0)] * 30  # and then zeros
    time.sleep(0.4)
    assert mouse.action("", -1.0) is None
    device.read = lambda: 1 / 0
    time.sleep(0.2)
    with pytest.raises(Fault, match="SpaceMouse"):
        mouse.action("", -1.0)
    device.read = lambda: state(0.0)
    mouse = SpaceMouse()
    mouse.close()
    assert not mouse.thread.is_alive()  # none is inside the driver when the interpreter ends
    monkeypatch.setitem(sys.modules, "pyspacemouse", types.SimpleNamespace(open=lambda: None))
    assert "SpaceMouse" in refused(SpaceMouse)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards and cameras


def test_reward_classifier(tmp_path):
    """Trained from two folders of images it tells them apart; a success takes two confident images in a row, and a
    lifted end effector."""
    rng = np.random.default_rng(0)
    for name, level in (("success", 170), ("failure", 80)):
        (tmp_path / name).mkdir()
        for i in range(20):
            image = np.clip(rng.normal(level, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    path = tmp_path / "reward.safetensors"
    train_classifier(tmp_path, path, steps=60)
    classifier = SuccessClassifier(path)
    good = np.full((32, 32, 3), 170, np.uint8)
    bad = np.full((32, 32, 3), 80, np.uint8)

    def at(height):
        state = parse_state({**calm(), "pose": [0.5, 0, height, 1, 0, 0, 0]})
        return types.SimpleNamespace(state=state, limits=LIMITS)

    looks = ((0.2, bad), (0.2, good), (0.2, good), (0.02, good), (0.2, good))
    assert [classifier.success(at(z), x) for z, x in looks] == [False, False, True, False, False]
    classifier.restart()
    assert not classifier.success(at(0.2), good)
    assert "images" in refused(train_classifier, tmp_path / "none", "x", 1)
    Image.new("RGB", (48, 32)).save(tmp_path / "success/odd.png")
    assert "odd.png" in refused(train_classifier, tmp_path, "x", 1)
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "other.safetensors" in refused(SuccessClassifier, tmp_path / "other.safetensors")
    assert "nothing.safetensors" in refused(
        HumanOperator, RobotConfig(reward="nothing.safetensors")
    )


def test_a_usb_camera_that_freezes(monkeypatch):
    """Frames that repeat to the last pixel do not count as new, so their age grows; cropping keeps the centre."""
    rng = np.random.default_rng(0)
    frozen = []
    released = []

    def grab():
        time.sleep(0.01)
        return frozen[0] if frozen else rng.integers(0, 255, (48, 64, 3), np.uint8)

    monkeypatch.setitem(
        robot.cameras.OPENERS, "stub", lambda name: (grab, lambda: released.append(name))
    )
    camera = UsbCamera("stub", "0")
    time.sleep(0.1)
    image, number, age = camera.read(16, 8)
    assert image.shape == (8, 16, 3) and number > 1 and age < 0.1
    frozen.append(np.zeros((48, 64, 3), np.uint8))
    time.sleep(0.3)
    _, first, age = camera.read(16, 8)
    assert age > 0.15 and camera.read(16, 8)[1] == first
    camera.close()
    assert not camera.thread.is_alive() and released == [
        "0"
    ]  # else the interpreter aborts inside OpenCV
    wide = np.zeros((48, 64, 3), np.uint8)
    wide[8:40] = 200
    assert (crop_and_shrink(wide, 16, 8) == 200).all()


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("signum", [signal.SIGINT, *STOP_SIGNALS])
def test_a_delayed_signal_is_not_lost(signum, capfd):
    """It ends what comes after the block, not the block; whoever sent it is told."""
    done = []
    with pytest.raises((KeyboardInterrupt, SignalExit)) as stop, stop_on_signals():
        with delay_signals("wait for the joint reset"):
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
            done.append("reset")
        done.append("went on")
    assert done == ["reset"]
    assert "wait for the joint reset" in capfd.readouterr().err
    assert signum == signal.SIGINT or stop.value.code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_that_were_ignored_stay_ignored():
    """nohup ignores SIGHUP, so that a closed terminal does not end the program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(), delay_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_a_joint_reset_acts_after_it(robot_server):
    """The joint reset is waited for, then the program ends: no episode follows."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    post = env.server.post
    steps = []

    def slow(route, *rest, **more):
        steps.append(route)
        if route == "jointreset":
            os.kill(os.getpid(), signal.SIGINT)
        return post(route, *rest, **more)

    env.server.post = slow
    with pytest.raises(KeyboardInterrupt):
        env.reset_joints()
    assert steps == ["jointreset"]
    assert np.abs(robot_server.json("getq")["q"] - np.array(LIMITS.reset_q)).max() < 0.05
    env.close()


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGINT]
)
def test_a_signal_holds_the_arm(signum, monkeypatch):
    """A process that is told to end holds the arm first, whichever way it is told."""
    with realtime() as (server, _):
        ahead = []
        aim = server.world.aim

        def aimed(pose):
            ahead.append(np.abs(pose[:3] - server.world.pose()[0]).max())
            aim(pose)

        monkeypatch.setattr(server.world, "aim", aimed)
        code = (
            "from domains import panda\nenv = panda.make('pick-red-block')\nenv.reset(seed=0)\nprint('on', flush=True)"
            "\ntry:\n    while True: env.step([0, 0.5, 0, 0, 0, 0, 1])\nfinally: env.close()"
        )
        process = start("-c", code, ROBOT_URL=server.url)
        assert process.stdout.readline() == "on\n"
        while len(ahead) < 3:
            time.sleep(0.05)
        os.kill(process.pid, signum)
        out, _ = process.communicate(timeout=20)
        assert "ordered to hold" in out and "overruns" in out
        expected = -signal.SIGINT if signum == signal.SIGINT else 128 + signum
        assert process.returncode in (expected, 130 if signum == signal.SIGINT else expected)
        assert (
            min(ahead[:3]) > 0.008 and ahead[-1] < 0.005
        )  # m from the arm to each target: the last is where it is


def test_a_closed_environment_gives_the_signals_back(monkeypatch):
    """A library that drives a robot for a while changes nothing for good."""
    with realtime() as (server, _):
        monkeypatch.setenv("ROBOT_URL", server.url)
        before = [signal.getsignal(s) for s in STOP_SIGNALS]
        env = panda.make("pick-can")
        assert signal.getsignal(signal.SIGTERM) not in before
        env.close()
        assert [signal.getsignal(s) for s in STOP_SIGNALS] == before
