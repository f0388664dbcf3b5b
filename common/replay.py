"""SACfD's replay buffer: rows of latents, drawn by priority, with n-step returns."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.episode_file import executed_episodes
from common.errors import UserError
from common.files import atomic_write, read_tensors


@dataclass
class Batch:
    """Rows as `Replay.sample` draws them."""

    h: torch.Tensor  # (B, M, D) float32
    action: torch.Tensor  # (B, A)
    ret: torch.Tensor  # (B,) n-step return
    discount: torch.Tensor  # (B,) of the value of h_next: gamma^n, or 0 after a success
    h_next: torch.Tensor  # (B, M, D) float32
    weight: torch.Tensor  # (B,) importance weights


class Replay:
    """Rows of N environments, in the order in which they were seen.

    h[t+1] is what step t led to, also at an episode's end. A row whose step only reset its
    environment has priority 0 and is never drawn. Where a stopped run went on, a row is marked as
    success and time-out at once, as no other row is. All rows are kept. Memory is taken as rows are
    written: 2 M D bytes each.
    """

    NAMES = ("h", "action", "reward", "term", "trunc")  # as in the buffer's files

    def __init__(
        self, rows: int, n: int, latents: tuple[int, int], action_dim: int, device: torch.device
    ):
        M, D = latents
        self.h = torch.empty(rows + 1, n, M, D, dtype=torch.bfloat16, device=device)
        self.action = torch.zeros(rows, n, action_dim, device=device)
        self.reward = torch.zeros(rows, n, device=device)
        self.term = torch.zeros(rows, n, device=device)
        self.trunc = torch.zeros(rows, n, device=device)
        self.priority = torch.zeros(rows, n, device=device)
        self.t = 0  # rows so far
        self.written = 0  # rows in files

    def add(self, action, reward, terminated, truncated, valid, h_next) -> None:
        """Add step t of every environment and the latents it led to. The caller sets the first row's latents, h[0]."""
        t = self.t
        if t == len(self.reward):
            raise UserError("the replay buffer is full: use a larger --env-steps")
        self.action[t] = action
        self.reward[t] = reward
        self.term[t] = terminated
        self.trunc[t] = truncated
        self.h[t + 1] = h_next
        self.priority[t] = valid * max(1.0, float(self.priority[:t].max())) if t else valid.float()
        self.t = t + 1

    def begin(self, h: torch.Tensor) -> None:
        """Set the latents (N, M, D) of the environments' first images, after `read` or in an empty buffer."""
        if not self.t:
            self.h[0] = h
            return
        # An empty row separates the rows read from the new ones.
        N = self.reward.shape[1]
        nothing = torch.zeros(N, device=self.h.device)
        end = torch.ones_like(nothing)
        self.add(torch.zeros_like(self.action[0]), nothing, end, end, nothing, h)

    def sample(
        self, k: int, gamma: float, how, generator: torch.Generator
    ) -> tuple[torch.Tensor, Batch]:
        """Draw k rows by priority (PER 1511.05952). Return (their index, the rows).

        how: SACfDArgs, of which n_step, per_alpha and per_beta. A success ends the future, a
        time-out only the sum of rewards.
        """
        # A GPU's cumulative sums of float32 may fall.
        p = self.priority[: self.t].flatten().double()
        p = torch.where(p > 0, p**how.per_alpha, 0)  # 0 ** 0 is 1
        total = p.cumsum(0)
        # In (0, total]: never a row of priority 0.
        draw = (1 - torch.rand(k, generator=generator)).to(p) * total[-1]
        i = torch.searchsorted(total, draw).clamp(max=len(p) - 1)
        weight = ((p > 0).sum() * p[i] / total[-1]).float() ** -how.per_beta
        n_envs = self.reward.shape[1]
        t = i // n_envs
        n = i % n_envs
        steps = torch.arange(how.n_step, device=t.device)
        rows = (t[:, None] + steps).clamp(max=self.t - 1)  # (k, n_step)
        cells = (rows, n[:, None])
        ends = torch.maximum(self.term[cells], self.trunc[cells]).bool() | (rows == self.t - 1)
        counted = ends.cumsum(1) - ends.long() == 0  # up to the first end, which counts too
        ret = (counted * gamma**steps * self.reward[cells]).sum(1)
        length = counted.sum(1)
        last = t + length - 1
        discount = gamma**length * (1 - self.term[last, n])
        h = self.h[t, n].float()
        h_next = self.h[last + 1, n].float()
        return i, Batch(h, self.action[t, n], ret, discount, h_next, weight / weight.max())

    def write(self, folder: Path) -> None:
        """Write the rows since the last time into a file of their own, and all priorities into another."""
        if self.t == self.written:
            return
        with atomic_write(folder / "priority.safetensors") as tmp:
            save_file({"priority": self.priority[: self.t].cpu().clone()}, tmp)
        new = slice(self.written, self.t)
        rows = {name: getattr(self, name)[new].cpu().clone() for name in self.NAMES}
        rows["h_after"] = self.h[self.t].cpu().clone()
        with atomic_write(folder / f"replay-{self.written:08d}.safetensors") as tmp:
            save_file(rows, tmp)
        self.written = self.t

    def read(self, folder: Path, rows: int) -> None:
        """Read the first `rows` rows from the folder. Files of later rows, whose state was not saved, are removed."""
        for path in sorted(folder.glob("replay-*.safetensors")):
            begin = int(path.stem.split("-")[1])
            if begin >= rows:
                path.unlink()
                continue
            part, _ = read_tensors(path)
            end = begin + len(part["reward"])
            for name in self.NAMES:
                getattr(self, name)[begin:end] = part[name]
            self.h[end] = part["h_after"]
            self.t = end
            self.written = end
        if self.t:
            tensors, _ = read_tensors(folder / "priority.safetensors")
            self.priority[: self.t] = tensors["priority"][: self.t]
            # The episodes that ran when the run stopped, now or before, end there unseen, as with a
            # time-out.
            separators = (self.term * self.trunc)[1 : self.t].all(1).nonzero().flatten() + 1
            last = torch.cat([separators - 1, separators.new_tensor([self.t - 1])])
            self.trunc[last] = torch.maximum(self.trunc[last], 1 - self.term[last])


def load_demonstrations(vla, folder: Path, encode) -> Replay | None:
    """Return a Replay of the executed episodes in `folder`, one after the other, or None if there are none."""
    demos = None
    episodes = executed_episodes(folder)
    total = sum(len(episode.get_tensor("reward")) for episode in episodes)
    for episode in episodes:
        reward = torch.from_numpy(episode.get_tensor("reward"))
        image = episode.get_tensor("image")
        h = torch.cat([encode(image[t : t + 64]) for t in range(0, len(image), 64)])
        if demos is None:
            demos = Replay(total, 1, h.shape[1:], vla.config["action_dim"], h.device)
        action = torch.from_numpy(episode.get_tensor("action")).to(h.device)
        for t in range(len(h)):
            demos.h[demos.t] = h[t]
            success = reward[t] > 0  # what follows in the buffer, another episode, is then not used
            demos.add(action[t], reward[t], success, 0, torch.ones(1), h[min(t + 1, len(h) - 1)])
    return demos
