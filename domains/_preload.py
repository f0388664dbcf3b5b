"""Imported once by the process that worker processes are forked from, so that they need not import a domain.

An environment variable names the domain, because such a process only takes the names of modules.
"""

import contextlib
import importlib
import os

import common.episode_worker  # noqa: F401  a worker runs it
from common.processes import PRELOADED_DOMAIN

with contextlib.suppress(Exception):  # the main process meets the same error, and explains it
    domain = importlib.import_module(f"domains.{os.environ[PRELOADED_DOMAIN]}")
    if hasattr(domain, "preload"):
        domain.preload()
