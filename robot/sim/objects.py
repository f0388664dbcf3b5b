"""The simulated scene in numbers: objects, table and cameras. Nothing here needs MuJoCo.

- A block has another size in every episode (BLOCK_SIZES), because the tiny VLM knows nothing else:
  before a head can learn to grasp a long, thick or flat object, SFT must have shown the VLM blocks
  that are long, thick or flat.
- The RL objects are harder than blocks. The eggplant is thicker than any block: the open fingers
  leave 6 mm on each side. The carrot is round and thinner at one end. It is short, because the tiny
  VLM's policy hardly ever closes the fingers on an object that is longer than any block
  (results/experiments.md), and RL needs a success to start from.
"""

from dataclasses import dataclass

import numpy as np

LIFT = 0.07  # m, rise of the object that is a success
PLACES = ((0.42, 0.56), (-0.11, 0.11))  # m, positions of objects: x from the robot, y to its left
# M, least and greatest (length, width, height) of a block.
BLOCK_SIZES = ((0.062, 0.03, 0.02), (0.1, 0.052, 0.06))
CAMERAS = {
    "front": {"lookat": [0.46, 0.0, 0.075], "distance": 0.52, "azimuth": 180, "elevation": -33},
    # In the hand's frame.
    "wrist": {"pos": [0.09, 0.0, 0.0], "lookat": [0.035, 0.0, 0.13], "fovy": 58},
}


@dataclass(frozen=True)
class Object:
    """An object: its shape and its grasp, in metres and radians. Its frame's origin lies on the table."""

    parts: tuple  # (primitive, rgb, half sizes, centre)
    grasp: tuple  # where the fingers close, along the object's y axis
    yaw_range: float = 1.0  # the object's yaw is uniform in +- yaw_range
    symmetric: bool = False  # the grasp is symmetric under a 90-degree yaw
    random_size: bool = False  # a block of another size, within BLOCK_SIZES, in every episode

    def draw(self, rng: np.random.Generator) -> "Object":
        """Return the object of one episode."""
        return block(self.parts[0][1], *rng.uniform(*BLOCK_SIZES)) if self.random_size else self


def block(
    rgb: tuple, length: float = 0.048, width: float = 0.048, height: float = 0.048, **options
) -> Object:
    """Return a block."""
    half_sizes = length / 2, width / 2, height / 2
    return Object((("box", rgb, half_sizes, (0, 0, height / 2)),), (0, 0, height / 2), **options)


def upright(*parts: tuple, height: float) -> Object:
    """Return an object that can be grasped from any side, at this height."""
    return Object(parts, (0, 0, height), symmetric=True)


PURPLE = (0.35, 0.1, 0.45)
ORANGE = (1, 0.45, 0.05)
GREEN = (0.2, 0.55, 0.15)
LIME = (0.65, 0.75, 0.2)
YELLOW = (0.95, 0.85, 0.1)
RED = (0.85, 0.15, 0.1)
BROWN = (0.6, 0.4, 0.25)
WHITE = (0.9, 0.85, 0.75)
CORN = (1.0, 0.8, 0.25)
SILVER = (0.7, 0.72, 0.75)

# The order of the objects is part of every episode's seed.
OBJECTS = {
    "red block": block((0.85, 0.1, 0.1), random_size=True),
    "green block": block((0.1, 0.65, 0.2), random_size=True),
    "blue block": block((0.1, 0.25, 0.85), random_size=True),
    "yellow block": block((0.95, 0.8, 0.1), random_size=True),
    "eggplant": Object(  # thick: the fingers must come down on both sides
        (
            ("ellipsoid", PURPLE, (0.055, 0.034, 0.026), (-0.014, 0, 0.026)),
            ("ellipsoid", PURPLE, (0.05, 0.022, 0.019), (0.042, 0, 0.02)),
            ("ellipsoid", GREEN, (0.018, 0.011, 0.01), (0.093, 0, 0.022)),
        ),
        grasp=(0.015, 0, 0.022),
    ),
    "carrot": Object(  # tapers to one end and rolls: grasped as high as a block, it slips
        (
            ("ellipsoid", ORANGE, (0.03, 0.018, 0.018), (0.009, 0, 0.018)),
            ("ellipsoid", ORANGE, (0.03, 0.0117, 0.0117), (-0.015, 0, 0.0117)),
            ("ellipsoid", GREEN, (0.01, 0.0108, 0.009), (0.0405, 0, 0.0144)),
        ),
        grasp=(0.003, 0, 0.018),
    ),
    "purple block": block((0.5, 0.15, 0.6), yaw_range=0.6, symmetric=True),
    "tomato": upright(
        ("ellipsoid", RED, (0.029, 0.029, 0.026), (0, 0, 0.026)),
        ("ellipsoid", GREEN, (0.012, 0.012, 0.004), (0, 0, 0.052)),
        height=0.022,
    ),
    "lemon": Object(
        (("ellipsoid", YELLOW, (0.038, 0.025, 0.025), (0, 0, 0.025)),), grasp=(0, 0, 0.02)
    ),
    "banana": Object(
        (
            ("ellipsoid", YELLOW, (0.04, 0.017, 0.017), (0, 0.004, 0.017)),
            ("ellipsoid", YELLOW, (0.032, 0.014, 0.014), (0.038, -0.004, 0.015)),
            ("ellipsoid", YELLOW, (0.032, 0.014, 0.014), (-0.038, -0.004, 0.015)),
            ("ellipsoid", BROWN, (0.012, 0.006, 0.006), (0.072, -0.01, 0.016)),
        ),
        grasp=(0, 0.003, 0.015),
    ),
    "pear": Object(
        (
            ("ellipsoid", LIME, (0.03, 0.027, 0.027), (-0.01, 0, 0.027)),
            ("ellipsoid", LIME, (0.03, 0.017, 0.017), (0.025, 0, 0.021)),
        ),
        grasp=(-0.005, 0, 0.021),
    ),
    "corn": Object(
        (
            ("ellipsoid", CORN, (0.065, 0.022, 0.022), (0.01, 0, 0.022)),
            ("ellipsoid", GREEN, (0.035, 0.017, 0.015), (-0.06, 0, 0.018)),
        ),
        grasp=(0, 0, 0.018),
    ),
    "mushroom": upright(
        ("ellipsoid", BROWN, (0.032, 0.032, 0.018), (0, 0, 0.045)),
        ("box", WHITE, (0.014, 0.014, 0.02), (0, 0, 0.02)),
        height=0.026,
    ),
    "can": upright(("cylinder", SILVER, (0.027, 0.035), (0, 0, 0.035)), height=0.03),
}
TASKS = {f"pick-{name.replace(' ', '-')}": name for name in OBJECTS}  # task: its object's name


def task_object(task: str) -> Object:
    """Return the object of a task."""
    return OBJECTS[TASKS[task]]
