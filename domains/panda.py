"""A simulated Franka Panda behind SERL's HTTP protocol, and as a domain: the paper's real-world experiment (Sec. V-D).

    python -m domains.panda serve                              in real time, as a robot: http://127.0.0.1:5000/
    python -m domains.panda serve --port 0 --clock lockstep    the world waits for commands, as fast as it can be

Everything between policy and arm is the real robot's: `make` gives the client of real_robot.py, which talks HTTP to
this server, or to the one at ROBOT_URL, which may be a real robot's. The routes of ROUTES are SERL's
(rail-berkeley/serl, robot_servers/franka_server.py), with its bodies, codes and habits; those under /sim/ are no
robot's: two cameras, the hands that put an object on the table, the eye that sees it lifted, and faults to order.

The paper's robot grasped blocks of four colours from demonstrations, learned to grasp an eggplant and a carrot online,
and was tested on other objects. Sizes, places, cameras and horizon it does not give. Here:

- One object lies on the table, in another place and turned another way in every episode; lifted by LIFT it is a
  success. One, not four blocks to choose from: the tiny VLM sees colours swapped at random in SFT (stage0_sft.py).
- The arm is Franka's kinematics with the meshes that gymnasium-robotics carries, under SERL's Cartesian impedance law
  (serl_franka_controllers), computed every 2 ms, not every 1 ms; the law's constants are scaled accordingly.
- A block has another size in every episode (BLOCKS), for the tiny VLM knows nothing else: how something long, thick or
  low lies there it must have seen on blocks before a head can learn to take it.
- The RL objects are harder than blocks: the eggplant is thicker than any (the open fingers leave it 6 mm on each
  side), the carrot round and thinner at one end. It is short, for on things longer than any block the tiny VLM's policy
  hardly ever closes the fingers (results/experiments.md), and RL needs a success to start from.
- The policy sees one picture: the front camera's view above the wrist camera's, 64 x 32 pixels each.
- The expert is a function of the present state alone: a policy that sees one picture cannot imitate a memory.
"""

from domains import Refusal, _render  # isort: skip  first: where there is no OpenGL it says so; the others would trace back

import argparse
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

HORIZON = 60  # decisions
ALGO = "sacfd"  # of stage 1
NOISE, KICKS = 0.2, 0.06  # of the demonstrations, see stage0_sft.py
VIEWS = 2  # in a picture
STEPS = 2500  # of stage 0's optimizer
DEMOS = 50  # successful expert episodes of each task
PRELOAD = ["real_robot"]  # what `make` imports
PERIOD = 0.1  # s, a decision
LIFT = 0.07  # m that the object has to rise
PLACES = ((0.42, 0.56), (-0.11, 0.11))  # m, where objects lie, x from the robot and y to its left
BLOCKS = ((0.062, 0.03, 0.02), (0.1, 0.052, 0.06))  # m, the least and greatest length, width and height of a block
CAMERAS = {
    "front": {"lookat": [0.46, 0.0, 0.075], "distance": 0.52, "azimuth": 180, "elevation": -33},
    "wrist": {"pos": [0.09, 0.0, 0.0], "lookat": [0.035, 0.0, 0.13], "fovy": 58},  # in the frame of the hand
}
PROTOCOL = {
    "horizon": HORIZON,
    "period": PERIOD,
    "step": 0.04,
    "turn": 0.25,
    "lift": LIFT,
    "places": PLACES,
    "blocks": BLOCKS,
    "cameras": CAMERAS,
}
PROTOCOL |= {package: version(package) for package in ("gymnasium-robotics", "mujoco")}

# ----------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Thing:
    """An object: its shape, and how the expert takes it. Metres and radians; its frame's origin lies on the table."""

    parts: tuple  # (primitive, rgb, half sizes, place of the centre)
    grasp: tuple  # where the fingers close, along its y axis
    turned: float = 1.0  # half the range of its yaw
    square: bool = False  # as good to take when turned by 90 degrees
    varied: bool = False  # a block of another size, within BLOCKS, in every episode

    def drawn(self, rng):
        """The object of an episode."""
        return block(self.parts[0][1], *rng.uniform(*BLOCKS)) if self.varied else self


def block(rgb, length=0.048, width=0.048, height=0.048, **how):
    size = length / 2, width / 2, height / 2
    return Thing((("box", rgb, size, (0, 0, height / 2)),), (0, 0, height / 2), **how)


def upright(*parts, height):
    """Something as good to take from any side."""
    return Thing(parts, (0, 0, height), square=True)


PURPLE, ORANGE, GREEN, LIME = (0.35, 0.1, 0.45), (1, 0.45, 0.05), (0.2, 0.55, 0.15), (0.65, 0.75, 0.2)
YELLOW, RED, BROWN, WHITE = (0.95, 0.85, 0.1), (0.85, 0.15, 0.1), (0.6, 0.4, 0.25), (0.9, 0.85, 0.75)
# fmt: off
TABLE = {  # object: (split, shape and grasp)
    "red block": ("expert", block((0.85, 0.1, 0.1), varied=True)),
    "green block": ("expert", block((0.1, 0.65, 0.2), varied=True)),
    "blue block": ("expert", block((0.1, 0.25, 0.85), varied=True)),
    "yellow block": ("expert", block((0.95, 0.8, 0.1), varied=True)),
    "eggplant": ("rl", Thing((  # thick: the fingers must come down on both sides
        ("ellipsoid", PURPLE, (0.055, 0.034, 0.026), (-0.014, 0, 0.026)),
        ("ellipsoid", PURPLE, (0.05, 0.022, 0.019), (0.042, 0, 0.02)),
        ("ellipsoid", GREEN, (0.018, 0.011, 0.01), (0.093, 0, 0.022))), (0.015, 0, 0.022))),
    "carrot": ("rl", Thing((  # tapers to one end and rolls: taken as high as a block, it slips
        ("ellipsoid", ORANGE, (0.03, 0.018, 0.018), (0.009, 0, 0.018)),
        ("ellipsoid", ORANGE, (0.03, 0.0117, 0.0117), (-0.015, 0, 0.0117)),
        ("ellipsoid", GREEN, (0.01, 0.0108, 0.009), (0.0405, 0, 0.0144))), (0.003, 0, 0.018))),
    "purple block": ("unseen", block((0.5, 0.15, 0.6), turned=0.6, square=True)),
    "tomato": ("unseen", upright(
        ("ellipsoid", RED, (0.029, 0.029, 0.026), (0, 0, 0.026)),
        ("ellipsoid", GREEN, (0.012, 0.012, 0.004), (0, 0, 0.052)), height=0.022)),
    "lemon": ("unseen", Thing((("ellipsoid", YELLOW, (0.038, 0.025, 0.025), (0, 0, 0.025)),), (0, 0, 0.02))),
    "banana": ("unseen", Thing((
        ("ellipsoid", YELLOW, (0.04, 0.017, 0.017), (0, 0.004, 0.017)),
        ("ellipsoid", YELLOW, (0.032, 0.014, 0.014), (0.038, -0.004, 0.015)),
        ("ellipsoid", YELLOW, (0.032, 0.014, 0.014), (-0.038, -0.004, 0.015)),
        ("ellipsoid", BROWN, (0.012, 0.006, 0.006), (0.072, -0.01, 0.016))), (0, 0.003, 0.015))),
    "pear": ("unseen", Thing((
        ("ellipsoid", LIME, (0.03, 0.027, 0.027), (-0.01, 0, 0.027)),
        ("ellipsoid", LIME, (0.03, 0.017, 0.017), (0.025, 0, 0.021))), (-0.005, 0, 0.021))),
    "corn": ("unseen", Thing((
        ("ellipsoid", (1.0, 0.8, 0.25), (0.065, 0.022, 0.022), (0.01, 0, 0.022)),
        ("ellipsoid", GREEN, (0.035, 0.017, 0.015), (-0.06, 0, 0.018))), (0, 0, 0.018))),
    "mushroom": ("unseen", upright(
        ("ellipsoid", BROWN, (0.032, 0.032, 0.018), (0, 0, 0.045)),
        ("box", WHITE, (0.014, 0.014, 0.02), (0, 0, 0.02)), height=0.026)),
    "can": ("unseen", upright(("cylinder", (0.7, 0.72, 0.75), (0.027, 0.035), (0, 0, 0.035)), height=0.03)),
}
# fmt: on
THINGS = {f"pick-{name.replace(' ', '-')}": thing for name, (_, thing) in TABLE.items()}
INSTRUCTIONS = {task: f"pick up the {name}" for task, name in zip(THINGS, TABLE)}
EXPERT_TASKS, RL_TASKS, UNSEEN_TASKS = (
    [task for task, (s, _) in zip(THINGS, TABLE.values()) if s == split] for split in ("expert", "rl", "unseen")
)

# ----------------------------------------------------------------------------------------------------------------------
# The arm's model

HOME = (0.46, 0.0, 0.2)  # m, where the gripper's centre (TCP) starts, pointing down
START = 0.02  # m, half the range of the start in x, y and z
TICK = 0.002  # s
LINKS = (  # body: place (m) and turn (quaternion) in the one before, mass (kg); franka_description's frames
    ((0, 0, 0.333), (1, 0, 0, 0), 4.97), ((0, 0, 0), (1, -1, 0, 0), 0.65), ((0, -0.316, 0), (1, 1, 0, 0), 3.23),
    ((0.0825, 0, 0), (1, 1, 0, 0), 3.59), ((-0.0825, 0.384, 0), (1, -1, 0, 0), 1.23), ((0, 0, 0), (1, 1, 0, 0), 1.67),
    ((0.088, 0, 0), (1, 1, 0, 0), 0.74),
)  # fmt: skip
Q_MIN = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])  # rad
Q_MAX = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
TORQUE = np.array([87, 87, 87, 87, 12, 12, 12.0])  # Nm
RESET_Q = np.array([0, 0, 0, -1.9, 0, 2, 0])  # SERL's default --reset_joint_target: the hand turned by 45 degrees


def build(thing):
    """The MuJoCo model of arm, table and one object."""
    spec, kind, slide = mujoco.MjSpec(), mujoco.mjtGeom, mujoco.mjtJoint.mjJNT_SLIDE
    spec.compiler.degree = False
    spec.option.timestep, spec.option.integrator = TICK, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10  # else what is gripped creeps away
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = (0.45,) * 3, (0.45,) * 3
    meshes = Path(find_spec("gymnasium_robotics").origin).parent / "envs/assets/kitchen_franka/franka_assets/meshes"
    for name in [*(f"link{i}" for i in range(8)), "hand", "finger"]:  # convex hulls of the links: 200 faces each
        spec.add_mesh(name=name, file=str(meshes / f"collision/{name}.stl"))

    def box(body, pos, size, rgb, **others):
        body.add_geom(type=kind.mjGEOM_BOX, pos=pos, size=size, rgba=(*rgb, 1), **others)

    def mesh(body, name, shade, solid=False, mass=0.0):
        touch = {"contype": int(solid), "conaffinity": int(solid)}
        body.add_geom(type=kind.mjGEOM_MESH, meshname=name, rgba=(shade, shade, shade, 1), mass=mass, **touch)

    world = body = spec.worldbody
    world.add_light(pos=(0.4, -0.6, 1.5), dir=(0, 0.4, -1), diffuse=(0.45,) * 3, specular=(0, 0, 0))
    box(world, (0.5, 0, -0.02), (0.4, 0.6, 0.02), (0.62, 0.6, 0.56))  # the table
    box(world, (0, 0, -0.7), (3, 3, 0.01), (0.3, 0.32, 0.36))  # the floor
    mesh(world, "link0", 0.9)
    for i, (pos, quat, mass) in enumerate(LINKS):
        body = body.add_body(name=f"link{i + 1}", pos=pos, quat=np.array(quat) / np.linalg.norm(quat))
        body.add_joint(axis=(0, 0, 1), range=(Q_MIN[i], Q_MAX[i]), limited=True, armature=0.1, damping=0.5)
        mesh(body, f"link{i + 1}", 0.9, mass=mass)
    hand = body.add_body(name="hand", pos=(0, 0, 0.107), quat=(math.cos(math.pi / 8), 0, 0, -math.sin(math.pi / 8)))
    mesh(hand, "hand", 0.9, solid=True, mass=0.73)
    hand.add_site(name="tcp", pos=(0, 0, 0.1034), group=4)
    for name, quat in (("left", (1, 0, 0, 0)), ("right", (0, 0, 0, 1))):
        finger = hand.add_body(name=name, pos=(0, 0, 0.0584), quat=quat)
        finger.add_joint(name=name, type=slide, axis=(0, 1, 0), range=(0, 0.04), limited=True, armature=0.1, damping=30)
        mesh(finger, "finger", 0.25, mass=0.015)
        pad = {"mass": 0.001, "condim": 4, "friction": (0.6, 0.02, 0.001), "group": 3}  # group 3 is not drawn
        box(finger, (0, 0.009, 0.043), (0.0105, 0.009, 0.0105), (1, 1, 1), **pad)
    together = {"type": mujoco.mjtEq.mjEQ_JOINT, "objtype": mujoco.mjtObj.mjOBJ_JOINT}
    spec.add_equality(name1="left", name2="right", data=[0, 1, *[0] * 9], **together)

    camera, x = CAMERAS["wrist"], np.array([0.0, 1.0, 0.0])  # its x is the hand's y, along which the fingers move
    back = np.subtract(camera["pos"], camera["lookat"])
    back, turn = back / np.linalg.norm(back), np.zeros(4)  # a camera looks along its -z
    mujoco.mju_mat2Quat(turn, np.stack([x, np.cross(back, x), back], axis=1).ravel())
    hand.add_camera(name="wrist", pos=camera["pos"], quat=turn, fovy=camera["fovy"])

    body = world.add_body(name="thing")
    body.add_freejoint()
    rolls = {"density": 250, "condim": 6, "friction": (0.6, 0.01, 0.002)}  # kg/m3
    for primitive, rgb, size, pos in thing.parts:
        shape = getattr(kind, f"mjGEOM_{primitive.upper()}")
        body.add_geom(type=shape, size=(*size, 0, 0)[:3], pos=pos, rgba=(*rgb, 1), **rolls)
    return spec.compile()


# ----------------------------------------------------------------------------------------------------------------------
# The world behind the server

COMPLIANCE = {  # SERL's controller: parameter: (default, greatest); N/m, Ns/m, Nm/rad, Nms/rad, m, and half radians
    "translational_stiffness": (2000, 6000), "translational_damping": (89, 400), "translational_Ki": (0, 100),
    "rotational_stiffness": (150, 300), "rotational_damping": (7, 30), "rotational_Ki": (0, 100),
    "nullspace_stiffness": (0.2, 100), "joint1_nullspace_stiffness": (100, 100),
    **{f"translational_clip_{side}": (0.01, 0.1) for side in ("x", "y", "z", "neg_x", "neg_y", "neg_z")},
    **{f"rotational_clip_{side}": (0.05, 0.1) for side in ("x", "y", "z", "neg_x", "neg_y", "neg_z")},
}  # fmt: skip
GRIPPERS = {  # what /getstate calls gripper_pos, of the fingers' distance in m
    "serl": lambda width: width,  # metres
    "hil-serl": lambda width: width / 0.08,  # 1 open
    "robotiq": lambda width: 255 * (1 - width / 0.08),  # raw, 255 closed
}
DOWN = np.array([0.0, 1.0, 0.0, 0.0])  # w x y z: the hand pointing down, its x and the base's alike


class World:
    """Arm, table and object, and the robot server's state. Not safe for threads: one thread owns it."""

    def __init__(self, gripper="serl"):
        self.gripper, self.faults, self.stopped = GRIPPERS[gripper], {}, False  # faults: those ordered, see FAULTS
        self.thing, self.screen, self.drawn, self.frames, self.seconds = None, None, {}, 0, 0.0
        self.reset(EXPERT_TASKS[0], 0)

    def reset(self, task, seed):
        """The operator's hands: put the task's object on the table and the arm where episodes start."""
        self.rng = rng = np.random.default_rng([seed, list(THINGS).index(task)])  # also of the encoders' noise
        thing = THINGS[task].drawn(rng)
        if thing != self.thing:
            self.close()
            self.thing, self.model = thing, build(thing)
            self.data, self.tcp = mujoco.MjData(self.model), self.model.site("tcp").id
        d = self.data
        mujoco.mj_resetData(self.model, d)
        d.qpos[:7], d.qpos[7:9] = RESET_Q, 0.04
        self.solve(np.array(HOME) + rng.uniform(-START, START, 3))
        yaw = rng.uniform(-thing.turned, thing.turned)
        d.qpos[9:] = rng.uniform(*PLACES[0]), rng.uniform(*PLACES[1]), 0, math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)
        self.width = self.opening = 0.08  # m between the fingers: asked for, and on the way there
        self.joints, self.last, self.torque = None, None, np.zeros(7)
        self.restart()
        self.advance(0.1)  # lets the object settle
        self.height = d.qpos[11]

    def solve(self, place):
        """Sets the joints so that the gripper points down at `place` (3,)."""
        for _ in range(20):
            p, quat = self.pose()
            error = np.concatenate([place - p, 2 * self.turn_to(DOWN, quat)])
            mujoco.mj_comPos(self.model, self.data)
            self.data.qpos[:7] += np.linalg.lstsq(self.measure(), error, rcond=1e-3)[0]

    # --- the controller

    def restart(self):
        """The impedance controller as it starts: default compliance, and its target where the arm is."""
        mujoco.mj_forward(self.model, self.data)
        self.parameters = {name: default for name, (default, _) in COMPLIANCE.items()}
        self.apply_parameters()
        self.target = self.filtered = self.pose()
        self.rest, self.integral = self.data.qpos[:7].copy(), np.zeros(6)

    def apply_parameters(self):
        c = self.parameters
        pair = lambda name: np.repeat([c[f"translational_{name}"], c[f"rotational_{name}"]], 3)  # noqa: E731
        self.K, self.D, self.Ki = pair("stiffness"), pair("damping"), pair("Ki")
        names = [f"{kind}_clip_{{}}{axis}" for kind in ("translational", "rotational") for axis in "xyz"]
        # upstream's error is actual - target, so the way to +x is limited by clip_neg_x
        self.clip = [-c[n.format("")] for n in names], [c[n.format("neg_")] for n in names]
        self.spring = np.full(7, c["nullspace_stiffness"])
        self.spring[0] *= c["joint1_nullspace_stiffness"]
        self.ease = 2 * math.sqrt(c["nullspace_stiffness"])

    def pose(self):
        """(place (3,), quaternion w x y z (4,)) of the gripper's centre."""
        mujoco.mj_kinematics(self.model, self.data)
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, self.data.site_xmat[self.tcp])
        return self.data.site_xpos[self.tcp].copy(), quat

    def measure(self):
        """The arm's Jacobian (6, 7), rows v, w, of the last forward pass."""
        J = np.empty((6, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, J[:3], J[3:], self.tcp)
        return J[:, :7]

    @staticmethod
    def turn_to(target, quat):
        """Vector part of the quaternion that turns `quat` to `target`: half the rotation vector, for small angles."""
        back, way = np.zeros(4), np.zeros(4)
        mujoco.mju_negQuat(back, quat)
        mujoco.mju_mulQuat(way, target, back)
        return way[1:] if way[0] >= 0 else -way[1:]

    def law(self, tick):
        """Joint torques (7,) of SERL's Cartesian impedance law, without gravity's."""
        d, (p, quat) = self.data, self.filtered
        q, dq = d.qpos[:7], d.qvel[:7]
        # the target is taken up by 0.5 % each millisecond: a time constant of 0.2 s
        p = p + 0.01 * (self.target[0] - p)
        sign = 1 if quat @ self.target[1] >= 0 else -1
        quat = quat + 0.01 * (sign * self.target[1] - quat)
        self.filtered = p, quat / math.sqrt(quat @ quat)
        J, now = self.measure(), np.empty(4)
        mujoco.mju_mat2Quat(now, d.site_xmat[self.tcp])
        error = np.concatenate([p - d.site_xpos[self.tcp], self.turn_to(self.filtered[1], now)])
        error = np.minimum(np.maximum(error, self.clip[0]), self.clip[1])
        self.integral = np.clip(self.integral + error, -0.1, 0.1)
        wrench = self.K * error - self.D * (J @ dq) + self.Ki * self.integral
        if tick % 5 == 0:  # slow, and so weak that nobody sees it
            posture = self.spring * (self.rest - q) - self.ease * dq
            self.null = posture - J.T @ np.linalg.solve(J @ J.T + 0.04 * np.eye(6), J @ posture)
        return J.T @ wrench + self.null

    def advance(self, seconds):
        """The world's next `seconds`."""
        m, d = self.model, self.data
        self.seconds += seconds
        for tick in range(round(seconds / TICK)):
            if self.joints is None:
                torque = self.law(tick)
            else:  # SERL's joint position controller: a straight way in joint space
                goal, start, self.phase = *self.joints, min(1.0, self.phase + TICK / 10)
                torque = 600 * (start + self.phase * (goal - start) - d.qpos[:7]) - 50 * d.qvel[:7]
            self.torque = np.clip(torque, self.torque - 2, self.torque + 2)  # 1 Nm a millisecond
            d.qfrc_applied[:7] = np.clip(self.torque + d.qfrc_bias[:7], -TORQUE, TORQUE)
            if "stuck_gripper" not in self.faults:
                self.opening += min(max(self.width - self.opening, -0.3 * TICK), 0.3 * TICK)
            push = 2000 * (self.opening / 2 - d.qpos[7:9])
            d.qfrc_applied[7:9] = np.minimum(np.maximum(push, -40), 40)
            still = d.qpos[:7].copy()
            mujoco.mj_step(m, d)
            if self.stopped:  # the brakes are on; the target is still listened to, and taken up when they are off
                d.qpos[:7], d.qvel[:7] = still, 0
        mujoco.mj_forward(m, d)

    # --- what the robot server says and does

    def state(self):
        """/getstate's answer; force and torque as libfranka estimates them: from joint torques, in the hand's frame."""
        if "frozen_state" in self.faults and self.last:
            return self.last
        d, (p, quat), J = self.data, self.pose(), self.measure()
        q = d.qpos[:7] + 1e-6 * self.rng.standard_normal(7)  # encoders are never quite still
        load = -np.linalg.solve(J @ J.T + 0.0025 * np.eye(6), J @ d.qfrc_constraint[:7])
        R = d.site_xmat[self.tcp].reshape(3, 3)
        self.last = {
            "pose": [*p, *quat[1:], quat[0]], "vel": [*(J @ d.qvel[:7])], "force": [*(R.T @ load[:3])],
            "torque": [*(R.T @ load[3:])], "q": [*q], "dq": [*d.qvel[:7]], "jacobian": J.tolist(),
            "gripper_pos": self.gripper(d.qpos[7] + d.qpos[8]),
        }  # fmt: skip
        if self.once("nan"):
            return self.last | {"pose": [math.nan, *self.last["pose"][1:]]}
        return self.last

    def once(self, fault):
        """Is this fault ordered? Uses up one of the times it was ordered for."""
        left = self.faults.get(fault, 0)
        if left:
            self.faults[fault] = left - 1
        return left > 0

    def aim(self, pose):
        """/pose: the equilibrium pose x y z, quaternion x y z w. As upstream, nothing but its length is checked."""
        assert len(pose) == 7
        pose = np.array(pose, float)
        if not np.isfinite(pose).all():
            self.stopped = True  # libfranka throws, and the controller is gone
        else:
            self.target, self.integral = (pose[:3], np.roll(pose[3:], 1) / np.linalg.norm(pose[3:])), np.zeros(6)

    def clear(self):
        if "user_stop" not in self.faults:
            self.stopped = False

    def set_parameters(self, values):
        for name, value in values.items():
            self.parameters[name] = min(max(float(value), 0.0), COMPLIANCE[name][1])
        self.apply_parameters()

    def move_joints(self, goal):
        """Start the joint position controller towards `goal` (7,); None: give the arm back to the impedance law."""
        self.phase = 0.0
        self.joints = None if goal is None else (np.array(goal), self.data.qpos[:7].copy())
        if goal is None:
            self.restart()

    # --- what no robot server offers

    def look(self):
        """What an eye above the table would tell."""
        thing = self.data.qpos[9:16]
        success = bool(thing[2] - self.height > LIFT)
        return {
            "success": success, "thing": [*thing], "grasp": self.thing.grasp, "target": [*self.target[0]],
            "seconds": self.seconds,
        }  # fmt: skip

    def picture(self, camera, width, height):
        """(picture (height, width, 3) uint8, its number, its age in s) of a camera."""
        key = camera, width, height
        if "frozen_camera" not in self.faults or key not in self.drawn:
            if self.screen is None:
                self.screen = _render.Picture(self.model, _render.camera(**CAMERAS["front"]))
                self.wrist = mujoco.MjvCamera()
                self.wrist.type, self.wrist.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
            image = self.screen.draw(self.data, width, height, {"front": None, "wrist": self.wrist}[camera])
            self.frames += 1
            self.drawn[key] = image, self.frames, self.seconds
        image, number, at = self.drawn[key]
        return image, number, self.seconds - at

    def close(self):
        if self.screen is not None:
            self.screen.close()
            self.screen = None


# ----------------------------------------------------------------------------------------------------------------------
# The server


class Server(ThreadingHTTPServer):
    """SERL's robot server in front of a World, which belongs to the thread that calls `run`; the others hand it jobs.

    clock: "realtime", or "lockstep", where the world stands still but for the PERIOD that each /pose lets pass.
    faults: may faults be ordered (POST /sim/fault)?
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, port=5000, clock="realtime", gripper="serl", faults=False):
        super().__init__(("127.0.0.1", port), Handler)
        self.clock, self.gripper, self.ordering, self.jobs = clock, gripper, faults, queue.SimpleQueue()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def run(self):
        """Serve until `stop`."""
        self.world = World(self.gripper)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        due = time.monotonic()
        while True:
            wait = None
            if self.clock == "realtime":
                if (behind := time.monotonic() - due) > 1:  # the machine slept, or cannot keep up
                    due += behind
                while due <= time.monotonic():
                    self.world.advance(5 * TICK)
                    due += 5 * TICK
                wait = max(0.0, due - time.monotonic())
            try:
                job, answer = self.jobs.get(timeout=wait)
            except queue.Empty:
                continue
            if job is None:
                break
            try:
                answer.put((job(self.world), None))
            except Exception as error:  # noqa: BLE001  as in Flask, whatever it is becomes a 500
                answer.put((None, error))
        self.world.close()
        self.shutdown()
        self.server_close()

    def stop(self):
        self.jobs.put((None, None))

    def do(self, job):
        """`job(world)`, in the world's thread."""
        answer = queue.SimpleQueue()
        self.jobs.put((job, answer))
        value, error = answer.get()
        if error is not None:
            raise error
        return value

    def wait(self, seconds):
        if self.clock == "realtime":
            time.sleep(seconds)
        else:
            self.do(lambda world: world.advance(seconds))

    # --- SERL's routes: each takes the request's JSON (None: it sent none) and gives text, or a dict to be sent as JSON

    def read(*keys, rename=None):
        return lambda self, _: {rename or key: self.do(World.state)[key] for key in keys}

    def getpos_euler(self, _):
        from scipy.spatial.transform import Rotation

        pose = self.do(World.state)["pose"]
        return {"pose": [*pose[:3], *Rotation.from_quat(pose[3:]).as_euler("xyz")]}

    def pose(self, body):
        self.do(lambda world: world.aim(body["arr"]))
        if self.clock == "lockstep":
            self.wait(PERIOD)
        return "Moved"

    def grip(width, text):
        def route(self, body):
            world_width = width if body is None or width is not None else min(max(body["gripper_pos"], 0), 255) / 2550
            self.do(lambda world: setattr(world, "width", min(world_width, 0.08)))
            return text

        return route

    def jointreset(self, _):
        """Upstream's order and times; like upstream it answers the same whether the arm arrived or not."""
        self.wait(1)
        self.do(World.clear)
        self.wait(3)
        self.do(World.clear)
        if not self.do(lambda world: world.once("reset_lies")):
            self.do(lambda world: world.move_joints(RESET_Q))
            for _ in range(30):
                self.wait(1)
                if np.abs(np.subtract(self.do(World.state)["q"], RESET_Q)).max() < 0.01:
                    break
        self.do(lambda world: world.move_joints(None))
        self.wait(5)
        return "Reset Joint"

    def impedance(self, seconds, text):
        self.wait(seconds)
        self.do(World.restart)
        return text

    def job(work, text):
        def route(self, body):
            self.do(lambda world: work(world, body))
            return text

        return route

    ROUTES = {
        "getstate": lambda self, _: self.do(World.state),
        "getpos": read("pose"), "getpos_euler": getpos_euler, "getvel": read("vel"), "getforce": read("force"),
        "gettorque": read("torque"), "getq": read("q"), "getdq": read("dq"), "getjacobian": read("jacobian"),
        "get_gripper": read("gripper_pos", rename="gripper"),
        "pose": pose, "jointreset": jointreset,
        "update_param": job(lambda world, body: world.set_parameters(body), "Updated compliance parameters"),
        "clearerr": job(lambda world, _: world.clear(), "Clear"),
        "startimp": lambda self, _: self.impedance(5, "Started impedance"),
        "stopimp": lambda self, _: self.impedance(1, "Stopped impedance"),
        "open_gripper": grip(0.08, "Opened"), "close_gripper": grip(0.01, "Closed"),
        "close_gripper_slow": grip(0.01, "Closed"), "move_gripper": grip(None, "Moved Gripper"),
        "activate_gripper": lambda self, _: "Activated", "reset_gripper": lambda self, _: "Reset",
        "set_load": job(lambda world, body: body["mass"], "Set Load"),
    }  # fmt: skip

    # --- routes that no robot has

    def info(self, _):
        return {"clock": self.clock, "period": PERIOD, "tasks": list(THINGS)}

    def place(self, body):
        if body["task"] not in THINGS:
            raise KeyError(body["task"])
        self.do(lambda world: world.reset(body["task"], body["seed"]))
        return "Reset"

    def camera(self, body):
        return self.do(lambda world: world.picture(body["name"], body["width"], body["height"]))

    def fault(self, body):
        """{"kind": ..., "value": n}: n times, or n seconds, or 1 for on; 0 ends it."""
        kind, value = body["kind"], body["value"]
        assert self.ordering and kind in FAULTS

        def order(world):
            world.faults.pop(kind, None)
            if kind in ("reflex", "user_stop") and value:
                world.stopped = True
            if value and kind != "reflex":
                world.faults[kind] = time.monotonic() + value if kind == "hang" else value

        self.do(order)
        return "Ordered"

    SIM = {"info": info, "reset": place, "look": lambda self, _: self.do(World.look), "camera": camera, "fault": fault}


FAULTS = {  # what can be ordered
    "reflex": "the arm brakes until /clearerr",
    "user_stop": "the same, and /clearerr does nothing until this is ended",
    "error": "the next n requests are answered with 500",
    "hang": "nothing is answered for n seconds",
    "drop": "the next n requests get no answer but a closed connection",
    "nan": "the next n states hold a NaN",
    "frozen_state": "the state stays what it was, whatever the arm does",
    "reset_lies": "the next n joint resets do not move the arm, and answer as ever",
    "stuck_gripper": "the fingers stay where they are",
    "frozen_camera": "the pictures stay what they were, and grow old",
}


class Handler(BaseHTTPRequestHandler):
    """Answers as Flask does: POST only, 404, 405, 415, 400 and 500 with a body of HTML."""

    protocol_version, wbufsize, disable_nagle_algorithm, timeout = "HTTP/1.1", -1, True, None

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        folder, _, name = self.path.strip("/").rpartition("/")
        route = {"": self.server.ROUTES, "sim": self.server.SIM}.get(folder, {}).get(name)
        if route is None:
            return self.html(404, "Not Found")
        faults = self.server.world.faults
        if folder == "" and any(kind in faults for kind in ("error", "hang", "drop")):
            time.sleep(max(0.0, faults.get("hang", 0) - time.monotonic()))
            if self.server.world.once("drop"):
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if self.server.world.once("error"):
                return self.html(500, "Internal Server Error")
        body = None
        if name in NEEDS_JSON or folder == "sim" and raw:
            if self.headers.get_content_type() != "application/json":
                return self.html(415, "Unsupported Media Type")
            try:
                body = json.loads(raw)
            except ValueError:
                return self.html(400, "Bad Request")
        try:
            answer = route(self.server, body)
        except Exception:  # noqa: BLE001  as in Flask
            return self.html(500, "Internal Server Error")
        if isinstance(answer, dict):
            self.send(200, "application/json", json.dumps(answer).encode())
        elif isinstance(answer, str):
            self.send(200, "text/html; charset=utf-8", answer.encode())
        else:
            image, number, age = answer
            self.send(200, "application/octet-stream", image.tobytes(), {"X-Number": number, "X-Age": age})

    def do_GET(self):
        known = self.path.strip("/") in self.server.ROUTES
        self.html(*((405, "Method Not Allowed") if known else (404, "Not Found")))

    do_PUT = do_DELETE = do_HEAD = do_GET

    def html(self, code, title):
        self.send(code, "text/html; charset=utf-8", f"<!doctype html>\n<title>{code} {title}</title>".encode())

    def send(self, code, kind, body, headers=None):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


NEEDS_JSON = ("pose", "update_param", "move_gripper", "set_load")


# ----------------------------------------------------------------------------------------------------------------------
# The domain: real_robot.py's client, talking to this file's server or to the one at ROBOT_URL

_idle = []  # servers of closed environments, for the next ones; all end with this process


class Child:
    """A lock-step server in a process of its own, which ends when this one does."""

    def __init__(self):
        command = [sys.executable, "-m", "domains.panda", "serve", "--port", "0", "--clock", "lockstep", "--faults"]
        pipe, root = subprocess.PIPE, Path(__file__).parent.parent
        self.process = subprocess.Popen([*command, "--child"], stdin=pipe, stdout=pipe, text=True, cwd=root)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise Refusal("the simulated robot server did not start: `python -m domains.panda serve` says why")


def real():
    """What says that the environments may be a real robot's."""
    return "ROBOT_URL is set" if os.environ.get("ROBOT_URL") else ""


def make(task, image_size=64):
    """A gymnasium.Env of the task: reward 1.0 and terminated on success, truncated after HORIZON decisions.

    Raises Refusal for an unknown task, and when there is no robot server at ROBOT_URL.
    """
    from real_robot import Panda, Setup  # here, for it brings torch with it, and the server does without

    if task not in THINGS:
        raise Refusal(f"unknown panda task {task!r}: known are {', '.join(THINGS)}")
    setup = Setup.from_environment()
    if setup.url:
        return Panda(setup, task, image_size, HORIZON)
    child = _idle.pop() if _idle else Child()
    return Panda(Setup(url=child.url), task, image_size, HORIZON, at_close=lambda: _idle.append(child))


def expert(env):
    """The scripted demonstrator in the environment's present state: (7,) float32 in [-1, 1], without noise.

    The fingers come down on both sides of the object through a funnel: as long as they are aside or turned away they
    stay above. They begin to close 25 mm above where they should be, still on their way down; closed on something, they
    lift. (Were they to stop first, a policy that cannot see the last millimetres would stop there for ever.)
    """
    from scipy.spatial.transform import Rotation

    env = env.unwrapped
    thing, seen = THINGS[env.task], env.scene.look()
    place, quat = np.split(np.array(seen["thing"]), [3])
    lies = Rotation.from_quat(quat, scalar_first=True)
    grasp = place + lies.apply(seen["grasp"])
    x, y, _ = lies.apply([1, 0, 0])
    alike = math.pi / 2 if thing.square else math.pi  # turned by this, the fingers close as well
    yaw = (math.atan2(y, x) + alike / 2) % alike - alike / 2
    down = Rotation.from_quat(DOWN, scalar_first=True)
    turn = (Rotation.from_rotvec([0, 0, yaw]) * down * env.turn.inv()).as_rotvec()
    off = env.place - grasp
    aside, tilted = math.hypot(*off[:2]), np.abs(turn).max()
    width = 0.08 * env.opening
    if 0.008 < width < 0.072 and np.linalg.norm(off) < 0.035:  # something between the fingers
        way, turn, grip = np.array([0, 0, 0.06]), 0 * turn, -1.0
    elif aside < 0.014 and abs(off[2]) < 0.025:
        way, grip = -off, -1.0
    else:
        above = min(0.08, 4 * max(0.0, aside - 0.012) + 0.15 * max(0.0, tilted - 0.15))
        way, grip = [0, 0, above] - off, 1.0
    way, turn = way / 0.022, turn / 0.09  # m and rad that the arm does of an action of 1, about
    action = [*way / max(1, np.abs(way).max()), *turn / max(1, np.abs(turn).max()), grip]
    return np.asarray(action, np.float32)


def main():
    parser = argparse.ArgumentParser(prog="python -m domains.panda", description=__doc__.split("\n")[0])
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("--port", type=int, default=5000, help="0: any that is free")
    parser.add_argument("--clock", choices=["realtime", "lockstep"], default="realtime")
    parser.add_argument("--gripper", choices=list(GRIPPERS), default="serl", help="whose gripper_pos")
    parser.add_argument("--faults", action="store_true", help="take orders for faults (POST /sim/fault)")
    parser.add_argument("--child", action="store_true", help="end when standard input does; Ctrl-C is for the parent")
    args = parser.parse_args()
    try:
        server = Server(args.port, args.clock, args.gripper, args.faults)
    except OSError as error:
        sys.exit(f"error: port {args.port} cannot be had ({error}): give another --port")
    if args.child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(server.url, flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
