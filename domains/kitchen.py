"""Franka Kitchen as a domain: 5 expert tasks, 2 tasks to learn online and 3 unseen ones.

The paper's Table I (Sec. V) has the five expert tasks, the red slide door (learned online) and the
yellow one (unseen). The other three are our own. The paper does not describe actions, camera and
horizon, and of the new tasks it only states that "appearance and position" differ. Here:

- Physics and scene are gymnasium-robotics' `FrankaKitchen-v1`. The stock start is the same for
  every seed. Here the fixtures and the arm start at other positions in every episode (SHIFTS).
- Success is a joint position. It is stricter than the stock 0.3 (rad or m) from the goal, which
  counts a nudge (`Skill.success`).
- The action is a 7-D motion of the end effector. Damped least squares turn it into the stock joint
  velocities (`Kitchen.joint_action`).
- The left hinged door is not among the stock tasks, and its handle is out of reach where the
  cabinet hangs. In its tasks the cabinet hangs lower and nearer: the arm can pull the door open by
  0.6 to 0.9 rad, and 0.5 is success.
- An image consists of two views: the kitchen, and the end effector from nearby. In a single view of
  the scene a handle is two pixels wide, and 50 demonstrations do not teach how to grip it.
- Experts are functions of the present state alone (`expert`), because a policy that sees one image
  cannot imitate memory.
"""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version

import gymnasium as gym
import mujoco
import numpy as np

from common import rendering
from common.errors import UserError
from domains._kitchen_minari import split_episode
from domains._kitchen_tasks import KNOBS, SHIFTS, TASKS, is_success

# It warns about its other environments.
with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
    from gymnasium_robotics.envs.franka_kitchen import KitchenEnv

NAME = "kitchen"
INSTRUCTIONS = {name: task.instruction for name, task in TASKS.items()}
EXPERT_TASKS = ["knob-on", "light-on", "microwave-open", "slide-door-open", "left-door-open"]
RL_TASKS = ["slide-door-open-red", "left-door-open-new"]
UNSEEN_TASKS = ["slide-door-open-yellow", "knob-on-unseen", "microwave-open-unseen"]

HORIZON = 80  # environment steps
ACTION_REPEAT = 3  # steps of the stock environment (80 ms each) in an environment step
RL_ALGORITHM = "ppo"
ACTION_NOISE_STD = 0.1
RANDOM_BURST_PROB = 0.06
NUM_VIEWS = 2
DEMOS_PER_TASK = 50
STAGE0_STEPS = 2000
STAGE2_STEPS = 1400
SFT_BATCH = 256  # frames per step
CAMERA = {"lookat": [-0.27, 0.5, 2.2], "distance": 1.6, "azimuth": 62, "elevation": -22}
NEAR_DISTANCE = 0.3  # m, of the second camera, which looks at the end effector from the same side
PROTOCOL = {
    "horizon": HORIZON,
    "action_repeat": ACTION_REPEAT,
    "camera": CAMERA,
    "near": NEAR_DISTANCE,
    "drawing": "no shadows, arm as hulls, 12 x 2 slices, floor 0.5 m, 2 x 2 pixels averaged",
    "gymnasium-robotics": version("gymnasium-robotics"),
    "mujoco": version("mujoco"),
}

MAX_TRANSLATION = 0.02  # m that an action of 1 asks of one stock step
MAX_ROTATION = 0.08  # rad that an action of 1 asks of one stock step
RADIAN = 0.4  # m that one radian counts as in the inverse kinematics
DAMPING = 0.05**2  # m^2, of the least squares
DAMPING_MATRIX = DAMPING * np.eye(6)
MAX_MOTION = np.repeat([MAX_TRANSLATION, RADIAN * MAX_ROTATION], 3)  # m, of a motion (6,)
ARM_SHIFT = 0.05  # rad, half the range of each arm joint's start
PUSH = 0.05  # m that the expert aims ahead when it pushes
OPEN = 1.0  # the gripper's action
CLOSED = -1.0
# Rotation of the end effector that points at the counter, fingers side by side. The columns are its
# x, y and z axes in the frame of the fixture.
FORWARD = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]], float)
# M; the point between the finger pads, in the frame of the site "end_effector".
TCP = np.array([0.0, 0.0, 0.035])


# ----------------------------------------------------------------------------------------------------------------------
# Rotations


def rotation_matrix(rotation_vector: np.ndarray) -> np.ndarray:
    """Return the rotation matrix (3, 3) of a rotation vector (3,) in rad."""
    angle = np.linalg.norm(rotation_vector)
    axis = rotation_vector / angle if angle > 1e-9 else np.array([1.0, 0, 0])
    quaternion = np.zeros(4)
    R = np.zeros(9)
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    mujoco.mju_quat2Mat(R, quaternion)
    return R.reshape(3, 3)


def rotation_vector(R: np.ndarray) -> np.ndarray:
    """Return the rotation vector (3,) in rad of a rotation matrix (3, 3)."""
    quaternion = np.zeros(4)
    vector = np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(R).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


# ----------------------------------------------------------------------------------------------------------------------
# The environment


class Kitchen(gym.Env):
    """One task.

    Observation: (image_size, image_size, 3) uint8. Action: (7,) in [-1, 1], clipped. It is the end
    effector's motion in each of ACTION_REPEAT stock steps, in the world's frame: x, y, z (1 is
    MAX_TRANSLATION), a rotation vector (1 is MAX_ROTATION), and the gripper's opening from -1
    (closed) to 1 (open). The zero action holds the end effector still, with the gripper half open.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, task: str, image_size: int = 64):
        if task not in TASKS:
            raise UserError(f"unknown kitchen task {task!r}: known are {', '.join(TASKS)}")
        self.task = TASKS[task]
        self.skill = self.task.skill
        self.image_size = image_size
        self.render_mode = "rgb_array"
        self.env_steps = 0
        self.succeeded = False
        # The stock task has no effect here.
        self.sim = KitchenEnv(tasks_to_complete=["slide cabinet"]).robot_env
        self.sim._get_obs = self.measure_joints
        self.model = self.sim.model
        self.data = self.sim.data
        self.prepare_model()
        self.renderer = rendering.Renderer(self.model, rendering.make_camera(**CAMERA), cull=True)
        self.near_camera = rendering.make_camera(**CAMERA | {"distance": NEAR_DISTANCE})
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)

        m = self.model
        self.initial_body_pos = m.body_pos.copy()
        self.initial_qpos = self.sim.init_qpos.copy()
        self.end_effector = m.site("end_effector").id
        self.site = m.site(self.skill.site).id
        self.body = int(m.site_bodyid[self.site])
        self.joint = m.joint(self.skill.joint).id
        self.address = int(m.jnt_qposadr[self.joint])  # index of the task's joint in qpos
        self.kp = m.actuator_gainprm[:9, 0].copy()
        self.unit = 2.0 * self.sim.dt  # rad that a stock action of 1 asks of one stock step
        # A position servo of stiffness kp and joint damping D moves as far as asked if its target
        # leads by this factor.
        self.lead = (m.dof_damping[:9] / (self.kp * self.sim.dt) + 0.5)[:7]
        bounds = self.sim.robot_pos_bound[:7]
        self.low = np.maximum(bounds[:, 0], m.jnt_range[:7, 0])
        self.high = np.minimum(bounds[:, 1], m.jnt_range[:7, 1])

    def prepare_model(self) -> None:
        """Colour the task's materials, and draw the arm's collision hulls (300 faces), not its meshes (20,000)."""
        m = self.model
        for geom in range(m.ngeom):
            if m.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH:
                continue
            mesh = m.mesh(m.geom_dataid[geom]).name
            if mesh.endswith("_viz") and mesh != "finger_viz":
                m.geom_group[geom] = 5
            elif mesh.endswith("_col"):
                m.geom_group[geom] = 0
                m.geom_rgba[geom] = (0.92, 0.93, 0.90, 1)
        rendering.reduce_geometry(m, stacks=2)
        for material, colour in self.task.colours.items():
            m.mat_rgba[m.material(material).id, :3] = colour

    def measure_joints(self) -> np.ndarray:
        """Return the stock observation (18,), the robot's joint positions and velocities with noise, and keep it.

        The stock method looks up each joint by its name, which takes as long as a tenth of an image.
        """
        sim = self.sim
        position_noise = sim.robot_noise_ratio * sim.robot_pos_noise_amp[:9]
        velocity_noise = sim.robot_noise_ratio * sim.robot_vel_noise_amp[:9]
        position = sim.data.qpos[:9] + position_noise * sim.np_random.uniform(-1.0, 1.0, 9)
        velocity = sim.data.qvel[:9] + velocity_noise * sim.np_random.uniform(-1.0, 1.0, 9)
        sim._last_robot_qpos = position
        return np.concatenate((position, velocity))

    # --- poses

    def end_effector_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the position (3,) and rotation matrix (3, 3) of the point between the fingers."""
        R = self.data.site_xmat[self.end_effector].reshape(3, 3)
        return self.data.site_xpos[self.end_effector] + R @ TCP, R

    def target_pose(
        self, offset: tuple[float, float, float], ahead: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the end effector's position (3,) and rotation matrix (3, 3) at an offset from the task's handle.

        ahead: how far the task's joint is moved first (m or rad). The end effector follows the
        handle, but does not turn with a door.
        """
        d = self.data
        axis = d.xaxis[self.joint]
        position = d.site_xpos[self.site]
        R = d.xmat[self.body].reshape(3, 3)
        if self.model.jnt_type[self.joint] == mujoco.mjtJoint.mjJNT_SLIDE:
            position = position + axis * ahead
            turned = np.zeros(3)
        else:
            anchor = d.xanchor[self.joint]
            further = rotation_matrix(axis * ahead)
            position = anchor + further @ (position - anchor)
            R = further @ R
            turned = axis * (d.qpos[self.address] + ahead)
        if self.skill.frame is not None:
            R = R @ rotation_matrix(np.array(self.skill.frame))
        return position + R @ np.asarray(offset), rotation_matrix(-turned) @ R @ FORWARD

    # --- the 7-D action

    def jacobian(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the Jacobians of the end effector's position and rotation, (3, 7) each, for the arm's joints."""
        position = np.zeros((3, self.model.nv))
        rotation = np.zeros((3, self.model.nv))
        point = self.end_effector_pose()[0]
        body = int(self.model.site_bodyid[self.end_effector])
        mujoco.mj_jac(self.model, self.data, position, rotation, point, body)
        return position[:, :7], rotation[:, :7]

    def posture_motion(self) -> np.ndarray:
        """Return the joint motion (7,) in rad that is wanted in addition to the end effector's.

        It leads to the initial posture and away from joint limits.
        """
        q = self.data.qpos[:7]
        from_low = np.maximum(self.low + 0.4 - q, 0)
        from_high = np.maximum(q - self.high + 0.4, 0)
        return 0.03 * (self.initial_qpos[:7] - q) + 0.2 * (from_low - from_high)

    def joint_action(self, action: np.ndarray) -> np.ndarray:
        """Return the stock environment's action (9,) in [-1, 1], joint velocities, that executes a 7-D action.

        Damped least squares, with the posture motion in the null space. Joints at a limit are left
        out.
        """
        d = self.data
        q = d.qpos[:7]
        wanted = action[:6] * MAX_MOTION
        posture = self.posture_motion()
        position_jacobian, rotation_jacobian = self.jacobian()
        full_jacobian = np.vstack([position_jacobian, RADIAN * rotation_jacobian])  # (6, 7)
        free = np.ones(7)  # 0 for joints that are left out
        for _ in range(3):
            J = full_jacobian * free
            inverse = J.T @ np.linalg.inv(J @ J.T + DAMPING_MATRIX)  # (7, 6)
            dq = inverse @ (wanted - J @ (posture * free)) + posture * free  # (7,)
            below = (q + dq < self.low + 0.01) & (dq < 0)
            above = (q + dq > self.high - 0.01) & (dq > 0)
            stuck = below | above
            if not (stuck & (free > 0)).any():
                break
            free = free * ~stuck
        stock = np.zeros(9)
        stock[:7] = dq * self.lead
        # Keeps the direction.
        stock[:7] *= min(1.0, 0.9 * self.unit / max(np.abs(stock[:7]).max(), 1e-9))
        stock[:7] += d.qfrc_bias[:7] / self.kp[:7]  # compensates gravity, or the arm would sink
        stock[7:] = 0.02 * (1 + action[6]) - d.qpos[7:9]
        return np.clip(stock / self.unit, -1, 1)

    def end_effector_action(self, stock_action: np.ndarray) -> np.ndarray:
        """Return the 7-D action that asks for the same motion as a stock action (9,): the inverse of `joint_action`.

        The result is the motion that was asked for. The motion that followed may be smaller, as
        that of a gripper that pushes. It may exceed [-1, 1].
        """
        d = self.data
        asked = self.unit * stock_action  # rad and m
        dq = (asked[:7] - d.qfrc_bias[:7] / self.kp[:7]) / self.lead
        position_jacobian, rotation_jacobian = self.jacobian()
        J = np.vstack([position_jacobian, rotation_jacobian]) * np.repeat(
            [[1], [RADIAN]], 3, axis=0
        )
        posture = self.posture_motion()
        motion = J @ dq + DAMPING * np.linalg.pinv(J @ J.T, rcond=1e-3) @ J @ (dq - posture)
        opening = (d.qpos[7:9] + asked[7:]).mean() / 0.02 - 1
        return np.array([*motion / MAX_MOTION, opening])

    # --- gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Start an episode and return its first image.

        With a seed, the initial state depends on the seed alone. Without, this environment's
        generator draws it.
        """
        super().reset(seed=seed)
        rng = self.np_random
        m = self.model
        self.env_steps = 0
        self.succeeded = False
        m.body_pos[:] = self.initial_body_pos
        for name, half_range in SHIFTS.items():
            shift = rng.uniform(-1, 1, 3) * half_range
            if name == self.skill.fixture:
                shift = shift + self.task.shift
            for body in KNOBS if name == "knobs" else (name,):
                m.body_pos[m.body(body).id] += shift
        qpos = self.initial_qpos.copy()
        qpos[:7] += rng.uniform(-ARM_SHIFT, ARM_SHIFT, 7)
        qpos[:7] = np.clip(qpos[:7], self.low + 0.01, self.high - 0.01)
        self.sim.init_qpos = qpos
        # Seeds the stock noise on the joint controllers' measurements.
        self.sim.reset(seed=int(rng.integers(2**31)))
        return self.get_image(self.image_size), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Execute an action for ACTION_REPEAT stock steps, or until the first success of the episode.

        Stepping may go on after the end of an episode. The reward, `terminated` and info["success"]
        then tell whether the task is solved after this step. Raises ValueError if the action is not
        7 finite numbers.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be 7 finite numbers (got {action})")
        for _ in range(ACTION_REPEAT):
            self.sim.step(self.joint_action(action.clip(-1, 1)))
            success = bool(is_success(self.skill, self.data.qpos[self.address]))
            if success and not self.succeeded:
                break
        self.succeeded |= success
        self.env_steps += 1
        image = self.get_image(self.image_size)
        return image, float(success), success, self.env_steps >= HORIZON, {"success": success}

    def get_image(self, size: int) -> np.ndarray:
        """Return the policy's view at any size up to 240 pixels, as a new array (size, size, 3) uint8.

        The upper half shows the kitchen, the lower half the surroundings of the end effector, from
        the same side.
        """
        self.near_camera.lookat[:] = self.end_effector_pose()[0]
        return self.renderer.render_views(self.data, size, (self.renderer.camera, self.near_camera))

    def render(self) -> np.ndarray:
        """Return the policy's view at the largest size, for videos."""
        return self.get_image(rendering.BUFFER_SIZE // 2)

    def close(self) -> None:
        """Free the OpenGL resources. The environment may still be used, and then loads them again."""
        self.renderer.close()


def make(task: str, image_size: int = 64) -> Kitchen:
    """Return the environment of a task: reward 1.0 and terminated on success, truncated after HORIZON steps.

    Raises UserError for an unknown task, and at the first reset if no image can be rendered.
    """
    return Kitchen(task, image_size)


# ----------------------------------------------------------------------------------------------------------------------
# The expert


def expert(env: gym.Env) -> np.ndarray:
    """Return the scripted demonstrator's action in the present state, without noise: (7,) float32 in [-1, 1].

    The end effector approaches the contact point inside a funnel: the farther it is from the line
    between approach and contact, the farther it stays back. In contact it grips, if there is
    something to grip, and moves the handle along its joint's path. If it loses the handle, it opens
    and approaches again.
    """
    env = env.unwrapped
    skill = env.skill
    position, R = env.end_effector_pose()
    contact, target_R = env.target_pose(skill.contact)
    approach, _ = env.target_pose(skill.approach)
    line = contact - approach
    length = np.linalg.norm(line)
    line /= length
    error = position - contact
    rotation_error = rotation_vector(target_R @ R.T)
    tilt = np.linalg.norm(rotation_error)
    width = env.data.qpos[7] + env.data.qpos[8]  # m between the fingers
    touching = np.linalg.norm(error) < (0.045 if width < 0.05 else 0.02) and tilt < 0.4
    gripper = CLOSED if touching or not skill.grip else OPEN
    if touching and (width < 0.05 or not skill.grip):
        max_lead = ACTION_REPEAT * skill.lead
        left = np.clip(skill.goal - env.data.qpos[env.address], -max_lead, max_lead)
        next_contact, target_R = env.target_pose(skill.contact, left)
        rotation_error = rotation_vector(target_R @ R.T)
        ahead = next_contact - contact
        # The contact presses a pushing gripper back along its path; it must not slip sideways.
        if not skill.grip:
            path = ahead / np.linalg.norm(ahead)
            ahead = PUSH * path
            error = 2.5 * (error - path * (error @ path))
        motion = ahead - 0.4 * error
    else:
        sideways = np.linalg.norm(error - line * (error @ line))
        back = min(length, 4 * max(0.0, sideways - 0.012) + 0.3 * max(0.0, tilt - 0.15))
        if touching:
            back = 0.0
        motion = contact - line * back - position
    translation = motion / (ACTION_REPEAT * MAX_TRANSLATION)
    rotation = rotation_error / (ACTION_REPEAT * MAX_ROTATION)
    translation /= max(1, np.abs(translation).max())
    rotation /= max(1, np.abs(rotation).max())
    return np.asarray([*translation, *rotation, gripper], np.float32).clip(-1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Human demonstrations


def from_minari(
    episode: object, image_size: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the single tasks in an episode of Minari's D4RL/kitchen data sets, in the format of our own episodes.

    Yields (task, images (T, H, W, 3), actions (T, 7), rewards (T,)). The data sets are teleoperated
    (Relay Policy Learning, 1910.11956). Only expert tasks in which nothing was moved or recoloured
    are used.
    """
    skills = {}
    for name in EXPERT_TASKS:
        task = TASKS[name]
        if not any(task.shift) and not task.colours:
            skills[name] = task.skill
    env = make(EXPERT_TASKS[0], image_size)
    yield from split_episode(env, episode, skills, ACTION_REPEAT, HORIZON)
    env.close()
