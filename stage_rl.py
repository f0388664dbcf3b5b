"""
Stage 1: online RL of the action head, the VLM frozen (paper Sec. IV-B, Eq. 3).

    max over phi of  J(phi) = E_{pi_phi} [ sum_t gamma^t R(s_t, a_t) ],   R = 1 on success and 0 otherwise      (Eq. 3)

theta does not change, so a picture's latents h = VLM_theta(o, l) do not either: each picture passes the VLM once, when
it arrives, and all of PPO's epochs read the stored h (bfloat16). The next state's latents are the same tensor one row
on. When RL has converged (or its budget is spent) the best head seen records the task's successes, D_rl.

Where the paper is silent or this differs from it:
1) The algorithm is PPO (1707.06347) with GAE (1506.02438); the paper only implies it. On its robot it is SACfD: that is
   `--algo sacfd`, in sacfd.py. pi_phi is a Gaussian around the head's action with one trained deviation for each action
   dimension.
2) A success ends the return; a time-out does not (its last state is bootstrapped from the critic).
3) The critic starts new for each task, as in the paper, and is warmed up for some iterations before the actor moves: a
   random critic's advantages would undo what SFT has taught. For the same reason the actor also rests while none of
   the last 100 episodes has succeeded. Then it borrows: the VLA tries the sentences of the expert tasks, of which some
   often leads where the task's own does not, and phi learns from those successes (`borrow`; not with `--train-vlm`:
   the paper's baselines are plain PPO).
4) The head kept is the one with the best success over 100 training episodes, not the last one (but where there were
   fewer).
5) D_rl: 50 successes of that head, after training, from initial states of their own. They are made as D_e is: executed
   with noise, labelled with the head's mean (results/experiments.md has the comparison with the executed action).
   SACfD's demonstrations lie there too, labelled with what was executed.

python stage_rl.py --task TASK --parent runs/NAME-seed0/0-sft --out runs/NAME-seed0/1-rl-TASK
"""

from run import Refusal, Stage, check_memory, checkpoint_config, load_optimizer, main, optimizer_tensors, pick_device  # isort: skip  first, for Ctrl-C while torch is imported

import os
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from data import BORROW_SEED, ONLINE_SEED, RL_SEED, attempts, open_episode, write_episode
from domains import load_domain, simulator
from evaluate import check_task, evaluate_stage, finished, play, simulators
from model import VLA, Head, describe, freeze, log_prob
from sacfd import Critics, SACfD, executed, squashed, train_sacfd
from stage0_sft import sft_loss


@dataclass
class Args:
    task: str  # a task of the domain, by the paper one of its RL_TASKS
    parent: str  # the checkpoint to start from, e.g. runs/<name>/0-sft
    out: str  # the checkpoint to write, e.g. runs/<name>/1-rl-<task>; D_rl/ is made beside it
    domain: str = ""  # domains/<name>.py; empty: the parent's
    algo: Literal["", "ppo", "sacfd"] = ""  # empty: the domain's ALGO; sacfd: few episodes, for a robot (sacfd.py)
    env_steps: int | None = None  # budget: decisions in all environments together; None: 150,000, or SACfD's 30,000
    converged: float = 0.97  # stop when this share of the last 100 training episodes succeeded
    envs: int = 16  # simulators in parallel, a process each
    rollout: int = 128  # decisions of each simulator between two updates
    gamma: float = 0.99  # discount
    lam: float = 0.95  # GAE's lambda
    clip: float = 0.2  # PPO's clip of the probability ratio
    epochs: int = 5  # passes over a rollout
    minibatch: int = 512  # decisions of each gradient step
    lr: float = 1e-4  # of the head
    critic_lr: float = 1e-3  # of the critic
    train_vlm: bool = False  # PPO through the whole VLA, theta too: the paper's PPO-Replay, and Fig. 4
    target_kl: float = 0.03  # an update stops when the policy has moved this far
    std: float = 0.25  # initial exploration deviation, in units of the action range
    warmup: int = 3  # iterations that train the critic alone
    successes: int = 50  # successful episodes for D_rl
    noise: float | None = None  # deviation of the noise on what is executed while recording D_rl; None: the domain's
    episodes: int = 25  # evaluation episodes of each task after the stage; 0: do not evaluate
    seed: int = 0  # of the critic, exploration and minibatches
    device: str = ""  # cpu, cuda, ...; empty: the GPU where there is one
    threads: int = os.cpu_count()  # torch's CPU threads in PPO's updates, and rollouts if the VLM is large; else one
    sacfd: SACfD = field(default_factory=SACfD)  # of --algo sacfd; of PPO's above it takes gamma and std


# ----------------------------------------------------------------------------------------------------------------------
# Eq. 3 by PPO


def gae(reward, value, term, trunc, gamma, lam):
    """Generalized advantage estimation (1506.02438, Eq. 16): the advantage of each decision, (T, N).

    reward, term, trunc (T, N): what decision t led to; value (T+1, N): the critic's, value[t+1] that of the state that
    decision t led to, also when that state is an episode's last. A success (term) has no future; a time-out (trunc) has
    one that was not seen, so its value is kept. Neither hands on what came after it.
    """
    advantage, following = torch.zeros_like(reward), 0.0
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * (1 - term[t]) * value[t + 1] - value[t]
        following = delta + gamma * lam * (1 - torch.maximum(term[t], trunc[t])) * following
        advantage[t] = following
    return advantage


def ppo_losses(new_log_prob, old_log_prob, advantage, value, target, clip):
    """(policy loss, value loss, KL estimate, clipped share) of a minibatch of (B,) tensors; Eq. 7 of PPO 1707.06347."""
    log_ratio = new_log_prob - old_log_prob
    ratio = log_ratio.exp()
    policy = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).mean()  # an estimate that is never negative (joschu.net/blog/kl-approx.html)
        clipped = ((ratio - 1).abs() > clip).float().mean()
    return policy, (value - target).square().mean(), kl, clipped


def ppo_update(args, vla, critic, optimizer, flat, rows, mask, warm, generator, stage, again=None):
    """PPO's epochs over a rollout: changes phi and the critic, and theta where `again` is given. Returns the means of
    (policy loss, value loss, KL, clipped share, the actor's gradient norm) for the log.

    flat: the rollout's T*N rows, "h" (T*N, M, D) bfloat16, "action" (T*N, A), "logp", "advantage", "target" (T*N,).
    rows (B,): those that are decisions. mask (1, M). warm: train the critic alone. again(b) -> (b, M, D): the latents
    of some rows under today's theta, in place of the stored ones.
    """
    actor = optimizer.param_groups[0]["params"]
    spread = flat["advantage"][rows].std() + 1e-8
    centre = flat["advantage"][rows].mean()
    stats, moved = [], False
    for _ in range(args.epochs):
        for b in rows[torch.randperm(len(rows), generator=generator).to(rows.device)].split(args.minibatch):
            x = flat["h"][b].float()  # (b, M, D)
            if again and not (warm or moved):
                x = again(b).float()
            new_logp = log_prob(flat["action"][b], vla.mean(x, mask), vla.log_std)
            norm_advantage = (flat["advantage"][b] - centre) / spread
            policy, value_loss, kl, clipped = ppo_losses(
                new_logp, flat["logp"][b], norm_advantage, critic(x.detach(), mask)[:, 0], flat["target"][b], args.clip
            )
            moved |= kl.item() > args.target_kl
            loss = value_loss if warm or moved else value_loss + policy
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(actor, 0.5)
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
            if not torch.isfinite(loss):
                raise Refusal(f"PPO's loss is NaN: delete {stage.folder} and give a smaller --lr")
            optimizer.step()
            stats.append((policy.item(), value_loss.item(), kl.item(), clipped.item(), float(norm)))
    return np.mean(stats, axis=0)


def borrow(args, domain, vla, counters):
    """A start for RL where the task's own sentence succeeds in none of 100 episodes: what the VLA does for others.

    Each of the expert tasks' sentences is tried in two episodes, then those that succeeded in 20 more, as often as each
    had. Eq. 2 on those successes' latents, under the task's own sentence, gives phi what they did. Changes phi; counts
    attempts in counters["borrowed"], decisions in counters["env_steps"].
    """
    own, noise = domain.INSTRUCTIONS[args.task], domain.NOISE if args.noise is None else args.noise

    def attempt(sentences):
        """An episode under each sentence: [(sentence, image (T, H, W, 3), action (T, A))] of those that succeeded."""
        begin = BORROW_SEED + counters.setdefault("borrowed", 0)
        counters["borrowed"] += len(sentences)
        say, won = dict(enumerate(sentences, begin)), {}  # seed: sentence
        for e in play(vla, domain, {args.task: list(say)}, args.envs, shaken(vla, noise), keep_images=True, say=say):
            counters["env_steps"] += e["decisions"]
            if e["success"]:
                won[e["seed"]] = say[e["seed"]], e["image"], e["action"]
        return [won[seed] for seed in sorted(won)]

    others = sorted({domain.INSTRUCTIONS[task] for task in domain.EXPERT_TASKS} - {own})
    won, tried = attempt(2 * others) if others else [], 2 * len(others)
    if not won:
        return tqdm.write(f"no success in 100 episodes, nor in {tried} under other sentences")
    won += attempt((20 * [sentence for sentence, _, _ in won])[:20])
    best = ", ".join(f"{sentence!r} {n}" for sentence, n in Counter(w[0] for w in won).most_common(3))
    tqdm.write(f"no success in 100 episodes, but {len(won)} in {tried + 20} under other sentences: {best}")

    action = torch.from_numpy(np.concatenate([action for _, _, action in won])).to(vla.device)  # (n, A)
    with torch.no_grad():
        h, mask = zip(*[vla.encode(image, [own] * len(image)) for _, image, _ in won])
    h, mask = torch.cat(h).to(torch.bfloat16), mask[0][:1]  # (n, M, D), (1, M)
    optimizer = torch.optim.Adam(vla.phi(), lr=5 * args.lr)
    generator = torch.Generator().manual_seed(hash((args.seed, counters["borrowed"])) & 0x7FFFFFFF)
    for _ in range(500):
        b = torch.randint(len(h), (256,), generator=generator).to(h.device)
        optimizer.zero_grad()
        sft_loss(vla.mean, h[b].float(), mask, action[b], vla.action_std).backward()
        optimizer.step()


def algo_and_budget(args, domain):
    """(algorithm, budget of decisions) of a stage with these arguments."""
    algo = args.algo or domain.ALGO
    return algo, (150_000 if algo == "ppo" else 30_000) if args.env_steps is None else args.env_steps


def story(args):
    args.domain = args.domain or checkpoint_config(args.parent)["domain"]
    domain, out = load_domain(args.domain), Path(args.out)
    check_task(args.task, domain)
    algo, budget = algo_and_budget(args, domain)
    if args.std <= 0:
        raise Refusal(f"--std {args.std} cannot be: RL explores, so it is above 0")
    if algo == "ppo" and args.rollout < 4:
        raise Refusal(f"--rollout {args.rollout} cannot be: PPO compares the decisions of a rollout, give 4 or more")
    stage = Stage(args, ["sacfd"] if algo == "ppo" else [])
    device = pick_device(args.device)
    torch.set_num_threads(1)  # while 16 simulators share the cores; updates use args.threads
    torch.manual_seed(args.seed)
    if finished(stage, domain, args, device, args.envs):
        return

    vla = VLA.load(args.parent, args.domain, device)
    freeze(vla.vlm.parameters())
    freeze(vla.theta(), not args.train_vlm)
    instruction, dim = domain.INSTRUCTIONS[args.task], vla.head.mlp[0].in_features
    vla.log_std.data.fill_(np.log(args.std))
    if args.train_vlm and algo != "ppo":
        raise Refusal(
            "--train-vlm goes with --algo ppo: SACfD's buffer holds latents, which last only while theta does"
        )
    if algo == "ppo":
        learn, rates, critic = train, args, Head(dim, 1).to(device)
    else:
        learn, rates = train_sacfd, args.sacfd
        critic = Critics(dim, vla.config["action_dim"], args.sacfd.alpha).to(device)
    learned = {name: p for name, p in vla.named_parameters() if p.requires_grad}  # phi, the deviation, perhaps theta
    actor, critical = list(learned.values()), [p for p in critic.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [{"params": actor, "lr": rates.lr}, {"params": critical, "lr": rates.critic_lr}], eps=1e-5, fused=True
    )

    tensors, counters = stage.load()
    counters = counters or {"iteration": 0, "env_steps": 0, "finished": False, "best": -1.0, "recent": []}
    best = {name: p.detach().clone() for name, p in learned.items()}
    vla.forwards = counters.get("forwards", 0)
    if tensors:
        for name, p in learned.items():
            p.data.copy_(tensors[f"vla.{name}"])
            best[name].copy_(tensors[f"best.{name}"])
        critic.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("critic.")})
        load_optimizer(optimizer, tensors)

    def save():
        state = {f"vla.{name}": p.data for name, p in learned.items()}
        state |= {f"best.{name}": p for name, p in best.items()}
        state |= {f"critic.{name}": p for name, p in critic.state_dict().items()}
        stage.save(state | optimizer_tensors(optimizer), {**counters, "recent": list(recent), "forwards": vla.forwards})

    recent = deque(counters["recent"], maxlen=100)  # the last training episodes: 1 success, 0 time-out

    def keep_best():
        """The share of successes in `recent`. Keeps the weights where no full `recent` had a greater one."""
        success = float(np.mean(recent)) if recent else 0.0
        if len(recent) == recent.maxlen and success >= counters["best"]:  # of equals the later
            counters["best"] = success
            best.update({name: p.detach().clone() for name, p in learned.items()})
        return success

    moving = "theta too" if args.train_vlm else "theta frozen"
    print(f"stage 1: Eq. 3 on {args.task} ({instruction!r}) | {describe(vla)}, {moving}")
    folder = out.parent / "D_rl" / args.task
    if algo == "sacfd" and not counters["iteration"] and "demonstrated" not in counters:
        if "first_demo" not in counters:
            counters["first_demo"] = max(attempts(folder), default=-1) + 1
            counters["lacking"] = max(0, args.sacfd.demos - len(executed(folder)))
            save()
        made, attempted, decisions = record_successes(
            args, domain, vla, folder, counters["first_demo"], counters["lacking"], None
        )
        print(f"demonstrations: {made} zero-shot successes of {attempted} attempts, {decisions} decisions, in {folder}")
        counters["env_steps"] += decisions
        counters["demonstrated"] = True
        save()
    if not counters["finished"]:
        for _ in learn(args, budget, domain, vla, critic, optimizer, stage, counters, recent, keep_best):
            if stage.due():
                save()
        counters["finished"] = True
        save()
    if counters["best"] >= 0:
        for name, p in learned.items():
            p.data.copy_(best[name])

    # ------------------------------------------------------------------------------------------------------------------
    # the task's successes: D_rl
    if "first" not in counters:  # a later round adds to what an earlier one has recorded
        counters["first"] = max(attempts(folder), default=-1) + 1
        save()
    noise = domain.NOISE if args.noise is None else args.noise
    made, attempted, _ = record_successes(args, domain, vla, folder, counters["first"], args.successes, noise)
    print(f"D_rl: {made} successes of {attempted} attempts in {folder}")
    vla.save(stage.folder, parent=args.parent, args=stage.decides)
    stage.finish(
        env_steps=counters["env_steps"], best=counters["best"], successes=made, task=args.task,
        updates_share=counters.get("updates_share"), vlm_forwards=vla.forwards,
    )  # fmt: skip
    evaluate_stage(out, domain, args.episodes, device, args.envs, vla)


def train(args, budget, domain, vla, critic, optimizer, stage, counters, recent, keep_best):
    """PPO until convergence or the budget's end. Changes phi, the critic, `counters`, `recent` and, by `keep_best`, the
    best head so far; yields after each iteration, when all of them belong together."""
    device, instruction = vla.device, domain.INSTRUCTIONS[args.task]
    name, size = domain.__name__.split(".")[-1], vla.config["image_size"]
    groups = np.array_split(np.arange(args.envs), min(2, args.envs))  # one steps while the other's images are encoded
    fns = [partial(simulator, name, args.task, size)] * args.envs
    # NEXT_STEP: an episode's last picture has a row of its own, and the decision made there is not executed but resets.
    # So row t+1 always holds what decision t led to, and no picture has to be kept or encoded beside the rows.
    envs = [simulators(fns[: len(g)], vla, AutoresetMode.NEXT_STEP) for g in groups]
    T, N, A = args.rollout, args.envs, vla.config["action_dim"]

    @torch.no_grad()
    def encode(obs):
        h, mask = vla.encode(obs, [instruction] * len(obs))  # (n, M, D), (n, M)
        if not torch.isfinite(h).all():
            raise Refusal(f"a latent of {args.task} is NaN at step {counters['env_steps']}: the last state is kept")
        return h.to(torch.bfloat16), mask

    seed = RL_SEED + 10_000 * args.seed + counters["iteration"]  # a resumed run does not repeat its first episodes
    shown = [env.reset(seed=[seed + 1000 * int(i) for i in g])[0].copy() for env, g in zip(envs, groups)]
    began = time.time()
    first = [encode(obs) for obs in shown]
    # A small VLM leaves the cores to the simulators; for a large one they wait, so it may have all.
    rollout_threads = args.threads if time.time() - began > 0.5 * len(shown) else 1
    M, D = first[0][0].shape[1:]
    mask = first[0][1][:1]  # (1, M): one instruction
    what = f"a rollout's latents, (rollout + 1) x envs x tokens x width = {T + 1} x {N} x {M} x {D} in bfloat16,"
    check_memory(2 * (T + 1) * N * M * D, device, what, "give a smaller --rollout or --envs")
    h = torch.zeros(T + 1, N, M, D, dtype=torch.bfloat16, device=device)  # (T+1, N, M, D)
    h[T] = torch.cat([x for x, _ in first])
    pictures = np.zeros((T + 1, N, size, size, 3), np.uint8) if args.train_vlm else None  # where h does not last
    action = torch.zeros(T, N, A, device=device)
    logp, reward, term, trunc = (torch.zeros(T, N, device=device) for _ in range(4))
    over = torch.zeros(N, device=device)  # did the latest decision end its episode?
    bar = tqdm(desc=f"RL {args.task}", total=budget, initial=counters["env_steps"], smoothing=0.1, unit="step")
    t_total = t_update = 0.0
    try:
        while counters["env_steps"] < budget:
            began = time.time()
            torch.set_num_threads(rollout_threads)
            generator = torch.Generator().manual_seed(hash((args.seed, counters["iteration"])) & 0x7FFFFFFF)
            # ----------------------------------------------------------------------
            # a rollout of T decisions in N simulators
            h[0] = h[T]
            if args.train_vlm:  # theta has moved since these were encoded
                pictures[0] = np.concatenate(shown)
                h[0] = encode(pictures[0])[0]
            valid = torch.zeros(T, N, dtype=torch.bool, device=device)

            def decide(t, k):
                g = groups[k]
                with torch.no_grad():
                    action[t, g], logp[t, g] = vla.explore(h[t, g].float(), mask, generator)  # noqa: B023
                if not torch.isfinite(action[t, g]).all():
                    raise Refusal(f"the policy's action is NaN at step {counters['env_steps']}: the last state is kept")
                envs[k].step_async(action[t, g].clamp(-1, 1).cpu().numpy())

            for k in range(len(envs)):
                decide(0, k)
            for t in range(T):
                for k, g in enumerate(groups):
                    obs, r, end, cut, _ = envs[k].step_wait()
                    valid[t, g] = over[g] == 0  # else: this decision only reset the simulator
                    reward[t, g], term[t, g], trunc[t, g] = (torch.as_tensor(x, dtype=torch.float32, device=device)
                                                             for x in (r, end, cut & ~end))  # fmt: skip
                    over[g] = torch.maximum(term[t, g], trunc[t, g])
                    recent.extend(int(e) for e, o in zip(end, end | cut) if o)
                    h[t + 1, g] = encode(obs)[0]
                    if args.train_vlm:
                        pictures[t + 1, g] = obs
                        shown[k] = obs.copy()
                    if t + 1 < T:
                        decide(t + 1, k)
            counters["env_steps"] += int(valid.sum())
            success = keep_best()
            # ----------------------------------------------------------------------
            # PPO on the stored latents
            t_rollout = time.time()
            torch.set_num_threads(args.threads)
            with torch.no_grad():
                rows = h.flatten(0, 1).split(args.minibatch)
                value = torch.cat([critic(x.float(), mask)[:, 0] for x in rows]).view(T + 1, N)  # (T+1, N)
            advantage = gae(reward, value, term, trunc, args.gamma, args.lam)  # (T, N)
            target = advantage + value[:-1]  # (T, N)
            rows = valid.flatten().nonzero()[:, 0]  # (B,) of T*N
            flat = {
                "h": h[:-1].flatten(0, 1), "action": action.flatten(0, 1), "logp": logp.flatten(),
                "advantage": advantage.flatten(), "target": target.flatten(),
            }  # fmt: skip
            again = None
            if args.train_vlm:  # the only place where stage 1 needs the pictures again
                seen = pictures[:-1].reshape(T * N, size, size, 3)
                again = lambda b: vla.encode(seen[b.cpu().numpy()], [instruction] * len(b))[0]  # noqa: B023, E731
            warm = counters["iteration"] < args.warmup or not any(recent)
            numbers = ppo_update(args, vla, critic, optimizer, flat, rows, mask, warm, generator, stage, again)
            # ----------------------------------------------------------------------
            counters["iteration"] += 1
            t_total += time.time() - began
            t_update += time.time() - t_rollout
            counters["updates_share"] = round(t_update / t_total, 4)
            policy, value_loss, kl, clipped, norm = numbers
            explained = 1 - (target - value[:-1])[valid].var() / target[valid].var().clamp(min=1e-8)
            stage.log(
                counters["env_steps"], success=success, std=vla.log_std.exp().mean().item(), kl=kl,
                clip_fraction=clipped, policy_loss=policy, value_loss=value_loss, grad_norm=norm,
                explained_variance=explained.item(),
                best=counters["best"], steps_per_second=int(valid.sum()) / (time.time() - began),
                updates_share=counters["updates_share"],
            )  # fmt: skip
            if len(recent) == recent.maxlen and not any(recent) and not args.train_vlm:  # the baselines are plain PPO
                torch.set_num_threads(rollout_threads)
                borrow(args, domain, vla, counters)
                recent.clear()
            bar.update(counters["env_steps"] - bar.n)
            bar.set_postfix_str(f"success {success:.2f}, best {counters['best']:.2f}, kl {kl:.3f}")
            yield
            if counters["best"] >= args.converged:
                break
    finally:
        torch.set_num_threads(1)
        bar.close()
        for env in envs:
            env.close(terminate=True)


def shaken(vla, noise):
    """How `play` acts when episodes are kept: the mean is the label, and all but the gripper of what is executed is
    shaken by `noise`, as the expert is (stage0_sft.py). None: explore as SACfD does, labelled with what is executed."""

    def act(h, mask, ids):
        label = vla.act(h, mask)
        drawn = np.stack([np.random.default_rng(i[1:]).normal(size=label.shape[1]) for i in ids])
        drawn = torch.as_tensor(drawn, dtype=label.dtype, device=label.device)  # (B, A)
        if noise is None:
            executed = squashed(vla.mean(h, mask), vla.log_std, drawn)[0]
            return executed, executed
        drawn[:, -1] = 0
        return label + noise * drawn, label

    return act


def record_successes(args, domain, vla, folder, first, successes, noise):
    """Record `successes` episodes of the policy into `folder`; gives up after four times as many attempts. Returns
    (made, attempted, decisions). Attempt k is decided by its seed, so an interrupted recording can make it again.
    noise: deviation of that on what is executed; None: explore as SACfD does, and label with what was executed.
    """
    name, made, attempted, decisions = domain.__name__.split(".")[-1], 0, 0, 0
    while attempted < 4 * successes:
        folder.mkdir(parents=True, exist_ok=True)  # also where nothing succeeds: a run has always the same folders
        have = {k for k in attempts(folder) if k >= first}
        made = len([k for k in have if k < first + attempted])
        if made >= successes:
            break
        fresh = range(first + attempted, first + min(attempted + successes - made, 4 * successes))
        attempted += len(fresh)
        for k in have.intersection(fresh):  # before an interruption
            decisions += open_episode(folder / f"{k:06d}.safetensors")[0].get_slice("reward").get_shape()[0]
        programme = {args.task: [ONLINE_SEED + k for k in fresh if k not in have]}
        if not programme[args.task]:
            continue
        for e in play(vla, domain, programme, args.envs, shaken(vla, noise), keep_images=True):
            decisions += e["decisions"]
            if e["success"]:
                write_episode(
                    folder / f"{e['seed'] - ONLINE_SEED:06d}.safetensors", e["image"], e["action"], e["reward"],
                    domain=name, task=args.task, instruction=domain.INSTRUCTIONS[args.task], source="online",
                    seed=e["seed"], protocol=domain.PROTOCOL, executed=noise is None,
                )  # fmt: skip
    return len([k for k in attempts(folder) if k >= first]), attempted, decisions


if __name__ == "__main__":
    main(story, tyro.cli(Args, description=__doc__))
