"""The VLA's parts equal their definitions, and a checkpoint holds all of it."""

import json
import re

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import make_vla, randomise, refused
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import Blip2ForConditionalGeneration, Blip2Processor, PreTrainedTokenizerFast

from model import VLA, TokenLearner
from report import model_card

INSTRUCTIONS = ["push the red bead", "push", "push the red bead", "push the blue"]


def random_images(size, n=4):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def hf_inputs(vla, images):
    """Return the output of HF's own BLIP-2 processor on the images and INSTRUCTIONS."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=vla.tokenizer.backend_tokenizer, pad_token="<pad>"
    )
    processor = Blip2Processor(
        vla.image_processor, words, num_query_tokens=vla.blip.config.num_query_tokens
    )
    return processor(images=list(images), text=INSTRUCTIONS, padding=True, return_tensors="pt")


@pytest.fixture(params=["whole", "lora on a given VLM", "lora on an own VLM"])
def vla_and_save(request, tmp_path, backbone):
    """A VLA of each kind, and a function that writes its checkpoint."""
    torch.manual_seed(0)
    vla = make_vla(tmp_path / "parent", backbone if "given" in request.param else "tiny")
    if "own" in request.param:
        vla.save(tmp_path / "parent")
        vla.add_lora(4)
    randomise([*vla.theta(), *vla.phi(), vla.log_std])
    vla.action_mean.normal_()
    vla.action_std.uniform_(0.1, 0.3)

    def save():
        vla.save(tmp_path / "child", parent=tmp_path / "parent" if "own" in request.param else None)
        return tmp_path / "child"

    return vla, save


@pytest.mark.parametrize("dim, heads", [(128, 4), (24, 3)])
def test_token_learner_is_multi_head_attention_pooling(dim, heads):
    """The cheap order of multiplications in TokenLearner equals torch's own multi-head attention."""
    torch.manual_seed(0)
    learner = TokenLearner(dim, heads)
    for p in learner.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    h = torch.randn(5, 11, dim) * 3 + 1
    mask = torch.arange(11) < torch.tensor([11, 4, 1, 7, 9])[:, None]
    attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
    attention.in_proj_weight.data = torch.cat(
        [learner.q.weight, learner.k.weight, learner.v.weight]
    )
    attention.in_proj_bias.data = torch.cat([learner.q.bias, torch.zeros(dim), learner.v.bias])
    attention.out_proj.load_state_dict(learner.o.state_dict())
    with torch.no_grad():
        pooled = attention(learner.seed.expand(5, 1, dim), h, h, key_padding_mask=~mask)[0][:, 0]
        x = learner.norm_att(learner.seed + pooled)
        torch.testing.assert_close(
            learner(h, mask), learner.norm_out(x + learner.ff(x)), atol=1e-5, rtol=1e-5
        )


def test_padding_never_changes_an_action():
    """Masked rows of the latents do not reach the output, however large they are."""
    torch.manual_seed(0)
    learner, h, mask = (
        TokenLearner(32),
        torch.randn(2, 6, 32),
        torch.tensor([[True] * 6, [True] * 3 + [False] * 3]),
    )
    other = h.clone()
    other[1, 3:] = 1e4
    assert torch.equal(learner(h, mask), learner(other, mask))
    assert torch.allclose(learner(h[1:, :3], mask[1:, :3]), learner(h, mask)[1:], atol=1e-6)


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_encode_equals_blip2_forward(language_model, backbone, t5_backbone, tmp_path):
    """`encode` returns the last hidden state of HF's own forward on a padded batch of HF's own processor."""
    torch.manual_seed(0)
    folder = {"opt": backbone, "t5": t5_backbone}[language_model]
    hf = Blip2ForConditionalGeneration.from_pretrained(folder)
    vla = make_vla(tmp_path, folder)
    if language_model == "t5":
        adapted = [n for n, m in vla.vlm.named_modules() if isinstance(m, LoraLayer)]
        assert (
            sum("language_model" in n for n in adapted) == 2 * (6 + 10) < len(adapted)
        )  # q k v o wi wo
    hf.eval()
    images = random_images(32)
    inputs = hf_inputs(vla, images)
    assert inputs.attention_mask.sum(1).unique().numel() > 1  # a ragged batch
    more = (
        {"decoder_input_ids": torch.zeros(4, 1, dtype=torch.long)} if language_model == "t5" else {}
    )
    with torch.no_grad():
        out = hf(**inputs, **more, output_hidden_states=True).language_model_outputs
        want = out.encoder_last_hidden_state if language_model == "t5" else out.hidden_states[-1]
        h, mask = vla.encode(images, INSTRUCTIONS)
    assert torch.equal(mask, inputs.attention_mask.bool())
    torch.testing.assert_close(h[mask], want[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("height, width", [(32, 32), (84, 84), (48, 80), (20, 24)])
def test_preprocess_equals_hf(height, width, backbone, tmp_path):
    """Batched preprocessing equals HF's: exactly at the VLM's size, within two grey levels of 255 if resized."""
    vla = make_vla(tmp_path, backbone)
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    images[0] = np.linspace(0, 255, width)[None, :, None]
    want = vla.image_processor(images=list(images), return_tensors="pt").pixel_values
    level = 0.01 if (height, width) == (32, 32) else 2.01
    error = (vla.preprocess(images) - want).abs() * 255 * vla.image_std
    assert vla.preprocess(images).shape == want.shape == (3, 3, 32, 32)
    assert error.max() <= level


def test_checkpoint_acts_as_what_was_saved(vla_and_save):
    """save, load: the same action bit for bit, the same trainable weights, and the same exploration."""
    vla, save = vla_and_save
    loaded = VLA.load(save())
    with torch.no_grad():
        before, after = (v.mean(*v.encode(random_images(32), INSTRUCTIONS)) for v in (vla, loaded))
    assert torch.equal(before, after)
    assert torch.equal(vla.log_std, loaded.log_std)
    assert [p.shape for p in loaded.theta()] == [p.shape for p in vla.theta()]
    assert all(
        torch.equal(a, b)
        for a, b in zip(vla.theta() + vla.phi(), loaded.theta() + loaded.phi(), strict=True)
    )
    assert all(p.requires_grad for p in loaded.theta() + loaded.phi())


def test_checkpoint_from_the_hub(checkpoint, tmp_path, monkeypatch):
    """A hub name instead of a folder is downloaded. A path is never asked of the hub."""
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(checkpoint)
    )
    monkeypatch.chdir(tmp_path)
    assert VLA.load("user/name", "bead").config == VLA.load(checkpoint).config and asked == [
        "user/name"
    ]
    (tmp_path / "runs").mkdir()
    for path in ("runs/0-sft", tmp_path / "0-sft", "0-sft", "../a/b"):
        refused(VLA.load, path)
    assert asked == ["user/name"]

    def offline(name):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "no network" in refused(VLA.load, "user/name")


def test_model_card(vla_and_save, tmp_path, monkeypatch):
    """The hub's own parser reads the card, and its Python code runs on the saved checkpoint."""
    vla, save = vla_and_save
    text = model_card(save(), "| stage | expert |")
    card = huggingface_hub.ModelCard(text)
    assert (
        card.data.library_name == ("peft" if vla.has_lora else "transformers")
        and card.data.license == "mit"
    )
    assert (
        card.data.base_model is None
        and "ire-vla" in card.data.tags
        and "| stage | expert |" in card.text
    )
    monkeypatch.chdir(tmp_path)
    names = {"images": random_images(32), "instructions": INSTRUCTIONS}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, names)
    assert names["action"].shape == (4, 2) and not names["action"].requires_grad
    assert type(names["vlm"]).__name__.startswith("Peft") is vla.has_lora
    config = json.loads((tmp_path / "child/config.json").read_text()) | {
        "vlm": "Salesforce/blip2-opt-2.7b"
    }
    (tmp_path / "child/config.json").write_text(json.dumps(config))
    assert (
        huggingface_hub.ModelCard(model_card(tmp_path / "child", "")).data.base_model
        == config["vlm"]
    )


def test_peft_reads_the_adapter(backbone, tmp_path):
    """PEFT's own loader, on the bare backbone, gets the same latents as the checkpoint."""
    torch.manual_seed(0)
    vla = make_vla(tmp_path, backbone)
    bare = vla.encode(random_images(32), INSTRUCTIONS)[0].detach()
    randomise(vla.theta())
    vla.save(tmp_path / "saved")
    hf = PeftModel.from_pretrained(
        Blip2ForConditionalGeneration.from_pretrained(backbone), tmp_path / "saved"
    ).eval()
    inputs = hf_inputs(vla, random_images(32))
    with torch.no_grad():
        want = hf(**inputs, output_hidden_states=True).language_model_outputs.hidden_states[-1]
        h, mask = vla.encode(random_images(32), INSTRUCTIONS)
    torch.testing.assert_close(h[mask], want[mask], atol=1e-4, rtol=1e-4)
    assert (h - bare)[mask].abs().max() > 0.01  # the adapter did something


def test_tiny_knows_every_word(tmp_path):
    """Instructions that differ in one word have different tokens, with hyphens, apostrophes and full stops too."""
    left, right = "the left-most robot's cube.", "the right-most robot's cube."
    vla = make_vla(tmp_path, words=[left, right])
    (a, b), mask = vla.tokenize([left, right])
    assert (
        mask.all()
        and vla.tokenizer.unk_token_id not in [*a.tolist(), *b.tolist()]
        and a.tolist() != b.tolist()
    )


def test_ids_are_integers_and_images_are_bytes(tmp_path):
    """An empty instruction, alone or in the first row, has ids that are integers. Float images are refused."""
    vla = make_vla(tmp_path)
    images = random_images(32, 2)
    for instructions in ([""], ["", "push"], ["push", ""]):
        ids, mask = vla.tokenize(instructions)
        assert ids.dtype == torch.long and mask.sum(1).tolist() == [
            int(bool(text)) for text in instructions
        ]
        h, _ = vla.encode(images[: len(instructions)], instructions)
        assert torch.isfinite(h).all()
    for wrong in (images / 255, torch.from_numpy(images).float(), images.astype(np.int64)):
        with pytest.raises(ValueError, match="uint8"):
            vla.encode(wrong, ["push"] * 2)
