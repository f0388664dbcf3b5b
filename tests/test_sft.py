"""SFT learns its data, from file to environment, and resumes after a kill as if nothing had happened."""

import json
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import command, files, kill, make_vla, one_sentence, warm_python, write_d_e
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.augment import augment, draw_augmentation
from common.episode_file import episode_ids, open_episode
from common.vector_env import run_episodes
from domains import metaworld
from evaluate import greedy
from model import VLA
from stage0_sft import sft_optimizers

ONE = """
from domains.metaworld import *
from domains.metaworld import INSTRUCTIONS
NAME = "one"
EXPERT_TASKS, RL_TASKS, UNSEEN_TASKS = ["button-press"], [], []
INSTRUCTIONS = {"button-press": INSTRUCTIONS["button-press"]}
"""


def test_sft_replays_the_episode_that_it_has_learned(project):
    """One real expert episode, overfitted by stage 0, lets the greedy policy press the same button."""
    (project.folder / "domains/one.py").write_text(ONE)
    out = project.folder / "runs/one/0-sft"
    data = project.folder / "runs/D_e-one"
    flags = {
        "demos": 1,
        "action_noise_std": 0,
        "random_burst_prob": 0,
        "steps": 120,
        "batch": 16,
        "lr": 1e-3,
    }
    flags |= {"augment": False, "episodes": 0, "threads": 1}
    project.must(*command("stage0_sft.py", domain="one", data=data, out=out, **flags))
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.05 < 0.3 < losses[0]  # in units of the actions' variance
    (k,) = episode_ids(data / "one/button-press")
    seed = int(open_episode(data / f"one/button-press/{k:06d}.safetensors")[1]["seed"])
    vla = VLA.load(out)
    (episode,) = run_episodes(vla, metaworld, {"button-press": [seed]}, 1, greedy(vla))
    assert episode["success"] and episode["seed"] == seed


def saved_step(out):
    """Return the step that an unfinished stage has saved, 0 before the first."""
    path = out.with_name(f".{out.name}.partial") / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="np") as f:
        return json.loads(f.metadata()["counters"])["step"]


@pytest.mark.parametrize("stage", ["stage0_sft", "stage_sft"])
def test_killed_sft_resumes_bit_for_bit(stage, project, checkpoint, bead):
    """SIGKILL after a saved state, then the same command: the weights and the log of an undisturbed run."""
    data, runs, steps = project.folder / "runs/D_e-resume", project.folder / "runs" / stage, 60
    common = [
        "--domain",
        "bead",
        "--data",
        data,
        "--batch",
        "8",
        "--episodes",
        "0",
        "--threads",
        "1",
    ]
    first = [
        "python",
        "stage0_sft.py",
        *common,
        "--demos",
        "3",
        "--image-size",
        "32",
        "--dtype",
        "float32",
    ]
    whole = runs / "whole"
    killed = runs / "killed"
    write_d_e(data / "bead", bead)
    words = (
        first
        if stage == "stage0_sft"
        else ["python", "stage_sft.py", *common, "--parent", checkpoint]
    )
    words += ["--steps", steps]
    project.must(*words, "--out", whole)
    process = project.start(*words, "--out", killed, python=warm_python(), SAVE_INTERVAL="0")
    while (step := saved_step(killed)) < 7 and process.poll() is None:
        time.sleep(0.02)
    kill(process, signal.SIGKILL).communicate()
    assert (
        step >= 7 and saved_step(killed) < 50 and not killed.exists()
    )  # it was killed in the middle
    project.must(*words, "--out", killed)
    a, b = files(whole), files(killed)
    assert a["heads.safetensors"] == b["heads.safetensors"]
    assert a["vlm/model.safetensors"] == b["vlm/model.safetensors"]
    log = [[json.loads(line) for line in x["log.jsonl"].splitlines()] for x in (a, b)]
    decided = [[(row["step"], row["lr"], row["grad_norm"]) for row in rows] for rows in log]
    assert decided[0] == decided[1] and len(log[0]) == 2 and log[0][1]["loss"] == log[1][1]["loss"]
    assert not [name for name in b if "tmp" in name or "state" in name]


def bead_stage0(project, bead, name, steps):
    """Return the command of a small stage 0 on the bead, with D_e of its own, and the folder that it writes."""
    data = project.folder / f"runs/D_e-{name}"
    out = project.folder / f"runs/{name}/0-sft"
    write_d_e(data / "bead", bead)
    flags = {"demos": 3, "image_size": 32, "steps": steps, "batch": 8, "episodes": 0, "threads": 1}
    return command("stage0_sft.py", domain="bead", data=data, out=out, **flags), out


def test_nan_loss_stops_sft_and_names_the_way_out(project, bead):
    """A learning rate that explodes ends the stage with one sentence, no finished folder, and a remedy that works."""
    stage0, out = bead_stage0(project, bead, "explodes", steps=20)
    sentence = one_sentence(project.run(*stage0, "--lr", "1e30"))
    assert "nan" in sentence.lower() and "smaller --lr" in sentence and ".0-sft.partial" in sentence
    assert not out.exists()
    project.must(*stage0, "--lr", "1e-4")  # nothing was saved, so nothing has to be deleted


def test_augment_keeps_views_apart_and_changes_each_image_by_its_own_numbers():
    """Views are augmented apart, half of the images keep their colours, and a few patches are hidden.

    Equal numbers make equal images, and two processes change their halves as one process does.
    """
    views = np.zeros((300, 16, 12, 3), np.uint8)
    views[:, 8:] = (200, 100, 50)
    before, drawn = views.copy(), draw_augmentation(300, 2, np.random.default_rng(1))
    zoom, shift, colour, corner, size, patch = drawn
    plain = torch.eye(3).expand_as(colour)
    assert np.array_equal(augment(views, [zoom, shift, plain, corner, 0 * size, patch]), views)
    recoloured = augment(views, [zoom, shift, colour, corner, 0 * size, patch])
    same = (recoloured == views).all((1, 2, 3))
    assert 110 < same.sum() < 190 and (recoloured[:, :8] == 0).all()
    hidden = (
        (augment(views, [zoom, shift, plain, corner, size, patch]) != views).any(-1).mean((1, 2))
    )
    assert 0.005 < hidden.mean() < 0.05 and hidden.max() < 0.2
    out = augment(views, drawn)
    assert np.array_equal(views, before) and out.shape == views.shape and out.dtype == np.uint8
    for rank in range(2):
        share = draw_augmentation(300, 2, np.random.default_rng(1), rank, 2)
        assert np.array_equal(augment(views[rank::2], share), out[rank::2])


def test_augment_stretches_about_the_middle():
    """A ramp of brightness gets steeper or flatter by exp(zoom). Its middle moves by the shift alone."""
    ramp = np.tile(np.arange(40, 72, dtype=np.uint8)[None, None, :, None], (64, 16, 1, 3))
    zoom, shift, colour, corner, size, patch = draw_augmentation(64, 1, np.random.default_rng(2))
    out = augment(ramp, [zoom, shift, torch.eye(3).expand_as(colour), corner, 0 * size, patch])[
        :, 8, 8:24, 0
    ].astype(float)
    steep = (out[:, -1] - out[:, 0]) / 15
    assert np.corrcoef(steep, zoom[:, 0, 0].exp())[0, 1] > 0.9
    middle = out.mean(1) - 55.5
    assert np.corrcoef(middle, shift[:, 0, 0])[0, 1] > 0.9


@pytest.mark.parametrize("stage", ["stage0_sft", "stage_sft"])
def test_two_processes_train_as_one_does(project, checkpoint, bead, stage):
    """torchrun with two gloo processes: one process's loss curve and weights with the same global batch, to rounding.

    The same holds if they are stopped and one process resumes.
    """
    runs, data = project.folder / f"runs/ranks-{stage}", project.folder / f"runs/D_e-ranks-{stage}"
    common = [
        "--domain",
        "bead",
        "--data",
        data,
        "--batch",
        "16",
        "--episodes",
        "0",
        "--threads",
        "1",
        "--steps",
        "12",
    ]
    write_d_e(data / "bead", bead)
    first = ["stage0_sft.py", *common, "--demos", "3", "--image-size", "32", "--dtype", "float32"]
    command = first if stage == "stage0_sft" else ["stage_sft.py", *common, "--parent", checkpoint]
    run = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two, warm = [*run, *command], [*run, "--no-python", warm_python(), *command]
    project.must("python", *command, "--out", runs / "one")
    project.must(*warm, "--out", runs / "two")
    process = project.start(*two, "--out", runs / "resumed", SAVE_INTERVAL="0")
    while saved_step(runs / "resumed") < 3 and process.poll() is None:
        time.sleep(0.02)
    kill(process, signal.SIGTERM).wait()  # after SIGKILL torchrun's processes would go on
    assert 3 <= saved_step(runs / "resumed") < 12 and not (runs / "resumed").exists()
    project.must("python", *command, "--out", runs / "resumed")
    log, heads = {}, {}
    for name in ("one", "two", "resumed"):
        log[name] = [
            json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()
        ]
        heads[name] = load_file(runs / name / "heads.safetensors")
    for name in ("two", "resumed"):
        assert [row["step"] for row in log[name]] == [row["step"] for row in log["one"]] and log[
            name
        ]
        if name == "two":  # the other one's line covers the steps since it resumed
            np.testing.assert_allclose(log[name][0]["loss"], log["one"][0]["loss"], rtol=1e-3)
        for key, value in heads["one"].items():
            torch.testing.assert_close(heads[name][key], value, atol=5e-3, rtol=5e-2)


def test_stage_2_records_missing_expert_data(project, checkpoint):
    """A stage 0 from elsewhere (loop.sh's START) comes without D_e. Stage 2 then records it."""
    data = project.folder / "runs/D_e-elsewhere"
    out = project.folder / "runs/elsewhere/1-sft"
    project.must(
        "python", "stage_sft.py", "--parent", checkpoint, "--out", out, "--data", data, "--demos", "2",
        "--steps", "1", "--batch", "8", "--episodes", "0",
    )  # fmt: skip
    recorded = {folder.name: len(episode_ids(folder)) for folder in (data / "bead").iterdir()}
    assert recorded and set(recorded.values()) == {2}


def test_muon_trains_the_matrices_of_a_whole_vlm(tmp_path):
    """Its updates are orthogonal. Embeddings, vectors and the head's last layer stay with AdamW, and so does LoRA."""
    vla = make_vla(tmp_path)
    trained = vla.theta() + vla.phi()
    optimizers = sft_optimizers(vla, trained, 0.0)
    muon, adamw = (optimizers[name].param_groups[0]["params"] for name in ("muon", "adamw"))
    assert len(muon) + len(adamw) == len(trained) and {p.ndim for p in muon} == {2}
    embedding = vla.blip.get_input_embeddings().weight
    for p in (embedding, vla.head.mlp[-1].weight):
        assert any(p is q for q in adamw)
    before = [p.detach().clone() for p in muon]
    for p in muon:
        p.grad = torch.randn_like(p)
    optimizers["muon"].param_groups[0]["lr"] = 1.0
    optimizers["muon"].step()
    for old, p in zip(before, muon):
        moved = torch.linalg.svdvals((p - old).detach()) / (0.2 * max(p.shape) ** 0.5)
        assert moved.quantile(0.1) > 0.5 and moved.max() < 1.4  # but the smallest few
    vla.add_lora(4)
    assert set(sft_optimizers(vla, vla.theta() + vla.phi(), 0.0)) == {"adamw"}


def test_muon_leaves_out_what_a_t5_calls_shared(t5_backbone, tmp_path):
    """A T5's word embedding, its positions' and its output layer have names of their own."""
    vla = make_vla(tmp_path, t5_backbone, theta="whole")
    muon = sft_optimizers(vla, vla.theta() + vla.phi(), 0.0)["muon"].param_groups[0]["params"]
    names = [name for name, p in vla.named_parameters() if any(p is q for q in muon)]
    assert any("EncDecAttention" in name for name in names)
    assert not [n for n in names if re.search("shared|relative_attention_bias|lm_head", n)]


def test_a_state_of_another_optimizer_is_refused(project, bead):
    """A stage that an older version began, with AdamW alone, is refused and stays as it is."""
    stage0, out = bead_stage0(project, bead, "older", steps=2000)
    process = project.start(*stage0, python=warm_python(), SAVE_INTERVAL="0")
    while saved_step(out) < 1 and process.poll() is None:
        time.sleep(0.02)
    kill(process, signal.SIGKILL).communicate()
    state = out.with_name(".0-sft.partial") / "state.safetensors"
    with safe_open(state, framework="pt") as f:
        metadata = f.metadata()
    tensors = {n: t for n, t in load_file(state).items() if not n.startswith("muon.")}
    save_file(tensors, state, metadata)
    older = state.read_bytes()
    sentence = one_sentence(project.run(*stage0))
    assert "another version's optimizer" in sentence and ".0-sft.partial" in sentence
    assert state.read_bytes() == older
