"""The simulated Panda and the real robot's client: protocol, limits, faults, clocks, people. No hardware is needed."""

import contextlib
import dataclasses
import http.client
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

import real_robot
from data import EVAL_SEED, attempts, open_episode
from domains import panda
from evaluate import all_tasks
from real_robot import DOWN, Fault, Limits, Link, Panda, Setup

LIMITS = Limits()
FORWARD = np.array([0.4, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def server():
    """A lock-step server that takes orders for faults, in a process of its own."""
    child = panda.Child()
    yield child.url
    child.process.stdin.close()
    child.process.wait(10)


@contextlib.contextmanager
def serving(server):
    """An HTTP server of this process, while it is needed."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def robot(server, monkeypatch):
    """A robot of its own for each test, at ROBOT_URL; `robot.order(kind, value)` orders a fault."""
    monkeypatch.setenv("ROBOT_URL", server)
    link = Link(server)
    for kind in panda.FAULTS:  # whatever the last test left
        link.post("sim/fault", {"kind": kind, "value": 0})
    link.post("clearerr")
    link.order = lambda kind, value=1: link.post("sim/fault", {"kind": kind, "value": value})
    yield link
    link.close()


def drive(env, action, decisions):
    """Steps until the episode ends: (decisions made, what the last step returned)."""
    for k in range(decisions):
        result = env.step(action)
        if result[2] or result[3]:
            return k + 1, result
    return decisions, result


# ----------------------------------------------------------------------------------------------------------------------
# The domain


def test_the_panda_offers_what_the_stages_use():
    """Three disjoint splits, and for every task an instruction and an environment with the domains' spaces."""
    names = all_tasks(panda)
    assert [len(panda.EXPERT_TASKS), len(panda.RL_TASKS), len(panda.UNSEEN_TASKS)] == [4, 2, 8]
    assert len(set(names)) == 14 and set(names) == set(panda.INSTRUCTIONS)
    assert (panda.PROTOCOL["step"], panda.PROTOCOL["turn"]) == (LIMITS.step, LIMITS.turn)
    env = panda.make("pick-eggplant", 48)
    assert env.observation_space == gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
    picture, info = env.reset(seed=3)
    assert picture in env.observation_space and info == {} and env.render().shape == (480, 480, 3)
    action = panda.expert(env)
    assert action in env.action_space
    picture, reward, terminated, truncated, info = env.step(action)
    assert picture in env.observation_space and (reward, terminated, truncated) == (0.0, False, False)
    assert np.array_equal(info["executed"], action)
    for impossible in (action[1:], action * np.nan, action + np.inf):
        with pytest.raises(ValueError):
            env.step(impossible)
    assert drive(env, 0 * action, 100)[0] == panda.HORIZON - 1
    env.close()
    assert "'pick-leek'" in (said := refused(panda.make, "pick-leek")) and "pick-carrot" in said


def test_a_seed_decides_an_episode_of_the_panda(robot, monkeypatch):
    """The same seed gives the same pictures and path, after other episodes, another task and in another process."""

    def path(env, seed):
        pictures = [env.reset(seed=seed)[0]]
        pictures += [env.step(panda.expert(env) if k < 4 else FORWARD)[0] for k in range(8)]
        return np.stack(pictures), env.place.copy()

    env = panda.make("pick-carrot")
    first, second = path(env, 5), path(env, 6)
    env.close()
    panda.make("pick-can").close()
    for _ in range(2):
        env = panda.make("pick-carrot")
        again = path(env, 5)
        env.close()
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
        assert not np.array_equal(first[0], second[0])
        monkeypatch.delenv("ROBOT_URL", raising=False)  # and with a server of its own


def test_the_expert_picks_up_every_object(robot):
    """One episode an object through HTTP, with the noise that demonstrations get."""
    rng = np.random.default_rng(0)
    for task in all_tasks(panda):
        env, over = panda.make(task), False
        env.reset(seed=100)
        while not over:
            action = panda.expert(env)
            action[:6] += rng.normal(0, 0.2, 6)
            _, _, success, cut, _ = env.step(action.clip(-1, 1))
            over = success or cut
        assert success, task
        env.close()


def test_a_dry_run_sends_no_command(robot, server, monkeypatch, capsys):
    """ROBOT_DRY: pose, gripper and all else that commands is printed, the arm stays where it is, and nothing faults."""
    monkeypatch.setenv("ROBOT_DRY", "1")
    asked = []
    request = http.client.HTTPConnection.request
    monkeypatch.setattr(
        http.client.HTTPConnection, "request", lambda *a, **k: (asked.append(a[2]), request(*a, **k))[1]
    )
    env = Panda(Setup.from_environment(), "pick-carrot", 64, 60)
    env.reset(seed=1)
    place = env.place.copy()
    decisions, (_, _, success, cut, info) = drive(env, FORWARD * [1, 1, 1, 1, 1, 1, -1], 60)
    env.close()
    assert decisions == 60 and cut and not success and "fault" not in info
    assert set(asked) <= {f"/{route}" for route in Link.READS}
    assert np.abs(env.place - place).max() < 1e-3
    assert (said := capsys.readouterr().out).count("/pose") >= 60 and "/close_gripper" in said


# ----------------------------------------------------------------------------------------------------------------------
# What is sent


class Recorder:
    """Stands in for Link: a robot of the wildest states, that keeps every pose it is told."""

    def __init__(self, rng):
        self.rng, self.poses, self.url, self.width = rng, [], "stub", 0.08

    def post(self, route, body=None, timeout=0.25, tries=1):
        if route == "pose":
            json.dumps(body, allow_nan=False)
            self.poses.append((np.array(body["arr"]), self.pose))
        self.width = {"open_gripper": 0.08, "close_gripper": 0.0}.get(route, self.width)

    def json(self, route, body=None, timeout=0.25, tries=2):
        rng, low, high = self.rng, np.array(LIMITS.low), np.array(LIMITS.high)
        place = rng.uniform(low - 0.029, high + 0.029)  # as far out as is not a fault yet
        tilt = rng.uniform(0, LIMITS.tilt + 0.2) * Rotation.from_rotvec([0, 0, rng.uniform(-4, 4)]).apply([1, 0, 0])
        yaw = rng.uniform(-LIMITS.yaw - 0.2, LIMITS.yaw + 0.2)
        turn = Rotation.from_rotvec(tilt) * Rotation.from_rotvec([0, 0, yaw]) * DOWN
        self.pose = np.array([*place, *(turn.as_quat() * rng.choice([-1, 1]))])
        q = (np.array(LIMITS.q_min) + LIMITS.q_max) / 2
        zero = {"vel": [0] * 6, "force": [0] * 3, "torque": [0] * 3, "dq": [0] * 7}
        return {"pose": [*self.pose], "q": [*q], "gripper_pos": self.width, **zero}

    def close(self):
        pass


class NoCamera:
    def read(self, width, height):
        return np.zeros((height, width, 3), np.uint8), 0, 0.0

    def close(self):
        pass


class NoScene:
    typed = ""

    def prepare(self, robot, seed):
        pass

    def success(self, robot, picture):
        return False


def unlinked(link, **changes):
    """A Panda whose link, cameras and operator are stand-ins."""
    env = Panda.__new__(Panda)
    env.setup, env.task, env.image_size, env.horizon, env.limits = Setup(), "t", 8, 10**9, LIMITS
    env.link, env.cameras, env.scene, env.lockstep = link, [NoCamera()] * 2, NoScene(), True
    env.episodes, env.state = 0, None
    for name, value in changes.items():
        setattr(env, name, value)
    env.begin()
    return env


def test_ten_thousand_hostile_actions():
    """Whatever the policy wants and wherever the arm is found: no pose outside the box or the window of turns, none
    further from the measured pose than a step (but to get back into the box), none that is not finite."""
    rng = np.random.default_rng(0)
    env, link, refusals = unlinked(Recorder(rng)), None, 0
    link = env.link
    env.reset(seed=0)
    for k in range(10_000):
        kind, action = k % 5, rng.uniform(-1, 1, 7)
        if kind == 1:
            action = rng.choice([-1e30, -1, 0, 1, 1e30, 3e38], 7)
        elif kind == 2:
            action[rng.integers(7)] = rng.choice([np.nan, np.inf, -np.inf])
        elif kind == 3:
            action = np.sign(action)
        elif kind == 4:
            action = rng.normal(0, 100, rng.choice([7, 7, 7, 6, 0]))
        try:
            assert "fault" not in env.step(action)[4]
        except ValueError:
            refusals += 1
            pose, measured = link.poses.pop()  # the hold
            assert np.array_equal(pose[:3], measured[:3])
    assert refusals > 2000 and len(link.poses) == 10_000 - refusals
    pose, measured = (np.array(x) for x in zip(*link.poses))
    assert np.isfinite(pose).all() and np.allclose(np.linalg.norm(pose[:, 3:], axis=1), 1)
    assert (pose[:, :3] >= LIMITS.low).all() and (pose[:, :3] <= LIMITS.high).all()
    assert np.abs(pose[:, :3] - measured[:, :3]).max() <= LIMITS.step + 1e-9
    off = (Rotation.from_quat(pose[:, 3:]) * DOWN.inv()).as_rotvec()
    assert np.hypot(off[:, 0], off[:, 1]).max() <= LIMITS.tilt + 1e-6 and np.abs(off[:, 2]).max() <= LIMITS.yaw + 1e-6
    inside = (Rotation.from_quat(measured[:, 3:]) * DOWN.inv()).as_rotvec()
    inside = (np.hypot(inside[:, 0], inside[:, 1]) < LIMITS.tilt) & (np.abs(inside[:, 2]) < LIMITS.yaw)
    turned = (Rotation.from_quat(pose[:, 3:]) * Rotation.from_quat(measured[:, 3:]).inv()).magnitude()
    assert turned[inside].max() <= np.sqrt(3) * LIMITS.turn + 0.1


def test_small_actions_pass_unclipped():
    """Well inside the limits the commanded pose is the measured one, moved and turned as the action says."""
    place, turn = np.array([0.5, 0.0, 0.15]), Rotation.from_rotvec([0, 0, 0.2]) * DOWN
    target, turned = LIMITS.aim(np.array([0.5, -1, 0.2, 0.1, 0, 0.4, 1]), place, turn)
    assert np.allclose(target - place, [0.02, -0.04, 0.008])
    assert np.allclose((turned * turn.inv()).as_rotvec(), [0.025, 0, 0.1], atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Faults

FAULTS = {  # kind: (value, what the sentence says, does it need a person)
    "reflex": (1, "does not follow its commands", True),
    "user_stop": (1, "does not follow its commands", True),
    "frozen_state": (1, "does not follow its commands (and its state never changes", True),
    "stuck_gripper": (1, "gripper was told to close", True),
    "error": (2, "500", False),
    "drop": (2, "link", False),
    "nan": (1, "not finite", False),
    "frozen_camera": (1, "camera's newest picture", False),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_stops_the_arm_and_marks_the_episode(robot, kind):
    """The arm is told to hold where it is, the episode ends truncated and marked, with one sentence; and when the cause
    is removed, the next process goes on."""
    value, says, person = FAULTS[kind]
    env = panda.make("pick-red-block")
    env.reset(seed=1)
    drive(env, FORWARD, 3)
    robot.order(kind, value)
    action = FORWARD.copy()
    if kind == "stuck_gripper":
        action[:] = [0, 0, 0, 0, 0, 0, -1]
    decisions, (picture, reward, terminated, truncated, info) = drive(env, action, 20)
    assert decisions < 15 and (reward, terminated, truncated) == (0.0, False, True)
    assert says in info["fault"] and "told to hold" in info["fault"] and "\n" not in info["fault"]
    assert picture in env.observation_space and env.fault.person == person
    seen = robot.json("sim/look")
    if kind != "frozen_state":  # then nobody can know where it is
        assert np.abs(np.array(seen["target"]) - robot.json("getpos")["pose"][:3]).max() < 0.005
    if person:
        assert says in refused(env.reset)  # nobody is there to ask, and nothing is cleared
        assert robot.json("sim/look")["seconds"] == seen["seconds"]
    env.close()

    robot.order(kind, 0)  # a person sees to the robot
    if kind in ("reflex", "user_stop"):
        robot.post("clearerr")
    env = panda.make("pick-red-block")
    env.reset(seed=1)
    over = False
    while not over:
        _, _, success, cut, info = env.step(panda.expert(env))
        over = success or cut
    assert success and "fault" not in info
    env.close()


def test_errors_are_not_cleared_after_a_user_stop(robot):
    """Neither step nor reset ever sends /clearerr by itself; after a person's word, hold comes before and after it."""
    env, sent = panda.make("pick-red-block"), []
    env.reset(seed=1)
    post = env.link.post
    env.link.post = lambda route, *rest, **more: (sent.append(route), post(route, *rest, **more))[1]
    robot.order("user_stop")
    drive(env, FORWARD, 20)
    refused(env.reset)
    assert "clearerr" not in sent and sent[-1] != "jointreset"

    asked = []
    env.scene = type("Person", (real_robot.Person,), {"__init__": lambda self: None, "prepare": lambda *_: None})()
    env.scene.keyboard = type("Keys", (), {"ask": lambda self, sentence: asked.append(sentence)})()
    robot.order("user_stop", 0)
    sent.clear()
    robot.order("nan")  # the pose cannot be measured: the last one may be far from where the arm is by now
    with pytest.raises(Fault, match="errors were not cleared") as fault:
        env.release()
    assert fault.value.person and set(sent) == {"getstate"}
    robot.order("nan", 0)
    sent.clear()
    env.release()
    assert asked and "does not follow" in asked[0]
    assert [route for route in sent if route != "getstate"] == ["pose", "clearerr", "pose"]
    env.scene = NoScene()
    env.close()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"pose": [0.2, 0, 0.2, 1, 0, 0, 0]}, "outside its box"),
        ({"pose": [0.5, 0, 0.2, 0.92, 0, 0.39, 0]}, "turned out"),
        ({"pose": [0.5, 0, 0.2, 0.5, 0, 0, 0]}, "length 1"),
        ({"pose": [0.5, 0, 0.2]}, "shape"),
        ({"q": [0, 0, 0, -3.05, 0, 2, 0]}, "joint 4 is 0.02 rad from its limit"),
        ({"force": [0, 0, 55]}, "55 N"),
        ({"vel": [0, 0, -0.9, 0, 0, 0]}, "0.90 m/s"),
        ({"dq": [0] * 6 + [float("nan")]}, "not finite"),
        ({"gripper_pos": None}, "not what SERL's is"),
    ],
)
def test_a_state_beyond_the_limits_is_a_fault(change, says):
    """Whatever is measured beyond its limit ends the episode with a sentence that names it, and holds the arm."""
    link = Recorder(np.random.default_rng(0))
    good = {**link.json("getstate"), "pose": [0.5, 0, 0.2, 1, 0, 0, 0]}
    link.pose = np.array(good["pose"])
    env, answers = unlinked(link), [good, good, {**good, **change}, good]
    link.json = lambda *_, **__: answers.pop(0) if answers else good
    env.reset(seed=0)
    env.step(0 * FORWARD)
    *_, truncated, info = env.step(0 * FORWARD)
    assert truncated and says in info["fault"] and "told to hold" in info["fault"]
    assert np.array_equal(link.poses[-1][0][:3], good["pose"][:3])


def test_an_arm_astray_waits_for_a_person_but_not_in_simulation(robot):
    """Near a joint's limit the episode ends; the simulation's reset puts the arm back, a real one needs somebody."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    limits, env.limits = env.limits, dataclasses.replace(env.limits, q_margin=3.0)
    *_, truncated, info = env.step(0 * FORWARD)
    assert truncated and "from its limit" in info["fault"]
    env.limits = limits
    env.reset(seed=1)
    assert "fault" not in env.step(0 * FORWARD)[4]
    env.fault, scene, env.scene = Fault("joint 7 is near", astray=True), env.scene, NoScene()
    with pytest.raises(real_robot.Refusal, match="see to the robot"):
        env.reset(seed=2)
    env.scene = scene
    env.close()


def test_a_joint_reset_that_lies(robot):
    """/jointreset answers the same whether the arm moved or not: only q tells."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    robot.order("reset_lies")
    with pytest.raises(Fault, match="a joint is 0.* rad from its target"):
        env.reset_joints()
    env.begin()
    env.reset_joints()  # the second one does what it says
    assert np.abs(env.state["q"] - LIMITS.reset_q).max() < 0.05
    env.close()


def test_the_hand_goes_home(robot):
    """As on a real robot: gripper open, up, to the start, every target inside the limits."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    drive(env, np.array([1, 1, -1, 0, 0, 1, -1], np.float32), 12)
    env.begin()
    env.go_home()
    assert np.linalg.norm(env.place - LIMITS.home) < 0.015 and (env.turn * DOWN.inv()).magnitude() < 0.1
    assert env.opening > 0.9
    env.close()


def test_collecting_survives_faults_and_restarts(robot, tmp_path, monkeypatch):
    """`collect` keeps whole successes only: a faulted episode leaves no file, a refusal loses nothing, and the same
    command goes on to the number asked for."""
    made = []
    monkeypatch.setattr(panda, "make", lambda *args, make=panda.make: made.append(make(*args)) or made[-1])

    class Expert:
        config = {"image_size": 64}
        load = classmethod(lambda cls, *_: cls())
        encode = lambda self, images, instructions: (torch.zeros(1, 1, 1), torch.ones(1, 1))  # noqa: E731

        def act(self, h, mask):
            if made[-1].decisions == 5 and faults:
                robot.order(faults.pop(0))
            return torch.from_numpy(panda.expert(made[-1]))[None]

    monkeypatch.setattr(real_robot, "VLA", Expert)
    collect = lambda: real_robot.collect("none", "pick-carrot", str(tmp_path), successes=3, std=0.1)  # noqa: E731
    faults = ["nan", "user_stop"]  # the first is over by itself, the second waits for a person
    assert "does not follow" in refused(collect)
    assert attempts(tmp_path) == []
    robot.order("user_stop", 0)
    robot.post("clearerr")
    faults = [None]
    monkeypatch.setattr(robot, "order", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))  # Ctrl-C within an episode
    with pytest.raises(KeyboardInterrupt):
        collect()
    collect()
    assert len(attempts(tmp_path)) == 3
    for path in tmp_path.iterdir():
        handle, header = open_episode(path)
        assert (header["domain"], header["task"], header["success"]) == ("panda", "pick-carrot", "1")
        assert handle.get_slice("image").get_shape()[1:] == [64, 64, 3] and handle.get_tensor("reward")[-1] == 1
        action = handle.get_tensor("action")
        assert action.shape[1] == 7 and 0 < (np.abs(action[:, 6]) < 0.999).mean() < 1  # explored, and executed so
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir())
    collect()
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir()) == before

    out, rows = tmp_path / "outcomes.json", lambda: json.loads(out.read_text())["outcomes"]
    real_robot.evaluate("none", "pick-carrot", 1, str(out))
    (first,) = rows()
    real_robot.evaluate("none", "pick-carrot", 2, str(out))  # goes on
    assert rows()[0] == first and [row["seed"] for row in rows()] == [EVAL_SEED, EVAL_SEED + 1]
    assert "outcomes.json" in refused(real_robot.evaluate, "none", "pick-can", 1, str(out))
    assert "0 of the 20" in refused(real_robot.train, "none", "pick-can", str(tmp_path / "1-rl"))


# ----------------------------------------------------------------------------------------------------------------------
# HTTP


def ask(url, route, body=None, method="POST", kind="application/json"):
    """(status, content type, content) of a request, by another client than the one that is tested."""
    connection = http.client.HTTPConnection(url.split("/")[2])
    connection.request(method, f"/{route}", body, {"Content-Type": kind} if body is not None else {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers["Content-Type"], content


def test_the_simulated_server_speaks_serl_s_protocol(robot):
    """Methods, bodies, codes and units of upstream's server."""
    url = robot.url
    status, kind, content = ask(url, "getstate")
    state = json.loads(content)
    assert status == 200 and kind == "application/json"
    assert set(state) == {"pose", "vel", "force", "torque", "q", "dq", "jacobian", "gripper_pos"}
    assert np.shape(state["jacobian"]) == (6, 7) and len(state["pose"]) == 7
    assert np.allclose(state["vel"], np.array(state["jacobian"]) @ state["dq"])
    alone = {"getpos": "pose", "getvel": "vel", "getforce": "force", "gettorque": "torque", "getq": "q", "getdq": "dq"}
    for route, key in {**alone, "getjacobian": "jacobian", "get_gripper": "gripper"}.items():
        assert list(json.loads(ask(url, route)[2])) == [key]
    pose, euler = (json.loads(ask(url, route)[2])["pose"] for route in ("getpos", "getpos_euler"))
    assert (Rotation.from_euler("xyz", euler[3:]) * Rotation.from_quat(pose[3:]).inv()).magnitude() < 1e-4
    for route, text in {
        "clearerr": b"Clear", "open_gripper": b"Opened", "close_gripper": b"Closed", "activate_gripper": b"Activated",
        "stopimp": b"Stopped impedance", "startimp": b"Started impedance",
    }.items():  # fmt: skip
        assert ask(url, route)[::2] == (200, text)
    good = json.dumps({"arr": pose})
    assert ask(url, "pose", good)[::2] == (200, b"Moved")
    assert ask(url, "update_param", '{"translational_Ki": 1e9}')[::2] == (200, b"Updated compliance parameters")
    assert ask(url, "move_gripper", '{"gripper_pos": 300}')[::2] == (200, b"Moved Gripper")
    for expected, arguments in {
        405: ("getstate", None, "GET"), 404: ("nothing",), 415: ("pose", good, "POST", "text/plain"),
        400: ("pose", '{"arr": ['), 500: ("pose", '{"arr": [1, 2, 3]}'),
    }.items():  # fmt: skip
        status, kind, content = ask(url, *arguments)
        assert status == expected and kind.startswith("text/html") and b"<title>" in content
    assert ask(url, "pose", '{"array": []}')[0] == ask(url, "update_param", '{"stiffness": 1}')[0] == 500
    bad = json.dumps({"arr": [float("nan")] * 7})  # passes Flask, kills libfranka's controller
    assert ask(url, "pose", bad)[0] == 200 and ask(url, "clearerr")[0] == 200


@pytest.mark.parametrize("gripper, opened, shut", [("serl", 0.08, 0.0), ("hil-serl", 1, 0), ("robotiq", 0, 255)])
def test_both_gripper_conventions(gripper, opened, shut):
    """The three numbers that gripper_pos may be come out as 1 open and 0 closed; `check` tells which it can be."""
    world = panda.World(gripper)
    said = []
    for world.width in (0.08, 0.0):
        world.advance(1.0)
        said.append(world.state()["gripper_pos"])
    assert said == pytest.approx([opened, shut], abs=0.02 * max(opened, shut))
    assert [real_robot.OPENING[gripper](number) for number in said] == pytest.approx([1, 0], abs=0.02)
    assert gripper in real_robot.convention(said[0])


def test_the_arm_follows_as_serl_s_does():
    """A target is taken up with a time constant of 0.2 s, no faster than stiffness times clip over damping."""
    world = panda.World()
    world.reset("pick-can", 0)
    start, quat = world.pose()
    world.aim([*(start + [0, 0.02, 0]), *np.roll(quat, -1)])
    left = []
    for _ in range(6):
        world.advance(0.1)
        left.append(0.02 - (world.pose()[0] - start)[1])
    assert left == pytest.approx([0.017, 0.011, 0.006, 0.0028, 0.0014, 0.0008], abs=0.002)  # measured at 1 kHz before
    world.aim([*(world.pose()[0] + [0, 0.5, 0]), *np.roll(quat, -1)])
    world.advance(0.5)
    assert 0.15 < world.data.qvel[:7] @ world.measure()[1] < 2000 * 0.01 / 89 + 0.01


class Upstream(BaseHTTPRequestHandler):
    """Answers as SERL's Flask server does where the simulated one never would: HTTP/1.0, one request a connection."""

    script = {}  # route: (code, content type, content, seconds)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        missing = (404, "text/html", b"<!doctype html><title>404 Not Found</title>", 0)
        code, kind, content, seconds = self.script.get(self.path[1:], missing)
        time.sleep(seconds)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_what_only_a_real_server_says():
    """HTML where JSON belongs, bare strings, 405, a Jacobian that is missing, a hung server, and a slow joint reset."""
    state = json.dumps({key: [0.0] * n for key, n in real_robot.SHAPES.items()} | {"gripper_pos": [0.04]})
    page, html = "text/html", b"<!doctype html>\n<title>500 Internal Server Error</title>"
    handler = type("H", (Upstream,), {"script": {
        "getstate": (500, page, html, 0), "getq": (200, page, b"Moved", 0), "getpos": (405, page, html, 0),
        "getvel": (200, "application/json", state.encode(), 0), "pose": (200, page, b"Moved", 0),
        "getdq": (200, "application/json", state.encode(), 1.0), "jointreset": (200, page, b"Reset Joint", 1.0),
    }})  # fmt: skip
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        link = Link(url)
        for route, says in (("getstate", "500"), ("getpos", "405"), ("getq", "not JSON: b'Moved'"), ("nothing", "404")):
            with pytest.raises(Fault, match=says) as fault:
                link.json(route)
            assert "<" not in str(fault.value) and "\n" not in str(fault.value)
        assert link.post("pose", {"arr": [0] * 7})[0] == b"Moved"
        with pytest.raises(ValueError):  # NaN never leaves this side
            link.post("pose", {"arr": [float("nan")] * 7})
        with pytest.raises(Fault, match="length 1"):  # a gripper_pos in a list is read
            real_robot.parse(link.json("getvel"))
        began = time.monotonic()
        with pytest.raises(Fault, match="lost"):
            link.json("getdq")
        assert time.monotonic() - began < 0.8
        assert link.post("jointreset", timeout=LIMITS.slow)[0] == b"Reset Joint"  # slow, and not given up
        assert LIMITS.slow >= 60
        assert "ROBOT_FRONT" in refused(
            Panda, Setup(url=url), "t"
        )  # a real robot has no cameras and no judge of its own
    with pytest.raises(Fault, match="lost"):
        link.json("getvel")
    assert url in (said := refused(Panda, Setup(url=url), "t")) and "ROBOT_URL" in said


def test_one_robot_has_one_driver(robot, monkeypatch):
    """A second environment on the same robot is refused, by whatever name, until the first is closed."""
    env = panda.make("pick-can")
    assert "another process drives" in refused(panda.make, "pick-can")
    monkeypatch.setenv("ROBOT_URL", env.setup.url.replace("127.0.0.1", "localhost").rstrip("/"))
    assert "another process drives" in refused(panda.make, "pick-can")
    env.close()
    panda.make("pick-can").close()


# ----------------------------------------------------------------------------------------------------------------------
# Real time


def test_ten_hertz(monkeypatch):
    """Delays within a period do not add up; a late decision is counted, and the periods after it are whole again."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(real_robot, "time", clock)
    env = Panda.__new__(Panda)
    env.lockstep, env.overruns, env.periods, env.tick, env.woke = False, 0, [], 0.0, 0.0
    for k in range(20):
        clock.now += 0.16 if k == 10 else 0.02 + 0.03 * (k % 3)  # the policy
        env.wait()
    assert np.allclose(env.periods, [0.16 if k == 10 else 0.1 for k in range(20)]) and env.overruns == 1


def test_hang_and_lost_link(monkeypatch):
    """In real time: a server that hangs is given up in time, and the arm is held as soon as it answers again."""
    server = panda.Server(port=0, clock="realtime", faults=True)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    monkeypatch.setenv("ROBOT_URL", server.url)
    env = panda.make("pick-blue-block", 64)
    env.reset(seed=0)
    began = time.monotonic()
    for k in range(10):
        time.sleep(0.16 if k == 5 else 0.02)  # the policy
        env.step(0 * FORWARD)
    assert time.monotonic() - began > 0.95 and len(env.periods) == 10 and env.overruns >= 1
    order = Link(server.url)
    order.post("sim/fault", {"kind": "hang", "value": 0.8})
    began = time.monotonic()
    *_, truncated, info = env.step(0 * FORWARD)
    assert truncated and "lost" in info["fault"] and "was told to hold" in info["fault"]
    assert time.monotonic() - began < 1.5
    env.reset(seed=0)
    server.stop()
    thread.join(10)
    assert not thread.is_alive()
    *_, truncated, info = env.step(0 * FORWARD)
    assert truncated and "lost" in info["fault"] and "could not be told to hold" in info["fault"]
    assert "lost" in refused(env.reset)
    env.close()
    order.close()


# ----------------------------------------------------------------------------------------------------------------------
# People, cameras, rewards, check


def test_a_person_takes_over_and_that_is_stored(robot):
    """The person's action is what is executed and what info["executed"], hence the file, says; space stops the arm."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    keys = real_robot.Keyboard.__new__(real_robot.Keyboard)
    keys.driving, keys.gripper, keys.close = False, 1.0, lambda: None
    person = real_robot.Person.__new__(real_robot.Person)
    person.keyboard = person.driver = keys
    env.scene, pressed = person, []
    keys.keys = lambda: pressed.pop() if pressed else ""  # what is read is read once
    close, held = np.array([0, 0, 0, 0, 0, 0, -1], np.float32), [0, 0, 0, 0, 0, 0, -1]
    for typed, asked, executed in (
        ("", FORWARD, FORWARD),
        ("c", FORWARD, [0, 0, 0, 0, 0, 0, 1]),
        ("aw", FORWARD, [0.5, 0.5, 0, 0, 0, 0, 1]),
        ("kf", FORWARD, [0, 0, -0.5, 0, 0, 0, -1]),
        ("c", FORWARD, FORWARD),
        *[("", close, close)] * 6,
        ("c", FORWARD, held),
        ("r", FORWARD, [0, 0, 0.5, 0, 0, 0, -1]),
        ("o", FORWARD, [0, 0, 0, 0, 0, 0, 1]),
    ):  # fmt: skip  taking over opens nothing that is closed
        pressed.append(typed)
        assert np.allclose(env.step(asked)[4]["executed"], executed), typed
    pressed += ["c", ""]  # while a decision goes on: for the next one
    assert np.allclose(env.step(FORWARD)[4]["executed"], [0, 0, 0, 0, 0, 0, 1])
    assert np.allclose(env.step(FORWARD)[4]["executed"], FORWARD)
    pressed.append("y")
    _, reward, success, truncated, _ = env.step(FORWARD)
    assert (reward, success, truncated) == (1.0, True, False)
    for typed in ([" "], [" ", ""]):  # before the decision is sent, and while it goes on
        env.begin()
        person.typed = person.late = ""
        pressed += typed
        *_, truncated, info = env.step(FORWARD)
        assert truncated and "operator stopped" in info["fault"] and env.fault.person and not pressed
    env.close()


def test_a_spacemouse_that_is_let_go_of(monkeypatch):
    """It reports faster than decisions are made: what it said while it was pushed does not move the arm afterwards."""
    state = lambda y: types.SimpleNamespace(x=0, y=y, z=0, roll=0, pitch=0, yaw=0, buttons=[0, 0])  # noqa: E731
    reports = []
    device = types.SimpleNamespace(read=lambda: reports.pop(0) if reports else state(0.0))
    monkeypatch.setitem(sys.modules, "pyspacemouse", types.SimpleNamespace(open=lambda: device))
    mouse = real_robot.SpaceMouse()
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
    monkeypatch.setitem(sys.modules, "pyspacemouse", types.SimpleNamespace(open=lambda: None))
    assert "SpaceMouse" in refused(real_robot.SpaceMouse)


def test_space_stops_the_way_home_too(robot):
    """The way home is announced, and the space bar ends it; what was being driven is given back to the policy."""
    env, said, typed = panda.make("pick-red-block"), [], iter(["", "", *[""] * 20, " "])
    env.reset(seed=0)
    drive(env, np.array([1, 1, -1, 0, 0, 1, 1], np.float32), 12)
    env.begin()
    person = real_robot.Person.__new__(real_robot.Person)
    keys = {"ask": said.append, "say": said.append, "keys": lambda: next(typed), "driving": True, "close": lambda: None}
    person.keyboard = person.driver = type(
        "Keys", (), {k: staticmethod(v) if callable(v) else v for k, v in keys.items()}
    )
    env.scene, env.episodes = person, 1
    with pytest.raises(Fault, match="operator stopped") as fault:
        person.prepare(env, 0)
    assert fault.value.person and len(said) == 1 and "goes home" in said[0] and not person.driver.driving
    env.hold()
    assert np.linalg.norm(env.place - LIMITS.home) > 0.05
    env.close()


def test_sigterm_holds_the_arm(monkeypatch):
    """A process that is told to end, as training ends its robot's, holds the arm first."""
    server, ahead, aim = panda.Server(port=0, clock="realtime"), [], panda.World.aim

    def aimed(world, pose):
        ahead.append(np.abs(pose[:3] - world.pose()[0]).max())
        aim(world, pose)

    monkeypatch.setattr(panda.World, "aim", aimed)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    code = (
        "from domains import panda; env = panda.make('pick-red-block'); env.reset(seed=0); print('on', flush=True)\n"
        "try:\n    while True: env.step([0, 0.5, 0, 0, 0, 0, 1])\nfinally: env.close()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "ROBOT_URL": server.url}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "on\n"
    while len(ahead) < 3:
        time.sleep(0.05)
    process.terminate()
    assert "overruns" in process.communicate(timeout=20)[0] and process.returncode == 1
    assert min(ahead[:3]) > 0.008 and ahead[-1] < 0.005  # m from the hand to each target: the last is where it is
    server.stop()
    thread.join(10)


def test_a_robot_that_is_described_is_named(monkeypatch):
    """Without ROBOT_URL nothing else about a robot may be set, for it would be simulated; values are checked."""
    some = "http://127.0.0.1:1/"
    for url in ("127.0.0.1:5000", "localhost:5000", "http://127.0.0.1:5000x", "http://"):
        monkeypatch.setenv("ROBOT_URL", url)
        assert "no address" in refused(panda.make, "pick-can")
    for url, name, value, says in (
        ("", "FRONT", "opencv:0", "ROBOT_URL is not"), (some, "GRIPPER", "sreal", "hil-serl"),
        (some, "TAKEOVER", "key", "spacemouse"), (some, "TAKEOVER", "keys", "ROBOT_REWARD"),
    ):  # fmt: skip
        with monkeypatch.context() as one:
            one.setenv("ROBOT_URL", url)
            one.setenv(f"ROBOT_{name}", value)
            assert says in refused(panda.make, "pick-can")


def test_keys():
    """What is typed is read without waiting; `ask` waits for Enter; closing gives the terminal back as it was."""
    person, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    keys = real_robot.Keyboard(os.ttyname(terminal))
    assert b"space: stop" in os.read(person, 1000) and keys.keys() == ""
    os.write(person, b"wy")
    assert keys.keys() == "wy" and keys.keys() == ""
    threading.Timer(0.2, os.write, (person, b"x\n")).start()
    began = time.monotonic()
    keys.ask("Ready?")
    assert time.monotonic() - began > 0.1 and b"Ready?" in os.read(person, 100)
    keys.close()
    assert termios.tcgetattr(terminal) == before
    assert "terminal" in refused(real_robot.Keyboard, "/nowhere")
    os.close(person), os.close(terminal)


def test_reward_classifier(tmp_path):
    """Trained from two folders of pictures it tells them apart; a reward takes two sure pictures running and a lifted
    hand."""
    rng = np.random.default_rng(0)
    for name, level in (("success", 170), ("failure", 80)):
        (tmp_path / name).mkdir()
        for i in range(20):
            picture = np.clip(rng.normal(level, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    real_robot.classifier(str(tmp_path), str(tmp_path / "reward.safetensors"), steps=60)
    judge = real_robot.Classifier(tmp_path / "reward.safetensors")
    good, bad = np.full((32, 32, 3), 170, np.uint8), np.full((32, 32, 3), 80, np.uint8)
    at = lambda height: type("R", (), {"place": [0.5, 0, height], "limits": LIMITS})  # noqa: E731
    verdicts = [judge.success(at(z), x) for z, x in ((0.2, bad), (0.2, good), (0.2, good), (0.02, good), (0.2, good))]
    assert verdicts == [False, False, True, False, False]
    assert "pictures" in refused(real_robot.classifier, str(tmp_path / "none"), "x")
    Image.new("RGB", (48, 32)).save(tmp_path / "success/odd.png")
    assert "odd.png" in refused(real_robot.classifier, str(tmp_path), "x")
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "other.safetensors" in refused(real_robot.Classifier, tmp_path / "other.safetensors")


def test_a_usb_camera_that_freezes(monkeypatch):
    """Pictures that repeat to the last pixel do not count as new, so their age grows; cropping keeps the middle."""
    rng, frozen = np.random.default_rng(0), []

    def grab():
        time.sleep(0.01)
        return frozen[0] if frozen else rng.integers(0, 255, (48, 64, 3), np.uint8)

    monkeypatch.setattr(real_robot.Camera, "open_stub", lambda self, name: (grab, lambda: None), raising=False)
    camera = real_robot.Camera("stub", "0")
    time.sleep(0.1)
    image, number, age = camera.read(16, 8)
    assert image.shape == (8, 16, 3) and number > 1 and age < 0.1
    frozen.append(np.zeros((48, 64, 3), np.uint8))
    time.sleep(0.3)
    _, first, age = camera.read(16, 8)
    assert age > 0.15 and camera.read(16, 8)[1] == first
    camera.close()
    wide = np.zeros((48, 64, 3), np.uint8)
    wide[8:40] = 200
    assert (real_robot.shrink(wide, 16, 8) == 200).all()


def test_check_moves_nothing(robot, capsys, monkeypatch):
    """`check` reads, prints and ends; with something wrong it says what, in a sentence."""
    Link(robot.url).post("sim/reset", {"task": "pick-can", "seed": 0}, 10)
    before = robot.json("sim/look")
    real_robot.check()
    assert "Nothing was moved" in capsys.readouterr().out and robot.json("sim/look") == before
    monkeypatch.setenv("ROBOT_GRIPPER", "hil-serl")
    robot.post("close_gripper")
    robot.order("frozen_camera")
    assert "frozen" in refused(real_robot.check)
    robot.order("frozen_camera", 0)
    robot.order("nan")
    assert "not finite" in refused(real_robot.check)
    monkeypatch.setenv("ROBOT_FRONT", "webcam:0")
    assert "webcam:0" in refused(real_robot.check)
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)  # not installed
    monkeypatch.setenv("ROBOT_FRONT", "realsense:123")
    assert "pyrealsense2" in refused(real_robot.check)
