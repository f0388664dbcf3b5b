"""Domains: one file for each set of tasks, all offering the same names. docs/domains.md shows how to add one.

    NAME                                   the file's name
    EXPERT_TASKS, RL_TASKS, UNSEEN_TASKS   task names: demonstrated; learned online, in this order; only evaluated
    INSTRUCTIONS                           {task: the instruction that the policy gets}
    RL_ALGORITHM                           "ppo" or "sacfd": stage 1's default
    ACTION_NOISE_STD, RANDOM_BURST_PROB    how demonstrations are disturbed (stage0_sft.py)
    NUM_VIEWS                              views of equal size that are stacked vertically in an image
    DEMOS_PER_TASK                         successful expert episodes of each task: stage 0's default
    STAGE0_STEPS, STAGE2_STEPS             optimizer steps: the defaults of stages 0 and 2
    SFT_BATCH                              frames per optimizer step: the default of both
    PROTOCOL                               JSON-able dict of all that must agree before two success rates are compared.
                                           It holds at least "horizon", the steps of the longest episode, and
                                           {package: version} of the packages that decide the physics
    make(task, image_size)                 returns a gymnasium.Env: observation (H, W, 3) uint8, action Box(-1, 1, (A,))
                                           float32, reward 1.0 on success and else 0.0, terminated on success,
                                           truncated at the horizon; reset(seed=...) alone decides the initial state.
                                           Stepping may go on after the end (evaluate.py --hold): the reward then is
                                           1.0 if the task is solved at that moment, and the horizon has no effect
    expert(env)                            returns (A,) float32, the demonstrator's action in the present state, and
                                           leaves the environment unchanged

    real_robot()                           optional: returns why the environments are a real robot's, or ""
    preload()                              optional: fills the caches that a new environment needs, without OpenGL. It
                                           is called once in the process that all workers are forked from

Nothing outside this folder asks which domain it is. Environments run in processes of their own,
which import the domain's file alone, so a domain imports neither torch nor transformers.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

from common.errors import UserError

# Before MuJoCo, which reads the variables that this module sets.
from common.opengl import explain_import_errors
from common.pins import check_installed
from common.processes import PRELOADED_DOMAIN


def load_domain(name: str) -> ModuleType:
    """Return the module domains/<name>.py.

    Raises UserError for an unknown name, if a package is missing or has another version than
    requirements.txt pins, and if the domain cannot render.
    """
    known = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    if name not in known:
        raise UserError(
            f"unknown domain {name!r}: known are {', '.join(known)}; a new one is a file in domains/"
        )
    with explain_import_errors():
        domain = importlib.import_module(f"domains.{name}")
    check_installed(domain.PROTOCOL)
    os.environ[PRELOADED_DOMAIN] = name  # for the workers that this process may start
    return domain


def robot_reason(domain: ModuleType) -> str:
    """Return why the domain's environments are a real robot's, or "" if they are simulated."""
    return domain.real_robot() if hasattr(domain, "real_robot") else ""
