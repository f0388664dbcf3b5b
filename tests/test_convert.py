"""Foreign data sets become demonstrations once, or are refused by name; export followed by import is lossless.

LeRobot needs a Python environment of its own. Where it is not installed, a stand-in has the part of its class that is
used here. In LeRobot's environment: python -m pytest --noconftest tests/test_convert.py
"""

import json
import multiprocessing
import resource
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.numpy import save_file

from common.episode_file import (
    IMPORT_SEED,
    ONLINE_SEED,
    EpisodeInfo,
    episode_files,
    episode_folders,
    open_episode,
    write_episode,
)
from common.errors import UserError
from tools import convert, foreign_episodes, lerobot_format, minari_format

CAMERAS = ("observation.images.a", "observation.images.b")


class StandIn:
    """What is used here of LeRobotDataset, version 3: frames in memory, saved with numpy."""

    def __init__(self, repo_id, root=None, video_backend=None):
        self.root = Path(root)
        about = json.loads((self.root / "meta/info.json").read_text())
        self.features = {name: {"shape": tuple(shape)} for name, shape in about["features"].items()}
        self.num_episodes = about["episodes"]
        self.columns = dict(np.load(self.root / "frames.npz"))
        cameras = [name for name, feature in self.features.items() if len(feature["shape"]) == 3]
        self.meta = SimpleNamespace(
            camera_keys=cameras, tasks=SimpleNamespace(index=about["tasks"])
        )
        self.hf_dataset = self

    @classmethod
    def create(cls, repo_id, fps, features, root, use_videos):
        self = cls.__new__(cls)
        self.root = Path(root)
        self.made = {name: tuple(feature["shape"]) for name, feature in features.items()}
        self.frames, self.tasks, self.episodes = [], [], 0
        return self

    def add_frame(self, frame):
        if frame["task"] not in self.tasks:
            self.tasks.append(frame["task"])
        row = {name: np.asarray(frame[name]) for name in self.made}
        assert {name: x.shape for name, x in row.items()} == self.made
        # The real class drops the dimension of what has one number.
        row = {name: x[0] if x.shape == (1,) else x for name, x in row.items()}
        self.frames.append(
            row | {"task_index": self.tasks.index(frame["task"]), "episode_index": self.episodes}
        )

    def save_episode(self):
        self.episodes += 1

    def finalize(self):
        (self.root / "meta").mkdir(parents=True)
        about = {"features": self.made, "tasks": self.tasks, "episodes": self.episodes}
        (self.root / "meta/info.json").write_text(json.dumps(about))
        np.savez(
            self.root / "frames.npz",
            **{k: np.stack([f[k] for f in self.frames]) for k in self.frames[0]},
        )

    def select_columns(self, names):
        return SimpleNamespace(with_format=lambda _: Columns(self.columns, names))

    def __getitem__(self, i):
        row = {name: torch.from_numpy(np.asarray(x[i])) for name, x in self.columns.items()}
        return row | {name: row[name].permute(2, 0, 1) / 255 for name in self.meta.camera_keys}


class Columns:
    def __init__(self, columns, names):
        self.columns = {name: columns[name] for name in names}

    def __getitem__(self, index):
        return self.columns


@pytest.fixture(autouse=True)
def lerobot(monkeypatch):
    """LeRobot itself where it is installed, else the stand-in."""
    if find_spec("lerobot") is None:
        module = ModuleType("lerobot.datasets.lerobot_dataset")
        module.LeRobotDataset = StandIn
        for name in ("lerobot", "lerobot.datasets"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(
            sys.modules, "datasets", SimpleNamespace(disable_progress_bars=lambda: None)
        )


class Dot(gym.Env):
    action_space = gym.spaces.Box(-1, 1, (2,))


@pytest.fixture(autouse=True)
def dot(monkeypatch):
    """A domain of two expert tasks, with actions of two dimensions."""
    domain = SimpleNamespace(
        NAME="dot", EXPERT_TASKS=["red", "green"], RL_TASKS=["blue"], make=lambda task, size: Dot()
    )
    domain.INSTRUCTIONS = {"red": "push red"}
    domain.PROTOCOL = {"horizon": 9}
    for module in (foreign_episodes, minari_format):
        monkeypatch.setattr(module, "load_domain", lambda name: domain)
    return domain


def make_set(root, texts=("push it", "push it"), seed=0, A=2, size=1.0, cameras=CAMERAS[:1], T=5):
    """Write a data set with LeRobot's class: an episode for each text, actions of up to `size`."""
    rng = np.random.default_rng(seed)
    features = {
        name: {"dtype": "image", "shape": (24, 32, 3), "names": ["h", "w", "c"]} for name in cameras
    }
    features["action"] = {"dtype": "float32", "shape": (A,), "names": None}
    made = lerobot_format.lerobot_dataset().create(
        root.name, 10, features, root=root, use_videos=False
    )
    for text in texts:
        for _ in range(T):
            frame = {name: rng.integers(0, 256, (24, 32, 3), np.uint8) for name in cameras}
            made.add_frame(
                {**frame, "action": (size * rng.uniform(-1, 1, A)).astype("f4"), "task": text}
            )
        made.save_episode()
    made.finalize()
    return root


@pytest.fixture
def add(tmp_path):
    """Run the import of a data set into D_e as the task red of the domain dot."""

    def add(root, **changes):
        args = {"domain": "dot", "task": "red", "data": str(tmp_path / "D_e"), "image_size": 8}
        convert.main(convert.Import(str(root), "lerobot", **{**args, **changes}))

    return add


def headers(tmp_path):
    return [open_episode(p)[1] for p in episode_files(tmp_path / "D_e/dot/red")]


def content(root):
    """Return {path: (header, tensors' bytes)} of all episodes under a folder."""
    paths = [p for folder in episode_folders(root) for p in episode_files(folder)]
    opened = {str(p.relative_to(root)): open_episode(p) for p in paths}
    names = ("image", "action", "reward")
    return {
        p: (header, *(f.get_tensor(n).tobytes() for n in names))
        for p, (f, header) in opened.items()
    }


def test_a_foreign_set_becomes_demonstrations(add, tmp_path):
    """The middle square, resized; the data set's instruction; a success in the last step; numbers of their own."""
    add(make_set(tmp_path / "set"))
    folder = tmp_path / "D_e/dot/red"
    assert [int(p.stem) for p in episode_files(folder)] == [IMPORT_SEED, IMPORT_SEED + 1]
    handle, header = open_episode(episode_files(folder)[0])
    assert (header["instruction"], header["success"], header["protocol"]) == (
        "push it",
        "1",
        "null",
    )
    assert IMPORT_SEED <= int(header["seed"]) < ONLINE_SEED and len(header["origin"]) == 64
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 32, 3), np.uint8)
    square = torch.from_numpy(image[:, 4:28]).permute(2, 0, 1)[None] / 255
    want = torch.nn.functional.interpolate(square, (8, 8), mode="bicubic", antialias=True).clamp(
        0, 1
    )[0]
    got = handle.get_tensor("image")[0]
    assert np.abs(got - want.permute(1, 2, 0).numpy() * 255).max() <= 0.51
    assert np.allclose(handle.get_tensor("action")[0], rng.uniform(-1, 1, 2), atol=1e-6)


def test_identity_is_content(add, tmp_path, monkeypatch, capsys):
    """Two data sets of one name are both added. One data set under three names is added once."""
    first = make_set(tmp_path / "here/set")
    second = make_set(tmp_path / "there/set", seed=1)
    add(first)
    add(second)
    assert len({h["origin"] for h in headers(tmp_path)}) == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(first)
    for name in ("here/set", f"{first}/", "link"):
        add(name)
    assert "0 episodes added, 2 were there already" in capsys.readouterr().out
    assert len(headers(tmp_path)) == 4
    with pytest.raises(UserError, match="2 episodes of .* differ from what is there"):
        add(first, scale=(2.0,))
    assert len(headers(tmp_path)) == 4


def test_an_import_from_before_origins_is_recognized(add, tmp_path, capsys):
    """Headers had no `origin` once. Such episodes are known by their content."""
    first = make_set(tmp_path / "set")
    add(first)
    for path in (tmp_path / "D_e").rglob("1*.safetensors"):
        handle, header = open_episode(path)
        tensors = {name: handle.get_tensor(name) for name in ("image", "action", "reward")}
        save_file(tensors, path, {k: v for k, v in header.items() if k != "origin"})
    add(first)
    assert "0 episodes added, 2 were there already" in capsys.readouterr().out


def test_a_set_of_several_tasks_needs_a_choice(add, tmp_path):
    """The instructions are listed, and --instruction chooses. An empty instruction is refused."""
    root = make_set(tmp_path / "set", ("open it", "close it", "open it"))
    with pytest.raises(UserError, match="2 instructions .*'close it'; 'open it'.*--instruction"):
        add(root)
    with pytest.raises(UserError, match="'shut it' is not in .*'close it'"):
        add(root, instruction=("shut it",))
    with pytest.raises(UserError, match="without an instruction"):
        add(make_set(tmp_path / "empty", (" ",)))
    assert not (tmp_path / "D_e").exists()
    add(root, instruction=("open it",))
    assert [h["instruction"] for h in headers(tmp_path)] == ["open it", "open it"]


def test_actions_out_of_range(add, tmp_path):
    """The range is named, with two ways out: --clip, as the environment clips, or --scale."""
    root = make_set(tmp_path / "set", size=5.0)
    raw = read_actions(root)
    low, high = f"{raw.min():.4g}", f"{raw.max():.4g}"
    with pytest.raises(UserError, match=f"from {low} to {high}, outside .*--clip .*--scale"):
        add(root)
    with pytest.raises(UserError, match="outside"):
        add(root, scale=(1.5,))
    with pytest.raises(UserError, match="--scale must be"):
        add(root, scale=(0.0, 1.0))
    add(root, clip=True)
    add(root, scale=(5.0, 10.0), data=str(tmp_path / "scaled"))
    for place, want in (("D_e", raw.clip(-1, 1)), ("scaled", raw / [5, 10])):
        paths = episode_files(tmp_path / place / "dot/red")
        got = np.concatenate([open_episode(p)[0].get_tensor("action") for p in paths])
        assert np.allclose(got, want, atol=1e-6)


def read_actions(root):
    return lerobot_format.LeRobotEpisodes(
        lerobot_format.open_lerobot(str(root)), CAMERAS[0], "action"
    ).action


@pytest.mark.parametrize(
    "sentence, made, given",
    [
        ("--task is missing", {}, {"task": ""}),
        ("--domain is missing", {}, {"domain": ""}),
        ("expert task of dot .got blue.: known are red, green", {}, {"task": "blue"}),
        ("actions of 7 dimensions, but dot has 2", {"A": 7}, {}),
        ("actions of 1 dimensions, but dot has 2", {"A": 1}, {}),
        ("--image-size must be at least 1 .got 0.", {}, {"image_size": 0}),
        ("--image-key action is not a camera", {}, {"image_key": "action"}),
        ("--image-key is missing .*images.a, observation.images.b", {"cameras": CAMERAS}, {}),
        (f"--action-key {CAMERAS[0]} is not in", {}, {"action_key": CAMERAS[0]}),
        ("--action-key push is not in", {}, {"action_key": "push"}),
    ],
)
def test_what_does_not_fit_is_refused(sentence, made, given, add, tmp_path):
    """Foreign data are held against the domain before anything is written."""
    root = make_set(tmp_path / "set", **made)
    with pytest.raises(UserError, match=sentence):
        add(root, **given)
    assert not (tmp_path / "D_e").exists()


def test_what_does_not_fit_d_e_is_refused(add, tmp_path, monkeypatch):
    """Other image sizes than D_e's are refused. Where the domain cannot be loaded, D_e or --action-dim stand for it."""
    add(make_set(tmp_path / "set"))
    other = make_set(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="holds 8x8 images, but --image-size is 16: use 8"):
        add(other, image_size=16, task="green")

    def missing(name):
        raise ModuleNotFoundError("No module named 'mujoco'")

    monkeypatch.setattr(foreign_episodes, "load_domain", missing)
    with pytest.raises(UserError, match="actions of 7 dimensions, but dot has 2"):
        add(make_set(tmp_path / "seven", A=7))
    with pytest.raises(UserError, match="--action-dim"):
        add(other, data=str(tmp_path / "new"))
    add(other, data=str(tmp_path / "new"), action_dim=2)
    add(other)
    assert len(headers(tmp_path)) == 4


def test_one_dimensional_actions(add, tmp_path, dot, monkeypatch):
    """LeRobot drops the dimension of a 1-D action. Here it comes back."""
    monkeypatch.setattr(Dot, "action_space", gym.spaces.Box(-1, 1, (1,)))
    add(make_set(tmp_path / "set", A=1))
    handle, _ = open_episode(episode_files(tmp_path / "D_e/dot/red")[0])
    assert handle.get_slice("action").get_shape() == [5, 1]


class Large:
    """Frames of two large cameras, made when they are read."""

    features = {name: {"shape": (480, 640, 3)} for name in CAMERAS} | {"action": {"shape": (2,)}}
    meta = SimpleNamespace(camera_keys=list(CAMERAS), tasks=SimpleNamespace(index=["push it"]))
    root = "/nowhere"

    def __init__(self, frames):
        zeros = np.zeros(frames, int)
        action = np.full((frames, 2), frames / 1000, np.float32)
        self.columns = {"episode_index": zeros, "task_index": zeros, "action": action}
        self.hf_dataset = self

    def select_columns(self, names):
        return SimpleNamespace(with_format=lambda _: Columns(self.columns, names))

    def __getitem__(self, i):
        return {name: torch.ones(3, 480, 640) for name in CAMERAS}


def import_large(data, queue):
    args = convert.Import(
        "large", "lerobot", domain="dot", task="red", data=data, image_key=CAMERAS[1]
    )
    lerobot_format.import_foreign(
        args, Large(2)
    )  # libraries are read into memory when they are first used
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lerobot_format.import_foreign(args, Large(300))
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)


def test_frames_pass_one_by_one(tmp_path):
    """An episode of 300 frames takes less than 0.3 GB above the start, however large its cameras are."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=import_large, args=(str(tmp_path / "D_e"), queue))
    process.start()
    assert queue.get(timeout=120) < 0.3
    process.join()
    assert len(headers(tmp_path)) == 2


def write(path, k=0, T=4, **changes):
    """Write an episode of the domain dot."""
    rng = np.random.default_rng(k)
    about = {
        "domain": "dot",
        "task": "red",
        "instruction": f"push {k}",
        "source": "expert",
        "seed": k,
    }
    info = EpisodeInfo(
        **{**about, "protocol": {"horizon": 9}, "made_by": {"torch": "0"}, **changes}
    )
    write_episode(
        path, rng.integers(0, 256, (T, 8, 8, 3)), rng.uniform(-1, 1, (T, 2)), np.eye(T)[-1], info
    )


def export(out, data, **more):
    convert.main(convert.Export(str(out), str(data), **more))


def read_back(out, data):
    convert.main(convert.Import(str(out), "lerobot", data=str(data)))


def test_export_and_import_are_lossless(tmp_path):
    """The same files come back, header and all, also from folders that are links and with equal numbers."""
    source = tmp_path / "runs"
    write(source / "D_e/red/000000.safetensors")
    write(
        source / "D_rl/red/000000.safetensors", 1, source="online", executed=True, origin="x" * 64
    )
    write(tmp_path / "elsewhere/000007.safetensors", 2, task="green")
    (source / "D_e/green").symlink_to(tmp_path / "elsewhere")
    (source / "D_e/round").symlink_to(source)
    write(source / "D_e/red/.tokens-0/000000.safetensors", 3)
    write(source / "D_e/red/copy of 0.safetensors", 3)
    export(tmp_path / "set", source)
    read_back(tmp_path / "set", tmp_path / "again")
    names = [
        "D_e/green/000007.safetensors",
        "D_e/red/000000.safetensors",
        "D_rl/red/000000.safetensors",
    ]
    assert sorted(content(tmp_path / "again")) == names
    assert content(tmp_path / "again") == {name: content(source)[name] for name in names}
    with pytest.raises(UserError, match="already exists"):
        export(tmp_path / "set", source)


def test_a_second_import_changes_nothing(tmp_path, capsys):
    """Episodes that are there are kept. Those that differ are named, with an error."""
    write(tmp_path / "D_e/red/000000.safetensors")
    write(tmp_path / "D_e/red/000001.safetensors", 1)
    export(tmp_path / "set", tmp_path / "D_e")
    before = content(tmp_path / "D_e")
    read_back(tmp_path / "set", tmp_path / "D_e")
    assert "0 episodes added, 2 were there already" in capsys.readouterr().out
    write(tmp_path / "D_e/red/000001.safetensors", 2)
    with pytest.raises(UserError, match="1 episodes .* differ from what is there.*000001"):
        read_back(tmp_path / "set", tmp_path / "D_e")
    assert content(tmp_path / "D_e") != before
    about = tmp_path / "set" / lerobot_format.ABOUT
    episodes = json.loads(about.read_text())
    episodes[1]["path"] = "../../stolen.safetensors"
    about.write_text(json.dumps(episodes))
    with pytest.raises(UserError, match="do not trust"):
        read_back(tmp_path / "set", tmp_path / "new")
    about.write_text(json.dumps(episodes[:1]))
    with pytest.raises(UserError, match="has changed since"):
        read_back(tmp_path / "set", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_exports_that_are_refused(tmp_path, monkeypatch):
    """No frame rate, no episodes, two sizes, no LeRobot, not a data set: one sentence each, and no data set."""
    write(tmp_path / "D_e/red/000000.safetensors")
    with pytest.raises(UserError, match="--fps must be at least 1 .got 0."):
        export(tmp_path / "set", tmp_path / "D_e", fps=0)
    with pytest.raises(UserError, match="holds no episodes"):
        export(tmp_path / "set", tmp_path / "nothing")
    with pytest.raises(UserError, match="not a LeRobot data set"):
        read_back(tmp_path / "nothing", tmp_path / "new")
    write_episode(
        tmp_path / "D_e/red/000001.safetensors",
        np.zeros((3, 9, 9, 3)),
        np.zeros((3, 2)),
        np.zeros(3),
        EpisodeInfo("dot", "red", "push", "expert", 1, None),
    )
    with pytest.raises(UserError, match="another size"):
        export(tmp_path / "set", tmp_path / "D_e")
    monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", None)
    with pytest.raises(UserError, match="environment of its own"):
        read_back(tmp_path / "D_e", tmp_path / "new")
    assert not (tmp_path / "set").exists()


def test_minari_sets(tmp_path, dot, monkeypatch, capsys):
    """Episodes are added once. A set of another environment ends in one sentence."""
    episodes = [SimpleNamespace(id=k, x=np.full(3, k)) for k in range(2)]
    dataset = SimpleNamespace(total_episodes=2, iterate_episodes=lambda: iter(episodes))
    monkeypatch.setattr(minari_format, "open_minari", lambda name: dataset)
    args = convert.Import(
        "a/b-v0", "minari", domain="dot", data=str(tmp_path / "D_e"), image_size=8
    )
    with pytest.raises(UserError, match="has no from_minari"):
        convert.main(args)

    def from_minari(episode, size):
        x = episode.x[:3].astype(float) / 10
        yield (
            "red",
            np.full((3, size, size, 3), episode.id, np.uint8),
            np.stack([x, -x], 1),
            np.eye(3)[-1],
        )

    dot.from_minari = from_minari
    convert.main(args)
    convert.main(args)
    assert "0 episodes added, 2 were there already" in capsys.readouterr().out
    assert [h["source"] for h in headers(tmp_path)] == ["expert", "expert"]
    dot.from_minari = lambda episode, size: [episode.x["observation"]]
    with pytest.raises(UserError, match="does not hold episodes of dot's environment"):
        convert.main(args)
