"""
The vision-language-action model (paper Sec. IV-A), and its checkpoints.

       image o ──> vision tower ──> Q-Former ─┐
                                              ├─> language model ──> h (M, D) ──> token learner ──> h' (D) ──> MLP ──> a
  instruction l ──> token embedding ──────────┘    "latents"        (attention       └── the action head, phi ──┘
                        theta (LoRA)                                  pooling)

    theta   LoRA weights of the VLM; trained in stages 0 and 2, frozen in stage 1
    phi     token learner + MLP; trained in every stage
    critic  the action head's shape with one output; new in every stage 1, never part of a checkpoint

`encode` is everything before the action head. Stage 1 freezes it, so each image passes it once and
only h is kept. `image_tokens` is the part of `encode` before the language model. With LoRA in the
language model alone, no stage changes it, and the SFT stages' `--cache` keeps its outputs on disk
(common/token_cache.py).

Where the paper is silent or this differs from it:
1) Language model: any BLIP-2. The paper's 3B is taken to be Salesforce/blip2-opt-2.7b, a decoder
   whose "final fully connected layer" can be replaced.
2) Token learner: PMA with one seed (Set Transformer 1810.00825, the paper's reference), written so
   that its cost is linear in D for each of the M tokens. The inner rFF on h is dropped, because h
   leaves the VLM through a layer norm. MLP: two hidden layers of 256.
3) LoRA: rank 32, alpha 32, on every linear layer of the VLM. `--lora-targets language` confines it
   to the language model.
4) `tiny` is a BLIP-2 of the same classes with random weights (common/backbone.py). LoRA has nothing
   to adapt there, so stage 0 trains all of it (theta is then the whole VLM), and the result stands
   in for the pre-trained VLM.
"""

import common.environment  # noqa: F401  variables that torch reads when it is imported

# isort: split
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Blip2ForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from common.backbone import (
    build_tiny,
    download_checkpoint,
    load_backbone,
    pick_dtype,
    recorded_name,
)
from common.digests import check_digests, digests
from common.distributed import barrier, rank_and_world_size
from common.errors import UserError
from common.files import check_links, read_json, read_tensors, write_json
from common.runs import checkpoint_config, is_hub_name
from common.versions import versions

# Regular expressions on module names. The language model's are OPT's names and T5's.
LANGUAGE_LAYERS = r".*language_model.*\.([qkv]_proj|out_proj|fc1|fc2|[qkvo]|wi(_[01])?|wo)"
VISION_LAYERS = (
    r"(.*\.)?(qkv|projection|fc1|fc2|query|key|value|dense|language_projection|out_proj)"
)
LORA_TARGETS = {"all": f"{VISION_LAYERS}|{LANGUAGE_LAYERS}", "language": LANGUAGE_LAYERS}


# ----------------------------------------------------------------------------------------------------------------------
# The action head


class TokenLearner(nn.Module):
    """h (B, M, D) -> h' (B, D): attention pooling by one learned seed, PMA_1 (Set Transformer 1810.00825, Eq. 11).

    With one query, the key and value projections of all M tokens are unnecessary: q . (W_k h_m) =
    (W_k^T q) . h_m, and sum_m a_m (W_v h_m) = W_v (sum_m a_m h_m). The result equals multi-head
    attention's (tests/test_model.py).
    """

    def __init__(self, dim: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm_att = nn.LayerNorm(dim)
        self.norm_out = nn.LayerNorm(dim)
        self.seed = nn.Parameter(torch.randn(dim))
        self.q = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        # A key bias shifts all scores of a head alike: softmax drops it.
        self.k = nn.Linear(dim, dim, bias=False)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool h (B, M, D) to (B, D). mask (B, M) is True where a token is real, False where it is padding."""
        H = self.heads
        D = h.shape[-1]
        q = self.q(self.seed).view(H, D // H)  # (H, D/H)
        q = torch.einsum("he,hed->hd", q, self.k.weight.view(H, D // H, D))  # (H, D)
        score = h @ q.T * (D // H) ** -0.5  # (B, M, H)
        att = score.masked_fill(~mask[..., None], float("-inf")).softmax(dim=1)  # (B, M, H)
        pooled = att.transpose(1, 2) @ h  # (B, H, D)
        # (B, H, D/H)
        value = torch.einsum("bhd,hed->bhe", pooled, self.v.weight.view(H, D // H, D))
        x = self.norm_att(self.seed + self.o(value.flatten(1) + self.v.bias))  # (B, D)
        return self.norm_out(x + self.ff(x))  # (B, D)


class Head(nn.Module):
    """Token learner + MLP: h (B, M, D) -> (B, out). The action head (out = A), and the critic (out = 1)."""

    def __init__(self, dim: int, out: int, hidden: int = 256):
        super().__init__()
        self.token_learner = TokenLearner(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, out),
        )

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h_pooled = self.token_learner(h.to(self.mlp[0].weight.dtype), mask)  # (B, D)
        return self.mlp(h_pooled)  # (B, out)


# ----------------------------------------------------------------------------------------------------------------------
# The VLA


@dataclass
class VLAConfig:
    """How `VLA.create` makes a new VLA. Without the last three fields it is part of every checkpoint's config.json."""

    vlm: str  # "tiny", a local BLIP-2 folder, or a hub name
    domain: str  # domains/<name>.py
    action_dim: int  # A
    image_size: int  # pixels of the square camera image
    dtype: str = ""  # precision of the VLM: bfloat16, float32, or "" for the faster one
    theta: str = (
        "lora"  # the weights that SFT trains: lora or whole; `tiny` is always trained whole
    )
    lora_rank: int = 32
    lora_targets: str = "all"  # a key of LORA_TARGETS


class VLA(nn.Module):
    """BLIP-2 (theta) and the action head (phi). Make one with `VLA.create` or `VLA.load`."""

    def __init__(
        self, vlm: Blip2ForConditionalGeneration, tokenizer, image_processor, config: dict
    ):
        super().__init__()
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = dict(config)
        A = config["action_dim"]
        self.head = Head(self.blip.config.text_config.hidden_size, A)
        # log of the exploration's std, in units of the action range; only stage 1 uses and trains
        # it
        self.log_std = nn.Parameter(torch.zeros(A))
        self.register_buffer("action_mean", torch.zeros(A))
        self.register_buffer("action_std", torch.ones(A))
        self.register_buffer(
            "image_mean", torch.tensor(image_processor.image_mean).view(1, 3, 1, 1)
        )
        self.register_buffer("image_std", torch.tensor(image_processor.image_std).view(1, 3, 1, 1))
        # images that the language model has seen; a tensor, because torch.compile would recompile
        # for every new int
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.long), persistent=False)
        self._token_cache: dict[str, torch.Tensor] = {}

    # --- theta and phi

    @property
    def blip(self) -> Blip2ForConditionalGeneration:
        """The BLIP-2 itself, with or without LoRA around it."""
        return self.vlm.base_model.model if self.has_lora else self.vlm

    @property
    def has_lora(self) -> bool:
        return isinstance(self.vlm, PeftModel)

    @property
    def device(self) -> torch.device:
        return self.action_mean.device

    def theta(self) -> list[nn.Parameter]:
        """Return LoRA's weights, or all of the VLM's if it has no LoRA."""
        return [p for n, p in self.vlm.named_parameters() if "lora_" in n or not self.has_lora]

    def phi(self) -> list[nn.Parameter]:
        """Return the action head's weights."""
        return list(self.head.parameters())

    def add_lora(self, rank: int, targets: str = "all") -> None:
        """Freeze the VLM and add new LoRA weights, which change nothing until they are trained."""
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS[targets])
        self.vlm = get_peft_model(self.vlm, lora)

    def enable_gradient_checkpointing(self) -> None:
        """Enable gradient checkpointing: store only the layers' inputs and recompute the rest.

        This saves memory and takes a third more time. HF's own switch does nothing in eval mode,
        and train mode would bring dropout.
        """
        for layer in self.blip.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = functools.partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )

    # --- o, l -> h

    def preprocess(self, images) -> torch.Tensor:
        """Return images (B, H, W, 3) uint8 as HF's own processor prepares them: (B, 3, S, S) float32, on the device.

        Raises ValueError for images that are not uint8: floats in [0, 1] would look black.
        """
        x = torch.as_tensor(images).to(self.device)
        if x.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 in 0..255 (got {x.dtype}): multiply floats in [0, 1] by 255 first"
            )
        x = x.permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
        S = self.blip.config.vision_config.image_size
        if x.shape[-2:] != (S, S):
            # First the width, then the height, rounded, as PIL does.
            for shape in ((x.shape[-2], S), (S, S)):
                x = (
                    F.interpolate(x.float(), shape, mode="bicubic", antialias=True)
                    .round()
                    .clamp(0, 255)
                )
        scale = 1 / (255 * self.image_std)
        return torch.addcmul(-self.image_mean / self.image_std, x.float(), scale)  # (B, 3, S, S)

    def tokenize(self, instructions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ids (B, L), mask (B, L)) of B instructions, padded to the longest.

        As in HF's BLIP-2 processor, the image's tokens come first, then the text as the tokenizer
        splits it.
        """
        for text in set(instructions) - set(self._token_cache):
            self._token_cache[text] = torch.tensor(self.tokenizer(text).input_ids, dtype=torch.long)
        rows = [self._token_cache[text] for text in instructions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        mask = ids >= 0
        return ids.clamp(min=0).to(self.device), mask.to(self.device)

    def encode(self, images, instructions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """o, l -> h: images (B, H, W, 3) uint8, B instructions -> latents (B, M, D), mask (B, M).

        M = query tokens + text tokens. Equal to the last hidden state of BLIP-2's own forward. The
        language model's output layer, which the action head replaces, is not computed.
        """
        return self.language(self.image_tokens(images), instructions)

    def image_tokens(self, images) -> torch.Tensor:
        """Vision tower, Q-Former, projection: images (B, H, W, 3) uint8 -> the language model's input (B, Q, D)."""
        with self.autocast():
            return self.blip.get_image_features(self.preprocess(images)).pooler_output

    def language(
        self, q: torch.Tensor, instructions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The language model: image tokens q (B, Q, D), B instructions -> latents (B, M, D), mask (B, M)."""
        self.num_forwards += len(q)
        blip = self.blip
        ids, text_mask = self.tokenize(instructions)  # (B, L)
        with self.autocast():
            e = blip.get_input_embeddings()(ids)  # (B, L, D)
            x = torch.cat([q.to(e), e], dim=1)  # (B, M, D)
            mask = torch.cat([text_mask.new_ones(q.shape[:2]), text_mask], dim=1)  # (B, M)
            lm = blip.language_model
            transformer = (
                lm.get_encoder() if blip.config.text_config.is_encoder_decoder else lm.model
            )
            h = transformer(
                inputs_embeds=x, attention_mask=mask.long(), use_cache=False
            ).last_hidden_state
        return h, mask  # (B, M, D), (B, M)

    def autocast(self) -> torch.autocast:
        """bfloat16 arithmetic where the checkpoint asks for it."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config["dtype"] == "bfloat16"
        )

    # --- h -> a

    def mean(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the head's action (B, A) in units of the action range. Not clipped, so that it can be trained."""
        return self.head(h, mask) * self.action_std + self.action_mean

    def forward(self, images, instructions: list[str]) -> torch.Tensor:
        """o, l -> the action that SFT trains (B, A).

        images: (B, H, W, 3) uint8, or their image tokens (B, Q, D) from the token cache.
        """
        q = images if images.ndim == 3 else self.image_tokens(images)  # (B, Q, D)
        h, mask = self.language(q, instructions)  # (B, M, D), (B, M)
        return self.mean(h.float(), mask)  # (B, A)

    def act(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Act greedily: h (B, M, D) -> (B, A) in [-1, 1]."""
        return self.mean(h, mask).clamp(-1, 1)

    def explore(self, h: torch.Tensor, mask: torch.Tensor, generator: torch.Generator):
        """Act to learn: h (B, M, D) -> (action (B, A), its log-probability (B,)) of the Gaussian policy pi_phi(a | h).

        The action is not clipped. The environment clips it, and the probability stays that of the
        drawn action.
        """
        mean = self.mean(h, mask)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        action = mean + self.log_std.exp() * noise
        return action, log_prob(action, mean, self.log_std)

    # --- checkpoints

    @classmethod
    def create(cls, config: VLAConfig, words: list[str], folder: str | Path) -> "VLA":
        """Return a new VLA. `tiny` is built in folder/vlm by rank 0, with a tokenizer that knows `words`.

        Raises UserError for a VLM that cannot be loaded.
        """
        tiny = config.vlm == "tiny"
        whole = tiny or config.theta == "whole"
        vlm = recorded_name(config.vlm)
        if tiny and rank_and_world_size()[0] == 0:
            build_tiny(Path(folder) / "vlm", words, config.image_size)
        barrier()
        about = {
            "vlm": vlm,
            "weights": "vlm" if tiny else vlm,
            "domain": config.domain,
            "action_dim": config.action_dim,
            "image_size": config.image_size,
            "dtype": config.dtype or pick_dtype(config.vlm)[0],
        }
        vla = cls(*load_backbone(Path(folder), about, train_whole=whole), about)
        if whole:
            vla.config["weights"] = "vlm"  # every checkpoint holds its own
        else:
            vla.add_lora(config.lora_rank, config.lora_targets)
        return vla

    def save(self, folder: str | Path, parent: str | Path | None = None, **about: object) -> None:
        """Write the checkpoint's files into `folder`. The caller renames the folder when every file is written.

        parent: the checkpoint that this one was trained from. about: more entries of config.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.has_lora:
            # Without save_embedding_layers=False PEFT asks the hub about the VLM at every save.
            self.vlm.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        if self.config["weights"] == "vlm":
            if not self.has_lora:
                self.vlm.save_pretrained(folder / "vlm")
                self.tokenizer.save_pretrained(folder / "vlm")
                self.image_processor.save_pretrained(folder / "vlm")
            elif parent is not None and Path(parent) != folder:  # the backbone is the parent's
                shutil.copytree(Path(parent) / "vlm", folder / "vlm", dirs_exist_ok=True)
        heads = {n: v for n, v in self.state_dict().items() if not n.startswith("vlm.")}
        heads = {n: v.detach().float().cpu().contiguous() for n, v in heads.items()}
        save_file(heads, folder / "heads.safetensors")
        described = {"parent": str(parent) if parent else None, **about, "versions": versions()}
        write_json(folder / "config.json", {**self.config, **described, "sha256": digests(folder)})

    @classmethod
    def load(
        cls, folder: str | Path, domain: str | None = None, device: str | torch.device = "cpu"
    ) -> "VLA":
        """Return the VLA of a checkpoint folder, or of a hub name such as user/name. Nothing else is needed.

        domain: the caller's. Raises UserError if it is another one, and for a file that is missing
        or damaged.
        """
        folder = local_checkpoint(folder)
        config = checkpoint_config(folder, "vlm", "image_size", "dtype")
        check_digests(folder, config.get("sha256", {}))
        if domain is not None and config["domain"] != domain:
            raise UserError(
                f"{folder} was trained on {config['domain']}, not {domain}: use a checkpoint of {domain}"
            )
        heads, _ = read_tensors(folder / "heads.safetensors")
        has_adapter = any(
            (folder / f).exists() for f in ("adapter_config.json", "adapter_model.safetensors")
        )
        if not has_adapter and config["weights"] != "vlm":
            raise UserError(
                f"incomplete checkpoint: {folder}/adapter_config.json is missing; use another checkpoint"
            )
        vla = cls(*load_backbone(folder, config, train_whole=not has_adapter), config)
        seen = vla.vlm.config.vision_config.image_size
        if config["vlm"] == "tiny" and config["image_size"] != seen:
            raise UserError(
                f"{folder}/config.json: image_size is {config['image_size']}, but its VLM sees {seen} pixels: "
                f"correct the entry"
            )
        if has_adapter:
            vla.load_adapter(folder)
        vla.load_heads(heads, folder)
        return vla.to(device)

    def load_adapter(self, folder: Path) -> None:
        """Load PEFT's adapter. Raises UserError if its two files do not fit each other."""
        read_json(folder / "adapter_config.json")
        tensors, _ = read_tensors(folder / "adapter_model.safetensors")
        self.vlm = PeftModel.from_pretrained(self.vlm, folder, is_trainable=True)
        differ = get_peft_model_state_dict(self.vlm).keys() ^ tensors.keys()
        if differ:
            raise UserError(
                f"{folder}/adapter_model.safetensors does not fit its adapter_config.json ({min(differ)}): "
                f"use another checkpoint"
            )

    def load_heads(self, heads: dict[str, torch.Tensor], folder: Path) -> None:
        """Load heads.safetensors. Raises UserError if it does not fit config.json."""
        expected = {
            n: list(v.shape) for n, v in self.state_dict().items() if not n.startswith("vlm.")
        }
        found = {n: list(v.shape) for n, v in heads.items()}
        differ = sorted(
            n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)
        )
        if differ:
            name = differ[0]
            raise UserError(
                f"{folder}/heads.safetensors does not fit its config.json ({name}: found {found.get(name)}, expected "
                f"{expected.get(name)}): the files come from different checkpoints or versions; use another checkpoint"
            )
        self.load_state_dict(heads, strict=False)


def local_checkpoint(name: str | Path) -> Path:
    """Return a checkpoint's folder. One on the hub, such as user/name, is downloaded. Raises UserError."""
    folder = Path(download_checkpoint(name) if is_hub_name(name) else name)
    if not folder.is_dir():
        check_links(folder)
        raise UserError(
            f"{folder} is not a checkpoint folder: use the path of one, such as runs/<name>/0-sft"
        )
    return folder


def log_prob(action: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Return log N(action | mean, exp(log_std)), summed over the action's dimensions: (B, A), (B, A), (A,) -> (B,)."""
    return (
        torch.distributions.Normal(mean, log_std.exp(), validate_args=False)
        .log_prob(action)
        .sum(-1)
    )


def set_trainable(parameters, trainable: bool) -> None:
    """Train these parameters, or freeze them."""
    for p in parameters:
        p.requires_grad_(trainable)


def describe(vla: VLA) -> str:
    """Return one line for the terminal: what is trained, and its size."""

    def millions(parameters) -> float:
        return sum(p.numel() for p in parameters) / 1e6

    kind = "LoRA" if vla.has_lora else "all weights"
    return (
        f"BLIP-2 {vla.config['vlm']}: {millions(vla.vlm.parameters()):.1f} M weights, "
        f"theta = {kind} {millions(vla.theta()):.2f} M, phi = {millions(vla.phi()):.2f} M, on {vla.device}"
    )
