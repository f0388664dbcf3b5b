"""Meta-World as a domain: what every domain must offer, and pictures and episodes that their seed alone decides."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, refused

from data import EVAL_SEED, EXPERT_SEED
from domains import metaworld
from evaluate import all_tasks, evaluate
from model import VLA, load_domain

FRESH = """
import hashlib, json, sys
import numpy as np
from domains import metaworld
env = metaworld.make(sys.argv[1], 64)
for seed in map(int, sys.argv[2:]):
    picture, _ = env.reset(seed=seed)
    digest = hashlib.sha256(picture)
    for t in range(8):
        action = metaworld.expert(env) if t < 5 else np.float32([0.3, -0.5, 0.1, 1.0])
        picture, reward, *_ = env.step(action)
        digest.update(picture); digest.update(action)
    print(digest.hexdigest())
"""


def fresh(task, *seeds):
    """A digest of what an environment of the task shows and does from each seed, in a process of its own."""
    command = [sys.executable, "-c", FRESH, task, *map(str, seeds)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def close_to(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean() < 0.5


def test_a_domain_offers_what_the_stages_use():
    """Three disjoint splits as in the paper, and an instruction, an environment and the spaces for every task."""
    names = all_tasks(metaworld)
    assert [len(metaworld.EXPERT_TASKS), len(metaworld.RL_TASKS), len(metaworld.UNSEEN_TASKS)] == [25, 5, 10]
    assert len(set(names)) == 40 and set(names) == set(metaworld.INSTRUCTIONS)
    assert all(isinstance(s, str) and s for s in metaworld.INSTRUCTIONS.values())
    env = metaworld.make(metaworld.RL_TASKS[0], 48)
    assert env.observation_space == gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    picture, info = env.reset(seed=3)
    assert picture in env.observation_space and info == {}
    action = metaworld.expert(env)
    assert action in env.action_space
    picture, reward, terminated, truncated, _ = env.step(action)
    assert picture in env.observation_space and (reward, terminated, truncated) == (0.0, False, False)
    env.close()


@pytest.mark.parametrize("task", ["drawer-open", "button-press-new"])
def test_a_seed_decides_an_episode(task):
    """The same seed gives the same pictures and the same trajectory in another process, after whatever came before."""
    five, six, five_again = fresh(task, 5, 6, 5)
    assert five == five_again != six
    assert fresh(task, 6, 5) == [six, five]


@pytest.mark.parametrize("task", ["reach", "drawer-open", "window-close-new"])
def test_expert_solves_the_task(task):
    """The scripted expert succeeds: reward 1 and terminated at the last decision only, within the horizon."""
    env = metaworld.make(task, 32)
    solved = 0
    for seed in range(EXPERT_SEED, EXPERT_SEED + 4):
        env.reset(seed=seed)
        rewards, ended = [], False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(metaworld.expert(env))
            rewards.append(reward)
            ended = terminated or truncated
        assert not any(rewards[:-1]) and (rewards[-1] == 1.0) == terminated and len(rewards) <= metaworld.HORIZON
        solved += terminated
    env.close()
    assert solved >= 3


def test_an_idle_episode_times_out():
    """Without success an episode is truncated at the horizon and never terminated, with reward 0 throughout."""
    env = metaworld.make("drawer-open", 32)
    env.reset(seed=0)
    steps = [env.step(np.zeros(4, np.float32)) for _ in range(metaworld.HORIZON)]
    env.close()
    assert [s[3] for s in steps] == [False] * (metaworld.HORIZON - 1) + [True]
    assert not any(s[2] or s[1] for s in steps)


def test_environments_of_one_process_do_not_disturb_each_other():
    """Closed and used again, beside another one or after another one, an environment draws what it drew alone."""
    first = metaworld.make("drawer-open", 64)
    alone = first.reset(seed=1)[0]
    second = metaworld.make("window-open-new", 64)
    other = second.reset(seed=1)[0]
    assert close_to(first.reset(seed=1)[0], alone) and close_to(second.reset(seed=1)[0], other)
    first.close()
    assert close_to(second.reset(seed=1)[0], other)
    assert close_to(first.reset(seed=1)[0], alone)
    first.close()
    second.close()
    third = metaworld.make("drawer-open", 64)
    assert close_to(third.reset(seed=1)[0], alone) and not close_to(alone, other)
    third.close()


def test_evaluation_starts_where_training_does_not():
    """The states that policies are judged on are none of those that demonstrations start from."""
    env = metaworld.make("drawer-open", 64)
    pictures = [env.reset(seed=base + k)[0].tobytes() for base in (EXPERT_SEED, EVAL_SEED) for k in range(10)]
    env.close()
    assert len(set(pictures)) == 20


def test_unknown_names_are_refused_with_the_known_ones(checkpoint, toy):
    """A mistyped task or domain is answered with the names there are."""
    assert "'drawer-opn'" in (said := refused(metaworld.make, "drawer-opn")) and "drawer-open-new" in said
    assert "'purple'" in (said := refused(evaluate, VLA.load(checkpoint), toy, ["purple"], 1)) and "blue" in said
    assert "'metawrld'" in (said := refused(load_domain, "metawrld")) and "metaworld" in said and "_" not in said


@pytest.mark.parametrize("action", [[0, 0, 0], [np.nan, 0, 0, 0], [0, 0, np.inf, 0]])
def test_an_impossible_action_is_not_executed(action):
    """NaN, infinity or a wrong length never reach the simulator."""
    env = metaworld.make("reach", 32)
    env.reset(seed=0)
    with pytest.raises(ValueError):
        env.step(np.array(action, np.float32))
    env.close()
