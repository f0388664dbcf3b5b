"""Meta-World v3 as a domain: the paper's 25 expert tasks, 5 tasks to learn online and 10 unseen ones (Sec. V, Table I).

The paper names its five new tasks, which vary "object shape, color, and position". It does not name
the 25 tasks, the variations, the camera and the horizon. Here:

- Physics, goals, random object positions and the test for success are Meta-World's own. The reward
  is success, 0 or 1.
- An image consists of two views: the table, and the gripper from nearby. Meta-World's cameras are
  far away, and `corner2` is upside down. In a single view of the scene a handle is three pixels
  wide. The policy gets no proprioception.
- A variant is its family's task with another model (handle or button, proportions, a stand), other
  colours and another range of positions: the table VARIANTS, applied by `apply_variant`.
- Images are rendered without shadows, reflections and multisampling, and the arm as convex hulls:
  common/rendering.py.
"""

import warnings
from importlib.metadata import version

import gymnasium as gym
import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from common import rendering
from common.errors import UserError
from domains._metaworld_variants import VARIANTS, Variant, apply_variant

NAME = "metaworld"
HORIZON = 80  # environment steps; the slowest expert, on coffee-push with noise, needs up to 77
ACTION_REPEAT = 2  # steps of Meta-World (12.5 ms each) in an environment step
RL_ALGORITHM = "ppo"
ACTION_NOISE_STD = 0.2
RANDOM_BURST_PROB = 0.03
NUM_VIEWS = 2
DEMOS_PER_TASK = 100  # the paper uses 50
STAGE0_STEPS = 2000
STAGE2_STEPS = 1400
SFT_BATCH = 256  # frames per step
CAMERA = {"lookat": [0.0, 0.68, 0.13], "distance": 0.75, "azimuth": 135, "elevation": -35}
# The second camera looks at the gripper from the other side: two sides show depth.
NEAR_CAMERA = {"distance": 0.4, "azimuth": 45, "elevation": -35}
PROTOCOL = {
    "horizon": HORIZON,
    "action_repeat": ACTION_REPEAT,
    "camera": CAMERA,
    "near": NEAR_CAMERA,
    "drawing": "no shadows, no textures, arm as hulls, hand as hulls of 1 cm, 12 x 4 slices, floor 0.5 m, "
    "2 x 2 pixels averaged",
    "metaworld": version("metaworld"),
    "mujoco": version("mujoco"),
}

# 25 of Meta-World's 50 tasks, by two criteria. The scripted expert solves at least 9 of 10 episodes
# within the horizon, with and without noise (std 0.2) on its motion (results/metaworld/experts.md).
# And one small image and an instruction define the task. This leaves the five families of variants
# and similar tasks, and excludes inserting, stacking or carrying small objects.
INSTRUCTIONS = {
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "push the coffee machine button",
    "coffee-push": "push the mug under the coffee machine",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "turn the faucet off",
    "faucet-open": "turn the faucet on",
    "hammer": "hammer the nail",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down sideways",
    "plate-slide": "slide the plate into the goal",
    "plate-slide-back-side": "slide the plate sideways out of the goal",
    "plate-slide-side": "slide the plate sideways into the goal",
    "reach": "reach the red point",
    "reach-wall": "reach the red point over the wall",
    "sweep": "sweep the block off the table",
    "window-close": "close the window",
    "window-open": "open the window",
}
EXPERT_TASKS = list(INSTRUCTIONS)


RL_TASKS = [
    "button-press-new",
    "drawer-open-new",
    "door-open-new",
    "window-open-new",
    "window-close-new",
]
UNSEEN_TASKS = [task for task in VARIANTS if task not in RL_TASKS]
INSTRUCTIONS |= {task: INSTRUCTIONS[variant.family] for task, variant in VARIANTS.items()}

# Their meshes collide with nothing.
ARM_LINKS = ("pedestal", "base", "head", "l0", "l1", "l2", "l3", "l4", "l5")
HULL_CELL = 0.01  # m to which the hulls of the gripper and the wrist are thinned in images
# Fields that a task may change.
MODEL_FIELDS = ("body_pos", "body_quat", "site_pos", "site_rgba", "geom_rgba")

# A scripted policy acts like a spring: near its target it asks for less and less, finally for less
# than the noise, which is not a useful label. A stiffer spring reaches the target at full speed
# (results/experiments.md).
STIFFNESS = {"reach": 4.0, "reach-wall": 2.0}

# Scripted policies deliberately ask for more than the action range, and are clipped.
warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high", module="metaworld")


def make_simulation(name: str, variant: Variant | None) -> gym.Env:
    """Return Meta-World's own environment `name`, of a model that is fast to render."""

    class Simulation(ALL_V3_ENVIRONMENTS[name]):
        def _initialize_simulation(self):  # gymnasium would compile the unchanged XML file
            spec = mujoco.MjSpec.from_file(self.fullpath)
            rendering.coarsen_meshes(spec, ARM_LINKS)
            if variant:
                apply_variant(spec, variant)
            model = spec.compile()
            rendering.reduce_geometry(model)
            rendering.remove_textures(model)
            return model, mujoco.MjData(model)

        def _reset_hand(self, steps=50):
            # Moving the arm takes most of a reset. MetaWorld.reset runs two passes, and needs it
            # only in the second.
            super()._reset_hand(steps if self._freeze_rand_vec else 0)

        # Meta-World's dense rewards use both. Success never depends on them.
        touching_main_object = False

        def _gripper_caging_reward(self, *args, **kwargs):
            return 0.0

    sim = Simulation()
    if variant:
        space = sim._random_reset_space
        low = space.low + variant.offset
        high = space.high + variant.offset
        sim._random_reset_space = gym.spaces.Box(low, high, dtype=float)
    sim._set_task_called = True
    sim.seeded_rand_vec = True
    # Scripted policies read the goal from the state; images never show it.
    sim._partially_observable = False
    del sim.sawyer_observation_space  # cached while the goal was hidden
    return sim


def observe(sim: gym.Env) -> np.ndarray:
    """Return Meta-World's observation (39,) of the present state, without rotations and the previous frame.

    They take most of an observation's time, and neither scripted policies nor success depend on
    them.
    """
    position = sim.data.xpos
    body = sim.model.body
    claws = position[body("rightclaw").id] - position[body("leftclaw").id]
    objects = sim._get_pos_objects()
    obs = np.zeros(39)
    obs[:3] = position[body("hand").id]
    obs[3] = min(np.linalg.norm(claws) / 0.1, 1.0)
    for i in range(0, len(objects), 3):
        begin = 4 + 7 * (i // 3)  # a position and a quaternion of each object
        obs[begin : begin + 3] = objects[i : i + 3]
    obs[-3:] = sim._get_pos_goal()
    return obs


def advance(sim: gym.Env, action: np.ndarray) -> tuple[np.ndarray, bool]:
    """Execute an action like Meta-World's `step`. Return the observation (39,) and whether the task is solved."""
    sim.set_xyz_action(action[:3])
    sim.data.ctrl[:] = action[-1], -action[-1]
    mujoco.mj_step(sim.model, sim.data, sim.frame_skip)
    mujoco.mj_forward(sim.model, sim.data)
    space = sim.sawyer_observation_space
    obs = np.clip(observe(sim), space.low, space.high)
    _, info = sim.evaluate_state(obs, action)
    return obs, bool(info["success"])


class MetaWorld(gym.Env):
    """One task.

    Observation: (image_size, image_size, 3) uint8. Action: (4,) in [-1, 1], clipped: the gripper's
    motion x, y, z (1 is 10 mm a step of Meta-World) and its closing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 40}

    def __init__(self, task: str, image_size: int = 64):
        if task not in INSTRUCTIONS:
            raise UserError(
                f"unknown Meta-World task {task!r}: known are {', '.join(INSTRUCTIONS)}"
            )
        self.task = task
        self.image_size = image_size
        self.render_mode = "rgb_array"
        self.variant = VARIANTS.get(task)
        name = (self.variant.family if self.variant else task) + "-v3"
        self.sim = make_simulation(name, self.variant)
        self.initial_fields = {
            field: getattr(self.sim.model, field).copy() for field in MODEL_FIELDS
        }
        self.scripted_policy = ENV_POLICY_MAP[name]()
        self.state = None  # what `observe` returns, for the scripted policy
        self.env_steps = 0
        self.succeeded = False
        self.renderer = rendering.Renderer(
            self.sim.model, rendering.make_camera(**CAMERA), HULL_CELL
        )
        self.near_camera = rendering.make_camera(lookat=(0, 0, 0), **NEAR_CAMERA)
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Start an episode and return its first image.

        With a seed, the initial state depends on the seed alone. Without, this environment's
        generator draws it.
        """
        super().reset(seed=seed)
        sim = self.sim
        self.env_steps = 0
        self.succeeded = False
        for field, value in self.initial_fields.items():
            getattr(sim.model, field)[:] = value
        sim.np_random = self.np_random
        # Twice, as Meta-World does: the first pass draws and places the object. The second moves
        # the arm and measures, with the object in its place.
        for second_pass in (False, True):
            sim._freeze_rand_vec = second_pass
            mujoco.mj_resetData(sim.model, sim.data)
            mujoco.mj_forward(sim.model, sim.data)
            sim.reset_model()
        mujoco.mj_forward(sim.model, sim.data)
        self.state = observe(sim)
        return self.get_image(self.image_size), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Execute an action for ACTION_REPEAT steps of Meta-World, or until the first success of the episode.

        Stepping may go on after the end of an episode. The reward, `terminated` and info["success"]
        then tell whether the task is solved after this step. Raises ValueError if the action is not
        4 finite numbers.
        """
        action = np.asarray(action, np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be 4 finite numbers (got {action})")
        action = np.clip(action, -1.0, 1.0)
        for _ in range(ACTION_REPEAT):
            self.state, success = advance(self.sim, action)
            if success and not self.succeeded:
                break
        self.succeeded |= success
        self.env_steps += 1
        image = self.get_image(self.image_size)
        return image, float(success), success, self.env_steps >= HORIZON, {"success": success}

    def get_image(self, size: int) -> np.ndarray:
        """Return the policy's view at any size up to 240 pixels, as a new array (size, size, 3) uint8.

        The upper half shows the table, the lower half the surroundings of the gripper.
        """
        self.near_camera.lookat[:] = self.sim.tcp_center
        return self.renderer.render_views(
            self.sim.data, size, (self.renderer.camera, self.near_camera)
        )

    def render(self) -> np.ndarray:
        """Return the policy's view at the largest size, for videos."""
        return self.get_image(rendering.BUFFER_SIZE // 2)

    def close(self) -> None:
        """Free the OpenGL resources. The environment may still be used, and then loads them again."""
        self.renderer.close()


def make(task: str, image_size: int = 64) -> MetaWorld:
    """Return the environment of a task: reward 1.0 and terminated on success, truncated after HORIZON steps.

    Raises UserError for an unknown task, and at the first reset if no image can be rendered.
    """
    return MetaWorld(task, image_size)


def preload() -> None:
    """Compute the coarse meshes of the arm, which every environment needs."""
    make_simulation("reach-v3", None)


def expert(env: gym.Env) -> np.ndarray:
    """Return the action of Meta-World's scripted policy in the present state, without noise: (4,) float32 in [-1, 1].

    plate-slide-back-side, door-lock, both reaches and the variants of door-open are corrected.
    Neither the environment nor its state is changed.
    """
    env = env.unwrapped
    # Some scripts change the array that they get.
    action = env.scripted_policy.get_action(env.state.copy())
    action[:3] *= STIFFNESS.get(env.task, 1.0)
    action = np.clip(action, -1.0, 1.0).astype(np.float32)
    if env.task in MOTIONS:
        action[:3] = MOTIONS[env.task](env.state)
    if env.variant and env.variant.family == "door-open":
        # The script comes down in front of a handle that is nearer or higher than its own, and
        # pushes the door shut. Raise the gripper first.
        hand = env.state[:3]
        handle = env.state[4:7]
        closed = env.sim.data.joint("doorjoint").qpos[0] > -0.03
        if closed and hand[1] < handle[1] - 0.02 and hand[2] < handle[2] + 0.06:
            action[:3] = 0.0, 0.0, 1.0
    return action


def slide_plate_back(state: np.ndarray) -> np.ndarray:
    """Return the motion (3,) of the expert of plate-slide-back-side.

    Meta-World's script moves up again once it is 1 cm off to the side, and slides as soon as it
    touches the plate's rim. A policy that is slightly too high slides over the plate. Here the
    gripper must be 3 cm off when it is low, and goes down before it slides.
    """
    hand = state[:3]
    above_plate = state[4:7] + (0.023, 0.0, 0.025)
    sideways = np.linalg.norm(hand[:2] - above_plate[:2])
    height = hand[2] - above_plate[2]
    if sideways > (0.03 if height < 0.057 else 0.02):
        target = above_plate + (0.0, 0.0, 0.07)
    elif height > 0.037:
        target = above_plate
    else:
        target = np.array([hand[0] + 0.1, 0.6, hand[2]])
    return np.clip(10.0 * (target - hand), -1.0, 1.0)


def press_lever(state: np.ndarray) -> np.ndarray:
    """Return the motion (3,) of the expert of door-lock.

    Meta-World's script comes down 2 cm from two edges of the lever, and misses it if it is 1 cm off.
    Here the gripper comes down 3 cm from both, to 3 cm lower, and presses nearly straight down. It
    does not rise again until it is 3 cm off.
    """
    hand = state[:3]
    lever = state[4:7] + (-0.03, -0.03, -0.03)
    if np.linalg.norm(hand[:2] - lever[:2]) > 0.03:
        target = hand + (0.0, -0.1, 0.1) if hand[2] < 0.25 else lever + (0.0, 0.0, 0.3)
    elif abs(hand[2] - lever[2]) > 0.02:
        target = lever
    else:
        target = lever + (-0.03, 0.02, -0.2)
    return np.clip(25.0 * (target - hand), -1.0, 1.0)


# Tasks whose script is replaced, except for its gripper.
MOTIONS = {"plate-slide-back-side": slide_plate_back, "door-lock": press_lever}
