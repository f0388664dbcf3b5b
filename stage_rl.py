"""
Stage 1: online RL of the action head, the VLM frozen (paper Sec. IV-B, Eq. 3).

    max over phi of  J(phi) = E_{pi_phi} [ sum_t gamma^t R(s_t, a_t) ],   R = 1 on success and 0 otherwise      (Eq. 3)

theta does not change, so an image's latents h = VLM_theta(o, l) do not either. Each image is
encoded once, on arrival, and all of PPO's epochs read the stored h (bfloat16). The next state's
latents are row t + 1 of the same tensor. When RL has converged, or its budget is spent, the best
head so far records the task's successes, D_rl.

Where the paper is silent or this differs from it:
1) The algorithm is PPO (1707.06347) with GAE (1506.02438); the paper only implies it. On its robot
   it is SACfD: `--algo sacfd`, in sacfd.py. pi_phi is a Gaussian around the head's action with one
   trained std for each dimension.
2) Success is terminal. A time-out is a truncation, bootstrapped from the critic.
3) The critic is new for each task, as in the paper, and is trained alone for some iterations before
   the actor is updated: a random critic's advantages would destroy what SFT has taught. For the
   same reason the actor is also frozen while none of the last 100 episodes has succeeded. As a
   fallback, the policy is then run with the instructions of other tasks, and the head learns from
   the successes (common/instruction_fallback.py; not with `--train-vlm`, because the paper's
   baselines are plain PPO).
4) The saved head is the one with the highest success rate over 100 training episodes, not the last
   one.
5) D_rl: 50 successes of that head, after training, from initial states that training does not use.
   They are recorded as D_e is: executed with noise, labelled with the head's mean
   (results/experiments.md compares that with the executed action).

python stage_rl.py --task TASK --parent runs/NAME-seed0/0-sft --out runs/NAME-seed0/1-rl-TASK
"""

from dataclasses import dataclass, field
from typing import Literal

from common.cli import parse
from common.cpus import usable_cpus


@dataclass
class SACfDArgs:
    num_demos: int = 20  # zero-shot successes in the demonstration buffer
    utd: float = 4.0  # gradient steps per environment step (update-to-data ratio)
    batch: int = 128  # rows per gradient step, half of them demonstrations
    actor_every: int = 2  # critic updates per actor update (TD3 1802.09477)
    n_step: int = 5  # environment steps whose rewards are summed
    tau: float = 0.005  # soft-update rate of the target critics (Polyak)
    lr: float = 2e-4  # learning rate of the head
    critic_lr: float = 3e-4  # learning rate of the critics and the temperature
    alpha: float = 0.002  # initial temperature
    target_entropy: float = -1.0  # target entropy per action dimension
    bc_weight: float = 0.05  # weight of behaviour cloning on the demonstrations
    per_alpha: float = 0.6  # exponent of prioritized replay; 0: uniform
    per_beta: float = 0.4  # exponent of its importance weights
    warmup: int = 500  # environment steps before the actor moves, zero-shot attempts included


@dataclass
class Args:
    task: str  # task of the domain, in the paper one of its RL_TASKS
    parent: str  # checkpoint to start from, e.g. runs/<name>/0-sft
    out: str  # checkpoint to write, e.g. runs/<name>/1-rl-<task>, next to D_rl/
    domain: str = ""  # name of a file in domains/ (default: the parent's)
    algo: Literal["", "ppo", "sacfd"] = ""  # RL algorithm (default: the domain's RL_ALGORITHM)
    env_steps: int | None = None  # budget (default: 150,000 for PPO, 30,000 for SACfD)
    converged: float = 0.97  # success rate over the last 100 episodes at which RL stops
    envs: int = 16  # parallel environments, a process each
    rollout: int = 128  # rollout length: steps per environment and update
    gamma: float = 0.99  # discount
    lam: float = 0.95  # lambda of GAE
    clip: float = 0.2  # clip of PPO's probability ratio
    epochs: int = 5  # passes over a rollout
    minibatch: int = 512  # environment steps per gradient step
    lr: float = 1e-4  # learning rate of the head
    critic_lr: float = 1e-3  # learning rate of the critic
    train_vlm: bool = False  # PPO through theta too: the paper's PPO-Replay and Fig. 4
    theta: Literal["whole", "lora"] = "whole"  # what --train-vlm trains if there is no LoRA yet
    target_kl: float = 0.03  # KL divergence at which the actor's update stops
    std: float = 0.25  # initial std of the exploration, in units of the action range
    warmup: int = 3  # iterations that train the critic alone
    successes: int = 50  # successful episodes to record in D_rl
    action_noise_std: float | None = None  # std of D_rl's action noise (default: the domain's)
    episodes: int = 25  # evaluation episodes per task after the stage; 0: none
    all_tasks: bool = False  # evaluate on all of the domain's tasks, not on this one alone
    seed: int = 0  # seed of the critic, exploration and minibatches
    device: str = ""  # cpu, cuda, ... (default: the GPU if there is one)
    threads: int = usable_cpus()  # CPU threads of updates, and of a large VLM
    sacfd: SACfDArgs = field(default_factory=SACfDArgs)  # options of --algo sacfd


if __name__ == "__main__":
    ARGS = parse(Args, __doc__, workers=True)  # before the imports below, which take seconds

import contextlib
import time
from functools import partial
from types import ModuleType

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

import sacfd
from common.devices import check_memory, cpu_threads, pick_device
from common.distributed import require_one_process
from common.episode_file import RL_SEED
from common.errors import UserError, run_cli
from common.instruction_fallback import instruction_fallback
from common.rates import check_task
from common.rl_learner import Learner, seeded_generator
from common.runs import Stage, checkpoint_config
from common.vector_env import make_policy_envs
from domains import load_domain
from evaluate import evaluate_stage, own_task, skip_if_done
from model import VLA, Head, VLAConfig, describe, log_prob, set_trainable

ENV_STEPS = 150_000  # default budget
MAX_GRAD_NORM = 0.5

# ----------------------------------------------------------------------------------------------------------------------
# Eq. 3 by PPO


def gae(
    reward: torch.Tensor,
    value: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """Return the advantage of each step (T, N): generalized advantage estimation (1506.02438, Eq. 16).

    reward, terminated, truncated (T, N): outcome of step t. value (T+1, N): the critic's;
    value[t+1] is that of the state that step t led to, also when that state is an episode's last. A
    success (terminated) has no future. A time-out (truncated) is bootstrapped: its future exists
    but was not observed. Neither lets the next episode leak in.
    """
    advantage = torch.zeros_like(reward)
    following = 0.0
    for t in reversed(range(len(reward))):
        done = torch.maximum(terminated[t], truncated[t])
        delta = reward[t] + gamma * (1 - terminated[t]) * value[t + 1] - value[t]
        following = delta + gamma * lam * (1 - done) * following
        advantage[t] = following
    return advantage


def ppo_loss(
    new_log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (policy loss, KL estimate, clipped share) of a minibatch of (B,) tensors: Eq. 7 of PPO 1707.06347."""
    log_ratio = new_log_prob - old_log_prob
    ratio = log_ratio.exp()
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    with torch.no_grad():
        # An estimate that is never negative (joschu.net/blog/kl-approx.html).
        kl = (ratio - 1 - log_ratio).mean()
        clipped = ((ratio - 1).abs() > clip).float().mean()
    return policy_loss, kl, clipped


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and updates


class Rollout:
    """PPO's rollout buffer, T steps in N environments, and the environments' processes.

    NEXT_STEP autoreset: an episode's last image has a row of its own, and the action chosen there
    is not executed but resets the environment. So row t + 1 always holds what step t led to, and no
    image is kept or encoded twice. One group of environments steps while the images of the other
    are encoded.
    """

    def __init__(self, args: Args, vla: VLA, domain: ModuleType, iteration: int):
        self.vla = vla
        self.instruction = domain.INSTRUCTIONS[args.task]
        size = vla.config["image_size"]
        T = args.rollout
        N = args.envs
        A = vla.config["action_dim"]
        device = vla.device
        self.groups = np.array_split(np.arange(N), min(2, N))
        make = partial(domain.make, args.task, size)
        self.env_groups = [
            make_policy_envs([make] * len(group), vla, AutoresetMode.NEXT_STEP)
            for group in self.groups
        ]
        # A resumed run does not repeat its first episodes.
        seed = RL_SEED + 10_000 * args.seed + iteration
        self.obs = []  # the newest images of each group
        for envs, group in zip(self.env_groups, self.groups):
            obs, _ = envs.reset(seed=[seed + 1000 * int(i) for i in group])
            self.obs.append(obs.copy())
        began = time.time()
        encoded = [self.encode(obs) for obs in self.obs]
        # A small VLM runs on one thread and leaves the cores to the environments. A large one uses
        # every thread, because the environments wait for it anyway.
        self.threads = args.threads if time.time() - began > 0.5 * len(self.groups) else 1
        M, D = encoded[0][0].shape[1:]
        what = f"a rollout's latents, (rollout + 1) x envs x tokens x width = {T + 1} x {N} x {M} x {D} in bfloat16"
        check_memory(2 * (T + 1) * N * M * D, device, what, "use a smaller --rollout or --envs")
        self.mask = encoded[0][1][:1]  # (1, M): one instruction
        self.h = torch.zeros(T + 1, N, M, D, dtype=torch.bfloat16, device=device)
        self.h[T] = torch.cat([h for h, _ in encoded])  # row 0 of the first rollout
        # --train-vlm alone keeps the images, because theta moves and with it the latents.
        self.images = np.zeros((T + 1, N, size, size, 3), np.uint8) if args.train_vlm else None
        self.action = torch.zeros(T, N, A, device=device)
        self.log_prob = torch.zeros(T, N, device=device)
        self.reward = torch.zeros(T, N, device=device)
        self.terminated = torch.zeros(T, N, device=device)
        self.truncated = torch.zeros(T, N, device=device)
        # False if the step only reset the environment.
        self.valid = torch.zeros(T, N, dtype=torch.bool, device=device)
        self.done = torch.zeros(N, device=device)  # whether the latest step ended its episode

    def close(self) -> None:
        """End the environments' processes."""
        for envs in self.env_groups:
            envs.close()

    @torch.no_grad()
    def encode(self, obs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents (n, M, D) bfloat16 of n images, and their mask (n, M)."""
        h, mask = self.vla.encode(obs, [self.instruction] * len(obs))
        if not torch.isfinite(h).all():
            raise UserError("the VLM produced NaN latents: retrain the parent checkpoint")
        return h.to(torch.bfloat16), mask

    def collect(self, generator: torch.Generator) -> list[int]:
        """Fill the rollout. Return the outcomes of the episodes that ended in it: 1 for a success, 0 for a time-out."""
        T = len(self.reward)
        outcomes = []
        self.valid.fill_(False)
        self.h[0] = self.h[T]
        if self.images is not None:  # theta has moved since
            self.images[0] = np.concatenate(self.obs)
            self.h[0] = self.encode(self.images[0])[0]
        for k in range(len(self.groups)):
            self.start_step(0, k, generator)
        for t in range(T):
            for k in range(len(self.groups)):
                outcomes += self.finish_step(t, k)
                if t + 1 < T:
                    self.start_step(t + 1, k, generator)
        return outcomes

    @torch.no_grad()
    def start_step(self, t: int, k: int, generator: torch.Generator) -> None:
        """Draw group k's actions of row t, and start the environments' step."""
        group = self.groups[k]
        action, log_prob_ = self.vla.explore(self.h[t, group].float(), self.mask, generator)
        if not torch.isfinite(action).all():
            raise UserError(
                "the policy's action is NaN: the last saved state is kept; use a smaller --lr"
            )
        self.action[t, group] = action
        self.log_prob[t, group] = log_prob_
        self.env_groups[k].step_async(action.clamp(-1, 1).cpu().numpy())

    def finish_step(self, t: int, k: int) -> list[int]:
        """Store what group k's actions of row t led to. Return the outcomes of the episodes that ended."""
        group = self.groups[k]
        obs, reward, terminated, truncated, _ = self.env_groups[k].step_wait()
        self.valid[t, group] = self.done[group] == 0
        self.reward[t, group] = torch.as_tensor(reward).to(self.reward)
        self.terminated[t, group] = torch.as_tensor(terminated).to(self.reward)
        self.truncated[t, group] = torch.as_tensor(truncated & ~terminated).to(self.reward)
        self.done[group] = torch.maximum(self.terminated[t, group], self.truncated[t, group])
        self.h[t + 1, group] = self.encode(obs)[0]
        if self.images is not None:
            self.images[t + 1, group] = obs
            self.obs[k] = obs.copy()
        return [int(success) for success, ended in zip(terminated, terminated | truncated) if ended]

    def latents(self, rows: torch.Tensor, reencode: bool) -> torch.Tensor:
        """Return the latents (B, M, D) float32 of rows of the flattened rollout.

        reencode: compute them with the current theta instead of reading the stored ones.
        """
        if reencode:
            size = self.images.shape[2]
            images = self.images[:-1].reshape(-1, size, size, 3)[rows.cpu().numpy()]
            return self.vla.encode(images, [self.instruction] * len(rows))[0].float()
        return self.h[:-1].flatten(0, 1)[rows].float()


def update(
    args: Args, learner: Learner, rollout: Rollout, actor_frozen: bool, generator: torch.Generator
) -> dict:
    """Run PPO's epochs over a rollout: train the critic and, unless the actor is frozen, phi (PPO-Replay: theta too).

    Returns the numbers for the log. The actor's update stops once the policy has moved by
    target_kl.
    """
    vla = learner.vla
    critic = learner.critic
    mask = rollout.mask
    T, N = rollout.reward.shape
    with torch.no_grad():
        rows = rollout.h.flatten(0, 1).split(args.minibatch)
        value = torch.cat([critic(h.float(), mask)[:, 0] for h in rows]).view(T + 1, N)  # (T+1, N)
    outcome = (rollout.terminated, rollout.truncated)
    advantage = gae(rollout.reward, value, *outcome, args.gamma, args.lam)  # (T, N)
    target = advantage + value[:-1]  # (T, N)

    # Flattened to rows of T * N; those that only reset an environment are left out.
    valid = rollout.valid.flatten().nonzero()[:, 0]
    action = rollout.action.flatten(0, 1)
    old_log_prob = rollout.log_prob.flatten()
    flat_advantage = advantage.flatten()
    flat_target = target.flatten()
    std = flat_advantage[valid].std() + 1e-8
    mean = flat_advantage[valid].mean()

    stats = []
    stopped = False
    for _ in range(args.epochs):
        order = torch.randperm(len(valid), generator=generator).to(valid.device)
        for b in valid[order].split(args.minibatch):
            trains_actor = not (actor_frozen or stopped)
            h = rollout.latents(b, reencode=args.train_vlm and trains_actor)  # (B, M, D)
            new_log_prob = log_prob(action[b], vla.mean(h, mask), vla.log_std)
            policy_loss, kl, clipped = ppo_loss(
                new_log_prob, old_log_prob[b], (flat_advantage[b] - mean) / std, args.clip
            )
            value_loss = (critic(h.detach(), mask)[:, 0] - flat_target[b]).square().mean()
            stopped |= kl.item() > args.target_kl
            loss = value_loss if actor_frozen or stopped else value_loss + policy_loss  # Eq. 3
            learner.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(learner.actor_params, MAX_GRAD_NORM)
            torch.nn.utils.clip_grad_norm_(learner.critic_params, MAX_GRAD_NORM)
            if not torch.isfinite(loss):
                raise UserError(
                    f"PPO's loss is NaN: delete {learner.stage.folder}, then use a smaller --lr"
                )
            learner.optimizer.step()
            stats.append(
                (policy_loss.item(), value_loss.item(), kl.item(), clipped.item(), float(norm))
            )
    names = ("policy_loss", "value_loss", "kl", "clip_fraction", "grad_norm")
    unexplained = (target - value[:-1])[rollout.valid].var() / target[rollout.valid].var().clamp(
        min=1e-8
    )
    return dict(zip(names, np.mean(stats, axis=0))) | {"explained_variance": 1 - unexplained.item()}


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def main(args: Args) -> None:
    require_one_process("stage_rl.py")
    args.domain = args.domain or checkpoint_config(args.parent)["domain"]
    domain = load_domain(args.domain)
    check_task(args.task, domain)
    if args.std <= 0:
        raise UserError(f"--std must be > 0, because RL explores (got {args.std})")
    if args.theta == "lora" and not args.train_vlm:
        raise UserError("--theta lora needs --train-vlm, which trains LoRA's weights")
    if (args.algo or domain.RL_ALGORITHM) == "sacfd":
        return sacfd.main(args)
    if args.rollout < 4:
        raise UserError(
            f"--rollout must be at least 4, for the std of its advantages (got {args.rollout})"
        )
    budget = ENV_STEPS if args.env_steps is None else args.env_steps
    stage = Stage(args, unused=["sacfd"])
    device = pick_device(args.device)
    torch.set_num_threads(1)  # the environments share the cores; updates use args.threads
    torch.manual_seed(args.seed)
    if skip_if_done(stage, domain, args, device, args.envs):
        return

    # --- theta frozen, phi and a new critic
    vla = VLA.load(args.parent, args.domain, device)
    if args.theta == "lora" and not vla.has_lora:
        vla.add_lora(VLAConfig.lora_rank)
    set_trainable(vla.vlm.parameters(), False)
    set_trainable(vla.theta(), args.train_vlm)
    vla.log_std.data.fill_(np.log(args.std))
    critic = Head(vla.head.mlp[0].in_features, 1).to(device)
    learner = Learner(stage, vla, critic, args.lr, args.critic_lr)
    counters = learner.counters
    recent = learner.recent
    instruction = domain.INSTRUCTIONS[args.task]
    frozen = "theta trained too" if args.train_vlm else "theta frozen"
    print(f"stage 1: Eq. 3 on {args.task} ({instruction!r}) | {describe(vla)}, {frozen}")

    # --- RL until it has converged or its budget is spent
    if not counters["finished"]:
        bar = tqdm(
            desc=f"RL {args.task}",
            total=budget,
            initial=counters["env_steps"],
            smoothing=0.1,
            unit="step",
        )
        with bar, contextlib.closing(Rollout(args, vla, domain, counters["iteration"])) as rollout:
            total_seconds = 0.0
            update_seconds = 0.0
            while counters["env_steps"] < budget and counters["best"] < args.converged:
                began = time.time()
                generator = seeded_generator(args.seed, counters["iteration"])
                with cpu_threads(rollout.threads):
                    recent.extend(rollout.collect(generator))
                steps = int(rollout.valid.sum())
                counters["env_steps"] += steps
                success = learner.track_best()

                collected = time.time()
                # A random critic, or one that has seen no success, would destroy what SFT has
                # taught the actor.
                actor_frozen = counters["iteration"] < args.warmup or not any(recent)
                with cpu_threads(args.threads):
                    numbers = update(args, learner, rollout, actor_frozen, generator)  # Eq. 3
                counters["iteration"] += 1

                total_seconds += time.time() - began
                update_seconds += time.time() - collected
                counters["updates_share"] = round(update_seconds / total_seconds, 4)
                stage.log(
                    counters["env_steps"],
                    success=success,
                    std=vla.log_std.exp().mean().item(),
                    best=counters["best"],
                    steps_per_second=steps / (time.time() - began),
                    updates_share=counters["updates_share"],
                    **numbers,
                )
                bar.update(counters["env_steps"] - bar.n)
                bar.set_postfix_str(
                    f"success {success:.2f}, best {counters['best']:.2f}, kl {numbers['kl']:.3f}"
                )
                if learner.never_succeeds() and not args.train_vlm:  # the baselines are plain PPO
                    with cpu_threads(rollout.threads):
                        instruction_fallback(args, domain, learner)
                    recent.clear()
                    if not counters["best"]:  # the head from before never succeeded
                        counters["best"] = -1.0
                if stage.should_save():
                    learner.save()
        learner.finish_training()

    # --- the successes of the best head: D_rl
    successes = learner.record_d_rl(args, domain)
    learner.finish_stage(args, successes)
    evaluate_stage(stage.out, domain, args.episodes, device, args.envs, vla, own_task(args))


if __name__ == "__main__":
    run_cli(main, ARGS)
