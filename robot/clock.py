"""The schedule of environment steps: 10 Hz in real time, or none where the simulated world waits for commands."""

import time

import numpy as np

from robot.limits import PERIOD


class RealTimeClock:
    """A 10 Hz schedule. Small delays do not add up."""

    real_time = True

    def __init__(self):
        self.overruns = 0
        self.periods = []  # s between two steps
        self.restart()

    def restart(self) -> None:
        """Start the schedule now."""
        self.tick = time.monotonic()
        self.woke = self.tick

    def wait(self) -> None:
        """Sleep until the next tick. A step that comes after its tick restarts the schedule: a shorter period after it
        would leave the arm less time."""
        now = time.monotonic()
        self.tick += PERIOD
        if now > self.tick:
            self.overruns += 1
            self.tick = now
        time.sleep(max(0.0, self.tick - now))
        self.periods.append(time.monotonic() - self.woke)
        self.woke = time.monotonic()

    def is_late(self) -> bool:
        """Return whether the newest state is too old to act on, because the policy or training took its time."""
        return time.monotonic() - self.woke > 2 * PERIOD

    def summary(self) -> str:
        """Return how well the steps kept to the schedule, or "" if there were none."""
        late = np.abs(np.array(self.periods) - PERIOD)
        if not len(late):
            return ""
        share = (late < 0.005).mean()
        return f"{share:.1%} of {len(late)} periods within 5 ms of 0.1 s; {self.overruns} overruns"


class LockstepClock:
    """The simulated world stands still between commands, so there is nothing to wait for."""

    real_time = False

    def restart(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def is_late(self) -> bool:
        return False

    def summary(self) -> str:
        return ""
