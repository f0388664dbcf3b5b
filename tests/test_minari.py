"""Minari's own files: human kitchen episodes become demonstrations, and other environments are refused."""

import numpy as np
import pytest
from conftest import refused

from common.episode_file import episode_files, open_episode
from domains import kitchen  # chooses how MuJoCo draws, before minari imports it
from tools import convert

minari = pytest.importorskip("minari")

import gymnasium as gym
import gymnasium_robotics
import mujoco
from minari.data_collector import EpisodeBuffer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture(autouse=True)
def own_storage(monkeypatch, tmp_path):
    """Minari's files are in a folder of this test."""
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def store(name, observations, actions, observation_space, action_space):
    """Write a data set of one episode."""
    n = len(actions)
    episode = EpisodeBuffer(
        id=0,
        observations=observations,
        actions=actions,
        rewards=np.zeros(n),
        terminations=np.zeros(n, bool),
        truncations=np.eye(n, dtype=bool)[-1],
    )
    minari.create_dataset_from_buffers(
        name, [episode], observation_space=observation_space, action_space=action_space
    )


def add(name, tmp_path):
    convert.main(
        convert.Import(name, "minari", domain="kitchen", data=str(tmp_path / "D_e"), image_size=32)
    )


def test_human_kitchen_episodes_become_demonstrations(tmp_path, monkeypatch):
    """Both tasks of an episode of the stock kitchen are found, and its relabelled actions do the first task again."""
    monkeypatch.setattr(kitchen, "SHIFTS", dict.fromkeys(kitchen.SHIFTS, (0, 0, 0)))
    monkeypatch.setattr(kitchen, "ARM_SHIFT", 0.0)
    gym.register_envs(gymnasium_robotics)
    stock = gym.make(
        "FrankaKitchen-v1",
        tasks_to_complete=["slide cabinet", "light switch"],
        object_noise_ratio=0.0,
        robot_noise_ratio=0.0,
        terminate_on_tasks_completed=False,
        max_episode_steps=400,
    )
    observations = [stock.reset(seed=0)[0]["observation"]]
    stock_actions = []
    theirs = stock.unwrapped.robot_env
    for task in ("slide-door-open", "light-on"):  # our expert looks at the stock environment
        ours = kitchen.make(task, 16)
        ours.reset(seed=0)

        def is_done(ours=ours):
            ours.data.qpos[:] = theirs.data.qpos
            ours.data.qvel[:] = theirs.data.qvel
            mujoco.mj_forward(ours.model, ours.data)
            return kitchen.is_success(ours.skill, theirs.data.qpos[ours.address])

        while not is_done():
            action = kitchen.expert(ours).astype(float)
            for _ in range(kitchen.ACTION_REPEAT):
                is_done()
                stock_actions.append(ours.joint_action(action))
                observations.append(stock.step(stock_actions[-1])[0]["observation"])
        ours.close()
    space = gym.spaces.Dict({"observation": stock.observation_space["observation"]})
    store(
        "test/kitchen-v0",
        {"observation": np.stack(observations)},
        np.stack(stock_actions),
        space,
        stock.action_space,
    )
    stock.close()

    add("test/kitchen-v0", tmp_path)
    for task in ("slide-door-open", "light-on"):
        (path,) = episode_files(tmp_path / "D_e/kitchen" / task)
        handle, header = open_episode(path)
        assert (header["task"], header["success"], header["source"]) == (task, "1", "expert")
        assert (
            handle.get_slice("image").get_shape()[1:] == [32, 32, 3]
            and handle.get_tensor("reward").sum() == 1
        )
    (path,) = episode_files(tmp_path / "D_e/kitchen/slide-door-open")
    actions = open_episode(path)[0].get_tensor("action")
    env = kitchen.make("slide-door-open", 16)  # this task begins where our episodes do
    env.reset(seed=0)
    assert any(env.step(action)[2] for action in [*actions, *[actions[-1]] * 5])
    env.close()
    before = path.read_bytes()
    add("test/kitchen-v0", tmp_path)
    assert path.read_bytes() == before and len(episode_files(path.parent)) == 1


def test_sets_of_other_environments_are_refused(tmp_path):
    """Observations that are an array, or too few, are one sentence, and nothing is written."""
    box = gym.spaces.Box(-10, 10, (4,))
    action_space = gym.spaces.Box(-1, 1, (2,))
    actions = np.zeros((5, 2), np.float32)
    zeros = np.zeros((6, 4), np.float32)
    store("test/array-v0", zeros, actions, box, action_space)
    store(
        "test/dict-v0",
        {"observation": zeros},
        actions,
        gym.spaces.Dict({"observation": box}),
        action_space,
    )
    for name in ("test/array-v0", "test/dict-v0"):
        assert f"{name} does not hold episodes of kitchen's environment" in refused(
            add, name, tmp_path
        )
    assert not (tmp_path / "D_e").exists()
