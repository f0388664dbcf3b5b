"""Franka Kitchen as a domain: 5 expert tasks, 2 tasks to learn online and 3 unseen ones. Table I (Sec. V) has the
expert tasks, the red slide door, learned online, and the yellow one, unseen; the other three are of our own.

The paper names the tasks; actions, camera, horizon and how the new ones differ, it does not say beyond "appearance and
position". Here:

- Physics and scene are gymnasium-robotics' `FrankaKitchen-v1`. The stock start is the same for every seed; here things,
  and the arm, start elsewhere in every episode (SHIFTS).
- Success is a joint's position, stricter than the stock 0.3 (rad or m) from the goal, within which a nudge is a success
  (`Task.success`).
- Action: 7-D motion of the hand, turned into the stock joint velocities by damped least squares (`Kitchen.joints`).
- The left hinged door is not among the stock tasks. Its handle is out of the arm's reach where the cabinet hangs, so in
  its tasks the cabinet hangs lower and nearer; there the arm can pull it open by 0.6 to 0.9 rad, and 0.5 is done.
- The picture is two views in one: the kitchen, and the hand from nearby. In one view of all a handle is two pixels
  wide, and 50 demonstrations do not teach to grip it (results/experiments.md).
- Experts are functions of the present state alone (`expert`): a policy that sees one picture cannot imitate a memory.
"""

from domains import _render  # isort: skip  first: where there is no OpenGL it says so; the others would trace back

import contextlib
from dataclasses import dataclass
from importlib.metadata import version

import gymnasium as gym
import mujoco
import numpy as np

from domains import Refusal

with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # it warns about its other environments
    from gymnasium_robotics.envs.franka_kitchen import KitchenEnv

HORIZON = 80  # decisions
ALGO = "ppo"  # of stage 1
ACTION_REPEAT = 3  # steps of the stock environment (80 ms each) a decision
CAMERA = {"lookat": [-0.27, 0.5, 2.2], "distance": 1.6, "azimuth": 62, "elevation": -22}
NEAR = 0.3  # m, the same camera's distance when it looks at the hand
NOISE, KICKS = 0.1, 0.06  # of the demonstrations, see stage0_sft.py
VIEWS = 2  # in a picture
STEPS = 4000  # of stage 0's optimizer
DEMOS = 50  # successful expert episodes of each task
PROTOCOL = {"horizon": HORIZON, "action_repeat": ACTION_REPEAT, "camera": CAMERA, "near": NEAR,
            "drawing": "no shadows, arm as hulls, 12 slices, 2 x 2 pixels averaged"}  # fmt: skip
PROTOCOL |= {package: version(package) for package in ("gymnasium-robotics", "mujoco")}

STEP, TURN = 0.02, 0.08  # m and rad that an action of 1 asks of one stock step
RADIAN, DAMPING = 0.4, 0.05**2  # m that a radian counts as, in the inverse kinematics; m^2
PUSH = 0.05  # m that a pushing hand aims ahead
OPEN, SHUT = 1.0, -1.0  # the gripper's action
TCP = np.array([0.0, 0.0, 0.035])  # m; between the finger pads, in the frame of the site "end_effector"


def turn(axis_angle):
    """3x3 rotation matrix of a rotation vector (rad)."""
    angle = np.linalg.norm(axis_angle)
    q, R = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(q, axis_angle / angle if angle > 1e-9 else np.array([1.0, 0, 0]), angle)
    mujoco.mju_quat2Mat(R, q)
    return R.reshape(3, 3)


def axis_angle(R):
    """Rotation vector (rad) of a 3x3 rotation matrix."""
    q, v = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(q, np.ascontiguousarray(R).ravel())
    mujoco.mju_quat2Vel(v, q, 1.0)
    return v


# The hand's orientations, as matrices whose columns are its x, y, z axes in the frame of the thing it works on
FORWARD = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]], float)  # pointing at the counter, fingers side by side
KNOB = turn(np.array([-np.pi / 2, 0, 0]))  # knobs are modelled lying down

# ----------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    """What is moved, how far it must go, and the expert's way; lengths in m, angles in rad, offsets in the frame of the
    moved body, measured from its site."""

    thing: str  # what stands elsewhere in every episode, of SHIFTS
    site: str  # on its handle, knob or switch
    joint: str
    success: float  # joint position that counts as done,
    goal: float  # and the one that the expert makes for
    approach: tuple  # offset to come from
    contact: tuple  # offset to grip or push at
    grip: bool  # else the closed fingers push
    lead: float  # how far ahead of the joint the expert aims in a stock step
    frame: np.ndarray | None = None  # turn that makes the body's frame upright


# fmt: off
SLIDE = Task("slidecabinet", "slide_site", "slide_cabinet", 0.30, 0.42, (0, -0.12, 0), (0, 0.015, 0), True, 0.05)
LEFT_DOOR = Task(
    "hingecabinet", "hinge_site1", "left_hinge_cabinet", -0.5, -1.0, (0, -0.12, 0), (0, 0.03, 0), True, 0.1)
MICROWAVE = Task("microwave", "microhandle_site", "microwave", -0.6, -0.9, (0.05, -0.15, 0), (0, 0.03, 0), True, 0.06)
LIGHT = Task("hoodroot", "light_site", "light_switch", -0.6, -1.2, (0.07, -0.10, 0), (0.05, 0.01, 0), False, 0.1)
BAR = {"approach": (-0.05, -0.10, 0.035), "contact": (-0.022, 0, 0.042), "grip": False, "lead": 0.07, "frame": KNOB}
KNOB4 = Task("knobs", "knob4_site", "knob_Joint_4", -0.8, -1.5, **BAR)
KNOB3 = Task("knobs", "knob3_site", "knob_Joint_3", -0.8, -1.5, **BAR)

TABLE = {  # task: what the expert does, the sentence, shift of the thing's range of places (m), colours of materials
    "knob-on": (KNOB4, "turn the top left knob on", (0, 0, 0), {}),
    "light-on": (LIGHT, "turn the light on", (0, 0, 0), {}),
    "microwave-open": (MICROWAVE, "open the microwave", (0, 0, 0), {}),
    "slide-door-open": (SLIDE, "slide the cabinet door open", (0, 0, 0), {}),
    "left-door-open": (LEFT_DOOR, "open the left cabinet door", (0.10, -0.12, -0.15), {}),  # within the arm's reach
    "slide-door-open-red": (
        SLIDE, "slide the cabinet door open", (0.06, -0.02, -0.05), {"M_slide_blue": (0.9, 0.1, 0.1)}),
    "left-door-open-new": (
        LEFT_DOOR, "open the left cabinet door", (0.14, -0.15, -0.20), {"M_hinge_blue": (0.2, 0.8, 0.2)}),
    "slide-door-open-yellow": (
        SLIDE, "slide the cabinet door open", (-0.04, -0.03, -0.06), {"M_slide_blue": (0.9, 0.8, 0.1)}),
    "knob-on-unseen": (KNOB3, "turn the top right knob on", (0, 0, 0), {}),
    "microwave-open-unseen": (MICROWAVE, "open the microwave", (0.05, -0.05, 0), {"micro_black": (0.8, 0.2, 0.6)}),
}
# fmt: on
INSTRUCTIONS = {task: row[1] for task, row in TABLE.items()}
EXPERT_TASKS = ["knob-on", "light-on", "microwave-open", "slide-door-open", "left-door-open"]
RL_TASKS = ["slide-door-open-red", "left-door-open-new"]
UNSEEN_TASKS = ["slide-door-open-yellow", "knob-on-unseen", "microwave-open-unseen"]

SHIFTS = {  # body: half the range of its place in x, y, z (m); drawn anew in every episode, whatever the task
    "slidecabinet": (0.05, 0.02, 0.03), "hingecabinet": (0.03, 0.02, 0.03), "microwave": (0.03, 0.03, 0.0),
    "hoodroot": (0.02, 0.01, 0.01), "knobs": (0.02, 0.0, 0.01),
}  # fmt: skip
KNOBS = ("knob 1", "knob 2", "knob 3", "knob 4")  # moved together
ARM_SHIFT = 0.05  # rad, half the range of each joint's start


class Kitchen(gym.Env):
    """One task. Observation (image_size, image_size, 3) uint8. Action (7,) in [-1, 1], clipped: the hand's motion
    x, y, z (STEP) and rotation vector (TURN) in the world's frame, from where it is now, in each of ACTION_REPEAT stock
    steps; and the gripper's opening, -1 shut to 1 open. So 0 holds still, with the gripper half open."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, task, image_size=64):
        if task not in INSTRUCTIONS:
            raise Refusal(f"unknown kitchen task {task!r}: known are {', '.join(INSTRUCTIONS)}")
        self.image_size, self.render_mode = image_size, "rgb_array"
        self.task, _, self.shift, colours = TABLE[task]
        self.sim = KitchenEnv(tasks_to_complete=["slide cabinet"]).robot_env  # the stock task decides nothing here
        m, self.data = self.sim.model, self.sim.data
        self.model, self.decisions = m, 0
        for geom in range(m.ngeom):  # draw the arm's collision hulls (300 faces) instead of its looks (20,000)
            mesh = m.mesh(m.geom_dataid[geom]).name if m.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH else ""
            if mesh.endswith("_viz") and mesh != "finger_viz":
                m.geom_group[geom] = 5
            elif mesh.endswith("_col"):
                m.geom_group[geom], m.geom_rgba[geom] = 0, (0.92, 0.93, 0.90, 1)
        _render.few_faces(m)
        for material, colour in colours.items():
            m.mat_rgba[m.material(material).id, :3] = colour
        self.screen, self.near = (
            _render.Picture(m, _render.camera(**CAMERA)),
            _render.camera(**CAMERA | {"distance": NEAR}),
        )
        self.places, self.start = m.body_pos.copy(), self.sim.init_qpos.copy()
        self.hand = m.site("end_effector").id
        self.site, self.joint = m.site(self.task.site).id, m.joint(self.task.joint).id
        self.body, self.address = int(m.site_bodyid[self.site]), int(m.jnt_qposadr[self.joint])
        self.kp = m.actuator_gainprm[:9, 0].copy()
        self.unit = 2.0 * self.sim.dt  # rad that a native action of 1 asks of one stock step
        # a position servo of stiffness kp and joint damping D moves as far as asked when its target leads by this much
        self.lead = (m.dof_damping[:9] / (self.kp * self.sim.dt) + 0.5)[:7]
        bound = self.sim.robot_pos_bound[:7]
        self.low, self.high = np.maximum(bound[:, 0], m.jnt_range[:7, 0]), np.minimum(bound[:, 1], m.jnt_range[:7, 1])
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)

    # --- where things are

    def hand_pose(self):
        """(position (3,), rotation (3, 3)) of the point between the fingers."""
        R = self.data.site_xmat[self.hand].reshape(3, 3)
        return self.data.site_xpos[self.hand] + R @ TCP, R

    def target(self, offset, further=0.0):
        """(position (3,), rotation (3, 3)) of the hand at an offset from the task's handle, if its joint were `further`
        on than it is. The hand goes the handle's way but does not turn with a door."""
        d, j, frame = self.data, self.joint, self.task.frame
        p, R, axis = d.site_xpos[self.site], d.xmat[self.body].reshape(3, 3), d.xaxis[j]
        if self.model.jnt_type[j] == mujoco.mjtJoint.mjJNT_SLIDE:
            p, turned = p + axis * further, np.zeros(3)
        else:
            p, R = d.xanchor[j] + turn(axis * further) @ (p - d.xanchor[j]), turn(axis * further) @ R
            turned = axis * (d.qpos[self.address] + further)
        R = R if frame is None else R @ frame
        return p + R @ np.asarray(offset), turn(-turned) @ R @ FORWARD

    # --- the 7-D action

    def posture(self):
        """Motion of the joints (7,), rad, that is asked for beside the hand's: to the start's, away from limits."""
        q = self.data.qpos[:7]
        near = np.clip(self.low + 0.4 - q, 0, None) - np.clip(q - self.high + 0.4, 0, None)
        return 0.03 * (self.start[:7] - q) + 0.2 * near

    def joints(self, action):
        """The stock environment's 9 joint velocities, in [-1, 1], that move the hand as asked: damped least squares, in
        the null space towards the start's posture and away from joint limits. Joints at a limit are left out."""
        m, d = self.model, self.data
        jacp, jacr = np.zeros((3, m.nv)), np.zeros((3, m.nv))
        mujoco.mj_jac(m, d, jacp, jacr, self.hand_pose()[0], int(m.site_bodyid[self.hand]))
        q, free, posture = d.qpos[:7], np.ones(7), self.posture()
        wanted = action[:6] * np.repeat([STEP, RADIAN * TURN], 3)
        for _ in range(3):
            J = np.vstack([jacp[:, :7], RADIAN * jacr[:, :7]]) * free  # (6, 7)
            inverse = J.T @ np.linalg.inv(J @ J.T + DAMPING * np.eye(6))  # (7, 6)
            dq = inverse @ (wanted - J @ (posture * free)) + posture * free  # (7,)
            stuck = (q + dq < self.low + 0.01) & (dq < 0) | (q + dq > self.high - 0.01) & (dq > 0)
            if not (stuck & (free > 0)).any():
                break
            free = free * ~stuck
        native = np.zeros(9)
        native[:7] = dq * self.lead
        native[:7] *= min(1.0, 0.9 * self.unit / max(np.abs(native[:7]).max(), 1e-9))  # keeps the direction
        native[:7] += d.qfrc_bias[:7] / self.kp[:7]  # gravity, else the arm sinks
        native[7:] = 0.02 * (1 + action[6]) - d.qpos[7:9]
        return np.clip(native / self.unit, -1, 1)

    # --- gymnasium

    def reset(self, *, seed=None, options=None):
        """With a seed, the initial state depends on it alone; without, it is the next of this environment's own."""
        super().reset(seed=seed)
        rng, m, self.decisions = self.np_random, self.model, 0
        m.body_pos[:] = self.places
        for thing, half in SHIFTS.items():
            shift = rng.uniform(-1, 1, 3) * half + (self.shift if thing == self.task.thing else (0, 0, 0))
            for body in KNOBS if thing == "knobs" else (thing,):
                m.body_pos[m.body(body).id] += shift
        qpos = self.start.copy()
        qpos[:7] = np.clip(qpos[:7] + rng.uniform(-ARM_SHIFT, ARM_SHIFT, 7), self.low + 0.01, self.high - 0.01)
        self.sim.init_qpos = qpos
        self.sim.reset(seed=int(rng.integers(2**31)))  # the stock noise on what the joint controllers measure
        return self.picture(self.image_size), {}

    def step(self, action):
        """Raises ValueError if the action is not 7 finite numbers. info["success"] is what terminated says."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, not {action}")
        for _ in range(ACTION_REPEAT):
            self.sim.step(self.joints(action.clip(-1, 1)))
            q = self.data.qpos[self.address]
            if success := bool(q * np.sign(self.task.success) >= abs(self.task.success)):
                break
        self.decisions += 1
        picture = self.picture(self.image_size)
        return picture, float(success), success, self.decisions >= HORIZON, {"success": success}

    def picture(self, size):
        """The policy's view at another size, (size, size, 3) uint8, up to 240 pixels: above the kitchen, below what is
        around the hand, seen from the same side. Also for videos."""
        self.near.lookat[:] = self.hand_pose()[0]
        return self.screen.stacked(self.data, size, (self.screen.view, self.near))

    def render(self):
        return self.picture(_render.BUFFER // 2)

    def close(self):
        """Frees what OpenGL holds of it. The environment may still be used, and then loads that again."""
        self.screen.close()


def make(task, image_size=64):
    """A gymnasium.Env of the task: reward 1.0 and terminated on success, truncated after HORIZON decisions.

    Raises Refusal for an unknown task, and at the first reset if no picture can be drawn.
    """
    return Kitchen(task, image_size)


def expert(env):
    """The scripted demonstrator in the environment's present state: (7,) float32 in [-1, 1], without noise.

    The hand comes to the contact point down a funnel: the further it is off the line from approach to contact, the
    further back it stays. In contact it grips (where there is something to grip), and takes the handle along its
    joint's way. Off the handle, it opens and comes again.
    """
    env = env.unwrapped
    task, (p, R) = env.task, env.hand_pose()
    contact, Rt = env.target(task.contact)
    approach, _ = env.target(task.approach)
    way = contact - approach
    length = np.linalg.norm(way)
    way /= length
    off = p - contact
    aside = np.linalg.norm(off - way * (off @ way))
    tilt = np.linalg.norm(axis_angle(Rt @ R.T))
    width = env.data.qpos[7] + env.data.qpos[8]
    touching = np.linalg.norm(off) < (0.045 if width < 0.05 else 0.02) and tilt < 0.4
    grip = SHUT if touching or not task.grip else OPEN
    if touching and (width < 0.05 or not task.grip):
        left = np.clip(task.goal - env.data.qpos[env.address], -ACTION_REPEAT * task.lead, ACTION_REPEAT * task.lead)
        further, Rt = env.target(task.contact, left)
        ahead = further - contact
        if not task.grip:  # a pushing hand is pressed back on its way, but must not slip aside
            along = ahead / np.linalg.norm(ahead)
            ahead, off = PUSH * along, 2.5 * (off - along * (off @ along))
        dp = ahead - 0.4 * off  # the handle's way, and back to where the hand should be on it
    else:
        back = 0.0 if touching else min(length, 4 * max(0.0, aside - 0.012) + 0.3 * max(0.0, tilt - 0.15))
        dp = contact - way * back - p
    dp, dr = dp / (ACTION_REPEAT * STEP), axis_angle(Rt @ R.T) / (ACTION_REPEAT * TURN)
    action = [*dp / max(1, np.abs(dp).max()), *dr / max(1, np.abs(dr).max()), grip]
    return np.asarray(action, np.float32).clip(-1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Human demonstrations


def from_minari(episode, image_size):
    """The single tasks in an episode of Minari's D4RL/kitchen data sets (teleoperated: Relay Policy Learning
    1910.11956): yields (task, images (T, H, W, 3), actions (T, 7), rewards (T,)), as our own episodes are.

    Such an episode does several tasks in the stock environment. Each that is an expert task here, where nothing has
    been moved, is cut out, from when the task before it was done. Pictures are drawn from the stored states. An action
    is the inverse of `Kitchen.joints`: the motion of the hand that the stock actions of a decision asked for, not the
    one that came of it (a hand that pushes asks for more), clipped, and the opening asked of the gripper.
    """
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import BONUS_THRESH, OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

    state = np.asarray(episode.observations["observation"], float)  # (T+1, 59): arm's qpos, qvel, things' qpos, qvel
    qpos = np.hstack([state[:, :9], state[:, 18:39]])  # (T+1, 30)
    qvel = np.hstack([state[:, 9:18], state[:, 39:]])  # (T+1, 29)
    native = np.asarray(episode.actions, float).clip(-1, 1)  # (T, 9)
    env, done = make(EXPERT_TASKS[0], image_size), {}
    m, d = env.model, env.data
    ours = {task: TABLE[task][0] for task in EXPERT_TASKS if not any(TABLE[task][2]) and not TABLE[task][3]}
    address = {task: m.jnt_qposadr[m.joint(ours[task].joint).id] for task in ours}
    for task, at in address.items():
        done[task] = qpos[:, at] * np.sign(ours[task].success) >= abs(ours[task].success)
    for stock, goal in OBS_ELEMENT_GOALS.items():
        if not set(OBS_ELEMENT_INDICES[stock]) & set(address.values()):  # a thing that none of ours is about
            done[stock] = np.linalg.norm(qpos[:, OBS_ELEMENT_INDICES[stock]] - goal, axis=1) < BONUS_THRESH
    first = {name: int(now.argmax()) for name, now in done.items() if now.any()}
    for task in ours:
        end = first.get(task, 0)
        begin = max([k for k in first.values() if k < end], default=0)
        if not 0 < end - begin <= HORIZON * ACTION_REPEAT:
            continue
        images, actions = [], []
        for k in range(begin, end):
            d.qpos[:], d.qvel[:] = qpos[k], qvel[k]
            mujoco.mj_forward(m, d)
            if (k - begin) % ACTION_REPEAT == 0:
                images.append(env.picture(image_size))
                actions.append([])
            jac = np.zeros((6, m.nv))
            mujoco.mj_jac(m, d, jac[:3], jac[3:], env.hand_pose()[0], int(m.site_bodyid[env.hand]))
            asked = env.unit * native[k]  # rad and m
            dq = (asked[:7] - d.qfrc_bias[:7] / env.kp[:7]) / env.lead
            J, posture = jac[:, :7] * np.repeat([[1], [RADIAN]], 3, axis=0), env.posture()
            move = J @ dq + DAMPING * np.linalg.pinv(J @ J.T, rcond=1e-3) @ J @ (dq - posture)
            opening = (qpos[k, 7:9] + asked[7:]).mean() / 0.02 - 1
            actions[-1].append([*move / np.repeat([STEP, RADIAN * TURN], 3), opening])
        actions = np.stack([np.mean(a, axis=0).clip(-1, 1) for a in actions])
        yield task, np.stack(images), actions, np.eye(len(actions))[-1]
    env.close()
