"""The plan before a run: it counts what the real model has, and what does not fit is refused with a way out."""

import re
import shutil

import torch
from conftest import make_vla, refused
from test_errors import one_sentence

import plan
from stage0_sft import Args


def counted(vla, whole, **changes):
    """The plan's count for a VLA of conftest's sizes, from its config alone."""
    stage0 = Args("toy", "", image_size=32, lora_rank=4, dtype="float32")
    return plan.count(vla.blip.config, stage0, 2, 4, whole, **changes)


def test_counts_are_the_real_models(tmp_path, backbone):
    """Parameters, theta, bytes and latents on the meta device are those of the weights, whole and with LoRA."""
    for vlm in ("tiny", backbone):
        vla = make_vla(tmp_path, vlm)
        c = counted(vla, not vla.has_lora)
        assert c.parameters == sum(p.numel() for n, p in vla.vlm.named_parameters() if "lora_" not in n)
        assert c.theta == sum(p.numel() for p in vla.theta())
        assert c.weights == sum(p.nbytes for p in vla.parameters())
        assert c.trained == sum(p.nbytes for p in vla.theta() + vla.phi())
        assert (c.tokens, c.width) == vla.encode(torch.zeros(1, 32, 32, 3).byte(), ["push the red bead"])[0].shape[1:]


def test_economies_keep_less(tmp_path):
    """The count sees what --checkpointing, --cache and a frozen VLM save."""
    vla = make_vla(tmp_path)
    plain, thin, cached, head = (
        counted(vla, True, **how) for how in ({}, {"checkpointing": True}, {"cache": True}, {"freeze_vlm": True})
    )
    assert thin.kept < 0.5 * plain.kept and cached.kept < plain.kept and head.kept < cached.kept
    assert cached.both < plain.both < thin.both and head.both < plain.both


def test_plan_says_what_a_run_takes(project):
    """For the default VLM: memory of each stage, disk, speed and time; nothing is written."""
    out = project.must("python", "plan.py", "--domain", "toy", "--rounds", "1", "--run", "runs/planned")
    for said in ("stage 0: weights", "RL: weights", "PPO's rollout", "stage 2: weights", "disk: D_e", "images/s",
                 "decisions/s", "minutes: D_e"):  # fmt: skip
        assert said in out, out
    assert not (project.folder / "runs/planned").exists()


def test_plan_before_the_weights_are_here(project, backbone, tmp_path):
    """A VLM of which there is only the configuration is planned too, by the speed of a matrix product."""
    shutil.copytree(backbone, folder := tmp_path / "vlm", ignore=shutil.ignore_patterns("*.safetensors"))
    out = project.must("python", "plan.py", "--domain", "toy", "--run", "runs/planned", "--vlm", folder)
    assert "its weights are not here" in out and "minutes" in out


def test_what_does_not_fit_is_refused(project, tmp_path, monkeypatch):
    """Memory and disk, in one sentence; the way out that it names is one."""
    command = ["python", "plan.py", "--domain", "toy", "--run", "runs/planned"]
    said = one_sentence(project.run(*command, "--stage0=--batch 5000000"))
    assert "stage 0" in said and "GB" in said
    project.must(*command, f"--stage0=--batch 5000000 {re.search('--accumulate [0-9]+', said)[0]}")
    monkeypatch.chdir(tmp_path)
    assert "--rollout" in refused(plan.story, plan.Args("metaworld", rl="--rollout 50000000"))
    assert "--demos" in refused(plan.story, plan.Args("metaworld", stage0="--demos 500000000"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_would_miss_its_demonstrations_is_refused(tmp_path):
    """With stage 0 done nothing records D_e any more: that is said before RL, with the command that does."""
    make_vla(tmp_path, domain="kitchen").save(tmp_path / "run/0-sft")
    said = refused(plan.story, plan.Args("kitchen", run=str(tmp_path / "run"), data=str(tmp_path / "D_e")))
    assert str(tmp_path / "D_e/kitchen/knob-on") in said and "stage0_sft.py" in said and "--steps 0" in said
