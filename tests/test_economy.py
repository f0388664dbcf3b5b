"""For a large pre-trained VLM: frozen outputs computed once, smaller parts of a batch, memory that is known."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    episode_info,
    make_vla,
    one_sentence,
    randomise,
    refused,
    warm_python,
    write_d_e,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.episode_file import write_episode
from common.runs import Stage
from common.token_cache import use_token_cache, vision_weights
from model import VLA, set_trainable
from stage0_sft import Args, BatchWorkers, sft_gradient

ARGS = dict(lora_targets="language", dtype="bfloat16")


def frozen_vla(folder, backbone, **changes):
    """Return a VLA as the SFT stages train it: LoRA that does something, all else frozen."""
    torch.manual_seed(0)
    vla = make_vla(folder, backbone, **{**ARGS, **changes})
    set_trainable(vla.parameters(), False)
    set_trainable(vla.theta() + vla.phi(), True)
    randomise(vla.theta())
    return vla


@pytest.fixture
def counted(monkeypatch):
    """A function that returns the number of images that have passed the vision side since its last call."""
    seen = []
    image_tokens = VLA.image_tokens

    def counting(vla, images):
        seen.extend(images)
        return image_tokens(vla, images)

    def count():
        n = len(seen)
        seen.clear()
        return n

    monkeypatch.setattr(VLA, "image_tokens", counting)
    return count


def cache(dataset, vla):
    """Use the token cache for a data set, and return the data set."""
    use_token_cache(dataset, vla)
    return dataset


def test_cache_gives_the_same_latents_and_is_made_once(backbone, tmp_path, bead, counted):
    """The latents of cached images equal those of the images, and are computed once.

    A second stage, from the checkpoint, computes only the sample that it checks. A damaged file, and one of an episode
    that was recorded again, are replaced.
    """
    vla = frozen_vla(tmp_path / "vla", backbone)
    episodes = write_d_e(tmp_path / "D_e", bead)
    plain = episodes()
    cached = cache(episodes(), vla)
    assert counted() == len(plain) == 30
    images, instructions, action = plain.batch(np.random.default_rng(1), 16)
    tokens, *same = cached.batch(np.random.default_rng(1), 16)
    assert (
        tokens.dtype == torch.bfloat16
        and same[0] == instructions
        and np.array_equal(same[1], action)
    )
    with torch.no_grad():
        want, mask = vla.encode(images, instructions)
        h, _ = vla.language(tokens, instructions)
        torch.testing.assert_close(h[mask], want[mask], atol=0.05, rtol=0.05)
        assert (h - want)[mask].float().norm() < 0.01 * want[mask].float().norm()
        torch.testing.assert_close(
            vla(tokens, instructions), vla(images, instructions), atol=0.02, rtol=0.02
        )

    vla.save(tmp_path / "0-sft")
    vla = VLA.load(tmp_path / "0-sft")
    set_trainable(vision_weights(vla).values(), False)
    files = sorted((tmp_path / "D_e").glob("*/.tokens-*/*"))
    assert len(files) == 6
    counted()
    cache(episodes(), vla)
    assert counted() <= 8
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-9])
    path = files[4].parent.parent / files[4].name
    episode = load_file(path)
    counted()
    cache(episodes(), vla)
    assert 5 <= counted() <= 8 + 5 and files[2].read_bytes() == whole
    write_episode(
        path,
        255 - episode["image"],
        episode["action"],
        episode["reward"],
        episode_info(path.parent.name),
    )
    before = load_file(files[4])["q"]
    cache(episodes(), vla)
    assert (load_file(files[4])["q"] - before).abs().max() > 0.1


def test_cache_is_never_of_another_vlm(backbone, tmp_path, bead):
    """Other weights use another folder. Files of other tokens, and LoRA in the vision side, are refused."""
    vla = frozen_vla(tmp_path / "vla", backbone)
    episodes = write_d_e(tmp_path / "D_e", bead)
    cache(episodes(), vla)
    with torch.no_grad():
        vision_weights(vla)["qformer.layernorm.weight"].mul_(1.5)
    cache(episodes(), vla)
    assert len(list(tmp_path.glob("D_e/red/.tokens-*"))) == 2
    for path in tmp_path.glob("D_e/*/.tokens-*/*"):  # as if another had written them under this key
        with safe_open(path, "pt") as f:
            about = f.metadata()
        save_file({"q": load_file(path)["q"].roll(1, 1)}, path, about)
    sentence = refused(cache, episodes(), vla)
    assert ".tokens-" in sentence and "delete" in sentence
    sentence = refused(
        cache, episodes(), frozen_vla(tmp_path / "all", backbone, lora_targets="all")
    )
    assert "--lora-targets language" in sentence


@pytest.mark.parametrize("accumulate", [3, 8, 100])
def test_parts_of_a_batch_have_its_gradient(backbone, tmp_path, accumulate):
    """Any number of parts, unequal ones too, has one batch's loss and gradient."""
    vla = frozen_vla(tmp_path, backbone, dtype="float32")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    batch = images, ["push", "push the red bead"] * 4, torch.rand(8, 2), vla.theta() + vla.phi()
    want, loss = gradient(vla, *batch)
    parts, same = gradient(vla, *batch, accumulate)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(parts, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threads, shares", [(1, 1), (2, 2), (3, 2), (16, 4)])
def test_threads_that_share_a_batch_have_its_gradient(backbone, tmp_path, threads, shares):
    """The shares are equal, so their mean is the batch's. Their number is limited, and divides the batch."""
    vla = frozen_vla(tmp_path, backbone, dtype="float32")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    texts = ["push", "push the red bead"] * 4
    action = torch.rand(8, 2)
    trained = vla.theta() + vla.phi()
    workers = BatchWorkers(threads, len(action), vla)
    assert workers.num == shares

    def share(k):
        mine = slice(k, None, workers.num)
        return sft_gradient(vla, images[mine], texts[mine], action[mine], trained)

    loss, gradient = workers.mean(share)
    want_loss, want = sft_gradient(vla, images, texts, action, trained)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


def gradient(vla, *arguments):
    loss, grads = sft_gradient(vla, *arguments)
    return grads, loss


@pytest.mark.parametrize("lora_targets", ["language", "all"])
def test_checkpointing_keeps_less_and_changes_nothing(backbone, tmp_path, lora_targets):
    """Loss and gradient are the same. The forward pass keeps a fraction of the memory for the backward pass."""
    vla = frozen_vla(tmp_path, backbone, lora_targets=lora_targets)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch, kept = (
        (images, ["push", "push the red bead"] * 2, torch.rand(4, 2), vla.theta() + vla.phi()),
        {},
    )

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def run():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            grads, loss = gradient(vla, *batch)
        weights = {p.untyped_storage().data_ptr() for p in vla.parameters()}
        return grads, loss, sum(size for place, size in kept.items() if place not in weights)

    want, loss, much = run()
    vla.enable_gradient_checkpointing()
    grads, same, little = run()
    assert len(want) == len(grads) > 20 and torch.equal(same, loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, want))
    assert little < 0.5 * much


def test_frozen_weights_are_bfloat16_and_lora_float32(backbone, tmp_path):
    """A pre-trained VLM in bfloat16: frozen weights are bfloat16, the only copy, and trained ones are float32.

    This holds if it is created, and if it is loaded for stage 1.
    """
    vla = make_vla(tmp_path, backbone, **ARGS)
    vla.save(tmp_path / "saved")
    for v in (vla, VLA.load(tmp_path / "saved")):
        trained = {id(p) for p in v.theta() + v.phi()}
        assert {p.dtype for p in v.theta() + v.phi()} == {torch.float32}
        assert {p.dtype for p in v.vlm.parameters() if id(p) not in trained} == {torch.bfloat16}
        frozen = sum(p.numel() for p in v.vlm.parameters() if id(p) not in trained)
        assert frozen == sum(
            p.numel() for p in make_vla(tmp_path, backbone).vlm.parameters() if not p.requires_grad
        )


def test_torchrun_caches_accumulates_and_checkpoints(backbone, project, bead):
    """Two processes with all three flags: loss and gradient of one process that only caches, to rounding.

    Stage 2 uses the same files.
    """
    runs, root = project.folder / "runs/economy", project.folder / "runs/D_e-economy"
    write_d_e(root / "bead", bead)
    command = [
        "stage0_sft.py", "--domain", "bead", "--data", root, "--demos", "3", "--image-size", "32", "--batch", "16",
        "--steps", "8", "--episodes", "0", "--threads", "1", "--vlm", backbone, "--lora-targets", "language",
        "--dtype", "float32", "--cache", "--lr", "1e-2",
    ]  # fmt: skip
    two = [
        "python",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
    ]
    project.must(
        *two, warm_python(), *command, "--out", runs / "two", "--accumulate", "3", "--checkpointing"
    )
    assert len(list(root.glob("bead/*/.tokens-*/*.safetensors"))) == 6
    project.must("python", *command, "--out", runs / "one")
    one, other = (json.loads((runs / name / "log.jsonl").read_text()) for name in ("one", "two"))
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-3)  # of the 8 steps
    np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-2)  # of the last
    project.must(
        "python", "stage_sft.py", "--domain", "bead", "--data", root, "--parent", runs / "two", "--out", runs / "1-sft",
        "--batch", "16", "--steps", "2", "--episodes", "0", "--threads", "1", "--cache", "--accumulate", "2",
        "--checkpointing",
    )  # fmt: skip
    assert len(list(root.glob("bead/*/.tokens-*/*.safetensors"))) == 6


def test_memory_flags_may_change_when_a_stage_resumes(tmp_path):
    """A stage that ran out of memory resumes with --accumulate. One from before --cache existed resumes without it."""
    out = str(tmp_path / "0-sft")
    Stage(Args("bead", out)).save({}, {})
    record = tmp_path / ".0-sft.partial/stage.json"
    value = json.loads(record.read_text())
    del value["args"]["cache"]
    record.write_text(json.dumps(value))
    Stage(Args("bead", out, accumulate=8, checkpointing=True))
    assert "cache" in refused(Stage, Args("bead", out, cache=True))


@pytest.mark.parametrize(
    "algo, large, remedies",
    [
        ("ppo", ["--rollout", "2000000000"], ["--rollout", "--envs"]),
        ("sacfd", ["--env-steps", "2000000000", "--sacfd.num-demos", "0"], ["--env-steps"]),
    ],
)
def test_latents_that_do_not_fit_are_refused(project, checkpoint, algo, large, remedies):
    """One sentence names the size of the stored latents and the flags that reduce it."""
    result = project.run(
        "python", "stage_rl.py", "--domain", "bead", "--task", "blue", "--parent", checkpoint, "--envs", "1",
        "--out", project.folder / f"runs/large-{algo}/1-rl", "--algo", algo, *large,
    )  # fmt: skip
    sentence = one_sentence(result)
    assert "GB" in sentence and all(flag in sentence for flag in remedies)
