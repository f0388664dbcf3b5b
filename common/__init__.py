"""Plumbing that no reader of the paper needs: errors, files, run folders, processes, environments, the backbone.

Nothing in here imports a file of the top level, of domains/ or of robot/ (tests/test_house.py).
"""

from common import environment

__all__ = ["environment"]  # imported here, so that it comes before torch wherever a script starts
