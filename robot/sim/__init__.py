"""The simulated Panda behind SERL's robot server: `python -m robot.sim serve`."""

# Before MuJoCo, which reads the variables that this module sets.
from common.opengl import explain_import_errors

__all__ = ["explain_import_errors"]
