"""Small, fast MuJoCo images on a CPU, shared by the domains.

A stock frame costs tens of milliseconds at any size. Shadow maps, reflections and multisampling are
paid per frame, and an arm of 70,000 triangles per vertex. Here the first three are off, and the arm
is drawn with the convex hulls of its links. Physics does not change: only meshes that collide with
nothing, in bodies whose inertia comes from elsewhere, may be replaced.
"""

import atexit
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import mujoco
import mujoco.gl_context
import numpy as np
from scipy.spatial import ConvexHull

from common.errors import UserError
from common.opengl import opengl_error

# Px of the off-screen buffer, hence of the largest image; a larger one does not slow small images.
BUFFER_SIZE = 480
STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


# ----------------------------------------------------------------------------------------------------------------------
# Models that are fast to render


@functools.cache
def _convex_hull(path: Path, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the convex hull of a binary STL file: corners (n, 3), faces (m, 3).

    Its vertices are first thinned to one per `cell` metres.
    """
    points = np.fromfile(path, STL_TRIANGLE, offset=84)["corners"].reshape(-1, 3).astype(float)
    _, first = np.unique(np.round(points / cell), axis=0, return_index=True)
    points = points[first]
    hull = ConvexHull(points)
    a, b, c = points[hull.simplices].swapaxes(0, 1)
    inward = np.sum(np.cross(b - a, c - a) * hull.equations[:, :3], axis=1) < 0
    faces = np.where(inward[:, None], hull.simplices[:, ::-1], hull.simplices)
    used, faces = np.unique(faces, return_inverse=True)
    return points[used], faces.reshape(-1, 3)


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


def reduce_geometry(model: mujoco.MjModel) -> None:
    """Draw a compiled model's round shapes with fewer faces, in place. It halves the time of an image."""
    model.vis.quality.numslices = 12
    model.vis.quality.numstacks = 8
    model.vis.quality.numquads = 2


def remove_textures(model: mujoco.MjModel) -> None:
    """Replace a compiled model's textures by their mean colours, in place."""
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

    It holds OpenGL resources from the first image to `close`. Both belong in one thread.
    """

    def __init__(self, model: mujoco.MjModel, camera: mujoco.MjvCamera):
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = BUFFER_SIZE
        model.vis.global_.offheight = BUFFER_SIZE
        self.model = model
        self.camera = camera
        self.option = mujoco.MjvOption()
        # Draw colliding meshes as physics sees them.
        self.option.flags[mujoco.mjtVisFlag.mjVIS_CONVEXHULL] = True
        self.free = None  # a function that frees the OpenGL resources, while there are any

    def open(self) -> None:
        """Load the model into OpenGL. Raises UserError if no OpenGL context can be made."""
        self.scene = mujoco.MjvScene(self.model, maxgeom=1000)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        own_context = threading.current_thread() is not threading.main_thread()
        try:
            self.gl = _new_context() if own_context else _shared_context()
            self.gl.make_current()
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
        height = height or width
        if not (0 < width <= BUFFER_SIZE and 0 < height <= BUFFER_SIZE):
            raise ValueError(
                f"width and height must be from 1 to {BUFFER_SIZE} pixels (got {width} and {height})"
            )
        if self.free is None:
            self.open()
        rect = mujoco.MjrRect(0, 0, width, height)
        image = np.empty((height, width, 3), np.uint8)
        self.gl.make_current()
        # Another renderer may have been used.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            self.model, data, self.option, None, camera or self.camera, everything, self.scene
        )
        mujoco.mjr_render(rect, self.scene, self.context)
        mujoco.mjr_readPixels(image, None, rect, self.context)
        return np.ascontiguousarray(image[::-1])  # OpenGL's rows run upwards

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
            fine = self.render(data, 2 * size, 2 * (bottom - top), camera).astype(np.uint16)
            total = fine[::2, ::2] + fine[::2, 1::2] + fine[1::2, ::2] + fine[1::2, 1::2]
            image[top:bottom] = (total + 2) >> 2
        return image


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
