"""The safety limits of commands and measurements, and the faults beyond them.

A safety reviewer can read this file alone. `Limits` holds every number. `Limits.clip` is applied to
every pose before it is sent (PandaEnv.command in robot/env.py is the only place that sends one).
CHECKS is applied to every state that is read. Whatever is wrong is a `Fault`: the arm is ordered to
hold, the episode ends, and its data are discarded.

The robot server checks nothing itself. It does not report a reflex, the user stop or a dead state
topic, so CHECKS infers them from an arm that does not follow its commands.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from scipy.spatial.transform import Rotation

# X y z w; the end effector points down, its x axis along the base's.
DOWN = Rotation.from_quat([1, 0, 0, 0])
PERIOD = 0.1  # s, one environment step
# Arm: (least, greatest) angle of each joint in rad, from Franka's specification of each arm.
JOINT_LIMITS = {
    "panda": (
        (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
        (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
    ),
    "fr3": (
        (-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),
        (2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159),
    ),
}


class FaultKind(Enum):
    """The condition for the next episode."""

    RETRY = "the next episode may start"
    OPERATOR = "an operator must confirm that the robot is safe"
    OUT_OF_BOUNDS = "a limit was exceeded: as OPERATOR, but a simulation's reset puts the arm back"
    FATAL = "the program must end: the robot server or a setting has to change first"


class Fault(Exception):
    """The episode cannot go on. The message is one sentence without a full stop.

    status: the HTTP status code of the answer that caused it, if one did. advice: a remedy for the
    operator, if known.
    """

    def __init__(
        self,
        message: str,
        kind: FaultKind = FaultKind.RETRY,
        status: int | None = None,
        advice: str = "",
    ):
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.advice = advice

    def with_advice(self) -> str:
        """Return the message and the advice."""
        return f"{self}; {self.advice}" if self.advice else str(self)

    @property
    def needs_operator(self) -> bool:
        return self.kind is not FaultKind.RETRY


def compliance() -> dict[str, float]:
    """Return the impedance controller's parameters: each axis is pushed with at most 2000 N/m * 0.01 m = 20 N."""
    parameters = {
        "translational_stiffness": 2000,  # N/m
        "translational_damping": 89,  # Ns/m
        "translational_Ki": 0,
        "rotational_stiffness": 150,  # Nm/rad
        "rotational_damping": 7,  # Nms/rad
        "rotational_Ki": 0,
    }
    for side in ("x", "y", "z", "neg_x", "neg_y", "neg_z"):
        parameters[f"translational_clip_{side}"] = 0.01  # m
        parameters[f"rotational_clip_{side}"] = 0.05  # half radians
    return parameters


@dataclass(frozen=True)
class Limits:
    """Every limit of the arm. Lengths in m, angles in rad, times in s, all in the robot's base frame."""

    # --- commands

    # The box of the TCP, the point between the fingertips, which reach 0.009 lower.
    # At x = 0.33 joint 4 comes near its limit. The joint reset ends at z = 0.40.
    low: tuple = (0.38, -0.20, 0.012)
    high: tuple = (0.65, 0.20, 0.42)
    step: float = 0.04  # translation of an action of 1, and the limit of a target on each axis
    rotation_step: float = 0.25  # the same for each component of the rotation vector
    tilt: float = 0.15  # greatest angle between the end effector and straight down
    yaw: float = 1.45  # greatest yaw in both directions
    gripper_rest: int = 5  # environment steps between two gripper commands: half a second
    compliance: dict = field(default_factory=compliance)
    home: tuple = (0.46, 0.0, 0.2)  # start of an episode
    reset_q: tuple = (0, 0, 0, -1.9, 0, 2, 0)  # the server's default --reset_joint_target: keep it
    reset_every: int = 200  # episodes between two joint resets, because the elbow drifts

    # --- measurements: the arm is stopped beyond them

    box_margin: float = 0.03  # distance outside the box
    rotation_margin: float = 0.25  # angle beyond tilt or yaw
    max_force: float = 40.0  # N
    contact_force: float = 5.0  # N, below it the end effector touches nothing
    max_speed: float = 0.6  # m/s
    q_min: tuple = JOINT_LIMITS["panda"][0]
    q_max: tuple = JOINT_LIMITS["panda"][1]
    q_margin: float = 0.1  # least distance of a joint from its limit
    still_steps: int = 8  # environment steps without 1 mm of motion of a free, commanded arm
    gripper_steps: int = 10  # environment steps without motion after a gripper command
    frame_age: float = 0.2  # greatest age of a camera's newest frame

    # --- timeouts of the robot server; reads and /pose are tried twice

    read_timeout: float = 0.25
    param_timeout: float = 5.0  # /update_param calls a ROS service
    reset_timeout: float = 60.0  # /jointreset takes 20 s, 45 s at worst
    controller_patience: float = 15.0  # for the impedance controller after /jointreset

    def aim(
        self, action: np.ndarray, position: np.ndarray, rotation: Rotation
    ) -> tuple[np.ndarray, Rotation]:
        """Return the clipped pose that an action (7,) asks for, starting from the measured pose."""
        move = np.clip(action[:6], -1, 1)
        target = position + self.step * move[:3]
        target_rotation = Rotation.from_rotvec(self.rotation_step * move[3:]) * rotation
        return self.clip(target, target_rotation, position, rotation)

    def clip(
        self,
        position: np.ndarray,
        rotation: Rotation,
        position_now: np.ndarray,
        rotation_now: Rotation,
    ) -> tuple[np.ndarray, Rotation]:
        """Return the nearest allowed pose: at most one step from the measured pose, and always inside the box."""
        position = np.clip(position, position_now - self.step, position_now + self.step)
        turn = np.clip(
            (rotation * rotation_now.inv()).as_rotvec(), -self.rotation_step, self.rotation_step
        )
        v = (Rotation.from_rotvec(turn) * rotation_now * DOWN.inv()).as_rotvec()
        v[:2] *= min(1.0, self.tilt / max(1e-9, math.hypot(v[0], v[1])))
        v[2] = min(max(v[2], -self.yaw), self.yaw)
        return np.clip(position, self.low, self.high), Rotation.from_rotvec(v) * DOWN


# ----------------------------------------------------------------------------------------------------------------------
# Measurements


@dataclass(frozen=True)
class RobotState:
    """One state of the robot. Metres, radians, newtons, seconds, base frame."""

    pose: np.ndarray  # (7,) position, quaternion x y z w
    vel: np.ndarray  # (6,) linear, angular
    force: np.ndarray  # (3,) estimated force on the end effector
    torque: np.ndarray  # (3,)
    q: np.ndarray  # (7,) joint angles
    dq: np.ndarray  # (7,)
    gripper_pos: float  # as the robot server reports it
    opening: float  # of the gripper: 1 open, 0 closed

    @property
    def position(self) -> np.ndarray:
        return self.pose[:3]

    @property
    def rotation(self) -> Rotation:
        return Rotation.from_quat(self.pose[3:])


@dataclass
class Tracking:
    """The commands of this episode, and for how long the robot has not followed them."""

    target: tuple[np.ndarray, Rotation] | None = None
    steps: int = 0  # environment steps of the episode
    still_steps: int = 0
    repeated: bool = (
        # The newest joint angles equal the ones before to the last digit: sensors are never so
        # still.
        False
    )
    gripper: str = "open"  # newest gripper command, "open" or "close"
    gripper_step: int = -1000  # environment step of that command
    gripper_opening: float = 0.0  # opening at that command
    gripper_hint: str = ""  # advice for a gripper that does not move

    def update(self, limits: Limits, state: RobotState, previous: RobotState | None) -> None:
        """Count for how many steps a free arm has been commanded to move and has not.

        A near target does not count, unless the state does not change at all.
        """
        moved = previous is None or np.linalg.norm(state.position - previous.position) > 0.001
        self.repeated = previous is not None and np.array_equal(state.q, previous.q)
        far = self.target is not None and (
            self.repeated or np.linalg.norm(self.target[0] - state.position) > 0.01
        )
        free = np.linalg.norm(state.force) < limits.contact_force or self.repeated
        self.still_steps = self.still_steps + 1 if far and not moved and free else 0


# ----------------------------------------------------------------------------------------------------------------------
# The safety checks. Each function returns the problem in words, or "" if there is none.


def outside_box(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Compare the end effector's position with the box and its margin."""
    distance = np.maximum(
        np.subtract(limits.low, state.position), np.subtract(state.position, limits.high)
    ).max()
    if distance <= limits.box_margin:
        return ""
    return f"the end effector is {distance:.3f} m outside its box, at {state.position.round(3)}"


def outside_rotation_window(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Compare the end effector's tilt and yaw with their limits and margin."""
    v = np.abs((state.rotation * DOWN.inv()).as_rotvec())
    if (
        math.hypot(v[0], v[1]) <= limits.tilt + limits.rotation_margin
        and v[2] <= limits.yaw + limits.rotation_margin
    ):
        return ""
    return f"the end effector is rotated out of its window: rotation vector {v.round(2)} from straight down"


def near_joint_limit(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Compare each joint's distance from its limits with the margin."""
    room = np.minimum(state.q - limits.q_min, limits.q_max - state.q)
    if room.min() >= limits.q_margin:
        return ""
    return f"joint {room.argmin() + 1} is {room.min():.2f} rad from its limit"


def pushed(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Compare the force on the end effector with its limit."""
    force = np.linalg.norm(state.force)
    return f"the end effector is pushed with {force:.0f} N" if force > limits.max_force else ""


def too_fast(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Compare the end effector's speed with its limit."""
    speed = np.linalg.norm(state.vel[:3])
    return f"the end effector moves at {speed:.2f} m/s" if speed > limits.max_speed else ""


def impossible_opening(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Return a problem if the gripper's number is impossible for ROBOT_GRIPPER."""
    if -0.1 <= state.opening <= 1.2:
        return ""
    return (
        f"gripper_pos is {state.gripper_pos:g}, which would be {state.opening:.0%} open: ROBOT_GRIPPER names the "
        f"wrong gripper; run `python real_robot.py check`"
    )


def not_following(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Return a problem if a free arm stands still although it is commanded to move."""
    if tracking.still_steps < limits.still_steps:
        return ""
    cause = "a reflex, the user stop"
    if tracking.repeated:
        cause = "and its state never changes: is the robot's state topic dead, or the controller stopped"
    return f"the arm does not follow its commands ({cause}?)"


def gripper_not_following(limits: Limits, state: RobotState, tracking: Tracking) -> str:
    """Return a problem if the fingers have not moved some time after a gripper command."""
    if tracking.steps - tracking.gripper_step != limits.gripper_steps:
        return ""
    there = state.opening > 0.9 if tracking.gripper == "open" else state.opening < 0.1
    if there or abs(state.opening - tracking.gripper_opening) >= 0.05:
        return ""
    return f"the gripper was ordered to {tracking.gripper} and has not moved{tracking.gripper_hint}"


@dataclass(frozen=True)
class Check:
    """One row of the table: the checked quantity, the kind of its fault, and whether a dry run skips it."""

    name: str
    problem: Callable[[Limits, RobotState, Tracking], str]
    kind: FaultKind
    needs_motion: bool = False
    advice: str = ""


WAY_BACK = "guide the arm back by hand, or clear its way and send /jointreset to the robot server (docs/real_robot.md)"
CHECKS = (
    Check("position", outside_box, FaultKind.OUT_OF_BOUNDS, advice=WAY_BACK),
    Check("rotation", outside_rotation_window, FaultKind.OUT_OF_BOUNDS, advice=WAY_BACK),
    Check("joints", near_joint_limit, FaultKind.OUT_OF_BOUNDS, advice=WAY_BACK),
    Check("force", pushed, FaultKind.OUT_OF_BOUNDS),
    Check("speed", too_fast, FaultKind.OUT_OF_BOUNDS),
    Check("gripper number", impossible_opening, FaultKind.FATAL),
    Check("arm follows", not_following, FaultKind.OPERATOR, needs_motion=True),
    Check("gripper follows", gripper_not_following, FaultKind.OPERATOR, needs_motion=True),
)


def check_state(limits: Limits, state: RobotState, tracking: Tracking, dry: bool = False) -> None:
    """Raise the Fault of the first row of CHECKS that finds a problem. dry: nothing is sent, so nothing can follow."""
    for check in CHECKS:
        if dry and check.needs_motion:
            continue
        problem = check.problem(limits, state, tracking)
        if problem:
            raise Fault(problem, check.kind, advice=check.advice)
