"""
A run's report: success by stage and split with intervals, and each task's success after each stage.

Reads eval.json and summary.json of a run's finished stages. Writes report.json, report.md and
report.png into the run's folder, and a model card, README.md, into the last stage's checkpoint, so
that this folder can be uploaded to the hub. tools/compare.py compares several runs.

python report.py --run runs/NAME-seed0
"""

from dataclasses import dataclass

from common.cli import parse


@dataclass
class Args:
    run: str  # folder of the run, e.g. runs/NAME-seed0
    domain: str = ""  # name of a file in domains/ (default: that of the run's first checkpoint)


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np

from common.errors import UserError, run_cli
from common.figures import pyplot
from common.files import atomic_write, check_links, check_writable, read_entries, write_json
from common.rates import COMMON_PROTOCOL, all_tasks, costs, splits, wilson
from common.runs import checkpoint_config, is_hub_name
from domains import load_domain

COLOURS = {"expert": "#4878a8", "rl": "#d1603d", "unseen": "#5a9a68"}
LABELS = {"expert": "expert tasks", "rl": "RL tasks", "unseen": "unseen tasks"}

# ----------------------------------------------------------------------------------------------------------------------
# What the stages left


def stage_order(folder: str | Path) -> list[Path]:
    """Return a run's finished stages in the order of Algorithm 1: 0-sft, 1-rl-..., 1-sft, 2-rl-..., ..."""
    stages = [
        p for p in Path(folder).glob("*") if re.fullmatch(r"\d+-(sft|rl-.+)", p.name) and p.is_dir()
    ]
    return sorted(stages, key=lambda p: (int(p.name.split("-")[0]), p.name.endswith("-sft")))


def method_and_seed(stages: list[Path]) -> tuple[str, int]:
    """Return loop.sh's METHOD and SEED of a run, by the arguments that its stages recorded."""
    recorded = [read_entries(stage / "stage.json", {"args": dict})["args"] for stage in stages]
    method = "ire-vla"
    if any(args.get("train_vlm") for args in recorded):
        sft = any(re.fullmatch(r"[1-9]\d*-sft", stage.name) for stage in stages)
        method = "ppo-replay" if sft else "rl-lora"
    elif any(args.get("freeze_vlm") for args in recorded):
        method = "ire-vla-freeze"
    elif len(stages) > 1 and not any("-rl-" in stage.name for stage in stages):
        method = "sft-only"
    return method, recorded[-1].get("seed", 0)


def count(tasks: dict[str, dict], names: Iterable[str]) -> dict[str, int]:
    """Return {"successes": k, "episodes": n} of some tasks of an eval.json."""
    outcomes = [outcome for name in names for outcome in tasks[name]["success"]]
    return {"successes": sum(outcomes), "episodes": len(outcomes)}


def read_evaluation(stage: Path) -> dict:
    """Return a stage's eval.json. Raises UserError if it holds something else than evaluate.py writes."""
    again = f"delete it, then run python evaluate.py --checkpoint {stage}"
    path = stage / "eval.json"
    evaluated = read_entries(path, {"protocol": dict, "tasks": dict}, again)
    for task, row in evaluated["tasks"].items():
        outcomes = row.get("success") if isinstance(row, dict) else None
        if not isinstance(outcomes, list) or not outcomes or not all(x in (0, 1) for x in outcomes):
            raise UserError(f"{path} has no outcomes of {task}: {again}")
    return evaluated


def make_row(stage: Path, tasks: dict[str, dict], spent: list[dict], domain: ModuleType) -> dict:
    """Return a stage's entry in report.json. spent: the summaries of this stage and of those without an entry.

    A split has an entry if all of its tasks were evaluated.
    """
    own = spent[-1].get("task")
    missing = [task for task in ([own] if own else all_tasks(domain)) if task not in tasks]
    if missing:
        raise UserError(
            f"{stage}/eval.json lacks {missing[0]} and {len(missing) - 1} more tasks: "
            f"evaluate them with python evaluate.py --checkpoint {stage}"
        )
    cost = costs(spent)
    evaluated = [task for task in all_tasks(domain) if task in tasks]
    return {
        "name": stage.name,
        **cost,
        "seconds": round(cost["seconds"], 1),
        "splits": {
            split: count(tasks, names)
            for split, names in splits(domain).items()
            if set(names) <= tasks.keys()
        },
        "tasks": {task: count(tasks, [task]) for task in evaluated},
        "outcomes": {task: "".join(map(str, tasks[task]["success"])) for task in evaluated},
    }


def make_report(args: Args) -> dict:
    """Return the content of report.json. Raises UserError for a run without a finished or an evaluated stage."""
    stages = stage_order(args.run)
    if not stages:
        check_links(args.run)
        raise UserError(
            f"{args.run} has no finished stage: run loop.sh first, or use another --run"
        )
    check_writable(args.run, "change its permissions, or copy the run")
    config = checkpoint_config(stages[0], "vlm", "image_size")
    method, seed = method_and_seed(stages)
    domain = load_domain(args.domain or config["domain"])
    rows = []
    spent = []
    protocol = None
    # Older results do not name these.
    older = {**COMMON_PROTOCOL, "image_size": config["image_size"]}
    made_by: dict[str, list[str]] = {}
    for stage in stages:
        spent.append(read_entries(stage / "summary.json", {"seconds": float, "env_steps": int}))
        if not (stage / "eval.json").exists():
            continue  # it has no row; its cost goes into the next row
        evaluated = read_evaluation(stage)
        stage_protocol = older | evaluated["protocol"]
        if protocol not in (None, stage_protocol):
            raise UserError(
                f"{stage}/eval.json has another protocol than the stages before it: "
                f"evaluate again with python evaluate.py --checkpoint {stage}"
            )
        protocol = stage_protocol
        for package, version in evaluated.get("versions", {}).items():
            versions = made_by.setdefault(package, [])
            if version not in versions:
                versions.append(version)
        rows.append(make_row(stage, evaluated["tasks"], spent, domain))
        spent = []
    if not rows:
        raise UserError(
            f"no stage of {args.run} was evaluated: run python evaluate.py --checkpoint {stages[-1]}, "
            f"then this command again"
        )
    return {
        "domain": domain.NAME,
        "method": method,
        "seed": seed,
        "vlm": config["vlm"],
        "versions": {package: ", ".join(versions) for package, versions in made_by.items()},
        "protocol": protocol,
        "stages": rows,
    }


def rate(count: dict[str, int]) -> float:
    """Return the success rate of {"successes": k, "episodes": n}."""
    return count["successes"] / max(1, count["episodes"])


# ----------------------------------------------------------------------------------------------------------------------
# How it is shown


def cell(count: dict[str, int] | None) -> str:
    """Return a success rate with its interval: 0.83 [0.80, 0.86]. Nothing if it was not evaluated."""
    if count is None:
        return ""
    low, high = wilson(count["successes"], count["episodes"])
    return f"{rate(count):.2f} [{low:.2f}, {high:.2f}]"


def split_cell(stage: dict, split: str) -> str:
    """Return a split's cell of a stage. Stage 1 has its own task's among the RL tasks, with its name."""
    if split == "rl" and split not in stage["splits"] and len(stage["tasks"]) == 1:
        ((task, own),) = stage["tasks"].items()
        return f"{task}: {cell(own)}"
    return cell(stage["splits"].get(split))


def split_table(report: dict) -> list[str]:
    """Return the lines of the table that has a row for each stage and a column for each split."""
    lines = [
        "| stage | expert | RL tasks | unseen | minutes | env steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage in report["stages"]:
        rates = " | ".join(split_cell(stage, split) for split in COLOURS)
        lines.append(
            f"| {stage['name']} | {rates} | {stage['seconds'] / 60:.1f} | {stage['env_steps']:,} |"
        )
    return lines


def task_table(report: dict, domain: ModuleType) -> list[str]:
    """Return the lines of the table that has a row for each task and a column for each stage."""
    stages = report["stages"]
    lines = [
        f"| task | {' | '.join(stage['name'] for stage in stages)} |",
        "| --- " * (len(stages) + 1) + "|",
    ]
    for split, names in splits(domain).items():
        lines.append(f"| **{split}** |" + " |" * len(stages))
        for task in names:
            counts = [stage["tasks"].get(task) for stage in stages]
            rates = " | ".join("" if c is None else f"{rate(c):.2f}" for c in counts)
            lines.append(f"| {task} | {rates} |")
    return lines


def markdown(report: dict, domain: ModuleType) -> str:
    """Return the text of report.md."""
    protocol = ", ".join(f"{name} {value}" for name, value in report["protocol"].items())
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [
        f"# {report['method']} on {report['domain']}, seed {report['seed']}, VLM {report['vlm']}",
        "",
        "Success rate of the greedy policy, with its 95 % Wilson interval. A stage without a rate was not evaluated on",
        "all of these tasks. Stage 1 of iRe-VLA is evaluated on its own task alone. The minutes and environment steps",
        "of a stage that was not evaluated at all are in the next row.",
        "",
        *split_table(report),
        "",
        *task_table(report, domain),
        "",
        f"Protocol: {protocol}.",
        "",
        f"Versions: {versions}.",
    ]
    return "\n".join(lines) + "\n"


CARD = """---
{front}
---

A vision-language-action policy for {domain}: an image and an instruction to an action. Trained by iRe-VLA (arXiv
2501.16664).

```python
import torch
from model import VLA  # iRe-VLA's model.py

vla = VLA.load("{name}")  # this folder, or its name on the hub
with torch.no_grad():  # (B, H, W, 3) uint8 images, B instructions -> (B, A) in [-1, 1]
    action = vla.act(*vla.encode(images, instructions))
```

The VLM without the action head, by the libraries' own classes:

```python
{vlm_only}
```

"""


def model_card(checkpoint: Path, text: str) -> str:
    """Return a checkpoint's README.md for the Hugging Face hub. text: the report's."""
    config = checkpoint_config(checkpoint)
    name = checkpoint.name
    has_lora = (checkpoint / "adapter_config.json").exists()
    vlm = f"{name}/vlm" if config["weights"] == "vlm" else config["weights"]
    front = [f"library_name: {'peft' if has_lora else 'transformers'}"]
    if is_hub_name(config["vlm"]):  # the hub has no `tiny`, and no local folder
        front.append(f"base_model: {config['vlm']}")
    front += [
        "pipeline_tag: robotics",
        "tags: [robotics, vision-language-action, ire-vla]",
        "license: mit",
    ]
    code = ["from transformers import Blip2ForConditionalGeneration", ""]
    code += [f'vlm = Blip2ForConditionalGeneration.from_pretrained("{vlm}")']
    if has_lora:
        code.insert(0, "from peft import PeftModel")
        code.append(f'vlm = PeftModel.from_pretrained(vlm, "{name}")')
    card = CARD.format(
        front="\n".join(front), domain=config["domain"], name=name, vlm_only="\n".join(code)
    )
    return card + text


def draw_splits(ax, report: dict, axes_height: float) -> None:
    """Draw each split's success rate over the stages, with intervals. axes_height: inches, to place the numbers."""
    stages = report["stages"]
    ends = []
    for j, (split, colour) in enumerate(COLOURS.items()):
        x = [i + 0.06 * (j - 1) for i, s in enumerate(stages) if split in s["splits"]]
        counts = [stage["splits"][split] for stage in stages if split in stage["splits"]]
        if not counts:
            continue
        y = [rate(c) for c in counts]
        intervals = [wilson(c["successes"], c["episodes"]) for c in counts]
        below = [max(0, value - low) for value, (low, _) in zip(y, intervals)]
        above = [max(0, high - value) for value, (_, high) in zip(y, intervals)]
        style = {
            "color": colour,
            "marker": "o",
            "markersize": 4,
            "capsize": 2,
            "label": LABELS[split],
        }
        ax.errorbar(x, y, [below, above], **style)
        ends.append((y[-1], colour))
    lowest = 0.0
    for y, colour in sorted(ends):
        # Numbers that would overlap are drawn one above the other.
        at = len(stages) - 0.94, max(y, lowest)
        ax.annotate(f"{y:.2f}", at, (6, -3), textcoords="offset points", color=colour, fontsize=9)
        lowest = at[1] + 0.16 / axes_height
    ax.set(ylim=(0, 1.02), ylabel="success (95 % Wilson interval)", xlim=(-0.3, len(stages) - 0.5))
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="best")
    title = f"{report['method']} on {report['domain']}, seed {report['seed']}, VLM {report['vlm']}"
    ax.set_title(title, fontsize=10, loc="left")


def draw_tasks(ax, report: dict, domain: ModuleType) -> None:
    """Draw the matrix of tasks over stages. A task's name has its split's colour."""
    names = all_tasks(domain)
    matrix = [
        [
            rate(stage["tasks"][task]) if task in stage["tasks"] else np.nan
            for stage in report["stages"]
        ]
        for task in names
    ]
    ax.imshow(matrix, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if np.isnan(value):
                continue
            text = "1.0" if value == 1 else f"{value:.2f}"[1:]
            colour = "black" if value > 0.6 else "white"
            ax.text(j, i, text, ha="center", va="center", fontsize=5.5, color=colour)
    ax.set_yticks(range(len(names)), names, fontsize=6)
    colours = [COLOURS[split] for split, group in splits(domain).items() for _ in group]
    for label, colour in zip(ax.get_yticklabels(), colours):
        label.set_color(colour)
    ax.set_title("success of each task after each stage", fontsize=10, loc="left")


def draw(report: dict, domain: ModuleType, path: Path) -> None:
    """Write report.png: the splits over the stages, and the matrix of tasks over stages."""
    plt = pyplot()
    rows = 0.19 * len(all_tasks(domain))  # inches
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(13, max(rows + 1.8, 3.6)), width_ratios=[1.25, 1], layout="constrained"
    )
    draw_splits(left, report, rows + 0.8)
    draw_tasks(right, report, domain)
    short = [stage["name"].replace("-new", "") for stage in report["stages"]]
    for ax in (left, right):
        ax.set_xticks(range(len(short)), short, rotation=35, ha="right", fontsize=8)
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)


def main(args: Args) -> None:
    report = make_report(args)
    domain = load_domain(report["domain"])
    folder = Path(args.run)
    last = folder / report["stages"][-1]["name"]
    owns_last = not last.is_symlink()  # else it is loop.sh's START, which belongs to another run
    if owns_last:
        check_writable(last, "change its permissions, or copy the run")
    text = markdown(report, domain)
    write_json(folder / "report.json", report)
    with atomic_write(folder / "report.md") as tmp:
        tmp.write_text(text)
    with atomic_write(folder / "report.png") as tmp:
        draw(report, domain, tmp)
    if owns_last:
        with atomic_write(last / "README.md") as tmp:
            tmp.write_text(model_card(last, text))
    print("\n".join(split_table(report)))
    print(f"report: {folder / 'report.md'}, {folder / 'report.png'}")


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
