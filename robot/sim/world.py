"""The world behind the simulated robot server: arm, table, object, and SERL's Cartesian impedance law.

The law is serl_franka_controllers' (rail-berkeley), computed every 2 ms instead of every 1 ms; its
constants are scaled accordingly.
"""

import math
from enum import Enum

import mujoco
import numpy as np

from common.rendering import Renderer, make_camera
from robot.sim.grippers import GRIPPERS, WIDTH
from robot.sim.objects import CAMERAS, LIFT, PLACES, TASKS, task_object
from robot.sim.scene import TICK, build_model

HOME = (0.46, 0.0, 0.2)  # m, where the TCP starts, pointing down
START_RANGE = 0.02  # m, the start is uniform in +- START_RANGE on each axis
MAX_TORQUE = np.array([87, 87, 87, 87, 12, 12, 12.0])  # Nm
# SERL's default --reset_joint_target; the hand is rotated by 45 degrees.
RESET_Q = np.array([0, 0, 0, -1.9, 0, 2, 0])
DOWN = np.array([0.0, 1.0, 0.0, 0.0])  # w x y z; the hand points down, its x axis along the base's
SIDES = ("x", "y", "z", "neg_x", "neg_y", "neg_z")
# SERL's parameter: (default, greatest); N/m, Ns/m, Nm/rad, Nms/rad, m and half radians.
COMPLIANCE = {
    "translational_stiffness": (2000, 6000),
    "translational_damping": (89, 400),
    "translational_Ki": (0, 100),
    "rotational_stiffness": (150, 300),
    "rotational_damping": (7, 30),
    "rotational_Ki": (0, 100),
    "nullspace_stiffness": (0.2, 100),
    "joint1_nullspace_stiffness": (100, 100),
    **{f"translational_clip_{side}": (0.01, 0.1) for side in SIDES},
    **{f"rotational_clip_{side}": (0.05, 0.1) for side in SIDES},
}


class Controller(Enum):
    """Which ROS controller has the arm."""

    IMPEDANCE = "follows /pose"
    JOINT = "drives the joints to a goal and ignores /pose"
    NONE = "nothing moves, and the state topic is silent"


class World:
    """Arm, table and object, and the robot server's state. It is not thread-safe: one thread owns it."""

    def __init__(self, gripper: str = "serl"):
        kind = GRIPPERS[gripper]
        self.gripper = kind and kind()
        self.faults = {}  # those ordered, see FAULTS in robot/sim/server.py
        self.stopped = False  # the brakes are on
        self.object = None
        self.renderer = None
        self.drawn = {}  # (camera, width, height): (image, its number, its time)
        self.frames = 0
        self.seconds = 0.0
        self.reset(next(iter(TASKS)), 0)

    def reset(self, task: str, seed: int) -> None:
        """Put the task's object on the table and the arm where episodes start, as an operator would."""
        # Also draws the encoders' noise.
        self.rng = np.random.default_rng([seed, list(TASKS).index(task)])
        rng = self.rng
        obj = task_object(task).draw(rng)
        if obj != self.object:
            self.close()
            self.object = obj
            self.model = build_model(obj)
            self.data = mujoco.MjData(self.model)
            self.tcp = self.model.site("tcp").id
        d = self.data
        mujoco.mj_resetData(self.model, d)
        d.qpos[:7] = RESET_Q
        d.qpos[7:9] = 0.04
        self.solve(np.array(HOME) + rng.uniform(-START_RANGE, START_RANGE, 3))
        yaw = rng.uniform(-obj.yaw_range, obj.yaw_range)
        d.qpos[9:] = (
            rng.uniform(*PLACES[0]),
            rng.uniform(*PLACES[1]),
            0,
            math.cos(yaw / 2),
            0,
            0,
            math.sin(yaw / 2),
        )
        self.target_width = WIDTH  # m between the fingers, as commanded
        self.width = WIDTH  # m, on the way there
        self.last_state = None
        self.torque = np.zeros(7)
        self.start_impedance()
        self.advance(0.1)  # the object settles
        self.rest_height = d.qpos[11]

    def solve(self, position: np.ndarray) -> None:
        """Set the joints so that the gripper points down at `position` (3,)."""
        for _ in range(20):
            p, quat = self.pose()
            error = np.concatenate([position - p, 2 * self.rotation_to(DOWN, quat)])
            mujoco.mj_comPos(self.model, self.data)
            self.data.qpos[:7] += np.linalg.lstsq(self.jacobian(), error, rcond=1e-3)[0]

    # --- controllers

    def start_impedance(self) -> None:
        """Start the impedance controller, with the default compliance and the measured pose as its target."""
        mujoco.mj_forward(self.model, self.data)
        self.controller = Controller.IMPEDANCE
        self.parameters = {name: default for name, (default, _) in COMPLIANCE.items()}
        self.apply_parameters()
        self.target = self.pose()
        self.filtered = self.target
        self.rest_q = self.data.qpos[:7].copy()
        self.integral = np.zeros(6)

    def stop_controller(self) -> None:
        """Stop the controller. The state stays the last one, because upstream's state topic comes from it."""
        self.state()
        self.controller = Controller.NONE

    def start_joint_controller(self, goal: np.ndarray) -> None:
        """Start SERL's joint position controller: a straight line in joint space to `goal` (7,), in 10 s."""
        self.controller = Controller.JOINT
        self.joint_goal = np.array(goal)
        self.joint_start = self.data.qpos[:7].copy()
        self.phase = 0.0

    def restart_server(self) -> None:
        """Start as upstream's server does: it forgets the gripper and the compliance."""
        self.start_impedance()
        if self.gripper:
            self.gripper.restart()

    def apply_parameters(self) -> None:
        c = self.parameters

        def pair(name):
            return np.repeat([c[f"translational_{name}"], c[f"rotational_{name}"]], 3)

        self.K = pair("stiffness")
        self.D = pair("damping")
        self.Ki = pair("Ki")
        # Upstream's error is actual - target, so the way to +x is limited by clip_neg_x.
        names = [
            f"{kind}_clip_{{}}{axis}" for kind in ("translational", "rotational") for axis in "xyz"
        ]
        self.least_error = [-c[n.format("")] for n in names]
        self.greatest_error = [c[n.format("neg_")] for n in names]
        self.spring = np.full(7, c["nullspace_stiffness"])
        self.spring[0] *= c["joint1_nullspace_stiffness"]
        self.nullspace_damping = 2 * math.sqrt(c["nullspace_stiffness"])

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the TCP's (position (3,), quaternion w x y z (4,))."""
        mujoco.mj_kinematics(self.model, self.data)
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, self.data.site_xmat[self.tcp])
        return self.data.site_xpos[self.tcp].copy(), quat

    def jacobian(self) -> np.ndarray:
        """Return the arm's Jacobian (6, 7), rows v, w, of the last forward pass."""
        J = np.empty((6, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, J[:3], J[3:], self.tcp)
        return J[:, :7]

    @staticmethod
    def rotation_to(target: np.ndarray, quat: np.ndarray) -> np.ndarray:
        """Return the vector part of the quaternion from `quat` to `target`, about half the rotation vector."""
        inverse = np.zeros(4)
        difference = np.zeros(4)
        mujoco.mju_negQuat(inverse, quat)
        mujoco.mju_mulQuat(difference, target, inverse)
        return difference[1:] if difference[0] >= 0 else -difference[1:]

    def impedance_law(self, tick: int) -> np.ndarray:
        """Return the joint torques (7,) of SERL's Cartesian impedance law, without gravity's."""
        d = self.data
        q = d.qpos[:7]
        dq = d.qvel[:7]
        # The target is taken up by 0.5 % each millisecond: a time constant of 0.2 s.
        p, quat = self.filtered
        p = p + 0.01 * (self.target[0] - p)
        sign = 1 if quat @ self.target[1] >= 0 else -1
        quat = quat + 0.01 * (sign * self.target[1] - quat)
        self.filtered = p, quat / math.sqrt(quat @ quat)
        J = self.jacobian()
        now = np.empty(4)
        mujoco.mju_mat2Quat(now, d.site_xmat[self.tcp])
        error = np.concatenate([p - d.site_xpos[self.tcp], self.rotation_to(self.filtered[1], now)])
        error = np.minimum(np.maximum(error, self.least_error), self.greatest_error)
        self.integral = np.clip(self.integral + error, -0.1, 0.1)
        wrench = self.K * error - self.D * (J @ dq) + self.Ki * self.integral
        if tick % 5 == 0:  # the posture changes slowly
            posture = self.spring * (self.rest_q - q) - self.nullspace_damping * dq
            self.null = posture - J.T @ np.linalg.solve(J @ J.T + 0.04 * np.eye(6), J @ posture)
        return J.T @ wrench + self.null

    def joint_law(self) -> np.ndarray:
        """Return the joint torques (7,) of SERL's joint position controller."""
        start = self.joint_start
        self.phase = min(1.0, self.phase + TICK / 10)
        goal_now = start + self.phase * (self.joint_goal - start)
        return 600 * (goal_now - self.data.qpos[:7]) - 50 * self.data.qvel[:7]

    def advance(self, seconds: float) -> None:
        """Simulate the next `seconds`."""
        d = self.data
        self.seconds += seconds
        for tick in range(round(seconds / TICK)):
            if self.controller is Controller.IMPEDANCE:
                torque = self.impedance_law(tick)
            elif self.controller is Controller.JOINT:
                torque = self.joint_law()
            else:
                torque = np.zeros(7)
            self.torque = np.clip(torque, self.torque - 2, self.torque + 2)  # 1 Nm per millisecond
            d.qfrc_applied[:7] = np.clip(self.torque + d.qfrc_bias[:7], -MAX_TORQUE, MAX_TORQUE)
            if "stuck_gripper" not in self.faults:
                self.width += min(max(self.target_width - self.width, -0.3 * TICK), 0.3 * TICK)
            push = 2000 * (self.width / 2 - d.qpos[7:9])
            d.qfrc_applied[7:9] = np.minimum(np.maximum(push, -40), 40)
            still = d.qpos[:7].copy()
            mujoco.mj_step(self.model, d)
            if self.stopped or self.controller is Controller.NONE:
                # The brakes are on. A new target is still accepted, and followed when they are off.
                d.qpos[:7] = still
                d.qvel[:7] = 0
        mujoco.mj_forward(self.model, d)

    # --- the robot server's reads and commands

    def state(self) -> dict:
        """Return /getstate's answer. As in libfranka, force and torque come from joint torques, in the hand's frame."""
        silent = "frozen_state" in self.faults or self.controller is Controller.NONE
        if silent and self.last_state:
            return self.last_state
        d = self.data
        p, quat = self.pose()
        J = self.jacobian()
        q = d.qpos[:7] + 1e-6 * self.rng.standard_normal(7)  # encoders are never still
        load = -np.linalg.solve(J @ J.T + 0.0025 * np.eye(6), J @ d.qfrc_constraint[:7])
        R = d.site_xmat[self.tcp].reshape(3, 3)
        self.last_state = {
            "pose": [*p, *quat[1:], quat[0]],
            "vel": [*(J @ d.qvel[:7])],
            "force": [*(R.T @ load[:3])],
            "torque": [*(R.T @ load[3:])],
            "q": [*q],
            "dq": [*d.qvel[:7]],
            "jacobian": J.tolist(),
            "gripper_pos": self.gripper.report(d.qpos[7] + d.qpos[8]),
        }
        if self.use_fault("nan"):
            return self.last_state | {"pose": [math.nan, *self.last_state["pose"][1:]]}
        return self.last_state

    def use_fault(self, fault: str) -> bool:
        """Return whether this fault is ordered, and use up one of its times."""
        left = self.faults.get(fault, 0)
        if left:
            self.faults[fault] = left - 1
        return left > 0

    def aim(self, pose: list) -> None:
        """Set the target: x y z, quaternion x y z w. As upstream, nothing but its length is checked."""
        assert len(pose) == 7
        pose = np.array(pose, float)
        if not np.isfinite(pose).all():
            self.stopped = True  # libfranka raises an error, and the controller is gone
            return
        self.target = pose[:3], np.roll(pose[3:], 1) / np.linalg.norm(pose[3:])
        self.integral = np.zeros(6)

    def clear_errors(self) -> None:
        if "user_stop" not in self.faults:
            self.stopped = False

    def set_parameters(self, values: dict) -> None:
        """Set some of the compliance parameters, clamped to their range. It takes a running controller, as upstream."""
        assert self.controller is Controller.IMPEDANCE
        for name, value in values.items():
            self.parameters[name] = min(max(float(value), 0.0), COMPLIANCE[name][1])
        self.apply_parameters()

    def set_width(self, width: float | None) -> None:
        """Move the fingers. None means that the command was ignored."""
        if width is not None:
            self.target_width = width

    # --- beyond a robot server

    def look(self) -> dict:
        """Return the view of an eye above the table."""
        pose = self.data.qpos[9:16]
        return {
            "success": bool(pose[2] - self.rest_height > LIFT),
            "object_pose": [*pose],  # position, quaternion w x y z
            "grasp": self.object.grasp,
            "target": [*self.target[0]],
            "seconds": self.seconds,
        }

    def image(self, camera: str, width: int, height: int) -> tuple[np.ndarray, int, float]:
        """Return a camera's (image (height, width, 3) uint8, its number, its age in s)."""
        key = camera, width, height
        if "frozen_camera" not in self.faults or key not in self.drawn:
            if self.renderer is None:
                self.renderer = Renderer(self.model, make_camera(**CAMERAS["front"]))
                self.wrist_camera = mujoco.MjvCamera()
                self.wrist_camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
                self.wrist_camera.fixedcamid = 0
            view = {"front": None, "wrist": self.wrist_camera}[camera]
            image = self.renderer.render(self.data, width, height, view)
            self.frames += 1
            self.drawn[key] = image, self.frames, self.seconds
        image, number, at = self.drawn[key]
        return image, number, self.seconds - at

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None
