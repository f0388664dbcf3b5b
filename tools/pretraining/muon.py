"""Muon in float32: momentum whose matrices are made orthogonal before each step.

torch.optim.Muon computes in bfloat16. On a CPU without units for it, that takes longer than the
forward and the backward pass.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Newton-Schulz iteration, as in torch.optim.Muon
ITERATIONS = 5
RMS = 0.2  # rms of an update in units of the learning rate, about as with AdamW


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Return the matrix (a, b) with all of its singular values near 1."""
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay, for matrices alone."""

    def __init__(self, groups: list[dict], momentum: float = 0.95, weight_decay: float = 0.02):
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * RMS * max(p.shape) ** 0.5)
