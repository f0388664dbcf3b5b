"""
Success rates: the one function that every rate in the project comes from, and its command.

The greedy policy plays fixed episodes (data.EVAL_SEED + 0, 1, ...) that no training uses, the same ones at every stage
and for every method, so that two policies can be compared episode by episode. A rate is k successes of n episodes with
its 95 % Wilson interval (the paper states neither its episodes, which are 25 a task by its numbers, nor intervals).

python evaluate.py --checkpoint runs/NAME-seed0/0-sft            all tasks, 25 episodes each, 3 to 8 minutes
python evaluate.py --checkpoint runs/NAME-seed0/0-sft --tasks TASK --episodes 3 --video task.mp4
"""

from run import COUNTS, Refusal, check_counts, checkpoint_config, main, pick_device, read_json, versions, write_json  # isort: skip  first, for Ctrl-C while torch is imported

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from tqdm import tqdm

from data import EVAL_SEED
from domains import load_domain
from domains._player import Player

NO_POLICY = "the policy's action is NaN: this checkpoint cannot act; train it again from its parent"
gym.logger.min_level = 50  # above ERROR: what goes wrong in a simulator is raised here, which is enough


@dataclass
class Args:
    checkpoint: str  # a checkpoint folder
    tasks: tuple[str, ...] = ()  # names of the domain's tasks; none: all of them
    episodes: int = 25  # episodes of each task
    video: str = ""  # instead: film these episodes, as this .mp4
    out: str = ""  # where to write the result; empty: the checkpoint's eval.json, when all tasks are evaluated
    envs: int = 16  # simulators in parallel at most, a process each
    device: str = ""  # cpu, cuda, ...; empty: the GPU where there is one
    threads: int = 1  # CPU threads of torch; the simulators have the other cores


def wilson(k, n, z=1.96):
    """The 95 % interval of a success rate k/n (Wilson 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    centre, half = k / n + z * z / (2 * n), z * (k / n * (1 - k / n) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def splits(domain):
    """{"expert" | "rl" | "unseen": task names} of a domain."""
    return {"expert": domain.EXPERT_TASKS, "rl": domain.RL_TASKS, "unseen": domain.UNSEEN_TASKS}


def all_tasks(domain):
    return [*domain.EXPERT_TASKS, *domain.RL_TASKS, *domain.UNSEEN_TASKS]


def check_task(task, domain):
    """Raises Refusal for a task that the domain does not have, naming those it has."""
    if task not in all_tasks(domain):
        raise Refusal(f"unknown task {task!r}: known are {', '.join(all_tasks(domain))}")


def only_simulated(domain, what):
    """Raises Refusal where the domain's environments are a real robot, of which there is one, with people near it."""
    if why := getattr(domain, "real", str)():
        raise Refusal(f"{why}, and {what} is for simulated robots: unset it, or see real_robot.md")


def processes(fns, autoreset):
    """An AsyncVectorEnv of environments in a process each, forked from a server. fns: partials of what `domains` has;
    what a function of a stage refers to, its process would have to import."""
    script = vars(sys.modules["__main__"])
    path = script.pop("__file__", None)  # else each would import this process's script again, and with it torch
    try:
        return AsyncVectorEnv(fns, context="forkserver", autoreset_mode=autoreset, copy=False)
    finally:
        if path is not None:
            script["__file__"] = path


def simulators(fns, vla, autoreset):
    """`processes`, for a policy. Raises Refusal when its actions do not fit them."""
    vector = processes(fns, autoreset)
    if (have := vla.config["action_dim"]) != (want := vector.single_action_space.shape[0]):
        vector.close(terminate=True)
        raise Refusal(f"the checkpoint's actions have {have} dimensions, the domain's {want}: give one of this domain")
    return vector


def play(vla, domain, programme, envs, act, keep_images=False, say=None):
    """Play episodes in parallel: yields {"task", "seed", "success", "decisions"} as each one ends.

    programme: {task: [seed, ...]}. act(h, mask, ids) -> (executed (B, A), label (B, A)), where ids are B (task, seed,
    decision number). With keep_images an episode also carries "image" (T, H, W, 3), "action" (T, A; the labels) and
    "reward" (T,). say: {seed: the sentence to give instead of the task's own}. Half of the simulators step while the
    other half's images pass the VLM.
    """
    name, size = domain.__name__.split(".")[-1], vla.config["image_size"]
    left = {task: list(seeds) for task, seeds in programme.items() if seeds}
    total = sum(map(len, left.values()))
    envs = min(envs, total, max(2 * os.cpu_count(), total // 8))  # a simulator takes as long to begin as an episode
    groups = np.array_split(np.arange(envs), min(2, envs))
    first = next(iter(left))
    untouched, now = list(left), {}  # now: simulator -> the episode that it plays

    def assign(w):
        """Simulator w's next episode: of its own task, else of one nobody plays, else of the one with most left."""
        task = now[w]["task"] if now.get(w) else None
        if not left.get(task):
            task = untouched.pop(0) if untouched else max(left, key=lambda t: len(left[t]))
        now[w] = dict(task=task, seed=left[task].pop(0), decisions=0, frames=[]) if left[task] else None

    def play_options(mask, group):
        return {"reset_mask": mask, "play": {w: now[w] and (now[w]["task"], now[w]["seed"]) for w in group}}

    def decide(v, group, obs):
        """Encode the playing simulators' images, act, and let them step."""
        busy = [i for i, w in enumerate(group) if now[w]]
        actions = np.zeros(v.action_space.shape, np.float32)
        if busy:
            episodes = [now[group[i]] for i in busy]
            with torch.no_grad():
                sentences = [say[e["seed"]] if say else domain.INSTRUCTIONS[e["task"]] for e in episodes]
                h, mask = vla.encode(obs[busy], sentences)
                executed, label = act(h.float(), mask, [(e["task"], e["seed"], e["decisions"]) for e in episodes])
            if not torch.isfinite(executed).all():
                raise Refusal(NO_POLICY)
            actions[busy] = executed.clamp(-1, 1).cpu().numpy()
            for i, e, a in zip(busy, episodes, label.clamp(-1, 1).cpu().numpy()):
                e["decisions"] += 1
                if keep_images:
                    e["frames"].append((obs[i].copy(), a))
        v.step_async(actions)

    vectors = []
    try:
        for group in groups:
            fns = [partial(Player, name, first, size, int(w)) for w in group]
            vectors.append(simulators(fns, vla, AutoresetMode.DISABLED))
        for v, group in zip(vectors, groups):
            for w in group:
                assign(w)
            obs, _ = v.reset(options=play_options(np.ones(len(group), bool), group))
            decide(v, group, obs)
        while any(now.values()):
            for v, group in zip(vectors, groups):
                obs, reward, term, trunc, _ = v.step_wait()
                over = np.array([bool(now[w]) for w in group]) & (term | trunc)
                for i in np.flatnonzero(over):
                    e = now[group[i]]
                    frames = e.pop("frames")
                    e["success"] = int(term[i])
                    if keep_images:
                        e["image"], e["action"] = (np.stack(x) for x in zip(*frames))
                        e["reward"] = np.zeros(len(frames), np.float32)
                        e["reward"][-1] = reward[i]
                    yield e
                    assign(group[i])
                if over.any():
                    obs, _ = v.reset(options=play_options(over, group))
                decide(v, group, obs)
    finally:
        for v in vectors:
            v.close(terminate=True)


def evaluate(vla, domain, tasks, episodes, envs=16, label="evaluate"):
    """Success of the greedy policy: {task: {"success": [0 or 1, ...], "decisions": [...]}} on the fixed episodes.

    Raises Refusal for a task that the domain does not have.
    """
    for task in tasks:
        check_task(task, domain)
    seeds = [EVAL_SEED + i for i in range(episodes)]
    greedy = lambda h, mask, ids: (a := vla.act(h, mask), a)  # noqa: E731
    result = {task: {"success": [None] * episodes, "decisions": [None] * episodes} for task in tasks}
    bar, k = tqdm(desc=label, total=len(tasks) * episodes, smoothing=0.05), 0
    for e in play(vla, domain, {task: seeds for task in tasks}, envs, greedy):
        row, i = result[e["task"]], e["seed"] - EVAL_SEED
        row["success"][i], row["decisions"][i] = e["success"], e["decisions"]
        k += e["success"]
        bar.update()
        bar.set_postfix_str(f"success {k / (bar.n or 1):.2f}", refresh=False)
    bar.close()
    return result


def evaluate_stage(folder, domain, episodes, device, envs=16, vla=None):
    """Evaluate a finished stage on all of the domain's tasks and write eval.json into its folder, once."""
    path = Path(folder) / "eval.json"
    if episodes and not path.exists():
        from model import VLA  # here, not above: report.py imports this file, and would wait for transformers

        vla = vla or VLA.load(folder, domain.__name__.split(".")[-1], device)
        tasks = evaluate(vla, domain, all_tasks(domain), episodes, envs, f"evaluate {path.parent.name}")
        write_json(path, record(vla, domain, tasks))
    if path.exists():
        print(f"{path.parent}: {summary(read_json(path)['tasks'], domain)}")


def record(vla, domain, tasks):
    """eval.json: what was evaluated, and under what."""
    protocol = {**domain.PROTOCOL, "image_size": vla.config["image_size"]}
    return {"protocol": protocol, "eval_seed": EVAL_SEED, "versions": versions(), "tasks": tasks}


def finished(stage, domain, args, device, envs=16):
    """Is the stage (run.py) there already? Then say so, and evaluate it where that was not done."""
    if args.episodes:
        only_simulated(domain, "an evaluation of many episodes at once (--episodes 0 leaves it out)")
    if stage.done and stage.writes:
        print(f"{stage.out} is finished")
        torch.set_num_threads(1)
        evaluate_stage(stage.out, domain, args.episodes, device, envs)
    return stage.done


def summary(tasks, domain):
    """One line of an evaluation's tasks: expert 0.83 [0.80, 0.86] (519/625), rl ..."""
    parts = []
    for split, names in splits(domain).items():
        outcomes = [outcome for t in names if t in tasks for outcome in tasks[t]["success"]]
        if outcomes:
            k, n = sum(outcomes), len(outcomes)
            low, high = wilson(k, n)
            parts.append(f"{split} {k / n:.2f} [{low:.2f}, {high:.2f}] ({k}/{n})")
    return ", ".join(parts)


def film(vla, domain, tasks, episodes, path):
    """Write greedy episodes of the tasks, at the environment's own picture size, as an .mp4."""
    import imageio.v2 as imageio

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=20, macro_block_size=2) as writer:
        for task in tasks:
            env = domain.make(task, vla.config["image_size"])
            for i in range(episodes):
                obs, _ = env.reset(seed=EVAL_SEED + i)
                ended = False
                while not ended:
                    writer.append_data(env.render())
                    with torch.no_grad():
                        h, mask = vla.encode(obs[None], [domain.INSTRUCTIONS[task]])
                        action = vla.act(h.float(), mask)[0].cpu().numpy()
                    if not np.isfinite(action).all():
                        raise Refusal(NO_POLICY)
                    obs, _, term, trunc, _ = env.step(action)
                    ended = term or trunc
                for _ in range(10):
                    writer.append_data(env.render())
            env.close()


def story(args):
    from model import VLA

    check_counts(args, (*COUNTS, "episodes"))
    if args.video and not args.video.endswith(".mp4"):
        raise Refusal(f"--video {args.video}: give a name that ends in .mp4")
    torch.set_num_threads(args.threads)
    domain = load_domain(checkpoint_config(args.checkpoint)["domain"])
    vla = VLA.load(args.checkpoint, device=pick_device(args.device))
    tasks = list(args.tasks) or all_tasks(domain)
    only_simulated(domain, "evaluate.py")
    if args.video:
        film(vla, domain, tasks, args.episodes, args.video)
        return print(f"wrote {args.video}")
    result = evaluate(vla, domain, tasks, args.episodes, args.envs)
    for task, row in result.items():
        k, n = sum(row["success"]), len(row["success"])
        print(f"  {task:28s} {k / n:.2f}  [{wilson(k, n)[0]:.2f}, {wilson(k, n)[1]:.2f}]  {k}/{n}")
    print(summary(result, domain))
    out = args.out or (Path(args.checkpoint) / "eval.json" if not args.tasks else None)
    if out:
        write_json(out, record(vla, domain, result))


if __name__ == "__main__":
    main(story, tyro.cli(Args, description=__doc__))
