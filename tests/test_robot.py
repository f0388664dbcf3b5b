"""The robot's client: limits, faults, joint resets, the link, the schedule. No hardware is needed."""

import dataclasses
import http.client
import json
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from robots import (
    CLOSE,
    FORWARD,
    LIMITS,
    ROOT,
    NoOperator,
    Recorder,
    calm,
    drive,
    human,
    realtime,
    refused,
    serving,
    unlinked,
    upstream,
)
from scipy.spatial.transform import Rotation

import robot.clock
from domains import panda
from robot.clock import RealTimeClock
from robot.env import Hold, PandaEnv
from robot.limits import CHECKS, DOWN, JOINT_LIMITS, Fault, FaultKind, Limits, Tracking, check_state
from robot.server import RobotConfig, RobotServer, parse_state, possible_grippers

# ----------------------------------------------------------------------------------------------------------------------
# What is sent


def test_ten_thousand_hostile_actions():
    """Whatever the policy wants and wherever the arm is found: no pose outside the box or the window of rotations, none
    further from the measured pose than a step (but to get back into the box), none that is not finite."""
    rng = np.random.default_rng(0)
    env = unlinked(Recorder(rng))
    server = env.server
    refusals = 0
    env.reset(seed=0)
    for k in range(10_000):
        kind = k % 5
        action = rng.uniform(-1, 1, 7)
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
            pose, measured = server.poses.pop()  # the hold
            assert np.array_equal(pose[:3], measured[:3])
    assert refusals > 2000 and len(server.poses) == 10_000 - refusals
    pose, measured = (np.array(x) for x in zip(*server.poses))
    assert np.isfinite(pose).all() and np.allclose(np.linalg.norm(pose[:, 3:], axis=1), 1)
    assert (pose[:, :3] >= LIMITS.low).all() and (pose[:, :3] <= LIMITS.high).all()
    assert np.abs(pose[:, :3] - measured[:, :3]).max() <= LIMITS.step + 1e-9
    off = (Rotation.from_quat(pose[:, 3:]) * DOWN.inv()).as_rotvec()
    assert (
        np.hypot(off[:, 0], off[:, 1]).max() <= LIMITS.tilt + 1e-6
        and np.abs(off[:, 2]).max() <= LIMITS.yaw + 1e-6
    )
    inside = (Rotation.from_quat(measured[:, 3:]) * DOWN.inv()).as_rotvec()
    inside = (np.hypot(inside[:, 0], inside[:, 1]) < LIMITS.tilt) & (
        np.abs(inside[:, 2]) < LIMITS.yaw
    )
    turned = (
        Rotation.from_quat(pose[:, 3:]) * Rotation.from_quat(measured[:, 3:]).inv()
    ).magnitude()
    assert turned[inside].max() <= np.sqrt(3) * LIMITS.rotation_step + 0.1


def test_small_actions_pass_unclipped():
    """Well inside the limits the commanded pose is the measured one, moved and rotated as the action says."""
    position = np.array([0.5, 0.0, 0.15])
    rotation = Rotation.from_rotvec([0, 0, 0.2]) * DOWN
    target, target_rotation = LIMITS.aim(
        np.array([0.5, -1, 0.2, 0.1, 0, 0.4, 1]), position, rotation
    )
    assert np.allclose(target - position, [0.02, -0.04, 0.008])
    assert np.allclose((target_rotation * rotation.inv()).as_rotvec(), [0.025, 0, 0.1], atol=1e-3)


def test_a_dry_run_sends_no_command(robot_server, monkeypatch, capsys):
    """ROBOT_DRY: every command is printed so that it can be read, the arm stays where it is, and nothing faults."""
    monkeypatch.setenv("ROBOT_DRY", "1")
    asked = []
    request = http.client.HTTPConnection.request
    monkeypatch.setattr(
        http.client.HTTPConnection,
        "request",
        lambda *a, **k: (asked.append(a[2]), request(*a, **k))[1],
    )
    env = PandaEnv(RobotConfig.from_environment(), "pick-carrot", 64, 60)
    env.reset(seed=1)
    position = env.state.position.copy()
    steps, (_, _, success, truncated, info) = drive(env, FORWARD * [1, 1, 1, 1, 1, 1, -1], 60)
    assert env.hold() is Hold.DRY
    env.close()
    assert steps == 60 and truncated and not success and "fault" not in info
    assert set(asked) <= {f"/{route}" for route in RobotServer.READS}
    assert np.abs(env.state.position - position).max() < 1e-3
    printed = capsys.readouterr().out
    assert printed.count("/pose") >= 60 and "/close_gripper" in printed
    poses = [
        json.loads(line.split("/pose ")[1])["arr"]
        for line in printed.splitlines()
        if "/pose" in line
    ]
    assert all(len(pose) == 7 and len(str(x)) < 8 for pose in poses for x in pose)
    for off in ("0", "no", "false", ""):
        monkeypatch.setenv("ROBOT_DRY", off)
        assert not RobotConfig.from_environment().is_dry


# ----------------------------------------------------------------------------------------------------------------------
# The table of safety checks


FAR = (np.array([0.6, 0, 0.2]), DOWN)
ROWS = {  # check: (change of the state, change of the tracking, words of the message)
    "position": ({"pose": [0.2, 0, 0.2, 1, 0, 0, 0]}, {}, "0.180 m outside its box"),
    "rotation": ({"pose": [0.5, 0, 0.2, 0.92, 0, 0.39, 0]}, {}, "rotated out"),
    "joints": ({"q": [0, 0, 0, -3.05, 0, 2, 0]}, {}, "joint 4 is 0.02 rad from its limit"),
    "force": ({"force": [0, 0, 55]}, {}, "55 N"),
    "speed": ({"vel": [0, 0, -0.9, 0, 0, 0]}, {}, "0.90 m/s"),
    "gripper number": ({"gripper_pos": 12}, {}, "ROBOT_GRIPPER"),
    "arm follows": (
        {},
        {"target": FAR, "still_steps": 7},
        "does not follow its commands (a reflex, the user stop?)",
    ),
    "gripper follows": (
        {},
        {"gripper": "close", "steps": 12, "gripper_step": 2, "gripper_opening": 1.0},
        "ordered to close",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_safety_table_finds_its_problem_alone(name):
    """A state beyond one limit is found by that row and no other, with a message that names it; a calm one by none."""
    state_change, tracking_change, words = ROWS[name]
    previous = parse_state(calm())
    moved = {**calm(), "q": [x + 1e-6 for x in calm()["q"]]}
    state = parse_state(moved | state_change)
    tracking = Tracking(**tracking_change)
    tracking.update(LIMITS, state, previous)
    problems = {check.name: check.problem(LIMITS, state, tracking) for check in CHECKS}
    assert [found for found, problem in problems.items() if problem] == [name]
    assert words in problems[name] and "\n" not in problems[name]
    with pytest.raises(Fault) as fault:
        check_state(LIMITS, state, tracking)
    kinds = {check.name: check.kind for check in CHECKS}
    assert fault.value.kind is kinds[name] and fault.value.needs_operator
    calm_tracking = Tracking()
    calm_tracking.update(LIMITS, parse_state(moved), previous)
    check_state(LIMITS, parse_state(moved), calm_tracking)


def test_the_table_has_every_row():
    assert [check.name for check in CHECKS] == list(ROWS)


def test_an_arm_that_does_not_follow_is_noticed_in_time():
    """8 steps without motion: not when it pushes against something, not when it moves, not when nothing was asked."""

    def steps_until_noticed(force, moves, target, same=False):
        tracking = Tracking(target=target)
        previous = parse_state(calm())
        for k in range(30):
            answer = calm()
            answer["force"] = [0, 0, force]
            answer["pose"] = [0.5 + 0.0015 * k * moves, *answer["pose"][1:]]
            if not same:
                answer["q"] = [x + 1e-6 * k for x in answer["q"]]
            state = parse_state(answer)
            tracking.update(LIMITS, state, previous)
            previous = state
            try:
                check_state(LIMITS, state, tracking)
            except Fault:
                return k + 1
        return None

    far = (np.array([0.6, 0, 0.2]), DOWN)
    assert steps_until_noticed(0, 0, far) == LIMITS.still_steps
    assert steps_until_noticed(9, 0, far) is None  # it pushes
    assert steps_until_noticed(9, 0, far, same=True) == LIMITS.still_steps  # an old state
    assert steps_until_noticed(0, 1, far) is None
    near = (np.array([0.505, 0, 0.2]), DOWN)
    assert steps_until_noticed(0, 0, near) is None
    assert steps_until_noticed(0, 0, near, same=True) == LIMITS.still_steps


def test_a_simulated_arm_at_rest_is_not_taken_for_dead(robot_server):
    """A policy that hesitates for a whole episode ends it without a fault."""
    env = PandaEnv(RobotConfig.from_environment(), "pick-carrot", 64, 60)
    env.reset(seed=1)
    steps, result = drive(env, np.zeros(7, np.float32), 60)
    env.close()
    assert steps == 60 and "fault" not in result[4]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pose": [0.5, 0, 0.2, 0.5, 0, 0, 0]}, "length 1"),
        ({"pose": [0.5, 0, 0.2]}, "shape"),
        ({"dq": [0] * 6 + [float("nan")]}, "not finite"),
        ({"gripper_pos": float("inf")}, "not finite"),
        ({"gripper_pos": None}, "not in SERL's format"),
        ({"pose": [0.2, 0, 0.2, 1, 0, 0, 0]}, "outside its box"),
    ],
)
def test_a_state_beyond_the_limits_is_a_fault(change, words):
    """Whatever is wrong with a state ends the episode with a sentence that names it, and holds the arm."""
    server = Recorder(np.random.default_rng(0))
    good = calm()
    server.pose = np.array(good["pose"])
    answers = [good, good, {**good, **change}, good]
    server.get_state = lambda timeout: parse_state(answers.pop(0) if answers else good)
    env = unlinked(server)
    env.reset(seed=0)
    env.step(0 * FORWARD)
    *_, truncated, info = env.step(0 * FORWARD)
    assert truncated and words in info["fault"] and "ordered to hold" in info["fault"]
    assert np.array_equal(server.poses[-1][0][:3], good["pose"][:3])


def test_an_fr3_has_its_own_joint_limits(robot_server, monkeypatch):
    """ROBOT_ARM=fr3: joint 6 begins at 0.54 rad, where a Panda's begins below 0."""
    monkeypatch.setenv("ROBOT_ARM", "fr3")
    env = panda.make("pick-can")
    assert (env.limits.q_min, env.limits.q_max) == JOINT_LIMITS["fr3"]
    env.close()
    state = parse_state({**calm(), "q": [0, 0, 0, -1.9, 0, 0.5, 0]})
    check_state(LIMITS, state, Tracking())
    with pytest.raises(Fault, match="joint 6"):
        check_state(
            Limits(q_min=JOINT_LIMITS["fr3"][0], q_max=JOINT_LIMITS["fr3"][1]), state, Tracking()
        )


# ----------------------------------------------------------------------------------------------------------------------
# Faults

FAULTS = {  # kind: (value, words of the message, does it need an operator)
    "reflex": (1, "does not follow its commands", True),
    "user_stop": (1, "does not follow its commands", True),
    "frozen_state": (1, "does not follow its commands (and its state never changes", True),
    "stuck_gripper": (1, "gripper was ordered to close", True),
    "error": (2, "500", False),
    "drop": (2, "link", False),
    "nan": (1, "not finite", False),
    "frozen_camera": (1, "camera's newest frame", False),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_stops_the_arm_and_marks_the_episode(robot_server, kind):
    """The arm is ordered to hold where it is; the episode ends truncated and marked, in one sentence. When the cause is
    removed, the next process goes on."""
    value, words, needs_operator = FAULTS[kind]
    env = panda.make("pick-red-block")
    env.reset(seed=1)
    drive(env, FORWARD, 3)
    robot_server.order(kind, value)
    action = CLOSE if kind == "stuck_gripper" else FORWARD
    steps, (image, reward, terminated, truncated, info) = drive(env, action, 20)
    assert steps < 15 and (reward, terminated, truncated) == (0.0, False, True)
    assert (
        words in info["fault"] and "ordered to hold" in info["fault"] and "\n" not in info["fault"]
    )
    assert image in env.observation_space and env.fault.needs_operator == needs_operator
    seen = robot_server.json("sim/look")
    if kind != "frozen_state":  # then nobody can know where it is
        assert (
            np.abs(np.array(seen["target"]) - robot_server.json("getpos")["pose"][:3]).max() < 0.005
        )
    if needs_operator:
        assert words in refused(env.reset)  # nobody is there to ask, and nothing is cleared
        assert robot_server.json("sim/look")["seconds"] == seen["seconds"]
    env.close()

    robot_server.order(kind, 0)  # somebody makes the robot safe
    if kind in ("reflex", "user_stop"):
        robot_server.post("clearerr")
    env = panda.make("pick-red-block")
    env.reset(seed=1)
    done = False
    while not done:
        _, _, success, truncated, info = env.step(panda.expert(env))
        done = success or truncated
    assert success and "fault" not in info
    env.close()


def test_errors_are_not_cleared_after_a_user_stop(robot_server):
    """Neither step nor reset ever sends /clearerr by itself; after an operator's word, hold comes before and after."""
    env = panda.make("pick-red-block")
    env.reset(seed=1)
    sent = []
    post = env.server.post
    env.server.post = lambda route, *rest, **more: (sent.append(route), post(route, *rest, **more))[
        1
    ]
    robot_server.order("user_stop")
    drive(env, FORWARD, 20)
    refused(env.reset)
    assert "clearerr" not in sent and "jointreset" not in sent

    env.operator = human()
    robot_server.order("user_stop", 0)
    sent.clear()
    robot_server.order(
        "nan"
    )  # the pose cannot be measured: the last one may be far from where the arm is by now
    with pytest.raises(Fault, match="errors were not cleared") as fault:
        env.recover()
    assert fault.value.kind is FaultKind.OPERATOR and set(sent) == {"getstate"}
    robot_server.order("nan", 0)
    sent.clear()
    env.recover()
    assert "does not follow" in env.operator.keyboard.asked[0]
    assert [route for route in sent if route != "getstate"] == ["pose", "clearerr", "pose"]
    env.close()


def test_an_arm_out_of_bounds_waits_for_an_operator_but_not_in_simulation(robot_server):
    """Near a joint's limit the episode ends; the simulation's reset puts the arm back, a real one needs somebody."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    limits = env.limits
    env.limits = dataclasses.replace(limits, q_margin=3.0)
    *_, truncated, info = env.step(0 * FORWARD)
    assert truncated and "from its limit" in info["fault"]
    env.limits = limits
    env.reset(seed=1)
    assert "fault" not in env.step(0 * FORWARD)[4]
    env.fault = Fault("joint 7 is near", FaultKind.OUT_OF_BOUNDS, advice="guide it back")
    operator = env.operator
    env.operator = NoOperator()
    message = refused(env.reset, seed=2)
    assert "guide it back" in message and "rerun the same command" in message
    env.operator = operator
    env.close()


def test_a_faulted_reset_says_why_and_asks_again(robot_server):
    """The arm does not move again without a word and Enter, although the operator has seen it go home before."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    drive(env, FORWARD, 3)
    env.operator = operator = human()
    env.episodes = 1  # so that the first attempt announces itself and does not ask
    go_home = env.go_home
    failures = [Fault("the front camera's newest frame is 4.0 s old")]

    def failing():
        if failures:
            raise failures.pop()
        go_home()

    env.go_home = failing
    env.reset(seed=0)
    asked = operator.keyboard.asked
    assert (
        "4.0 s old" in asked[0] and "arm goes home" in asked[0] and "Place the object" in asked[1]
    )
    env.fault = Fault("a frame was late")  # in an episode
    asked.clear()
    env.reset(seed=0)
    assert "a frame was late" in asked[0]
    asked.clear()
    env.reset(seed=0)  # after a good episode the announcement is enough
    assert len(asked) == 1 and "Place the object" in asked[0]
    env.close()


def test_two_faults_in_a_reset_name_the_first(robot_server):
    """What went wrong first is the sentence; what followed from it comes after."""
    env = panda.make("pick-red-block")
    faults = [Fault("the second"), Fault("the first")]

    def start_episode(seed):
        raise faults.pop()

    env.start_episode = start_episode
    message = refused(env.reset)
    assert message.startswith("the first; the next attempt failed too: the second")
    env.close()


# ----------------------------------------------------------------------------------------------------------------------
# Joint resets and the way home


def test_a_joint_reset_that_lies(robot_server):
    """/jointreset answers the same whether the arm moved or not: only q tells."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    robot_server.order("reset_lies")
    with pytest.raises(Fault, match="a joint is 0.* rad from its target"):
        env.reset_joints()
    env.begin_episode()
    env.reset_joints()  # the second one does what it says
    assert np.abs(env.state.q - LIMITS.reset_q).max() < 0.05
    env.close()


def test_a_joint_reset_that_fails_ends_the_program(robot_server, capsys):
    """500: the joint controller may move the arm on. No retry, no claim that the arm holds, and the way out."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    env.operator = human()
    env.limits = dataclasses.replace(env.limits, reset_every=1)
    robot_server.order("reset_fails", 2)
    sent = []
    post = env.server.post
    env.server.post = lambda route, *rest, **more: (sent.append(route), post(route, *rest, **more))[
        1
    ]
    message = refused(env.reset)
    assert sent.count("jointreset") == 1 and sent[-1] == "jointreset"
    assert "joint reset failed" in message and "500" in message and "user stop" in message
    assert "--reset_joint_target" in message and "was ordered to hold" not in message
    assert env.hold() is Hold.NO_CONTROLLER
    env.close()
    robot_server.post("startimp", timeout=10)


@pytest.mark.parametrize("answers", ["late", "never"])
def test_the_impedance_controller_may_take_its_time(robot_server, answers):
    """After a joint reset /update_param is a 500 until the controller runs: waited for, but not forever."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    env.limits = dataclasses.replace(env.limits, controller_patience=3.0)
    robot_server.order("slow_controller", 1.0 if answers == "late" else 30.0)
    if answers == "late":
        env.reset_joints()
        assert np.abs(env.state.q - LIMITS.reset_q).max() < 0.05
    else:
        with pytest.raises(Fault, match="controller is not running") as fault:
            env.reset_joints()
        assert fault.value.kind is FaultKind.FATAL and env.hold() is Hold.NO_CONTROLLER
    env.close()
    robot_server.post("startimp", timeout=10)


def test_a_slow_update_of_the_compliance_is_waited_for(monkeypatch):
    """/update_param calls a ROS service: half a second is not a lost link."""
    with realtime() as (server, client):
        client.order("slow_param", 0.6)
        monkeypatch.setenv("ROBOT_URL", server.url)
        env = panda.make("pick-can")
        env.reset(seed=0)
        env.close()


def test_the_arm_goes_home(robot_server):
    """As on a real robot: gripper open, up, to the start, every target inside the limits."""
    env = panda.make("pick-red-block")
    env.reset(seed=0)
    drive(env, np.array([1, 1, -1, 0, 0, 1, -1], np.float32), 12)
    env.begin_episode()
    env.go_home()
    assert np.linalg.norm(env.state.position - LIMITS.home) < 0.015
    assert (env.state.rotation * DOWN.inv()).magnitude() < 0.1 and env.state.opening > 0.9
    env.close()


def test_hil_serl_s_hand_is_opened_although_its_server_thinks_it_is_open(monkeypatch):
    """Fingers shut when the server started: /open_gripper alone is ignored forever; close and open is not."""
    with realtime("hil-serl") as (server, client):
        monkeypatch.setenv("ROBOT_URL", server.url)
        monkeypatch.setenv("ROBOT_GRIPPER", "hil-serl")
        env = panda.make("pick-red-block")
        env.reset(seed=0)
        client.post("close_gripper")
        time.sleep(0.6)
        client.order("restart")
        env.go_home()
        assert env.state.opening > 0.9
        client.order("stuck_gripper")
        server.world.data.qpos[7:9] = 0.0
        server.world.width = 0.0
        with pytest.raises(Fault, match="ordered to open and is shut.*activate_gripper"):
            env.go_home()
        env.close()


# ----------------------------------------------------------------------------------------------------------------------
# The link


def test_an_answer_of_another_server_is_no_robot(monkeypatch):
    """A server that answers /sim/info with other JSON is not taken for a simulated robot."""
    for answer in (b"null", b"[]", b"{}"):
        with serving(upstream(**{"sim/info": (200, "application/json", answer, 0)})) as url:
            monkeypatch.setenv("ROBOT_URL", f" {url} ")
            assert "is not a robot server" in refused(panda.make, "pick-can")


@pytest.mark.parametrize("answer", ["null", "{}", "[true]"])
def test_an_operator_s_view_of_another_kind_is_a_fault(answer, robot_server, monkeypatch):
    """What /sim/look answers is checked before it is used, and the arm is ordered to hold."""
    env = PandaEnv(RobotConfig.from_environment(), "pick-carrot", 64, 60)
    env.reset(seed=1)
    known = env.server.json
    monkeypatch.setattr(
        env.server,
        "json",
        lambda route, **k: json.loads(answer) if "look" in route else known(route, **k),
    )
    info = env.step(FORWARD)[4]
    env.close()
    assert "/sim/look" in info["fault"] and "ordered to hold" in info["fault"]


def test_what_only_a_real_server_says():
    """HTML where JSON belongs, bare strings, 405, a hung server, and a slow joint reset."""
    zeros = {**calm(), "pose": [0.0] * 7, "gripper_pos": [0.04]}
    state = json.dumps(zeros).encode()
    page = "text/html"
    html = b"<!doctype html>\n<title>500 Internal Server Error</title>"
    handler = upstream(
        getstate=(500, page, html, 0),
        getq=(200, page, b"Moved", 0),
        getpos=(405, page, html, 0),
        getvel=(200, "application/json", state, 0),
        pose=(200, page, b"Moved", 0),
        getdq=(200, "application/json", state, 1.0),
        jointreset=(200, page, b"Reset Joint", 1.0),
    )
    with serving(handler) as url:
        server = RobotServer(url)
        for route, words in (
            ("getstate", "500"),
            ("getpos", "405"),
            ("getq", "not JSON: b'Moved'"),
            ("none", "404"),
        ):
            with pytest.raises(Fault, match=words) as fault:
                server.json(route)
            assert "<" not in str(fault.value) and "\n" not in str(fault.value)
        with pytest.raises(Fault, match="has not received a state.*--gripper_type=None"):
            server.get_state()
        assert server.post("pose", {"arr": [0] * 7})[0] == b"Moved"
        with pytest.raises(ValueError):  # NaN never leaves this side
            server.post("pose", {"arr": [float("nan")] * 7})
        with pytest.raises(Fault, match="length 1"):  # a gripper_pos in a list is read
            parse_state(server.json("getvel"))
        began = time.monotonic()
        with pytest.raises(Fault, match="lost"):
            server.json("getdq")
        assert time.monotonic() - began < 0.8
        assert (
            server.post("jointreset", timeout=LIMITS.reset_timeout)[0] == b"Reset Joint"
        )  # slow, and not given up
        assert LIMITS.reset_timeout >= 60
        # a real robot has no cameras and no judge of its own
        assert "ROBOT_FRONT" in refused(PandaEnv, RobotConfig(url=url), "t")
    with pytest.raises(Fault, match="lost"):
        server.json("getvel")
    message = refused(PandaEnv, RobotConfig(url=url), "t")
    assert url in message and "ROBOT_URL" in message


def test_an_address_with_a_path_keeps_it():
    """http://host:port/arm2/ is arm2's server, behind a proxy."""
    with serving(upstream(**{"arm2/getq": (200, "application/json", b'{"q": 2}', 0)})) as url:
        assert (
            RobotServer(f"{url}arm2/").json("getq")
            == RobotServer(f"{url}arm2").json("getq")
            == {"q": 2}
        )
        with pytest.raises(Fault, match="404"):
            RobotServer(url).json("getq")


def test_a_robot_that_is_described_is_named(monkeypatch):
    """Without ROBOT_URL nothing else about a robot may be set, for it would be simulated; values are checked."""
    some = "http://127.0.0.1:1/"
    for url in (
        "127.0.0.1:5000",
        "localhost:5000",
        "http://127.0.0.1:5000x",
        "http://",
        f"{some}?arm=2",
    ):
        monkeypatch.setenv("ROBOT_URL", url)
        assert "not a valid address" in refused(panda.make, "pick-can")
    for url, name, value, words in (
        ("", "FRONT", "opencv:0", "ROBOT_URL is not"),
        (some, "ARM", "fr4", "fr3"),
        (some, "GRIPPER", "sreal", "hil-serl"),
        (some, "TAKEOVER", "key", "spacemouse"),
        (some, "TAKEOVER", "keys", "ROBOT_REWARD"),
    ):
        with monkeypatch.context() as one:
            one.setenv("ROBOT_URL", url)
            one.setenv(f"ROBOT_{name}", value)
            assert words in refused(panda.make, "pick-can")


def test_one_robot_has_one_driver(robot_server, monkeypatch):
    """A second environment on the same robot is refused, by whatever name, until the first is closed."""
    env = panda.make("pick-can")
    assert "another process drives" in refused(panda.make, "pick-can")
    monkeypatch.setenv("ROBOT_URL", env.config.url.replace("127.0.0.1", "localhost").rstrip("/"))
    assert "another process drives" in refused(panda.make, "pick-can")
    env.close()
    panda.make("pick-can").close()


@pytest.mark.parametrize(
    "number, grippers",
    [
        (0.08, ["serl", "hil-serl"]),
        (0.0, ["serl", "hil-serl", "robotiq"]),
        (1, ["hil-serl", "robotiq"]),
        (0.31, ["hil-serl"]),
        (228, ["robotiq"]),
        (228.5, []),
        (-3.0, []),
        (256, []),
    ],
)
def test_which_grippers_can_report_a_number(number, grippers):
    """Only integers from 0 to 255 are a Robotiq's; a number outside every range is nobody's."""
    assert possible_grippers(number) == grippers


def test_a_number_of_another_gripper_is_a_fault(monkeypatch):
    """A Robotiq's raw number read as HIL-SERL's is not an opening of 228: the episode ends, and so does the program."""
    with realtime("robotiq") as (server, client):
        monkeypatch.setenv("ROBOT_URL", server.url)
        monkeypatch.setenv("ROBOT_GRIPPER", "hil-serl")
        client.post("activate_gripper")
        env = panda.make("pick-can")
        env.reset(seed=0)
        *_, truncated, info = drive(env, CLOSE, 12)[1]
        assert truncated and "ROBOT_GRIPPER" in info["fault"] and "ordered to hold" in info["fault"]
        assert "ROBOT_GRIPPER" in refused(env.reset)
        env.close()


# ----------------------------------------------------------------------------------------------------------------------
# Real time


def test_ten_hertz(monkeypatch):
    """Delays within a period do not add up; a late step is counted, and the periods after it are whole again."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(robot.clock, "time", clock)
    schedule = RealTimeClock()
    for k in range(20):
        clock.now += 0.16 if k == 10 else 0.02 + 0.03 * (k % 3)  # the policy
        schedule.wait()
    assert (
        np.allclose(schedule.periods, [0.16 if k == 10 else 0.1 for k in range(20)])
        and schedule.overruns == 1
    )
    assert not schedule.is_late()
    clock.now += 0.25
    assert schedule.is_late() and "1 overruns" in schedule.summary()


def test_hang_and_lost_link(monkeypatch):
    """In real time: a server that hangs is given up in time, and the arm is held as soon as it answers again."""
    with realtime() as (server, client):
        monkeypatch.setenv("ROBOT_URL", server.url)
        env = panda.make("pick-blue-block", 64)
        env.reset(seed=0)
        began = time.monotonic()
        for k in range(10):
            time.sleep(0.16 if k == 5 else 0.02)  # the policy
            env.step(0 * FORWARD)
        assert (
            time.monotonic() - began > 0.95
            and len(env.clock.periods) == 10
            and env.clock.overruns >= 1
        )
        client.order("hang", 0.8)
        began = time.monotonic()
        *_, truncated, info = env.step(0 * FORWARD)
        assert truncated and "lost" in info["fault"] and "was ordered to hold" in info["fault"]
        assert time.monotonic() - began < 1.5
        env.reset(seed=0)
    *_, truncated, info = env.step(0 * FORWARD)
    assert truncated and "lost" in info["fault"] and "could not be ordered to hold" in info["fault"]
    assert "lost" in refused(env.reset)
    env.close()


def test_the_client_does_without_torch():
    """Environments' processes, and a robot's computer, start quickly: only a classifier needs torch."""
    code = "import sys, domains.panda; print('torch' in sys.modules, 'mujoco' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == ["False", "False"]
