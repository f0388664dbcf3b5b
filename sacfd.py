"""
SACfD: soft actor-critic from demonstrations, in the frozen VLM's latent space (paper Sec. V-D). The other algorithm of
stage 1, `stage_rl.py --algo sacfd`, for a robot, where PPO's appetite for episodes cannot be paid.

    demonstrations   20 successes of the zero-shot policy, those that D_rl/<task> holds or else played now, exploring
    row              latents h (M, D) bf16, action, reward, term, trunc; what a decision led to is the next row
    batch            half from the demonstrations, half from what RL has seen
    critics          two; target: n-step return + gamma^n (the lesser of two slow copies - alpha log pi)
    actor            A-range * tanh(atanh(head) + std * noise): without noise it is the head's greedy action
    losses           critics: squared error; actor: alpha log pi - Q, and on demonstrations the distance to their action

Sources: SAC 1801.01290, its learned temperature 1812.05905; DDPGfD 1707.08817 (demonstrations in the buffer, n-step
returns, priorities, several updates a step: what "fD" adds); RLPD 2302.02948 (half and half; layer norm in critics);
behaviour cloning beside RL 1709.10089. SERL runs SAC on 50/50 batches without priorities or cloning.

The paper names SACfD and says half and half, 20 demonstrations, an hour a task; all else here is a choice:
1) One deviation for each action dimension, as PPO's, not one for each state.
2) The actor rests until `warmup` decisions, those of the zero-shot attempts among them, have been made.
3) The zero-shot attempts explore as the actor does: a greedy policy that hesitates stands still for ever
   (results/experiments.md). `real_robot.py collect` is greedy unless `--std` is given: an operator can take over.
4) An episode that a fault ended (info["fault"]) stays in the file and is never drawn; a person's action
   (info["executed"]) is stored as the action.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from data import RL_SEED, attempts, open_episode
from domains import simulator
from evaluate import simulators
from model import TokenLearner
from run import Refusal, check_memory, read_tensors, whole

RANGE = 1.1  # the squashed action's, a little more than what the environment clips to: atanh(1) is infinite


@dataclass
class SACfD:
    demos: int = 20  # zero-shot successes in the demonstration buffer
    utd: float = 4.0  # gradient steps for each decision
    batch: int = 128  # rows of each gradient step, half of them demonstrations
    actor_every: int = 2  # gradient steps of the critics for one of the actor and the temperature (TD3 1802.09477)
    n_step: int = 5  # decisions whose rewards are summed before the critic is asked
    tau: float = 0.005  # share of the critics that goes into their slow copies at each gradient step
    lr: float = 2e-4  # of the head
    critic_lr: float = 3e-4  # of the critics and the temperature
    alpha: float = 0.002  # initial temperature
    entropy: float = -1.0  # target entropy for each action dimension
    clone: float = 0.05  # weight of behaviour cloning on the demonstrations
    priority: float = 0.6  # exponent of prioritized replay
    importance: float = 0.4  # exponent of its importance weights
    warmup: int = 500  # decisions before the actor moves, zero-shot attempts included


# ----------------------------------------------------------------------------------------------------------------------
# Actor and critics


def squashed(mean, log_std, noise):
    """The actor: (B, A), (A,), (B, A) standard normal -> (action (B, A) in (-RANGE, RANGE), its log-probability (B,)).

    SAC's tanh of a Gaussian (1801.01290, appendix C), around atanh(mean): without noise the action is the mean, clipped
    to [-1, 1] as in VLA.act. The clip lets gradients pass, for SFT's mean lies beyond the range here and there.
    """
    mean = mean + (mean.clamp(-1, 1) - mean).detach()
    u = torch.atanh(mean / RANGE) + log_std.exp() * noise  # (B, A)
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = math.log(RANGE) + 2 * (math.log(2) - u - F.softplus(-2 * u))  # log d action / du
    return RANGE * u.tanh(), (log_prob - log_slope).sum(-1)


class Twins(nn.Module):
    """Two critics Q(h, a) on one token learner: (B, M, D), (B, M), (B, A) -> (2, B). The head's shape, the action
    beside the pooled latents."""

    def __init__(self, dim, action_dim, hidden=256):
        super().__init__()
        self.token_learner = TokenLearner(dim)
        norm = lambda: (nn.LayerNorm(hidden), nn.GELU())  # noqa: E731
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim + action_dim, hidden), *norm(), nn.Linear(hidden, hidden), *norm(), nn.Linear(hidden, 1)
            )
            for _ in range(2)
        )

    def forward(self, h, mask, action):
        x = torch.cat([self.token_learner(h, mask), action], dim=1)  # (B, D + A)
        return torch.cat([mlp(x) for mlp in self.mlps], dim=1).T  # (2, B)


class Critics(nn.Module):
    """What SACfD trains beside the head: two critics, their slow copies, the temperature's logarithm."""

    def __init__(self, dim, action_dim, alpha):
        super().__init__()
        self.q, self.slow = Twins(dim, action_dim), Twins(dim, action_dim)
        self.slow.load_state_dict(self.q.state_dict())
        self.slow.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))

    @torch.no_grad()
    def follow(self, tau):
        torch._foreach_lerp_(list(self.slow.parameters()), list(self.q.parameters()), tau)


def critic_loss(vla, critics, mask, batch, noise):
    """(weighted squared error of both critics, its absolute value (B,)) of a batch as Replay.sample gives it; noise
    (B, A) standard normal."""
    # fmt: off
    h, action, ret, discount, h_after, weight = batch
    alpha = critics.log_alpha.exp().detach()
    with torch.no_grad():
        a, logp = squashed(vla.mean(h_after, mask), vla.log_std, noise)                # (B, A), (B,)
        after = critics.slow(h_after, mask, a.clamp(-1, 1)).amin(0)                    # (B,)
        target = ret + discount * (after - alpha * logp)                               # (B,)
    error = critics.q(h, mask, action) - target                                        # (2, B)
    return (weight * error.square()).mean(1).sum(), error.detach().abs().mean(0)
    # fmt: on


def actor_loss(vla, critics, mask, batch, noise, demonstrated, clone, entropy):
    """(the actor's loss, the temperature's, mean log-probability); the batch's first `demonstrated` rows are
    demonstrations, noise is as above, entropy the target for each dimension."""
    # fmt: off
    h, action, *_ = batch
    alpha = critics.log_alpha.exp().detach()
    mean = vla.mean(h, mask)                                                           # (B, A)
    a, logp = squashed(mean, vla.log_std, noise)                                       # (B, A), (B,)
    critics.q.requires_grad_(False)
    value = critics.q(h, mask, a.clamp(-1, 1)).amin(0)                                 # (B,)
    critics.q.requires_grad_(True)
    apart = ((mean - action) / vla.action_std)[:demonstrated]
    beyond = mean - mean.clamp(-1, 1)  # where the clip lets Q's gradient pass, nothing else would hold the mean
    loss = (alpha * logp - value).mean() + clone * apart.square().sum() / max(1, apart.numel())
    loss = loss + beyond.square().mean()
    return loss, -critics.log_alpha * (logp.detach() + entropy * action.shape[1]).mean(), logp.detach().mean()
    # fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# The buffer


class Replay:
    """Rows of N simulators, in the order in which they were seen. h[t+1] is what decision t led to, also at an
    episode's end; a row whose decision was not one (it reset the simulator) has priority 0 and is never drawn.

    All of it is kept. Memory is taken as rows are written: 2 M D bytes each.
    """

    NAMES = ("h", "action", "reward", "term", "trunc")

    def __init__(self, rows, n, tokens, dim, action_dim, device):
        self.h = torch.empty(rows + 1, n, tokens, dim, dtype=torch.bfloat16, device=device)
        self.action = torch.zeros(rows, n, action_dim, device=device)
        self.reward, self.term, self.trunc, self.priority = (torch.zeros(rows, n, device=device) for _ in range(4))
        self.t = self.written = 0

    def add(self, action, reward, term, trunc, valid, h_after):
        """Decision t of every simulator and the latents it led to. The first row's own latents are put into h[0]."""
        t = self.t
        if t == len(self.reward):
            raise Refusal("the replay buffer is full: give a larger --env-steps")
        for name, value in zip(self.NAMES[1:], (action, reward, term, trunc)):
            getattr(self, name)[t] = value
        self.h[t + 1] = h_after
        self.priority[t] = valid * max(1.0, float(self.priority[:t].max())) if t else valid.float()
        self.t = t + 1

    def sample(self, k, n_step, gamma, exponent, importance, generator):
        """k decisions by priority (PER 1511.05952): their index, and (h, action, n-step return, discount of what the
        critic says of h_after, h_after, importance weight). A success ends the future, a time-out only the sum."""
        p = self.priority[: self.t].flatten().double()  # a GPU's sums of float32 do not only rise
        p = torch.where(p > 0, p**exponent, 0)  # 0 ** 0 is 1
        total = p.cumsum(0)
        draw = (1 - torch.rand(k, generator=generator)).to(p) * total[-1]  # in (0, total]: never what has none
        i = torch.searchsorted(total, draw).clamp(max=len(p) - 1)
        weight = ((p > 0).sum() * p[i] / total[-1]).float() ** -importance
        t, n = i // self.reward.shape[1], i % self.reward.shape[1]
        ret, discount, going, last = torch.zeros_like(weight), torch.ones_like(weight), torch.ones_like(weight), t
        for step in range(n_step):
            ret = ret + going * discount * self.reward[last, n]
            discount = discount * torch.where(going > 0, gamma * (1 - self.term[last, n]), 1.0)
            going = going * (1 - torch.maximum(self.term[last, n], self.trunc[last, n])) * (last + 1 < self.t)
            if step + 1 < n_step:
                last = last + (going > 0).long()
        h, after = self.h[t, n].float(), self.h[last + 1, n].float()
        return i, (h, self.action[t, n], ret, discount, after, weight / weight.max())

    def write(self, folder):
        """Add the rows since the last time to the folder, a file of their own, and put all priorities into another."""
        if self.t > self.written:
            with whole(Path(folder) / "priority.safetensors") as tmp:
                save_file({"priority": self.priority[: self.t].cpu().clone()}, tmp)
            part = slice(self.written, self.t)
            rows = {name: getattr(self, name)[part].cpu().clone() for name in self.NAMES}
            rows["h_after"] = self.h[self.t].cpu().clone()
            with whole(Path(folder) / f"replay-{self.written:08d}.safetensors") as tmp:
                save_file(rows, tmp)
            self.written = self.t

    def read(self, folder, rows):
        """The first `rows` rows from the folder; files with later ones, whose state was not saved, are removed."""
        for path in sorted(Path(folder).glob("replay-*.safetensors")):
            begin = int(path.stem.split("-")[1])
            if begin >= rows:
                path.unlink()
                continue
            part, _ = read_tensors(path)
            end = begin + len(part["reward"])
            for name in self.NAMES:
                getattr(self, name)[begin:end] = part[name]
            self.h[end] = part["h_after"]
            self.t = self.written = end
        if self.t:
            tensors, _ = read_tensors(Path(folder) / "priority.safetensors")
            self.priority[: self.t] = tensors["priority"][: self.t]
            # what was going on when the run stopped is over: unseen, as with a time-out
            self.trunc[self.t - 1] = torch.maximum(self.trunc[self.t - 1], 1 - self.term[self.t - 1])


def executed(folder):
    """The episodes in `folder` whose actions were executed, as open files. Those that a stage 1 records at its end are
    not: they hold the policy's mean, and what was done was that and noise, so no critic can learn from them."""
    opened = [open_episode(Path(folder) / f"{k:06d}.safetensors") for k in attempts(folder)]
    return [episode for episode, header in opened if header.get("executed", "1") == "1"]  # older files do not say


def demonstrations(vla, folder, encode):
    """A Replay of the executed episodes in `folder`, one after the other; None without any: then all is online."""
    demos, episodes = None, executed(folder)
    for episode in episodes:
        reward = torch.from_numpy(episode.get_tensor("reward"))
        image = episode.get_tensor("image")
        h = torch.cat([encode(image[t : t + 64]) for t in range(0, len(image), 64)])
        if demos is None:
            total = sum(len(e.get_tensor("reward")) for e in episodes)
            demos = Replay(total, 1, *h.shape[1:], vla.config["action_dim"], h.device)
        action = torch.from_numpy(episode.get_tensor("action")).to(h.device)
        for t in range(len(h)):
            demos.h[demos.t] = h[t]
            term = reward[t] > 0  # then what follows in the buffer, another episode, is not looked at
            demos.add(action[t], reward[t], term, 0, torch.ones(1), h[min(t + 1, len(h) - 1)])
    return demos


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_sacfd(args, budget, domain, vla, critics, optimizer, stage, counters, recent, keep_best):
    """SACfD until convergence or the budget's end. Changes phi, the critics, `counters`, `recent` and, by `keep_best`,
    the best head so far; yields after each hundred rows, when all of them belong together."""
    device, instruction, how = vla.device, domain.INSTRUCTIONS[args.task], args.sacfd
    name, size, N = domain.__name__.split(".")[-1], vla.config["image_size"], args.envs
    actor = optimizer.param_groups[0]["params"]

    @torch.no_grad()
    def encode(obs):
        h, _ = vla.encode(obs, [instruction] * len(obs))  # (n, M, D)
        if not torch.isfinite(h).all():
            raise Refusal(f"a latent of {args.task} is NaN at step {counters['env_steps']}: the last state is kept")
        return h.to(torch.bfloat16)

    demos = demonstrations(vla, Path(args.out).parent / "D_rl" / args.task, encode)
    h, mask = vla.encode(np.zeros((1, size, size, 3), np.uint8), [instruction])  # (1, M, D), (1, M)
    left = max(0, budget - counters["env_steps"])
    rows = counters.get("rows", 0) + 2 * (left // N) + 5  # at least every other row of a simulator is a decision
    sure = rows * N if device.type == "cuda" else left  # a GPU's memory is taken at once, a CPU's as rows are written
    check_memory(2 * sure * h[0].numel(), device, f"the latents of {left:,} decisions", "give a smaller --env-steps")
    replay = Replay(rows, N, *h.shape[1:], vla.config["action_dim"], device)
    replay.read(stage.folder, counters.get("rows", 0))

    fns = [partial(simulator, name, args.task, size)] * N
    envs = simulators(fns, vla, AutoresetMode.NEXT_STEP)  # rows as in stage_rl.py
    seed = RL_SEED + 10_000 * args.seed + counters["iteration"]  # a resumed run does not repeat its first episodes
    bar = tqdm(desc=f"SACfD {args.task}", total=budget, initial=counters["env_steps"], smoothing=0.1, unit="step")
    over, began_at, owed = torch.zeros(N, device=device), np.full(N, replay.t), 0.0
    try:
        obs, _ = envs.reset(seed=[seed + 1000 * i for i in range(N)])
        if replay.t:  # a row without a decision between what was seen before and now
            nothing = torch.zeros(N, device=device)
            replay.add(torch.zeros_like(replay.action[0]), nothing, nothing, nothing, nothing, encode(obs))
        else:
            replay.h[0] = encode(obs)
        while counters["env_steps"] < budget:
            began, before, stats, t_update = time.time(), counters["env_steps"], [], 0.0
            generator = torch.Generator().manual_seed(hash((args.seed, counters["iteration"])) & 0x7FFFFFFF)
            for _ in range(100):
                # ----------------------------------------------------------------------
                # one decision in N simulators; while they step, the gradient steps owed for the ones before
                with torch.no_grad():
                    noise = torch.randn(N, replay.action.shape[-1], generator=generator).to(device)
                    h = replay.h[replay.t].float()  # (N, M, D)
                    action = squashed(vla.mean(h, mask.expand(N, -1)), vla.log_std, noise)[0].clamp(-1, 1)
                if not torch.isfinite(action).all():
                    raise Refusal(f"the policy's action is NaN at step {counters['env_steps']}: the last state is kept")
                envs.step_async(action.cpu().numpy())
                t = time.time()
                while owed >= 1 and replay.priority[: replay.t].any():  # none: before the first row, or all faulted
                    owed -= 1
                    moves = counters["env_steps"] >= how.warmup and len(stats) % how.actor_every == 0
                    stats.append(
                        update(args, vla, critics, optimizer, actor, mask, demos, replay, moves, generator, stage)
                    )
                t_update += time.time() - t
                obs, reward, end, cut, info = envs.step_wait()
                # ----------------------------------------------------------------------
                valid = over == 0  # else: this decision only reset the simulator
                if "executed" in info:
                    action = torch.as_tensor(np.stack(info["executed"]), dtype=torch.float32, device=device)
                r, term, trunc = (
                    torch.as_tensor(x, dtype=torch.float32, device=device) for x in (reward, end, cut & ~end)
                )
                replay.add(action, r, term, trunc, valid, encode(obs))
                over = torch.maximum(term, trunc)
                faults = info.get("_fault", np.zeros(N, bool))
                for i in np.flatnonzero(end | cut):
                    if faults[i]:
                        tqdm.write(f"not learned from: {info['fault'][i]}")
                        replay.priority[began_at[i] : replay.t, i] = 0
                    else:
                        recent.append(int(end[i]))
                    began_at[i] = replay.t + 1
                counters["env_steps"] += int(valid.sum())
                owed = min(owed + how.utd * int(valid.sum()), how.utd * N + 1)  # after a fault no robot waits for more
                success = keep_best()
                if counters["env_steps"] >= budget:
                    break
            counters["iteration"] += 1
            counters["rows"] = replay.t
            seconds = time.time() - began
            counters["updates_share"] = round(t_update / seconds, 4)
            alpha = critics.log_alpha.exp().item()
            means = {k: float(np.mean([x[k] for x in stats if k in x])) for k in {k for x in stats for k in x}}
            stage.log(
                counters["env_steps"], success=success, std=vla.log_std.exp().mean().item(), alpha=alpha, **means,
                best=counters["best"],
                steps_per_second=(counters["env_steps"] - before) / seconds, updates_share=counters["updates_share"],
            )  # fmt: skip
            bar.update(counters["env_steps"] - bar.n)
            bar.set_postfix_str(f"success {success:.2f}, best {counters['best']:.2f}, alpha {alpha:.4f}")
            if stage.due():
                replay.write(stage.folder)
            yield
            if counters["best"] >= args.converged:
                break
    finally:
        bar.close()
        envs.close(terminate=True)


def update(args, vla, critics, optimizer, actor, mask, demos, replay, moves, generator, stage):
    """One gradient step of the critics and, if the actor `moves`, of actor and temperature. Returns numbers for the
    log."""
    how, half = args.sacfd, -(-args.sacfd.batch // 2)
    sources = (demos or replay, replay)
    drawn = [x.sample(half, how.n_step, args.gamma, how.priority, how.importance, generator) for x in sources]
    batch = [torch.cat(x) for x in zip(*(rows for _, rows in drawn))]
    noise = torch.randn(2, *batch[1].shape, generator=generator).to(mask.device)
    mask = mask.expand(2 * half, -1)
    loss, error = critic_loss(vla, critics, mask, batch, noise[0])
    numbers = {"critic_loss": loss.item()}
    if moves:
        policy, temperature, logp = actor_loss(
            vla, critics, mask, batch, noise[1], half if demos else 0, how.clone, how.entropy
        )
        loss = loss + policy + temperature
        numbers |= {"actor_loss": policy.item(), "log_prob": logp.item()}
    optimizer.zero_grad()  # to None: what has no gradient is left alone
    loss.backward()
    if not torch.isfinite(loss):
        raise Refusal(f"SACfD's loss is NaN: delete {stage.folder} and give a smaller --sacfd.lr")
    if moves:
        numbers["grad_norm"] = float(nn.utils.clip_grad_norm_(actor, 1.0))
    optimizer.step()
    critics.follow(how.tau)
    with torch.no_grad():
        vla.log_std.clamp_(-4, 0)
    for x, (i, _), e in zip(sources, drawn, error.split(half)):
        x.priority.view(-1)[i] = e + 1e-3
    return numbers
