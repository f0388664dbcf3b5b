"""Meta-World's RL and unseen tasks: five of its tasks in other shapes, colours and positions (metaworld.py)."""

from dataclasses import dataclass
from typing import NamedTuple

import mujoco

SOLID = {
    "group": 1,
    "contype": 1,
    "conaffinity": 1,
    "solimp": (0.99, 0.99, 0.01, 0.5, 2),
    "solref": (0.01, 1),
}
GLASS = (0.0, 0.3, 0.4, 0.2)  # rgba
GREY = (0.25, 0.25, 0.28, 1)


@dataclass(frozen=True)
class Family:
    """Where the parts of an object are in Meta-World's model of a task. Lengths in metres."""

    root: str  # the body that Meta-World places
    moving: str  # the body that carries the handle or button
    front: float  # y below which a geom of the moving body belongs to the handle or button
    centre: float  # height of the object's centre above the table
    half: tuple[float, float, float]  # half its width, depth and height


FAMILIES = {
    "button-press": Family("box", "button", -0.1, 0.115, (0.12, 0.1, 0.12)),
    "drawer-open": Family("drawer", "drawer_link", -0.1, 0.084, (0.118, 0.1, 0.084)),
    "door-open": Family("door", "door_link", -0.05, 0.15, (0.22, 0.106, 0.15)),
    "window-open": Family("window", "windowb_a", -0.025, 0.16, (0.25, 0.06, 0.202)),
    "window-close": Family("window", "windowb_a", -0.025, 0.2, (0.25, 0.06, 0.202)),
}


class Primitive(NamedTuple):
    """A part of a handle or button, in the frame of the moving body. Lengths in metres."""

    kind: str  # one of MuJoCo's geom types
    radius: float
    start: tuple[float, float, float]
    end: tuple[float, float, float] | None = None  # a sphere has no end


@dataclass(frozen=True)
class Variant:
    """Another shape, colour and position of a family's object, in metres: x right, y away from the robot, z up."""

    family: str
    body: tuple[float, float, float]  # rgb of the box, cabinet or frame
    part: tuple[float, float, float]  # rgb of the button or handle
    offset: tuple[float, float, float]  # shift of the positions; a stand fills a gap to the table
    stretch: tuple[float, float]  # factors on width and height of the box, cabinet or frame
    handle: tuple[Primitive, ...]  # the new button or handle


# Positions are 1 to 7 cm from the originals' on the table and up to 3 cm higher. Positions and
# colours are chosen such that a stage-0 policy succeeds about as often as the paper's: 0.41 on its
# RL tasks, 0.51 on its unseen tasks. RL on a sparse reward needs such a start. The choice used two
# seeds, and initial states that nothing else uses (results/experiments.md). The comments describe
# the shapes.
VARIANTS = {
    "button-press-new": Variant(  # low wide box, square plate
        family="button-press",
        body=(0.1, 0.35, 0.8),
        part=(0.1, 0.45, 0.15),
        offset=(-0.05, -0.05, 0.02),
        stretch=(1.3, 0.7),
        handle=(
            Primitive("cylinder", 0.02, (0, -0.18, 0), (0, -0.09, 0)),
            Primitive("box", 0.05, (0, -0.194, 0), (0, -0.172, 0)),
        ),
    ),
    "button-press-unseen1": Variant(  # narrow box, upright bar
        family="button-press",
        body=(0.15, 0.6, 0.25),
        part=(0.1, 0.1, 0.6),
        offset=(0.05, -0.05, 0.0),
        stretch=(0.7, 1.0),
        handle=(
            Primitive("cylinder", 0.02, (0, -0.18, 0), (0, -0.09, 0)),
            Primitive("box", 0.02, (0, -0.175, -0.07), (0, -0.175, 0.07)),
        ),
    ),
    "button-press-unseen2": Variant(  # small cube on a stand, large thin disc
        family="button-press",
        body=(0.55, 0.2, 0.6),
        part=(0.05, 0.4, 0.4),
        offset=(-0.02, -0.04, 0.025),
        stretch=(0.75, 0.75),
        handle=(
            Primitive("cylinder", 0.012, (0, -0.18, 0), (0, -0.09, 0)),
            Primitive("cylinder", 0.07, (0, -0.194, 0), (0, -0.182, 0)),
        ),
    ),
    "drawer-open-new": Variant(  # tall narrow cabinet, thick bow
        family="drawer-open",
        body=(0.5, 0.2, 0.1),
        part=(0.1, 0.1, 0.1),
        offset=(0.05, -0.04, 0.015),
        stretch=(0.8, 1.2),
        handle=(
            Primitive("box", 0.014, (-0.06, -0.15, 0), (0.06, -0.15, 0)),
            Primitive("box", 0.01, (-0.05, -0.15, 0), (-0.05, -0.08, 0)),
            Primitive("box", 0.01, (0.05, -0.15, 0), (0.05, -0.08, 0)),
        ),
    ),
    "drawer-open-unseen1": Variant(  # flat wide cabinet on a stand, long thin rail
        family="drawer-open",
        body=(0.55, 0.25, 0.65),
        part=(0.95, 0.85, 0.1),
        offset=(-0.025, -0.04, 0.025),
        stretch=(1.3, 0.8),
        handle=(
            Primitive("capsule", 0.007, (-0.1, -0.15, 0), (0.1, -0.15, 0)),
            Primitive("capsule", 0.007, (-0.09, -0.15, 0), (-0.09, -0.08, 0)),
            Primitive("capsule", 0.007, (0.09, -0.15, 0), (0.09, -0.08, 0)),
        ),
    ),
    "drawer-open-unseen2": Variant(  # tall cabinet, two bars that meet in a point
        family="drawer-open",
        body=(0.15, 0.3, 0.75),
        part=(0.9, 0.2, 0.2),
        offset=(0.065, -0.025, 0.015),
        stretch=(0.9, 1.3),
        handle=(
            Primitive("capsule", 0.011, (-0.08, -0.08, 0), (0, -0.155, 0)),
            Primitive("capsule", 0.011, (0.08, -0.08, 0), (0, -0.155, 0)),
        ),
    ),
    "door-open-new": Variant(  # low cabinet on a stand, round disc on a rod
        family="door-open",
        body=(0.75, 0.6, 0.2),
        part=(0.1, 0.2, 0.8),
        offset=(-0.04, 0.01, 0.02),
        stretch=(1.0, 0.75),
        handle=(
            Primitive("cylinder", 0.013, (0.325, 0, 0), (0.325, -0.12, 0)),
            Primitive("capsule", 0.01, (0.325, -0.12, 0), (0.45, -0.12, 0)),
            Primitive("cylinder", 0.045, (0.41, -0.105, 0), (0.41, -0.135, 0)),
        ),
    ),
    "door-open-unseen1": Variant(  # tall cabinet, long thin rod
        family="door-open",
        body=(0.3, 0.6, 0.35),
        part=(0.9, 0.9, 0.9),
        offset=(-0.055, 0.02, 0.02),
        stretch=(1.0, 1.25),
        handle=(
            Primitive("cylinder", 0.013, (0.325, 0, 0), (0.325, -0.12, 0)),
            Primitive("capsule", 0.012, (0.325, -0.12, 0), (0.48, -0.12, 0)),
        ),
    ),
    "door-open-unseen2": Variant(  # flat cabinet on a stand, rod with a ball
        family="door-open",
        body=(0.7, 0.25, 0.25),
        part=(0.95, 0.8, 0.1),
        offset=(-0.01, -0.01, 0.028),
        stretch=(1.0, 0.6),
        handle=(
            Primitive("cylinder", 0.013, (0.325, 0, 0), (0.325, -0.12, 0)),
            Primitive("capsule", 0.012, (0.325, -0.12, 0), (0.45, -0.12, 0)),
            Primitive("sphere", 0.032, (0.45, -0.12, 0)),
        ),
    ),
    "window-open-new": Variant(  # low frame on a stand, thick round peg
        family="window-open",
        body=(0.2, 0.55, 0.25),
        part=(0.9, 0.45, 0.05),
        offset=(-0.025, -0.05, 0.018),
        stretch=(1.0, 0.7),
        handle=(Primitive("cylinder", 0.03, (-0.014, -0.1, 0), (-0.014, -0.03, 0)),),
    ),
    "window-open-unseen1": Variant(  # upright bar
        family="window-open",
        body=(0.15, 0.3, 0.7),
        part=(0.95, 0.85, 0.1),
        offset=(0.025, -0.055, 0.007),
        stretch=(1.0, 0.85),
        handle=(
            Primitive("box", 0.016, (-0.014, -0.095, -0.1), (-0.014, -0.095, 0.1)),
            Primitive("box", 0.012, (-0.014, -0.095, 0), (-0.014, -0.03, 0)),
        ),
    ),
    "window-open-unseen2": Variant(  # very low frame on a stand, ball
        family="window-open",
        body=(0.45, 0.4, 0.3),
        part=(0.7, 0.1, 0.5),
        offset=(-0.04, -0.025, 0.028),
        stretch=(1.0, 0.6),
        handle=(
            Primitive("sphere", 0.032, (-0.014, -0.09, 0)),
            Primitive("cylinder", 0.012, (-0.014, -0.09, 0), (-0.014, -0.03, 0)),
        ),
    ),
    "window-close-new": Variant(  # low frame on a stand, square peg
        family="window-close",
        body=(0.8, 0.7, 0.15),
        part=(0.1, 0.2, 0.8),
        offset=(-0.055, -0.04, 0.01),
        stretch=(1.0, 0.75),
        handle=(Primitive("box", 0.028, (-0.028, -0.1, 0), (-0.028, -0.03, 0)),),
    ),
    "window-close-unseen1": Variant(  # upright bar
        family="window-close",
        body=(0.5, 0.2, 0.6),
        part=(0.2, 0.9, 0.3),
        offset=(0.03, -0.065, 0.0),
        stretch=(1.0, 0.9),
        handle=(
            Primitive("box", 0.016, (-0.014, -0.095, -0.1), (-0.014, -0.095, 0.1)),
            Primitive("box", 0.012, (-0.014, -0.095, 0), (-0.014, -0.03, 0)),
        ),
    ),
    "window-close-unseen2": Variant(  # very low frame on a stand, ball
        family="window-close",
        body=(0.15, 0.6, 0.65),
        part=(0.9, 0.15, 0.1),
        offset=(-0.065, -0.02, 0.025),
        stretch=(1.0, 0.6),
        handle=(
            Primitive("sphere", 0.032, (-0.014, -0.09, 0)),
            Primitive("cylinder", 0.012, (-0.014, -0.09, 0), (-0.014, -0.03, 0)),
        ),
    ),
}


def apply_variant(spec: mujoco.MjSpec, variant: Variant) -> None:
    """Change the model of a variant's family to the variant's shape and colours, in place. Reset sets the position.

    A window keeps its width: only its height is stretched. The old button or handle stays,
    invisible and without contacts, because it provides the moving body's mass, and Meta-World
    measures success by it.
    """
    family = FAMILIES[variant.family]
    width, height = variant.stretch
    factors = (width, 1, height)
    root = spec.body(family.root)
    meshes = set()
    bodies = [root]
    for body in bodies:  # the list grows during the loop
        bodies += body.bodies
        if body is not root:
            body.pos = body.pos * factors
        for geom in body.geoms:
            if body.name == family.moving and geom.pos[1] < family.front:
                geom.contype = 0
                geom.conaffinity = 0
                # Groups above 2 are not drawn; the model takes inertia from 4 and 5.
                geom.group = max(geom.group, 3)
                continue
            geom.material = ""
            geom.rgba = GLASS if "glass" in geom.meshname else (*variant.body, 1)
            geom.pos = geom.pos * factors
            if geom.type == mujoco.mjtGeom.mjGEOM_MESH:
                meshes.add(geom.meshname)
            elif geom.type == mujoco.mjtGeom.mjGEOM_BOX:
                geom.size = geom.size * factors
    for mesh in spec.meshes:
        if mesh.name in meshes:
            mesh.scale = mesh.scale * factors
    moving = spec.body(family.moving)
    for primitive in variant.handle:
        kind = getattr(mujoco.mjtGeom, f"mjGEOM_{primitive.kind.upper()}")
        place = (
            {"pos": primitive.start}
            if primitive.end is None
            else {"fromto": (*primitive.start, *primitive.end)}
        )
        moving.add_geom(
            type=kind, size=(primitive.radius,) * 3, rgba=(*variant.part, 1), **place, **SOLID
        )
    add_stand(root, family, variant)


def add_stand(root: mujoco.MjsBody, family: Family, variant: Variant) -> None:
    """Add a grey box between the table and an object that does not reach down to it."""
    width, height = variant.stretch
    half_height = family.half[2] * height
    gap = family.centre + variant.offset[2] - half_height
    if gap <= 0:
        return
    # The other families' origins are their centres.
    origin = family.centre if family.root == "drawer" else 0.0
    foot = origin - half_height
    size = (family.half[0] * width, family.half[1], gap / 2)
    root.add_geom(
        type=mujoco.mjtGeom.mjGEOM_BOX, pos=(0, 0, foot - gap / 2), size=size, rgba=GREY, **SOLID
    )
