"""Generic things of random shapes, proportions and colours: primitives, turned bodies, and compounds of them.

Lengths are in metres, angles in rad. A thing is a list of named parts, and a part a list of geoms.
"""

import colorsys
from dataclasses import dataclass, field

import mujoco
import numpy as np

NOUN_WORDS = (
    "floor table wall arm gripper finger box ball can stick cone ring bowl cup bottle plate egg dot "
    "handle knob button drawer door window lever cabinet panel base stand hammer mug pot"
)
NOUNS = NOUN_WORDS.split()
BACKGROUND = ("floor", "table", "wall", "arm")
# {colour: (hue in degrees, saturation, value), each a range}. Gaps keep the words apart.
COLOURS = {
    "red": ((-10, 10), (0.7, 1), (0.5, 1)),
    "orange": ((20, 36), (0.75, 1), (0.8, 1)),
    "yellow": ((48, 62), (0.6, 1), (0.75, 1)),
    "green": ((85, 150), (0.45, 1), (0.3, 0.9)),
    "cyan": ((168, 192), (0.5, 1), (0.65, 1)),
    "blue": ((208, 245), (0.55, 1), (0.4, 1)),
    "purple": ((262, 290), (0.45, 1), (0.3, 0.8)),
    "pink": ((310, 345), (0.25, 0.6), (0.85, 1)),
    "brown": ((14, 34), (0.45, 0.85), (0.2, 0.5)),
    "white": ((0, 360), (0, 0.06), (0.88, 1)),
    "grey": ((0, 360), (0, 0.08), (0.35, 0.65)),
    "black": ((0, 360), (0, 0.3), (0.02, 0.14)),
}
COLOUR_WORDS = list(COLOURS)
BOX = mujoco.mjtGeom.mjGEOM_BOX
BALL = mujoco.mjtGeom.mjGEOM_SPHERE
EGG = mujoco.mjtGeom.mjGEOM_ELLIPSOID
CAPSULE = mujoco.mjtGeom.mjGEOM_CAPSULE
CYLINDER = mujoco.mjtGeom.mjGEOM_CYLINDER
TURNED = ("cone", "ring", "bowl", "cup", "bottle", "plate")  # nouns that are meshes
X, Y, Z = np.eye(3)


# ----------------------------------------------------------------------------------------------------------------------
# Rotations and meshes


def rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the matrix (3, 3) that rotates by an angle (rad) about a unit axis (3,)."""
    x, y, z = axis
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def along(direction: np.ndarray) -> np.ndarray:
    """Return a rotation matrix (3, 3) whose third column is the direction (3,)."""
    a, b, c = direction / np.linalg.norm(direction)
    if abs(b) < 0.9:  # x = Y x z, y = z x x
        n = np.hypot(a, c)
        return np.array([(c / n, -a * b / n, a), (0, n, b), (-a / n, -b * c / n, c)])
    n = np.hypot(b, c)  # x = X x z
    return np.array([(0, n, a), (-c / n, -a * b / n, b), (b / n, -a * c / n, c)])


def profile(noun: str, rng: np.random.Generator) -> np.ndarray:
    """Return the closed outline (n, 2) of a turned body: radius and height, in units of its size."""
    r = rng.uniform(0.4, 0.9)
    wall = rng.uniform(0.06, 0.15)
    h = rng.uniform(0.5, 1.6)
    if noun == "cone":
        top = rng.choice([0.02, rng.uniform(0.02, 0.3)])
        return np.array([(0, 0), (r, 0), (top, h), (0, h)])
    if noun == "ring":
        a = np.linspace(0, 2 * np.pi, 9)
        return np.stack([0.8 + 0.6 * wall + wall * np.cos(a), wall * (1 + np.sin(a))], 1)
    if noun == "plate":
        h = rng.uniform(0.1, 0.25)
        return np.array([(0, 0), (0.6, 0), (1, h), (1, h + 0.04), (0.55, 0.06), (0, 0.06)])
    if noun == "bottle":
        neck = r * rng.uniform(0.25, 0.5)
        return np.array([(0, 0), (r, 0), (r, 1.2 * h), (neck, 1.6 * h), (neck, 2 * h), (0, 2 * h)])
    if noun == "cup":
        foot = r * rng.uniform(0.6, 1)
        outer = [(0, 0), (foot, 0), (r, h)]
    else:  # a bowl
        a = np.linspace(0.3, np.pi / 2, 4)
        h = rng.uniform(0.35, 0.8)
        outer = [(0, 0), *zip(np.sin(a), h * (1 - np.cos(a)))]
    outer = np.array(outer)
    inner = outer[::-1] * (1 - wall) + (0, wall * 0.5)
    inner[0, 1] = outer[-1, 1]
    return np.concatenate([outer, inner])


def turned_mesh(outline: np.ndarray, slices: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners (n, 3) and triangles (m, 3) of an outline (k, 2) turned about the z axis."""
    angle = np.linspace(0, 2 * np.pi, slices, endpoint=False)
    r = outline[:, :1] + 1e-4
    ring = np.stack([r * np.cos(angle), r * np.sin(angle), outline[:, 1:] + 0 * angle], -1)
    k = len(outline)
    i = np.arange(k - 1)[:, None] * slices
    j = np.arange(slices)
    n = (j + 1) % slices
    a, b, c, d = (i + j), (i + n), (i + slices + n), (i + slices + j)
    faces = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)], 0)
    return ring.reshape(-1, 3), faces.reshape(-1, 3)


def draw_colour(rng: np.random.Generator, word: str) -> tuple[float, float, float]:
    """Return the red, green and blue (0 to 1) of a random colour that the word names."""
    h, s, v = (rng.uniform(*bounds) for bounds in COLOURS[word])
    return colorsys.hsv_to_rgb(h / 360 % 1, s, v)


# ----------------------------------------------------------------------------------------------------------------------
# Things


@dataclass
class Part:
    """A named part of a thing: its primitives, its colour, and how far it is open."""

    noun: str
    geoms: list = field(default_factory=list)  # (kind or noun of a mesh, size, place, rotation)
    open: float = -1.0

    def add(self, kind, size, place=(0, 0, 0), turn=None) -> "Part":
        turn = np.eye(3) if turn is None else turn
        self.geoms.append((kind, np.array(size, float), np.array(place, float), turn))
        return self

    def moved(self, place=(0, 0, 0), turn=None) -> "Part":
        """Rotate, then shift all geoms, in place."""
        turn = np.eye(3) if turn is None else turn
        self.geoms = [(k, s, turn @ p + place, turn @ R) for k, s, p, R in self.geoms]
        return self


class Maker:
    """Makes things of random proportions. Fronts look along x. The origin is the middle of the underside."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def simple(self, s: float, nouns=None) -> list[Part]:
        """Return one primitive or turned body of size s (m)."""
        u = self.u
        noun = self.rng.choice(
            nouns or ["box", "box", "ball", "can", "can", "stick", "egg", "dot", *TURNED]
        )
        part = Part(str(noun))
        if noun == "box":
            size = s * np.array([u(0.4, 1.2), u(0.4, 1.2), u(0.3, 1.3)])
            return [part.add(BOX, size, size[2] * Z)]
        if noun == "ball":
            return [part.add(BALL, (0.8 * s, 0, 0), 0.8 * s * Z)]
        if noun == "dot":
            r = s * u(0.15, 0.4)
            return [part.add(BALL, (r, 0, 0), (r + u(0, 0.25)) * Z)]
        if noun == "can":
            r = s * u(0.4, 0.9)
            h = s * u(0.3, 1.3)
            return [part.add(CYLINDER, (r, h, 0), h * Z)]
        if noun == "egg":
            size = s * np.array([u(0.8, 1.2), u(0.4, 0.7), u(0.4, 0.7)])
            return [part.add(EGG, size, size[2] * Z)]
        if noun == "stick":
            r = s * u(0.12, 0.3)
            turn = np.eye(3) if u(0, 1) < 0.4 else rotation(Y, np.pi / 2)
            half = s * u(1.2, 2.2)
            kind = self.rng.choice([CAPSULE, CYLINDER, BOX])
            size = (r, r, half) if kind == BOX else (r, half, 0)
            height = half + r if turn[2, 2] > 0.5 else r
            return [part.add(kind, size, height * Z, turn)]
        return [part.add(str(noun), (s, s, s))]

    def grip(self, s: float) -> Part:
        """Return a handle or a knob of size s that stands out along x from the origin."""
        u = self.u
        far = s * u(0.4, 1.1)
        r = s * u(0.1, 0.28)
        way = along([X, Y, Z][self.rng.integers(1, 3)])
        shape = self.rng.integers(7)
        if shape <= 2:  # a bar on two posts, a bow, or a bare bar
            part = Part("handle")
            half = s * u(0.6, 1.6)
            kind = self.rng.choice([CAPSULE, BOX])
            part.add(kind, (r, half, 0) if kind == CAPSULE else (r, r, half), far * X, way)
            for side in (-1, 1) if shape < 2 else (0,):
                end = side * 0.85 * half * way[:, 2]
                root = 0.3 * end if shape == 1 else end
                tip = far * X + end
                post = tip - root
                part.add(
                    CAPSULE, (0.7 * r, np.linalg.norm(post) / 2, 0), (tip + root) / 2, along(post)
                )
            return part
        part = Part("knob")
        part.add(CYLINDER, (0.6 * r, far / 2, 0), far / 2 * X, along(X))
        size = s * u(0.3, 0.7)
        if shape == 3:
            part.add(BALL, (size, 0, 0), far * X)
        elif shape == 4:
            part.add(CYLINDER, (size, s * u(0.08, 0.4), 0), far * X, along(X))
        elif shape == 5:
            part.add(BOX, (s * u(0.08, 0.4), size, size * u(0.4, 1.5)), far * X)
        else:
            part.noun = "handle"
            side = along(Y * self.rng.choice([-1, 1]) + 0.2 * Z * u(-1, 1))
            length = s * u(0.6, 1.5)
            part.add(CAPSULE, (r, length / 2, 0), far * X + length / 2 * side[:, 2], side)
        return part

    def button(self, s: float) -> list[Part]:
        u = self.u
        w, d, h = s * u(0.6, 1.4), s * u(0.4, 1), s * u(0.5, 1.5)
        base = Part("panel").add(BOX, (d, w, h), h * Z)
        out = s * u(0.05, 0.6)
        button = Part("button", open=u(0, 1))
        size = s * u(0.15, 0.5)
        shape = self.rng.integers(4)
        if shape == 0:
            button.add(CYLINDER, (size, out / 2, 0), out / 2 * X, along(X))
        elif shape == 1:
            button.add(BOX, (out / 2, size, size * u(0.4, 1.4)), out / 2 * X)
        elif shape == 2:
            button.add(EGG, (out, size, size))
        else:
            button.add(CYLINDER, (0.4 * size, out, 0), 0 * X, along(X))
            button.add(CYLINDER, (size, 0.1 * s, 0), out * X, along(X))
        if u(0, 1) < 0.4:  # on top
            return [base, button.moved(2 * h * Z, rotation(Y, -np.pi / 2))]
        return [base, button.moved((d, u(-0.4, 0.4) * w, h * u(0.7, 1.5)))]

    def gripped_panel(self, s: float) -> list[Part]:
        d, w, h = s * self.u(0.1, 0.8), s * self.u(0.6, 1.5), s * self.u(0.5, 1.5)
        base = Part("panel").add(BOX, (d, w, h), h * Z)
        turn = rotation(X, self.u(-1.6, 1.6))
        place = (d, self.u(-0.5, 0.5) * w, h * self.u(0.6, 1.6))
        return [base, self.grip(0.6 * s).moved(place, turn)]

    def hull(self, d: float, w: float, h: float) -> Part:
        """Return a cabinet that is open at its front, of half sizes d, w, h."""
        t = 0.06 * min(d, w, h) + 0.002
        part = Part("cabinet").add(BOX, (t, w, h), (-d, 0, h))
        for side in (-1, 1):
            part.add(BOX, (d, t, h), (0, side * w, h))
            part.add(BOX, (d, w, t), (0, 0, h + side * h))
        return part

    def drawer(self, s: float) -> list[Part]:
        u = self.u
        d, w, h = s * u(0.7, 1.3), s * u(0.7, 1.5), s * u(0.35, 1)
        opened = self.rng.choice([0.0, 1.0, u(0, 1)])
        out = 1.6 * d * opened
        drawer = Part("drawer", open=opened).add(
            BOX, (0.04 * s, 0.95 * w, 0.9 * h), (d + out, 0, h)
        )
        drawer.add(BOX, (0.8 * d, 0.9 * w, 0.1 * h), (out + 0.15 * d, 0, 0.3 * h))
        grip = self.grip(0.5 * s).moved((d + out, 0, h * u(0.8, 1.2)))
        grip.open = opened
        return [self.hull(d, w, h), drawer, grip]

    def door(self, s: float) -> list[Part]:
        u = self.u
        d, w, h = s * u(0.3, 0.9), s * u(0.5, 1.2), s * u(0.5, 1.3)
        opened = self.rng.choice([0.0, 1.0, u(0, 1)])
        side = self.rng.choice([-1, 1])  # the hinge's
        hinge = np.array([d, side * w, h])
        turn = rotation(Z, side * 1.7 * opened)
        door = Part("door", open=opened).add(BOX, (0.04 * s, w, h), (0, -side * w, 0))
        grip = self.grip(0.45 * s).moved((0, -side * w * u(1.5, 1.85), h * u(-0.6, 0.6)))
        grip.open = opened
        return [self.hull(d, w, h), door.moved(hinge, turn), grip.moved(hinge, turn)]

    def window(self, s: float) -> list[Part]:
        u = self.u
        w, h, t = s * u(0.9, 1.6), s * u(0.6, 1.2), s * u(0.05, 0.12)
        opened = self.rng.choice([0.0, 1.0, u(0, 1)])
        frame = Part("window")
        for side in (-1, 1):
            frame.add(BOX, (t, t, h), (0, side * w, h))
            frame.add(BOX, (t, w, t), (0, 0, h + side * h))
        y = (0.5 - opened) * w
        pane = Part("panel", open=opened).add(BOX, (0.3 * t, 0.5 * w, 0.95 * h), (t, y, h))
        grip = self.grip(0.4 * s).moved((t, y + u(-0.4, 0.4) * w, h * u(0.5, 1.5)))
        grip.open = opened
        return [frame, pane, grip]

    def lever(self, s: float) -> list[Part]:
        u = self.u
        h = s * u(0.2, 1.2)
        base = Part("base")
        if u(0, 1) < 0.5:
            base.add(BOX, (s * u(0.3, 0.7), s * u(0.3, 0.9), h), h * Z)
        else:
            base.add(CYLINDER, (s * u(0.15, 0.5), h, 0), h * Z)
        half = s * u(0.4, 0.9)
        r = s * u(0.08, 0.2)
        lever = Part("lever").add(CAPSULE, (r, half, 0), half * X, along(X))
        if u(0, 1) < 0.6:
            lever.add(self.rng.choice([BALL, BOX]), (1.8 * r,) * 3, 2 * half * X)
        turn = rotation(Z, u(-1.5, 1.5)) @ rotation(Y, -self.rng.choice([0, u(-0.6, 1.5)]))
        return [base, lever.moved(2 * h * Z, turn)]

    def hammer(self, s: float) -> list[Part]:
        half = s * self.u(0.8, 1.4)
        r = s * self.u(0.1, 0.2)
        hammer = Part("hammer").add(CAPSULE, (r, half, 0), r * Z, along(X))
        kind = self.rng.choice([BOX, CYLINDER])
        head = s * self.u(0.3, 0.6)
        size = (2 * r, 2 * r, head) if kind == BOX else (2 * r, head, 0)
        return [hammer.add(kind, size, (half, 0, r), along(Y))]

    def mug(self, s: float) -> list[Part]:
        mug = Part("mug").add("cup", (s, s, s))
        h = s * self.u(0.3, 0.6)
        handle = Part("handle").add(CAPSULE, (0.1 * s, 0.25 * s, 0), (1.2 * s, 0, h))
        for side in (-1, 1):
            place = (0.95 * s, 0, h + side * 0.3 * s)
            handle.add(CAPSULE, (0.1 * s, 0.2 * s, 0), place, along(X))
        return [mug, handle]

    def pot(self, s: float) -> list[Part]:
        r, h = s * self.u(0.6, 1), s * self.u(0.25, 0.7)
        pot = Part("pot").add(CYLINDER, (r, h, 0), h * Z)
        knob = Part("knob").add(
            self.rng.choice([BALL, CYLINDER]), (0.2 * s,) * 3, (2 * h + 0.15 * s) * Z
        )
        handle = Part("handle")
        for side in (-1, 1):
            handle.add(CAPSULE, (0.1 * s, 0.25 * s, 0), (0, side * 1.1 * r, 1.5 * h), along(X))
        return [pot, knob, handle]

    def stand(self, s: float) -> list[Part]:
        h = s * self.u(0.3, 1.5)
        kind = self.rng.choice([BOX, CYLINDER])
        r = s * self.u(0.3, 1.2)
        stand = Part("stand").add(kind, (r, r, h) if kind == BOX else (r, h, 0), h * Z)
        above = self.simple(s) if self.u(0, 1) < 0.6 else self.compound(s)
        return [stand, *(part.moved(2 * h * Z) for part in above)]

    def compound(self, s: float) -> list[Part]:
        names = (
            "button button gripped_panel drawer drawer door door window lever hammer mug pot stand"
        )
        return getattr(self, self.rng.choice(names.split()))(s)

    def thing(self) -> list[Part]:
        """Return a thing of random size: 0.8 to 10 cm for simple ones, 3.5 to 17 cm for compounds."""
        if self.u(0, 1) < 0.45:
            return self.simple(np.exp(self.u(np.log(0.008), np.log(0.1))))
        return self.compound(np.exp(self.u(np.log(0.035), np.log(0.17))))
