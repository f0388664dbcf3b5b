"""The simulated Panda: as a domain, and as SERL's and HIL-SERL's robot servers."""

import http.client
import json

import gymnasium as gym
import numpy as np
import pytest
from robots import CLOSE, FORWARD, LIMITS, drive, realtime, refused
from scipy.spatial.transform import Rotation

from common.rates import all_tasks
from domains import panda
from robot.limits import Fault
from robot.server import OPENING, possible_grippers
from robot.sim.world import World


@pytest.fixture
def robot(robot_server):
    return robot_server


# ----------------------------------------------------------------------------------------------------------------------
# The domain


def test_the_panda_offers_what_the_stages_use():
    """Three disjoint splits, and for every task an instruction and an environment with the domains' spaces."""
    names = all_tasks(panda)
    assert [len(panda.EXPERT_TASKS), len(panda.RL_TASKS), len(panda.UNSEEN_TASKS)] == [4, 2, 8]
    assert len(set(names)) == 14 and set(names) == set(panda.INSTRUCTIONS)
    assert (panda.PROTOCOL["step"], panda.PROTOCOL["turn"]) == (LIMITS.step, LIMITS.rotation_step)
    env = panda.make("pick-eggplant", 48)
    assert env.observation_space == gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
    image, info = env.reset(seed=3)
    assert image in env.observation_space and info == {} and env.render().shape == (480, 480, 3)
    action = panda.expert(env)
    assert action in env.action_space
    image, reward, terminated, truncated, info = env.step(action)
    assert image in env.observation_space and (reward, terminated, truncated) == (0.0, False, False)
    assert np.array_equal(info["executed"], action)
    for impossible in (action[1:], action * np.nan, action + np.inf):
        with pytest.raises(ValueError):
            env.step(impossible)
    assert drive(env, 0 * action, 100)[0] == panda.HORIZON - 1
    env.close()
    message = refused(panda.make, "pick-leek")
    assert "'pick-leek'" in message and "pick-carrot" in message


def test_a_seed_decides_an_episode_of_the_panda(robot, monkeypatch):
    """The same seed gives the same images and path, after other episodes, another task and in another process."""

    def path(env, seed):
        images = [env.reset(seed=seed)[0]]
        images += [env.step(panda.expert(env) if k < 4 else FORWARD)[0] for k in range(8)]
        return np.stack(images), env.state.position.copy()

    env = panda.make("pick-carrot")
    first = path(env, 5)
    second = path(env, 6)
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
        env = panda.make(task)
        env.reset(seed=100)
        done = False
        while not done:
            action = panda.expert(env)
            action[:6] += rng.normal(0, 0.2, 6)
            _, _, success, truncated, _ = env.step(action.clip(-1, 1))
            done = success or truncated
        assert success, task
        env.close()


# ----------------------------------------------------------------------------------------------------------------------
# The protocol


def ask(url, route, body=None, method="POST", kind="application/json"):
    """(status, content type, content) of a request, by another client than the one that is tested."""
    connection = http.client.HTTPConnection(url.split("/")[2])
    connection.request(
        method, f"/{route}", body, {"Content-Type": kind} if body is not None else {}
    )
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
    alone = {
        "getpos": "pose",
        "getvel": "vel",
        "getforce": "force",
        "gettorque": "torque",
        "getq": "q",
        "getdq": "dq",
    }
    for route, key in {**alone, "getjacobian": "jacobian", "get_gripper": "gripper"}.items():
        assert list(json.loads(ask(url, route)[2])) == [key]
    pose, euler = (json.loads(ask(url, route)[2])["pose"] for route in ("getpos", "getpos_euler"))
    assert (
        Rotation.from_euler("xyz", euler[3:]) * Rotation.from_quat(pose[3:]).inv()
    ).magnitude() < 1e-4
    texts = {
        "clearerr": b"Clear",
        "open_gripper": b"Opened",
        "close_gripper": b"Closed",
        "close_gripper_slow": b"Closed",
        "activate_gripper": b"Activated",
        "reset_gripper": b"Reset",
        "stopimp": b"Stopped impedance",
        "startimp": b"Started impedance",
    }
    for route, text in texts.items():
        assert ask(url, route)[::2] == (200, text)
    good = json.dumps({"arr": pose})
    assert ask(url, "pose", good)[::2] == (200, b"Moved")
    assert ask(url, "update_param", '{"translational_Ki": 1e9}')[::2] == (
        200,
        b"Updated compliance parameters",
    )
    for number in ("300", '"128"', "12.7"):  # upstream takes int() of it
        assert ask(url, "move_gripper", f'{{"gripper_pos": {number}}}')[::2] == (
            200,
            b"Moved Gripper",
        )
    bad = {
        405: ("getstate", None, "GET"),
        404: ("nothing",),
        415: ("pose", good, "POST", "text/plain"),
        400: ("pose", '{"arr": ['),
        500: ("pose", '{"arr": [1, 2, 3]}'),
    }
    for expected, arguments in bad.items():
        status, kind, content = ask(url, *arguments)
        assert status == expected and kind.startswith("text/html") and b"<title>" in content
    assert (
        ask(url, "pose", '{"array": []}')[0]
        == ask(url, "update_param", '{"stiffness": 1}')[0]
        == 500
    )
    nan = json.dumps({"arr": [float("nan")] * 7})  # passes Flask, and ends libfranka's controller
    assert ask(url, "pose", nan)[0] == 200 and ask(url, "clearerr")[0] == 200


def test_the_arm_follows_as_serl_s_does():
    """A target is taken up with a time constant of 0.2 s, no faster than stiffness times clip over damping."""
    world = World()
    world.reset("pick-can", 0)
    start, quat = world.pose()
    world.aim([*(start + [0, 0.02, 0]), *np.roll(quat, -1)])
    left = []
    for _ in range(6):
        world.advance(0.1)
        left.append(0.02 - (world.pose()[0] - start)[1])
    assert left == pytest.approx(
        [0.017, 0.011, 0.006, 0.0028, 0.0014, 0.0008], abs=0.002
    )  # measured at 1 kHz before
    world.aim([*(world.pose()[0] + [0, 0.5, 0]), *np.roll(quat, -1)])
    world.advance(0.5)
    assert 0.15 < world.data.qvel[:7] @ world.jacobian()[1] < 2000 * 0.01 / 89 + 0.01


def test_nothing_moves_without_a_controller(robot):
    """After /stopimp a pose is answered "Moved", the arm stands, the state repeats and no parameter can be set."""
    robot.post("sim/reset", {"task": "pick-can", "seed": 0}, 10)
    robot.post("stopimp", timeout=10)
    before = robot.json("getstate")
    target = [*np.add(before["pose"][:3], [0.03, 0, 0]), *before["pose"][3:]]
    for _ in range(5):
        assert robot.post("pose", {"arr": target}, 5)[0] == b"Moved"
    assert robot.json("getstate") == before
    with pytest.raises(Fault, match="500"):
        robot.post("update_param", {"translational_Ki": 0}, 5)
    robot.post("startimp", timeout=10)
    for _ in range(15):
        robot.post("pose", {"arr": target}, 5)
    assert np.allclose(robot.json("getstate")["pose"][:3], target[:3], atol=0.003)


def test_a_joint_reset_that_fails_leaves_the_joint_controller_running(robot):
    """As upstream's does with --reset_joint_target: 500, the joints move on, and no pose is followed."""
    robot.post("sim/reset", {"task": "pick-can", "seed": 0}, 10)
    robot.order("reset_fails")
    with pytest.raises(Fault) as fault:
        robot.post("jointreset", timeout=60)
    assert fault.value.status == 500
    first = np.array(robot.json("getq")["q"])
    pose = robot.json("getpos")["pose"]
    for _ in range(20):
        robot.post("pose", {"arr": pose}, 5)  # lets the world's time pass
    assert np.abs(robot.json("getq")["q"] - first).max() > 0.02
    robot.post("startimp", timeout=10)


# ----------------------------------------------------------------------------------------------------------------------
# Grippers


@pytest.mark.parametrize(
    "gripper, client, opened, shut",
    [
        ("serl", "serl", 0.08, 0.01),
        ("hil-serl", "hil-serl", 1, 0.125),
        ("robotiq", "robotiq", 0, 255),
        ("hil-serl-robotiq", "hil-serl", 1 - 175 / 255, 0),
    ],
)
def test_every_gripper_reports_its_own_number(gripper, client, opened, shut):
    """gripper_pos after /close_gripper and /open_gripper, and that ROBOT_GRIPPER turns it into 1 open and 0 closed."""
    world = World(gripper)
    world.gripper.activate()
    numbers = []
    for route in (world.gripper.close, world.gripper.open):
        world.set_width(route())
        world.advance(1.0)
        numbers.append(world.state()["gripper_pos"])
    assert numbers == pytest.approx([shut, opened], abs=0.02 * max(opened, shut, 1))
    opening = [OPENING[client](number) for number in numbers]
    assert opening[0] < 0.15 and opening[1] > 0.25
    assert client in possible_grippers(numbers[0]) and client in possible_grippers(numbers[1])
    if client == "robotiq":
        assert all(isinstance(number, int) for number in numbers)


@pytest.mark.parametrize(
    "gripper, wide", [("serl", 255), ("hil-serl", 255), ("robotiq", 0), ("hil-serl-robotiq", 0)]
)
def test_move_gripper_s_direction_is_the_gripper_s(gripper, wide):
    """255 is wide for a Franka Hand and shut for a Robotiq."""
    world = World(gripper)
    world.gripper.activate()
    widths = []
    for position in (wide, 255 - wide):
        world.set_width(world.gripper.move(position))
        world.advance(1.0)
        widths.append(world.data.qpos[7] + world.data.qpos[8])
    assert widths[0] > 0.07 and widths[1] < 0.01


@pytest.mark.parametrize("gripper", ["robotiq", "hil-serl-robotiq"])
def test_a_robotiq_waits_for_its_activation(gripper):
    """It ignores every command after a start of the server, until it is activated."""
    with realtime(gripper) as (server, client):
        world = server.world
        client.post("close_gripper")
        assert world.target_width == 0.08
        client.post("activate_gripper")
        client.post("close_gripper")
        assert world.target_width == 0
        client.order("restart")
        client.post("open_gripper")
        assert world.target_width == 0


def test_hil_serl_s_hand_remembers():
    """Its server ignores what it believes to be done, and believes the hand open at its start."""
    with realtime("hil-serl") as (server, client):
        world = server.world
        client.post("close_gripper")
        assert world.target_width == 0.01
        client.order("restart")
        client.post("open_gripper")
        assert world.target_width == 0.01  # it believes so already
        client.post("close_gripper")
        client.post("open_gripper")
        assert world.target_width == 0.08


def test_a_server_without_a_gripper_has_no_state():
    """--gripper_type=None: /getstate is a 500, and the client says what that means."""
    with realtime("none") as (_, client):
        with pytest.raises(Fault, match="--gripper_type=None") as fault:
            client.get_state()
        assert fault.value.status == 500
        with pytest.raises(Fault, match="500"):
            client.post("open_gripper")


def test_an_episode_grips_with_every_gripper(monkeypatch):
    """Closing and opening through the environment is no fault with any gripper that is ready."""
    for gripper, setting in (
        ("hil-serl", "hil-serl"),
        ("robotiq", "robotiq"),
        ("hil-serl-robotiq", "hil-serl"),
    ):
        with realtime(gripper) as (server, client):
            monkeypatch.setenv("ROBOT_URL", server.url)
            monkeypatch.setenv("ROBOT_GRIPPER", setting)
            client.post("activate_gripper")
            env = panda.make("pick-red-block")
            env.reset(seed=0)
            for action in (CLOSE, -CLOSE):
                steps, (*_, info) = drive(env, action, 12)
                assert steps == 12 and "fault" not in info, (gripper, info)
            env.close()


def test_a_robotiq_that_is_not_active_is_named(monkeypatch):
    """The fault names the activation."""
    with realtime("robotiq") as (server, _):
        monkeypatch.setenv("ROBOT_URL", server.url)
        monkeypatch.setenv("ROBOT_GRIPPER", "robotiq")
        env = panda.make("pick-red-block")
        env.reset(seed=0)
        *_, info = drive(env, CLOSE, 15)[1]
        assert (
            "ordered to close and has not moved" in info["fault"]
            and "/activate_gripper" in info["fault"]
        )
        env.close()
