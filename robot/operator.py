"""Operators: who prepares an episode, takes over, and decides whether it succeeded.

asks, resets_arm         whether somebody can confirm that the robot is safe; whether `prepare` puts the arm back
prepare(robot, seed, reason)   bring the robot and the object to the start of an episode
watch()                  raise Fault if the operator stops the arm
action(robot)            the operator's action (7,), or None while the policy acts
success(robot, image)    whether the task is solved
ended()                  whether the operator ends the episode without success
confirm(message)         wait until the operator confirms
close()
"""

import contextlib
import os
import select
import threading
import time
from pathlib import Path

import numpy as np

from common.errors import UserError
from robot.limits import Fault, FaultKind
from robot.server import RobotConfig, RobotServer


class SimOperator:
    """The simulated robot's operator: its server puts the object down and sees whether it is lifted."""

    asks = False
    resets_arm = True

    def __init__(self, server: RobotServer, timeout: float):
        self.server = server
        self.timeout = timeout

    def prepare(self, robot, seed: int, reason: str = "") -> None:
        self.server.post("sim/reset", {"task": robot.task, "seed": seed}, self.timeout)

    def look(self) -> dict:
        """Return the view of an eye above the table: object_pose, grasp, success, target, seconds."""
        seen = self.server.json("sim/look", timeout=self.timeout)
        if not isinstance(seen, dict) or not isinstance(seen.get("success"), bool):
            raise Fault(f"the answer to /sim/look has no success: {seen!r:.60}", FaultKind.FATAL)
        return seen

    def success(self, robot, image: np.ndarray) -> bool:
        return self.look()["success"]

    def watch(self) -> None:
        pass

    def action(self, robot) -> None:
        return None

    def ended(self) -> bool:
        return False

    def confirm(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass


class Keyboard:
    """The keys of an operator's terminal, read without waiting."""

    HELP = (
        "space: stop   y: success   n: no success   c: take over, and again to return control; then "
        "w s a d: away, back, left, right   r f: up, down   q e: rotate   o k: open, close"
    )
    MOVES = {
        "w": (0, 1),
        "s": (0, -1),
        "a": (1, 1),
        "d": (1, -1),
        "r": (2, 1),
        "f": (2, -1),
        "q": (5, 1),
        "e": (5, -1),
    }
    GONE = "the operator's terminal is gone"

    def __init__(self, terminal: str = "/dev/tty"):
        import termios
        import tty

        try:  # not stdin, which an environment's process does not have
            self.fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
        except OSError as error:
            raise UserError(
                "keys need a terminal: start this command from one, or set ROBOT_REWARD to a classifier"
            ) from error
        self.before = termios.tcgetattr(self.fd)
        tty.setcbreak(self.fd)
        self.driving = False
        self.gripper = 1.0

    def say(self, message: str) -> None:
        """Print a message on the terminal."""
        with contextlib.suppress(OSError):  # reading reports that it is gone
            os.write(self.fd, f"\r\n{message} ".encode())

    def read(self) -> str:
        """Return the next key. Raises Fault if the terminal was closed."""
        try:
            key = os.read(self.fd, 1)
        except OSError as error:
            raise Fault(self.GONE, FaultKind.FATAL) from error
        if not key:
            raise Fault(self.GONE, FaultKind.FATAL)
        return key.decode(errors="ignore")

    def keys(self) -> str:
        """Return the keys pressed since the last call."""
        pressed = ""
        while select.select([self.fd], [], [], 0)[0]:
            pressed += self.read()
        return pressed

    def ask(self, message: str) -> str:
        """Wait for Enter. Return the keys pressed before it."""
        self.keys()
        self.say(f"{message} [Enter]")
        pressed = ""
        while True:
            key = self.read()
            if key in ("\n", "\r"):
                return pressed
            pressed += key

    def action(self, pressed: str, gripper: float) -> np.ndarray | None:
        """Return the operator's action (7,), or None while the policy acts.

        gripper: the newest command, 1 open or -1 close. It stays until the operator changes it.
        """
        if pressed.count("c") % 2:
            self.driving = not self.driving
            self.gripper = gripper
        if not self.driving:
            return None
        action = np.zeros(7, np.float32)
        for key in pressed:
            if key in self.MOVES:
                axis, sign = self.MOVES[key]
                action[axis] = 0.5 * sign
            elif key in "ok":
                self.gripper = 1.0 if key == "o" else -1.0
        action[6] = self.gripper
        return action

    def close(self) -> None:
        import termios

        with contextlib.suppress(termios.error, OSError):  # the terminal may be gone
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self.before)
        with contextlib.suppress(OSError):
            os.close(self.fd)


class SpaceMouse:
    """A SpaceMouse: takes over while it is pushed. Its buttons move the gripper. Needs pyspacemouse."""

    def __init__(self):
        try:
            import pyspacemouse
        except ImportError as error:
            raise UserError(
                f"ROBOT_TAKEOVER=spacemouse needs {error.name}: pip install it"
            ) from error
        try:
            self.mouse = pyspacemouse.open()
        except Exception as error:  # noqa: BLE001  each driver raises its own
            raise UserError(
                f"no SpaceMouse was found ({error}): plug it in, or unset ROBOT_TAKEOVER"
            ) from error
        if self.mouse is None:
            raise UserError("no SpaceMouse was found: plug it in, or unset ROBOT_TAKEOVER")
        self.gripper = 1.0
        self.driving = False
        self.running = True
        self.newest = self.mouse.read()
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.thread.start()

    def follow(self) -> None:
        """Read every report as it comes. They queue up: read once a step, they would move the arm for seconds after
        the operator has let go."""
        while self.running:
            try:
                self.newest = self.mouse.read()
            except Exception:  # noqa: BLE001  unplugged
                self.newest = None
                return
            time.sleep(0.001)

    def action(self, pressed: str, gripper: float) -> np.ndarray | None:
        """As Keyboard.action. Raises Fault if the SpaceMouse is gone."""
        s = self.newest
        if s is None:
            raise Fault("the SpaceMouse does not answer", FaultKind.OPERATOR)
        # To the base's axes, as in SERL.
        move = np.array([-s.y, s.x, s.z, -s.roll, -s.pitch, -s.yaw], np.float32)
        was_driving = self.driving
        self.driving = bool(np.linalg.norm(move) >= 0.05 or any(s.buttons))
        if not self.driving:
            return None
        if not was_driving:
            self.gripper = gripper
        if s.buttons[0]:
            self.gripper = -1.0
        elif s.buttons[-1]:
            self.gripper = 1.0
        return np.append(move.clip(-1, 1), np.float32(self.gripper))

    def close(self) -> None:
        """Stop the thread, so that it is not inside the driver when the interpreter ends."""
        self.running = False
        self.thread.join(2)


class HumanOperator:
    """A real robot's operator. Puts the object down, stops the arm, and reports success if no classifier does."""

    asks = True
    resets_arm = False
    classifier = None
    pressed = ""  # keys that arrived before an action was sent
    pending_keys = ""  # keys that arrived since
    helped = False  # whether the keys have been explained

    def __init__(self, config: RobotConfig):
        if config.reward != "keys":
            if not Path(config.reward).is_file():
                raise UserError(
                    f"ROBOT_REWARD={config.reward} is not a file: use keys, or a classifier's file"
                )
            from robot.classifier import SuccessClassifier  # the only part that needs torch

            self.classifier = SuccessClassifier(config.reward)
        mouse = SpaceMouse() if config.takeover == "spacemouse" else None
        try:
            # Last, because a failure before it leaves the terminal as it is.
            self.keyboard = Keyboard()
        except UserError:
            if mouse:
                mouse.close()
            raise
        self.mouse = mouse
        self.driver = self.keyboard if config.takeover == "keys" else mouse

    def prepare(self, robot, seed: int, reason: str = "") -> None:
        """Send the arm home, then wait until the object is in place. reason: why the last attempt failed."""
        if self.classifier:
            self.classifier.restart()
        if self.driver:
            self.driver.driving = False
        if not self.helped:
            self.keyboard.say(Keyboard.HELP)
            self.helped = True
        coming = "Hands clear: the gripper opens, and the arm goes home."
        if robot.server.dry:
            coming = "Dry run: nothing is sent, the arm and the gripper stay as they are."
        if robot.episodes == 0 or reason:
            self.keyboard.ask(f"{reason}. {coming}" if reason else coming)
        else:  # the operator has seen it before: time for the space bar
            self.keyboard.say(coming)
            for _ in range(20):
                self.watch()
                time.sleep(0.1)
        robot.go_home()
        hint = " Press c before Enter to start in control." if self.driver is self.keyboard else ""
        pressed = self.keyboard.ask(f"Place the object for {robot.task!r} and step back.{hint}")
        self.pressed = ""
        self.pending_keys = "c" * (pressed.count("c") % 2) if hint else ""

    def watch(self) -> None:
        """Read the keys. Raises Fault if the operator stops the arm."""
        self.pressed = self.pending_keys + self.keyboard.keys()
        self.pending_keys = ""
        self.check_stop(self.pressed)

    def check_stop(self, pressed: str) -> None:
        """Raise Fault if the space bar is among the keys."""
        if " " in pressed:
            self.pending_keys = ""
            raise Fault("the operator stopped the arm", FaultKind.OPERATOR)

    def action(self, robot) -> np.ndarray | None:
        """Return the operator's action, or None while the policy acts. Raises Fault if the operator stops the arm."""
        self.watch()
        if self.driver is None:
            return None
        return self.driver.action(self.pressed, 1.0 if robot.tracking.gripper == "open" else -1.0)

    def success(self, robot, image: np.ndarray) -> bool:
        """Return whether the operator or the classifier reports success. Raises Fault if the operator stops the arm."""
        self.pending_keys += self.keyboard.keys()  # keys other than y and n belong to the next step
        self.check_stop(self.pending_keys)
        if self.classifier and self.classifier.success(robot, image):
            return True
        return "y" in self.pressed + self.pending_keys

    def ended(self) -> bool:
        return "n" in self.pressed + self.pending_keys

    def confirm(self, message: str) -> None:
        self.keyboard.ask(message)

    def close(self) -> None:
        self.keyboard.close()
        if self.mouse:
            self.mouse.close()
