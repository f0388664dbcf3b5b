"""The environment: one task on a Panda behind SERL's robot server, real or simulated.

Every pose that is sent passes through PandaEnv.command, and every state that is read through
PandaEnv.read_state. The limits of both are in robot/limits.py.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

import gymnasium as gym
import numpy as np
from scipy.spatial.transform import Rotation

from common.errors import UserError
from robot.cameras import open_camera
from robot.clock import LockstepClock, RealTimeClock
from robot.limits import (
    DOWN,
    JOINT_LIMITS,
    Fault,
    FaultKind,
    Limits,
    RobotState,
    Tracking,
    check_state,
)
from robot.operator import HumanOperator, SimOperator
from robot.server import GRIPPER_HINTS, RobotConfig, RobotServer, joint_reset, lock_robot
from robot.signals import delay_signals, stop_on_signals

RERUN = "make the robot safe, then rerun the same command"
SHUT = 0.25  # an opening below it is not open; HIL-SERL's Robotiq opens to 0.31 only


class Hold(Enum):
    """The outcome of the order to hold."""

    SENT = "the arm was ordered to hold"
    NOT_READ = "nothing was sent to the arm, because its pose could not be read"
    NOT_SENT = (
        "the arm could not be ordered to hold: it keeps its last target, at most one step away"
    )
    NO_CONTROLLER = (
        "the arm was not ordered to hold, because its impedance controller is not running"
    )
    DRY = "nothing was sent (dry run)"


class PandaEnv(gym.Env):
    """One task on a Panda.

    Observation: (image_size, image_size, 3) uint8, the front camera's view above the wrist
    camera's. Action: (7,) in [-1, 1]. [:3] is the end effector's translation (times Limits.step)
    and [3:6] its rotation vector (times Limits.rotation_step), in the base frame, from the measured
    pose. [6] is the gripper: -0.5 and less closes it, 0.5 and more opens it.

    A Fault ends the episode: truncated, and info["fault"] is one sentence. info["executed"] is the
    executed action, which is the operator's while an operator has taken over.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(
        self,
        config: RobotConfig,
        task: str,
        image_size: int = 64,
        horizon: int = 60,
        limits: Limits | None = None,
        at_close: Callable[[], None] | None = None,
    ):
        """Raises UserError if there is no robot server, or if another process drives its robot."""
        self.config = config
        self.task = task
        self.image_size = image_size
        self.horizon = horizon
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.server = RobotServer(config.url, config.is_dry, config.gripper)
        self.state = None  # the newest RobotState
        self.image = None  # the newest observation
        self.episodes = 0  # trips home
        self.commanded = False  # whether this program has sent a pose
        # Whether a joint reset has failed, so that no command reaches the arm.
        self.controller_lost = False
        self.clock = LockstepClock()
        self.begin_episode()
        self.cleanup = contextlib.ExitStack()
        self.signals = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.signals)
            undo.enter_context(self.cleanup)
            if at_close:
                self.cleanup.callback(at_close)
            self.cleanup.enter_context(lock_robot(config.url))
            self.cleanup.callback(self.server.close)
            info = self.read_sim_info()
            self.simulated = info is not None
            lockstep = self.simulated and info["clock"] == "lockstep"
            q_min, q_max = JOINT_LIMITS[config.arm]
            self.limits = limits or Limits(q_min=q_min, q_max=q_max)
            if lockstep:  # nothing may depend on real time
                self.limits = replace(
                    self.limits, read_timeout=60.0, param_timeout=60.0, reset_timeout=600.0
                )
            else:
                self.clock = RealTimeClock()
                self.signals.enter_context(stop_on_signals())
            self.cameras = []
            for spec in (config.front, config.wrist):
                camera = open_camera(spec, self.server, max(self.limits.read_timeout, 5.0))
                self.cleanup.callback(camera.close)
                self.cameras.append(camera)
            if config.reward == "sim":
                self.operator = SimOperator(self.server, max(self.limits.read_timeout, 10.0))
            else:
                self.operator = HumanOperator(config)
            self.cleanup.callback(self.operator.close)
            undo.pop_all()

    def read_sim_info(self) -> dict | None:
        """Return the simulated server's settings, or None for a real robot's server."""
        config = self.config
        try:
            info = self.server.json("sim/info", timeout=30)
            if not isinstance(info, dict) or "clock" not in info:
                raise UserError(
                    f"{config.url} is not a robot server (/sim/info: {info!r:.60}): correct ROBOT_URL"
                )
            return info
        except Fault as fault:
            if fault.status != 404:  # a real robot's server does not know the route
                raise UserError(f"{fault}: start the robot server, or correct ROBOT_URL") from fault
        if "sim" in (config.reward, config.front[:3], config.wrist[:3]):
            raise UserError(
                f"{config.url} is a real robot: set ROBOT_FRONT, ROBOT_WRIST and ROBOT_REWARD (docs/real_robot.md)"
            )
        return None

    def begin_episode(self) -> None:
        """Forget the last episode."""
        self.fault = None
        self.tracking = Tracking(gripper_hint=GRIPPER_HINTS[self.config.gripper])
        self.clock.restart()

    # --- commands

    def command(self, position: np.ndarray, rotation: Rotation) -> None:
        """Send a pose. This is the only place that does so."""
        pose = [*map(float, position), *map(float, rotation.as_quat())]
        if not np.isfinite(pose).all():
            raise Fault(f"a pose that is not finite was about to be sent: {pose}")
        self.tracking.target = position, rotation
        self.commanded = True
        self.server.post("pose", {"arr": pose}, self.limits.read_timeout, tries=2)

    def hold(self) -> Hold:
        """Stop: command the measured pose, or the last one if it cannot be measured. Never raises a Fault."""
        if self.controller_lost:
            return Hold.NO_CONTROLLER
        for _ in range(2):
            with contextlib.suppress(Fault):  # then the pose of one step ago
                self.state = self.server.get_state(self.limits.read_timeout)
            if self.state is None:
                return Hold.NOT_READ
            try:
                self.command(self.state.position, self.state.rotation)
                return Hold.DRY if self.server.dry else Hold.SENT
            except Fault:
                continue
        return Hold.NOT_SENT

    def move_gripper(self, wish: float) -> None:
        """Open or close the gripper if `wish` (the action's last number) asks for a change and it has had its rest."""
        tracking = self.tracking
        if -0.5 < wish < 0.5:
            return
        want = "open" if wish > 0 else "close"
        if (
            want == tracking.gripper
            or tracking.steps - tracking.gripper_step < self.limits.gripper_rest
        ):
            return
        tracking.gripper = want
        tracking.gripper_step = tracking.steps
        tracking.gripper_opening = self.state.opening
        self.server.post(f"{want}_gripper", timeout=self.limits.read_timeout)

    def send_compliance(self) -> None:
        """Set the impedance controller's parameters. Wait for a controller that is starting."""
        deadline = time.monotonic() + self.limits.controller_patience
        while True:
            try:
                self.server.post(
                    "update_param", self.limits.compliance, self.limits.param_timeout, tries=2
                )
                return
            except Fault as fault:
                if fault.status != 500:
                    raise
                if time.monotonic() > deadline:
                    raise Fault(
                        f"{fault}: the impedance controller is not running, or it does not know a parameter of "
                        f"Limits.compliance; restart the robot server",
                        FaultKind.FATAL,
                        fault.status,
                    ) from fault
                time.sleep(0.5)

    # --- measurements

    def read_state(self) -> RobotState:
        """Read the state and compare it with the limits. Raises Fault if the episode must not go on."""
        previous = self.state
        self.state = self.server.get_state(self.limits.read_timeout)
        self.tracking.update(self.limits, self.state, previous)
        check_state(self.limits, self.state, self.tracking, self.server.dry)
        return self.state

    def get_image(self) -> np.ndarray:
        """Return both cameras' views, (image_size, image_size, 3) uint8. Raises Fault if a frame is too old."""
        width = self.image_size
        top = width // 2
        views = []
        for name, camera, height in zip(("front", "wrist"), self.cameras, (top, width - top)):
            image, _, age = camera.read(width, height)
            if not age <= self.limits.frame_age:  # also if it is NaN
                raise Fault(f"the {name} camera's newest frame is {age:.1f} s old")
            views.append(image)
        self.image = np.vstack(views)
        return self.image

    # --- gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """In simulation, the seed alone decides the initial state. On a robot, the operator places the object.

        Raises UserError if an operator is needed and there is none, or if a second attempt fails as
        well.
        """
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        first = None
        while True:
            try:
                self.start_episode(seed)
                return self.get_image(), {}
            except Fault as fault:
                self.fault = fault
                held = self.hold()
                hopeless = fault.kind is FaultKind.FATAL or (
                    fault.needs_operator and not self.operator.asks
                )
                if first or hopeless:
                    message = (first or fault).with_advice()
                    if first and str(first) != str(fault):
                        message += f"; the next attempt failed too: {fault}"
                    raise UserError(f"{message}; {held.value}: {RERUN}") from fault
                first = fault
                time.sleep(0.5)

    def start_episode(self, seed: int) -> None:
        """Recover from a fault, if there was one, and bring the robot and the object to the start of an episode."""
        reason = self.recover() if self.fault else ""
        self.begin_episode()
        if self.operator.asks:
            # Before the arm becomes stiffer: another program's last target may still pull it.
            held = self.hold()
            if held not in (Hold.SENT, Hold.DRY):
                # Raises the reason, if reading failed.
                self.server.get_state(self.limits.read_timeout)
                raise Fault(held.value, FaultKind.OPERATOR)
        self.send_compliance()
        self.operator.prepare(self, seed, reason)
        self.begin_episode()
        self.read_state()

    def recover(self) -> str:
        """Make the robot ready after a fault. Return the reason that the operator has to confirm, if any is left.

        The robot's errors are cleared only after an operator's confirmation, and the hold is sent
        before that: an arm whose errors are cleared moves to its last target.
        """
        fault = self.fault
        if fault.kind is FaultKind.RETRY:
            return str(fault)
        if fault.kind is FaultKind.OUT_OF_BOUNDS and self.operator.resets_arm:
            return ""
        if fault.kind is FaultKind.FATAL or not self.operator.asks:
            raise UserError(f"{fault.with_advice()}: {RERUN}")
        self.operator.confirm(
            f"{fault.with_advice()}. Make the robot safe and ready; a held object will fall."
        )
        # The arm may have been moved since: hold only a pose that is measured now.
        self.state = None
        held = self.hold()
        if held not in (Hold.SENT, Hold.DRY):
            raise Fault(f"{held.value}; its errors were not cleared", FaultKind.OPERATOR)
        self.server.post("clearerr", timeout=self.limits.read_timeout)
        self.hold()
        return ""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Raises ValueError, and holds the arm, if the action is not 7 finite numbers."""
        action = np.asarray(action, np.float32)
        if action.shape != (7,) or not np.isfinite(action).all():
            self.hold()
            raise ValueError(f"an action is 7 finite numbers, not {action}")
        executed = action.clip(-1, 1)
        success = False
        info = {}
        try:
            if self.clock.is_late():
                self.read_state()
            operators = self.operator.action(self)
            if operators is not None:
                executed = operators
            self.move_gripper(executed[6])
            self.command(*self.limits.aim(executed, self.state.position, self.state.rotation))
            self.tracking.steps += 1
            self.clock.wait()
            self.read_state()
            success = self.operator.success(self, self.get_image())
        except Fault as fault:
            self.fault = fault
            info["fault"] = f"{fault}; {self.hold().value}"
        done = (
            self.tracking.steps >= self.horizon or self.fault is not None or self.operator.ended()
        )
        if self.operator.asks and (success or done):
            self.hold()
        info["success"] = success
        info["executed"] = executed
        return self.image, float(success), success, done and not success, info

    def render(self) -> np.ndarray:
        """Return both views at a larger size, (480, 480, 3) uint8."""
        return np.vstack([camera.read(480, 240)[0] for camera in self.cameras])

    def close(self) -> None:
        """Hold the arm, and print how well the steps kept to their schedule. Signals wait until it is done."""
        with self.signals, delay_signals():
            try:
                if self.commanded:
                    held = self.hold()
                    self.commanded = False
                    if self.clock.real_time and held is not Hold.DRY:
                        self.print_line(held.value)
                if self.clock.summary():
                    self.print_line(self.clock.summary())
                    self.clock = RealTimeClock()
            finally:
                self.cleanup.close()

    @staticmethod
    def print_line(line: str) -> None:
        """Print a line on a terminal that may be gone."""
        with contextlib.suppress(OSError):
            print(line, flush=True)

    # --- the way back to the start of an episode

    def go_home(self) -> None:
        """Open the gripper, lift the end effector and bring it to the start. Targets are clipped like a policy's."""
        limits = self.limits
        state = self.read_state()
        self.command(state.position, state.rotation)  # from here on
        self.server.post("open_gripper", timeout=limits.read_timeout)
        above = np.array([*state.position[:2], max(state.position[2], limits.home[2])])
        self.travel(above, state.rotation)
        self.episodes += 1
        if self.episodes % limits.reset_every == 0:
            self.reset_joints()
        if not self.travel(np.array(limits.home), DOWN):
            self.reset_joints()  # another elbow
            if not self.travel(np.array(limits.home), DOWN):
                raise Fault(
                    f"the end effector does not reach its start: it is at {self.state.position.round(3)}",
                    FaultKind.OPERATOR,
                )
        if not self.server.dry:
            self.check_open()

    def check_open(self) -> None:
        """Wait up to a second for the fingers. Raises Fault if they stay shut."""
        if self.state.opening < SHUT:
            self.stay(10)
        if self.state.opening < SHUT and self.config.gripper == "hil-serl":
            # HIL-SERL's server ignores /open_gripper while it believes that the Franka Hand is
            # open, which it does when it starts. After /close_gripper it no longer believes so.
            self.server.post("close_gripper", timeout=self.limits.read_timeout)
            self.stay(10)
            self.server.post("open_gripper", timeout=self.limits.read_timeout)
            self.stay(10)
        if self.state.opening < SHUT:
            hint = self.tracking.gripper_hint
            raise Fault(f"the gripper was ordered to open and is shut{hint}", FaultKind.OPERATOR)

    def stay(self, steps: int) -> None:
        """Keep the present pose for some steps."""
        position = self.state.position
        rotation = self.state.rotation
        for _ in range(steps):
            self.operator.watch()
            self.command(position, rotation)
            self.clock.wait()
            self.read_state()

    def travel(self, position: np.ndarray, rotation: Rotation) -> bool:
        """Go straight to a pose at half a step per step, rotating on the way. Return whether the arm arrived."""
        limits = self.limits
        start = self.state.position
        start_rotation = self.state.rotation
        way = position - start
        turn = (rotation * start_rotation.inv()).as_rotvec()
        n = math.ceil(
            max(
                np.abs(way).max() / (limits.step / 2),
                np.abs(turn).max() / (limits.rotation_step / 2),
                1,
            )
        )
        for i in range(1, n + 20):  # the arm lags by up to two seconds
            self.operator.watch()
            share = min(1.0, i / n)
            target = start + share * way
            target_rotation = Rotation.from_rotvec(share * turn) * start_rotation
            self.command(
                *limits.clip(target, target_rotation, self.state.position, self.state.rotation)
            )
            self.tracking.steps += 1
            self.clock.wait()
            state = self.read_state()
            if self.server.dry:
                return True
            distance = np.linalg.norm(position - state.position)
            angle = np.linalg.norm((rotation * state.rotation.inv()).as_rotvec())
            if distance < 0.015 and angle < 0.1:
                return True
        return False

    def reset_joints(self) -> None:
        """Send /jointreset, which takes about 20 s and resets the compliance. Read the joints, because its answer is
        the same whether the arm has moved or not."""
        if not self.server.dry:
            self.operator.confirm(
                "Clear the arm's way: all joints move for 20 s, no limit is watched, and only the user stop ends it."
            )
        try:
            with delay_signals(
                "the joint reset ends only by the user stop; this program ends after it"
            ):
                joint_reset(self.server, self.limits.reset_timeout)
            self.send_compliance()
        except Fault as fault:
            self.controller_lost = fault.kind is FaultKind.FATAL
            raise
        self.clock.restart()
        self.tracking.target = None
        self.read_state()
        if self.server.dry:
            return
        error = np.abs(self.state.q - self.limits.reset_q).max()
        if error > 0.05:
            raise Fault(
                f"the joint reset answered, but a joint is {error:.2f} rad from its target",
                FaultKind.OPERATOR,
            )
