"""Domains: one file per set of tasks, each offering the same names; a user adds a domain by adding a file.

A domain module offers

    EXPERT_TASKS, RL_TASKS, UNSEEN_TASKS   lists of task names: the demonstrated ones, the ones learned online (in this
                                           order), and the ones only ever evaluated
    INSTRUCTIONS                           dict, task name -> the sentence that the policy is given
    ALGO                                   "ppo" or "sacfd": how stage 1 learns here unless it is told
    NOISE, KICKS                           how demonstrations are disturbed (stage0_sft.py)
    VIEWS                                  how many views, of one size, lie one above the other in a picture
    DEMOS                                  how many episodes of each expert task stage 0 records unless it is told
    STEPS                                  how long stage 0 trains unless it is told
    PROTOCOL                               dict, JSON-able: what must agree before two success rates may be compared
    make(task, image_size)                 -> gymnasium.Env: observation (H, W, 3) uint8, action Box(-1, 1, (A,))
                                           float32, reward 1.0 on success and else 0.0, terminated on success, truncated
                                           at the horizon; reset(seed=...) alone determines the initial state
    expert(env)                            -> (A,) float32, the demonstrator's action in the environment's present state

    PRELOAD                                optional: modules that its environments import when they are made
    real()                                 optional -> str: what says that its environments are a real robot's, "" where
                                           they are simulated

Nothing outside this folder asks which domain it is. Simulators have processes of their own, which import this folder
alone, and so neither torch nor transformers (but for PRELOAD): a stage begins several seconds earlier.
"""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

if sys.platform.startswith("linux"):  # MuJoCo picks its OpenGL back end when it is first imported
    os.environ.setdefault("MUJOCO_GL", "egl")
# Mesa's software renderer would start threads in each simulator's process; beside other simulators they get in each
# other's way (1.5 times fewer steps a second, results/experiments.md).
os.environ.setdefault("LP_NUM_THREADS", "0")


class Refusal(Exception):
    """Something the user can put right: one sentence that names the file or value, and the way out."""


def load_domain(name):
    """The module domains/<name>.py. Raises Refusal for an unknown name, and where the domain cannot draw."""
    known = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    if name not in known:
        raise Refusal(f"unknown domain {name!r}: known are {', '.join(known)}; a new one is a file in domains/")
    domain = importlib.import_module(f"domains.{name}")
    # Simulators run in processes that are forked from a server: what that has imported, they need not.
    multiprocessing.set_forkserver_preload(["domains._player", domain.__name__, *getattr(domain, "PRELOAD", [])])
    return domain


def simulator(domain_name, task, image_size):
    """An environment of the domain: what a simulator's process is told to make."""
    return load_domain(domain_name).make(task, image_size)
