"""
Compare runs: a table of several methods and seeds, training curves, and success over the rounds.

    python -m tools.compare table results/NAME/*-seed0 --out results/NAME
    python -m tools.compare learned results/NAME/*-seed[12] --out results/NAME
    python -m tools.compare curves runs/fig4-NAME-seed0/s*/* --out runs/fig4-NAME-seed0
    python -m tools.compare rounds results/NAME/ire-vla-seed* --out results/NAME
"""

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import tyro
from scipy.stats import binomtest

from common.cli import parse_command
from common.errors import UserError, run_cli
from common.figures import pyplot
from common.files import atomic_write, read_entries
from common.rates import COMMON_PROTOCOL, COSTS, all_tasks, costs, splits, wilson
from domains import load_domain

# Success of the paper's SFT policy and of its iRe-VLA. Meta-World: Table I. Panda: Fig. 6. The
# kitchen is missing because the paper's RL and unseen tasks there are not ours.
PAPER = {
    "metaworld": {"expert": (0.83, 0.83), "rl": (0.41, 0.89), "unseen": (0.51, 0.80)},
    "panda": {"expert": (0.73, 0.74), "rl": (0.35, 0.80), "unseen": (0.37, 0.61)},
}
STAGE0 = "SFT (stage 0)"
COLOURS = {"expert": "#4878a8", "rl": "#d1603d", "unseen": "#5a9a68"}
LABELS = {"expert": "expert tasks", "rl": "RL tasks", "unseen": "unseen tasks"}

Folders = tyro.conf.Positional[tuple[str, ...]]


@dataclass
class Run:
    """A run's report.json, up to the last stage that is compared."""

    folder: str
    domain: str
    vlm: str
    method: str
    seed: int
    protocol: dict
    stages: list[dict]  # one for each evaluated stage

    def until(self, name: str) -> "Run":
        """Return the same run, up to and with the stage of this name."""
        end = [stage["name"] for stage in self.stages].index(name) + 1
        return replace(self, stages=self.stages[:end])


def read_runs(folders: Iterable[str]) -> list[Run]:
    """Return the runs of some folders. Raises UserError for other domains or protocols than the first one's."""
    runs = []
    for folder in folders:
        path = Path(folder) / "report.json"
        if not path.exists():
            raise UserError(f"{path} is missing: python report.py --run {folder}")
        kinds = {
            "domain": str,
            "vlm": str,
            "method": str,
            "seed": int,
            "protocol": dict,
            "stages": list,
        }
        report = read_entries(path, kinds, f"make it again with python report.py --run {folder}")
        # Older reports do not name it.
        report["protocol"] = {**COMMON_PROTOCOL, **report["protocol"]}
        runs.append(Run(str(folder), *(report[name] for name in kinds)))
    if not runs:
        raise UserError("no folder to compare: name folders that hold a report.json")
    for run in runs:
        if (run.domain, run.protocol) != (runs[0].domain, runs[0].protocol):
            raise UserError(
                f"{run.folder} has another domain or protocol than {runs[0].folder}: name runs of one protocol"
            )
    return runs


def whole_stages(run: Run, domain: ModuleType) -> list[dict]:
    """Return the stages that were evaluated on all of the domain's tasks."""
    tasks = set(all_tasks(domain))
    return [stage for stage in run.stages if tasks <= stage["tasks"].keys()]


# ----------------------------------------------------------------------------------------------------------------------
# Methods side by side: the paper's Table I and Fig. 5


@dataclass
class Comparison:
    """Several methods after the last stage that all of their runs have, and stage 0."""

    domain: ModuleType
    vlm: str
    last: str  # that stage's name
    methods: dict[str, dict[int, Run]]  # {method: {seed: run}}; stage 0 is the method STAGE0


def side_by_side(folders: Iterable[str]) -> Comparison:
    """Return the methods of several reports after the last stage that all of them have.

    Raises UserError if the runs cannot be compared: other protocols, no later stage in common, or
    another stage 0 for the same seed.
    """
    runs = read_runs(folders)
    domain = load_domain(runs[0].domain)
    names = [[stage["name"] for stage in whole_stages(run, domain)] for run in runs]
    common = [name for name in names[0] if all(name in other for other in names)]
    if len(common) < 2 or common[0] != "0-sft":
        raise UserError(
            f"{', '.join(run.folder for run in runs)} do not share 0-sft and a stage after it: evaluate those after as "
            f"many rounds, then run report.py again"
        )
    methods = {STAGE0: {}}
    for run in runs:
        start = methods[STAGE0].setdefault(run.seed, run.until("0-sft"))
        if run.stages[0]["tasks"] != start.stages[0]["tasks"]:
            raise UserError(
                f"{run.folder} started from a different stage 0 than {start.folder}, of the same seed {run.seed}: "
                f"start all methods of a seed from one stage 0 (loop.sh's START)"
            )
        seeds = methods.setdefault(run.method, {})
        if run.seed in seeds:
            raise UserError(
                f"{run.folder} is a second {run.method} of seed {run.seed}: leave one of them out"
            )
        seeds[run.seed] = run.until(common[-1])
    return Comparison(domain, runs[0].vlm, common[-1], methods)


def pooled(stages: Iterable[dict], tasks: Iterable[str]) -> tuple[float, float, float, list[float]]:
    """Return the success rate on some tasks after the same stage of several seeds, and its spread.

    It is (rate of all episodes together, low and high end of its 95 % Wilson interval, [rate of
    each seed]).
    """
    tasks = list(tasks)
    successes = [sum(stage["tasks"][task]["successes"] for task in tasks) for stage in stages]
    episodes = [sum(stage["tasks"][task]["episodes"] for task in tasks) for stage in stages]
    k = sum(successes)
    n = sum(episodes)
    low, high = wilson(k, n)
    return k / n, low, high, [a / b for a, b in zip(successes, episodes)]


def only_one_solved(a: dict[int, Run], b: dict[int, Run], tasks: Iterable[str]) -> tuple[int, int]:
    """Return the numbers of episodes that only a's and only b's last stage solved, over the seeds that both have."""
    tasks = list(tasks)
    only_a = 0
    only_b = 0
    for seed in a.keys() & b.keys():
        outcomes_a = a[seed].stages[-1].get("outcomes", {})
        outcomes_b = b[seed].stages[-1].get("outcomes", {})
        for task in tasks:
            for x, y in zip(outcomes_a.get(task, ""), outcomes_b.get(task, "")):
                only_a += x > y
                only_b += x < y
    return only_a, only_b


def table_text(folders: Iterable[str]) -> str:
    """Return the text of table.md: success with intervals, the spread over the seeds, costs, and paired comparisons."""
    comparison = side_by_side(folders)
    domain = comparison.domain
    columns = {"expert": domain.EXPERT_TASKS}
    columns |= {task: [task] for task in domain.RL_TASKS}
    columns |= {"RL tasks": domain.RL_TASKS, "unseen": domain.UNSEEN_TASKS}
    columns = {name: tasks for name, tasks in columns.items() if tasks}
    lines = [
        f"# {domain.NAME}, VLM {comparison.vlm}: methods side by side, after {comparison.last}",
        "",
        "Success rate over the episodes of all seeds, its 95 % Wilson interval, and the least and the best seed.",
        "",
        "Costs are the mean over the seeds that counted them, without evaluations. A VLM forward is one image through",
        "the VLM. Peak GB is the most memory of a stage's own process, without its environments. Environment steps are",
        "those of RL, without the recording of D_rl.",
        "",
        f"| method (seeds) | {' | '.join(columns)} | minutes | environment steps | VLM forwards | peak GB |",
        "| --- " * (len(columns) + 5) + "|",
    ]
    for method, seeds in comparison.methods.items():
        cells = [f"{method} ({', '.join(map(str, seeds))})"]
        cells += [
            rate_cell([run.stages[-1] for run in seeds.values()], tasks)
            for tasks in columns.values()
        ]
        cells += cost_cells(seeds.values())
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Paired on the initial states, seed by seed: episodes that only one of two policies solved, and the p value of",
        "the exact two-sided sign test (McNemar).",
        "",
        "| | split | only the first | only the second | p |",
        "| --- | --- | --- | --- | --- |",
    ]
    for first, second in itertools.combinations(comparison.methods, 2):
        for split, tasks in splits(domain).items():
            a, b = only_one_solved(comparison.methods[first], comparison.methods[second], tasks)
            if a + b:
                p = binomtest(a, a + b).pvalue
                lines.append(f"| {first} against {second} | {split} | {a} | {b} | {p:.2g} |")
    return "\n".join(lines) + "\n"


def learned_text(folders: Iterable[str]) -> str:
    """Return the text of learned.md: what each method forgets, and what it transfers, as it learns task after task."""
    runs = read_runs(folders)
    domain = load_domain(runs[0].domain)
    methods: dict[str, list[dict[int, dict]]] = {}
    for run in runs:
        # A round's last stage stands for it: stage 2, or stage 1 of rl-lora.
        rounds = {int(stage["name"].split("-")[0]): stage for stage in whole_stages(run, domain)}
        methods.setdefault(run.method, []).append(rounds)
    shared = {m: set.intersection(*map(set, seeds)) for m, seeds in methods.items()}
    counts = sorted(set().union(*shared.values()))
    if len(counts) < 2:
        raise UserError("the runs share no two evaluated rounds: evaluate the same rounds of each")
    known = domain.RL_TASKS
    splits_after = {
        "Expert tasks": lambda i: domain.EXPERT_TASKS,
        "RL tasks learned so far": lambda i: known[:i],
        "RL tasks still to come": lambda i: known[i:],
        "Unseen tasks": lambda i: domain.UNSEEN_TASKS,
    }
    lines = [
        f"# {domain.NAME}: success by the number of RL tasks learned",
        "",
        "Success rate over the episodes of all seeds, and its 95 % Wilson interval. A column is the number of RL tasks",
        "that a method has learned, one after the other. 0 is stage 0.",
    ]
    for title, tasks_after in splits_after.items():
        lines += ["", f"## {title}", "", f"| method (seeds) | {' | '.join(map(str, counts))} |"]
        lines.append("| --- " * (len(counts) + 1) + "|")
        for method, seeds in methods.items():
            cells = [f"{method} ({len(seeds)})"]
            for i in counts:
                tasks = tasks_after(i)
                measured = i in shared[method] and tasks
                cells.append(rate_cell([seed[i] for seed in seeds], tasks) if measured else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rate_cell(stages: list[dict], tasks: Iterable[str]) -> str:
    """Return a cell of the table: rate, interval, and the least and the best seed if there are several."""
    rate, low, high, each = pooled(stages, tasks)
    cell = f"{rate:.2f} [{low:.2f}, {high:.2f}]"
    if len(each) > 1:
        cell += f", seeds {min(each):.2f} to {max(each):.2f}"
    return cell


def cost_cells(runs: Iterable[Run]) -> list[str]:
    """Return the last four cells of the table: minutes, environment steps, VLM forwards, peak GB."""
    each = [costs(run.stages) for run in runs]
    counted = {name: [cost[name] for cost in each if name in cost] for name in COSTS}
    summaries = [
        ("seconds", lambda x: f"{np.mean(x) / 60:,.0f}"),
        ("env_steps", lambda x: f"{np.mean(x):,.0f}"),
        ("vlm_forwards", lambda x: f"{np.mean(x):,.0f}"),
        ("peak_gb", lambda x: f"{max(x):.1f}"),
    ]
    return [text(counted[name]) if counted[name] else "not counted" for name, text in summaries]


def bars(folders: Iterable[str], path: Path) -> None:
    """Draw table.png, like the paper's Fig. 5: a bar for each method with its interval, a dot for each seed."""
    plt = pyplot()
    comparison = side_by_side(folders)
    methods = comparison.methods
    groups = splits(comparison.domain)
    width = 0.8 / len(methods)
    fig, ax = plt.subplots(figsize=(3 + 1.5 * len(methods), 3.4), layout="constrained")
    for j, (method, seeds) in enumerate(methods.items()):
        for i, tasks in enumerate(groups.values()):
            rate, low, high, each = pooled([run.stages[-1] for run in seeds.values()], tasks)
            x = i + (j - (len(methods) - 1) / 2) * width
            plural = "s" if len(seeds) > 1 else ""
            label = f"{method}, {len(seeds)} seed{plural}" if i == 0 else None
            ax.bar(x, rate, 0.92 * width, color=f"C{j}", alpha=0.75, label=label)
            interval = [[max(0, rate - low)], [max(0, high - rate)]]
            ax.errorbar(x, rate, interval, color="black", capsize=3, lw=1)
            ax.plot(
                [x] * len(each), each, "o", color=f"C{j}", markeredgecolor="black", markersize=4
            )
            ax.text(x, 0.02, f"{rate:.2f}", ha="center", fontsize=8)
    ax.set_xticks(
        range(len(groups)), [f"{len(tasks)} {LABELS[split]}" for split, tasks in groups.items()]
    )
    ax.set(ylim=(0, 1.04), ylabel="success (95 % Wilson interval)")
    ax.set_title(f"{comparison.domain.NAME}, after {comparison.last}", fontsize=10, loc="left")
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=len(methods), frameon=False, fontsize=8)
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------
# Training curves: the paper's Fig. 4


def curves_figure(folders: Iterable[str], path: Path) -> None:
    """Draw training success over environment steps: a panel for each task, a line for each arm of tools/fig4.sh.

    An arm is the folder above the stage's folder. Training success is that of the last 100
    episodes. A dot marks the end of a stage, by convergence or by its budget. Raises UserError for
    a folder that is not a finished RL stage.
    """
    plt = pyplot()
    by_task = {}
    for folder in map(Path, folders):
        if not (folder / "log.jsonl").exists() or not (folder / "summary.json").exists():
            raise UserError(f"{folder} has no training curve: name finished folders of stage 1")
        task = read_entries(folder / "summary.json", {}).get("task")
        if task is None:
            raise UserError(f"{folder} has no training curve: name finished folders of stage 1")
        by_task.setdefault(task, []).append(folder)
    if not by_task:
        raise UserError("no folder to compare: name finished folders of stage 1")
    arms = dict.fromkeys(folder.parent.name for stages in by_task.values() for folder in stages)
    colours = {arm: f"C{i}" for i, arm in enumerate(arms)}
    size = (2 + 2.6 * len(by_task), 3)
    fig, axes = plt.subplots(
        1, len(by_task), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (task, stages) in zip(axes[0], by_task.items()):
        for folder in stages:
            rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            x = [row["step"] / 1000 for row in rows]
            y = [row["success"] for row in rows]
            color = colours[folder.parent.name]
            ax.plot(x, y, color=color, marker="o", markersize=4, markevery=[-1], clip_on=False)
        ax.set_title(task, fontsize=9, loc="left")
        ax.set(xlabel="thousand environment steps", xlim=(0, None), ylim=(0, 1.02))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training success")
    handles = [plt.Line2D([], [], color=color) for color in colours.values()]
    fig.legend(
        handles, list(colours), loc="outside lower center", ncols=len(colours), frameon=False
    )
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------
# Success over the rounds: the README's figure


def success_by_round(run: Run, split: str) -> dict[int, float]:
    """Return {round: success rate} of a split after stage 0 and after each evaluated stage 2."""
    rates = {}
    for stage in run.stages:
        match = re.fullmatch(r"(\d+)-sft", stage["name"])
        if match:
            count = stage["splits"][split]
            rates[int(match[1])] = count["successes"] / count["episodes"]
    return rates


def rounds_figure(folders: Iterable[str], path: Path) -> None:
    """Draw success after each round: a panel for each split, the mean over the seeds, a band from least to best seed.

    A thin line with dots is one seed, dots being the rounds after which it was evaluated. The mean
    stands at the rounds after which all seeds were evaluated. Diamonds are the end points that the
    paper reports. Raises UserError if the runs are of different methods, or share no two rounds.
    """
    runs = read_runs(folders)
    if len({run.method for run in runs}) > 1:
        raise UserError(
            f"methods {sorted({run.method for run in runs})} cannot share a figure: name one method's runs"
        )
    domain = load_domain(runs[0].domain)
    paper = PAPER.get(runs[0].domain, {})
    plt = pyplot()
    with plt.rc_context({"font.size": 8}):
        groups = splits(domain)
        fig, axes = plt.subplots(
            1, len(groups), figsize=(8.46, 2.6), sharey=True, layout="constrained", squeeze=False
        )
        axes = axes[0]
        for ax, (split, tasks) in zip(axes, groups.items()):
            seeds = [success_by_round(run, split) for run in runs]
            draw_rounds(ax, seeds, COLOURS[split], paper.get(split))
            ax.set_title(
                f"{len(tasks)} {LABELS[split]}",
                fontsize=10,
                loc="left",
                color=COLOURS[split],
                weight="bold",
            )
        axes[0].set_ylabel("success rate")
        mean = f"mean of {len(runs)} seeds" if len(runs) > 1 else "one run"
        legend = [
            plt.Line2D([], [], color="0.35", lw=2.2, marker="o", label=mean),
            plt.Rectangle((0, 0), 1, 1, color="0.85", label="least to best seed"),
            plt.Line2D([], [], color="0.6", lw=0.8, marker=".", label="one seed"),
        ]
        if paper:
            legend.append(
                plt.Line2D(
                    [], [], color="0.35", ls="", marker="D", mfc="none", label="the paper (3 B VLM)"
                )
            )
        fig.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
        fig.savefig(path, dpi=200, format="png")
    plt.close(fig)


def draw_rounds(
    ax, seeds: list[dict[int, float]], colour: str, paper: tuple[float, float] | None
) -> None:
    """Draw one panel of `rounds`. seeds: {round: success rate} of each. paper: its two end points."""
    every = sorted(set().union(*seeds))
    shared = [i for i in every if all(i in seed for seed in seeds)]
    if len(shared) < 2:
        raise UserError("the runs share no two evaluated rounds: evaluate the same rounds of each")
    lines = np.array(
        [np.interp(every, sorted(seed), [seed[i] for i in sorted(seed)]) for seed in seeds]
    )
    ax.fill_between(every, lines.min(0), lines.max(0), color=colour, alpha=0.15, lw=0)
    for seed in seeds:
        x = sorted(seed)
        ax.plot(
            x, [seed[i] for i in x], color=colour, alpha=0.45, lw=0.8, marker=".", markersize=3.5
        )
    mean = [float(np.mean([seed[i] for seed in seeds])) for i in shared]
    ax.plot(shared, mean, color=colour, lw=2.2, marker="o", markersize=5, clip_on=False)
    for end, side in ((0, -1), (-1, 1)):
        x = shared[end]
        ours = mean[end]
        above = paper is None or ours >= paper[end]
        label(ax, x, ours, colour, 6 if above else -12, "bold")
        if paper is not None:
            theirs = x + side * 0.09 * shared[-1]
            ax.plot(
                theirs,
                paper[end],
                marker="D",
                markersize=5,
                mfc="white",
                mec="0.35",
                ls="",
                zorder=4,
                clip_on=False,
            )
            label(ax, theirs, paper[end], "0.35", -12 if above else 6)
    ax.set_xticks(range(shared[-1] + 1), ["stage 0", *map(str, range(1, shared[-1] + 1))])
    ax.set(xlim=(-0.2 * shared[-1], 1.2 * shared[-1]), ylim=(0, 1.1), xlabel="rounds of RL and SFT")
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def label(ax, x: float, y: float, colour: str, offset: float, weight: str = "normal") -> None:
    """Write a rate `offset` points above (or below, if negative) its mark."""
    from matplotlib import patheffects  # after pyplot() has chosen a backend that writes files

    style = dict(ha="center", color=colour, weight=weight, zorder=5)
    text = ax.annotate(f"{y:.2f}", (x, y), (0, offset), textcoords="offset points", **style)
    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def table(folders: Folders, out: str = ".") -> None:
    """Write table.md and table.png: the methods of several runs side by side, as the paper's Table I and Fig. 5.

    Args:
        folders: folders with a report.json, one for each method and seed.
        out: folder of table.md and table.png.
    """
    text = table_text(folders)
    with atomic_write(Path(out) / "table.md") as tmp:
        tmp.write_text(text)
    with atomic_write(Path(out) / "table.png") as tmp:
        bars(folders, tmp)
    print(text, end="")


def learned(folders: Folders, out: str = ".") -> None:
    """Write learned.md: success on expert, RL and unseen tasks by the number of RL tasks learned, for each method.

    Args:
        folders: folders with a report.json, one for each method and seed.
        out: folder of learned.md.
    """
    text = learned_text(folders)
    with atomic_write(Path(out) / "learned.md") as tmp:
        tmp.write_text(text)
    print(text, end="")


def curves(folders: Folders, out: str = ".") -> None:
    """Write curves.png: training success over environment steps, as the paper's Fig. 4.

    Args:
        folders: folders of finished stages 1.
        out: folder of curves.png.
    """
    path = Path(out) / "curves.png"
    with atomic_write(path) as tmp:
        curves_figure(folders, tmp)
    print(path)


def rounds(folders: Folders, out: str = ".") -> None:
    """Write rounds.png: success on expert, RL and unseen tasks after each round, with the paper's end points.

    Args:
        folders: folders with a report.json, one for each seed of one method.
        out: folder of rounds.png.
    """
    path = Path(out) / "rounds.png"
    with atomic_write(path) as tmp:
        rounds_figure(folders, tmp)
    print(path)


if __name__ == "__main__":
    COMMAND = parse_command([table, learned, curves, rounds], __doc__)
    run_cli(lambda command: command(), COMMAND, resumes=False)
