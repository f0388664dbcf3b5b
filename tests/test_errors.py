"""Bad input ends a command with one sentence that names it, a non-zero exit code, and nothing lost."""

import errno
import os
import shutil
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from conftest import files, make_vla, nan_checkpoint, one_sentence, refused, without_digests
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import evaluate
import stage0_sft
import stage_rl
import stage_sft
from common.files import atomic_write, folder_lock, make_folder, read_json, write_json
from common.runs import Stage, checkpoint_config
from domains import load_domain
from model import VLA

NEEDED = {
    "tiny": [
        "config.json",
        "heads.safetensors",
        "vlm/config.json",
        "vlm/model.safetensors",
        "vlm/tokenizer.json",
        "vlm/tokenizer_config.json",
        "vlm/preprocessor_config.json",
    ],
    "lora": [
        "config.json",
        "heads.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ],
}


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module", params=["tiny", "lora"])
def saved(request, tmp_path_factory, backbone):
    """A checkpoint of each kind: (kind, folder, its action)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_vla(folder, "tiny" if request.param == "tiny" else backbone).save(folder)
    return request.param, folder, act(folder)


def act(folder):
    vla = VLA.load(folder)
    with torch.no_grad():
        return vla.act(*vla.encode(np.full((1, 32, 32, 3), 200, np.uint8), ["push"]))


def test_checkpoint_without_one_of_its_files(saved, tmp_path):
    """Each file in turn, missing or cut short, is named. Without a file that is not needed, the action is the same."""
    kind, folder, action = saved
    assert set(NEEDED[kind]) <= set(files(folder))
    for name in files(folder):
        for how in ("missing", "cut"):
            broken = tmp_path / f"{how}-{name.replace('/', '-')}"
            shutil.copytree(folder, broken)
            if how == "missing":
                (broken / name).unlink()
            else:
                (broken / name).write_bytes((broken / name).read_bytes()[:-9])
            if name in NEEDED[kind]:
                assert name in refused(VLA.load, broken), (name, how)
            elif how == "missing":
                assert torch.equal(act(broken), action), name


def test_no_checkpoint_at_all(tmp_path):
    """A path that does not exist, and a folder that is something else, are named."""
    assert "nowhere" in refused(VLA.load, tmp_path / "nowhere")
    assert "config.json" in refused(VLA.load, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert "is not a checkpoint" in refused(VLA.load, tmp_path)
    assert "incomplete checkpoint" in refused(checkpoint_config, tmp_path / "config.json")


def test_a_flipped_byte_is_noticed(saved, tmp_path):
    """A changed file is named. A checkpoint from before there were digests loads without the check."""
    kind, folder, action = saved
    for name in NEEDED[kind][1:]:
        broken = shutil.copytree(folder, tmp_path / name.replace("/", "-"))
        content = bytearray((broken / name).read_bytes())
        content[-1] ^= 1
        (broken / name).write_bytes(content)
        sentence = refused(VLA.load, broken)
        assert name in sentence and "use another checkpoint" in sentence
    older = without_digests(shutil.copytree(folder, tmp_path / "older"))
    assert torch.equal(act(older), action)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("action_dim", "2"),
        ("action_dim", -1),
        ("image_size", None),
        ("image_size", 64),
        ("dtype", "float16"),
        ("dtype", None),
        ("sha256", []),
        ("domain", ["bead"]),
    ],
)
def test_an_entry_of_config_json_of_another_kind(entry, value, checkpoint, tmp_path):
    """The file and the entry are named."""
    shutil.copytree(checkpoint, tmp_path / "a")
    path = tmp_path / "a/config.json"
    config = read_json(path)
    write_json(path, {**config, entry: value})
    sentence = refused(VLA.load, tmp_path / "a")
    assert str(path) in sentence and entry in sentence
    write_json(path, [config])
    assert "is not a checkpoint" in refused(VLA.load, tmp_path / "a")


def test_an_adapter_or_a_backbone_without_a_tensor(checkpoint, backbone, tmp_path):
    """A missing tensor is named, and never initialised at random, also in a checkpoint without digests."""
    make_vla(tmp_path / "lora", backbone).save(tmp_path / "lora")
    without_digests(tmp_path / "lora")
    path = tmp_path / "lora/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: x for n, x in tensors.items() if n != min(tensors)}, path, {"format": "pt"})
    assert min(tensors) in refused(VLA.load, tmp_path / "lora")
    without_digests(shutil.copytree(checkpoint, tmp_path / "less"))
    path = tmp_path / "less/vlm/model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    save_file({n: x for n, x in tensors.items() if n != name}, path, {"format": "pt"})
    assert name in refused(VLA.load, tmp_path / "less")


def test_checkpoint_of_another_domain(checkpoint):
    """A checkpoint is not used on tasks of another domain; both are named."""
    sentence = refused(VLA.load, checkpoint, "metaworld")
    assert "metaworld" in sentence and "bead" in sentence


def test_checkpoint_of_another_action_size(project, checkpoint, tmp_path):
    """Action dimensions that differ from the checkpoint's own config, or from the domain's, are refused."""
    shutil.copytree(checkpoint, tmp_path / "mixed")
    config = read_json(tmp_path / "mixed/config.json")
    write_json(tmp_path / "mixed/config.json", {**config, "action_dim": 7})
    sentence = refused(VLA.load, tmp_path / "mixed")
    assert "7" in sentence and "2" in sentence
    make_vla(tmp_path / "seven", action_dim=7).save(tmp_path / "seven")
    sentence = one_sentence(
        project.run("python", "evaluate.py", "--checkpoint", tmp_path / "seven", "--envs", "1")
    )
    assert "7" in sentence and "2" in sentence


def test_vlm_that_is_not_a_blip2(tmp_path):
    """--vlm that names nothing, or a folder that is not a BLIP-2, is refused by its name."""
    (tmp_path / "config.json").write_text("{}")
    for vlm in (str(tmp_path), str(tmp_path / "nowhere")):
        assert vlm in refused(make_vla, tmp_path / "x", vlm)


def test_nan_weights(project, checkpoint, tmp_path):
    """A checkpoint with NaN in it is not evaluated."""
    nan_checkpoint(checkpoint, tmp_path / "nan")
    sentence = one_sentence(
        project.run("python", "evaluate.py", "--checkpoint", tmp_path / "nan", "--envs", "2")
    )
    assert "NaN" in sentence
    assert not (tmp_path / "nan/eval.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass
class Args:
    """A stage's arguments, for `Stage`."""

    out: str
    parent: str | None = None
    lr: float = 1e-4
    threads: int = 1
    sacfd: dict = field(default_factory=dict)


def test_another_parent(tmp_path):
    """A stage that began from one checkpoint does not resume from another. A run's folder may be moved."""
    Stage(
        Args(tmp_path / "run/1-sft", tmp_path / "run/1-typo")
    )  # before anything is trained a parent may be corrected
    Stage(Args(tmp_path / "run/1-sft", tmp_path / "run/1-rl")).save({}, {})
    (tmp_path / "run").rename(tmp_path / "moved")
    Stage(Args(tmp_path / "moved/1-sft", tmp_path / "moved/1-rl"))
    sentence = refused(Stage, Args(tmp_path / "moved/1-sft", tmp_path / "moved/0-sft"))
    assert "parent: then 1-rl, now 0-sft" in sentence


def test_one_process_at_a_time_records(tmp_path, capsys):
    """Of two runs that would record the same D_e the second waits, and says so."""
    seen = []

    def enter(name):
        with folder_lock(tmp_path / "D_e"):
            seen.append(name)

    with folder_lock(tmp_path / "D_e"):
        second = threading.Thread(target=enter, args=["second"])
        second.start()
        printed = ""
        end = time.time() + 10
        while "waiting" not in printed and time.time() < end:
            time.sleep(0.05)
            printed += capsys.readouterr().out
        assert seen == [] and "waiting" in printed
    second.join(5)
    assert seen == ["second"]


def test_a_stage_at_work_is_not_started_again(tmp_path):
    """A second process in the same stage is refused for as long as the first one runs."""
    first = Stage(Args(tmp_path / "a"))
    assert "another process is working" in refused(Stage, Args(tmp_path / "a"))
    del first
    Stage(Args(tmp_path / "a"))
    assert "--threads must be at least 1 (got 0)" in refused(Stage, Args(tmp_path / "b", threads=0))


def test_a_place_that_is_no_stage_s(tmp_path):
    """A folder or file of something else is neither a finished stage nor replaced. A link to nowhere is named."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("/nowhere")
    for name in ("mine", "file"):
        assert "is not a finished stage" in refused(Stage, Args(tmp_path / name))
    assert "/nowhere" in refused(Stage, Args(tmp_path / "link"))
    assert "--out must name" in refused(Stage, Args("."))
    assert f"{tmp_path}/file/.0-sft.partial" in refused(Stage, Args(tmp_path / "file/0-sft"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_state_of_another_version(tmp_path):
    """What it lacks is named, whether a counter or a tensor."""
    Stage(Args(tmp_path / "a")).save({"x": torch.zeros(1)}, {"step": 3})
    tensors, counters = Stage(Args(tmp_path / "a")).load()
    assert counters == {"step": 3} and "x" in tensors
    assert "lacks y" in refused(lambda: tensors["y"])
    assert "lacks best" in refused(lambda: counters["best"])


@pytest.mark.parametrize("number", [errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE])
def test_an_error_of_a_file_system_names_the_file(number):
    """Whatever the system reports about a file, the file and the cause are named."""

    def fail():
        raise OSError(number, os.strerror(number), "/mnt/x")

    sentence = refused(fail)
    assert "/mnt/x" in sentence and os.strerror(number) in sentence


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG])
def test_a_quota_is_a_full_disk(number, tmp_path):
    """Also in the words of safetensors, whose error has no number. The old file is kept."""
    (tmp_path / "a").write_text("old")

    def write(error):
        with atomic_write(tmp_path / "a"):
            raise error

    for error in (OSError(number, "x"), SafetensorError(f"I/O error (os error {number})")):
        assert "no space left" in refused(write, error)
    assert (tmp_path / "a").read_text() == "old"


def test_arguments_that_a_stage_does_not_use(tmp_path):
    """PPO resumes whatever SACfD's options were when it began, also from a record that holds them."""
    Stage(Args(tmp_path / "a", sacfd={"utd": 1})).save({}, {})
    Stage(Args(tmp_path / "a", sacfd={"utd": 2}), ["sacfd"])
    assert "sacfd: then {'utd': 1}, now {'utd': 2}" in refused(
        Stage, Args(tmp_path / "a", sacfd={"utd": 2})
    )
    assert "lr: then 0.0001" in refused(Stage, Args(tmp_path / "a", lr=1.0), ["sacfd"])
    assert Stage(Args(tmp_path / "b", sacfd={"utd": 1}), ["sacfd"]).identity_args == {"lr": 1e-4}


@dataclass
class RLArgs:
    """Stage 1's options that were renamed."""

    out: str
    action_noise_std: float | None = None
    random_burst_prob: float | None = None
    sacfd: stage_rl.SACfDArgs = field(default_factory=stage_rl.SACfDArgs)


OLD_ARGS = {"noise": "action_noise_std", "kicks": "random_burst_prob"}
OLD_SACFD_ARGS = {
    "demos": "num_demos",
    "clone": "bc_weight",
    "priority": "per_alpha",
    "importance": "per_beta",
    "entropy": "target_entropy",
}


def test_a_stage_resumes_by_the_names_of_an_older_version(tmp_path):
    """A record with the old names is the same stage, finished or not. A difference in one of them is still refused."""
    args = RLArgs(tmp_path / "a", 0.1, 0.0, stage_rl.SACfDArgs(num_demos=3, bc_weight=0.7))
    Stage(args).save({}, {})
    path = tmp_path / ".a.partial/stage.json"
    record = read_json(path)
    names = {new: old for old, new in OLD_ARGS.items()}
    old = {names.get(name, name): value for name, value in record["args"].items()}
    names = {new: old for old, new in OLD_SACFD_ARGS.items()}
    old["sacfd"] = {names.get(name, name): value for name, value in old["sacfd"].items()}
    assert {*OLD_ARGS} <= set(old) and {*OLD_SACFD_ARGS} <= set(old["sacfd"])
    write_json(path, {**record, "args": old})
    Stage(args)
    assert "action_noise_std" in refused(Stage, replace(args, action_noise_std=0.2))
    assert "0.7" in refused(Stage, replace(args, sacfd=replace(args.sacfd, bc_weight=0.1)))
    (tmp_path / ".a.partial").rename(tmp_path / "a")
    assert Stage(args).done
    assert "random_burst_prob" in refused(Stage, replace(args, random_burst_prob=0.5))


def test_a_finished_checkpoint_of_an_older_version_is_used(checkpoint, tmp_path):
    """A config.json whose arguments have the old names loads, and acts as before."""
    shutil.copytree(checkpoint, tmp_path / "old")
    config = read_json(tmp_path / "old/config.json")
    old = {"noise": 0.2, "kicks": 0.0, "sacfd": {"clone": 0.1, "priority": 0.6}}
    write_json(tmp_path / "old/config.json", {**config, "args": old})
    assert torch.equal(act(tmp_path / "old"), act(checkpoint))


# ----------------------------------------------------------------------------------------------------------------------
# Command lines


def test_unknown_names_on_the_command_line(project, checkpoint, tmp_path, monkeypatch):
    """An unknown domain, task or device: one sentence with the known ones, and code 1, also from a terminal."""
    monkeypatch.chdir(project.folder)
    stage = ["python", "stage_rl.py", "--parent", checkpoint, "--out", "runs/unknown", "--domain"]
    sentence = one_sentence(project.run(*stage, "metawrld", "--task", "blue"))
    assert "metawrld" in sentence and "metaworld" in sentence
    sentence = refused(
        stage_rl.main, stage_rl.Args("purple", "0-sft", "runs/unknown", domain="metaworld")
    )
    assert "purple" in sentence and "drawer-open" in sentence
    make_vla(tmp_path, domain="metaworld").save(tmp_path)
    assert "cuda:77" in refused(evaluate.main, evaluate.Args(tmp_path, device="cuda:77"))
    assert not list((project.folder / "runs").glob("*unknown*"))


@pytest.mark.parametrize(
    "flag, kind, changes",
    [
        ("--envs", "evaluate", {"envs": 0}),
        ("--episodes", "evaluate", {"episodes": 0}),
        ("clip.avi", "evaluate", {"video": "clip.avi"}),
        ("--seed", "stage_sft", {"seed": 600}),
        ("--episodes", "stage_sft", {"episodes": -1}),
        ("--image-size", "stage0_sft", {"image_size": 0}),
        ("--std", "stage_rl", {"std": 0}),
        ("--gamma", "stage_rl", {"gamma": float("inf")}),
        ("--sacfd.alpha", "stage_rl", {"sacfd": stage_rl.SACfDArgs(alpha=0.0)}),
        ("--lr", "stage_sft", {"lr": float("nan")}),
        ("--rl-weight", "stage_sft", {"rl_weight": -1.0}),
        ("--lora-rank", "stage_sft", {"lora_rank": 0}),
        ("--hold", "evaluate", {"hold": -1}),
        ("--video", "evaluate", {"video": "clip.mp4", "hold": 5}),
        ("--rollout", "stage_rl", {"rollout": 3}),
        ("--sacfd.actor-every", "stage_rl", {"sacfd": stage_rl.SACfDArgs(actor_every=0)}),
    ],
)
def test_numbers_out_of_range(flag, kind, changes, checkpoint, tmp_path, monkeypatch):
    """The flag and its value are named, before anything is made."""
    monkeypatch.chdir(tmp_path)
    make_vla(tmp_path / "parent", domain="metaworld").save(tmp_path / "parent")
    parent = str(tmp_path / "parent")
    call = {
        "evaluate": lambda: evaluate.main(evaluate.Args(parent, **changes)),
        "stage_sft": lambda: Stage(stage_sft.Args(parent, "runs/unknown", **changes)),
        "stage0_sft": lambda: Stage(stage0_sft.Args("metaworld", "runs/unknown", **changes)),
        "stage_rl": lambda: stage_rl.main(
            stage_rl.Args("drawer-open", parent, "runs/unknown", domain="metaworld", **changes)
        ),
    }[kind]
    sentence = refused(call)
    assert flag in sentence
    value = next(iter(changes.values()))
    if not isinstance(value, (str, stage_rl.SACfDArgs)):
        assert f"got {value}" in sentence or str(value) in sentence
    assert not (tmp_path / "runs/unknown").exists()


def test_loop_of_an_unknown_domain(project):
    """`bash loop.sh` stops at once, and makes nothing. Without arguments it prints its usage."""
    assert "metaworld" in one_sentence(project.run("bash", "loop.sh", "metawrld", "1"))
    assert not list(project.folder.glob("runs/metawrld*"))
    code, out, _ = project.run("bash", "loop.sh")
    assert code == 2 and "bash loop.sh metaworld 4" in out and "SEED=" in out


@pytest.mark.parametrize("gl", ["egl", "osmesa", "nonsense"])
def test_no_opengl_names_the_remedy(gl, project, tmp_path):
    """If MuJoCo cannot render, stage 0 and evaluate.py name the variable or the packages, before the work."""
    load_domain("metaworld")
    make_vla(tmp_path / "ckpt", action_dim=4, domain="metaworld").save(tmp_path / "ckpt")
    env = {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": "", "LD_LIBRARY_PATH": ""}
    env["__EGL_VENDOR_LIBRARY_FILENAMES"] = os.devnull
    if (
        gl == "osmesa"
        and shutil.which("ldconfig")
        and "libOSMesa" in os.popen("ldconfig -p").read()
    ):
        pytest.skip("OSMesa is installed")
    places = ["--data", tmp_path / "D_e", "--out", tmp_path / "0-sft"]
    collect = ["python", "stage0_sft.py", "--domain", "metaworld", *places, "--threads", "1"]
    evaluation = [
        "python",
        "evaluate.py",
        "--checkpoint",
        tmp_path / "ckpt",
        "--episodes",
        "1",
        "--envs",
        "2",
    ]
    remedy = {
        "egl": "__EGL_VENDOR_LIBRARY_FILENAMES",
        "osmesa": "apt-get install",
        "nonsense": "unset MUJOCO_GL",
    }[gl]
    for command in (collect, evaluation):
        assert remedy in one_sentence(project.run(*command, timeout=120, **env))


# ----------------------------------------------------------------------------------------------------------------------
# The file system


def test_a_link_to_nowhere(project, tmp_path):
    """A dangling link as --data, as the run's folder, or above them: the link and its target are named."""
    for name in ("D_e", "run"):
        (tmp_path / name).symlink_to(tmp_path / "unmounted")
    stage0 = [
        "python",
        "stage0_sft.py",
        "--domain",
        "bead",
        "--demos",
        "1",
        "--steps",
        "1",
        "--episodes",
        "0",
    ]
    for data, out in (("D_e", "0-sft"), ("data", "run/0-sft"), ("data", "run/deeper/0-sft")):
        sentence = one_sentence(
            project.run(*stage0, "--data", tmp_path / data, "--out", tmp_path / out)
        )
        assert "is a link to" in sentence and "unmounted" in sentence
    assert "is a link to" in refused(make_folder, tmp_path / "run/a/b")
    (tmp_path / "unmounted").mkdir()
    make_folder(tmp_path / "run/a/b")


def test_a_file_system_that_cannot_flush_a_folder(tmp_path, monkeypatch):
    """CIFS, FUSE and WSL shares answer EINVAL to the flush of a folder. Of a file it stays an error."""
    fsync = os.fsync
    mode = {"files": False}

    def refuse(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}") or mode["files"]:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "a/b.json", 1)
    stage = Stage(Args(tmp_path / "a/0-sft"))
    stage.save({}, {})
    stage.finish()
    assert read_json(tmp_path / "a/b.json") == 1 and (tmp_path / "a/0-sft/summary.json").exists()
    mode["files"] = True
    with pytest.raises(OSError):
        write_json(tmp_path / "a/b.json", 2)
    assert read_json(tmp_path / "a/b.json") == 1
