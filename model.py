"""
The vision-language-action model (paper Sec. IV-A), and its checkpoints.

       image o ──> vision tower ──> Q-Former ─┐
                                              ├─> language model ──> h (M, D) ──> token learner ──> h' (D) ──> MLP ──> a
  instruction l ──> token embedding ──────────┘    "latents"        (attention       └── the action head, phi ──┘
                        theta (LoRA)                                  pooling)

    theta   LoRA weights of the VLM; trained in stages 0 and 2, frozen in stage 1
    phi     token learner + MLP; trained in every stage
    critic  the head's shape with one output; new at the start of each stage 1, never part of a checkpoint

`encode` is everything before the head. In stage 1 it is frozen, so each image passes it once and only h is kept.
`image_tokens` is encode's part before the language model. With LoRA in the language model alone, no stage changes it,
and `--cache` of the SFT stages keeps what it gives on disk (data.py): there, too, each image passes it once.

Where the paper is silent or this differs from it:
1) Which language model: any BLIP-2; the 3B of the paper is taken to be Salesforce/blip2-opt-2.7b (a decoder whose
   "final fully connected layer" can be replaced).
2) Token learner: PMA with one seed (Set Transformer 1810.00825, the paper's reference), written so that its cost is
   linear in D for each of the M tokens; the inner rFF on h is dropped (h comes out of the VLM's final layer norm).
   MLP: two hidden layers of 256.
3) LoRA: rank 32, alpha 32, on every linear layer of the VLM; `--lora-targets language` confines it to the language
   model.
4) `tiny` is a BLIP-2 of the same classes with random weights. There is nothing in it for LoRA to adapt, so stage 0
   trains it whole (theta is then all of the VLM), and the result plays the pre-trained VLM from there on.
"""

import functools
import hashlib
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.utils import logging as hf_logging

from run import Refusal, checkpoint_config, on_hub, ranks, read_json, read_tensors, together, versions, write_json

hf_logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks transformers by an old name
LANGUAGE = r".*language_model.*\.([qkv]_proj|out_proj|fc1|fc2|[qkvo]|wi(_[01])?|wo)"  # OPT's names, and T5's
LORA_TARGETS = {  # regular expressions on module names
    "all": rf"(.*\.)?(qkv|projection|fc1|fc2|query|key|value|dense|language_projection|out_proj)|{LANGUAGE}",
    "language": LANGUAGE,
}


# ----------------------------------------------------------------------------------------------------------------------
# The action head


class TokenLearner(nn.Module):
    """h (B, M, D) -> h' (B, D): attention pooling by one learned seed, PMA_1 (Set Transformer 1810.00825, Eq. 11).

    One query makes the key and value projections of all M tokens unnecessary: q . (W_k h_m) = (W_k^T q) . h_m, and
    sum_m a_m (W_v h_m) = W_v (sum_m a_m h_m). The result equals multi-head attention's (tests/test_model.py).
    """

    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads = heads
        self.norm_att, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.seed = nn.Parameter(torch.randn(dim))
        self.q, self.v, self.o = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)  # softmax would drop a key bias: it shifts all scores of a head alike
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, h, mask):
        """mask (B, M): True where a token is real, False where a shorter instruction was padded."""
        # fmt: off
        H, D = self.heads, h.shape[-1]
        q = self.q(self.seed).view(H, D // H)                                          # (H, D/H)
        q = torch.einsum("he,hed->hd", q, self.k.weight.view(H, D // H, D))            # (H, D)
        score = h @ q.T * (D // H) ** -0.5                                             # (B, M, H)
        att = score.masked_fill(~mask[..., None], float("-inf")).softmax(dim=1)        # (B, M, H)
        pooled = att.transpose(1, 2) @ h                                               # (B, H, D)
        value = torch.einsum("bhd,hed->bhe", pooled, self.v.weight.view(H, D // H, D)) # (B, H, D/H)
        x = self.norm_att(self.seed + self.o(value.flatten(1) + self.v.bias))          # (B, D)
        return self.norm_out(x + self.ff(x))                                           # (B, D)
        # fmt: on


class Head(nn.Module):
    """Token learner + MLP: h (B, M, D) -> (B, out). The action head (out = A), and the critic (out = 1)."""

    def __init__(self, dim, out, hidden=256):
        super().__init__()
        self.token_learner = TokenLearner(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out)
        )

    def forward(self, h, mask):
        h_pooled = self.token_learner(h.to(self.mlp[0].weight.dtype), mask)  # (B, D)
        return self.mlp(h_pooled)  # (B, out)


# ----------------------------------------------------------------------------------------------------------------------
# The VLA


class VLA(nn.Module):
    """BLIP-2 (theta) and the action head (phi). Make one with `VLA.create` or `VLA.load`."""

    def __init__(self, vlm, tokenizer, image_processor, config):
        super().__init__()
        self.vlm, self.tokenizer, self.image_processor, self.config = vlm, tokenizer, image_processor, dict(config)
        blip = self.blip.config
        self.head = Head(blip.text_config.hidden_size, config["action_dim"])
        # log of the exploration's standard deviation, in units of the action range; only stage 1 uses and trains it
        self.log_std = nn.Parameter(torch.zeros(config["action_dim"]))
        self.register_buffer("action_mean", torch.zeros(config["action_dim"]))
        self.register_buffer("action_std", torch.ones(config["action_dim"]))
        self.register_buffer("image_mean", torch.tensor(image_processor.image_mean).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(image_processor.image_std).view(1, 3, 1, 1))
        self._token_cache = {}
        self.forwards = 0  # images that the language model has seen

    # --- theta and phi

    @property
    def blip(self):
        """The BLIP-2 itself, with or without LoRA around it."""
        return self.vlm.base_model.model if self.has_lora else self.vlm

    @property
    def has_lora(self):
        return isinstance(self.vlm, PeftModel)

    @property
    def device(self):
        return self.action_mean.device

    def theta(self):
        """LoRA's weights, or all of the VLM's where that is trained whole."""
        return [p for n, p in self.vlm.named_parameters() if "lora_" in n or not self.has_lora]

    def phi(self):
        return list(self.head.parameters())

    def add_lora(self, rank, targets="all"):
        """Freeze the VLM and put new LoRA weights on it, which change nothing until they are trained."""
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS[targets])
        self.vlm = cast_once(get_peft_model(self.vlm, lora))

    def checkpoint_layers(self):
        """From now on keep only each layer's input for the backward pass, which computes the layer again: less memory,
        a third more time. HF's own switch does nothing in eval mode, and train mode would bring dropout."""
        for layer in self.blip.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = functools.partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )

    # --- o, l -> h

    def preprocess(self, images):
        """images (B, H, W, 3) uint8 -> (B, 3, S, S) float32, what HF's own processor makes of them, on the device."""
        x = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W) uint8
        size = self.blip.config.vision_config.image_size
        if x.shape[-2:] != (size, size):
            for shape in ((x.shape[-2], size), (size, size)):  # first the width, then the height, rounded, as PIL does
                x = F.interpolate(x.float(), shape, mode="bicubic", antialias=True).round().clamp(0, 255)
        scale = 1 / (255 * self.image_std)
        return torch.addcmul(-self.image_mean / self.image_std, x.float(), scale)  # (B, 3, S, S)

    def tokenize(self, instructions):
        """B sentences -> (ids (B, L), mask (B, L)), padded to the longest. As HF's BLIP-2 processor does, the image's
        tokens come first, then what the tokenizer makes of the text."""
        for text in set(instructions) - set(self._token_cache):
            self._token_cache[text] = torch.tensor(self.tokenizer(text).input_ids)
        rows = [self._token_cache[text] for text in instructions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        mask = ids >= 0
        return ids.clamp(min=0).to(self.device), mask.to(self.device)

    def encode(self, images, instructions):
        """o, l -> h: images (B, H, W, 3) uint8, B sentences -> latents (B, M, D), mask (B, M).

        M = query tokens + text tokens. Equal to the last hidden state of BLIP-2's own forward; the language model's
        output layer, which the action head replaces, is not computed.
        """
        return self.language(self.image_tokens(images), instructions)

    def image_tokens(self, images):
        """Vision tower, Q-Former, projection: images (B, H, W, 3) uint8 -> what the language model gets, (B, Q, D)."""
        with self.autocast():
            return self.blip.get_image_features(self.preprocess(images)).pooler_output

    def image_side(self):
        """{name: weight} of all that makes image_tokens."""
        weights = self.blip.state_dict(keep_vars=True)
        return {name: w for name, w in weights.items() if not name.startswith("language_model.")}

    def image_key(self):
        """A name for what decides image_tokens, weights and preprocessing: where it differs, they do."""
        blip, scale = self.blip.config, (self.image_mean.tolist(), self.image_std.tolist())
        about = blip.vision_config.to_json_string() + blip.qformer_config.to_json_string()
        digest = hashlib.sha256(f"{self.config['dtype']} {scale} {about} {list(self.image_side())}".encode())
        for w in self.image_side().values():
            digest.update(w.detach().flatten().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()[:16]

    def language(self, q, instructions):
        """The language model on image tokens q (B, Q, D) and B sentences -> latents (B, M, D), mask (B, M)."""
        # fmt: off
        self.forwards += len(q)
        blip = self.blip
        ids, text_mask = self.tokenize(instructions)                                   # (B, L)
        with self.autocast():
            e = blip.get_input_embeddings()(ids)                                       # (B, L, D)
            x = torch.cat([q.to(e), e], dim=1)                                         # (B, M, D)
            mask = torch.cat([text_mask.new_ones(q.shape[:2]), text_mask], dim=1)      # (B, M)
            lm = blip.language_model
            transformer = lm.get_encoder() if blip.config.text_config.is_encoder_decoder else lm.model
            h = transformer(inputs_embeds=x, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return h, mask                                                                 # (B, M, D), (B, M)
        # fmt: on

    def autocast(self):
        """bfloat16 arithmetic where the checkpoint asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config["dtype"] == "bfloat16")

    # --- h -> a

    def mean(self, h, mask):
        """The head's action, (B, A) in units of the action range; not clipped, so that it can be trained."""
        return self.head(h, mask) * self.action_std + self.action_mean

    def forward(self, images, instructions):
        """o, l -> the action that SFT trains: (B, H, W, 3) uint8, or their image_tokens (B, Q, D); B sentences ->
        (B, A)."""
        q = images if images.ndim == 3 else self.image_tokens(images)  # (B, Q, D)
        h, mask = self.language(q, instructions)  # (B, M, D), (B, M)
        return self.mean(h.float(), mask)  # (B, A)

    def act(self, h, mask):
        """Act greedily: h (B, M, D) -> (B, A) in [-1, 1]."""
        return self.mean(h, mask).clamp(-1, 1)

    def explore(self, h, mask, generator):
        """Act to learn: h (B, M, D) -> (action (B, A), its log-probability (B,)) of the Gaussian policy pi_phi(a | h).

        The action is not clipped: the environment does that, and the probability stays that of what was drawn.
        """
        mean = self.mean(h, mask)
        action = mean + self.log_std.exp() * torch.randn(mean.shape, generator=generator).to(mean.device)
        return action, log_prob(action, mean, self.log_std)

    # --- checkpoints

    @classmethod
    def create(cls, vlm, instructions, action_dim, domain, image_size, lora_rank, lora_targets, dtype, folder):
        """A new VLA around `vlm`: "tiny" (built in folder/vlm, by rank 0), a local BLIP-2 folder, or a hub name.
        dtype: of the VLM's arithmetic, or "" for what this machine is fastest with."""
        if vlm == "tiny" and ranks()[0] == 0:
            build_tiny(Path(folder) / "vlm", instructions, image_size)
        together()
        config = {
            "vlm": vlm, "weights": "vlm" if vlm == "tiny" else vlm, "domain": domain, "action_dim": action_dim,
            "image_size": image_size, "dtype": dtype or pick_dtype(train_whole=vlm == "tiny"),
        }  # fmt: skip
        vla = cls(*load_vlm(Path(folder), config, train_whole=vlm == "tiny"), config)
        if vlm != "tiny":
            vla.add_lora(lora_rank, lora_targets)
        return vla

    def save(self, folder, parent=None, **about):
        """Write the checkpoint's files into `folder` (its owner renames the folder when all is there).

        about: what else config.json shall say, e.g. the stage's arguments.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.has_lora:
            self.vlm.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        if self.config["weights"] == "vlm":
            if not self.has_lora:
                self.vlm.save_pretrained(folder / "vlm")
                self.tokenizer.save_pretrained(folder / "vlm")
                self.image_processor.save_pretrained(folder / "vlm")
            elif parent is not None and Path(parent) != folder:  # LoRA left the backbone as the parent has it
                shutil.copytree(Path(parent) / "vlm", folder / "vlm", dirs_exist_ok=True)
        heads = {n: v for n, v in self.state_dict().items() if not n.startswith("vlm.")}
        save_file({n: v.detach().float().cpu().contiguous() for n, v in heads.items()}, folder / "heads.safetensors")
        described = {"parent": str(parent) if parent else None, **about, "versions": versions()}
        write_json(folder / "config.json", {**self.config, **described})

    @classmethod
    def load(cls, folder, domain=None, device="cpu"):
        """The VLA of a checkpoint folder, or of a hub name such as user/name; nothing else is needed.

        domain: the caller's, to be checked. Raises Refusal when a file is missing or damaged, or the domain is another.
        """
        folder = Path(snapshot(folder) if on_hub(folder) else folder)
        if not folder.is_dir():
            raise Refusal(f"{folder} is not a checkpoint folder: give the path of one, such as runs/<name>/0-sft")
        config = checkpoint_config(folder)
        if domain is not None and config["domain"] != domain:
            raise Refusal(f"{folder} was trained on {config['domain']}, not {domain}: give a checkpoint of {domain}")
        heads, _ = read_tensors(folder / "heads.safetensors")
        adapter = (folder / "adapter_config.json").exists() or (folder / "adapter_model.safetensors").exists()
        vla = cls(*load_vlm(folder, config, train_whole=not adapter), config)
        if adapter:
            read_json(folder / "adapter_config.json")
            tensors, _ = read_tensors(folder / "adapter_model.safetensors")
            vla.vlm = cast_once(PeftModel.from_pretrained(vla.vlm, folder, is_trainable=True))
            if differ := get_peft_model_state_dict(vla.vlm).keys() ^ tensors.keys():
                raise Refusal(f"{folder}/adapter_model.safetensors is not the one of its adapter_config.json "
                              f"({min(differ)}): use another checkpoint")  # fmt: skip
        elif config["weights"] != "vlm":
            raise Refusal(f"{folder}/adapter_config.json is missing, so it is no whole checkpoint: use another")
        shapes = {n: v.shape for n, v in vla.state_dict().items() if not n.startswith("vlm.")}
        there = {n: v.shape for n, v in heads.items()}
        if differ := sorted(n for n in shapes.keys() | there.keys() if shapes.get(n) != there.get(n)):
            have, want = (list(s.get(differ[0], ["nothing"])) for s in (there, shapes))
            raise Refusal(
                f"{folder}/heads.safetensors does not fit its config.json ({differ[0]}: {have}, not {want}): the files "
                f"are of different checkpoints, or of another version; use another, or train again"
            )
        vla.load_state_dict(heads, strict=False)
        return vla.to(device)


def cast_once(vlm, once=True):
    """PEFT casts what enters LoRA to its float32, and autocast casts that back. Without, an SFT step takes 1 to 2 %
    less at the paper's size, and its gradients are the same, bit for bit. once=False: as PEFT has it."""
    for layer in vlm.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = not once
    return vlm


def snapshot(name):
    """The local copy of a hub repository; downloads what is missing of it."""
    try:
        return huggingface_hub.snapshot_download(str(name))
    except (OSError, ValueError) as error:
        raise Refusal(f"{name} is neither a checkpoint folder nor on the hub ({str(error).splitlines()[0]})") from error


def log_prob(action, mean, log_std):
    """log N(action; mean, exp(log_std)), summed over the action's dimensions: (B, A), (B, A), (A,) -> (B,)."""
    return torch.distributions.Normal(mean, log_std.exp(), validate_args=False).log_prob(action).sum(-1)


def freeze(parameters, frozen=True):
    for p in parameters:
        p.requires_grad_(not frozen)


# ----------------------------------------------------------------------------------------------------------------------
# The backbone


def load_vlm(folder, config, train_whole):
    """(BLIP-2, tokenizer, image processor) by HF's from_pretrained; config["weights"] is "vlm" for folder/vlm."""
    own = config["weights"] == "vlm"
    source = Path(folder) / "vlm" if own else config["weights"]
    # A frozen VLM needs no float32 weights; one that is trained whole does, or small steps would round to nothing.
    dtype = torch.float32 if train_whole or own else getattr(torch, config["dtype"])
    if own:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            read_json(source / name)
        read_tensors(source / "model.safetensors")
    try:
        vlm, found = Blip2ForConditionalGeneration.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
        image_processor = BlipImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise no_blip2(source, error) from error
    if missing := found["missing_keys"]:
        raise Refusal(f"{source} lacks {min(missing)} and {len(missing) - 1} more tensors: restore it, or use another")
    if not torch.cuda.is_available() and config["dtype"] == "bfloat16":
        vlm.set_attn_implementation("eager")  # torch's fused attention trains 2.5 times slower so at these lengths
    return vlm.eval(), tokenizer, image_processor  # eval: no dropout, so that h is a function of o and l alone


def pick_dtype(train_whole):
    """bfloat16; but float32 for weights that are float32 anyway, since all of them are trained, on a CPU without units
    for bfloat16 (AMX): there it is 1.4 times faster (results/experiments.md)."""
    slow = not torch.cuda.is_available() and not torch.cpu._is_amx_tile_supported()
    return "float32" if slow and train_whole else "bfloat16"


def no_blip2(source, error):
    return Refusal(
        f"--vlm {source} is not a BLIP-2 that can be loaded ({str(error).splitlines()[0]}): give tiny, a local folder, "
        f"or a hub name such as Salesforce/blip2-opt-2.7b"
    )


def build_tiny(folder, sentences, image_size, width=128, patch=16, layers=(2, 1, 2), queries=8):
    """Write a BLIP-2 of stock classes with 1.2 M random weights, and a tokenizer that knows the words of `sentences`.

    layers: of the vision tower, Q-Former, language model. The random numbers come from torch's global generator.
    """
    words = sorted({word for s in sentences for word in s.lower().split()})
    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "<image>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="<unk>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    # HF's default initial deviation of 0.02 is meant for widths near 1,000. At this width it leaves every layer's
    # output close to zero, and SFT then learns a constant; 1/sqrt(width) = 0.09 trains.
    shape = dict(hidden_size=width, num_attention_heads=4, intermediate_size=4 * width)
    std = width**-0.5
    vision = dict(shape, num_hidden_layers=layers[0], image_size=image_size, patch_size=patch, initializer_range=std)
    qformer = dict(
        shape, num_hidden_layers=layers[1], encoder_hidden_size=width, cross_attention_frequency=1, vocab_size=2,
        initializer_range=std, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=len(vocab), hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_attention_heads=4,
        num_hidden_layers=layers[2], max_position_embeddings=64, dropout=0.0, init_std=std, pad_token_id=0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=queries,
        image_token_index=vocab["<image>"],
    )  # fmt: skip
    vlm = Blip2ForConditionalGeneration(config)
    # HF starts the query tokens at zero: all equal, hence equal for ever. Positions and words need to differ too.
    nn.init.normal_(vlm.query_tokens, std=1.0)
    nn.init.normal_(vlm.vision_model.embeddings.position_embedding, std=0.5)
    nn.init.normal_(vlm.get_input_embeddings().weight, std=0.5)
    vlm.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)


def describe(vla):
    """One line for the terminal: what is trained and how large it is."""
    count = lambda ps: sum(p.numel() for p in ps) / 1e6  # noqa: E731
    kind = "LoRA" if vla.has_lora else "all weights"
    return (
        f"BLIP-2 {vla.config['vlm']}: {count(vla.vlm.parameters()):.1f} M weights, theta = {kind} "
        f"{count(vla.theta()):.2f} M, phi = {count(vla.phi()):.2f} M, on {vla.device}"
    )
