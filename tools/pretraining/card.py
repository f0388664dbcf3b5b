"""The model card of the pre-trained tiny BLIP-2: how it was made, what it has seen, what it can see."""

from pathlib import Path

import numpy as np
from transformers import Blip2ForConditionalGeneration

SIZES = (0, 16, 48, 144, 1 << 20)  # px of a part, in the view that shows more of it
BY_SIZE = {  # kind of question: (column, what counts as right)
    "colour": "colour",
    "noun": "noun",
    "at": "colour at a place",
    "where": "place within 6 px",
}
OTHERS = {
    "tip": "place of the gripper within 6 px",
    "way": "way from the gripper (three words, share of words right)",
    "far": "distance (one of 8)",
    "side": "left or right of another part",
    "open": "how far open (one of 3)",
    "grip": "gripper open or closed",
    "count": "number of things",
}
NEAR = 6.0  # px
CARD = """---
license: mit
library_name: transformers
---

# BLIP-2 tiny, pre-trained on generic scenes

A BLIP-2 of transformers' own classes with {millions:.2f} M weights, stored in bfloat16. It was made by

    python -m tools.pretrain --vision-steps {vision} --language-steps {language} --shards {shards}

| part | size |
| --- | --- |
| image | {image} x {image} px, patches of {patch} px |
| vision tower | width {vision_width}, {vision_layers} layers |
| Q-Former | width {width}, {qformer_layers} layers, {queries} queries |
| language model (OPT) | width {width}, {language_layers} layers, {vocabulary} tokens |

## Data

It has seen {scenes:,} random scenes, drawn by MuJoCo (`tools/pretraining/scenes.py`): a table, walls, clutter, one to
eight things and mostly an arm with a gripper. Things are primitives, turned bodies such as bowls and bottles, and
compounds of primitives: boxes with a button, cabinets with a drawer or a hinged door, frames with a sliding pane,
levers, handles on panels. Colours, textures, lights, sizes, cameras and positions are drawn from continuous
distributions. An image has one view, or two views one above the other.

It has seen no model, mesh, colour, camera or instruction of `domains/`, and no image of any task. Its drawers, doors,
windows and buttons are generic: no proportion is taken from a task. `tests/test_pretrain.py` checks the words and the
cameras.

The tokenizer knows {vocabulary} tokens: a generic list of English words, letters and suffixes. It spells other words.
Words that no question used have random embeddings.

## Training

1. The vision tower ({vision:,} steps of {vision_batch} scenes) predicts for each patch what each cell of 2 x 2 px
   shows (noun, colour, depth), and the ways to the nearest part and to the gripper.
2. Q-Former and language model ({language:,} steps of {language_batch} scenes with 4 questions each) learn to answer
   questions in words. The tower learns on with a smaller step. Two auxiliary losses read the patches'
   targets from the image tokens, and the place of the asked part from the latents.

The weights are a moving average.

## What it can see

{held_out:,} held-out scenes, greedy answers. Size is the visible area of the part in pixels of the 64 x 64 image, in
the view that shows more of it.

{by_size}

Mean distance between the answered and the true place: {place_px:.1f} px (the words' grid alone: 1.5 px).

| other questions | right | n |
| --- | --- | --- |
{others}

| patches (cells of named parts) | vision tower | image tokens |
| --- | --- | --- |
{patches}
"""


def is_right(kind: str, off: float) -> float:
    """Return the share of an answer that is right. off: its distance in px, or its share of wrong words."""
    return float(off <= NEAR) if kind in ("where", "tip") else 1 - off


def size_table(answers: dict) -> str:
    """Return the table of the questions about parts of different sizes."""
    lines = ["| size in px | " + " | ".join(BY_SIZE.values()) + " | n |"]
    lines.append("| --- " * (len(BY_SIZE) + 2) + "|")
    for low, high in zip(SIZES, SIZES[1:]):
        cells = []
        n = 0
        for kind in BY_SIZE:
            right = [is_right(kind, off) for px, off in answers[kind] if low <= px < high]
            cells.append(f"{np.mean(right):.2f}" if right else "")
            n += len(right)
        name = f"{low} to {high - 1}" if high < SIZES[-1] else f"{low} or more"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {n} |")
    return "\n".join(lines)


def write_card(
    out: Path, vlm: Blip2ForConditionalGeneration, scores: dict, training: dict[str, int]
) -> None:
    """Write README.md. training: the numbers of scenes, steps and batches that its text names."""
    config = vlm.config
    answers = scores["answers"]
    others = "\n".join(
        f"| {text} | {np.mean([is_right(kind, off) for _, off in answers[kind]]):.2f} | {len(answers[kind])} |"
        for kind, text in OTHERS.items()
    )
    units = {
        "noun": "noun right (of 33)",
        "colour": "colour right (of 12)",
        "depth": "error of the logarithm of depth",
        "near_px": "way to the nearest part, rms px",
        "tip_px": "way to the gripper, rms px",
    }
    patches = "\n".join(
        f"| {text} | {scores['patches'][name]:.2f} | {scores['image_tokens'][name]:.2f} |"
        for name, text in units.items()
    )
    places = [off for _, off in answers["where"] if np.isfinite(off)]
    text = CARD.format(
        millions=sum(p.numel() for p in vlm.parameters()) / 1e6,
        image=config.vision_config.image_size,
        patch=config.vision_config.patch_size,
        vision_width=config.vision_config.hidden_size,
        vision_layers=config.vision_config.num_hidden_layers,
        width=config.qformer_config.hidden_size,
        qformer_layers=config.qformer_config.num_hidden_layers,
        queries=config.num_query_tokens,
        language_layers=config.text_config.num_hidden_layers,
        vocabulary=config.text_config.vocab_size,
        by_size=size_table(answers),
        others=others,
        patches=patches,
        place_px=np.mean(places),
        **training,
    )
    (out / "README.md").write_text(text)
