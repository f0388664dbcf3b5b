"""The client of SERL's robot server: which robot it is, HTTP, and the state that it reports.

Upstream is rail-berkeley/serl and rail-berkeley/hil-serl,
serl_robot_infra/robot_servers/franka_server.py.
"""

import contextlib
import fcntl
import http.client
import json
import os
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from common.errors import UserError
from robot.limits import JOINT_LIMITS, Fault, FaultKind, RobotState

OPENING = {  # ROBOT_GRIPPER: the opening (1 open, 0 closed) that a gripper_pos stands for
    "serl": lambda x: x / 0.08,  # SERL's Franka Hand: metres
    "hil-serl": lambda x: x,  # HIL-SERL's Franka Hand and Robotiq
    "robotiq": lambda x: 1 - x / 255,  # SERL's Robotiq: its raw position, an integer
}
GRIPPER_HINTS = {  # why a gripper may not move
    "serl": "",
    "hil-serl": " (a Robotiq needs /activate_gripper after each start of the robot server)",
    "robotiq": " (it needs /activate_gripper after each start of the robot server)",
}
SHAPES = {"pose": 7, "vel": 6, "force": 3, "torque": 3, "q": 7, "dq": 7}
OFF = ("", "0", "n", "no", "f", "false", "off")


@dataclass(frozen=True)
class RobotConfig:
    """Which robot: each field is the environment variable ROBOT_<NAME>."""

    url: str = ""  # the robot server's address; empty: a simulated robot for each environment
    arm: str = "panda"  # panda or fr3: the joint limits
    gripper: str = (
        "serl"  # unit of gripper_pos: serl (m), hil-serl (1: open), robotiq (255: closed)
    )
    front: str = "sim:front"  # opencv:<index or path>, realsense:<serial number>, sim:<name>
    wrist: str = "sim:wrist"  # wrist camera
    reward: str = "sim"  # keys, the path of a classifier, or sim
    takeover: str = ""  # how an operator takes over: keys, spacemouse, or empty
    dry: str = ""  # 1: print every command and send none

    @classmethod
    def from_environment(cls) -> "RobotConfig":
        """Return the robot that the environment variables describe.

        Raises UserError for an unknown value, and if a robot is described without its address.
        """
        values = {
            f.name: os.environ.get(f"ROBOT_{f.name.upper()}", "").strip() for f in fields(cls)
        }
        config = cls(**{name: value for name, value in values.items() if value})
        described = [name for name, value in values.items() if value]
        if described and not config.url:
            raise UserError(
                f"ROBOT_{described[0].upper()} is set but ROBOT_URL is not: set ROBOT_URL, or unset the other"
            )
        if config.url and not is_address(config.url):
            raise UserError(
                f"ROBOT_URL={config.url} is not a valid address: use one such as http://127.0.0.1:5000/"
            )
        choices = {
            "arm": [*JOINT_LIMITS],
            "gripper": [*OPENING],
            "takeover": ["", "keys", "spacemouse"],
        }
        for name, known in choices.items():
            value = getattr(config, name)
            if value not in known:
                raise UserError(
                    f"unknown ROBOT_{name.upper()} {value!r}: known are {', '.join(filter(None, known))}"
                )
        if config.takeover and config.reward == "sim":
            raise UserError(
                "ROBOT_TAKEOVER needs an operator: set ROBOT_REWARD to keys or to a classifier's file (got sim)"
            )
        return config

    @property
    def is_dry(self) -> bool:
        return self.dry.strip().lower() not in OFF

    def __str__(self) -> str:
        return (
            f"the robot server at {self.url}"
            if self.url
            else "a simulated robot (ROBOT_URL is not set)"
        )


def is_address(url: str) -> bool:
    """Return whether this is http://host[:port][/path] and nothing more."""
    try:
        address = urllib.parse.urlsplit(url)
        extra = address.username or address.query or address.fragment
        return (
            address.scheme == "http" and bool(address.hostname) and address.port != 0 and not extra
        )
    except ValueError:  # the port
        return False


@contextlib.contextmanager
def lock_robot(url: str) -> Iterator[None]:
    """Hold the lock of the robot at `url`. Raises UserError if another process holds it."""
    address = urllib.parse.urlsplit(url)
    host = address.hostname
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host)  # one robot may have several names
    name = urllib.parse.quote(f"{host}:{address.port or 80}{address.path.rstrip('/')}", "")
    with open(Path(tempfile.gettempdir(), f"robot-{name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process drives the robot at {url}: end it, or use --envs 1"
            ) from error
        yield


class RobotServer:
    """One connection to the robot server, kept alive if the server does so. Every failure is a Fault.

    dry: only reads are sent; every command is printed instead.
    """

    READS = ("getstate", "sim/info", "sim/reset", "sim/look", "sim/camera")

    def __init__(self, url: str, dry: bool = False, gripper: str = "serl"):
        address = urllib.parse.urlsplit(url)
        self.url = url
        self.dry = dry
        self.gripper = gripper
        self.prefix = address.path.rstrip("/")
        self.connection = http.client.HTTPConnection(address.hostname, address.port)

    def post(
        self, route: str, body: object = None, timeout: float = 0.25, tries: int = 1
    ) -> tuple[bytes, http.client.HTTPMessage | dict]:
        """Return (content, headers) of the answer to POST /<route>. Use `tries` > 1 only if it may happen twice."""
        data = b"" if body is None else json.dumps(body, allow_nan=False).encode()
        if self.dry and route not in self.READS:
            shown = "" if body is None else json.dumps(rounded(body))
            print(f"  dry run, not sent: /{route} {shown}", flush=True)
            return b"", {}
        headers = {"Content-Type": "application/json"} if data else {}
        for left in reversed(range(tries)):
            try:
                self.connection.timeout = timeout
                if self.connection.sock:
                    self.connection.sock.settimeout(timeout)
                self.connection.request("POST", f"{self.prefix}/{route}", data, headers)
                answer = self.connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.connection.close()
                if not left:
                    raise Fault(
                        f"the link to the robot server at {self.url} is lost (/{route}: {error!r})"
                    ) from error
                continue
            if answer.status == 200:
                return content, answer.headers
            if not left:
                message = f"the robot server answered /{route} with {answer.status} {answer.reason}"
                raise Fault(message, status=answer.status)
        raise ValueError(f"tries must be >= 1 (got {tries})")

    def json(
        self, route: str, body: object = None, timeout: float = 0.25, tries: int = 2
    ) -> object:
        """Return the JSON value of the answer to POST /<route>."""
        content, _ = self.post(route, body, timeout, tries)
        try:
            return json.loads(content)
        except ValueError as error:
            raise Fault(
                f"the robot server's answer to /{route} is not JSON: {content[:60]!r}"
            ) from error

    def get_state(self, timeout: float = 0.25) -> RobotState:
        """Return the robot's present state."""
        try:
            answer = self.json("getstate", timeout=timeout)
        except Fault as fault:
            if fault.status != 500:
                raise
            raise Fault(
                f"{fault}: it has not received a state from the robot yet (is the arm unlocked with FCI on, and the "
                f"impedance controller running?), or it was started with --gripper_type=None, which cannot work",
                status=500,
            ) from fault
        return parse_state(answer, self.gripper)

    def close(self) -> None:
        self.connection.close()


def rounded(value: object) -> object:
    """Return JSON-able data with floats rounded to 4 digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def parse_state(answer: object, gripper: str = "serl") -> RobotState:
    """Return /getstate's answer as a RobotState. Raises Fault if a value is missing, misshapen or not finite."""
    try:
        arrays = {name: np.array(answer[name], float) for name in SHAPES}
        gripper_pos = float(np.squeeze(answer["gripper_pos"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(f"the robot server's state is not in SERL's format ({error!r})") from error
    for name, value in arrays.items():
        if value.shape != (SHAPES[name],):
            raise Fault(f"the robot server's {name} has shape {value.shape}, not ({SHAPES[name]},)")
    for name, value in [*arrays.items(), ("gripper_pos", gripper_pos)]:
        if not np.isfinite(value).all():
            raise Fault(f"the robot server's {name} is not finite: {np.round(value, 3).tolist()}")
    if abs(np.linalg.norm(arrays["pose"][3:]) - 1) > 0.01:
        raise Fault(
            f"the robot server's quaternion is not of length 1: {arrays['pose'][3:].tolist()}"
        )
    return RobotState(**arrays, gripper_pos=gripper_pos, opening=OPENING[gripper](gripper_pos))


def possible_grippers(gripper_pos: float) -> list[str]:
    """Return the values of ROBOT_GRIPPER that could report this number. Several may, near open or closed."""
    possible = []
    if -0.005 <= gripper_pos <= 0.095:
        possible.append("serl")
    if -0.1 <= gripper_pos <= 1.2:
        possible.append("hil-serl")
    if gripper_pos == round(gripper_pos) and 0 <= gripper_pos <= 255:
        possible.append("robotiq")
    return possible


JOINT_RESET_FAILED = (
    "the joint reset failed ({fault}). The joint controller may still move the arm, and no command reaches it: press "
    "the user stop, then restart the robot server without --reset_joint_target"
)


def joint_reset(server: RobotServer, timeout: float) -> None:
    """Move all joints to the server's reset angles. Raises a FATAL Fault if the answer is not 200.

    The answer is the same whether the arm moved or not, so the caller has to read the joints.
    """
    try:
        server.post("jointreset", timeout=timeout)
    except Fault as fault:
        raise Fault(
            JOINT_RESET_FAILED.format(fault=fault), FaultKind.FATAL, fault.status
        ) from fault
