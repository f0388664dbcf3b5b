"""The paper's real-world experiment (Sec. V-D) as a domain: a Panda picks up one object, simulated or real.

The environment is robot/env.py's. It talks HTTP to the robot server at ROBOT_URL, which may be a
real robot's. Without ROBOT_URL each environment starts a simulated server of its own (robot/sim).

The paper's robot grasped blocks of four colours from demonstrations, learned online to grasp an
eggplant and a carrot, and was tested on other objects. The paper does not report sizes, positions,
cameras and horizon. Here:

- One object lies on the table, at another position and yaw in every episode. Lifting it by LIFT is
  a success. It is one block, not four to choose from: the tiny VLM sees colours swapped at random
  in SFT (stage0_sft.py).
- The policy sees one image: the front camera's view above the wrist camera's, 64 x 32 pixels each.
- The expert is a function of the present state alone: a policy that sees one image cannot imitate a
  memory.
"""

import math
import os
from importlib.metadata import version

import gymnasium as gym
import numpy as np
from scipy.spatial.transform import Rotation

from common.errors import UserError
from robot.env import PandaEnv
from robot.limits import DOWN, PERIOD, Limits
from robot.server import RobotConfig
from robot.sim.objects import BLOCK_SIZES, CAMERAS, LIFT, PLACES, TASKS, task_object
from robot.sim.process import SimProcess

NAME = "panda"
HORIZON = 60  # environment steps
RL_ALGORITHM = "sacfd"
ACTION_NOISE_STD = 0.2
RANDOM_BURST_PROB = 0.06
NUM_VIEWS = 2
STAGE0_STEPS = 2500
STAGE2_STEPS = 1400
SFT_BATCH = 256  # frames per step
DEMOS_PER_TASK = 50
EXPERT_TASKS = ["pick-red-block", "pick-green-block", "pick-blue-block", "pick-yellow-block"]
RL_TASKS = ["pick-eggplant", "pick-carrot"]
UNSEEN_TASKS = [task for task in TASKS if task not in (*EXPERT_TASKS, *RL_TASKS)]
INSTRUCTIONS = {task: f"pick up the {name}" for task, name in TASKS.items()}
PROTOCOL = {
    "horizon": HORIZON,
    "period": PERIOD,
    "step": Limits.step,
    "turn": Limits.rotation_step,
    "lift": LIFT,
    "places": PLACES,
    "blocks": BLOCK_SIZES,
    "cameras": CAMERAS,
    "gymnasium-robotics": version("gymnasium-robotics"),
    "mujoco": version("mujoco"),
}

idle_servers = []  # servers of closed environments, for the next ones; all end with this process


def real_robot() -> str:
    """Return why the environments may be a real robot's, or ""."""
    return "ROBOT_URL is set" if os.environ.get("ROBOT_URL") else ""


def make(task: str, image_size: int = 64) -> gym.Env:
    """Return an environment of the task: reward 1.0 and terminated on success, truncated after HORIZON steps.

    Raises UserError for an unknown task, and if there is no robot server at ROBOT_URL.
    """
    if task not in TASKS:
        raise UserError(f"unknown panda task {task!r}: known are {', '.join(TASKS)}")
    config = RobotConfig.from_environment()
    if config.url:
        return PandaEnv(config, task, image_size, HORIZON)
    server = idle_servers.pop() if idle_servers else SimProcess()
    return PandaEnv(
        RobotConfig(url=server.url),
        task,
        image_size,
        HORIZON,
        at_close=lambda: idle_servers.append(server),
    )


def expert(env: gym.Env) -> np.ndarray:
    """Return the scripted demonstrator's action (7,) float32 in [-1, 1] in the present state, without noise.

    The fingers come down on both sides of the object through a funnel: while they are off its
    centre or yaw, they stay above. They begin to close 25 mm above the grasp, still on their way
    down. Once they hold something, they lift. (If they stopped first, a policy that cannot see the
    last millimetres would stop there forever.)
    """
    env = env.unwrapped
    obj = task_object(env.task)
    seen = env.operator.look()
    position, quat = np.split(np.array(seen["object_pose"]), [3])
    object_rotation = Rotation.from_quat(quat, scalar_first=True)
    grasp = position + object_rotation.apply(seen["grasp"])
    x, y, _ = object_rotation.apply([1, 0, 0])
    # Rotated by this angle, the grasp is the same.
    symmetry = math.pi / 2 if obj.symmetric else math.pi
    yaw = (math.atan2(y, x) + symmetry / 2) % symmetry - symmetry / 2
    turn = (Rotation.from_rotvec([0, 0, yaw]) * DOWN * env.state.rotation.inv()).as_rotvec()
    offset = env.state.position - grasp
    aside = math.hypot(*offset[:2])
    width = 0.08 * env.state.opening
    if 0.008 < width < 0.072 and np.linalg.norm(offset) < 0.035:  # the fingers hold something
        way = np.array([0, 0, 0.06])
        turn = 0 * turn
        gripper = -1.0
    elif aside < 0.014 and abs(offset[2]) < 0.025:
        way = -offset
        gripper = -1.0
    else:
        tilted = np.abs(turn).max()
        above = min(0.08, 4 * max(0.0, aside - 0.012) + 0.15 * max(0.0, tilted - 0.15))
        way = [0, 0, above] - offset
        gripper = 1.0
    way = way / 0.022  # m of an action of 1, roughly
    turn = turn / 0.09  # rad of an action of 1, roughly
    action = [*way / max(1, np.abs(way).max()), *turn / max(1, np.abs(turn).max()), gripper]
    return np.asarray(action, np.float32)


if __name__ == "__main__":  # the older name of `python -m robot.sim`
    from robot.sim.__main__ import main

    main()
