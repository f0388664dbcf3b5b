"""Bad input ends a command with one sentence that names it, a non-zero exit code, and nothing lost."""

import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import files, make_vla, refused
from safetensors.torch import load_file, save_file

import evaluate
import report
import stage_rl
import stage_sft
from domains import load_domain
from model import VLA
from run import Stage, alone_in, checkpoint_config

NEEDED = {
    "whole": [
        "config.json", "heads.safetensors", "vlm/config.json", "vlm/model.safetensors", "vlm/tokenizer.json",
        "vlm/tokenizer_config.json", "vlm/preprocessor_config.json",
    ],
    "lora": ["config.json", "heads.safetensors", "adapter_config.json", "adapter_model.safetensors"],
}  # fmt: skip


def one_sentence(result):
    """The sentence on stderr of a command that was refused, without a traceback."""
    code, out, err = result
    assert code not in (0, None) and "Traceback" not in out + err, err
    said = re.findall(r"error: .+", err)  # it may stand behind a progress bar
    assert len(said) == 1, err
    return said[0]


@pytest.fixture(scope="module", params=["whole", "lora"])
def whole(request, tmp_path_factory, backbone):
    """A checkpoint of each kind, what it holds, and the action that it gives: (kind, folder, action)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_vla(folder, "tiny" if request.param == "whole" else backbone).save(folder)
    return request.param, folder, act(folder)


def act(folder):
    with torch.no_grad():
        return VLA.load(folder).act(*VLA.load(folder).encode(np.full((1, 32, 32, 3), 200, np.uint8), ["push"]))


def test_checkpoint_without_one_of_its_files(whole, tmp_path):
    """Each file in turn: missing, or cut short, it is named, or else the checkpoint acts as before without it."""
    kind, folder, action = whole
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
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    assert "no policy" in refused(VLA.load, tmp_path)
    assert "whole checkpoint" in refused(checkpoint_config, tmp_path / "config.json")


def test_an_adapter_or_a_backbone_without_a_tensor(checkpoint, backbone, tmp_path):
    """What is missing is not made up."""
    make_vla(tmp_path / "lora", backbone).save(tmp_path / "lora")
    tensors = load_file(path := tmp_path / "lora/adapter_model.safetensors")
    save_file({n: x for n, x in tensors.items() if n != min(tensors)}, path, {"format": "pt"})
    assert min(tensors) in refused(VLA.load, tmp_path / "lora")
    shutil.copytree(checkpoint, tmp_path / "less")
    tensors = load_file(path := tmp_path / "less/vlm/model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    save_file({n: x for n, x in tensors.items() if n != name}, path, {"format": "pt"})
    assert name in refused(VLA.load, tmp_path / "less")


def test_another_parent(tmp_path):
    """A stage begun from one checkpoint does not go on from another; a run's folder may be moved."""

    @dataclass
    class Args:
        out: str
        parent: str

    Stage(Args(tmp_path / "run/1-sft", tmp_path / "run/1-typo"))  # as long as nothing is trained this can be mended
    Stage(Args(tmp_path / "run/1-sft", tmp_path / "run/1-rl")).save({}, {})
    (tmp_path / "run").rename(tmp_path / "moved")
    Stage(Args(tmp_path / "moved/1-sft", tmp_path / "moved/1-rl"))
    said = refused(Stage, Args(tmp_path / "moved/1-sft", tmp_path / "moved/0-sft"))
    assert "parent: 1-rl then, 0-sft now" in said


def test_one_at_a_time(tmp_path, capsys):
    """Of two runs that would record the same D_e the second waits, and says so."""
    seen = []

    def enter(name):
        with alone_in(tmp_path / "D_e"):
            seen.append(name)

    with alone_in(tmp_path / "D_e"):
        second = threading.Thread(target=enter, args=["second"])
        second.start()
        said, end = "", time.time() + 10
        while "waiting" not in said and time.time() < end:
            time.sleep(0.05)
            said += capsys.readouterr().out
        assert seen == [] and "waiting" in said
    second.join(5)
    assert seen == ["second"]


def test_a_stage_at_work_is_not_begun_again(tmp_path):
    """A second process in the same stage is refused for as long as the first is there."""

    @dataclass
    class Args:
        out: str
        threads: int = 1

    first = Stage(Args(tmp_path / "a"))
    assert "another process is at work" in refused(Stage, Args(tmp_path / "a"))
    del first
    Stage(Args(tmp_path / "a"))
    assert "--threads 0" in refused(Stage, Args(tmp_path / "b", threads=0))


def test_what_a_stage_does_not_use(tmp_path):
    """PPO goes on whatever SACfD's settings were when it was begun, also by a record that holds them."""

    @dataclass
    class Args:
        out: str
        lr: float = 1e-4
        sacfd: int = 0

    Stage(Args(tmp_path / "a", sacfd=1)).save({}, {})
    Stage(Args(tmp_path / "a", sacfd=2), ["sacfd"])
    assert "sacfd: 1 then, 2 now" in refused(Stage, Args(tmp_path / "a", sacfd=2))
    assert "lr: 0.0001 then" in refused(Stage, Args(tmp_path / "a", lr=1.0), ["sacfd"])
    assert Stage(Args(tmp_path / "b", sacfd=1), ["sacfd"]).decides == {"lr": 1e-4}


def test_checkpoint_of_another_domain(checkpoint):
    """A checkpoint is not used on tasks of another domain; both are named."""
    said = refused(VLA.load, checkpoint, "metaworld")
    assert "metaworld" in said and "toy" in said


def test_checkpoint_of_another_action_size(project, checkpoint, tmp_path):
    """Other action dimensions than its own config says, or than the domain's environments have, are refused."""
    shutil.copytree(checkpoint, tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed/config.json").read_text())
    (tmp_path / "mixed/config.json").write_text(json.dumps({**config, "action_dim": 7}))
    assert "7" in (said := refused(VLA.load, tmp_path / "mixed")) and "2" in said
    make_vla(tmp_path / "seven", action_dim=7).save(tmp_path / "seven")
    said = one_sentence(project.run("python", "evaluate.py", "--checkpoint", tmp_path / "seven", "--envs", "1"))
    assert "7" in said and "2" in said


def test_vlm_that_is_none(tmp_path):
    """--vlm naming nothing, or a folder that is no BLIP-2, is refused by its name."""
    (tmp_path / "config.json").write_text("{}")
    assert str(tmp_path) in refused(lambda: make_vla(tmp_path / "x", str(tmp_path)))


def test_unknown_names_on_the_command_line(project, checkpoint, tmp_path, monkeypatch):
    """Unknown domain, task, device: from a terminal too there is one sentence with the known ones, and code 1."""
    monkeypatch.chdir(project.folder)
    stage = ["python", "stage_rl.py", "--parent", checkpoint, "--out", "runs/unknown", "--domain"]
    said = one_sentence(project.run(*stage, "metawrld", "--task", "blue"))
    assert "metawrld" in said and "metaworld" in said
    said = refused(stage_rl.story, stage_rl.Args("purple", "0-sft", "runs/unknown", domain="metaworld"))
    assert "purple" in said and "drawer-open" in said
    make_vla(tmp_path, domain="metaworld").save(tmp_path)
    assert "cuda:77" in refused(evaluate.story, evaluate.Args(tmp_path, device="cuda:77"))
    for more in ({"envs": 0}, {"episodes": 0}):
        assert "from 1" in refused(evaluate.story, evaluate.Args(checkpoint, **more))
    assert "--seed 600" in refused(Stage, stage_sft.Args(checkpoint, "runs/unknown", seed=600))
    assert "--episodes -1 " in refused(Stage, stage_sft.Args(checkpoint, "runs/unknown", episodes=-1))
    for flag, more in (
        ("--std 0", {"std": 0}), ("--rollout 3", {"rollout": 3}),
        ("--sacfd.actor-every 0", {"sacfd": stage_rl.SACfD(actor_every=0)}),
    ):  # fmt: skip
        args = stage_rl.Args("drawer-open", str(tmp_path), "runs/unknown", domain="metaworld", **more)
        assert flag in refused(stage_rl.story, args)
    assert "film.avi" in refused(evaluate.story, evaluate.Args(checkpoint, video="film.avi"))
    assert str(tmp_path) in refused(report.story, report.Args(curves=(str(tmp_path),)))
    assert not list((project.folder / "runs").glob("*unknown*"))


def test_loop_of_an_unknown_domain(project):
    """`bash loop.sh` stops at once, and makes nothing."""
    assert "metaworld" in one_sentence(project.run("bash", "loop.sh", "metawrld", "1"))
    assert not list(project.folder.glob("runs/metawrld*"))
    code, out, _ = project.run("bash", "loop.sh")
    assert code == 2 and "bash loop.sh metaworld 4" in out


@pytest.mark.parametrize("gl", ["egl", "osmesa", "nonsense"])
def test_no_opengl_names_the_packages(gl, project, tmp_path):
    """Where MuJoCo cannot draw, collecting and evaluating name the packages that are missing."""
    load_domain("metaworld")
    make_vla(tmp_path / "ckpt", action_dim=4, domain="metaworld").save(tmp_path / "ckpt")
    env = {"MUJOCO_GL": gl, "__EGL_VENDOR_LIBRARY_FILENAMES": os.devnull, "PYOPENGL_PLATFORM": ""}
    env = {**env, "LD_LIBRARY_PATH": ""}
    places = ["--data", tmp_path / "D_e", "--out", tmp_path / "0-sft"]
    collect = ["python", "stage0_sft.py", "--domain", "metaworld", *places, "--threads", "1"]
    evaluate = ["python", "evaluate.py", "--checkpoint", tmp_path / "ckpt", "--episodes", "1", "--envs", "2"]
    if gl == "osmesa" and shutil.which("ldconfig") and "libOSMesa" in os.popen("ldconfig -p").read():
        pytest.skip("OSMesa is installed")
    for command in (collect, evaluate):
        assert "apt-get install" in one_sentence(project.run(*command, timeout=120, **env))


def test_nan_weights(project, checkpoint, tmp_path):
    """A checkpoint with NaN in it is not evaluated and not trained further."""
    shutil.copytree(checkpoint, tmp_path / "nan")
    heads = load_file(checkpoint / "heads.safetensors")
    save_file({**heads, "head.mlp.0.bias": heads["head.mlp.0.bias"] * np.nan}, tmp_path / "nan/heads.safetensors")
    said = one_sentence(project.run("python", "evaluate.py", "--checkpoint", tmp_path / "nan", "--envs", "2"))
    assert "NaN" in said
    assert not (tmp_path / "nan/eval.json").exists()
