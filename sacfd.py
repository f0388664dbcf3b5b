"""
SACfD: soft actor-critic from demonstrations, in the frozen VLM's latent space (paper Sec. V-D, Eq.
3). It is stage 1's other algorithm, `stage_rl.py --algo sacfd`, for a robot, where PPO would need
too many episodes.

    demonstrations   20 successes of the zero-shot policy: read from D_rl/<task>; missing ones are recorded, exploring
    row              latents h (M, D) bf16, action, reward, terminated, truncated; the next row holds the next latents
    batch            50 % demonstrations, 50 % replay buffer
    critics          two; target: n-step return + gamma^n (the smaller of two target critics - alpha log pi)
    actor            ACTION_LIMIT * tanh(atanh(head) + std * noise): without noise it is the head's greedy action
    losses           critics: squared error; actor: alpha log pi - Q, and on demonstrations the distance to their action

Sources: SAC 1801.01290, its learned temperature 1812.05905; DDPGfD 1707.08817 (the "from
demonstrations" part: demonstrations in the buffer, n-step returns, priorities, several updates per
step); RLPD 2302.02948 (50/50 sampling; layer norm in critics); behaviour cloning next to RL
1709.10089. SERL runs SAC on 50/50 batches without priorities or cloning.

The paper specifies SACfD, batches of 50 % demonstrations, 20 demonstrations and one hour per task.
The rest is our choice:
1) One std for each action dimension, as in PPO, not one for each state.
2) The actor is frozen until `warmup` environment steps, those of the zero-shot attempts included.
3) The zero-shot attempts explore as the actor does: a greedy policy can get stuck, because it sees
   the same image and repeats the same null action (results/experiments.md). `real_robot.py collect`
   is greedy unless `--std` is set: an operator can take over.
4) An episode that a fault ended (info["fault"]) stays in the buffer but is never sampled. The
   operator's action (info["executed"]) is stored as the action.
"""

import contextlib
import math
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from torch import nn
from tqdm import tqdm

from common.devices import check_memory, pick_device
from common.episode_file import RL_SEED, episode_ids, executed_episodes
from common.errors import UserError
from common.recording import OnlineRecording, record_successes, step_noise
from common.replay import Batch, Replay, load_demonstrations
from common.rl_learner import Learner, seeded_generator
from common.runs import Stage
from common.vector_env import Policy, make_policy_envs
from domains import load_domain, robot_reason
from evaluate import evaluate_stage, own_task, skip_if_done
from model import VLA, TokenLearner, describe, set_trainable

# Bound of the tanh action, a little above the environment's clip, because atanh(1) is infinite.
ACTION_LIMIT = 1.1
ENV_STEPS = 30_000  # default budget
ROWS_PER_ITERATION = 100  # rows between two log lines
MAX_GRAD_NORM = 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Actor and critics


def tanh_gaussian(
    mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The actor: mean (B, A), log_std (A,), standard normal noise (B, A) -> (action (B, A), log-probability (B,)).

    SAC's tanh of a Gaussian (1801.01290, appendix C), around atanh(mean). Without noise the action
    is the mean, clipped to [-1, 1] as in VLA.act. The clip uses a straight-through gradient,
    because SFT means sometimes leave [-1, 1].
    """
    mean = mean + (mean.clamp(-1, 1) - mean).detach()
    u = torch.atanh(mean / ACTION_LIMIT) + log_std.exp() * noise  # (B, A)
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log d action / du.
    log_slope = math.log(ACTION_LIMIT) + 2 * (math.log(2) - u - F.softplus(-2 * u))
    return ACTION_LIMIT * u.tanh(), (log_prob - log_slope).sum(-1)


def exploring_policy(vla: VLA) -> Policy:
    """Return the policy that records as SACfD explores: the label is the executed action."""

    def act(h: torch.Tensor, mask: torch.Tensor, ids: list) -> tuple[torch.Tensor, torch.Tensor]:
        mean = vla.mean(h, mask)
        executed, _ = tanh_gaussian(mean, vla.log_std, step_noise(ids, mean))
        return executed, executed

    return act


class TwinQ(nn.Module):
    """Two critics Q(h, a) on one token learner: (B, M, D), (B, M), (B, A) -> (2, B).

    They have the head's shape; the action is concatenated to the pooled latents h' (B, D).
    """

    def __init__(self, dim: int, action_dim: int, hidden: int = 256):
        super().__init__()
        self.token_learner = TokenLearner(dim)
        self.mlps = nn.ModuleList(self.make_mlp(dim + action_dim, hidden) for _ in range(2))

    @staticmethod
    def make_mlp(width: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, h: torch.Tensor, mask: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.values(self.token_learner(h, mask), action)

    def values(self, h_pooled: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Return Q of pooled latents: (B, D), (B, A) -> (2, B)."""
        x = torch.cat([h_pooled, action], dim=1)  # (B, D + A)
        return torch.cat([mlp(x) for mlp in self.mlps], dim=1).T  # (2, B)


class SACCritics(nn.Module):
    """Twin critics, their target networks and log alpha."""

    def __init__(self, dim: int, action_dim: int, alpha: float):
        super().__init__()
        self.q = TwinQ(dim, action_dim)
        self.target = TwinQ(dim, action_dim)
        self.target.load_state_dict(self.q.state_dict())
        self.target.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))

    @torch.no_grad()
    def soft_update(self, tau: float) -> None:
        """Move the target critics a step of tau towards the critics."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.q.parameters()), tau)


def critic_loss(
    vla: VLA, critics: SACCritics, mask: torch.Tensor, batch: Batch, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (weighted squared error of both critics, absolute error (B,), the critics' pooled latents (B, D)).

    noise (B, A) is standard normal.
    """
    alpha = critics.log_alpha.exp().detach()
    with torch.no_grad():
        a, logp = tanh_gaussian(vla.mean(batch.h_next, mask), vla.log_std, noise)  # (B, A), (B,)
        q_next = critics.target(batch.h_next, mask, a.clamp(-1, 1)).amin(0)  # (B,)
        target = batch.ret + batch.discount * (q_next - alpha * logp)  # (B,)
    h_pooled = critics.q.token_learner(batch.h, mask)  # (B, D)
    error = critics.q.values(h_pooled, batch.action) - target  # (2, B)
    loss = (batch.weight * error.square()).mean(1).sum()
    return loss, error.detach().abs().mean(0), h_pooled.detach()


def actor_loss(
    vla: VLA,
    critics: SACCritics,
    mask: torch.Tensor,
    batch: Batch,
    h_pooled: torch.Tensor,
    noise: torch.Tensor,
    num_demos: int,
    how,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (the actor's loss, the temperature's, mean log-probability): Eq. 3 by SAC.

    The first `num_demos` rows of the batch are demonstrations. h_pooled (B, D) is critic_loss's.
    noise (B, A) is standard normal.
    """
    alpha = critics.log_alpha.exp().detach()
    mean = vla.mean(batch.h, mask)  # (B, A)
    a, logp = tanh_gaussian(mean, vla.log_std, noise)  # (B, A), (B,)
    critics.q.requires_grad_(False)
    q = critics.q.values(h_pooled, a.clamp(-1, 1)).amin(0)  # (B,)
    critics.q.requires_grad_(True)
    bc_error = ((mean - batch.action) / vla.action_std)[:num_demos]
    # Where the clip lets Q's gradient pass, nothing else would hold the mean.
    excess = mean - mean.clamp(-1, 1)
    bc_loss = bc_error.square().sum() / max(1, bc_error.numel())
    loss = (alpha * logp - q).mean() + how.bc_weight * bc_loss  # Eq. 3
    loss = loss + excess.square().mean()
    target_entropy = how.target_entropy * batch.action.shape[1]
    temperature_loss = -critics.log_alpha * (logp.detach() + target_entropy).mean()
    return loss, temperature_loss, logp.detach().mean()


# ----------------------------------------------------------------------------------------------------------------------
# Training


def sacfd_step(
    args, learner: Learner, buffers: tuple, mask: torch.Tensor, trains_actor: bool, generator
) -> dict:
    """Take one gradient step of the critics and, if `trains_actor`, of actor and temperature. Return numbers to log.

    buffers: (demonstrations or None, replay buffer).
    """
    how = args.sacfd
    vla = learner.vla
    critics = learner.critic
    demos, replay = buffers
    half = -(-how.batch // 2)
    sources = (demos or replay, replay)
    drawn = [source.sample(half, args.gamma, how, generator) for source in sources]
    parts = [vars(rows).values() for _, rows in drawn]
    batch = Batch(*(torch.cat(pair) for pair in zip(*parts)))
    noise = torch.randn(2, *batch.action.shape, generator=generator).to(mask.device)
    mask = mask.expand(2 * half, -1)
    loss, error, h_pooled = critic_loss(vla, critics, mask, batch, noise[0])
    numbers = {"critic_loss": loss.item()}
    if trains_actor:
        num_demos = half if demos else 0
        policy_loss, temperature_loss, logp = actor_loss(
            vla, critics, mask, batch, h_pooled, noise[1], num_demos, how
        )
        loss = loss + policy_loss + temperature_loss
        numbers |= {"actor_loss": policy_loss.item(), "log_prob": logp.item()}
    learner.optimizer.zero_grad()  # to None: weights without a gradient are left alone
    loss.backward()
    if not torch.isfinite(loss):
        raise UserError(
            f"SACfD's loss is NaN: delete {learner.stage.folder}, then lower the learning rate of SACfD"
        )
    if trains_actor:
        numbers["grad_norm"] = float(nn.utils.clip_grad_norm_(learner.actor_params, MAX_GRAD_NORM))
    learner.optimizer.step()
    critics.soft_update(how.tau)
    with torch.no_grad():
        vla.log_std.clamp_(-4, 0)
    for source, (i, _), e in zip(sources, drawn, error.split(half)):
        source.priority.view(-1)[i] = e + 1e-3
    return numbers


class Actor:
    """The environments of SACfD, and the rows that they add to the replay buffer."""

    def __init__(self, args, learner: Learner, domain, budget: int):
        self.vla = learner.vla
        self.learner = learner
        self.instruction = domain.INSTRUCTIONS[args.task]
        vla = self.vla
        counters = learner.counters
        device = vla.device
        size = vla.config["image_size"]
        N = args.envs
        d_rl = learner.stage.d_rl / args.task
        self.demos = load_demonstrations(vla, d_rl, self.encode)
        # (1, M, D), (1, M)
        h, self.mask = vla.encode(np.zeros((1, size, size, 3), np.uint8), [self.instruction])
        left = max(0, budget - counters["env_steps"])
        # At most every other row of an environment is a reset.
        rows = counters.get("rows", 0) + 2 * (left // N) + 5
        certain = rows * N if device.type == "cuda" else left  # a GPU's memory is taken at once
        what = f"the latents of {left:,} environment steps"
        check_memory(2 * certain * h[0].numel(), device, what, "use a smaller --env-steps")
        self.replay = Replay(rows, N, h.shape[1:], vla.config["action_dim"], device)
        self.replay.read(learner.stage.folder, counters.get("rows", 0))

        # Rows are laid out as in stage_rl.py's Rollout.
        make = partial(domain.make, args.task, size)
        self.envs = make_policy_envs([make] * N, vla, AutoresetMode.NEXT_STEP)
        self.done = torch.zeros(N, device=device)
        self.began = np.full(N, self.replay.t)  # first row of each running episode
        # A resumed run does not repeat its first episodes.
        seed = RL_SEED + 10_000 * args.seed + counters["iteration"]
        obs, _ = self.envs.reset(seed=[seed + 1000 * i for i in range(N)])
        self.replay.begin(self.encode(obs))

    @torch.no_grad()
    def encode(self, obs: np.ndarray) -> torch.Tensor:
        """Return the latents (n, M, D) bfloat16 of n images."""
        h, _ = self.vla.encode(obs, [self.instruction] * len(obs))
        if not torch.isfinite(h).all():
            raise UserError("a latent is NaN: the last saved state is kept; train the parent again")
        return h.to(torch.bfloat16)

    @torch.no_grad()
    def start_step(self, generator: torch.Generator) -> torch.Tensor:
        """Draw an action (N, A) for each environment and start its step."""
        replay = self.replay
        N, A = replay.action.shape[1:]
        noise = torch.randn(N, A, generator=generator).to(replay.h.device)
        h = replay.h[replay.t].float()  # (N, M, D)
        mean = self.vla.mean(h, self.mask.expand(N, -1))
        action = tanh_gaussian(mean, self.vla.log_std, noise)[0].clamp(-1, 1)
        if not torch.isfinite(action).all():
            raise UserError(
                "the policy's action is NaN: the last saved state is kept; use a smaller --sacfd.lr"
            )
        self.envs.step_async(action.cpu().numpy())
        return action

    def finish_step(self, action: torch.Tensor) -> tuple[int, bool]:
        """Store what the actions led to. Return (environment steps made, whether an episode ended)."""
        replay = self.replay
        obs, reward, terminated, truncated, info = self.envs.step_wait()
        valid = self.done == 0  # else the step only reset its environment
        if "executed" in info:
            action = torch.as_tensor(np.stack(info["executed"])).to(replay.action)
        success = torch.as_tensor(terminated).to(replay.reward)
        time_out = torch.as_tensor(truncated & ~terminated).to(replay.reward)
        replay.add(
            action,
            torch.as_tensor(reward).to(replay.reward),
            success,
            time_out,
            valid,
            self.encode(obs),
        )
        self.done = torch.maximum(success, time_out)
        ended = np.flatnonzero(terminated | truncated)
        faulted = info.get("_fault", np.zeros(len(terminated), bool))
        for i in ended:
            if faulted[i]:
                tqdm.write(f"episode discarded: {info['fault'][i]}")
                replay.priority[self.began[i] : replay.t, i] = 0
            else:
                self.learner.recent.append(int(terminated[i]))
            self.began[i] = replay.t + 1
        return int(valid.sum()), len(ended) > 0

    def save(self) -> None:
        """Save the rows and the learner's state together."""
        self.replay.write(self.learner.stage.folder)
        self.learner.counters["rows"] = self.replay.t
        self.learner.save()

    def close(self) -> None:
        """End the environments' processes."""
        self.envs.close()


def record_zero_shot(args, domain, learner: Learner) -> None:
    """Record the missing demonstrations: successes of the policy that stage 1 starts from."""
    counters = learner.counters
    folder = learner.stage.d_rl / args.task
    if "first_demo" not in counters:
        counters["first_demo"] = max(episode_ids(folder), default=-1) + 1
        counters["lacking"] = max(0, args.sacfd.num_demos - len(executed_episodes(folder)))
        learner.save()
    recording = OnlineRecording(
        domain, args.task, folder, args.envs, exploring_policy(learner.vla), executed=True
    )
    successes, attempts, env_steps = record_successes(
        learner.vla, recording, counters["first_demo"], counters["lacking"]
    )
    if attempts:
        print(
            f"demonstrations: {successes} zero-shot successes of {attempts} attempts, "
            f"{env_steps} environment steps, in {folder}"
        )
    counters["env_steps"] += env_steps
    counters["demonstrated"] = True
    learner.save()


def train(args, learner: Learner, actor: Actor, budget: int, save_episodes: bool) -> None:
    """Run SACfD until it has converged or its budget is spent. Resumes from the learner's counters.

    save_episodes: whether to save at the end of every episode, because an operator has to reset the
    scene for each.
    """
    how = args.sacfd
    stage = learner.stage
    counters = learner.counters
    buffers = (actor.demos, actor.replay)
    owed = 0.0  # gradient steps still due at the update-to-data ratio
    bar = tqdm(
        desc=f"SACfD {args.task}",
        total=budget,
        initial=counters["env_steps"],
        smoothing=0.1,
        unit="step",
    )
    while counters["env_steps"] < budget and counters["best"] < args.converged:
        began = time.time()
        steps_before = counters["env_steps"]
        stats = []
        update_seconds = 0.0
        generator = seeded_generator(args.seed, counters["iteration"])
        for _ in range(ROWS_PER_ITERATION):
            action = actor.start_step(generator)
            # While the environments step: the gradient steps owed for the steps before.
            update_began = time.time()
            # None: no row yet, or all faulted.
            while owed >= 1 and actor.replay.priority[: actor.replay.t].any():
                owed -= 1
                trains_actor = (
                    counters["env_steps"] >= how.warmup and len(stats) % how.actor_every == 0
                )
                stats.append(
                    sacfd_step(args, learner, buffers, actor.mask, trains_actor, generator)
                )
            update_seconds += time.time() - update_began
            steps, ended = actor.finish_step(action)
            counters["env_steps"] += steps
            # After a fault no robot waits for more.
            owed = min(owed + how.utd * steps, how.utd * args.envs + 1)
            success = learner.track_best()
            if ended and save_episodes:
                actor.save()
            if counters["env_steps"] >= budget:
                break
        counters["iteration"] += 1
        counters["rows"] = actor.replay.t
        seconds = time.time() - began
        counters["updates_share"] = round(update_seconds / seconds, 4)
        alpha = learner.critic.log_alpha.exp().item()
        names = {name for row in stats for name in row}
        means = {
            name: float(np.mean([row[name] for row in stats if name in row])) for name in names
        }
        stage.log(
            counters["env_steps"],
            success=success,
            std=learner.vla.log_std.exp().mean().item(),
            alpha=alpha,
            best=counters["best"],
            steps_per_second=(counters["env_steps"] - steps_before) / seconds,
            updates_share=counters["updates_share"],
            **means,
        )
        bar.update(counters["env_steps"] - bar.n)
        bar.set_postfix_str(
            f"success {success:.2f}, best {counters['best']:.2f}, alpha {alpha:.4f}"
        )
        if stage.should_save():
            actor.save()
    bar.close()


def main(args) -> None:
    """Stage 1 by SACfD. args: stage_rl.Args."""
    domain = load_domain(args.domain)
    if args.train_vlm:
        raise UserError(
            "--train-vlm needs --algo ppo: SACfD's buffer holds latents, which are valid only while theta is"
        )
    budget = ENV_STEPS if args.env_steps is None else args.env_steps
    # Not compared on resume, so an operator can rerun with a smaller budget to finish early.
    stage = Stage(args, unused=["env_steps"])
    device = pick_device(args.device)
    torch.set_num_threads(1)  # the environments share the cores
    torch.manual_seed(args.seed)
    if skip_if_done(stage, domain, args, device, args.envs):
        return

    # --- theta frozen, phi and new critics
    vla = VLA.load(args.parent, args.domain, device)
    set_trainable(vla.vlm.parameters(), False)
    vla.log_std.data.fill_(np.log(args.std))
    critics = SACCritics(
        vla.head.mlp[0].in_features, vla.config["action_dim"], args.sacfd.alpha
    ).to(device)
    learner = Learner(stage, vla, critics, args.sacfd.lr, args.sacfd.critic_lr)
    counters = learner.counters
    instruction = domain.INSTRUCTIONS[args.task]
    print(f"stage 1: Eq. 3 on {args.task} ({instruction!r}) | {describe(vla)}, theta frozen")

    # --- demonstrations, then RL until it has converged or its budget is spent
    if not counters["iteration"] and "demonstrated" not in counters:
        record_zero_shot(args, domain, learner)
    if not counters["finished"]:
        with contextlib.closing(Actor(args, learner, domain, budget)) as actor:
            try:
                train(args, learner, actor, budget, save_episodes=bool(robot_reason(domain)))
            except (KeyboardInterrupt, SystemExit, UserError):
                if learner.is_finite():
                    actor.save()  # on a robot, the rows since the last save are a person's work
                raise
        learner.finish_training()

    # --- the successes of the best head: D_rl
    successes = learner.record_d_rl(args, domain)
    learner.finish_stage(args, successes)
    evaluate_stage(stage.out, domain, args.episodes, device, args.envs, vla, own_task(args))
