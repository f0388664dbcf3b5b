"""The simulated domains: what each must offer, and pictures and episodes that their seed alone decides."""

import subprocess
import sys
import threading

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, refused

from data import EVAL_SEED, EXPERT_SEED
from domains import kitchen, load_domain, metaworld
from evaluate import all_tasks, evaluate
from model import VLA

FRESH = """
import hashlib, importlib, sys
import numpy as np
domain = importlib.import_module(f"domains.{sys.argv[1]}")
env = domain.make(sys.argv[2], 64)
for seed in map(int, sys.argv[3:]):
    picture, _ = env.reset(seed=seed)
    digest = hashlib.sha256(picture)
    for t in range(8):
        action = domain.expert(env) if t < 5 else np.linspace(-0.5, 1, env.action_space.shape[0], dtype=np.float32)
        picture, reward, *_ = env.step(action)
        digest.update(picture); digest.update(action)
    print(digest.hexdigest())
"""


def fresh(domain, task, *seeds, first="import torch"):
    """A digest of what an environment of the task shows and does from each seed, in a process of its own, which leaves
    the environment open and must end without complaint."""
    command = [sys.executable, "-c", first + FRESH, domain, task, *map(str, seeds)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout.splitlines()


def close_to(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean() < 0.5


@pytest.mark.parametrize("domain, counts, actions", [(metaworld, [25, 5, 10], 4), (kitchen, [5, 2, 3], 7)])
def test_a_domain_offers_what_the_stages_use(domain, counts, actions):
    """Three disjoint splits as in the paper, and an instruction, an environment and the spaces for every task."""
    names = all_tasks(domain)
    assert [len(domain.EXPERT_TASKS), len(domain.RL_TASKS), len(domain.UNSEEN_TASKS)] == counts
    assert len(set(names)) == sum(counts) and set(names) == set(domain.INSTRUCTIONS)
    assert all(isinstance(s, str) and s for s in domain.INSTRUCTIONS.values())
    env = domain.make(domain.RL_TASKS[0], 48)
    assert env.observation_space == gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (actions,), np.float32)
    picture, info = env.reset(seed=3)
    assert picture in env.observation_space and info == {}
    action = domain.expert(env)
    assert action in env.action_space
    picture, reward, terminated, truncated, _ = env.step(action)
    assert picture in env.observation_space and (reward, terminated, truncated) == (0.0, False, False)
    env.close()


@pytest.mark.parametrize(
    "domain, task",
    [("metaworld", "drawer-open"), ("metaworld", "button-press-new"), ("kitchen", "left-door-open-new")],
)
def test_a_seed_decides_an_episode(domain, task):
    """The same seed gives the same pictures and the same trajectory in another process, after whatever came before."""
    five, six, five_again = fresh(domain, task, 5, 6, 5)
    assert five == five_again != six
    assert fresh(domain, task, 6, 5, first="") == [six, five]


@pytest.mark.parametrize(
    "domain, task",
    [(metaworld, "reach"), (metaworld, "drawer-open"), (metaworld, "window-close-new")]
    + [(kitchen, "knob-on"), (kitchen, "left-door-open-new")],
)
def test_expert_solves_the_task(domain, task):
    """The scripted expert succeeds: reward 1 and terminated at the last decision only, within the horizon. Its actions,
    played again from the same seed without looking, succeed too."""
    env = domain.make(task, 32)
    solved = 0
    for seed in range(EXPERT_SEED, EXPERT_SEED + 4):
        env.reset(seed=seed)
        actions, rewards, ended = [], [], False
        while not ended:
            actions.append(domain.expert(env))
            _, reward, terminated, truncated, _ = env.step(actions[-1])
            rewards.append(reward)
            ended = terminated or truncated
        assert not any(rewards[:-1]) and (rewards[-1] == 1.0) == terminated and len(rewards) <= domain.HORIZON
        solved += terminated
        if seed == EXPERT_SEED:
            env.reset(seed=seed)
            assert [env.step(action)[1] for action in actions] == rewards
    env.close()
    assert solved >= 3


@pytest.mark.parametrize("domain, task", [(metaworld, "drawer-open"), (kitchen, "slide-door-open")])
def test_an_idle_episode_times_out(domain, task):
    """Without success an episode is truncated at the horizon and never terminated, with reward 0 throughout."""
    env = domain.make(task, 32)
    env.reset(seed=0)
    steps = [env.step(np.zeros(env.action_space.shape, np.float32)) for _ in range(domain.HORIZON)]
    env.close()
    assert [s[3] for s in steps] == [False] * (domain.HORIZON - 1) + [True]
    assert not any(s[2] or s[1] for s in steps)


def test_the_kitchen_s_action_0_holds_the_hand_still():
    """FrankaKitchen-v1's own action 0 lets the arm sink 20 cm in 2 s; here it stays within 2 cm for 19 s."""
    env = kitchen.make("light-on", 32)
    env.reset(seed=0)
    before = env.hand_pose()[0]
    for _ in range(kitchen.HORIZON):
        env.step(np.zeros(7))
    assert np.linalg.norm(env.hand_pose()[0] - before) < 0.02
    env.close()


@pytest.mark.parametrize("task", kitchen.INSTRUCTIONS)
def test_a_nudge_is_no_success_in_the_kitchen(task):
    """A joint within the stock environment's 0.3 of its goal has not yet been opened or switched; at the end it has."""
    env = kitchen.make(task, 32)
    env.reset(seed=0)
    for share, done in ((0.6, False), (1.02, True)):
        env.data.qpos[env.address] = share * env.task.success
        assert env.step(np.zeros(7))[2] is done
    env.close()


def test_the_kitchen_s_new_tasks_look_new():
    """From the same seed, another colour and another place than the original's: both can be seen."""
    for task, original in (("slide-door-open-red", "slide-door-open"), ("left-door-open-new", "left-door-open")):
        new, old = kitchen.make(task, 64), kitchen.make(original, 64)
        apart = np.abs(new.reset(seed=0)[0].astype(int) - old.reset(seed=0)[0]).max(axis=-1)
        assert (apart[:32] > 40).mean() > 0.05  # of the upper half, which shows the whole kitchen
        shift = new.data.site_xpos[new.site] - old.data.site_xpos[old.site]
        assert np.linalg.norm(shift) > 0.05
        new.close()
        old.close()


def test_environments_of_one_process_do_not_disturb_each_other():
    """Closed and used again, beside one of another domain, in another thread or after another one, an environment draws
    what it drew alone (kitchen and Meta-World drawn by gymnasium's renderer corrupt each other's pictures)."""
    first = metaworld.make("drawer-open", 64)
    alone = first.reset(seed=1)[0]
    second = kitchen.make("left-door-open-new", 64)
    other = second.reset(seed=1)[0]
    assert close_to(first.reset(seed=1)[0], alone) and close_to(second.reset(seed=1)[0], other)
    first.close()
    assert close_to(second.reset(seed=1)[0], other)
    assert close_to(first.reset(seed=1)[0], alone)
    in_a_thread = []

    def draw():
        env = metaworld.make("drawer-open", 64)
        in_a_thread.append(env.reset(seed=1)[0])
        env.close()

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert close_to(in_a_thread[0], alone) and close_to(first.reset(seed=1)[0], alone)
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


@pytest.mark.parametrize("domain, task", [(metaworld, "reach"), (kitchen, "light-on")])
def test_an_impossible_action_is_not_executed(domain, task):
    """NaN, infinity or a wrong length never reach the simulator."""
    env = domain.make(task, 32)
    env.reset(seed=0)
    possible = np.zeros(env.action_space.shape, np.float32)
    for action in (possible[1:], possible + [np.nan, *possible[1:]], possible + [*possible[1:], np.inf]):
        with pytest.raises(ValueError):
            env.step(action)
    env.close()
