"""
A real Franka Panda through SERL's robot server, and the paper's real-world experiment on it (Sec. V-D).

The robot server (rail-berkeley/serl, robot_servers/franka_server.py) runs beside the robot and speaks HTTP; this is its
client: a gymnasium.Env for domains/panda.py, and the experiment's steps. The same code drives the simulated robot of
domains/panda.py, which is all it has been tried on: NOTHING HERE HAS BEEN TRIED ON HARDWARE.

    python real_robot.py check                                             moves nothing: is everything there and sane?
    python real_robot.py collect --checkpoint C --task pick-eggplant --out runs/panda/D_rl/pick-eggplant
    python real_robot.py train --checkpoint C --task pick-eggplant --out runs/panda/1-rl-pick-eggplant
    python real_robot.py evaluate --checkpoint C --task pick-eggplant
    python real_robot.py classifier --frames frames/ --out reward.safetensors

The robot is named by environment variables (class Setup), so that every stage finds the same one; a simulated robot to
try it all on: `python -m domains.panda serve`, and ROBOT_URL=http://127.0.0.1:5000/.

Upstream's server checks nothing and tells little. So here: every pose sent is clipped last (Limits.clip); every answer
is checked (Panda.measure); whatever is wrong is a Fault, which stops the arm where it is, ends the episode and marks
it; and an arm that does not move is never told to go on without a person's word, for a reflex and the user stop look
alike. If this process is killed (kill -9, a power cut), the arm keeps to its last target, at most Limits.step away and
pushed to with at most 20 N along each axis.
"""

from run import Refusal, main, pick_device, read_json, read_tensors, whole, write_json  # isort: skip  first, for Ctrl-C while torch is imported

import contextlib
import fcntl
import http.client
import json
import math
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

from data import EVAL_SEED, ONLINE_SEED, attempts, write_episode
from domains import load_domain
from evaluate import NO_POLICY, wilson
from model import VLA
from sacfd import SACfD, executed, squashed

PERIOD = 0.1  # s
HELD = "the arm was told to hold"
DOWN = Rotation.from_quat([1, 0, 0, 0])  # x y z w: the hand pointing down, its x axis along the base's


@dataclass(frozen=True)
class Limits:
    """What the arm may be told and may be seen doing. Lengths in m, angles in rad, times in s, base frame."""

    # what is commanded
    # the box of the gripper's centre (TCP); the fingertips are 0.009 lower. At x = 0.33 joint 4 comes near its limit
    low: tuple = (0.38, -0.20, 0.012)
    high: tuple = (0.65, 0.20, 0.42)  # the joint reset ends at 0.40
    step: float = 0.04  # an action of 1, and the most that a target may differ from the measured place, each axis
    turn: float = 0.25  # the same for each component of the rotation vector
    tilt: float = 0.15  # of the hand from pointing down
    yaw: float = 1.45  # of the hand, both ways
    gripper_rest: int = 5  # decisions between two gripper commands: the hand needs half a second
    compliance: dict = field(  # of the impedance controller: along each axis it pushes with at most 2000 N/m * 0.01 m
        default_factory=lambda: {
            "translational_stiffness": 2000, "translational_damping": 89, "translational_Ki": 0,
            "rotational_stiffness": 150, "rotational_damping": 7, "rotational_Ki": 0,
            **{f"translational_clip_{side}": 0.01 for side in ("x", "y", "z", "neg_x", "neg_y", "neg_z")},
            **{f"rotational_clip_{side}": 0.05 for side in ("x", "y", "z", "neg_x", "neg_y", "neg_z")},
        }
    )  # fmt: skip
    home: tuple = (0.46, 0.0, 0.2)  # where episodes start
    reset_q: tuple = (0, 0, 0, -1.9, 0, 2, 0)  # the server's --reset_joint_target: its default, others it stumbles over
    reset_every: int = 200  # episodes between two joint resets, for the elbow drifts

    # what is measured; beyond it the arm is stopped
    outside: float = 0.03  # outside the box
    beyond: float = 0.25  # rad beyond tilt or yaw
    force: float = 40.0  # N
    meets: float = 5.0  # N; with less the hand meets nothing
    speed: float = 0.6  # m/s
    q_min: tuple = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)
    q_max: tuple = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
    q_margin: float = 0.1
    still: int = 8  # decisions in which the arm, told to move and meeting nothing, moves less than 1 mm
    grip: int = 10  # decisions in which the fingers, told to move, do not
    frame_age: float = 0.2  # of a camera's newest picture
    read: float = 0.25  # the robot server's time to answer; reads and /pose are tried twice
    slow: float = 60.0  # the same for /jointreset

    def aim(self, action, place, turn):
        """The pose that a policy's action (7,) asks for, from the measured one: (place (3,), Rotation), clipped."""
        move = np.clip(action[:6], -1, 1)
        return self.clip(place + self.step * move[:3], Rotation.from_rotvec(self.turn * move[3:]) * turn, place, turn)

    def clip(self, place, turn, place_now, turn_now):
        """The nearest allowed pose: near the measured one, and in any case inside the box and the window of turns."""
        place = np.clip(place, place_now - self.step, place_now + self.step)
        way = np.clip((turn * turn_now.inv()).as_rotvec(), -self.turn, self.turn)
        v = (Rotation.from_rotvec(way) * turn_now * DOWN.inv()).as_rotvec()
        v[:2] *= min(1.0, self.tilt / max(1e-9, math.hypot(v[0], v[1])))
        v[2] = min(max(v[2], -self.yaw), self.yaw)
        return np.clip(place, self.low, self.high), Rotation.from_rotvec(v) * DOWN


@dataclass(frozen=True)
class Setup:
    """Which robot: each field from the environment variable ROBOT_<NAME>."""

    url: str = ""  # of the robot server; empty: a simulated one of its own for each environment
    gripper: str = "serl"  # whose gripper_pos: serl (m), hil-serl (1 open), robotiq (255 closed)
    front: str = "sim:front"  # cameras: opencv:<index or path>, realsense:<serial number>, sim:<name>
    wrist: str = "sim:wrist"
    reward: str = "sim"  # keys, the path of a classifier, or sim
    takeover: str = ""  # how a person takes over: keys, spacemouse, or nothing
    dry: str = ""  # anything: print what would be commanded, and send none of it

    @classmethod
    def from_environment(cls):
        """Raises Refusal for an unknown value, and where a robot is described and not named."""
        given = {f.name: value for f in fields(cls) if (value := os.environ.get(f"ROBOT_{f.name.upper()}"))}
        setup = cls(**given)
        if given and not setup.url:
            raise Refusal(f"ROBOT_{next(iter(given)).upper()} is set and ROBOT_URL is not: set it, or unset the other")
        try:
            address = urllib.parse.urlsplit(setup.url)
            good = address.scheme == "http" and address.hostname and (address.port or True)
        except ValueError:  # the port
            good = False
        if setup.url and not good:
            raise Refusal(f"ROBOT_URL={setup.url} is no address: give one such as http://127.0.0.1:5000/")
        for name, known in (("gripper", [*OPENING]), ("takeover", ["", "keys", "spacemouse"])):
            if (value := getattr(setup, name)) not in known:
                raise Refusal(f"unknown ROBOT_{name.upper()} {value!r}: known are {', '.join(filter(None, known))}")
        if setup.takeover and setup.reward == "sim":
            raise Refusal("ROBOT_TAKEOVER wants a person there: set ROBOT_REWARD to keys, or to a classifier's file")
        return setup

    def __str__(self):
        return f"the robot server at {self.url}" if self.url else "a simulated robot (ROBOT_URL is not set)"


class Fault(Exception):
    """The episode cannot go on: one sentence. `person`: nor can the next, before a person has looked and said so.
    `astray`: the arm obeys, but is where or what it must not be; in simulation the reset puts it back."""

    def __init__(self, sentence, person=False, astray=False):
        super().__init__(sentence)
        self.person, self.astray = person or astray, astray


# ----------------------------------------------------------------------------------------------------------------------
# HTTP


class Link:
    """One connection to the robot server, kept alive where the server does so. Every failure is a Fault. With `dry`
    only what reads is sent; the rest is printed."""

    READS = ("getstate", "sim/info", "sim/reset", "sim/look", "sim/camera")

    def __init__(self, url, dry=False):
        address = urllib.parse.urlsplit(url)
        self.dry = dry
        self.url, self.connection = url, http.client.HTTPConnection(address.hostname, address.port)

    def post(self, route, body=None, timeout=0.25, tries=1):
        """(bytes, headers) of the answer to POST /<route>. Only what may be done twice may be tried twice."""
        data = b"" if body is None else json.dumps(body, allow_nan=False).encode()
        if self.dry and route not in self.READS:
            print(f"  dry run, not sent: /{route} {data.decode()[:120]}", flush=True)
            return b"", {}
        headers = {"Content-Type": "application/json"} if data else {}
        for left in reversed(range(tries)):
            try:
                self.connection.timeout = timeout
                if self.connection.sock:
                    self.connection.sock.settimeout(timeout)
                self.connection.request("POST", f"/{route}", data, headers)
                answer = self.connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.connection.close()
                if not left:
                    raise Fault(f"the link to the robot server at {self.url} is lost (/{route}: {error!r})") from error
                continue
            if answer.status == 200:
                return content, answer.headers
            if not left:
                raise Fault(f"the robot server answered /{route} with {answer.status} {answer.reason}")

    def json(self, route, body=None, timeout=0.25, tries=2):
        content, _ = self.post(route, body, timeout, tries)
        try:
            return json.loads(content)
        except ValueError as error:
            raise Fault(f"the robot server's answer to /{route} is not JSON: {content[:60]!r}") from error

    def close(self):
        self.connection.close()


OPENING = {  # 1 open, 0 closed, of gripper_pos
    "serl": lambda x: x / 0.08,
    "hil-serl": lambda x: x,
    "robotiq": lambda x: 1 - x / 255,
}
SHAPES = {"pose": 7, "vel": 6, "force": 3, "torque": 3, "q": 7, "dq": 7}


def parse(state):
    """/getstate's answer as arrays. Raises Fault for what is missing, has another shape, or is not finite."""
    try:
        arrays = {name: np.array(state[name], float) for name in SHAPES}
        arrays["gripper_pos"] = float(np.squeeze(state["gripper_pos"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(f"the robot server's state is not what SERL's is ({error!r})") from error
    for name, value in arrays.items():
        if name in SHAPES and value.shape != (SHAPES[name],):
            raise Fault(f"the robot server's {name} has shape {value.shape}, not ({SHAPES[name]},)")
        if not np.isfinite(value).all():
            raise Fault(f"the robot server's {name} is not finite: {np.round(value, 3).tolist()}")
    if abs(np.linalg.norm(arrays["pose"][3:]) - 1) > 0.01:
        raise Fault(f"the robot server's quaternion is not of length 1: {arrays['pose'][3:].tolist()}")
    return arrays


# ----------------------------------------------------------------------------------------------------------------------
# Cameras: each gives (picture (H, W, 3) uint8 RGB, its number, its age in s)


class SimCamera:
    """A camera of domains/panda.py's server, which draws at the size that is asked for."""

    def __init__(self, name, link, timeout):
        self.name, self.link, self.timeout = name, link, timeout

    def read(self, width, height):
        size = {"width": width, "height": height}
        content, headers = self.link.post("sim/camera", {"name": self.name, **size}, self.timeout, tries=2)
        try:
            image = np.frombuffer(content, np.uint8).reshape(height, width, 3)
            return image, int(headers["X-Number"]), float(headers["X-Age"])
        except (ValueError, TypeError) as error:
            raise Fault(f"the {self.name} camera's answer is no picture ({error})") from error

    def close(self):
        pass


class Camera:
    """A USB camera, by OpenCV ("opencv:0") or librealsense ("realsense:<serial number>"). A thread keeps the newest
    picture; one that equals its predecessor to the last pixel does not count as new, for real sensors are never still.
    """

    def __init__(self, kind, name):
        self.name, self.lock, self.newest, self.open = f"{kind}:{name}", threading.Lock(), None, True
        self.grab, self.release = getattr(self, f"open_{kind}")(name)
        threading.Thread(target=self.watch, daemon=True).start()
        for _ in range(50):
            if self.newest:
                break
            time.sleep(0.1)

    def open_opencv(self, name):
        import cv2

        device = cv2.VideoCapture(int(name) if name.isdigit() else name)
        device.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # else it hands out pictures that have been waiting

        def grab():
            good, image = device.read()
            return image[..., ::-1] if good else None

        return grab, device.release

    def open_realsense(self, serial):
        import pyrealsense2 as rs

        pipeline, config = rs.pipeline(), rs.config()
        config.enable_device(serial)
        config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
        pipeline.start(config)
        return lambda: np.asanyarray(pipeline.wait_for_frames(1000).get_color_frame().get_data()), pipeline.stop

    def watch(self):
        number, last = 0, None
        while self.open:
            try:
                image = self.grab()
            except RuntimeError:  # librealsense: no frame came; the next may, and until then the last one ages
                image = None
            if image is None:
                time.sleep(0.01)
            elif last is None or not np.array_equal(image, last):
                number, last = number + 1, image.copy()
                with self.lock:
                    self.newest = last, number, time.monotonic()
        self.release()

    def read(self, width, height):
        with self.lock:
            newest = self.newest
        if newest is None:
            raise Fault(f"the camera {self.name} gives no pictures: is it plugged in, and used by nothing else?")
        image, number, at = newest
        return shrink(image, width, height), number, time.monotonic() - at

    def close(self):
        self.open = False


def shrink(image, width, height):
    """The middle of a picture, as much as has the proportions asked for, averaged down to (height, width, 3)."""
    H, W, _ = image.shape
    h, w = min(H, W * height // width), min(W, H * width // height)
    y, x = (H - h) // 2, (W - w) // 2
    return np.asarray(Image.fromarray(image[y : y + h, x : x + w]).resize((width, height), Image.Resampling.BOX))


# ----------------------------------------------------------------------------------------------------------------------
# People and judges


class Sim:
    """The simulated robot's operator and judge: both are routes of its server."""

    def __init__(self, link, timeout):
        self.link, self.timeout = link, timeout

    def prepare(self, robot, seed):
        self.link.post("sim/reset", {"task": robot.task, "seed": seed}, self.timeout)

    def look(self):
        return self.link.json("sim/look", timeout=self.timeout)

    def success(self, robot, picture):
        return self.look()["success"]


class Keyboard:
    """A person at the terminal."""

    HELP = (
        "space: stop   y: it succeeded   n: it did not   c: take over, and again to give back; then "
        "w s a d: away, back, left, right   r f: up, down   q e: turn   o k: open, close"
    )
    MOVES = {"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1), "q": (5, 1), "e": (5, -1)}

    def __init__(self, terminal="/dev/tty"):
        import termios
        import tty

        try:  # not stdin: an environment's process has none
            self.terminal = open(terminal, "rb+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise Refusal("keys need a terminal: start this from one, or set ROBOT_REWARD to a classifier") from error
        self.before, self.restore = termios.tcgetattr(self.terminal), termios.tcsetattr
        tty.setcbreak(self.terminal)
        self.driving, self.gripper = False, 1.0
        self.say(self.HELP)

    def say(self, sentence):
        self.terminal.write(f"\r\n{sentence} ".encode())

    def keys(self):
        """What has been typed since the last time."""
        typed = ""
        while select.select([self.terminal], [], [], 0)[0]:
            typed += self.terminal.read(1).decode(errors="ignore")
        return typed

    def ask(self, sentence):
        """Wait for Enter."""
        self.keys()
        self.say(f"{sentence} [Enter]")
        while self.terminal.read(1) not in (b"\n", b"\r"):
            pass

    def action(self, typed, gripper):
        """The person's action (7,), or None while the policy has the arm. gripper: what it was told last, 1 to open, -1
        to close; so it stays until the person says otherwise."""
        if "c" in typed:
            self.driving, self.gripper = not self.driving, gripper
        if not self.driving:
            return None
        action = np.zeros(7, np.float32)
        for key in typed:
            if key in self.MOVES:
                axis, sign = self.MOVES[key]
                action[axis] = 0.5 * sign
        self.gripper = 1.0 if "o" in typed else -1.0 if "k" in typed else self.gripper
        action[6] = self.gripper
        return action

    def close(self):
        import termios

        self.restore(self.terminal, termios.TCSADRAIN, self.before)
        self.terminal.close()


class SpaceMouse:
    """Takes over while it is pushed; its buttons close and open. Needs pyspacemouse."""

    def __init__(self):
        try:
            import pyspacemouse
        except ImportError as error:
            raise Refusal(f"ROBOT_TAKEOVER=spacemouse needs {error.name}: pip install it") from error
        try:
            self.mouse = pyspacemouse.open()
        except Exception as error:  # noqa: BLE001  whatever the driver raises
            raise Refusal(f"no SpaceMouse ({error}): plug it in, or unset ROBOT_TAKEOVER") from error
        if self.mouse is None:
            raise Refusal("no SpaceMouse: plug it in, or unset ROBOT_TAKEOVER")
        self.gripper, self.driving, self.newest = 1.0, False, self.mouse.read()
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        """Read every report as it comes. They queue up: read once a decision, they would move the arm for seconds after
        the hand has let go."""
        while True:
            try:
                self.newest = self.mouse.read()
            except Exception:  # noqa: BLE001  unplugged
                self.newest = None
                return
            time.sleep(0.001)

    def action(self, typed, gripper):
        """As Keyboard's. Raises Fault when the SpaceMouse is gone."""
        if (s := self.newest) is None:
            raise Fault("the SpaceMouse does not answer", person=True)
        move = np.array([-s.y, s.x, s.z, -s.roll, -s.pitch, -s.yaw], np.float32)  # to the base's axes, as in SERL
        before, self.driving = self.driving, np.linalg.norm(move) >= 0.05 or any(s.buttons)
        if not self.driving:
            return None
        self.gripper = self.gripper if before else gripper
        self.gripper = -1.0 if s.buttons[0] else 1.0 if s.buttons[-1] else self.gripper
        return np.append(move.clip(-1, 1), np.float32(self.gripper))


def judge_net():
    """A small image classifier: (B, 3, H, W) in [0, 1] to a logit (B, 1)."""
    layers = []
    for i, o in ((3, 16), (16, 32), (32, 64)):
        layers += [torch.nn.Conv2d(i, o, 3, stride=2, padding=1), torch.nn.GroupNorm(4, o), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(1024, 1))


class Classifier:
    """Success by a trained image classifier: surely so in two pictures running, with the hand off the table."""

    SURE, HEIGHT = 0.9, 0.05  # probability; m above the floor of the robot's box

    def __init__(self, path):
        tensors, _ = read_tensors(path)
        self.net, self.before = judge_net().eval(), False
        try:
            self.net.load_state_dict(tensors)
        except RuntimeError as error:
            raise Refusal(f"{path} is no classifier of real_robot.py: give one, or ROBOT_REWARD=keys") from error

    @torch.no_grad()
    def success(self, robot, picture):
        logit = self.net(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255.0)
        now = bool(logit.sigmoid() > self.SURE) and robot.place[2] > robot.limits.low[2] + self.HEIGHT
        now, self.before = now and self.before, now
        return now


class Person:
    """A real robot's operator: puts the object down, and says by key whether it was grasped, if no classifier does."""

    def __init__(self, setup):
        self.judge = None if setup.reward == "keys" else Classifier(setup.reward)
        mouse = SpaceMouse() if setup.takeover == "spacemouse" else None
        self.keyboard = Keyboard()  # last: what fails before leaves the terminal as it is
        self.driver = self.keyboard if setup.takeover == "keys" else mouse

    judge, typed, late = None, "", ""  # typed before a decision was sent, and since

    def prepare(self, robot, seed):
        if self.judge:
            self.judge.before = False
        if self.driver:
            self.driver.driving = False
        coming = "Hands clear: the gripper opens, and the arm goes home."
        if robot.episodes == 0:
            self.keyboard.ask(coming)
        else:  # the person knows: time for the space bar
            self.keyboard.say(coming)
            for _ in range(20):
                self.watch()
                time.sleep(0.1)
        robot.go_home()
        self.keyboard.ask(f"Place the object for {robot.task!r} and step back.")
        self.typed = self.late = ""

    def watch(self):
        """Read what was typed. Raises Fault when told to stop."""
        self.typed, self.late = self.late + self.keyboard.keys(), ""
        self.mind(self.typed)

    def mind(self, typed):
        if " " in typed:
            self.late = ""
            raise Fault("the operator stopped the arm", person=True)

    def action(self, robot):
        """What the person wants done instead of the policy's action, or None. Raises Fault when told to stop."""
        self.watch()
        return self.driver.action(self.typed, 1.0 if robot.gripper == "open" else -1.0) if self.driver else None

    def told(self, key):
        return key in self.typed + self.late

    def success(self, robot, picture):
        """Did the person say so, or the judge? Raises Fault when told to stop."""
        self.late += self.keyboard.keys()  # another key than y and n is the next decision's
        self.mind(self.late)
        return self.told("y") or bool(self.judge and self.judge.success(robot, picture))


# ----------------------------------------------------------------------------------------------------------------------
# The environment


class Panda(gym.Env):
    """One task on a Panda. Observation (image_size, image_size, 3) uint8: the front camera's view above the wrist's.
    Action (7,) in [-1, 1]: the hand's motion x, y, z (Limits.step) and rotation vector (Limits.turn) in the base frame
    from where it is measured to be; and the gripper: -0.5 and less closes it, 0.5 and more opens it.

    A Fault ends the episode: truncated, and info["fault"] says what it was. info["executed"] is the action that was
    done, which is another one than was asked for while a person has taken over.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, setup, task, image_size=64, horizon=60, limits=None, at_close=None):
        """Raises Refusal when there is no robot server, or when somebody else drives its robot."""
        self.setup, self.task, self.image_size, self.horizon = setup, task, image_size, horizon
        self.link, self.cameras, self.scene, self.at_close = Link(setup.url, bool(setup.dry)), [], None, at_close
        self.render_mode, self.state, self.picture = "rgb_array", None, None
        self.episodes, self.overruns, self.periods = 0, 0, []
        self.begin()
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
        host, port = self.link.connection.host, self.link.connection.port
        with contextlib.suppress(OSError):
            host = socket.gethostbyname(host)  # a robot is one by whatever name
        path = Path(tempfile.gettempdir(), f"robot-{urllib.parse.quote(f'{host}:{port}', '')}.lock")
        with contextlib.ExitStack() as undo:
            self.lock = undo.enter_context(open(path, "w"))
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refusal(f"another process drives the robot at {setup.url}: end it, or use --envs 1") from error
            undo.callback(self.close)
            try:
                simulated = self.link.json("sim/info", timeout=30)
            except Fault as fault:
                if " 404 " not in str(fault):  # a real robot server's answer
                    raise Refusal(f"{fault}: start the robot server, or set ROBOT_URL") from fault
                if "sim" in (setup.reward, setup.front[:3], setup.wrist[:3]):
                    raise Refusal(
                        f"{setup.url} is a real robot: set ROBOT_FRONT, ROBOT_WRIST and ROBOT_REWARD, see class Setup"
                    ) from fault
                simulated = {}
            self.simulated = bool(simulated)
            self.lockstep = simulated.get("clock") == "lockstep"  # then nothing here may depend on real time
            limits = limits or Limits()
            self.limits = limits = replace(limits, read=60.0, slow=600.0) if self.lockstep else limits
            for spec in (setup.front, setup.wrist):
                self.cameras.append(open_camera(spec, self.link, limits))
            self.scene = Sim(self.link, max(limits.read, 10.0)) if setup.reward == "sim" else Person(setup)
            undo.pop_all()
        if not self.lockstep and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `close` is reached: training ends so

    def begin(self):
        """Forget the last episode."""
        self.fault, self.target, self.still, self.decisions = None, None, 0, 0
        self.gripper, self.gripped, self.opening_then = "open", -1000, 0.0
        self.tick = self.woke = time.monotonic()

    # --- what is commanded

    def command(self, place, turn):
        """The only place from which a pose is sent: (place (3,), Rotation)."""
        pose = [*map(float, place), *map(float, turn.as_quat())]
        if not np.isfinite(pose).all():
            raise Fault(f"a pose that is not finite was about to be sent: {pose}")
        self.target = place, turn
        self.link.post("pose", {"arr": pose}, self.limits.read, tries=2)

    def hold(self):
        """Stop: command the pose where the arm is, as far as that can be measured and told. Never raises a Fault."""
        for _ in range(2):
            with contextlib.suppress(Fault):  # then where it was last seen, a decision ago
                self.state = parse(self.link.json("getstate", timeout=self.limits.read))
            if self.state is None:
                return "nothing was sent to the arm, for where it is could not be read"
            try:
                self.command(self.place, self.turn)
                return HELD
            except Fault:
                continue
        return "the arm could not be told to hold: it keeps to its last target, at most a step away"

    def grip(self, wish):
        """Open or close the gripper if the action's last number says so, it is not so already, and it has had time."""
        want = "open" if wish >= 0.5 else "close" if wish <= -0.5 else self.gripper
        if want == self.gripper or self.decisions - self.gripped < self.limits.gripper_rest:
            return
        self.gripper, self.gripped, self.opening_then = want, self.decisions, self.opening
        self.link.post(f"{want}_gripper", timeout=self.limits.read)

    # --- what is measured

    @property
    def place(self):
        return self.state["pose"][:3]

    @property
    def turn(self):
        return Rotation.from_quat(self.state["pose"][3:])

    @property
    def opening(self):
        """Of the gripper, 1 open to 0 closed."""
        return OPENING[self.setup.gripper](self.state["gripper_pos"])

    def measure(self):
        """Read the state and judge it. Raises Fault for whatever must not go on."""
        limits, before = self.limits, self.state
        state = self.state = parse(self.link.json("getstate", timeout=limits.read))
        outside = np.maximum(np.subtract(limits.low, self.place), np.subtract(self.place, limits.high)).max()
        if outside > limits.outside:
            raise Fault(f"the hand is {outside:.3f} m outside its box, at {self.place.round(3)}", astray=True)
        v = np.abs((self.turn * DOWN.inv()).as_rotvec())
        if math.hypot(v[0], v[1]) > limits.tilt + limits.beyond or v[2] > limits.yaw + limits.beyond:
            raise Fault(f"the hand is turned out of its window: rotation vector {v.round(2)} from down", astray=True)
        room = np.minimum(state["q"] - limits.q_min, limits.q_max - state["q"])
        if room.min() < limits.q_margin:
            raise Fault(f"joint {room.argmin() + 1} is {room.min():.2f} rad from its limit", astray=True)
        if (force := np.linalg.norm(state["force"])) > limits.force:
            raise Fault(f"the hand is pushed with {force:.0f} N", astray=True)
        if (speed := np.linalg.norm(state["vel"][:3])) > limits.speed:
            raise Fault(f"the hand moves at {speed:.2f} m/s", astray=True)
        # An arm that was told to go on, meets nothing and stands still: braked by a reflex or the user stop, or the
        # state is an old one. The server says no more, so a person must.
        far = np.linalg.norm(self.target[0] - self.place) > 0.01 if self.target else False
        moved = before is None or np.linalg.norm(self.place - before["pose"][:3]) > 0.001
        same = before is not None and np.array_equal(state["q"], before["q"])  # no sensor is ever so still
        free = force < limits.meets or same
        self.still = self.still + 1 if far and not moved and free and not self.link.dry else 0
        if self.still >= limits.still:
            why = "and its state never changes: is the robot's state topic dead" if same else "a reflex, the user stop"
            raise Fault(f"the arm does not follow its commands ({why}?)", person=True)
        there = self.opening > 0.9 if self.gripper == "open" else self.opening < 0.1
        stuck = not there and abs(self.opening - self.opening_then) < 0.05
        if stuck and self.decisions - self.gripped == limits.grip and not self.link.dry:
            raise Fault(f"the gripper was told to {self.gripper} and has not moved", person=True)

    def look(self):
        """Both cameras' picture, (image_size, image_size, 3) uint8. Raises Fault for pictures that are old."""
        width, top = self.image_size, self.image_size // 2
        views = []
        for i, (camera, height) in enumerate(zip(self.cameras, (top, width - top))):
            image, number, age = camera.read(width, height)
            if age > self.limits.frame_age:
                raise Fault(f"the {('front', 'wrist')[i]} camera's newest picture is {age:.1f} s old")
            views.append(image)
        self.picture = np.vstack(views)
        return self.picture

    # --- time

    def wait(self):
        """Until the next tick of a 10 Hz schedule, so that small delays do not add up. A decision that comes after its
        tick begins the schedule anew: a shorter period after it would leave the arm less time."""
        if self.lockstep:
            return
        now = time.monotonic()
        self.tick += PERIOD
        if now > self.tick:
            self.overruns += 1
            self.tick = now
        time.sleep(max(0.0, self.tick - now))
        self.periods.append(time.monotonic() - self.woke)
        self.woke = time.monotonic()

    # --- gymnasium

    def reset(self, *, seed=None, options=None):
        """In simulation the seed alone decides the initial state; a person places the object otherwise.

        Raises Refusal when a person is needed and none is there, or when it cannot be made to work.
        """
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        for left in (1, 0):
            try:
                if self.fault and self.fault.person:
                    self.release()
                self.begin()
                if isinstance(self.scene, Person):
                    self.hold()  # before it is made stiffer: another program's last target may still be pulling
                self.link.post("update_param", self.limits.compliance, self.limits.read, tries=2)
                self.scene.prepare(self, seed)
                self.begin()
                self.measure()
                return self.look(), {}
            except Fault as fault:
                self.fault = fault
                held = self.hold()
                if not left or fault.person and not isinstance(self.scene, Person):
                    raise Refusal(f"{fault}; {held}: see to it, then give the same command again") from fault
                time.sleep(0.5)

    def release(self):
        """After a Fault that a person must see to: their word, then hold, and only then clear the robot's errors, for
        an arm whose errors are cleared makes for its last target."""
        if self.fault.astray and isinstance(self.scene, Sim):
            return
        if not isinstance(self.scene, Person):
            raise Refusal(f"{self.fault}: see to the robot, then give the same command again")
        self.scene.keyboard.ask(f"{self.fault}. Make the robot safe and ready; what it holds will fall.")
        self.state = None  # the arm may have been moved meanwhile: only a pose that is measured now is held
        if (held := self.hold()) != HELD:
            raise Fault(f"{held}; so its errors were not cleared", person=True)
        self.link.post("clearerr", timeout=self.limits.read)
        self.hold()

    def step(self, action):
        """Raises ValueError, and holds the arm, if the action is not 7 finite numbers."""
        action = np.asarray(action, np.float32)
        if action.shape != (7,) or not np.isfinite(action).all():
            self.hold()
            raise ValueError(f"an action is 7 finite numbers, not {action}")
        executed, success, info = action.clip(-1, 1), False, {}
        try:
            if not self.lockstep and time.monotonic() - self.woke > 2 * PERIOD:
                self.measure()  # the policy, or training, took its time: the pose is an old one
            if isinstance(self.scene, Person) and (driven := self.scene.action(self)) is not None:
                executed = driven
            self.grip(executed[6])
            self.command(*self.limits.aim(executed, self.place, self.turn))
            self.decisions += 1
            self.wait()
            self.measure()
            picture = self.look()
            success = self.scene.success(self, picture)
        except Fault as fault:
            self.fault, picture, held = fault, self.picture, self.hold()
            info["fault"] = f"{fault}; {held}"
        over = self.decisions >= self.horizon or self.fault is not None
        if isinstance(self.scene, Person) and (success or over or self.scene.told("n")):
            self.hold()
            over = True
        info |= {"success": success, "executed": executed}
        return picture, float(success), success, over and not success, info

    def render(self):
        """Both views, larger; for videos and for people."""
        return np.vstack([camera.read(480, 240)[0] for camera in self.cameras])

    def close(self):
        """Also holds the arm: so Ctrl-C and SIGTERM stop it. Prints how well the decisions kept time."""
        if self.target is not None:
            with undisturbed():
                self.hold()
        late = np.abs(np.array(self.periods) - PERIOD)
        if len(late):
            print(f"{(late < 0.005).mean():.1%} of {len(late)} periods within 5 ms of 0.1 s; {self.overruns} overruns")
            self.periods = []
        for camera in self.cameras:
            camera.close()
        if isinstance(self.scene, Person):
            self.scene.keyboard.close()
        self.link.close()
        if not self.lock.closed:
            self.lock.close()
            if self.at_close:
                self.at_close()

    # --- getting back to the start of an episode

    def go_home(self):
        """Open the gripper, lift the hand, and bring it to the start, every target clipped as a policy's is."""
        limits = self.limits
        self.measure()
        self.command(self.place, self.turn)  # from here on
        self.link.post("open_gripper", timeout=limits.read)
        self.travel(np.array([*self.place[:2], max(self.place[2], limits.home[2])]), self.turn)
        self.episodes += 1
        if self.episodes % limits.reset_every == 0:
            self.reset_joints()
        if not self.travel(np.array(limits.home), DOWN):
            self.reset_joints()  # another elbow
            if not self.travel(np.array(limits.home), DOWN):
                raise Fault(f"the hand does not come to its start: it is at {self.place.round(3)}", person=True)
        if self.opening < 0.25 and not self.link.dry:  # a Robotiq opens only so far that 0.3 is said
            raise Fault("the gripper was told to open and is shut", person=True)

    def travel(self, place, turn):
        """Go straight to a pose at half a step a decision, turning on the way. Did the hand arrive?"""
        limits = self.limits
        begin, turned = self.place, self.turn
        way, turning = place - begin, (turn * turned.inv()).as_rotvec()
        n = math.ceil(max(np.abs(way).max() / (limits.step / 2), np.abs(turning).max() / (limits.turn / 2), 1))
        for i in range(1, n + 20):  # the arm lags: up to two seconds more
            if isinstance(self.scene, Person):
                self.scene.watch()
            share = min(1.0, i / n)
            aim = begin + share * way, Rotation.from_rotvec(share * turning) * turned
            self.command(*limits.clip(*aim, self.place, self.turn))
            self.decisions += 1
            self.wait()
            self.measure()
            if self.link.dry:
                return True
            off = np.linalg.norm(place - self.place), np.linalg.norm((turn * self.turn.inv()).as_rotvec())
            if off[0] < 0.015 and off[1] < 0.1:
                return True
        return False

    def reset_joints(self):
        """/jointreset takes about 20 s, sets the compliance back, and says the same whether it worked or not."""
        if isinstance(self.scene, Person):
            self.scene.keyboard.ask(
                "Clear the arm's way: all joints move, for 20 s, no limit is watched, and only the user stop ends it."
            )
        with undisturbed():  # a hold in the middle would do nothing, and nobody would be there at the end
            self.link.post("jointreset", timeout=self.limits.slow)
        self.link.post("update_param", self.limits.compliance, self.limits.read, tries=2)
        self.tick, self.target = time.monotonic(), None
        self.measure()
        if self.link.dry:
            return
        if (off := np.abs(self.state["q"] - self.limits.reset_q).max()) > 0.05:
            raise Fault(f"the joint reset answered, but a joint is {off:.2f} rad from its target", person=True)


@contextlib.contextmanager
def undisturbed():
    """Neither Ctrl-C nor SIGTERM ends what is done in here."""
    mine = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM) if mine}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def open_camera(spec, link, limits):
    kind, _, name = spec.partition(":")
    if kind == "sim":
        return SimCamera(name, link, max(limits.read, 5.0))
    if kind not in ("opencv", "realsense"):
        raise Refusal(f"unknown camera {spec!r}: known are opencv:<index>, realsense:<serial number>, sim:<name>")
    try:
        return Camera(kind, name)
    except ImportError as error:
        raise Refusal(f"the camera {spec!r} needs {error.name}: pip install it on the robot's computer") from error
    except RuntimeError as error:  # librealsense's
        raise Refusal(
            f"the camera {spec!r} does not open ({error}): is it plugged in, and the number right?"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# The experiment's steps


def check():
    """Is everything there and sane? Moves nothing."""
    domain, setup = load_domain("panda"), Setup.from_environment()
    print(setup)
    env = domain.make(domain.EXPERT_TASKS[0])
    try:
        print(f"robot server   {env.setup.url} answers")
        env.measure()
        print(f"state          finite, inside every limit; hand at {env.place.round(3)} m")
        if (force := np.linalg.norm(env.state["force"])) > env.limits.meets:
            raise Refusal(
                f"the resting hand reports {force:.1f} N, so that a reflex would go unnoticed: free the hand, or set "
                f"the end effector's mass in Desk"
            )
        print(f"force          {force:.1f} N")
        raw, likely = env.state["gripper_pos"], convention(env.state["gripper_pos"])
        if setup.gripper not in likely:
            raise Refusal(
                f"gripper_pos is {raw}, not as {setup.gripper} counts: set ROBOT_GRIPPER, perhaps {likely[0]}"
            )
        print(f"gripper        {raw} is {env.opening:.0%} open as {setup.gripper} counts; look whether that is true")
        seen = {}
        for name, camera in zip(("front", "wrist"), env.cameras):
            first = camera.read(64, 32)
            time.sleep(0.3)
            image, number, age = camera.read(64, 32)
            if age > env.limits.frame_age or number == first[1]:
                raise Refusal(f"the {name} camera is frozen: its picture is {age:.1f} s old; plug it in again")
            if image.std() < 5:
                raise Refusal(f"the {name} camera sees nothing but one colour: uncover it, or mend its exposure")
            seen[name] = image
            print(f"{name} camera   {age * 1000:.0f} ms old, mean brightness {image.mean():.0f}")
        if np.array_equal(seen["front"], seen["wrist"]):
            raise Refusal("both cameras show the same picture: give ROBOT_FRONT and ROBOT_WRIST different ones")
    except Fault as fault:
        raise Refusal(f"{fault}: see to it, then check again") from fault
    finally:
        env.close()
    print("ready. Nothing was moved.")


def convention(gripper_pos):
    """Which grippers could say this number, the likeliest first."""
    if gripper_pos > 1.1:
        return ["robotiq"]
    return ["serl", "hil-serl", "robotiq"] if gripper_pos < 0.1 else ["hil-serl"]


def play(env, vla, instruction, seed, std=0.0):
    """One episode of the policy, a person taking over at will: (what data.write_episode wants, success, fault). std: of
    SACfD's exploration; 0: greedy. What is stored is what was executed."""
    obs, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    images, actions, rewards, over = [], [], [], False
    while not over:
        with torch.no_grad():
            h, mask = vla.encode(obs[None], [instruction])
            action = vla.act(h.float(), mask).cpu()  # (1, A)
            if not torch.isfinite(action).all():
                raise Refusal(NO_POLICY)
            if std:
                noise = torch.from_numpy(rng.normal(size=action.shape)).float()
                action = squashed(action, torch.tensor(std).log(), noise)[0]
        images.append(obs)
        obs, reward, success, cut, info = env.step(action[0].clamp(-1, 1).numpy())
        actions.append(info["executed"])
        rewards.append(reward)
        over = success or cut
    protocol = load_domain("panda").PROTOCOL if env.simulated else None  # a real robot's cameras are its owner's
    return {"image": images, "action": actions, "reward": rewards, "protocol": protocol}, success, info.get("fault")


def rollouts(checkpoint, task, frames, seeds, std=0.0):
    """Plays one episode for each seed: yields (seed, episode, success), or (seed, None, False) where a Fault ended it.

    frames: a folder to sort the episodes' last pictures into, for training a classifier; or nothing.
    """
    domain = load_domain("panda")
    vla = VLA.load(checkpoint, "panda", pick_device())
    torch.set_num_threads(1)
    print(Setup.from_environment())
    env = domain.make(task, vla.config["image_size"])
    try:
        for seed in seeds:
            episode, success, fault = play(env, vla, domain.INSTRUCTIONS[task], seed, std)
            if fault:
                print(f"  {seed}: discarded: {fault}", flush=True)
                yield seed, None, False
                continue
            outcome = "success" if success else "no success"
            print(f"  {seed}: {outcome} after {len(episode['reward'])} decisions", flush=True)
            if frames:
                path = Path(frames, "success" if success else "failure", f"{task}-{seed}.png")
                with whole(path) as tmp:
                    Image.fromarray(env.picture).save(tmp, "png")
            yield seed, episode, success
    finally:
        env.close()


def collect(checkpoint: str, task: str, out: str, successes: int = 20, frames: str = "", std: float = 0.0):
    """Play the zero-shot policy until it has succeeded 20 times, and keep those episodes.

    Args:
        checkpoint: the policy's folder.
        task: a task of domains/panda.py.
        out: the episodes' folder, e.g. runs/panda/D_rl/pick-eggplant; what it holds already counts.
        successes: successful episodes wanted.
        frames: also sort each episode's last picture into this folder, for the classifier.
        std: deviation of the exploration, in units of the action range; 0: greedy. A policy that hesitates stands still
            for ever unless it explores; in simulation SACfD's attempts take 0.25.
    """
    domain, out = load_domain("panda"), Path(out)
    first = max(attempts(out), default=-1) + 1
    have, seeds = len(attempts(out)), range(ONLINE_SEED + first, ONLINE_SEED + first + 20 * successes)
    if have >= successes:
        return print(f"{out} holds {have} successes already")
    for seed, episode, success in rollouts(checkpoint, task, frames, seeds, std):
        if success:
            write_episode(
                out / f"{seed - ONLINE_SEED:06d}.safetensors", **episode, domain="panda", task=task,
                instruction=domain.INSTRUCTIONS[task], source="online", seed=seed, executed=True,
            )  # fmt: skip
            have += 1
            print(f"{have} of {successes} successes in {out}", flush=True)
        if have >= successes:
            return
    raise Refusal(f"{have} successes in {len(seeds)} attempts: RL needs some to start from; train the policy longer")


def train(checkpoint: str, task: str, out: str):
    """SACfD on the robot: stage 1 of stage_rl.py with one environment, from the successes that `collect` has put into
    D_rl/<task> beside `out`. It evaluates nothing and collects nothing: those commands do.

    Args:
        checkpoint: the policy to start from.
        task: a task of domains/panda.py.
        out: the checkpoint to write.
    """
    import stage_rl

    print(Setup.from_environment())
    folder = Path(out).parent / "D_rl" / task
    if (have := len(executed(folder))) < SACfD.demos:
        raise Refusal(f"{folder} holds {have} of the {SACfD.demos} successes that RL starts from: collect them first")
    stage_rl.story(stage_rl.Args(
        task=task, parent=checkpoint, out=out, domain="panda", algo="sacfd", envs=1, successes=0, episodes=0,
    ))  # fmt: skip


def evaluate(checkpoint: str, task: str, episodes: int = 25, out: str = ""):
    """Success of the greedy policy. Episodes that a Fault ended are not counted; others are played in their place.

    Args:
        checkpoint: the policy's folder.
        task: a task of domains/panda.py.
        episodes: how many to count.
        out: a JSON file for the outcomes, written after each; given again, the same command goes on from there.
    """
    outcomes, about = [], {"checkpoint": checkpoint, "task": task}
    if out and Path(out).exists():
        old = read_json(out)
        outcomes = old.pop("outcomes", None)
        if old != about:
            raise Refusal(f"{out} is of another evaluation ({old}): name another file, or remove it")
    first = max((row["seed"] + 1 for row in outcomes), default=EVAL_SEED)
    left = range(first, first + 3 * (episodes - len(outcomes)))
    for seed, episode, success in rollouts(checkpoint, task, "", left) if left else []:
        if episode is not None:
            outcomes.append({"seed": seed, "success": int(success), "decisions": len(episode["reward"])})
            if out:
                write_json(out, about | {"outcomes": outcomes})
        if len(outcomes) >= episodes:
            break
    k, n = sum(row["success"] for row in outcomes), len(outcomes)
    low, high = wilson(k, n)
    print(f"{task}: {k / max(n, 1):.2f} [{low:.2f}, {high:.2f}] ({k}/{n})")


def classifier(frames: str, out: str, steps: int = 500):
    """Train the image classifier that gives the reward, from frames/success/*.png and frames/failure/*.png.

    Args:
        frames: the folder; a few hundred pictures, twice as many failures, and look through them first.
        out: the classifier's file, for ROBOT_REWARD.
        steps: optimizer steps of 64 pictures each.
    """
    images, labels = [], []
    for label, name in enumerate(("failure", "success")):
        paths = sorted(Path(frames, name).glob("*.png"))
        if len(paths) < 5:
            raise Refusal(f"{Path(frames, name)} holds {len(paths)} pictures: it needs a few hundred")
        for path in paths:
            images.append(np.asarray(Image.open(path).convert("RGB")))
            if images[-1].shape != images[0].shape:
                raise Refusal(
                    f"{path} is of another size than the others: give pictures as collect --frames makes them"
                )
        labels += [label] * len(paths)
    torch.manual_seed(0)
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255.0  # (N, 3, H, W)
    y = torch.tensor(labels, dtype=torch.float32)[:, None]
    held_out = torch.randperm(len(x)) % 5 == 0
    net, (train_x, train_y) = judge_net(), (x[~held_out], y[~held_out])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        b = torch.cat([torch.multinomial((train_y[:, 0] == label).float(), 32, replacement=True) for label in (0, 1)])
        dy, dx = torch.randint(-4, 5, (2,)).tolist()
        picture = torch.roll(train_x[b], (dy, dx), (2, 3)) * (0.7 + 0.6 * torch.rand(len(b), 1, 1, 1))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(picture), train_y[b])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sure = net.eval()(x[held_out]).sigmoid() > Classifier.SURE
    truth = y[held_out] > 0
    false, missed = int((sure & ~truth).sum()), int((~sure & truth).sum())
    with whole(out) as tmp:
        save_file(net.state_dict(), tmp)
    print(f"{out}: of {len(truth)} held-out pictures {false} false successes, {missed} missed")


COMMANDS = {"check": check, "collect": collect, "train": train, "evaluate": evaluate, "classifier": classifier}

if __name__ == "__main__":
    main(lambda _: tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__), None)
