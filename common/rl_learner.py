"""What stage 1 trains and resumes from, whichever algorithm it uses: weights, moments, the best policy so far."""

from collections import deque
from types import ModuleType

import numpy as np
import torch

from common.episode_file import episode_ids
from common.recording import OnlineRecording, noisy_policy, record_successes
from common.runs import Stage, load_optimizer, optimizer_tensors
from common.vector_env import Policy

SUCCESS_WINDOW = 100  # training episodes over which success is measured
RENAMED_STATE = {"critic.slow.": "critic.target."}  # names in older states, and today's


def seeded_generator(*numbers: int) -> torch.Generator:
    """Return a generator whose draws depend on these numbers alone, such as (seed, iteration)."""
    return torch.Generator().manual_seed(hash(numbers) & 0x7FFFFFFF)


class Learner:
    """The trainable weights of a VLA (phi and the std, for PPO-Replay theta too), a critic, and their optimizer.

    counters: plain values that are saved with the weights. recent: outcomes of the last training
    episodes, 1 for a success. best: the trainable weights with the highest success rate over a full
    `recent`.
    """

    def __init__(self, stage: Stage, vla, critic: torch.nn.Module, lr: float, critic_lr: float):
        self.stage = stage
        self.vla = vla
        self.critic = critic
        self.trainable = {name: p for name, p in vla.named_parameters() if p.requires_grad}
        self.actor_params = list(self.trainable.values())
        self.critic_params = [p for p in critic.parameters() if p.requires_grad]
        groups = [
            {"params": self.actor_params, "lr": lr},
            {"params": self.critic_params, "lr": critic_lr},
        ]
        self.optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
        self.best = self.copy_weights()
        self.counters = {
            "iteration": 0,
            "env_steps": 0,
            "finished": False,
            "best": -1.0,
            "recent": [],
        }
        self.resume()
        self.recent = deque(self.counters["recent"], maxlen=SUCCESS_WINDOW)

    def copy_weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trainable weights."""
        return {name: p.detach().clone() for name, p in self.trainable.items()}

    # --- state

    def resume(self) -> None:
        """Restore the stage's last saved state, if there is one."""
        tensors, counters = self.stage.load()
        if not tensors:
            return
        for old, new in RENAMED_STATE.items():
            for name in [n for n in tensors if old in n]:
                tensors[name.replace(old, new)] = tensors.pop(name)
        self.counters = counters
        self.vla.num_forwards.fill_(counters.get("forwards", 0))
        for name, p in self.trainable.items():
            p.data.copy_(tensors[f"vla.{name}"])
            self.best[name].copy_(tensors[f"best.{name}"])
        prefix = "critic."
        self.critic.load_state_dict(
            {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        )
        load_optimizer(self.optimizer, tensors)

    def save(self) -> None:
        """Save the state to resume from."""
        state = {f"vla.{name}": p.data for name, p in self.trainable.items()}
        state |= {f"best.{name}": x for name, x in self.best.items()}
        state |= {f"critic.{name}": x for name, x in self.critic.state_dict().items()}
        state |= optimizer_tensors(self.optimizer)
        now = {"recent": list(self.recent), "forwards": int(self.vla.num_forwards)}
        self.stage.save(state, {**self.counters, **now})

    def is_finite(self) -> bool:
        """Return whether the trainable weights are fit to be saved."""
        return all(bool(torch.isfinite(p).all()) for p in self.actor_params + self.critic_params)

    # --- the best policy

    def track_best(self) -> float:
        """Return the success rate over `recent`. Keep the weights if no full `recent` had a higher rate."""
        success = float(np.mean(self.recent)) if self.recent else 0.0
        full = len(self.recent) == self.recent.maxlen
        if full and success >= self.counters["best"]:  # the later of equals
            self.counters["best"] = success
            self.best = self.copy_weights()
        return success

    def never_succeeds(self) -> bool:
        """Return whether none of the last 100 training episodes succeeded."""
        return len(self.recent) == self.recent.maxlen and not any(self.recent)

    def finish_training(self) -> None:
        """Set the VLA to the best weights, and save. If `recent` was never full, the last ones stay."""
        if self.counters["best"] >= 0:
            for name, p in self.trainable.items():
                p.data.copy_(self.best[name])
        self.counters["finished"] = True
        self.save()

    # --- D_rl and the checkpoint

    def recording_policy(self, args, domain: ModuleType) -> Policy:
        """Return the policy with the action noise that episodes are recorded with."""
        std = domain.ACTION_NOISE_STD if args.action_noise_std is None else args.action_noise_std
        return noisy_policy(self.vla, std)

    def record_d_rl(self, args, domain: ModuleType) -> int:
        """Record the task's successes for D_rl and return their number. A later round adds to an earlier one's."""
        folder = self.stage.d_rl / args.task
        if "first" not in self.counters:
            self.counters["first"] = max(episode_ids(folder), default=-1) + 1
            self.save()
        act = self.recording_policy(args, domain)
        recording = OnlineRecording(domain, args.task, folder, args.envs, act, executed=False)
        successes, attempts, _ = record_successes(
            self.vla, recording, self.counters["first"], args.successes
        )
        print(f"D_rl: {successes} successes of {attempts} attempts in {folder}")
        return successes

    def finish_stage(self, args, successes: int) -> None:
        """Write the checkpoint and the stage's summary."""
        self.vla.save(self.stage.folder, parent=args.parent, args=self.stage.identity_args)
        self.stage.finish(
            env_steps=self.counters["env_steps"],
            best=self.counters["best"],
            successes=successes,
            task=args.task,
            updates_share=self.counters.get("updates_share"),
            vlm_forwards=int(self.vla.num_forwards),
        )
