"""The simulated domains: their interface, images and episodes that the seed alone decides, and errors of libraries."""

import os
import subprocess
import sys
import threading

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, refused

from common import opengl, pins
from common.episode_file import EVAL_SEED, EXPERT_SEED
from common.rates import all_tasks
from domains import kitchen, load_domain, metaworld
from evaluate import evaluate
from model import VLA

ROLLOUT = """
import hashlib, importlib, sys
import numpy as np
domain = importlib.import_module(f"domains.{sys.argv[1]}")
env = domain.make(sys.argv[2], 64)
last_action = np.linspace(-0.5, 1, env.action_space.shape[0], dtype=np.float32)
for seed in map(int, sys.argv[3:]):
    image, _ = env.reset(seed=seed)
    digest = hashlib.sha256(image)
    for t in range(8):
        action = domain.expert(env) if t < 5 else last_action
        image, *_ = env.step(action)
        digest.update(image)
        digest.update(action)
    print(digest.hexdigest())
"""
BOTH = pytest.mark.parametrize(
    "domain, task", [(metaworld, "drawer-open"), (kitchen, "slide-door-open")]
)


def rollout_digests(domain, task, *seeds, first="import torch"):
    """Return a digest of the images and actions from each seed, in a new process.

    The process leaves the environment open, and must end without complaint.
    """
    command = [sys.executable, "-c", first + ROLLOUT, domain, task, *map(str, seeds)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout.splitlines()


def close_to(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean() < 0.5


@pytest.mark.parametrize(
    "domain, counts, action_dim", [(metaworld, [25, 5, 10], 4), (kitchen, [5, 2, 3], 7)]
)
def test_a_domain_offers_what_the_stages_use(domain, counts, action_dim):
    """Three disjoint splits as in the paper, and an instruction, an environment and the spaces for every task."""
    names = all_tasks(domain)
    assert [len(domain.EXPERT_TASKS), len(domain.RL_TASKS), len(domain.UNSEEN_TASKS)] == counts
    assert len(set(names)) == sum(counts)
    assert set(names) == set(domain.INSTRUCTIONS)
    assert all(isinstance(s, str) and s for s in domain.INSTRUCTIONS.values())
    env = domain.make(domain.RL_TASKS[0], 48)
    assert env.observation_space == gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
    image, info = env.reset(seed=3)
    assert image in env.observation_space
    assert info == {}
    action = domain.expert(env)
    assert action in env.action_space
    image, reward, terminated, truncated, _ = env.step(action)
    assert image in env.observation_space
    assert (reward, terminated, truncated) == (0.0, False, False)
    env.close()


@pytest.mark.parametrize(
    "domain, task",
    [
        ("metaworld", "drawer-open"),
        ("metaworld", "button-press-new"),
        ("kitchen", "left-door-open-new"),
    ],
)
def test_a_seed_decides_an_episode(domain, task):
    """The same seed leads to the same images and trajectory in another process, whatever came before."""
    five, six, five_again = rollout_digests(domain, task, 5, 6, 5)
    assert five == five_again != six
    assert rollout_digests(domain, task, 6, 5, first="") == [six, five]


@pytest.mark.parametrize(
    "domain, task",
    [
        (metaworld, "reach"),
        (metaworld, "drawer-open"),
        (metaworld, "window-close-new"),
        (kitchen, "knob-on"),
        (kitchen, "left-door-open-new"),
    ],
)
def test_expert_solves_the_task(domain, task):
    """The scripted expert succeeds within the horizon: reward 1 and terminated at the last step only.

    Its actions, replayed from the same seed, succeed too.
    """
    env = domain.make(task, 32)
    solved = 0
    for seed in range(EXPERT_SEED, EXPERT_SEED + 4):
        env.reset(seed=seed)
        actions, rewards = [], []
        terminated = truncated = False
        while not (terminated or truncated):
            actions.append(domain.expert(env))
            _, reward, terminated, truncated, _ = env.step(actions[-1])
            rewards.append(reward)
        assert not any(rewards[:-1])
        assert (rewards[-1] == 1.0) == terminated
        assert len(rewards) <= domain.HORIZON
        solved += terminated
        if seed == EXPERT_SEED:
            env.reset(seed=seed)
            assert [env.step(action)[1] for action in actions] == rewards
    env.close()
    assert solved >= 3


@BOTH
def test_an_idle_episode_times_out(domain, task):
    """Without success an episode is truncated at the horizon and never terminated, with reward 0 throughout."""
    env = domain.make(task, 32)
    env.reset(seed=0)
    steps = [env.step(np.zeros(env.action_space.shape, np.float32)) for _ in range(domain.HORIZON)]
    env.close()
    assert [s[3] for s in steps] == [False] * (domain.HORIZON - 1) + [True]
    assert not any(s[2] or s[1] for s in steps)


def test_the_kitchen_s_zero_action_holds_the_end_effector_still():
    """FrankaKitchen-v1's own zero action lets the arm sink 20 cm in 2 s. Here it stays within 2 cm for 19 s."""
    env = kitchen.make("light-on", 32)
    env.reset(seed=0)
    before = env.end_effector_pose()[0]
    for _ in range(kitchen.HORIZON):
        env.step(np.zeros(7))
    assert np.linalg.norm(env.end_effector_pose()[0] - before) < 0.02
    env.close()


@pytest.mark.parametrize("task", kitchen.INSTRUCTIONS)
def test_a_nudge_is_not_a_success_in_the_kitchen(task):
    """A joint within the stock environment's 0.3 of its goal is not yet a success. At the goal it is."""
    env = kitchen.make(task, 32)
    env.reset(seed=0)
    for share, done in ((0.6, False), (1.02, True)):
        env.data.qpos[env.address] = share * env.skill.success
        assert env.step(np.zeros(7))[2] is done
    env.close()


def test_the_kitchen_s_new_tasks_look_new():
    """From the same seed, colour and position visibly differ from the original task's."""
    for task, original in (
        ("slide-door-open-red", "slide-door-open"),
        ("left-door-open-new", "left-door-open"),
    ):
        new = kitchen.make(task, 64)
        old = kitchen.make(original, 64)
        difference = np.abs(new.reset(seed=0)[0].astype(int) - old.reset(seed=0)[0]).max(axis=-1)
        assert (difference[:32] > 40).mean() > 0.05  # the upper half shows the kitchen
        shift = new.data.site_xpos[new.site] - old.data.site_xpos[old.site]
        assert np.linalg.norm(shift) > 0.05
        new.close()
        old.close()


def test_environments_of_one_process_do_not_disturb_each_other():
    """An environment renders the same image alone, next to another domain's, reopened, and in another thread.

    Under gymnasium's renderer, the kitchen and Meta-World corrupt each other's images.
    """
    first = metaworld.make("drawer-open", 64)
    alone = first.reset(seed=1)[0]
    second = kitchen.make("left-door-open-new", 64)
    other = second.reset(seed=1)[0]
    assert close_to(first.reset(seed=1)[0], alone)
    assert close_to(second.reset(seed=1)[0], other)
    first.close()
    assert close_to(second.reset(seed=1)[0], other)
    assert close_to(first.reset(seed=1)[0], alone)
    in_a_thread = []

    def render():
        env = metaworld.make("drawer-open", 64)
        in_a_thread.append(env.reset(seed=1)[0])
        env.close()

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert close_to(in_a_thread[0], alone)
    assert close_to(first.reset(seed=1)[0], alone)
    first.close()
    second.close()
    third = metaworld.make("drawer-open", 64)
    assert close_to(third.reset(seed=1)[0], alone)
    assert not close_to(alone, other)
    third.close()


def test_evaluation_starts_where_training_does_not():
    """Evaluation and demonstrations share no initial state."""
    env = metaworld.make("drawer-open", 64)
    images = [
        env.reset(seed=base + k)[0].tobytes()
        for base in (EXPERT_SEED, EVAL_SEED)
        for k in range(10)
    ]
    env.close()
    assert len(set(images)) == 20


def test_unknown_names_are_refused_with_the_known_ones(checkpoint, bead):
    """An error about a mistyped task or domain lists the known ones."""
    error = refused(metaworld.make, "drawer-opn")
    assert "'drawer-opn'" in error and "drawer-open-new" in error
    error = refused(evaluate, VLA.load(checkpoint), bead, ["purple"], 1)
    assert "'purple'" in error and "blue" in error
    error = refused(load_domain, "metawrld")
    assert "'metawrld'" in error and "metaworld" in error and "_" not in error


@pytest.mark.parametrize("domain, task", [(metaworld, "reach"), (kitchen, "light-on")])
def test_an_impossible_action_is_not_executed(domain, task):
    """NaN, infinity or a wrong length never reach the physics."""
    env = domain.make(task, 32)
    env.reset(seed=0)
    possible = np.zeros(env.action_space.shape, np.float32)
    for action in (
        possible[1:],
        possible + [np.nan, *possible[1:]],
        possible + [*possible[1:], np.inf],
    ):
        with pytest.raises(ValueError):
            env.step(action)
    env.close()


@pytest.mark.parametrize(
    "task", ["hammer", "coffee-push", "sweep", "plate-slide", "reach", "drawer-open-new"]
)
def test_a_step_of_meta_world_is_its_own(task):
    """Without rewards and rotations, states, success and the expert's actions are those of Meta-World's `step`."""
    env = metaworld.make(task, 16)
    env.reset(seed=3)
    stock = metaworld.make(task, 16)
    stock.reset(seed=3)
    for _ in range(40):
        action = metaworld.expert(env)
        assert np.array_equal(action, metaworld.expert(stock))
        *_, success, _, _ = env.step(action)
        for _ in range(metaworld.ACTION_REPEAT):
            stock.state, _, _, _, info = stock.sim.step(action)
            if info["success"]:
                break
        assert np.array_equal(env.sim.data.qpos, stock.sim.data.qpos)
        assert np.array_equal(env.sim.data.qvel, stock.sim.data.qvel)
        assert success == bool(info["success"])
        if success:
            break
    env.close()
    stock.close()


def test_coarse_drawing_is_seen_by_opengl_alone():
    """Thinned hulls change an image by less than 2 of 255 on average, and leave physics its own hulls."""
    env = metaworld.make("drawer-open", 64)
    hulls = env.sim.model.mesh_graph.copy()
    coarse = env.reset(seed=0)[0].astype(int)
    assert np.array_equal(env.sim.model.mesh_graph, hulls)
    env.renderer.hull_cell = 0.0
    env.renderer.close()
    difference = np.abs(env.get_image(64) - coarse)
    assert 0 < difference.mean() < 2
    env.close()


# ----------------------------------------------------------------------------------------------------------------------
# Surprises of the libraries


def first_success(domain, env, seed=0):
    """Let the expert act until the episode ends. Return whether it succeeded."""
    env.reset(seed=seed)
    terminated = truncated = False
    while not (terminated or truncated):
        _, _, terminated, truncated, _ = env.step(domain.expert(env))
    return terminated


@pytest.mark.parametrize(
    "domain, task, stays",
    [
        (metaworld, "door-open", False),
        (metaworld, "drawer-open", True),
        (kitchen, "slide-door-open", True),
    ],
)
def test_an_episode_can_go_on_after_its_end(domain, task, stays):
    """After success, and after the horizon, reward and info tell whether the task is solved now (--hold).

    Meta-World's expert of door-open passes through success and loses it. A reset starts an ordinary episode.
    """
    env = domain.make(task, 32)
    first_length = None
    for _ in range(2):
        assert first_success(domain, env)
        first_length = first_length or env.env_steps
        assert env.env_steps == first_length
        held = []
        for _ in range(20):
            image, reward, terminated, _, info = env.step(domain.expert(env))
            assert image in env.observation_space
            assert reward == float(terminated) == float(info["success"])
            held.append(info["success"])
        assert held[-1] is stays
    env.close()


@BOTH
def test_stepping_has_no_end(domain, task):
    """Stepping is possible far beyond the horizon: Meta-World itself refuses its 501st step."""
    env = domain.make(task, 16)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    for _ in range(4 * domain.HORIZON):
        _, _, terminated, truncated, _ = env.step(action)
    env.close()
    assert truncated and not terminated


@BOTH
def test_success_is_read_after_all_physics_steps_once_it_has_been_reached(domain, task):
    """The step that first succeeds ends at once. Later steps run all their physics, and may lose success."""
    env = domain.make(task, 16)
    assert first_success(domain, env)
    before = env.sim.data.time
    env.step(np.zeros(env.action_space.shape, np.float32))
    full = env.sim.data.time - before
    env.reset(seed=1)
    before = env.sim.data.time
    env.step(np.zeros(env.action_space.shape, np.float32))
    assert full == pytest.approx(env.sim.data.time - before)
    env.close()


@pytest.mark.parametrize(
    "domain, task",
    [(metaworld, "door-open"), (metaworld, "door-close"), (kitchen, "slide-door-open")],
)
def test_nothing_recorded_shares_memory(domain, task):
    """Images and actions of different steps are separate arrays, and the expert leaves the environment as it is.

    Meta-World's experts of door-open and door-close change the observation that they get.
    """
    env = domain.make(task, 32)
    image, _ = env.reset(seed=0)
    recorded = [image]
    copies = [image.copy()]
    for _ in range(6):
        qpos = env.sim.data.qpos.copy()
        state = None if domain is kitchen else env.state.copy()
        action = domain.expert(env)
        assert np.array_equal(action, domain.expert(env))
        assert np.array_equal(qpos, env.sim.data.qpos)
        assert state is None or np.array_equal(state, env.state)
        before = action.copy()
        image, *_ = env.step(action)
        assert np.array_equal(before, action)
        recorded += [action, image]
        copies += [action.copy(), image.copy()]
    live = [env.sim.data.qpos, env.sim.data.qvel] + ([] if domain is kitchen else [env.state])
    for i, array in enumerate(recorded):
        assert np.array_equal(array, copies[i])
        assert not any(np.shares_memory(array, other) for other in recorded[i + 1 :] + live)
    env.close()


def test_another_version_than_the_pinned_one_is_refused(monkeypatch):
    """load_domain compares the installed packages with requirements.txt, and names leftovers of another version."""
    versions = {"mujoco": "4.0.0"}
    installed = pins.installed_version
    monkeypatch.setattr(
        pins, "installed_version", lambda package: versions.get(package) or installed(package)
    )
    error = refused(load_domain, "metaworld")
    assert (
        "mujoco 4.0.0" in error
        and f"pins {pins.pinned_versions()['mujoco']}" in error
        and "pip install" in error
    )
    versions.clear()
    versions["mujoco-core"] = "4.0.0"  # mujoco 3.3.0 installed over 4.0.0
    error = refused(load_domain, "kitchen")
    assert "mujoco-core 4.0.0" in error and "pip uninstall" in error and "OpenGL" not in error
    versions.clear()
    versions["metaworld"] = "3.0.0"
    assert "metaworld 3.0.0" in refused(load_domain, "metaworld")
    assert load_domain("kitchen") is kitchen  # it does not use Meta-World


def test_an_error_while_importing_names_its_cause(monkeypatch):
    """A missing package or a wrong version is one sentence. A domain's own errors pass unchanged."""

    def failing_import(error):
        with opengl.explain_import_errors():
            raise error

    missing = ModuleNotFoundError("No module named 'gymnasium_robotics'", name="gymnasium_robotics")
    assert "gymnasium-robotics is not installed" in refused(failing_import, missing)
    with pytest.raises(KeyError):
        failing_import(KeyError("a typo in the domain"))
    monkeypatch.setattr(pins, "installed_version", lambda package: "9.9.9")
    assert "mujoco 9.9.9" in refused(
        failing_import, AttributeError("module 'mujoco' has no attribute 'x'")
    )


RENDER = """
import sys
from common.errors import UserError
from domains import load_domain
try:
    load_domain("metaworld").make("reach", 32).reset(seed=0)
except UserError as error:
    sys.exit(f"error: {error}")
"""
EGL_DOES_NOT_WORK = {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere.json"}


@pytest.mark.skipif(not opengl.LINUX, reason="back ends of Linux")
@pytest.mark.parametrize(
    "variables, cause, remedy",
    [
        ({"MUJOCO_GL": "glfw"}, "needs a screen", "unset MUJOCO_GL"),
        ({"MUJOCO_GL": "vulkan"}, "MUJOCO_GL=vulkan is not a back end", "unset MUJOCO_GL"),
        ({"MUJOCO_GL": "disable"}, "turns rendering off", "unset MUJOCO_GL"),
        (
            {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "glx"},
            "PYOPENGL_PLATFORM=glx",
            "unset PYOPENGL_PLATFORM",
        ),
        (
            {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"},
            "MUJOCO_EGL_DEVICE_ID=99",
            "unset MUJOCO_EGL_DEVICE_ID",
        ),
        (
            {"MUJOCO_GL": "egl"} | EGL_DOES_NOT_WORK,
            "/nowhere.json",
            "unset __EGL_VENDOR_LIBRARY_FILENAMES",
        ),
    ],
    ids=["screen", "unknown", "disabled", "platform", "device", "driver"],
)
def test_a_wrong_opengl_variable_is_named(variables, cause, remedy):
    """A user reads one sentence that names the variable and how to undo it. It does not advise to install anything."""
    names = {"DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM", *opengl.DRIVER_VARIABLES}
    env = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", RENDER]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env | variables)
    *_, error = result.stderr.strip().splitlines()
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert error.startswith("error: MuJoCo cannot render: ")
    assert cause in error and remedy in error and "apt-get" not in error


def test_missing_opengl_libraries_are_named(monkeypatch):
    """Where no variable is wrong, the sentence names the package to install."""
    for name in opengl.DRIVER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(opengl, "LINUX", True)
    monkeypatch.setattr(opengl, "PYOPENGL_PLATFORM", "")
    monkeypatch.setattr(opengl, "_can_load", lambda library: False)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")  # set, but not the cause
    for backend, package in (("egl", "libegl1"), ("osmesa", "libosmesa6")):
        monkeypatch.setenv("MUJOCO_GL", backend)
        error = str(
            opengl.opengl_error(
                AttributeError("'NoneType' object has no attribute 'eglQueryString'")
            )
        )
        assert package in error and "is missing" in error and "\n" not in error
