"""Copy a checkpoint to publish it: its weights in bfloat16, evaluated again, with a model card.

    python -m tools.publish --checkpoint runs/metaworld-seed0/5-sft --out pretrained/metaworld

Rounding halves the file and changes a policy a little, so the copy is evaluated itself. An episode
counts as a success at its first success. The card also counts those that still hold HOLD steps
later. The copy is a checkpoint like any other: evaluate.py, loop.sh's START and stages take it.
"""

from dataclasses import dataclass

from common.cli import parse


@dataclass
class Args:
    checkpoint: str  # folder of a finished stage
    out: str  # folder of the copy, new or empty
    episodes: int = 25  # evaluation episodes per task; 0: none


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from common.cli import check_numbers
from common.devices import pick_device, use_threads
from common.digests import digests
from common.errors import UserError, run_cli
from common.files import make_folder, read_tensors, write_json
from common.rates import all_tasks, summary
from common.runs import checkpoint_config
from domains import load_domain
from evaluate import evaluate, held_successes, only_simulated, result_file
from model import VLA
from report import model_card

HOLD = 20  # steps after a success at which to check whether it still holds
COPIED = ("config.json", "summary.json", "stage.json", "adapter_config.json", "vlm")


def round_weights(path: Path) -> None:
    """Round a file's float32 tensors to bfloat16, in place."""
    tensors, metadata = read_tensors(path)
    rounded = {name: x.bfloat16() if x.dtype == torch.float32 else x for name, x in tensors.items()}
    save_file(rounded, path, metadata)


def main(args: Args) -> None:
    check_numbers(args)
    checkpoint = Path(args.checkpoint)
    out = Path(args.out)
    config = checkpoint_config(checkpoint)
    domain = load_domain(config["domain"])
    if args.episodes:
        only_simulated(
            domain, "an evaluation of many episodes at once (--episodes 0 leaves it out)"
        )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: delete it, or choose another --out")
    make_folder(out)
    for name in (*COPIED, *(path.name for path in checkpoint.glob("*.safetensors"))):
        source = checkpoint / name
        if source.is_dir():
            shutil.copytree(source, out / name)
        elif source.exists():
            shutil.copy(source, out / name)
    for path in out.rglob("*.safetensors"):
        round_weights(path)
    write_json(out / "config.json", {**config, "parent": None, "sha256": digests(out)})
    text = f"A copy of {checkpoint.parent.name}/{checkpoint.name}, rounded to bfloat16.\n"
    if args.episodes:
        vla = VLA.load(out, device=pick_device())
        use_threads(1)  # the environments take the cores
        result = evaluate(vla, domain, all_tasks(domain), args.episodes, hold=HOLD)
        write_json(out / "eval.json", result_file(vla, domain, result, HOLD))
        held = held_successes(result)
        text += f"\nSuccess rates of {args.episodes} episodes a task: {summary(result, domain)}.\n"
        text += f"\nStill a success {HOLD} steps later: {summary(held, domain)}.\n"
        text += f"\n| task | success | still {HOLD} steps later |\n| --- | --- | --- |\n"
        for task, row in result.items():
            rates = (f"{np.mean(row[name]):.2f}" for name in ("success", "held"))
            text += f"| {task} | {' | '.join(rates)} |\n"
    (out / "README.md").write_text(model_card(out, text))
    print(text)


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
