"""MuJoCo's OpenGL: the environment variables that select it, and the cause if it does not work.

Import this module before `mujoco`, which reads MUJOCO_GL when it is first imported. It does not
import MuJoCo.
"""

import contextlib
import ctypes
import os
import sys
import traceback
from collections.abc import Iterator

from common.errors import UserError
from common.pins import check_installed, pinned_versions

LINUX = sys.platform.startswith("linux")
# Set by the user or by another tool. MuJoCo sets PYOPENGL_PLATFORM itself, so the value is read
# before MuJoCo is.
PYOPENGL_PLATFORM = os.environ.get("PYOPENGL_PLATFORM", "")
if LINUX:
    os.environ.setdefault("MUJOCO_GL", "egl")
# Mesa's software renderer would start threads in each environment's process. Next to other
# environments they get in each other's way (1.5 times fewer steps a second,
# results/experiments.md).
os.environ.setdefault("LP_NUM_THREADS", "0")

DISABLED = ("disable", "disabled", "off", "false", "0")  # values of MUJOCO_GL
WINDOW = ("", "glfw", "glx", "enable", "enabled", "on", "true", "1")
LIBRARIES = {
    "egl": ("libEGL.so.1", "libEGL.so"),
    "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),
}
# Names in Debian and Ubuntu.
PACKAGES = {"egl": "libegl1 libegl-mesa0 libgl1-mesa-dri", "osmesa": "libosmesa6"}
# Variables of EGL and Mesa that select drivers. A wrong value hides every device.
DRIVER_VARIABLES = (
    "MUJOCO_EGL_DEVICE_ID",
    "__EGL_VENDOR_LIBRARY_FILENAMES",
    "__EGL_VENDOR_LIBRARY_DIRS",
    "EGL_PLATFORM",
    "LIBGL_DRIVERS_PATH",
    "GALLIUM_DRIVER",
    "MESA_LOADER_DRIVER_OVERRIDE",
    "MESA_GL_VERSION_OVERRIDE",
)
OPENGL_MODULES = (
    "mujoco.gl_context",
    "mujoco.egl",
    "mujoco.glfw",
    "mujoco.osmesa",
    "mujoco.cgl",
    "OpenGL",
    "glfw",
)
SIMULATION_PACKAGES = ("mujoco", "metaworld", "gymnasium", "gymnasium-robotics")


def opengl_error(error: Exception) -> UserError:
    """Return why MuJoCo could not make an OpenGL context, and the way out. error: the one that MuJoCo raised."""
    detail = " ".join(str(error).split())  # EGL's has many lines
    return UserError(
        f"MuJoCo cannot render: {_cause()} ({detail})"
        if detail
        else f"MuJoCo cannot render: {_cause()}"
    )


def _cause() -> str:
    """Return the cause and the remedy, from the environment variables and the libraries of this machine."""
    setting = os.environ.get("MUJOCO_GL", "")
    backend = setting.lower().strip()
    named = f"MUJOCO_GL={setting}" if setting else "MUJOCO_GL='' (empty)"
    if backend in DISABLED:
        return f"{named} turns rendering off: unset MUJOCO_GL"
    if not LINUX:
        return f"no OpenGL context could be made ({named}): unset MUJOCO_GL"
    if backend in WINDOW:
        display = os.environ.get("DISPLAY")
        screen = (
            f"DISPLAY={display} does not provide"
            if display
            else "this machine does not have (DISPLAY is not set)"
        )
        return f"{named} needs a screen, which {screen}: unset MUJOCO_GL, or set MUJOCO_GL=egl"
    if backend not in LIBRARIES:
        return f"{named} is not a back end of MuJoCo: unset MUJOCO_GL, or set it to egl, osmesa or glfw"
    if PYOPENGL_PLATFORM and PYOPENGL_PLATFORM.lower() != backend:
        return f"PYOPENGL_PLATFORM={PYOPENGL_PLATFORM} contradicts MUJOCO_GL={backend}: unset PYOPENGL_PLATFORM"
    install = f"on Debian and Ubuntu, apt-get install {PACKAGES[backend]}"
    if not any(_can_load(name) for name in LIBRARIES[backend]):
        other = (
            "unset MUJOCO_GL"
            if backend == "osmesa"
            else "set MUJOCO_GL=osmesa and install libosmesa6"
        )
        return f"the library {LIBRARIES[backend][0]} of MUJOCO_GL={backend} is missing: {install}; or {other}"
    drivers = [name for name in DRIVER_VARIABLES if os.environ.get(name)]
    if drivers:
        values = " ".join(f"{name}={os.environ[name]}" for name in drivers)
        return f"no OpenGL context could be made with {values}: unset {' '.join(drivers)}"
    return f"MUJOCO_GL={backend} finds no device to render on: {install}"


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def explain_import_errors() -> Iterator[None]:
    """Import modules that need MuJoCo in here. Raises UserError if OpenGL or the installed packages are the cause.

    Every other error, such as one in the imported module's own code, passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        check_installed(SIMULATION_PACKAGES)
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.split(".")[0].replace("_", "-")
            if package in pinned_versions():
                raise UserError(
                    f"{package} is not installed: run pip install -r requirements.txt"
                ) from error
        modules = [
            frame.f_globals.get("__name__", "")
            for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        if any(
            f"{module}.".startswith(f"{name}.") for module in modules for name in OPENGL_MODULES
        ):
            raise opengl_error(error) from error
        if "mujoco" in modules:
            raise UserError(
                f"mujoco cannot be imported ({error}): "
                f"run pip install --force-reinstall mujoco=={pinned_versions().get('mujoco')}"
            ) from error
        raise
