"""Episode files are whole or refused, and every task is drawn equally often."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import files, refused
from safetensors.numpy import save_file

import data
import stage0_sft
from data import EXPERT_SEED, Episodes, attempts, open_episode, write_episode


@pytest.fixture
def write(toy):
    """Writes an episode of the toy domain: write(path, T)."""

    def write(path, T=5, size=8, seed=0, **changes):
        rng = np.random.default_rng(seed)
        image, action = rng.integers(0, 256, (T, size, size, 3), np.uint8), rng.uniform(-1, 1, (T, 2)).astype("f4")
        about = dict(domain="toy", task="red", instruction="push", source="expert", seed=7, protocol=toy.PROTOCOL)
        write_episode(path, image, action, np.eye(T, dtype="f4")[-1], **{**about, **changes})
        return image, action

    return write


def read(path, toy, size=8):
    """What the SFT stages draw from the folder of an episode."""
    return Episodes({path.parent: 1.0}, toy, size)


def test_episode_round_trip(write, toy, tmp_path):
    """What is written is read again, frame by frame, with its label, its sentence and what made it."""
    path = tmp_path / "000003.safetensors"
    image, action = write(path)
    handle, header = open_episode(path)
    assert np.array_equal(handle.get_tensor("image"), image) and np.array_equal(handle.get_tensor("action"), action)
    assert handle.get_tensor("reward").tolist() == [0, 0, 0, 0, 1]
    assert (header["task"], header["source"], header["success"], header["seed"]) == ("red", "expert", "1", "7")
    shutil.copy(tmp_path / "000003.safetensors", tmp_path / "000003 copy.safetensors")
    assert attempts(tmp_path) == [3]
    frames, sentences, labels = read(path, toy).batch(np.random.default_rng(0), 64)
    which = [np.flatnonzero((image == frame).all((1, 2, 3)))[0] for frame in frames]
    assert set(which) == set(range(5)) and np.array_equal(labels, action[which]) and set(sentences) == {"push"}


def damage(path, how, write):
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "cut in its header":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        save_file({"x": np.zeros(3, "f4")}, path)
    elif how == "foreign with our names":
        save_file({"image": np.zeros((2, 8, 8, 3), np.uint8), "action": np.zeros((2, 2)), "reward": np.zeros(2)}, path)
    elif how == "lacks a tensor":
        save_file({"image": np.zeros((2, 8, 8, 3), np.uint8)}, path, open_episode(path)[1])
    elif how == "ragged":
        tensors = {"image": np.zeros((2, 8, 8, 3), np.uint8), "action": np.zeros((3, 2)), "reward": np.zeros(2)}
        save_file(tensors, path, open_episode(path)[1])
    elif how == "other protocol":
        write(path, protocol={"horizon": 9})
    elif how == "other domain":
        write(path, domain="metaworld")
    elif how == "other image size":
        write(path, size=10)
    elif how == "other action size":
        _, header = open_episode(path)
        tensors = {"image": np.zeros((2, 8, 8, 3), np.uint8), "action": np.zeros((2, 3), "f4")}
        save_file(tensors | {"reward": np.zeros(2, "f4")}, path, header)
    elif how == "NaN":
        handle, header = open_episode(path)
        action = handle.get_tensor("action")
        action[2] = np.nan
        tensors = {k: handle.get_tensor(k) for k in ("image", "reward")}
        save_file({**tensors, "action": action}, path.with_name("new"), header)
        path.with_name("new").rename(path)


KINDS = ["cut short", "cut in its header", "empty", "foreign", "foreign with our names", "lacks a tensor", "ragged"]
KINDS += ["other protocol", "other domain", "other image size", "other action size", "NaN"]


@pytest.mark.parametrize("how", KINDS)
def test_bad_episode_is_refused_by_name(how, write, toy, tmp_path):
    """A damaged or foreign file among good ones ends a stage with one sentence that names the file."""
    for k in range(3):
        write(tmp_path / f"{k:06d}.safetensors", seed=k)
    damage(tmp_path / "000001.safetensors", how, write)
    assert "000001.safetensors" in refused(read, tmp_path / "000001.safetensors", toy)


@pytest.mark.parametrize("bad", ["action", "range", "image", "length"])
def test_no_bad_episode_is_written(bad, write, toy, tmp_path):
    """A recorder that hands over NaN, actions out of range or other shapes writes nothing."""
    image, action, reward = np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 2), "f4"), np.zeros(3, "f4")
    if bad in ("action", "range"):
        action[1] = np.nan if bad == "action" else 1.5
    image, reward = (image[..., :2] if bad == "image" else image), (reward[:2] if bad == "length" else reward)
    about = dict(domain="toy", task="red", instruction="push", source="expert", seed=7, protocol=toy.PROTOCOL)
    with pytest.raises(ValueError):
        write_episode(tmp_path / "000000.safetensors", image, action, reward, **about)
    assert not files(tmp_path)


def test_full_disk_keeps_the_old_file(write, tmp_path, monkeypatch):
    """No space left in the middle of writing: one sentence, the old file intact, nothing half-written left."""
    path = tmp_path / "000000.safetensors"
    write(path)
    before = files(tmp_path)

    def full(tensors, tmp, header):
        tmp.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data, "save_file", full)
    assert "no space left" in refused(write, path, 9) and str(path) in refused(write, path, 9)
    assert files(tmp_path) == before


def test_really_full_disk(write, tmp_path):
    """The same on a file system that is really full (where this user may make one)."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    try:
        write(tmp_path / "000000.safetensors")
        before = files(tmp_path)
        assert "no space left" in refused(write, tmp_path / "000000.safetensors", 2000)
        assert files(tmp_path) == before
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_demonstrations_are_labelled_with_the_expert_s_own_action(toy, tmp_path, monkeypatch):
    """D_e holds what the expert would do; what is executed is that and noise, but for the gripper (last)."""
    monkeypatch.setattr(stage0_sft, "load_domain", lambda name: toy)
    monkeypatch.setattr(stage0_sft.record, "__dict__", {})
    for k in range(5):
        stage0_sft.record(("toy", "red", 32, 0.2, 0.0, tmp_path, k))
    k = attempts(tmp_path)[0]
    handle, _ = open_episode(tmp_path / f"{k:06d}.safetensors")
    env, rng = toy.make("red", 32), np.random.default_rng([EXPERT_SEED + k, 1])
    obs, _ = env.reset(seed=EXPERT_SEED + k)
    for image, action in zip(handle.get_tensor("image"), handle.get_tensor("action")):
        assert np.array_equal(image, obs) and np.array_equal(action, toy.expert(env))
        obs = env.step((action + [rng.normal(0, 0.2), 0]).clip(-1, 1).astype(np.float32))[0]


def test_tasks_are_drawn_equally_often(write, toy, tmp_path):
    """A task of long episodes counts no more than one of short ones, and a weight counts as it says."""
    for task, T, n in (("short", 2, 1), ("long", 50, 3), ("heavy", 10, 2)):
        for k in range(n):
            write(tmp_path / task / f"{k:06d}.safetensors", T, instruction=task)
    episodes = Episodes({tmp_path / "short": 1.0, tmp_path / "long": 1.0, tmp_path / "heavy": 2.0}, toy, 8)
    _, sentences, _ = episodes.batch(np.random.default_rng(0), 40_000)
    share = {task: sentences.count(task) / 40_000 for task in ("short", "long", "heavy")}
    assert share == pytest.approx({"short": 0.25, "long": 0.25, "heavy": 0.5}, abs=0.015)


def test_minari_s_kitchen_episodes_become_demonstrations(tmp_path, monkeypatch):
    """An episode of the stock kitchen that does two tasks, written by Minari: both are found and cut apart, and the
    relabelled actions, played from where each begins, do the task again."""
    from domains import kitchen  # isort: skip  first, for it chooses how MuJoCo draws
    import gymnasium as gym
    import gymnasium_robotics
    import minari
    import mujoco
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    monkeypatch.setattr(kitchen, "SHIFTS", dict.fromkeys(kitchen.SHIFTS, (0, 0, 0)))
    monkeypatch.setattr(kitchen, "ARM_SHIFT", 0.0)
    gym.register_envs(gymnasium_robotics)
    stock = gym.make("FrankaKitchen-v1", tasks_to_complete=["slide cabinet", "light switch"], object_noise_ratio=0.0,
                     robot_noise_ratio=0.0, terminate_on_tasks_completed=False, max_episode_steps=400)  # fmt: skip
    seen = [stock.reset(seed=0)[0]]
    native, theirs = [], stock.unwrapped.robot_env
    for task in ("slide-door-open", "light-on"):  # our expert, its eyes on the stock environment
        ours = kitchen.make(task, 16)
        ours.reset(seed=0)

        def look(ours=ours):
            ours.data.qpos[:], ours.data.qvel[:] = theirs.data.qpos, theirs.data.qvel
            mujoco.mj_forward(ours.model, ours.data)
            q = theirs.data.qpos[ours.address]
            return q * np.sign(ours.task.success) >= abs(ours.task.success)

        while not look():
            action = kitchen.expert(ours).astype(float)
            for _ in range(kitchen.ACTION_REPEAT):
                look()
                native.append(ours.joints(action))
                seen.append(stock.step(native[-1])[0])
        ours.close()
    n = len(native)
    minari.create_dataset_from_buffers(
        "test/kitchen-v0",
        [
            EpisodeBuffer(
                id=0, observations={k: np.stack([x[k] for x in seen]) for k in ("observation",)},
                actions=np.stack(native), rewards=np.zeros(n), terminations=np.zeros(n, bool),
                truncations=np.eye(n, dtype=bool)[-1],
            )
        ],
        observation_space=gym.spaces.Dict({"observation": stock.observation_space["observation"]}),
        action_space=stock.action_space,
    )  # fmt: skip
    stock.close()

    data.import_episodes("test/kitchen-v0", "minari", "kitchen", str(tmp_path / "D_e"), image_size=32)
    for task in ("slide-door-open", "light-on"):
        (k,) = attempts(tmp_path / "D_e/kitchen" / task)
        handle, header = open_episode(tmp_path / f"D_e/kitchen/{task}/{k:06d}.safetensors")
        assert header["task"] == task and header["success"] == "1" and header["source"] == "expert"
        assert handle.get_slice("image").get_shape()[1:] == [32, 32, 3] and handle.get_tensor("reward").sum() == 1
    env = kitchen.make("slide-door-open", 16)  # the first task begins where our episodes do: replay it
    env.reset(seed=0)
    (k,) = attempts(tmp_path / "D_e/kitchen/slide-door-open")
    actions = open_episode(tmp_path / f"D_e/kitchen/slide-door-open/{k:06d}.safetensors")[0].get_tensor("action")
    assert any(env.step(a)[2] for a in [*actions, *[actions[-1]] * 5])
    env.close()


def content(folder):
    """{path: (header, image, action, reward)} of every episode under a folder."""
    opened = {p.relative_to(folder): open_episode(p) for p in sorted(folder.rglob("*.safetensors"))}
    names = ("image", "action", "reward")
    return {p: (header, *(f.get_tensor(n).tobytes() for n in names)) for p, (f, header) in opened.items()}


def test_lerobot_gives_back_what_it_was_given(tmp_path):
    """Meta-World's demonstrations, exported and imported: the same files with the same bytes in them, header and all,
    also where two tasks or D_e and D_rl have an episode of the same number. Given again, nothing is replaced."""
    pytest.importorskip("lerobot")  # it has a venv of its own: see the README
    from domains import metaworld

    for task, k in (("drawer-open", 0), ("button-press", 0)):
        env, (images, actions, rewards), ended = metaworld.make(task, 32), ([], [], []), False
        obs, _ = env.reset(seed=k)
        while not ended:
            images.append(obs)
            actions.append(metaworld.expert(env))
            obs, reward, term, trunc, _ = env.step(actions[-1])
            rewards.append(reward)
            ended = term or trunc
        env.close()
        about = dict(
            domain="metaworld", task=task, instruction=metaworld.INSTRUCTIONS[task], protocol=metaworld.PROTOCOL
        )
        for source, seed in (("expert", k), ("online", data.ONLINE_SEED + k)):
            path = tmp_path / f"runs/{source}/{task}/{k:06d}.safetensors"
            write_episode(path, images, actions, rewards, source=source, seed=seed, made_by={"torch": "0"}, **about)
    (tmp_path / "runs/expert/drawer-open/.tokens-0").mkdir()
    (tmp_path / "runs/expert/drawer-open/.tokens-0/000000.safetensors").write_bytes(b"not an episode")
    data.export_episodes(str(tmp_path / "set"), str(tmp_path / "runs"))
    shutil.rmtree(tmp_path / "runs/expert/drawer-open/.tokens-0")
    data.import_episodes(str(tmp_path / "set"), "lerobot", data=str(tmp_path / "again"))
    want = content(tmp_path / "runs")
    assert len(want) == 4 and content(tmp_path / "again") == want
    assert "there already" in refused(data.export_episodes, str(tmp_path / "set"), str(tmp_path / "runs"))

    before = files(tmp_path / "again")
    data.import_episodes(str(tmp_path / "set"), "lerobot", data=str(tmp_path / "again"))
    assert files(tmp_path / "again") == before
    about = json.loads((tmp_path / "set" / data.ABOUT).read_text())
    about[0]["path"] = "../../stolen.safetensors"
    (tmp_path / "set" / data.ABOUT).write_text(json.dumps(about))
    assert "do not trust" in refused(data.import_episodes, str(tmp_path / "set"), "lerobot", "", str(tmp_path / "x"))


def test_foreign_lerobot_data_become_demonstrations(toy, tmp_path):
    """A data set that LeRobot's own class wrote, with two cameras of another shape: what is not said is asked for, and
    the SFT stages draw from the result."""
    pytest.importorskip("lerobot")
    rng, T = np.random.default_rng(0), 6
    for name, size in (("good", 1.0), ("wild", 3.0)):
        cameras = {
            f"observation.images.{c}": dict(dtype="image", shape=(24, 32, 3), names=["h", "w", "c"]) for c in "ab"
        }
        features = {**cameras, "act": dict(dtype="float32", shape=(2,), names=None)}
        made = data.lerobot_dataset().create(name, 10, features, root=tmp_path / name, use_videos=False)
        for e in range(2):
            for _ in range(T):
                frame = {c: np.full((24, 32, 3), 100 * e + 50, np.uint8) for c in cameras}
                frame["observation.images.a"][:, :4] = frame["observation.images.a"][:, -4:] = 255  # beside the square
                made.add_frame({**frame, "act": (size * rng.uniform(-1, 1, 2)).astype("f4"), "task": f"push {e}"})
            made.save_episode()
        made.finalize()

    def give(name, **more):
        return refused(
            lambda: data.import_episodes(str(tmp_path / name), "lerobot", data=str(tmp_path / "D_e"), **more)
        )

    about = dict(domain="toy", task="red", image_size=8, image_key="observation.images.a", action_key="act")
    assert "--task" in give("good", **{**about, "task": ""})
    assert "observation.images.b" in give("good", **{**about, "image_key": ""})
    assert "--action-key" in give("good", **{**about, "action_key": "action"})
    assert "[-1, 1]" in give("wild", **about)
    assert "no LeRobot data set" in give("nothing", **about)
    assert not (tmp_path / "D_e").exists()
    data.import_episodes(str(tmp_path / "good"), "lerobot", data=str(tmp_path / "D_e"), **about)
    episodes = Episodes({tmp_path / "D_e/toy/red": 1.0}, toy, 8)
    frames, sentences, actions = episodes.batch(np.random.default_rng(0), 50)
    assert len(episodes) == 2 * T and set(sentences) == {"push 0", "push 1"} and actions.shape == (50, 2)
    assert all((frame == 100 * int(sentence[-1]) + 50).all() for frame, sentence in zip(frames, sentences))
    header = open_episode(episodes.paths[0])[1]
    assert (header["success"], header["protocol"], header["source"]) == ("1", "null", "expert")
    assert data.IMPORT_SEED <= int(header["seed"]) < data.ONLINE_SEED


def test_without_lerobot_its_commands_say_so(tmp_path, monkeypatch):
    """Where lerobot is not installed: one sentence, and nothing is written."""
    monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", None)
    for command in (
        lambda: data.import_episodes("a/b", "lerobot"),
        lambda: data.export_episodes(str(tmp_path / "x"), "D_e"),
    ):
        assert "venv of its own" in refused(command)
    assert not files(tmp_path)
