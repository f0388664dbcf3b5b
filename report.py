"""
A run's report: success by stage and split with intervals, and the matrix of tasks over stages, which shows at a glance
what was forgotten.

Reads the eval.json and summary.json of a run's finished stages; writes report.json, report.md, report.png beside them,
and a model card, README.md, into the last stage's checkpoint, so that the folder can be uploaded to the hub as it is.

python report.py --run runs/NAME-seed0
python report.py --table results/NAME/ire-vla-seed0 results/NAME/ire-vla-seed1 --out results/NAME
python report.py --curves runs/fig4-NAME-seed0/s*/* --out runs/fig4-NAME-seed0
"""

from run import Refusal, checkpoint_config, main, on_hub, read_json, whole, write_json  # isort: skip  first, for Ctrl-C while torch is imported

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import binomtest

from domains import load_domain
from evaluate import all_tasks, splits, wilson

# Of a row's stages together. A stage of an earlier version may lack one; then the row has no such number.
COSTS = {"seconds": sum, "env_steps": sum, "vlm_forwards": sum, "peak_gb": max}


@dataclass
class Args:
    run: str = ""  # the run's folder
    table: tuple[str, ...] = ()  # instead: these folders' reports side by side, as the paper's Table I and Fig. 5
    curves: tuple[str, ...] = ()  # instead: success over environment steps of these RL stages, as the paper's Fig. 4
    out: str = "."  # where --table writes table.md and .png, and --curves curves.png
    domain: str = ""  # domains/<name>.py; empty: what the run's first checkpoint says


def stage_order(folder):
    """Finished stages in the order of Algorithm 1: 0-sft, 1-rl-..., 1-sft, 2-rl-..., ..."""
    stages = [p for p in Path(folder).glob("*") if re.fullmatch(r"\d+-(sft|rl-.+)", p.name) and p.is_dir()]
    return sorted(stages, key=lambda p: (int(p.name.split("-")[0]), p.name.endswith("-sft")))


def method_and_seed(stages):
    """(loop.sh's METHOD and SEED) of a run, by what its stages were started with."""
    given = [read_json(stage / "stage.json")["args"] for stage in stages]
    method = "ire-vla"
    if any(args.get("train_vlm") for args in given):
        method = "ppo-replay"
    elif any(args.get("freeze_vlm") for args in given):
        method = "ire-vla-freeze"
    elif len(stages) > 1 and not any("-rl-" in stage.name for stage in stages):
        method = "sft-only"
    return method, given[-1]["seed"]


def costs(stages):
    """What some stages cost together: {name: number} of COSTS, without those that one of them has not counted."""
    return {k: f(s[k] for s in stages) for k, f in COSTS.items() if all(k in s for s in stages)}


def report(args):
    """The report as a dict (design: report.json)."""
    stages = stage_order(args.run)
    if not stages:
        raise Refusal(f"{args.run} has no finished stage: run loop.sh first, or give another --run")
    config, (method, seed) = checkpoint_config(stages[0]), method_and_seed(stages)
    domain = load_domain(args.domain or config["domain"])
    rows, protocol, spent, made_by = [], None, [], {}
    for stage in stages:
        spent.append(read_json(stage / "summary.json"))
        if not (stage / "eval.json").exists():
            continue  # it has no row; its cost goes into the next one
        evaluated = read_json(stage / "eval.json")
        under = {"image_size": config["image_size"], **evaluated["protocol"]}  # an older eval.json does not say it
        if protocol not in (None, under):
            raise Refusal(f"{stage}/eval.json has another protocol than the stages before it: evaluate again")
        protocol = under
        for package, version in evaluated.get("versions", {}).items():
            made_by.setdefault(package, {})[version] = None  # each once, in their order
        count = lambda names: {  # noqa: E731
            "successes": sum(sum(evaluated["tasks"][t]["success"]) for t in names),  # noqa: B023
            "episodes": sum(len(evaluated["tasks"][t]["success"]) for t in names),  # noqa: B023
        }
        cost = costs(spent)
        rows.append({
            "name": stage.name, **cost, "seconds": round(cost["seconds"], 1),
            "splits": {split: count(names) for split, names in splits(domain).items()},
            "tasks": {t: count([t]) for names in splits(domain).values() for t in names},
            "outcomes": {t: "".join(map(str, evaluated["tasks"][t]["success"])) for t in all_tasks(domain)},
        })  # fmt: skip
        spent = []
    if not rows:
        raise Refusal(f"no stage of {args.run} was evaluated: python evaluate.py --checkpoint {stages[-1]}, then again")
    return {
        "domain": domain.__name__.split(".")[-1], "method": method, "seed": seed, "vlm": config["vlm"],
        "versions": {package: ", ".join(those) for package, those in made_by.items()},
        "protocol": protocol, "stages": rows,
    }  # fmt: skip


def rate(count):
    return count["successes"] / max(1, count["episodes"])


def markdown(r, domain):
    """report.md: success of each split after each stage, then of each task."""
    cell = lambda c: "{:.2f} [{:.2f}, {:.2f}]".format(rate(c), *wilson(c["successes"], c["episodes"]))  # noqa: E731
    lines = [
        f"# {r['method']} on {r['domain']}, seed {r['seed']}, VLM {r['vlm']}", "",
        "Success of the greedy policy: successes / episodes with the 95 % Wilson interval. Minutes and steps of a "
        "stage that was not evaluated are in the next row.", "",
        "| stage | expert | RL tasks | unseen | minutes | env steps |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for s in r["stages"]:
        cells = " | ".join(f"{cell(s['splits'][k])}" for k in ("expert", "rl", "unseen"))
        lines.append(f"| {s['name']} | {cells} | {s['seconds'] / 60:.1f} | {s['env_steps']:,} |")
    names = " | ".join(s["name"] for s in r["stages"])
    lines += ["", f"| task | {names} |", "| --- " * (len(r["stages"]) + 1) + "|"]
    for split, names in splits(domain).items():
        lines.append(f"| **{split}** |" + " |" * len(r["stages"]))
        lines += [f"| {t} | " + " | ".join(f"{rate(s['tasks'][t]):.2f}" for s in r["stages"]) + " |" for t in names]
    protocol = ", ".join(f"{k} {v}" for k, v in r["protocol"].items())
    made_by = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    lines += ["", f"Protocol: {protocol}.", "", f"Versions: {made_by}."]
    return "\n".join(lines) + "\n"


def model_card(checkpoint, text):
    """A checkpoint's README.md for the Hugging Face hub; text: the report's."""
    config, lora = read_json(checkpoint / "config.json"), (checkpoint / "adapter_config.json").exists()
    base = config["vlm"] if on_hub(config["vlm"]) else None  # `tiny` and a local folder are nobody's base model there
    front = ["---", f"library_name: {'peft' if lora else 'transformers'}", *[f"base_model: {base}"] * bool(base)]
    front += ["pipeline_tag: robotics", "tags: [robotics, vision-language-action, ire-vla]", "license: mit", "---"]
    vlm = f"{checkpoint.name}/vlm" if config["weights"] == "vlm" else config["weights"]
    lines = [
        *front, "", f"A vision-language-action policy for {config['domain']}: an image and a sentence to an action. "
        "Trained by iRe-VLA (arXiv 2501.16664), stage " + checkpoint.name + ".", "", "```python",
        "from model import VLA  # iRe-VLA's model.py", "",
        f"vla = VLA.load({checkpoint.name!r})  # this folder, or its name on the hub",
        "action = vla.act(*vla.encode(images, sentences))  # (B, H, W, 3) uint8, B sentences -> (B, A) in [-1, 1]", "",
        "# the VLM without the action head, by the libraries' own classes",
        "from transformers import Blip2ForConditionalGeneration", *["from peft import PeftModel"] * lora, "",
        f"vlm = Blip2ForConditionalGeneration.from_pretrained({vlm!r})",
        *[f"vlm = PeftModel.from_pretrained(vlm, {checkpoint.name!r})"] * lora, "```", "", text,
    ]  # fmt: skip
    return "\n".join(lines)


def pyplot():
    """matplotlib, for files alone; imported where something is drawn, since that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def picture(r, domain, path):
    """report.png: the splits over the stages with intervals, and the matrix of tasks over stages."""
    plt = pyplot()
    stages, names = r["stages"], all_tasks(domain)
    short = [s["name"].replace("-new", "") for s in stages]
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(13, 0.19 * len(names) + 1.8), width_ratios=[1.25, 1], layout="constrained"
    )
    colours = {"expert": "#4878a8", "rl": "#d1603d", "unseen": "#5a9a68"}
    labels = {"expert": "expert tasks", "rl": "RL tasks", "unseen": "unseen tasks"}
    ends, last, apart = [], -1.0, 0.16 / (0.19 * len(names) + 0.8)
    for j, (split, colour) in enumerate(colours.items()):
        counts = [s["splits"][split] for s in stages]
        y = [rate(c) for c in counts]
        intervals = [wilson(c["successes"], c["episodes"]) for c in counts]
        x = [i + 0.06 * (j - 1) for i in range(len(stages))]
        below = [max(0, a - low) for a, (low, _) in zip(y, intervals)]
        above = [max(0, high - a) for a, (_, high) in zip(y, intervals)]
        left.errorbar(x, y, [below, above], color=colour, marker="o", markersize=4, capsize=2, label=labels[split])
        ends.append((y[-1], colour))
    for y, colour in sorted(ends):
        last = max(y, last + apart)  # numbers that would cover each other stand one above the other
        at = len(stages) - 0.94, last
        left.annotate(f"{y:.2f}", at, (6, -3), textcoords="offset points", color=colour, fontsize=9)
    left.set(ylim=(0, 1.02), ylabel="success (95 % Wilson interval)", xlim=(-0.3, len(stages) - 0.5))
    left.set_xticks(range(len(stages)), short, rotation=35, ha="right", fontsize=8)
    left.grid(axis="y", alpha=0.3)
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="best")
    left.set_title(f"{r['method']} on {r['domain']}, seed {r['seed']}, VLM {r['vlm']}", fontsize=10, loc="left")
    matrix = [[rate(s["tasks"][t]) for s in stages] for t in names]
    right.imshow(matrix, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    for i, row in enumerate(matrix):
        for j, v in enumerate(row):
            right.text(j, i, f"{v:.2f}"[0 if v == 1 else 1 :][:3], ha="center", va="center", fontsize=5.5,
                       color="black" if v > 0.6 else "white")  # fmt: skip
    right.set_yticks(range(len(names)), names, fontsize=6)
    for label, name in zip(right.get_yticklabels(), names):
        label.set_color(next(colours[k] for k, group in splits(domain).items() if name in group))
    right.set_xticks(range(len(stages)), short, rotation=35, ha="right", fontsize=8)
    right.set_title("success of each task after each stage", fontsize=10, loc="left")
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)


def side_by_side(folders):
    """The methods of several reports after the last stage that all have, beside stage 0 ("SFT"): (domain, that stage's
    name, {method: {seed: (report, the stage)}}), each report up to that stage. Raises Refusal for reports of different
    protocols, that do not share stage 0 and a later one, or whose stages 0 of a seed differ: they cannot be compared.
    """
    reports = [read_json(Path(folder) / "report.json") for folder in folders]
    for r, folder in zip(reports, folders):
        if r["domain"] != reports[0]["domain"] or r["protocol"] != reports[0]["protocol"]:
            raise Refusal(f"{folder} has another domain or protocol than {folders[0]}: give those of one protocol")
    names = [[s["name"] for s in r["stages"]] for r in reports]
    common = [name for name in names[0] if all(name in other for other in names)]
    if len(common) < 2 or common[0] != "0-sft":
        raise Refusal(f"{', '.join(map(str, folders))} do not share 0-sft and a stage after it: evaluate those, of as "
                      f"many rounds, and make the reports again")  # fmt: skip
    for r, n in zip(reports, names):
        r["stages"] = r["stages"][: n.index(common[-1]) + 1]
    rows = {"SFT (stage 0)": {}}
    for folder, r in zip(folders, reports):
        _, start = rows["SFT (stage 0)"].setdefault(r["seed"], (r, r["stages"][0]))
        if r["stages"][0]["tasks"] != start["tasks"]:
            raise Refusal(f"{folder} began with another stage 0 than the other run of seed {r['seed']}: give each "
                          f"method of a seed the same START")  # fmt: skip
        if r["seed"] in (row := rows.setdefault(r["method"], {})):
            raise Refusal(f"{folder} is a second {r['method']} of seed {r['seed']}: leave one of them out")
        row[r["seed"]] = (r, r["stages"][-1])
    return load_domain(reports[0]["domain"]), common[-1], rows


def pooled(entries, names):
    """Some tasks' successes in the stages of several seeds: (rate of all episodes, low, high, [each seed's rate])."""
    counts = [[s["tasks"][t] for t in names] for _, s in entries]
    k, n = ([sum(c[what] for c in seed) for seed in counts] for what in ("successes", "episodes"))
    return sum(k) / sum(n), *wilson(sum(k), sum(n)), [a / b for a, b in zip(k, n)]


def table(folders):
    """table.md's text: seeds are pooled, with Wilson's interval and the spread over seeds; pairs; costs."""
    domain, last, rows = side_by_side(folders)
    columns = {"expert": domain.EXPERT_TASKS, **{t: [t] for t in domain.RL_TASKS}}
    columns |= {"RL tasks": domain.RL_TASKS, "unseen": domain.UNSEEN_TASKS}

    def cell(entries, names):
        mean, low, high, each = pooled(entries, names)
        spread = f", seeds {min(each):.2f} to {max(each):.2f}" if len(each) > 1 else ""
        return f"{mean:.2f} [{low:.2f}, {high:.2f}]{spread}"

    r = next(iter(rows["SFT (stage 0)"].values()))[0]
    lines = [f"# {r['domain']}, VLM {r['vlm']}: methods side by side, after {last}", ""]
    lines += ["Successes of all seeds' episodes together, 95 % Wilson interval, and the least and best seed.", ""]
    lines += ["Costs are the mean of the seeds that counted them, without evaluations; a VLM forward is an image"]
    lines += ["through it; peak GB is the most memory that a stage's own process held, without its simulators;"]
    lines += ["environment steps are RL's, without those in which D_rl is recorded.", ""]
    lines += [f"| method (seeds) | {' | '.join(columns)} | minutes | environment steps | VLM forwards | peak GB |"]
    lines += ["| --- " * (len(columns) + 5) + "|"]
    for method, seeds in rows.items():
        entries, first = list(seeds.values()), method.startswith("SFT")
        each = [costs(r["stages"][:1] if first else r["stages"]) for r, _ in entries]  # of each seed
        counted = {k: [c[k] for c in each if k in c] for k in COSTS}
        mean = lambda k, per=1: f"{np.mean(counted[k]) / per:,.0f}" if counted[k] else "not counted"  # noqa: B023, E731
        spent = f"{mean('seconds', 60)} | {mean('env_steps')} | {mean('vlm_forwards')} | "
        spent += f"{max(counted['peak_gb']):.1f} |" if counted["peak_gb"] else "not counted |"
        cells = " | ".join(cell(entries, names) for names in columns.values())
        lines += [f"| {method} ({', '.join(map(str, seeds))}) | {cells} | {spent}"]

    lines += [
        "",
        "Paired on the initial states, seed by seed: episodes that one of two policies won and the other lost,",
    ]
    lines += ["and the two-sided sign test (McNemar's, exact).", ""]
    lines += ["| | split | only the first | only the second | p |", "| --- | --- | --- | --- | --- |"]
    for one, other in itertools.combinations(rows, 2):
        for split, names in splits(domain).items():
            wins, losses = 0, 0
            for seed in rows[one].keys() & rows[other].keys():
                a, b = (rows[method][seed][1].get("outcomes", {}) for method in (one, other))
                for x, y in [pair for t in names for pair in zip(a.get(t, ""), b.get(t, ""))]:
                    wins, losses = wins + (x > y), losses + (x < y)
            if wins + losses:
                p = binomtest(wins, wins + losses).pvalue
                lines += [f"| {one} against {other} | {split} | {wins} | {losses} | {p:.2g} |"]
    return "\n".join(lines) + "\n"


def bars(folders, path):
    """The table's splits as a picture, like the paper's Fig. 5: a bar for each method with Wilson's interval, a dot for
    each seed."""
    plt = pyplot()
    domain, last, rows = side_by_side(folders)
    groups, width = splits(domain), 0.8 / len(rows)
    fig, ax = plt.subplots(figsize=(3 + 1.5 * len(rows), 3.4), layout="constrained")
    for j, (method, seeds) in enumerate(rows.items()):
        for i, names in enumerate(groups.values()):
            mean, low, high, each = pooled(list(seeds.values()), names)
            x = i + (j - (len(rows) - 1) / 2) * width
            label = f"{method}, {len(seeds)} seed{'s' * (len(seeds) > 1)}" if i == 0 else None
            ax.bar(x, mean, 0.92 * width, color=f"C{j}", alpha=0.75, label=label)
            ax.errorbar(x, mean, [[max(0, mean - low)], [max(0, high - mean)]], color="black", capsize=3, lw=1)
            ax.plot([x] * len(each), each, "o", color=f"C{j}", markeredgecolor="black", markersize=4)
            ax.text(x, 0.02, f"{mean:.2f}", ha="center", fontsize=8)
    ax.set_xticks(range(len(groups)), [f"{len(n)} {k if k != 'rl' else 'RL'} tasks" for k, n in groups.items()])
    ax.set(ylim=(0, 1.04), ylabel="success (95 % Wilson interval)")
    ax.set_title(f"{domain.__name__.split('.')[-1]}, after {last}", fontsize=10, loc="left")
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=len(rows), frameon=False, fontsize=8)
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)


def curves(folders, path):
    """Training success (share of the last 100 episodes) over environment steps: a panel for each task, a line for each
    name of the folder above the stage's, such as fig4.sh's arms. A dot: its end, by convergence or budget."""
    plt = pyplot()
    tasks, names = {}, {}
    for folder in map(Path, folders):
        task = read_json(folder / "summary.json").get("task")
        if task is None or not (folder / "log.jsonl").exists():
            raise Refusal(f"{folder} has no curve of RL: give --curves finished folders of stage 1")
        tasks.setdefault(task, []).append(folder)
        names.setdefault(folder.parent.name, f"C{len(names)}")
    fig, axes = plt.subplots(1, len(tasks), figsize=(2 + 2.6 * len(tasks), 3), sharey=True, squeeze=False,
                             layout="constrained")  # fmt: skip
    for ax, (task, stages) in zip(axes[0], tasks.items()):
        for folder in stages:
            rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            x, y = [r["step"] / 1000 for r in rows], [r["success"] for r in rows]
            ax.plot(x, y, color=names[folder.parent.name], marker="o", markersize=4, markevery=[-1], clip_on=False)
        ax.set_title(task, fontsize=9, loc="left")
        ax.set(xlabel="thousand environment steps", xlim=(0, None), ylim=(0, 1.02))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training success")
    handles = [plt.Line2D([], [], color=colour) for colour in names.values()]
    fig.legend(handles, list(names), loc="outside lower center", ncols=len(names), frameon=False)
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)


def story(args):
    if args.curves:
        with whole(Path(args.out) / "curves.png") as tmp:
            curves(args.curves, tmp)
        return print(f"{Path(args.out) / 'curves.png'}")
    if args.table:
        text = table(args.table)
        with whole(Path(args.out) / "table.md") as tmp:
            tmp.write_text(text)
        with whole(Path(args.out) / "table.png") as tmp:
            bars(args.table, tmp)
        return print(text, end="")
    r = report(args)
    domain, folder = load_domain(r["domain"]), Path(args.run)
    text = markdown(r, domain)
    write_json(folder / "report.json", r)
    with whole(folder / "report.md") as tmp:
        tmp.write_text(text)
    with whole(folder / "report.png") as tmp:
        picture(r, domain, tmp)
    last = folder / r["stages"][-1]["name"]
    with whole(last / "README.md") as tmp:
        tmp.write_text(model_card(last, text))
    for line in text.splitlines()[4:]:
        if not line:
            break
        print(line)
    print(f"report: {folder / 'report.md'}, {folder / 'report.png'}")


if __name__ == "__main__":
    main(story, tyro.cli(Args, description=__doc__))
