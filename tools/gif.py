"""Draw several tasks before and after training side by side, as a GIF.

    python -m tools.gif --before pretrained/metaworld-0-sft --after pretrained/metaworld \\
        --tasks drawer-open-new button-press-new window-open-new --episode 1 --out before_after.gif

A column is a task, a row a checkpoint: the same initial state, the greedy policy.
"""

from dataclasses import dataclass

from common.cli import parse


@dataclass
class Args:
    before: str  # checkpoint of the upper row
    after: str  # checkpoint of the lower row
    tasks: tuple[str, ...]  # names of the domain's tasks, a column each
    out: str  # the .gif
    episode: int = 0  # which of the evaluation's initial states
    size: int = 150  # pixels of a task's square


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.episode_file import EVAL_SEED
from common.errors import UserError, run_cli
from common.files import atomic_write, make_folder
from common.rates import check_task
from domains import load_domain
from evaluate import VIDEO_FPS, episode_frames
from model import VLA

FPS = 10
LABEL = 16  # pixels of a line of text
COLOURS = 96


def cells(args: Args, checkpoint: str) -> list[list[Image.Image]]:
    """Return the frames of each task's episode."""
    vla = VLA.load(checkpoint)
    domain = load_domain(vla.config["domain"])
    episodes = []
    for task in args.tasks:
        check_task(task, domain)
        frames = list(episode_frames(vla, domain, task, EVAL_SEED + args.episode))
        chosen = frames[:: VIDEO_FPS // FPS]
        episodes.append([Image.fromarray(x).resize((args.size, args.size)) for x in chosen])
    return episodes


def compose(args: Args, rows: dict[str, list[list[Image.Image]]], t: int) -> Image.Image:
    """Return frame t of all episodes. One that has ended shows its last frame."""
    size = args.size
    width = size * len(args.tasks)
    picture = Image.new("RGB", (width, len(rows) * (size + LABEL) + LABEL), "white")
    draw = ImageDraw.Draw(picture)
    for i, task in enumerate(args.tasks):
        draw.text((i * size + 4, 2), task, fill="black")
    for j, (label, episodes) in enumerate(rows.items()):
        top = LABEL + j * (size + LABEL)
        draw.text((4, top + 2), label, fill="black")
        for i, frames in enumerate(episodes):
            picture.paste(frames[min(t, len(frames) - 1)], (i * size, top + LABEL))
    return picture


def main(args: Args) -> None:
    if not args.out.endswith(".gif"):
        raise UserError(f"--out must end in .gif (got {args.out})")
    make_folder(Path(args.out).parent)
    rows = {"before": cells(args, args.before), "after": cells(args, args.after)}
    length = max(len(frames) for episodes in rows.values() for frames in episodes)
    pictures = [compose(args, rows, t) for t in range(length)]
    # One palette for all frames: colours would flicker otherwise.
    palette = Image.fromarray(np.vstack([np.asarray(p) for p in pictures[::5]])).quantize(COLOURS)
    frames = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    with atomic_write(args.out) as tmp:
        frames[0].save(
            tmp, "GIF", save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0
        )
    print(f"wrote {args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
