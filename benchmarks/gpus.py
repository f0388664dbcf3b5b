"""A calculation, not a measurement: blip2-opt-2.7b on the paper's GPUs, one RTX 4090 for stage 1 and four A100 for SFT.

Operations and bytes are counted by plan.py on the model's configuration, without weights. A GPU is taken to reach
--share of its bfloat16 peak, but no pass is faster than reading the weights once. "Fit" is by what autograd keeps, the
scores of plain attention among it. Prints the table of results/README.md.

python benchmarks/gpus.py
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import stage_rl  # noqa: E402
from domains import load_domain  # noqa: E402
from plan import count, paper_config  # noqa: E402
from stage0_sft import Args  # noqa: E402

GPUS = {  # how many, bfloat16 FLOP/s, bytes/s, bytes of memory, each; NVIDIA's data sheets, without sparsity
    "RTX 4090": (1, 165e12, 1.01e12, 24e9),
    "four A100 80 GB": (4, 312e12, 2.04e12, 80e9),
}
WORDS, A = 6, 4  # of Meta-World
RL = stage_rl.Args(task="", parent="", out="")
DOMAIN = load_domain("metaworld")
BUDGET, EPOCHS, ROWS = stage_rl.algo_and_budget(RL, DOMAIN)[1], RL.epochs, (RL.rollout + 1) * RL.envs
STEPS, BATCH = DOMAIN.STEPS, Args("", "").batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.4, help="of a GPU's peak")
    share = parser.parse_args().share

    everywhere = Args("", "", image_size=224, dtype="bfloat16")
    language = replace(everywhere, lora_targets="language")
    head = count(paper_config(), everywhere, A, WORDS, False, freeze_vlm=True)
    kinds = {
        "LoRA everywhere": count(paper_config(), everywhere, A, WORDS, False),
        "LoRA everywhere, `--checkpointing`": count(paper_config(), everywhere, A, WORDS, False, checkpointing=True),
        "LoRA in the language model": count(paper_config(), language, A, WORDS, False),
        "LoRA in the language model, `--cache`": count(paper_config(), language, A, WORDS, False, cache=True),
    }
    update = 2 * (head.both - head.encode)  # the head and the critic
    counted = [
        f"{head.encode / 1e9:,.0f} GFLOP, {head.weights / 1e9:.1f} GB of weights read",
        f"and {EPOCHS} x {update / 1e9:.1f} GFLOP of updates each",
        f"{head.tokens} x {head.width} bfloat16 x {ROWS:,}",
    ]
    labels = [
        "stage 1, one GPU: an image to its latents, 8 at a time",
        f"stage 1, one GPU: {BUDGET:,} decisions, without the simulators",
        "stage 1: PPO's latents",
    ]
    for kind, c in kinds.items():
        fixed = f"{(c.weights + 4 * c.trained) / 1e9:.1f} GB and {c.kept / 1e9:.2f} a sample"
        counted += [f"{c.both / 1e9:,.0f} GFLOP a sample", fixed, f"{STEPS:,} steps of {BATCH}"]
        labels += [f"SFT, {kind}", "... that fit into one GPU", "... stage 0"]

    columns = []
    for n, peak, read, memory in GPUS.values():
        flops = share * peak
        column = [
            f"{1e3 * max(head.encode / flops, head.weights / read / 8):.1f} ms",
            f"{BUDGET * (head.encode + EPOCHS * update) / flops / 60:.0f} minutes",
            f"{2 * ROWS * head.tokens * head.width / 1e9:.2f} GB",
        ]
        for c in kinds.values():
            column += [
                f"{n * flops / c.both:,.0f} samples/s",
                f"{(memory - c.weights - 4 * c.trained) / c.kept:,.0f} samples",
                f"{STEPS * BATCH * c.both / (n * flops) / 3600:.1f} hours",
            ]
        columns.append(column)
    print(f"| calculated, at {share:.0%} of the peak | counted | {' | '.join(GPUS)} |\n| --- | --- | --- | --- |")
    for cells in zip(labels, counted, *columns):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
