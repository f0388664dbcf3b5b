"""Small, fast MuJoCo pictures on a CPU, shared by the domains.

A stock frame costs tens of milliseconds whatever its size: shadow maps, reflections and multisampling are paid per
frame, and an arm of 70,000 triangles per vertex. Here the first three are off, and the arm is drawn with the convex
hulls of its links. Physics does not change: only meshes that collide with nothing, in bodies whose inertia comes from
elsewhere, may be replaced.
"""

import atexit
import functools
import os
import threading
import weakref
from pathlib import Path

import numpy as np
from scipy.spatial import ConvexHull

from domains import Refusal

NO_OPENGL = (
    f"MuJoCo could not make an OpenGL context (MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}): on Debian and Ubuntu, "
    "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri; or set MUJOCO_GL=osmesa and install libosmesa6"
)


def _refusal(error):
    return Refusal(f"{NO_OPENGL} ({' '.join(str(error).split())})")  # EGL's has many lines


try:
    import mujoco
    import mujoco.gl_context
except Exception as error:  # noqa: BLE001  ImportError, AttributeError, EGLError: each back end fails in its own way
    raise _refusal(error) from error
mujoco.gl_context.GLContext._context = None  # else a context that could not be made complains again when it is deleted

BUFFER = 480  # px; the off-screen buffer, hence the largest picture. A larger buffer does not slow small pictures
STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


@functools.cache
def _hull(path, cell):
    """Convex hull of a binary STL file's vertices, thinned to one per `cell` metres: corners (n, 3), faces (m, 3)."""
    points = np.fromfile(path, STL_TRIANGLE, offset=84)["corners"].reshape(-1, 3).astype(float)
    points = points[np.unique(np.round(points / cell), axis=0, return_index=True)[1]]
    hull = ConvexHull(points)
    a, b, c = points[hull.simplices].swapaxes(0, 1)
    inward = np.sum(np.cross(b - a, c - a) * hull.equations[:, :3], axis=1) < 0
    faces = np.where(inward[:, None], hull.simplices[:, ::-1], hull.simplices)
    used, faces = np.unique(faces, return_inverse=True)
    return points[used], faces.reshape(-1, 3)


def coarsen(spec, names, cell=0.02):
    """Replaces meshes of a MjSpec (binary STL files) by coarse convex hulls, in place, before it is compiled.

    `names` must be meshes for drawing only: of geoms that collide with nothing and give their body no inertia.
    """
    for mesh in spec.meshes:
        if mesh.name in names:
            corners, faces = _hull(Path(spec.modelfiledir, spec.meshdir, mesh.file), cell)
            mesh.file, mesh.uservert, mesh.userface = "", corners.ravel(), faces.ravel()


def few_faces(model):
    """Draws a compiled model's round things with fewer faces: half of a picture's time."""
    quality = model.vis.quality
    quality.numslices, quality.numstacks, quality.numquads = 12, 8, 2


def no_textures(model):
    """Draws a compiled model's textures as their mean colours."""
    for material in range(model.nmat):
        for texture in model.mat_texid[material]:
            if texture >= 0:
                begin, channels = model.tex_adr[texture], model.tex_nchannel[texture]
                end = begin + model.tex_height[texture] * model.tex_width[texture] * channels
                colour = model.tex_data[begin:end].reshape(-1, channels)[:, :3].mean(0) / 255
                model.mat_rgba[material, :3] *= colour
    model.mat_texid[:] = -1


def camera(lookat, distance, azimuth, elevation):
    """A free camera: `lookat` (x, y, z) and `distance` in metres, angles in degrees."""
    view = mujoco.MjvCamera()
    view.lookat[:], view.distance, view.azimuth, view.elevation = lookat, distance, azimuth, elevation
    return view


class Picture:
    """Draws a model from one camera. Holds it in OpenGL from `draw` to `close`, which belong in one thread."""

    def __init__(self, model, view):
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = BUFFER
        self.model, self.view, self.option = model, view, mujoco.MjvOption()
        self.option.flags[mujoco.mjtVisFlag.mjVIS_CONVEXHULL] = True  # colliding meshes: what physics sees, fewer faces
        self.free = None  # frees what OpenGL holds of the model, where it does

    def open(self):
        """Raises Refusal when no GL context can be made."""
        self.scene = mujoco.MjvScene(self.model, maxgeom=1000)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.scene.flags[flag] = False
        try:
            own = threading.current_thread() is not threading.main_thread()
            self.gl = _new() if own else _shared()
            self.gl.make_current()
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except Exception as error:  # noqa: BLE001  each back end fails in its own way
            raise _refusal(error) from error
        self.free = weakref.finalize(self, _free, self.gl, self.context, own)  # also when forgotten
        self.free.atexit = False
        _opened.append(self.free)

    def close(self):
        if self.free is not None:
            self.free()
            _opened.remove(self.free)
            self.free = None

    def draw(self, data, size, height=None, view=None):
        """The present state as (size, size, 3) uint8, size <= BUFFER; or of another height, or from another camera.

        Raises Refusal when no GL context can be made."""
        height, view = height or size, view or self.view
        if not (0 < size <= BUFFER and 0 < height <= BUFFER):
            raise ValueError(f"a picture is 1 to {BUFFER} pixels wide, not {size}")
        if self.free is None:
            self.open()
        rect, image = mujoco.MjrRect(0, 0, size, height), np.empty((height, size, 3), np.uint8)
        self.gl.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)  # another one may have drawn since
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self.option, None, view, everything, self.scene)
        mujoco.mjr_render(rect, self.scene, self.context)
        mujoco.mjr_readPixels(image, None, rect, self.context)
        return np.ascontiguousarray(image[::-1])  # OpenGL's rows run upwards

    def stacked(self, data, size, views):
        """The views of several cameras, one above the other, as (size, size, 3) uint8, size <= BUFFER / 2.

        Each is drawn at twice its size and averaged, so that what is a few pixels large is seen wherever it lies.
        """
        if size > BUFFER // 2:
            raise Refusal(f"an image of {size} pixels is larger than the {BUFFER // 2} that are drawn here: give less")
        rows = np.linspace(0, size, len(views) + 1).astype(int)
        image = np.empty((size, size, 3), np.uint8)
        for view, top, bottom in zip(views, rows, rows[1:]):
            fine = self.draw(data, 2 * size, 2 * (bottom - top), view).astype(np.uint16)
            fine = fine[::2, ::2] + fine[::2, 1::2] + fine[1::2, ::2] + fine[1::2, 1::2]
            image[top:bottom] = (fine + 2) >> 2
        return image


_opened = []  # what frees the shared GL context and each Picture's part, in the order in which they were made


def _new():
    gl = mujoco.gl_context.GLContext(BUFFER, BUFFER)
    _free_at_exit()
    return gl


@functools.cache
def _shared():
    """The GL context of the main thread's Pictures: in a new one the first model costs 0.4 s more. A context is current
    in one thread at a time, so each Picture of another thread has its own."""
    gl = _new()
    _opened.append(gl.free)
    return gl


@functools.cache
def _free_at_exit():
    """Frees at exit what is still open, before MuJoCo ends EGL, for that would make it fail: registered after the first
    context, with which MuJoCo registers its end, this runs before it."""
    atexit.register(lambda: [free() for free in reversed(_opened)])


def _free(gl, context, own):
    gl.make_current()
    context.free()
    if own:
        gl.free()
