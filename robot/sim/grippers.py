"""The four grippers that upstream's robot servers know. Each differs in its number, its commands and its memory.

The simulated fingers are the Franka Hand's: WIDTH is the greatest distance between them. A command
returns the width that it asks for, or None if the server or the gripper ignores it.
"""

WIDTH = 0.08  # m


class SerlHand:
    """SERL's Franka Hand: gripper_pos is the width in metres."""

    def restart(self) -> None:
        """Start as the robot server does."""

    def report(self, width: float) -> float:
        return width

    def open(self) -> float | None:
        return WIDTH

    def close(self) -> float | None:
        return 0.01

    def move(self, position: int) -> float | None:
        """Go to a position from 0, shut, to 255, which is wider than the hand."""
        return min(position / 2550, WIDTH)

    def activate(self) -> None:
        pass


class HilSerlHand(SerlHand):
    """HIL-SERL's Franka Hand: gripper_pos is 1 if it is open, 0 if it is closed.

    Its server ignores a command that it believes to be done. It believes the hand open when it
    starts.
    """

    def __init__(self):
        self.believed_open = True

    def restart(self) -> None:
        self.believed_open = True

    def report(self, width: float) -> float:
        return width / WIDTH

    def open(self) -> float | None:
        if self.believed_open:
            return None
        self.believed_open = True
        return super().open()

    def close(self) -> float | None:
        if not self.believed_open:
            return None
        self.believed_open = False
        return super().close()


class SerlRobotiq(SerlHand):
    """SERL's Robotiq: gripper_pos is the raw position, 0 if it is open, 255 if it is closed.

    It ignores every command until it is activated, once after each start.
    """

    OPEN = 0  # raw position of /open_gripper
    CLOSED = 255

    def __init__(self):
        self.active = False

    def restart(self) -> None:
        self.active = False

    def activate(self) -> None:
        self.active = True

    def raw(self, width: float) -> int:
        """Return the raw position at a width."""
        return round(255 * (1 - min(max(width / WIDTH, 0), 1)))

    def report(self, width: float) -> float:
        return self.raw(width)

    def move(self, position: int) -> float | None:
        return WIDTH * (1 - position / 255) if self.active else None

    def open(self) -> float | None:
        return self.move(self.OPEN)

    def close(self) -> float | None:
        return self.move(self.CLOSED)


class HilSerlRobotiq(SerlRobotiq):
    """HIL-SERL's Robotiq: gripper_pos is 1 if it is open, but /open_gripper opens it to 0.31 only."""

    OPEN = 175

    def report(self, width: float) -> float:
        return 1 - self.raw(width) / 255


GRIPPERS = {
    "serl": SerlHand,
    "hil-serl": HilSerlHand,
    "robotiq": SerlRobotiq,
    "hil-serl-robotiq": HilSerlRobotiq,
    "none": None,  # upstream accepts it, and then answers /getstate with 500
}
