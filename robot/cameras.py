"""Cameras. `read(width, height)` returns (image (height, width, 3) uint8 RGB, its number, its age in s)."""

import threading
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from common.errors import UserError
from robot.limits import Fault
from robot.server import RobotServer


class SimCamera:
    """A camera of the simulated robot server, which renders at the requested size."""

    def __init__(self, name: str, server: RobotServer, timeout: float):
        self.name = name
        self.server = server
        self.timeout = timeout

    def read(self, width: int, height: int) -> tuple[np.ndarray, int, float]:
        request = {"name": self.name, "width": width, "height": height}
        content, headers = self.server.post("sim/camera", request, self.timeout, tries=2)
        try:
            image = np.frombuffer(content, np.uint8).reshape(height, width, 3)
            return image, int(headers["X-Number"]), float(headers["X-Age"])
        except (ValueError, TypeError) as error:
            raise Fault(f"the {self.name} camera's answer is not an image ({error})") from error

    def close(self) -> None:
        pass


def open_opencv(name: str) -> tuple[Callable, Callable]:
    """Return (grab, release) of an OpenCV camera: an index, a device or an address."""
    import cv2

    device = cv2.VideoCapture(int(name) if name.isdigit() else name)
    device.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # otherwise it returns frames that have been waiting

    def grab():
        good, image = device.read()
        return image[..., ::-1] if good else None

    return grab, device.release


def open_realsense(serial: str) -> tuple[Callable, Callable]:
    """Return (grab, release) of a RealSense camera."""
    import pyrealsense2 as rs

    pipeline = rs.pipeline()
    config = rs.config()
    config.enable_device(serial)
    config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
    pipeline.start(config)

    def grab():
        return np.asanyarray(pipeline.wait_for_frames(1000).get_color_frame().get_data())

    return grab, pipeline.stop


OPENERS = {"opencv": open_opencv, "realsense": open_realsense}


class UsbCamera:
    """A camera of this computer. A thread keeps its newest frame.

    A frame that equals the one before to the last pixel does not count as new, because real sensors
    are never still.
    """

    def __init__(self, kind: str, name: str):
        self.name = f"{kind}:{name}"
        self.lock = threading.Lock()
        self.newest = None  # (image, number, time)
        self.running = True
        self.grab, self.release = OPENERS[kind](name)
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        for _ in range(50):
            if self.newest:
                break
            time.sleep(0.1)

    def watch(self) -> None:
        """Keep the newest frame until the camera is closed."""
        number = 0
        last = None
        try:
            while self.running:
                try:
                    image = self.grab()
                # Librealsense got no frame; the next may come, and the last one ages until then.
                except RuntimeError:
                    image = None
                if image is None:
                    time.sleep(0.01)
                elif last is None or not np.array_equal(image, last):
                    number += 1
                    last = image.copy()
                    with self.lock:
                        self.newest = last, number, time.monotonic()
        finally:
            self.release()

    def read(self, width: int, height: int) -> tuple[np.ndarray, int, float]:
        with self.lock:
            newest = self.newest
        if newest is None:
            raise Fault(
                f"the camera {self.name} sends no frames: is it plugged in, and does another program use it?"
            )
        image, number, at = newest
        return crop_and_shrink(image, width, height), number, time.monotonic() - at

    def close(self) -> None:
        """Stop the thread. The interpreter would abort if it ended while the thread is inside OpenCV."""
        self.running = False
        self.thread.join(2)


def crop_and_shrink(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the image's centre with the requested proportions, averaged down to (height, width, 3)."""
    H, W, _ = image.shape
    h = min(H, W * height // width)
    w = min(W, H * width // height)
    y = (H - h) // 2
    x = (W - w) // 2
    return np.asarray(
        Image.fromarray(image[y : y + h, x : x + w]).resize((width, height), Image.Resampling.BOX)
    )


def open_camera(spec: str, server: RobotServer, timeout: float) -> SimCamera | UsbCamera:
    """Return the camera that `spec` names. Raises UserError if it does not open."""
    kind, _, name = spec.partition(":")
    if kind == "sim":
        return SimCamera(name, server, timeout)
    if kind not in OPENERS:
        raise UserError(
            f"unknown camera {spec!r}: use opencv:<index>, realsense:<serial number> or sim:<name>"
        )
    try:
        return UsbCamera(kind, name)
    except ImportError as error:
        raise UserError(
            f"the camera {spec!r} needs {error.name}: pip install it on this computer"
        ) from error
    except RuntimeError as error:  # librealsense's
        raise UserError(
            f"the camera {spec!r} does not open ({error}): check its cable and its number"
        ) from error
