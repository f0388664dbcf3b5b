"""What a large pre-trained VLM needs: frozen outputs computed once, smaller parts of a batch, memory that is known."""

import json

import numpy as np
import pytest
import torch
from conftest import make_vla, refused, warm_python, write_d_e
from safetensors.torch import load_file, save_file
from test_model import randomise

import data
from data import write_episode
from model import VLA, freeze
from run import Stage
from stage0_sft import Args, sft_gradient

ARGS = dict(lora_targets="language", dtype="bfloat16")


def frozen_vla(folder, backbone, **changes):
    """A VLA as the SFT stages train it: LoRA that does something, all else frozen."""
    torch.manual_seed(0)
    vla = make_vla(folder, backbone, **{**ARGS, **changes})
    freeze(vla.parameters())
    freeze(vla.theta() + vla.phi(), False)
    randomise(vla.theta())
    return vla


@pytest.fixture
def counted(monkeypatch):
    """Counts the images that pass the image side."""
    seen, image_tokens = [], VLA.image_tokens
    monkeypatch.setattr(VLA, "image_tokens", lambda vla, x: (seen.extend([1] * len(x)), image_tokens(vla, x))[1])
    return lambda: [len(seen), seen.clear()][0]


def test_cache_gives_the_same_latents_and_is_made_once(backbone, tmp_path, toy, counted):
    """The latents of cached images are those of the images; a second stage, from the checkpoint, computes only the
    sample that it checks; a damaged file and one of an episode recorded anew are made again."""
    vla, episodes = frozen_vla(tmp_path / "vla", backbone), write_d_e(tmp_path / "D_e", toy)
    plain, cached = episodes(), episodes()
    cached.cache(vla)
    assert counted() == len(plain) == 30
    images, sentences, action = plain.batch(np.random.default_rng(1), 16)
    tokens, *same = cached.batch(np.random.default_rng(1), 16)
    assert tokens.dtype == torch.bfloat16 and same[0] == sentences and np.array_equal(same[1], action)
    with torch.no_grad():
        want, mask = vla.encode(images, sentences)
        h, _ = vla.language(tokens, sentences)
        torch.testing.assert_close(h[mask], want[mask], atol=0.05, rtol=0.05)
        assert (h - want)[mask].float().norm() < 0.01 * want[mask].float().norm()
        torch.testing.assert_close(vla(tokens, sentences), vla(images, sentences), atol=0.02, rtol=0.02)

    vla.save(tmp_path / "0-sft")
    vla = VLA.load(tmp_path / "0-sft")
    freeze(vla.image_side().values())
    files = sorted((tmp_path / "D_e").glob("*/.tokens-*/*"))
    assert len(files) == 6
    (counted(), episodes().cache(vla))
    assert counted() <= 8
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-9])
    episode = load_file(path := files[4].parent.parent / files[4].name)
    (counted(), episodes().cache(vla))
    assert 5 <= counted() <= 8 + 5 and files[2].read_bytes() == whole
    write_episode(
        path, 255 - episode["image"], episode["action"], episode["reward"], domain="toy", task="green",
        instruction=toy.INSTRUCTIONS["green"], source="expert", seed=0, protocol=toy.PROTOCOL,
    )  # fmt: skip
    before = load_file(files[4])["q"]
    episodes().cache(vla)
    assert (load_file(files[4])["q"] - before).abs().max() > 0.1


def test_cache_is_never_of_another_vlm(backbone, tmp_path, toy):
    """Other weights use another folder; files that say something else, and LoRA in what is cached, are refused."""
    vla, episodes = frozen_vla(tmp_path / "vla", backbone), write_d_e(tmp_path / "D_e", toy)
    episodes().cache(vla)
    first, *_ = sorted(tmp_path.glob("D_e/red/.tokens-*/*"))
    with torch.no_grad():
        vla.image_side()["qformer.layernorm.weight"].mul_(1.5)
    episodes().cache(vla)
    assert len(list(tmp_path.glob("D_e/red/.tokens-*"))) == 2
    for path in tmp_path.glob("D_e/*/.tokens-*/*"):  # as if another had written them under this key
        with data.safe_open(path, "pt") as f:
            about = f.metadata()
        save_file({"q": load_file(path)["q"].roll(1, 1)}, path, about)
    said = refused(episodes().cache, vla)
    assert ".tokens-" in said and "delete" in said
    said = refused(episodes().cache, frozen_vla(tmp_path / "all", backbone, lora_targets="all"))
    assert "--lora-targets language" in said


@pytest.mark.parametrize("accumulate", [3, 8, 100])
def test_parts_of_a_batch_have_its_gradient(backbone, tmp_path, accumulate):
    """Any number of parts, unequal ones too, gives one batch's loss and gradient."""
    vla = frozen_vla(tmp_path, backbone, dtype="float32")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    batch = images, ["push", "push the red bead"] * 4, torch.rand(8, 2), vla.action_std
    want, loss = gradient(vla, *batch)
    parts, same = gradient(vla, *batch, accumulate)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(parts, want, atol=1e-5, rtol=1e-4)


def gradient(vla, *arguments):
    trained = vla.theta() + vla.phi()
    for p in trained:
        p.grad = None
    loss = sft_gradient(vla, *arguments)
    return [p.grad.clone() for p in trained if p.grad is not None], loss


@pytest.mark.parametrize("lora_targets", ["language", "all"])
def test_checkpointing_keeps_less_and_changes_nothing(backbone, tmp_path, lora_targets):
    """The loss and the gradient are the same; what the forward pass keeps for the backward pass is a fraction."""
    vla = frozen_vla(tmp_path, backbone, lora_targets=lora_targets)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch, kept = (images, ["push", "push the red bead"] * 2, torch.rand(4, 2), vla.action_std), {}

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
    vla.checkpoint_layers()
    grads, same, little = run()
    assert len(want) == len(grads) > 20 and torch.equal(same, loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, want))
    assert little < 0.5 * much


def test_frozen_weights_are_bfloat16_and_lora_float32(backbone, tmp_path):
    """A pre-trained VLM in bfloat16: created, and loaded for stage 1, its frozen weights are bfloat16, the only copy;
    what is trained is float32."""
    vla = make_vla(tmp_path, backbone, **ARGS)
    vla.save(tmp_path / "saved")
    for v in (vla, VLA.load(tmp_path / "saved")):
        trained = {id(p) for p in v.theta() + v.phi()}
        assert {p.dtype for p in v.theta() + v.phi()} == {torch.float32}
        assert {p.dtype for p in v.vlm.parameters() if id(p) not in trained} == {torch.bfloat16}
        frozen = sum(p.numel() for p in v.vlm.parameters() if id(p) not in trained)
        assert frozen == sum(p.numel() for p in make_vla(tmp_path, backbone).vlm.parameters() if not p.requires_grad)


def test_torchrun_caches_accumulates_and_checkpoints(backbone, project, toy):
    """Two processes with all three flags: loss and gradient of one that has but the cache, to rounding. Stage 2 goes on
    with the same files."""
    runs, root = project.folder / "runs/economy", project.folder / "runs/D_e-economy"
    write_d_e(root / "toy", toy)
    command = [
        "stage0_sft.py", "--domain", "toy", "--data", root, "--demos", "3", "--image-size", "32", "--batch", "16",
        "--steps", "8", "--episodes", "0", "--threads", "1", "--vlm", backbone, "--lora-targets", "language",
        "--dtype", "float32", "--cache", "--lr", "1e-2",
    ]  # fmt: skip
    two = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    project.must(*two, warm_python(), *command, "--out", runs / "two", "--accumulate", "3", "--checkpointing")
    assert len(list(root.glob("toy/*/.tokens-*/*.safetensors"))) == 6
    project.must("python", *command, "--out", runs / "one")
    one, other = (json.loads((runs / name / "log.jsonl").read_text()) for name in ("one", "two"))
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-3)  # of the 8 steps
    np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-2)  # of the last
    project.must(
        "python", "stage_sft.py", "--domain", "toy", "--data", root, "--parent", runs / "two", "--out", runs / "1-sft",
        "--batch", "16", "--steps", "2", "--episodes", "0", "--threads", "1", "--cache", "--accumulate", "2",
        "--checkpointing",
    )  # fmt: skip
    assert len(list(root.glob("toy/*/.tokens-*/*.safetensors"))) == 6


def test_memory_flags_may_change_when_a_stage_goes_on(tmp_path):
    """A stage that ran out of memory goes on with --accumulate; one from before --cache existed goes on without it."""
    out = str(tmp_path / "0-sft")
    Stage(Args("toy", out)).save({}, {})
    record = tmp_path / ".0-sft.partial/stage.json"
    value = json.loads(record.read_text())
    del value["args"]["cache"]
    record.write_text(json.dumps(value))
    Stage(Args("toy", out, accumulate=8, checkpointing=True))
    assert "cache" in refused(Stage, Args("toy", out, cache=True))


@pytest.mark.parametrize(
    "algo, large, remedies",
    [
        ("ppo", ["--rollout", "2000000000"], ["--rollout", "--envs"]),
        ("sacfd", ["--env-steps", "2000000000", "--sacfd.demos", "0"], ["--env-steps"]),
    ],
)
def test_latents_that_do_not_fit_are_refused(project, checkpoint, algo, large, remedies):
    """One sentence says how large the stored latents would be, and what to make smaller."""
    code, _, err = project.run(
        "python", "stage_rl.py", "--domain", "toy", "--task", "blue", "--parent", checkpoint, "--envs", "1",
        "--out", project.folder / f"runs/large-{algo}/1-rl", "--algo", algo, *large,
    )  # fmt: skip
    assert code == 1 and "Traceback" not in err
    said = err.splitlines()[-1]
    assert "GB" in said and all(flag in said for flag in remedies)
