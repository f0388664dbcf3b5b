"""Franka Kitchen's tasks: the joint that each one moves, how the expert moves it, and where fixtures start."""

import math
from dataclasses import dataclass, field, replace

import numpy as np

# {fixture: half the range of its position in x, y, z (m)}. Every episode draws a position for each
# fixture.
SHIFTS = {
    "slidecabinet": (0.05, 0.02, 0.03),
    "hingecabinet": (0.03, 0.02, 0.03),
    "microwave": (0.03, 0.03, 0.0),
    "hoodroot": (0.02, 0.01, 0.01),
    "knobs": (0.02, 0.0, 0.01),
}
KNOBS = ("knob 1", "knob 2", "knob 3", "knob 4")  # the bodies of the fixture "knobs"


@dataclass(frozen=True)
class Skill:
    """A joint to move, and how the expert moves it.

    Lengths in metres, angles in radians. Offsets are in the frame of the moved body and start at
    its site.
    """

    fixture: str  # the fixture that the task's shift applies to, a key of SHIFTS
    site: str  # MuJoCo site on the handle, knob or switch
    joint: str
    success: float  # joint position that counts as success
    goal: float  # joint position that the expert aims for
    approach: tuple[float, float, float]  # offset to come from
    contact: tuple[float, float, float]  # offset to grip or push at
    grip: bool  # grip the handle (otherwise push with closed fingers)
    lead: float  # how far ahead of the joint the expert aims, in a stock step
    frame: tuple[float, float, float] | None = None  # rotation vector of the upright frame


SLIDE_DOOR = Skill(
    fixture="slidecabinet",
    site="slide_site",
    joint="slide_cabinet",
    success=0.30,
    goal=0.42,
    approach=(0, -0.12, 0),
    contact=(0, 0.015, 0),
    grip=True,
    lead=0.05,
)
LEFT_DOOR = Skill(
    fixture="hingecabinet",
    site="hinge_site1",
    joint="left_hinge_cabinet",
    success=-0.5,
    goal=-1.0,
    approach=(0, -0.12, 0),
    contact=(0, 0.03, 0),
    grip=True,
    lead=0.1,
)
MICROWAVE = Skill(
    fixture="microwave",
    site="microhandle_site",
    joint="microwave",
    success=-0.6,
    goal=-0.9,
    approach=(0.05, -0.15, 0),
    contact=(0, 0.03, 0),
    grip=True,
    lead=0.06,
)
LIGHT = Skill(
    fixture="hoodroot",
    site="light_site",
    joint="light_switch",
    success=-0.6,
    goal=-1.2,
    approach=(0.07, -0.10, 0),
    contact=(0.05, 0.01, 0),
    grip=False,
    lead=0.1,
)
KNOB4 = Skill(
    fixture="knobs",
    site="knob4_site",
    joint="knob_Joint_4",
    success=-0.8,
    goal=-1.5,
    approach=(-0.05, -0.10, 0.035),
    contact=(-0.022, 0, 0.024),
    grip=False,
    lead=0.07,
    frame=(-math.pi / 2, 0, 0),  # knobs are modelled lying down
)
KNOB3 = replace(KNOB4, site="knob3_site", joint="knob_Joint_3")


@dataclass(frozen=True)
class Task:
    """A skill, its instruction, and how the kitchen differs from the stock one."""

    skill: Skill
    instruction: str
    shift: tuple[float, float, float] = (0, 0, 0)  # m, of the fixture's range of positions
    colours: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # {material: rgb}


TASKS = {
    "knob-on": Task(KNOB4, "turn the top left knob on"),
    "light-on": Task(LIGHT, "turn the light on"),
    "microwave-open": Task(MICROWAVE, "open the microwave"),
    "slide-door-open": Task(SLIDE_DOOR, "slide the cabinet door open"),
    # shifted into the arm's reach
    "left-door-open": Task(LEFT_DOOR, "open the left cabinet door", (0.10, -0.12, -0.15)),
    "slide-door-open-red": Task(
        SLIDE_DOOR,
        "slide the cabinet door open",
        (0.06, -0.02, -0.05),
        {"M_slide_blue": (0.9, 0.1, 0.1)},
    ),
    "left-door-open-new": Task(
        LEFT_DOOR,
        "open the left cabinet door",
        (0.14, -0.15, -0.20),
        {"M_hinge_blue": (0.2, 0.8, 0.2)},
    ),
    "slide-door-open-yellow": Task(
        SLIDE_DOOR,
        "slide the cabinet door open",
        (-0.04, -0.03, -0.06),
        {"M_slide_blue": (0.9, 0.8, 0.1)},
    ),
    "knob-on-unseen": Task(KNOB3, "turn the top right knob on"),
    "microwave-open-unseen": Task(
        MICROWAVE, "open the microwave", (0.05, -0.05, 0), {"micro_black": (0.8, 0.2, 0.6)}
    ),
}


def is_success(skill: Skill, joint_position: np.ndarray | float) -> np.ndarray | bool:
    """Return whether a position of the skill's joint counts as success."""
    return joint_position * np.sign(skill.success) >= abs(skill.success)
