"""Episode files are complete or refused, and every task is drawn equally often."""

import dataclasses
import errno
import os
import shutil
import subprocess

import numpy as np
import pytest
from conftest import episode_info, files, refused
from safetensors.numpy import save_file

from benchmarks._episodes import write_noise_episode
from common import demonstrations, episode_file
from common.demonstrations import Recording, check_present, record_attempt
from common.episode_file import (
    EXPERT_SEED,
    episode_files,
    episode_folders,
    episode_ids,
    open_episode,
    write_episode,
)
from data import EpisodeDataset
from domains import metaworld


def write(path, T=5, size=8, seed=0, **changes):
    """Write an episode of noise and return its images and actions."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (T, size, size, 3), np.uint8)
    action = rng.uniform(-1, 1, (T, 2)).astype(np.float32)
    write_episode(
        path, image, action, np.eye(T, dtype=np.float32)[-1], episode_info(**{"seed": 7, **changes})
    )
    return image, action


def read(path, bead, size=8):
    """Return what the SFT stages draw from the folder of an episode."""
    return EpisodeDataset({path.parent: 1.0}, bead, size)


def test_an_episode_is_read_as_it_was_written(bead, tmp_path):
    """Frame by frame, with label, instruction and origin. Files with other names are ignored."""
    path = tmp_path / "000003.safetensors"
    image, action = write(path, instruction="push", origin="abc")
    handle, header = open_episode(path)
    assert np.array_equal(handle.get_tensor("image"), image) and np.array_equal(
        handle.get_tensor("action"), action
    )
    assert handle.get_tensor("reward").tolist() == [0, 0, 0, 0, 1]
    assert (header["task"], header["source"], header["success"], header["seed"]) == (
        "red",
        "expert",
        "1",
        "7",
    )
    assert header["origin"] == "abc"
    shutil.copy(path, tmp_path / "000003 copy.safetensors")
    assert episode_ids(tmp_path) == [3]
    frames, instructions, labels = read(path, bead).batch(np.random.default_rng(0), 64)
    rows = [np.flatnonzero((image == frame).all((1, 2, 3)))[0] for frame in frames]
    assert (
        set(rows) == set(range(5))
        and np.array_equal(labels, action[rows])
        and set(instructions) == {"push"}
    )


def test_folders_of_episodes_are_found_through_links(tmp_path):
    """One walk finds every folder with episodes, also behind a link, each once; hidden ones are left out."""
    write(tmp_path / "D_e/red/000000.safetensors")
    write(tmp_path / "D_e/red/.tokens-1/000000.safetensors")
    write(tmp_path / "other/green/000000.safetensors")
    (tmp_path / "D_e/green").symlink_to(tmp_path / "other/green")
    (tmp_path / "D_e/around").symlink_to(tmp_path / "D_e")
    (tmp_path / "D_e/empty").mkdir()
    found = episode_folders(tmp_path / "D_e")
    assert [folder.name for folder in found] == ["green", "red"]
    assert [len(episode_files(folder)) for folder in found] == [1, 1]
    assert episode_folders(tmp_path / "D_e/green") == [tmp_path / "D_e/green"]
    assert episode_folders(tmp_path / "nowhere") == []


def rewrite(path, lacking="", spelled=None, **tensors):
    """Write an episode file again with other tensors, without an entry of the header, or with others."""
    handle, header = open_episode(path)
    header = {k: v for k, v in header.items() if k != lacking} | (spelled or {})
    kept = {name: handle.get_tensor(name) for name in ("image", "action", "reward")}
    save_file({**kept, **tensors}, path.with_name("new"), header)
    path.with_name("new").rename(path)


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "truncated in its header":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        save_file({"x": np.zeros(3, "f4")}, path)
    elif how == "foreign with our names":
        save_file(
            {
                "image": np.zeros((2, 8, 8, 3), np.uint8),
                "action": np.zeros((2, 2)),
                "reward": np.zeros(2),
            },
            path,
        )
    elif how == "lacks a tensor":
        save_file({"image": np.zeros((2, 8, 8, 3), np.uint8)}, path, open_episode(path)[1])
    elif how == "lengths that differ":
        rewrite(path, action=np.zeros((3, 2), np.float32))
    elif how == "other protocol":
        write(path, protocol={"horizon": 9})
    elif how == "other domain":
        write(path, domain="metaworld")
    elif how == "other image size":
        write(path, size=10)
    elif how == "other action size":
        rewrite(path, action=np.zeros((5, 3), np.float32))
    elif how == "no success":
        rewrite(path, spelled={"success": "0"})
    elif how == "no instruction":
        write(path, instruction=" ")
    elif how == "lacks an entry":
        rewrite(path, lacking="instruction")
    elif how == "float images":
        rewrite(path, image=np.zeros((5, 8, 8, 3), np.float32))
    elif how == "beyond the range":
        rewrite(path, action=np.full((5, 2), 1.5, np.float32))
    elif how == "NaN":
        rewrite(path, action=np.full((5, 2), np.nan, np.float32))


KINDS = [
    "truncated",
    "truncated in its header",
    "empty",
    "foreign",
    "foreign with our names",
    "lacks a tensor",
]
KINDS += [
    "lengths that differ",
    "other protocol",
    "other domain",
    "other image size",
    "other action size",
    "no success",
    "no instruction",
    "lacks an entry",
    "float images",
    "beyond the range",
    "NaN",
]


@pytest.mark.parametrize("how", KINDS)
def test_a_bad_episode_is_refused_by_name(how, bead, tmp_path):
    """A damaged or foreign file among good ones ends a stage with one sentence that names the file."""
    for k in range(3):
        write(tmp_path / f"{k:06d}.safetensors", seed=k)
    damage(tmp_path / "000001.safetensors", how)
    assert "000001.safetensors" in refused(read, tmp_path / "000001.safetensors", bead)


def test_an_episode_in_another_task_s_folder_is_refused(bead, tmp_path):
    """The folder's name decides how often its frames are drawn."""
    one, other = list(bead.INSTRUCTIONS)[:2]
    path = tmp_path / other / "000000.safetensors"
    path.parent.mkdir()
    write(path, task=one)
    sentence = refused(read, path, bead)
    assert str(path) in sentence and one in sentence


def test_a_protocol_is_compared_by_content(bead, tmp_path):
    """Spaces in its JSON make no other protocol. Files with fewer than six digits are not episodes."""
    path = tmp_path / "000000.safetensors"
    write(path)
    rewrite(path, spelled={"protocol": '{"horizon":8}'})
    shutil.copy(path, tmp_path / "7.safetensors")
    assert len(read(path, bead)) == 5 and episode_ids(tmp_path) == [0]


def test_an_episode_that_cannot_be_opened_is_not_to_be_deleted(tmp_path):
    """A folder of its name, and a link to a disk that is not mounted."""
    (tmp_path / "000000.safetensors").mkdir()
    (tmp_path / "000001.safetensors").symlink_to("/nowhere/x")
    for k, words in enumerate(("Is a directory", "/nowhere/x")):
        sentence = refused(open_episode, tmp_path / f"{k:06d}.safetensors")
        assert words in sentence and "delete" not in sentence


@pytest.mark.parametrize("bad", ["NaN", "range", "image", "length"])
def test_no_bad_episode_is_written(bad, tmp_path):
    """A recorder that passes NaN, actions out of range or other shapes writes nothing."""
    image = np.zeros((3, 8, 8, 3), np.uint8)
    action = np.zeros((3, 2), np.float32)
    reward = np.zeros(3, np.float32)
    if bad == "NaN":
        action[1] = np.nan
    elif bad == "range":
        action[1] = 1.5
    elif bad == "image":
        image = image[..., :2]
    else:
        reward = reward[:2]
    with pytest.raises(ValueError):
        write_episode(tmp_path / "000000.safetensors", image, action, reward, episode_info())
    assert not files(tmp_path)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    """No space left in the middle of writing: one sentence, the old file intact, nothing half-written left."""
    path = tmp_path / "000000.safetensors"
    write(path)
    before = files(tmp_path)

    def full(tensors, tmp, header):
        tmp.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(episode_file, "save_file", full)
    sentence = refused(write, path, 9)
    assert "no space left" in sentence and str(path) in sentence
    assert files(tmp_path) == before


def test_a_disk_that_is_really_full(tmp_path):
    """The same on a file system that is full, if this user may make one."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("may not mount a small file system")
    try:
        write(tmp_path / "000000.safetensors")
        before = files(tmp_path)
        assert "no space left" in refused(write, tmp_path / "000000.safetensors", 2000)
        assert files(tmp_path) == before
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def recording(bead, tmp_path, monkeypatch):
    """How the bead's demonstrations were recorded in tmp_path: five of the task red."""
    monkeypatch.setattr(demonstrations, "_env", {})
    recording = Recording(
        make=bead.make,
        expert=bead.expert,
        domain="bead",
        instructions=bead.INSTRUCTIONS,
        protocol=bead.PROTOCOL,
        image_size=32,
        action_noise_std=0.2,
        random_burst_prob=0.0,
        root=tmp_path,
    )
    for k in range(5):
        record_attempt(recording, "red", k)
    return recording


def test_flags_that_the_demonstrations_there_contradict_are_refused(recording, tmp_path):
    """More episodes than --demos, or others with another noise, would be trained on without a word."""
    demos = len(episode_files(tmp_path / "red"))
    check_present(recording, ["red"], demos, {"demos"})
    check_present(recording, ["red"], 0, {"demos"})
    check_present(recording, ["red"], 1, set())  # the domain's default
    sentence = refused(check_present, recording, ["red"], 1, {"demos"})
    assert f"red holds {demos} episodes, more than --demos 1" in sentence and "--data" in sentence
    clean = dataclasses.replace(recording, action_noise_std=0.0)
    check_present(clean, ["red"], demos, set())  # nothing is recorded, and nothing was asked
    for more, asked in ((0, {"action_noise_std"}), (1, set())):
        sentence = refused(check_present, clean, ["red"], demos + more, asked)
        assert "was recorded with action_noise_std 0.2, not 0.0" in sentence


def test_demonstrations_are_labelled_with_the_expert_s_own_action(recording, bead, tmp_path):
    """D_e holds the expert's action. The executed one has noise on all dimensions but the last, the gripper."""
    path = episode_files(tmp_path / "red")[0]
    k = int(path.stem)
    handle, _ = open_episode(path)
    env = bead.make("red", 32)
    rng = np.random.default_rng([EXPERT_SEED + k, 1])
    obs, _ = env.reset(seed=EXPERT_SEED + k)
    for image, action in zip(handle.get_tensor("image"), handle.get_tensor("action")):
        assert np.array_equal(image, obs) and np.array_equal(action, bead.expert(env))
        executed = (action + [rng.normal(0, 0.2), 0]).clip(-1, 1).astype(np.float32)
        obs = env.step(executed)[0]


def test_tasks_are_drawn_equally_often(bead, tmp_path):
    """A task with long episodes counts no more than one with short episodes; a weight counts in proportion."""
    for task, T, n in (("short", 2, 1), ("long", 50, 3), ("heavy", 10, 2)):
        for k in range(n):
            write(tmp_path / task / f"{k:06d}.safetensors", T, instruction=task)
    weights = {tmp_path / "short": 1.0, tmp_path / "long": 1.0, tmp_path / "heavy": 2.0}
    _, instructions, _ = EpisodeDataset(weights, bead, 8).batch(np.random.default_rng(0), 40_000)
    share = {task: instructions.count(task) / 40_000 for task in ("short", "long", "heavy")}
    assert share == pytest.approx({"short": 0.25, "long": 0.25, "heavy": 0.5}, abs=0.015)


def test_the_benchmarks_episodes_are_ones_that_sft_reads(tmp_path):
    """What benchmarks/ trains and loads passes the data set's checks."""
    write_noise_episode(tmp_path / "drawer-open/000000.safetensors", "drawer-open", length=7)
    assert len(EpisodeDataset({tmp_path / "drawer-open": 1.0}, metaworld, 64)) == 7
