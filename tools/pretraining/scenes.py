"""Random scenes for the pre-training of the tiny VLM: generic things, drawn as a policy sees its world.

A scene has a table, a floor, up to two walls, clutter, up to eight things and mostly an arm with a
gripper. A thing is a primitive, a turned body (a bowl, a bottle), or a compound: a box with a
button, a cabinet with a drawer or a hinged door and a handle, a lever on a base. Colours, textures,
lights, cameras, proportions and sizes are drawn from continuous distributions. Nothing comes from
domains/: no model, no mesh, no colour, no camera, no instruction.

MuJoCo's segmentation names the part in each pixel, so every label is exact. `draw_scenes`
returns arrays:

    images   (N, 64, 64, 3) uint8   one view, or two of 32 rows, one above the other
    parts    (N, 32, 32) uint8      row of `tables` in each cell of 2 x 2 pixels; the smallest part wins
    depth    (N, 32, 32) uint8      logarithm of depth / camera distance, [-1.5, 1.5] -> [0, 255]
    tables   (N, PARTS, COLUMNS) float16   one row a part, NaN where there is none
    gripper  (N, 6) float16         row and column of the fingers' tip in both views, opening, views
"""

import common.opengl  # noqa: F401  variables that MuJoCo reads when it is imported

# isort: split
from dataclasses import dataclass

import mujoco
import numpy as np

from common import rendering
from tools.pretraining.things import (
    BACKGROUND,
    BALL,
    BOX,
    CAPSULE,
    COLOUR_WORDS,
    CYLINDER,
    NOUNS,
    TURNED,
    Maker,
    Part,
    Z,
    along,
    draw_colour,
    profile,
    rotation,
    turned_mesh,
)

SIZE = 64  # px
CELLS = 32  # cells of 2 x 2 px on a side
PARTS = 40  # rows of a scene's table
PRIMITIVES = 96  # primitive geoms of a model
MESHES = 36
# A part's row: noun, colour (-1: no word), thing that it belongs to, how far it is open (-1: it does
# not open), place from the fingers' tip (m: right, up, towards the first camera), and in each view:
# row, column (px of the image, NaN outside), logarithm of depth / camera distance, visible cells.
COLUMNS = 15
NOUN, COLOUR, THING, OPEN, PLACE, VIEWS = 0, 1, 2, 3, 4, 7


# ----------------------------------------------------------------------------------------------------------------------
# A scene in a model


def build_model(rng: np.random.Generator) -> mujoco.MjModel:
    """Return a model with PRIMITIVES boxes, MESHES turned bodies, textures and lights. Each scene rearranges them."""
    spec = mujoco.MjSpec()
    world = spec.worldbody
    for i in range(3):
        world.add_light(name=f"light{i}", pos=(0, 0, 3), dir=(0, 0, -1))
    for i in range(16):
        builtin = mujoco.mjtBuiltin(int(rng.integers(1, 4)))
        spec.add_texture(
            name=f"t{i}",
            type=mujoco.mjtTexture.mjTEXTURE_2D if i % 2 else mujoco.mjtTexture.mjTEXTURE_CUBE,
            builtin=builtin,
            rgb1=rng.uniform(0.5, 1, 3),
            rgb2=rng.uniform(0.2, 1, 3),
            mark=mujoco.mjtMark(int(rng.integers(0, 4))),
            markrgb=rng.uniform(0, 1, 3),
            random=0.05,
            width=64,
            height=64 if i % 2 else 384,
        )
        material = spec.add_material(name=f"m{i}", texrepeat=rng.uniform(0.5, 6, 2))
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"t{i}"
        material.specular = rng.uniform(0, 0.8)
        material.shininess = rng.uniform(0, 1)
    for i in range(6):
        spec.add_material(name=f"p{i}", specular=rng.uniform(0, 1), shininess=rng.uniform(0, 1))
    for i in range(PRIMITIVES):
        world.add_geom(name=f"g{i}", type=BOX, size=(0.1, 0.1, 0.1), contype=0, conaffinity=0)
    for i in range(MESHES):
        noun = TURNED[i % len(TURNED)]
        corners, faces = turned_mesh(profile(noun, rng))
        size = np.exp(rng.uniform(np.log(0.012), np.log(0.1)))
        mesh = spec.add_mesh(name=f"{noun}{i}")
        mesh.uservert = (size * corners).ravel()
        mesh.userface = faces.ravel()
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
        world.add_geom(
            name=f"x{i}",
            type=mujoco.mjtGeom.mjGEOM_MESH,
            meshname=mesh.name,
            contype=0,
            conaffinity=0,
        )
    model = spec.compile()
    rendering.reduce_geometry(model)
    model.vis.map.znear = 0.005
    return model


@dataclass
class Eye:
    """A view: a camera, and what the projection needs."""

    camera: mujoco.MjvCamera
    fovy: float  # degrees


class SceneMaker:
    """Draws scenes with one model. Deterministic in its generator."""

    def __init__(self, seed: list[int]):
        self.rng = np.random.default_rng(seed)
        self.model = build_model(self.rng)
        self.data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, self.data)
        self.renderer = rendering.Renderer(self.model, rendering.make_camera((0, 0, 0), 1, 0, -30))
        self.maker = Maker(self.rng)
        self.meshes = {noun: [] for noun in TURNED}
        for i in range(MESHES):
            self.meshes[TURNED[i % len(TURNED)]].append(i)
        self.hull_radius = self.model.geom_rbound.copy()

    # --- geoms

    def begin(self) -> None:
        """Hide every geom and forget the last scene's parts."""
        self.model.geom_group[:] = 5
        self.used = 0
        self.free_meshes = {noun: list(ids) for noun, ids in self.meshes.items()}
        self.rows = []  # (noun, colour, thing, open, place of the main geom)
        self.geom_part = np.full(self.model.ngeom, -1)

    def put(self, geom: tuple, rgb, material: int, part: int) -> bool:
        """Place one geom in the world. Returns whether there was one left."""
        kind, size, place, turn = geom
        m = self.model
        if isinstance(kind, str):
            if not self.free_meshes[kind]:
                return False
            ids = self.free_meshes[kind]
            # The mesh whose size comes nearest.
            radius = [abs(np.log(self.hull_radius[PRIMITIVES + i] / size[0])) for i in ids]
            i = ids.pop(int(np.argmin(radius)))
            g = PRIMITIVES + i
            mesh = m.geom_dataid[g]
            own = np.zeros(9)
            mujoco.mju_quat2Mat(own, m.mesh_quat[mesh])
            place = place + turn @ m.mesh_pos[mesh]
            turn = turn @ own.reshape(3, 3)
        else:
            if self.used == PRIMITIVES:
                return False
            g = self.used
            self.used += 1
            m.geom_type[g] = kind
            m.geom_size[g] = np.maximum(size, 1e-4)
        m.geom_group[g] = 0
        m.geom_matid[g] = material
        m.geom_rgba[g, :3] = rgb
        m.geom_rgba[g, 3] = 1
        self.data.geom_xpos[g] = place
        self.data.geom_xmat[g] = turn.ravel()
        self.geom_part[g] = part
        return True

    def add(self, part: Part, thing: int, place=(0, 0, 0), turn=None, textured=0.06) -> np.ndarray:
        """Add a part to the scene and return the place (3,) of its largest geom."""
        rng = self.rng
        if part.noun in BACKGROUND and rng.random() < 0.5:
            colour = -1
            rgb = rng.uniform(0, 1, 3)
            if rng.random() < 0.6:
                rgb += rng.uniform(0.4, 1) * (rgb.mean() - rgb)
        else:
            colour = int(rng.integers(len(COLOUR_WORDS)))
            rgb = draw_colour(rng, COLOUR_WORDS[colour])
        material = int(rng.integers(16)) if rng.random() < textured else 16 + int(rng.integers(6))
        if rng.random() < 0.4 and material >= 16:
            material = -1
        turn = np.eye(3) if turn is None else turn
        where = None
        size = 0
        index = len(self.rows)
        if index == PARTS:
            return np.asarray(place, float)
        for kind, s, p, R in part.geoms:
            world = np.asarray(place) + turn @ p
            self.put((kind, s, world, turn @ R), rgb, material, index)
            if s.max() > size:
                size = s.max()
                where = world
        self.rows.append((NOUNS.index(part.noun), colour, thing, part.open, where))
        return where

    # --- the scene

    def surroundings(self, azimuth: float) -> None:
        """Add floor, table, walls and clutter. azimuth: the first camera's, in rad."""
        rng = self.rng
        u = self.maker.u
        textured = 0.35
        ahead = np.array([np.cos(azimuth), np.sin(azimuth), 0])
        table = Part("table").add(
            BOX, (u(0.35, 1.2), u(0.35, 1.2), 0.03), (0, 0, -0.03), rotation(Z, u(0, 3))
        )
        self.add(table, 0, textured=textured)
        floor = Part("floor").add(BOX, (4, 4, 0.02), (0, 0, -u(0.1, 0.9)))
        self.add(floor, 0, textured=textured)
        for _ in range(rng.integers(0, 3)):
            turn = rotation(Z, azimuth + u(-0.9, 0.9))
            wall = Part("wall").add(BOX, (0.02, u(0.6, 3), u(0.2, 2)), (u(0.45, 1.8), 0, u(0, 0.5)))
            self.add(wall.moved(turn=turn), 0, textured=textured)
        for _ in range(rng.integers(0, 4)):  # clutter far behind
            place = ahead * u(0.5, 1.3) + np.cross(ahead, Z) * u(-0.9, 0.9)
            self.add(
                Part("wall").add(
                    BOX, (u(0.03, 0.2), u(0.03, 0.4), u(0.05, 0.6)), (0, 0, u(-0.2, 0.4))
                ),
                0,
                place,
                rotation(Z, u(0, 3)),
                textured,
            )

    def arm(self, tip: np.ndarray, down: np.ndarray, opening: float, scale: float) -> None:
        """Add a gripper whose fingers end at `tip` (3,) and point along `down` (3,), and an arm behind it."""
        u = self.maker.u
        frame = along(down) @ rotation(Z, u(0, np.pi))
        length = scale * u(0.03, 0.07)
        thick = scale * u(0.006, 0.014)
        finger = Part("finger")
        half = 0.5 * opening + thick
        wide = thick * u(0.7, 1.8)
        for side in (-1, 1):
            finger.add(BOX, (thick, wide, length / 2), (side * half, 0, -length / 2))
            if u(0, 1) < 0.4:
                finger.add(
                    BOX, (thick * 0.5, wide * 1.2, length * 0.15), (side * half, 0, -length * 0.15)
                )
        palm = Part("gripper")
        high = scale * u(0.015, 0.05)
        if u(0, 1) < 0.6:
            palm.add(
                BOX, (0.05 * scale + thick, scale * u(0.015, 0.04), high), (0, 0, -length - high)
            )
        else:
            palm.add(CYLINDER, (scale * u(0.035, 0.055), high, 0), (0, 0, -length - high))
        self.add(finger, 1, tip, frame)
        self.add(palm, 1, tip, frame)
        arm = Part("arm")
        point = tip - down * (length + 2 * high)
        angle = u(0, 2 * np.pi)
        base = np.array([u(0.4, 0.9) * np.cos(angle), u(0.4, 0.9) * np.sin(angle), u(-0.1, 0.6)])
        joints = int(self.rng.integers(2, 6))
        for j in range(joints):
            if j == 0:
                then = point - down * scale * u(0.05, 0.15)
            else:
                then = point + (base - point) / (joints - j) + self.rng.normal(0, 0.06, 3)
            way = then - point
            long = max(np.linalg.norm(way), 1e-3)
            r = scale * u(0.02, 0.055)
            kind = self.rng.choice([CAPSULE, CYLINDER, BOX])
            size = (r, r * u(0.7, 1.3), long / 2) if kind == BOX else (r, long / 2, 0)
            arm.add(kind, size, (point + then) / 2, along(way))
            if u(0, 1) < 0.5:
                arm.add(BALL, (1.2 * r, 0, 0), then)
            point = then
        half = len(arm.geoms) // 2
        if u(0, 1) < 0.4 and half:  # links of two colours
            lower = Part("arm", arm.geoms[half:])
            arm.geoms = arm.geoms[:half]
            self.add(lower, 1)
        self.add(arm, 1)

    def light(self) -> None:
        """Draw the lights and the headlight."""
        rng = self.rng
        m = self.model
        for i in range(3):
            self.data.light_xpos[i] = (*rng.uniform(-2, 2, 2), rng.uniform(1, 3))
            way = -self.data.light_xpos[i] + rng.normal(0, 0.3, 3)
            self.data.light_xdir[i] = way / np.linalg.norm(way)
            m.light_directional[i] = rng.random() < 0.4
            m.light_active[i] = rng.random() < 0.6
            m.light_cutoff[i] = 80
            m.light_diffuse[i] = rng.uniform(0.15, 0.75) * (1 + 0.1 * rng.normal(size=3))
            m.light_ambient[i] = rng.uniform(0, 0.15)
            m.light_specular[i] = rng.uniform(0, 0.5)
        bright = rng.uniform(0.2, 0.5)
        m.vis.headlight.ambient[:] = bright
        m.vis.headlight.diffuse[:] = rng.uniform(0.2, 0.6)
        m.vis.headlight.specular[:] = rng.uniform(0, 0.4)

    def look(self, azimuth: float, tip: np.ndarray, places: list) -> list[Eye]:
        """Return one or two cameras: one on the scene, and mostly one near the fingers or another on the scene."""
        rng = self.rng
        u = self.maker.u

        def scene_camera(azimuth: float) -> Eye:
            lookat = np.array([u(-0.08, 0.08), u(-0.08, 0.08), u(-0.02, 0.2)])
            lookat += 0.5 * rng.random() * (tip - lookat)
            distance = np.exp(u(np.log(0.45), np.log(1.5)))
            camera = rendering.make_camera(lookat, distance, np.degrees(azimuth), u(-65, -8))
            return Eye(camera, u(36, 55))

        eyes = [scene_camera(azimuth)]
        if rng.random() < 0.75:
            kind = rng.random()
            if kind < 0.2:
                eyes.append(scene_camera(azimuth + u(-2.5, 2.5)))
            else:
                lookat = tip + rng.normal(0, 0.02, 3) * (rng.random() < 0.5)
                if kind > 0.85 and places:
                    lookat = places[rng.integers(len(places))]
                distance = np.exp(u(np.log(0.17), np.log(0.6)))
                elevation = u(-85, -60) if rng.random() < 0.2 else u(-60, -10)
                where = np.degrees(azimuth) + u(-160, 160) * (rng.random() < 0.7)
                eyes.append(
                    Eye(rendering.make_camera(lookat, distance, where, elevation), u(38, 60))
                )
        return eyes

    def draw(self) -> dict[str, np.ndarray]:
        """Draw one scene and return its arrays (see the module)."""
        rng = self.rng
        u = self.maker.u
        self.begin()
        azimuth = u(-np.pi, np.pi)
        spread = u(0.12, 0.4)
        placed = []  # (x, y, radius)
        places = []
        things = [self.maker.thing() for _ in range(rng.integers(1, 9))]
        jobs = []
        for parts in things:
            reach = max(
                np.linalg.norm(p[:2]) + s.max() for part in parts for _, s, p, _ in part.geoms
            )
            for _ in range(8):
                xy = rng.uniform(-spread, spread, 2)
                if all(np.hypot(*(xy - q[:2])) > reach + q[2] for q in placed):
                    placed.append((*xy, reach))
                    # Fronts look at the camera, more or less.
                    yaw = azimuth + np.pi + np.clip(rng.normal(0, 0.7), -1.6, 1.6)
                    if rng.random() < 0.15:
                        yaw = u(0, 6.28)
                    jobs.append((parts, np.array([*xy, 0.0]), rotation(Z, yaw)))
                    break
        has_arm = rng.random() < 0.85
        if has_arm:
            scale = u(0.7, 1.3)
            opening = u(0, 0.08) * (rng.random() < 0.8) * scale
            down = -Z
            if rng.random() < 0.35:
                way = azimuth + u(-1.6, 1.6)
                down = np.array([np.cos(way), np.sin(way), u(-0.6, 0.1)])
            down = down + rng.normal(0, 0.12, 3)
            down /= np.linalg.norm(down)
            tip = np.array([*rng.uniform(-spread, spread, 2), u(0.01, 0.35)])
            if jobs and rng.random() < 0.6:  # near some part
                parts, place, turn = jobs[rng.integers(len(jobs))]
                part = parts[rng.integers(len(parts))]
                goal = place + turn @ part.geoms[rng.integers(len(part.geoms))][2]
                tip = goal + rng.normal(0, np.exp(u(np.log(0.005), np.log(0.12))), 3)
                tip[2] = max(tip[2], 0.005)
            self.arm(tip, down, opening, scale)
        else:
            tip = np.array([*rng.uniform(-spread, spread, 2), u(0, 0.2)])
            opening = -1
        for thing, (parts, place, turn) in enumerate(jobs):
            for part in parts:
                places.append(self.add(part, 2 + thing, place, turn))
        self.surroundings(azimuth)
        self.light()
        eyes = self.look(azimuth, tip, places)
        return self.render(eyes, tip, has_arm, opening)

    # --- images and labels

    def render(self, eyes: list[Eye], tip: np.ndarray, has_arm: bool, opening: float) -> dict:
        """Render the views, and label them."""
        images = np.empty((SIZE, SIZE, 3), np.uint8)
        parts = np.empty((CELLS, CELLS), np.uint8)
        depth = np.empty((CELLS, CELLS), np.uint8)
        table = np.full((PARTS, COLUMNS), np.nan, np.float32)
        places = np.array([row[4] for row in self.rows])
        table[: len(places), :4] = [row[:4] for row in self.rows]
        gripper = np.full(6, np.nan, np.float32)
        gripper[4] = opening
        gripper[5] = len(eyes)
        rows = np.linspace(0, SIZE, len(eyes) + 1).astype(int)
        for v, (eye, top, bottom) in enumerate(zip(eyes, rows, rows[1:])):
            height = bottom - top
            self.model.vis.global_.fovy = eye.fovy
            image, ids, z = self.render_view(eye, 2 * SIZE, 2 * height)
            images[top:bottom] = image
            parts[top // 2 : bottom // 2] = ids
            relative = np.log(z / eye.camera.distance)
            depth[top // 2 : bottom // 2] = np.clip((relative + 1.5) * 85, 0, 255)
            points = np.vstack([places, tip])
            seen, axes = self.project(points, eye, height)
            seen[:, 0] += top
            if v == 0:
                table[: len(places), PLACE : PLACE + 3] = (places - tip) @ axes
            visible = np.bincount(ids.ravel(), minlength=PARTS)[: len(places)]
            table[: len(places), VIEWS + 4 * v : VIEWS + 4 * v + 3] = seen[:-1]
            table[: len(places), VIEWS + 4 * v + 3] = visible
            if has_arm:
                gripper[2 * v : 2 * v + 2] = seen[-1, :2]
        return {
            "images": images,
            "parts": parts,
            "depth": depth,
            "tables": table.astype(np.float16),
            "gripper": gripper.astype(np.float16),
        }

    def render_view(self, eye: Eye, width: int, height: int) -> tuple:
        """Return image (h, w, 3), part in each cell (h/2, w/2), its depth (m), for a buffer of 2 w x 2 h pixels."""
        r = self.renderer
        r.free or r.open()
        r.scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = False
        r.scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = False
        fine = r.render(self.data, width, height, eye.camera).astype(np.uint16)
        image = (fine[::2, ::2] + fine[::2, 1::2] + fine[1::2, ::2] + fine[1::2, 1::2] + 2) >> 2
        rect = mujoco.MjrRect(0, 0, width, height)
        r.scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = True
        r.scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        mujoco.mjr_render(rect, r.scene, r.context)
        code = np.empty((height, width, 3), np.uint8)
        z = np.empty((height, width), np.float32)
        mujoco.mjr_readPixels(code, z, rect, r.context)
        index = code[::-1, :, 0].astype(int) + 256 * code[::-1, :, 1].astype(int)
        part = np.full(r.scene.ngeom + 1, 255)
        for i in range(r.scene.ngeom):
            geom = r.scene.geoms[i]
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and geom.segid >= 0:
                part[geom.segid + 1] = self.geom_part[geom.objid]
        ids = part[np.minimum(index, r.scene.ngeom)]
        near = self.model.vis.map.znear * self.model.stat.extent
        far = self.model.vis.map.zfar * self.model.stat.extent
        metres = near / (1 - z[::-1] * (1 - near / far))
        # The smallest part of a cell's 4 x 4 samples wins, if it has more than one of them.
        cells = ids.reshape(height // 4, 4, width // 4, 4).swapaxes(1, 2).reshape(-1, 16)
        count = np.bincount(ids.ravel(), minlength=256)
        count[255] = 1 << 30
        best = np.zeros(len(cells), int)
        mixed = (cells != cells[:, :1]).any(1)
        some = cells[mixed]
        weight = count[some]  # samples of the image that each sample's part has
        own = (some[:, :, None] == some[:, None, :]).sum(-1)
        best[mixed] = np.argmin(np.where((own > 1) | (weight <= 2), weight, 1 << 31), 1)
        pick = np.arange(len(cells)), best
        z_cells = metres.reshape(height // 4, 4, width // 4, 4).swapaxes(1, 2).reshape(-1, 16)
        shape = (height // 4, width // 4)
        return image.astype(np.uint8), cells[pick].reshape(shape), z_cells[pick].reshape(shape)

    def project(self, points: np.ndarray, eye: Eye, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Return points (n, 3) as (row, column, log depth) (n, 3), and the camera's axes right, up, back (3, 3)."""
        left, right = self.renderer.scene.camera[0], self.renderer.scene.camera[1]
        centre = (np.array(left.pos) + np.array(right.pos)) / 2
        ahead = np.array(left.forward)
        up = np.array(left.up)
        side = np.cross(ahead, up)
        offset = points - centre
        z = offset @ ahead
        scale = height / 2 / np.tan(np.radians(eye.fovy) / 2) / np.maximum(z, 1e-3)
        row = height / 2 - offset @ up * scale
        column = SIZE / 2 + offset @ side * scale
        seen = np.stack([row, column, np.log(np.maximum(z, 1e-3) / eye.camera.distance)], 1)
        outside = (z < 0.01) | (row < 0) | (row >= height) | (column < 0) | (column >= SIZE)
        seen[outside] = np.nan
        return seen, np.stack([side, up, -ahead], 1)


def draw_scenes(seed: int, shard: int, n: int) -> dict[str, np.ndarray]:
    """Return the arrays of shard number `shard`: n scenes of one model (see the module)."""
    maker = SceneMaker([seed, shard])
    scenes = [maker.draw() for _ in range(n)]
    maker.renderer.close()
    return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}
