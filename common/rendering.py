"""Small, fast MuJoCo images on a CPU, shared by the domains.

A stock frame costs tens of milliseconds at any size. Shadow maps, reflections and multisampling are
paid per frame, and an arm of 70,000 triangles per vertex. Here the first three are off, and the arm
is drawn with the convex hulls of its links. Physics does not change. A mesh may be replaced before
the model is compiled if it collides with nothing and its body's inertia comes from elsewhere. Any
other mesh is coarse in OpenGL alone.
"""

import atexit
import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import mujoco
import mujoco.gl_context
import numpy as np
from scipy.spatial import ConvexHull, QhullError

from common.errors import UserError
from common.opengl import opengl_error

BUFFER_SIZE = 480  # px of the largest image
NOT_DRAWN = 5  # a group of geoms that MuJoCo does not draw by default
STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


# ----------------------------------------------------------------------------------------------------------------------
# Models that are fast to render


def _thinned_hull(points: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the convex hull of points (n, 3) that are first thinned to one per `cell` metres.

    Returns the indices of its corners in `points` (k,), and its faces (m, 3), indices of corners.
    They turn outwards.
    """
    _, kept = np.unique(np.round(points / cell), axis=0, return_index=True)
    points = points[kept]
    hull = ConvexHull(points)
    a, b, c = points[hull.simplices].swapaxes(0, 1)
    inward = np.sum(np.cross(b - a, c - a) * hull.equations[:, :3], axis=1) < 0
    faces = np.where(inward[:, None], hull.simplices[:, ::-1], hull.simplices)
    used, faces = np.unique(faces, return_inverse=True)
    return kept[used], faces.reshape(-1, 3)


@functools.cache
def _convex_hull(path: Path, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the thinned convex hull of a binary STL file: corners (n, 3), faces (m, 3)."""
    points = np.fromfile(path, STL_TRIANGLE, offset=84)["corners"].reshape(-1, 3).astype(float)
    corners, faces = _thinned_hull(points, cell)
    return points[corners], faces


def coarsen_meshes(spec: mujoco.MjSpec, names: Collection[str], cell: float = 0.02) -> None:
    """Replace meshes (binary STL files) by coarse convex hulls, in place, before the model is compiled.

    names: meshes for drawing only, of geoms that collide with nothing and contribute no inertia to
    their body.
    """
    for mesh in spec.meshes:
        if mesh.name in names:
            corners, faces = _convex_hull(Path(spec.modelfiledir, spec.meshdir, mesh.file), cell)
            mesh.file = ""
            mesh.uservert = corners.ravel()
            mesh.userface = faces.ravel()


@contextlib.contextmanager
def coarse_hulls(model: mujoco.MjModel, cell: float) -> Iterator[None]:
    """Thin the convex hulls of a compiled model's meshes to one corner per `cell` metres, while in the context.

    OpenGL copies the hulls when a renderer is opened. Afterwards physics finds its own again.
    """
    hulls = model.mesh_graph.copy()
    try:
        for mesh in range(model.nmesh):
            if model.mesh_graphadr[mesh] >= 0:
                _thin_hull(model, mesh, cell)
        yield
    finally:
        model.mesh_graph[:] = hulls


def _thin_hull(model: mujoco.MjModel, mesh: int, cell: float) -> None:
    """Write a mesh's thinned hull over its hull, in place, unless it has as many faces."""
    # mesh_graph: corners n and faces m, then arrays of n edge addresses, n corners, n + 3 m edges
    # and m x 3 corners of faces.
    graph = model.mesh_graph[model.mesh_graphadr[mesh] :]
    num_corners, num_faces = graph[:2]
    corners = graph[2 + num_corners : 2 + 2 * num_corners].copy()
    begin = model.mesh_vertadr[mesh]
    points = model.mesh_vert[begin : begin + model.mesh_vertnum[mesh]].astype(float)
    try:
        used, faces = _thinned_hull(points[corners], cell)
    except QhullError:  # a mesh that is smaller than a few cells
        return
    if len(faces) < num_faces:
        graph[:2] = len(used), len(faces)
        address = 2 + 3 * len(used) + 3 * len(faces)
        graph[address : address + faces.size] = corners[used][faces].ravel()


def reduce_geometry(model: mujoco.MjModel, stacks: int = 4) -> None:
    """Draw a compiled model's round shapes, boxes and floors with fewer faces, in place.

    stacks: rings of a sphere or cylinder. Physics does not change. A floor's third size is the
    spacing of the grid that is drawn: a stock floor of 80 x 80 squares takes as long as an arm.
    """
    model.vis.quality.numslices = 12
    model.vis.quality.numstacks = stacks
    model.vis.quality.numquads = 2
    floors = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    model.geom_size[floors, 2] = np.maximum(model.geom_size[floors, 2], 0.5)


def remove_textures(model: mujoco.MjModel) -> None:
    """Replace a compiled model's textures by their mean colours, in place.

    A geom with a colour of its own keeps that colour, without its texture's mean. The unused object
    of Meta-World's reach is brighter than in the stock image for that reason.
    """
    for material in range(model.nmat):
        for texture in model.mat_texid[material]:
            if texture < 0:
                continue
            channels = model.tex_nchannel[texture]
            begin = model.tex_adr[texture]
            end = begin + model.tex_height[texture] * model.tex_width[texture] * channels
            colour = model.tex_data[begin:end].reshape(-1, channels)[:, :3].mean(0) / 255
            model.mat_rgba[material, :3] *= colour
    model.mat_texid[:] = -1


def make_camera(
    lookat: Sequence[float], distance: float, azimuth: float, elevation: float
) -> mujoco.MjvCamera:
    """Return a free camera. lookat is (x, y, z) in metres, distance is in metres, angles are in degrees."""
    camera = mujoco.MjvCamera()
    camera.lookat[:] = lookat
    camera.distance = distance
    camera.azimuth = azimuth
    camera.elevation = elevation
    return camera


# ----------------------------------------------------------------------------------------------------------------------
# Images


class Renderer:
    """Renders a model, by default from one camera.

    hull_cell: metres to which the drawn hulls of colliding meshes are thinned (default: 0, the
    hulls of physics). cull: leave out geoms outside the view, which pays from about 50 geoms on
    (default: off). It holds OpenGL resources from the first image to `close`. Both belong in one
    thread.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        camera: mujoco.MjvCamera,
        hull_cell: float = 0.0,
        cull: bool = False,
    ):
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        self.model = model
        self.camera = camera
        self.hull_cell = hull_cell
        self.option = mujoco.MjvOption()
        # Draw colliding meshes as physics sees them.
        self.option.flags[mujoco.mjtVisFlag.mjVIS_CONVEXHULL] = True
        self.cull = cull
        self.geom_group = model.geom_group.copy()
        # m of the bounding spheres, as a column. A floor is everywhere.
        self.radius = np.where(model.geom_rbound > 0, model.geom_rbound, np.inf)[:, None]
        self.buffer = (0, 0)  # pixels of the off-screen buffer
        self.free = None  # a function that frees the OpenGL resources, while there are any

    def open(self) -> None:
        """Load the model into OpenGL. Raises UserError if no OpenGL context can be made."""
        self.scene = mujoco.MjvScene(self.model, maxgeom=1000)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        coarse = (
            coarse_hulls(self.model, self.hull_cell) if self.hull_cell else contextlib.nullcontext()
        )
        own_context = threading.current_thread() is not threading.main_thread()
        self.model.vis.global_.offwidth, self.model.vis.global_.offheight = self.buffer = (1, 1)
        try:
            self.gl = _new_context() if own_context else _shared_context()
            self.gl.make_current()
            with coarse:
                self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except Exception as error:  # each back end fails in its own way
            raise opengl_error(error) from error
        # Also when garbage-collected.
        self.free = weakref.finalize(self, _free, self.gl, self.context, own_context)
        self.free.atexit = False
        _open_resources.append(self.free)

    def close(self) -> None:
        """Free the OpenGL resources. The next image loads the model again."""
        if self.free is not None:
            self.free()
            _open_resources.remove(self.free)
            self.free = None

    def render(
        self,
        data: mujoco.MjData,
        width: int,
        height: int | None = None,
        camera: mujoco.MjvCamera | None = None,
    ) -> np.ndarray:
        """Return the present state as a new array (height, width, 3) uint8.

        width, height: pixels, at most BUFFER_SIZE (default height: the width). Raises UserError if
        no OpenGL context can be made.
        """
        return np.ascontiguousarray(self._draw(data, width, height or width, camera or self.camera))

    def _draw(
        self, data: mujoco.MjData, width: int, height: int, camera: mujoco.MjvCamera
    ) -> np.ndarray:
        """Return the present state as a view (height, width, 3) uint8 of a new array."""
        if not (0 < width <= BUFFER_SIZE and 0 < height <= BUFFER_SIZE):
            raise ValueError(
                f"width and height must be from 1 to {BUFFER_SIZE} pixels (got {width} and {height})"
            )
        if self.free is None:
            self.open()
        rect = mujoco.MjrRect(0, 0, width, height)
        image = np.empty((height, width, 3), np.uint8)
        self.gl.make_current()
        # MuJoCo clears the whole buffer for every image, so it is as small as the images allow.
        if width > self.buffer[0] or height > self.buffer[1]:
            self.buffer = (max(width, self.buffer[0]), max(height, self.buffer[1]))
            mujoco.mjr_resizeOffscreen(*self.buffer, self.context)
        # Another renderer may have been used.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        if self.cull:
            self._hide_outside(data, camera, width / height)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self.option, None, camera, everything, self.scene)
        mujoco.mjr_render(rect, self.scene, self.context)
        mujoco.mjr_readPixels(image, None, rect, self.context)
        return image[::-1]  # OpenGL's rows run upwards

    def _hide_outside(self, data: mujoco.MjData, camera: mujoco.MjvCamera, aspect: float) -> None:
        """Move the geoms whose bounding spheres lie outside the view to a group that is not drawn.

        aspect: width / height. A compiled model's groups are for drawing alone.
        """
        mujoco.mjv_updateCamera(self.model, data, camera, self.scene)
        left, right = self.scene.camera  # two eyes, between which a single image is seen
        forward = left.forward
        up = left.up
        fx, fy, fz = forward.tolist()
        ux, uy, uz = up.tolist()
        side = np.array([fy * uz - fz * uy, fz * ux - fx * uz, fx * uy - fy * ux])
        tall = left.frustum_top / left.frustum_near  # half the view, 1 m ahead
        wide = tall * aspect
        planes = np.array(
            [forward * tall + up, forward * tall - up, forward * wide + side, forward * wide - side]
        )
        planes[:2] /= np.sqrt(1 + tall * tall)
        planes[2:] /= np.sqrt(1 + wide * wide)
        inside = (data.geom_xpos - (left.pos + right.pos) / 2) @ planes.T + self.radius
        self.model.geom_group[:] = np.where(inside.min(1) < 0, NOT_DRAWN, self.geom_group)

    def render_views(
        self, data: mujoco.MjData, size: int, cameras: Sequence[mujoco.MjvCamera]
    ) -> np.ndarray:
        """Return the views of several cameras, stacked vertically, as a new array (size, size, 3) uint8.

        Each view is rendered at twice its size and averaged, so that details of a few pixels stay
        visible wherever they lie. Raises UserError if `size` is larger than BUFFER_SIZE / 2.
        """
        if not 0 < size <= BUFFER_SIZE // 2:
            raise UserError(
                f"--image-size must be from 1 to {BUFFER_SIZE // 2} in this domain (got {size})"
            )
        rows = np.linspace(0, size, len(cameras) + 1).astype(int)
        image = np.empty((size, size, 3), np.uint8)
        for camera, top, bottom in zip(cameras, rows, rows[1:]):
            _average(self._draw(data, 2 * size, 2 * (bottom - top), camera), image[top:bottom])
        return image


def _average(fine: np.ndarray, image: np.ndarray) -> None:
    """Write the rounded means of 2 x 2 pixels of `fine` (2 H, 2 W, 3) uint8 to `image` (H, W, 3) uint8."""
    height, width = image.shape[:2]
    fine = fine.reshape(2 * height, 6 * width)
    rows = np.add(fine[::2], fine[1::2], dtype=np.uint16)
    # The sums of all neighbours, of which every second is used: numpy adds long rows fastest.
    total = rows[:, :-3] + rows[:, 3:]
    total += 2
    total >>= 2
    pixels = np.empty((height, 6 * width), np.uint8)
    pixels[:, :-3] = total
    image.view("V3")[..., 0] = pixels.view("V3")[:, ::2]


# ----------------------------------------------------------------------------------------------------------------------
# OpenGL contexts

# Functions that free the shared context and each Renderer's part, oldest first.
_open_resources: list[Callable] = []


def _new_context() -> "mujoco.gl_context.GLContext":
    # A context that could not be made would otherwise raise again when it is deleted.
    mujoco.gl_context.GLContext._context = None
    gl = mujoco.gl_context.GLContext(BUFFER_SIZE, BUFFER_SIZE)
    _free_at_exit()
    return gl


@functools.cache
def _shared_context() -> "mujoco.gl_context.GLContext":
    """Return the context of the main thread's Renderers. The first model of a new context costs 0.4 s more.

    A context is current in one thread at a time, so each Renderer of another thread has its own.
    """
    gl = _new_context()
    _open_resources.append(gl.free)
    return gl


@functools.cache
def _free_at_exit() -> None:
    """Free open resources at exit, before MuJoCo ends EGL, which would make it fail.

    MuJoCo registers its own exit function with the first context. This one is registered later, so
    it runs earlier.
    """
    atexit.register(lambda: [free() for free in reversed(_open_resources)])


def _free(gl: "mujoco.gl_context.GLContext", context: mujoco.MjrContext, own_context: bool) -> None:
    gl.make_current()
    context.free()
    if own_context:
        gl.free()
