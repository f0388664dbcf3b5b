"""What the robot's tests share: simulated servers, a client that orders faults, stand-ins for parts of a robot."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from common.errors import UserError
from robot.clock import LockstepClock
from robot.env import PandaEnv
from robot.limits import DOWN, Limits
from robot.operator import HumanOperator, Keyboard
from robot.server import RobotConfig, RobotServer, parse_state
from robot.sim.process import SimProcess
from robot.sim.server import FAULTS, SimServer

ROOT = Path(__file__).parent.parent
LIMITS = Limits()
FORWARD = np.array([0.4, 0, 0, 0, 0, 0, 1], np.float32)
CLOSE = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


def refused(function, *args, **kwargs) -> str:
    """The message of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def drive(env, action, steps):
    """Steps until the episode ends: (steps made, what the last step returned)."""
    for k in range(steps):
        result = env.step(action)
        if result[2] or result[3]:
            return k + 1, result
    return steps, result


class Client(RobotServer):
    """A client that can also order faults."""

    def order(self, kind, value=1):
        self.post("sim/fault", {"kind": kind, "value": value})


@contextlib.contextmanager
def lockstep_process():
    """The URL of a lock-step server that takes orders for faults, in a process of its own."""
    child = SimProcess()
    try:
        yield child.url
    finally:
        child.close()


@contextlib.contextmanager
def connected(url, monkeypatch):
    """A client of the server, without any fault left from before, and ROBOT_URL set to it."""
    monkeypatch.setenv("ROBOT_URL", url)
    client = Client(url)
    for kind in FAULTS:
        client.order(kind, 0)
    client.post("clearerr")
    yield client
    client.close()


@contextlib.contextmanager
def realtime(gripper="serl"):
    """A real-time server in a thread of this process: (server, client)."""
    server = SimServer(port=0, clock="realtime", gripper=gripper, faults=True)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not hasattr(server, "world"):
        time.sleep(0.02)
    client = Client(server.url)
    try:
        yield server, client
    finally:
        client.close()
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(handler):
    """The URL of an HTTP server of this process, while it is needed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def start(*command, **env):
    """A Python command of the project, as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
    )


def default_signals():
    """Ctrl-C as a shell's child gets it; pytest-xdist's workers ignore it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------------------------
# Stand-ins


class Recorder:
    """Stands in for RobotServer: a robot of the wildest states, that keeps every pose it is sent."""

    dry = False
    url = "stub"

    def __init__(self, rng):
        self.rng = rng
        self.poses = []
        self.width = 0.08

    def post(self, route, body=None, timeout=0.25, tries=1):
        if route == "pose":
            json.dumps(body, allow_nan=False)
            self.poses.append((np.array(body["arr"]), self.pose))
        self.width = {"open_gripper": 0.08, "close_gripper": 0.0}.get(route, self.width)

    def answer(self):
        rng = self.rng
        low = np.array(LIMITS.low)
        high = np.array(LIMITS.high)
        place = rng.uniform(low - 0.029, high + 0.029)  # as far out as is not a fault yet
        tilt = rng.uniform(0, LIMITS.tilt + 0.2) * Rotation.from_rotvec(
            [0, 0, rng.uniform(-4, 4)]
        ).apply([1, 0, 0])
        yaw = rng.uniform(-LIMITS.yaw - 0.2, LIMITS.yaw + 0.2)
        turn = Rotation.from_rotvec(tilt) * Rotation.from_rotvec([0, 0, yaw]) * DOWN
        self.pose = np.array([*place, *(turn.as_quat() * rng.choice([-1, 1]))])
        return {**calm(), "pose": [*self.pose], "gripper_pos": self.width}

    def get_state(self, timeout=0.25):
        return parse_state(self.answer())

    def close(self):
        pass


def calm():
    """/getstate's answer of a robot at rest, inside every limit."""
    q = (np.array(LIMITS.q_min) + LIMITS.q_max) / 2
    zero = {"vel": [0] * 6, "force": [0] * 3, "torque": [0] * 3, "dq": [0] * 7}
    return {"pose": [0.5, 0, 0.2, 1, 0, 0, 0], "q": [*q], "gripper_pos": 0.08, **zero}


class NoCamera:
    def read(self, width, height):
        return np.zeros((height, width, 3), np.uint8), 0, 0.0

    def close(self):
        pass


class NoOperator:
    """Nobody is there, and nothing puts the arm back."""

    asks = resets_arm = False

    def prepare(self, robot, seed, reason=""):
        pass

    def watch(self):
        pass

    def action(self, robot):
        return None

    def success(self, robot, image):
        return False

    def ended(self):
        return False

    def confirm(self, message):
        pass

    def close(self):
        pass


def unlinked(server, **changes):
    """A PandaEnv whose server, cameras and operator are stand-ins."""
    env = PandaEnv.__new__(PandaEnv)
    env.config = RobotConfig()
    env.task = "t"
    env.image_size = 8
    env.horizon = 10**9
    env.limits = LIMITS
    env.server = server
    env.cameras = [NoCamera()] * 2
    env.operator = NoOperator()
    env.clock = LockstepClock()
    env.cleanup = contextlib.ExitStack()
    env.signals = contextlib.ExitStack()
    env.episodes = 0
    env.state = env.image = None
    env.commanded = env.controller_lost = False
    for name, value in changes.items():
        setattr(env, name, value)
    env.begin_episode()
    return env


class FakeKeyboard(Keyboard):
    """A keyboard without a terminal: `typed` holds the keys of the next readings, `asked` the prompts."""

    def __init__(self, typed=()):
        self.driving = False
        self.gripper = 1.0
        self.typed = list(typed)
        self.asked = []
        self.said = []
        self.answers = []  # keys typed before Enter

    def keys(self):
        return self.typed.pop(0) if self.typed else ""

    def ask(self, message):
        self.asked.append(message)
        return self.answers.pop(0) if self.answers else ""

    def say(self, message):
        self.said.append(message)

    def close(self):
        pass


def human(typed=(), drives=True):
    """A HumanOperator with a FakeKeyboard."""
    operator = HumanOperator.__new__(HumanOperator)
    operator.keyboard = FakeKeyboard(typed)
    operator.driver = operator.keyboard if drives else None
    operator.mouse = None
    return operator


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


def upstream(**script):
    """A handler with this script."""
    return type("Scripted", (Upstream,), {"script": script})
