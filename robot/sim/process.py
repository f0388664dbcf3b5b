"""Simulated robot servers in processes of their own, for environments without ROBOT_URL."""

import subprocess
import sys
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable,
    "-m",
    "robot.sim",
    "serve",
    "--port",
    "0",
    "--clock",
    "lockstep",
    "--faults",
    "--child",
]


class SimProcess:
    """A lock-step server that ends when this process does."""

    def __init__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise UserError(
                "the simulated robot server did not start: run `python -m robot.sim serve` to see why"
            )

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)
