"""Split episodes of Minari's D4RL/kitchen data sets, which do several tasks each, into our tasks."""

from collections.abc import Iterator

import gymnasium as gym
import mujoco
import numpy as np

from domains._kitchen_tasks import Skill, is_success


def split_episode(
    env: gym.Env, episode: object, skills: dict[str, Skill], action_repeat: int, horizon: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (task, images (T, H, W, 3), actions (T, 7), rewards (T,)) for each of `skills` that an episode does.

    env: a Kitchen, which renders the stored states and converts the stored actions. A task's part
    of the episode begins when the task before it is done. Parts of more than `horizon` environment
    steps are left out.
    """
    # (T+1, 59): qpos and qvel of arm, then of objects
    state = np.asarray(episode.observations["observation"], float)
    qpos = np.hstack([state[:, :9], state[:, 18:39]])  # (T+1, 30)
    qvel = np.hstack([state[:, 9:18], state[:, 39:]])  # (T+1, 29)
    stock_actions = np.asarray(episode.actions, float).clip(-1, 1)  # (T, 9)
    first = first_successes(env.model, qpos, skills)
    for task in skills:
        end = first.get(task, 0)
        begin = max([step for step in first.values() if step < end], default=0)
        if not 0 < end - begin <= horizon * action_repeat:
            continue
        images = []
        actions = []
        for step in range(begin, end):
            env.data.qpos[:] = qpos[step]
            env.data.qvel[:] = qvel[step]
            mujoco.mj_forward(env.model, env.data)
            if (step - begin) % action_repeat == 0:
                images.append(env.get_image(env.image_size))
                actions.append([])
            actions[-1].append(env.end_effector_action(stock_actions[step]))
        actions = np.stack([np.mean(repeated, axis=0).clip(-1, 1) for repeated in actions])
        rewards = np.zeros(len(actions))
        rewards[-1] = 1.0
        yield task, np.stack(images), actions, rewards


def first_successes(
    model: mujoco.MjModel, qpos: np.ndarray, skills: dict[str, Skill]
) -> dict[str, int]:
    """Return {task: first step at which it is done}, for our tasks and for stock tasks about other joints."""
    # Not at the top: kitchen.py silences the first import of this package.
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import (
        BONUS_THRESH,
        OBS_ELEMENT_GOALS,
        OBS_ELEMENT_INDICES,
    )

    done = {}
    addresses = set()
    for task, skill in skills.items():
        address = model.jnt_qposadr[model.joint(skill.joint).id]
        addresses.add(address)
        done[task] = is_success(skill, qpos[:, address])
    for stock_task, goal in OBS_ELEMENT_GOALS.items():
        indices = OBS_ELEMENT_INDICES[stock_task]
        if not set(indices) & addresses:
            done[stock_task] = np.linalg.norm(qpos[:, indices] - goal, axis=1) < BONUS_THRESH
    return {task: int(now.argmax()) for task, now in done.items() if now.any()}
