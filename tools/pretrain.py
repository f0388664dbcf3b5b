"""
Pre-train the tiny BLIP-2 on random scenes of generic things, and write it to pretrained/blip2-tiny.

1) Scenes: MuJoCo draws them once, in worker processes (tools/pretraining/scenes.py).
2) Vision tower: each patch predicts what its pixels show, how far it is, and the ways to the nearest
   part and to the gripper (tools/pretraining/dense.py). As in BLIP-2, the tower comes first: through the
   random Q-Former nothing is learned.
3) Q-Former and language model: questions and answers in words (tools/pretraining/questions.py). Two more
   losses, whose layers are thrown away: the patches' targets read from the image tokens, and the way
   to the part that a question names, read from the latents by the shape of the action head. The tower
   learns on, slowly. Questions start with large parts.
4) Held-out scenes: the table of the model card.

The same seed makes the same model on the same machine. A killed run resumes from its last saved state.

python -m tools.pretrain                    one CPU thread: two hours
"""

from dataclasses import dataclass

from common.cli import parse


@dataclass
class Args:
    out: str = "pretrained/blip2-tiny"  # folder of the finished model
    work: str = "runs/pretrain"  # folder of the scenes and of the training's state
    shards: int = 40  # of 1,000 scenes each; the first one is held out
    vision_steps: int = 5000  # optimizer steps of the vision tower
    language_steps: int = 6000  # optimizer steps of Q-Former and language model
    vision_batch: int = 48  # scenes a step
    language_batch: int = 32  # scenes a step, with 4 questions each
    vision_lr: float = 1.5e-3  # peak learning rate of the vision tower
    language_lr: float = 1e-3  # peak learning rate of Q-Former and language model
    tower_lr: float = 0.4  # the vision tower's learning rate in part 3, in units of language_lr
    now: bool = False  # score and write the present state instead of training on
    seed: int = 0  # of scenes, weights and batches
    threads: int = 1  # CPU threads of torch, and processes that draw scenes
    nice: int = 19  # niceness of this process and of its workers


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from common.errors import run_cli
from common.files import atomic_write, make_folder, read_tensors, write_json
from common.muon import Muon, is_hidden_matrix
from common.runs import load_optimizer, optimizer_tensors
from model import Head
from tools.pretraining.card import write_card
from tools.pretraining.data import SHARD, Scenes, draw_missing
from tools.pretraining.dense import DenseHead, dense_loss, dense_scores, make_targets
from tools.pretraining.questions import Asker, Question, build_tokenizer
from tools.pretraining.vlm import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, build_vlm

WARMUP = 200  # optimizer steps
COOLDOWN = 0.15  # share of a part's steps in which the learning rate falls to zero
EMA = 0.998  # decay of the weights' moving average
MUON_LR = 2.0  # Muon's learning rate in units of AdamW's
HEADS = ("dense.", "dense_again.", "point.", "place.")  # of the auxiliary losses, by name
SAVE_STEPS = 100  # optimizer steps between two saved states
QUESTIONS = 4  # a scene
MIN_CELLS = (16, 2)  # cells that a part must show, at the start and from half of the steps on
HELD_OUT = 1000  # scenes


def preprocess(images: np.ndarray) -> torch.Tensor:
    """Return images (B, H, W, 3) uint8 as the model's image processor prepares them: (B, 3, H, W) float32."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - IMAGE_MEAN) / IMAGE_STD


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


class Learner(nn.Module):
    """The BLIP-2, and the layers that only its pre-training needs."""

    def __init__(self):
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.vlm = build_vlm(len(self.tokenizer)).eval()
        config = self.vlm.config
        self.patch = config.vision_config.patch_size
        self.patches = (IMAGE_SIZE // self.patch) ** 2
        cells = (self.patch // 2) ** 2
        self.dense = DenseHead(config.vision_config.hidden_size, cells)
        dim = config.text_config.hidden_size
        # Reads the patches' targets from the image tokens.
        self.place = nn.Parameter(torch.randn(self.patches, dim) * dim**-0.5)
        self.read = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mix = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.dense_again = DenseHead(dim, cells)
        self.point = Head(dim, 7)
        self.ids = {}

    def patch_outputs(self, images: np.ndarray) -> torch.Tensor:
        """Return the vision tower's outputs (B, 1 + P, dim)."""
        return self.vlm.vision_model(pixel_values=preprocess(images)).last_hidden_state

    def vision_loss(self, batch: dict, rng: np.random.Generator) -> torch.Tensor:
        """Return the loss of half of the patches of a batch of scenes."""
        chosen = torch.from_numpy(rng.permutation(self.patches)[: self.patches // 2])
        x = self.patch_outputs(batch["images"])[:, 1:][:, chosen]
        return dense_loss(self.dense(x), make_targets(batch, self.patch).choose(chosen))

    def image_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return the language model's image tokens (B, Q, D) from the tower's outputs."""
        vlm = self.vlm
        queries = vlm.query_tokens.expand(len(x), -1, -1)
        out = vlm.qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        return vlm.language_projection(out)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens' numbers of each text."""
        for text in set(texts) - self.ids.keys():
            self.ids[text] = self.tokenizer(text).input_ids
        return [self.ids[text] for text in texts]

    def read_patches(self, tokens: torch.Tensor, chosen: torch.Tensor) -> dict:
        """Return predictions of the chosen patches' targets from image tokens (B, Q, D)."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        q = self.place[chosen].expand(len(tokens), -1, -1)
        x = q + self.read(q, tokens, tokens, need_weights=False)[0]
        return self.dense_again(x + self.mix(x))

    def latents(self, tokens: torch.Tensor, texts: list[list[int]]) -> tuple:
        """Return latents (n, M, D), the mask of real tokens (n, M) and the padded texts (n, L)."""
        rows = [torch.tensor(text) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        real = ids >= 0
        ids = ids.clamp(min=0)
        embedded = self.vlm.get_input_embeddings()(ids)
        x = torch.cat([tokens, embedded], 1)
        mask = torch.cat([real.new_ones(tokens.shape[:2]), real], 1)
        lm = self.vlm.language_model
        h = lm.model(inputs_embeds=x, attention_mask=mask.long(), use_cache=False)
        return h.last_hidden_state, mask, ids

    def language_loss(self, batch: dict, rng: np.random.Generator, min_cells: int) -> dict:
        """Return the losses of a batch of scenes: answers, patches, pointing."""
        asker = Asker(batch, rng, min_cells)
        asked = asker.questions(QUESTIONS)
        outputs = self.patch_outputs(batch["images"])
        tokens = self.image_tokens(outputs)
        # --- the vision tower and the image tokens alone
        chosen = torch.from_numpy(rng.permutation(self.patches)[: self.patches // 4])
        targets = make_targets(batch, self.patch).choose(chosen)
        tower = dense_loss(self.dense(outputs[:, 1:][:, chosen]), targets)
        patches = dense_loss(self.read_patches(tokens, chosen), targets)
        # --- answers
        prompts = self.tokenize([q.text for q in asked])
        answers = self.tokenize([q.answer for q in asked])
        scene = torch.tensor([q.scene for q in asked])
        texts = [p + a for p, a in zip(prompts, answers)]
        h, mask, ids = self.latents(tokens[scene], texts)
        Q = tokens.shape[1]
        position = torch.arange(h.shape[1])
        begin = Q + torch.tensor([len(p) for p in prompts])[:, None]
        end = Q + torch.tensor([len(t) for t in texts])[:, None]
        # A token's latent predicts the next token.
        predicts = (position >= begin - 1) & (position < end - 1)
        n, m = predicts.nonzero(as_tuple=True)
        logits = self.vlm.language_model.lm_head(h[n, m])
        answer = F.cross_entropy(logits, ids[n, m + 1 - Q])
        # --- pointing
        target = torch.from_numpy(np.stack([asker.target(q) for q in asked]))
        out = self.point(h, mask & (position < begin))
        known = ~target.isnan()
        point = F.smooth_l1_loss(out[known], target[known], beta=0.2)
        return {
            "answer": answer,
            "tower": 0.3 * tower,
            "patches": 0.3 * patches,
            "point": 2 * point,
        }

    @torch.no_grad()
    def answer(self, tokens: torch.Tensor, asked: list[Question], length: int) -> list[list[str]]:
        """Return the greedy answers of `length` words each."""
        scene = torch.tensor([q.scene for q in asked])
        prompts = self.tokenize([q.text for q in asked])
        given = [[] for _ in asked]
        for _ in range(length):
            h, mask, _ = self.latents(tokens[scene], [p + g for p, g in zip(prompts, given)])
            last = h[torch.arange(len(asked)), mask.sum(1) - 1]
            best = self.vlm.language_model.lm_head(last).argmax(-1)
            for words, number in zip(given, best.tolist()):
                words.append(number)
        return [self.tokenizer.convert_ids_to_tokens(words) for words in given]


# ----------------------------------------------------------------------------------------------------------------------
# Training


class Part:
    """A part of the training: its weights, their optimizer and moving average, and its saved state."""

    def __init__(self, folder: Path, name: str, groups: list[tuple[dict, float]], steps: int):
        """groups: ({name: parameter}, peak learning rate)."""
        self.path = folder / f"{name}.safetensors"
        self.name = name
        self.steps = steps
        self.weights = {n: p for group, _ in groups for n, p in group.items()}
        matrices = []
        others = []
        for group, lr in groups:
            hidden = {n: p for n, p in group.items() if is_hidden_matrix(n, p, HEADS)}
            rest = [p for n, p in group.items() if n not in hidden]
            if hidden:
                matrices.append({"params": list(hidden.values()), "peak": MUON_LR * lr})
            others.append({"params": rest, "peak": lr})
        # Muon needs 1.6 times fewer steps than AdamW alone (results/experiments.md).
        self.optimizers = [
            Muon(matrices, weight_decay=0.02),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
        ]
        self.average = {n: p.detach().clone() for n, p in self.weights.items()}
        self.step = 0
        if self.path.exists():
            tensors, metadata = read_tensors(self.path)
            self.step = int(metadata["step"])
            for i, optimizer in enumerate(self.optimizers):
                load_optimizer(optimizer, tensors, f"{i}/opt")
            for n, p in self.weights.items():
                p.data.copy_(tensors[f"now.{n}"])
                self.average[n].copy_(tensors[f"average.{n}"])

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def save(self) -> None:
        tensors = {}
        for i, optimizer in enumerate(self.optimizers):
            tensors |= optimizer_tensors(optimizer, f"{i}/opt")
        for n, p in self.weights.items():
            tensors[f"now.{n}"] = p.detach().clone()
            tensors[f"average.{n}"] = self.average[n]
        with atomic_write(self.path) as tmp:
            save_file(tensors, tmp, {"step": str(self.step)})

    def use_average(self) -> None:
        """Set the weights to their moving average."""
        for n, p in self.weights.items():
            p.data.copy_(self.average[n])

    def lr_factor(self) -> float:
        """Return the present learning rate in units of its peak: warm-up, constant, linear to zero."""
        left = (self.steps - self.step) / max(1, COOLDOWN * self.steps)
        return min(1, (self.step + 1) / WARMUP, left)

    def train(self, losses, log: Path) -> None:
        """Train until the last step on the sum of losses. losses: function of the step that returns {name: loss}."""
        bar = tqdm(desc=self.name, total=self.steps, initial=self.step, smoothing=0.02)
        sums = {}
        while not self.done:
            parts = losses(self.step)
            for p in self.weights.values():
                p.grad = None
            sum(parts.values()).backward()
            nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * self.lr_factor()
                optimizer.step()
            self.step += 1
            decay = min(EMA, self.step / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.average.values()), list(self.weights.values()), 1 - decay
                )
            for name, loss in parts.items():
                sums[name] = sums.get(name, 0) + loss.item()
            bar.update()
            if self.step % SAVE_STEPS == 0 or self.done:
                means = {name: total / SAVE_STEPS for name, total in sums.items()}
                text = " ".join(f"{name} {mean:.3f}" for name, mean in means.items())
                bar.set_postfix_str(text)
                with open(log, "a") as f:
                    f.write(f"{self.name} {self.step} {text}\n")
                sums = {}
                self.save()
        bar.close()


def named(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's parameters by name."""
    return {f"{prefix}.{n}": p for n, p in module.named_parameters()}


def vision_part(args: Args, learner: Learner) -> Part:
    """Return the training of the vision tower."""
    weights = named("tower", learner.vlm.vision_model) | named("dense", learner.dense)
    return Part(Path(args.work), "vision", [(weights, args.vision_lr)], args.vision_steps)


def language_part(args: Args, learner: Learner) -> Part:
    """Return the training of Q-Former and language model, with the tower."""
    tower = named("tower", learner.vlm.vision_model)
    spent = {id(p) for p in tower.values()}
    rest = {n: p for n, p in learner.named_parameters() if id(p) not in spent}
    groups = [(tower, args.language_lr * args.tower_lr), (rest, args.language_lr)]
    return Part(Path(args.work), "language", groups, args.language_steps)


def min_cells(step: int, steps: int) -> int:
    """Return how many cells a part must show to be asked about."""
    done = min(1.0, 2 * step / steps)
    return round(MIN_CELLS[0] ** (1 - done) * MIN_CELLS[1] ** done)


# ----------------------------------------------------------------------------------------------------------------------
# What it can see


@torch.no_grad()
def score(learner: Learner, batch: dict) -> dict:
    """Return what the model sees in held-out scenes: {"patches": ..., "answers": {kind: {size: (right, n)}}}."""
    learner.eval()
    x = torch.cat([learner.patch_outputs(part) for part in np.array_split(batch["images"], 10)])
    targets = make_targets(batch, learner.patch)
    results = {"patches": dense_scores(learner.dense(x[:, 1:]), targets)}
    tokens = learner.image_tokens(x)
    results["image_tokens"] = dense_scores(
        learner.read_patches(tokens, torch.arange(learner.patches)), targets
    )
    asker = Asker(batch, np.random.default_rng(0))
    sizes = np.maximum(asker.cells[:, 0], asker.cells[:, 1]) * 4  # px
    results["answers"] = {}
    for kind in (
        "colour",
        "noun",
        "at",
        "where",
        "far",
        "way",
        "side",
        "open",
        "tip",
        "grip",
        "count",
    ):
        asked = [asker.ask(b, kind) for b in range(len(batch["images"])) for _ in range(2)]
        asked = [q for q in asked if q]
        answers = []
        for i in range(0, len(asked), 500):
            length = max(len(q.answer.split()) for q in asked)
            answers += learner.answer(tokens, asked[i : i + 500], length)
        rows = []
        for q, words in zip(asked, answers):
            right = q.answer.split()
            px = float(sizes[q.scene, q.part]) if q.part >= 0 else 0.0
            if kind in ("where", "tip"):
                off = distance(words, right)
            elif kind == "at":
                off = float(words[0] != right[0])
            else:
                off = np.mean([a != b for a, b in zip(words, right)])
            rows.append((px, float(off)))
        results["answers"][kind] = rows
    return results


def distance(words: list[str], right: list[str]) -> float:
    """Return the pixels between two places in words, or inf if the first is not a place."""
    try:
        a, b = (np.array([int(w[1:]) for w in place]) for place in (words, right))
    except ValueError:
        return np.inf
    return 4.0 * float(np.hypot(*(a - b)))


# ----------------------------------------------------------------------------------------------------------------------
# The result


def settle_unseen_words(learner: Learner, seen: set[int]) -> None:
    """Draw the embeddings of words that no question used again, as large as those of the others."""
    weight = learner.vlm.get_input_embeddings().weight
    known = weight[sorted(seen)].detach()
    generator = torch.Generator().manual_seed(0)
    new = known.mean(0) + known.std(0) * torch.randn(weight.shape, generator=generator)
    rest = [i for i in range(len(weight)) if i not in seen]
    weight.data[rest] = new[rest]


def seen_words(scenes: Scenes, learner: Learner) -> set[int]:
    """Return the tokens that questions and answers use."""
    asker = Asker(scenes.batch(SHARD + np.arange(SHARD)), np.random.default_rng(0), 1)
    texts = {text for q in asker.questions(4 * QUESTIONS) for text in (q.text, q.answer)}
    return {number for text in texts for number in learner.tokenize([text])[0]}


def export(args: Args, learner: Learner, scenes: Scenes, vision: int, language: int) -> None:
    """Score the model on held-out scenes, and write it with its card. vision, language: steps of the two parts."""
    held_out = scenes.batch(np.arange(HELD_OUT))
    scores = score(learner, held_out)
    settle_unseen_words(learner, seen_words(scenes, learner))
    out = make_folder(args.out)
    learner.vlm.to(torch.bfloat16).save_pretrained(out)
    learner.tokenizer.save_pretrained(out)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = BlipImageProcessorPil(
        size=size, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3
    )
    processor.save_pretrained(out)
    write_json(Path(args.work) / "scores.json", scores)
    training = {
        "vision": vision,
        "language": language,
        "vision_batch": args.vision_batch,
        "language_batch": args.language_batch,
        "shards": args.shards,
        "scenes": scenes.size - HELD_OUT,
        "held_out": HELD_OUT,
    }
    write_card(out, learner.vlm, scores, training)


def main(args: Args) -> None:
    os.nice(max(0, args.nice - os.nice(0)))
    torch.set_num_threads(args.threads)
    work = make_folder(args.work)
    log = work / "log.txt"
    torch.manual_seed(args.seed)
    learner = Learner()

    draw_missing(work / "scenes", args.seed, args.shards, args.threads, args.nice)
    scenes = Scenes(work / "scenes", args.shards)

    def batch(part: int, step: int, n: int) -> tuple[dict, np.random.Generator]:
        # A step's batch depends on (seed, part, step) alone.
        rng = np.random.default_rng([args.seed, part, step])
        return scenes.batch(HELD_OUT + rng.choice(scenes.size - HELD_OUT, n, replace=False)), rng

    vision = vision_part(args, learner)
    if not args.now:
        vision.train(
            lambda step: {"dense": learner.vision_loss(*batch(1, step, args.vision_batch))},
            log,
        )
    vision.use_average()
    language = language_part(args, learner)
    if not args.now:
        language.train(
            lambda step: learner.language_loss(
                *batch(2, step, args.language_batch), min_cells(step, args.language_steps)
            ),
            log,
        )
    language.use_average()
    export(args, learner, scenes, vision.step, language.step)


if __name__ == "__main__":
    run_cli(main, ARGS)
