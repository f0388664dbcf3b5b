"""A toy domain that is learned in minutes: touch the ball, the box, or the mug by its handle.

The image is the view of a camera on the end effector, straight down on a table. The ring in its centre is where the end
effector touches, and an action moves it over the table. It starts below the object.

The expert demonstrates the ball and the box, which are touched at their centre. A policy trained on them also moves to
the centre of the mug. In some episodes it crosses the handle on its way, and RL starts from these.

Everything is drawn with numpy. Lengths are in half image widths, x points to the right and y down.
"""

import gymnasium as gym
import numpy as np

NAME = "toy"
INSTRUCTIONS = {
    "touch-ball": "touch the ball",
    "touch-box": "touch the box",
    "touch-mug": "touch the handle of the mug",
    "touch-green-mug": "touch the handle of the green mug",
}
EXPERT_TASKS = ["touch-ball", "touch-box"]
RL_TASKS = ["touch-mug"]
UNSEEN_TASKS = ["touch-green-mug"]

HORIZON = 8  # environment steps
RL_ALGORITHM = "ppo"
ACTION_NOISE_STD = 0.2
RANDOM_BURST_PROB = 0.05
NUM_VIEWS = 1
DEMOS_PER_TASK = 100
STAGE0_STEPS = 200
STAGE2_STEPS = 200
SFT_BATCH = 32
PROTOCOL = {"horizon": HORIZON}

MAX_MOTION = 0.35  # that an action of 1 asks for
MAX_MISS = 0.25  # greatest distance from the goal in a success
HANDLE = np.array([0.0, 0.48])  # of a mug, from its centre
START_DISTANCE = (0.6, 0.9)  # from the end effector to the object
START_ANGLE = 1.5  # rad; the object is at most so far from straight ahead
COLOURS = {  # light objects on a dark table, which the tiny VLM learns to find within few images
    "table": (50, 42, 38),
    "touch-ball": (255, 190, 120),
    "touch-box": (150, 200, 255),
    "touch-mug": (250, 250, 245),
    "touch-green-mug": (150, 250, 150),
    "coffee": (200, 160, 120),
    "ring": (130, 130, 140),
    "ring on the goal": (60, 235, 90),
}
PLANES = {name: np.array(rgb, np.float32).reshape(3, 1, 1) for name, rgb in COLOURS.items()}


class Toy(gym.Env):
    """A task of the toy domain. The state is the object's position (x, y), seen from the end effector."""

    metadata = {"render_fps": 4}

    def __init__(self, task: str, image_size: int):
        self.task = task
        self.image_size = image_size
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        angle = self.np_random.uniform(-START_ANGLE, START_ANGLE)
        self.position = self.np_random.uniform(*START_DISTANCE) * np.array(
            [np.sin(angle), -np.cos(angle)]
        )
        self.num_steps = 0
        return self.draw(self.image_size), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position = np.clip(self.position - MAX_MOTION * action, -1, 1)
        self.num_steps += 1
        success = self.is_success()
        return self.draw(self.image_size), float(success), success, self.num_steps >= HORIZON, {}

    def goal(self) -> np.ndarray:
        """Return the position to touch, seen from the end effector: (2,)."""
        return self.position + HANDLE if "mug" in self.task else self.position

    def is_success(self) -> bool:
        return bool(np.hypot(*self.goal()) < MAX_MISS)

    def render(self) -> np.ndarray:
        return self.draw(256)

    def draw(self, size: int) -> np.ndarray:
        """Return the image, (size, size, 3) uint8."""
        pixel = 2 / size
        axis = pixel * (np.arange(size, dtype=np.float32) + 0.5) - 1
        image = np.tile(PLANES["table"], (1, size, size))  # (3, H, W)

        def paint(edge: np.ndarray, colour: str) -> None:
            """Fill a shape, smoothly at its edge. edge (H, W): distance from the edge, negative inside."""
            image[:] += np.clip(0.5 - edge / pixel, 0, 1) * (PLANES[colour] - image)

        def distance(x: float, y: float) -> np.ndarray:
            return np.hypot(axis - np.float32(x), (axis - np.float32(y))[:, None])  # (H, W)

        x, y = self.position
        if self.task == "touch-box":
            paint(
                np.maximum(abs(axis - np.float32(x)), abs(axis - np.float32(y))[:, None]) - 0.36,
                self.task,
            )
        else:
            if "mug" in self.task:
                paint(abs(distance(*self.goal()) - 0.15) - 0.05, self.task)
            paint(distance(x, y) - 0.4, self.task)
            if "mug" in self.task:
                paint(distance(x, y) - 0.28, "coffee")
        paint(
            abs(distance(0, 0) - 0.13) - 0.035, "ring on the goal" if self.is_success() else "ring"
        )
        return np.ascontiguousarray(image.transpose(1, 2, 0), np.uint8)


def make(task: str, image_size: int = 64) -> gym.Env:
    return Toy(task, image_size)


def expert(env: gym.Env) -> np.ndarray:
    """Return a motion towards the goal that slows down as it gets nearer: (2,)."""
    return np.clip(env.unwrapped.goal(), -1, 1).astype(np.float32)
