"""Muon in float32 (kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal before each step.

torch.optim.Muon computes in bfloat16. On a CPU without units for it, that takes longer than the
forward and the backward pass.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Newton-Schulz iteration, as in torch.optim.Muon
ITERATIONS = 5
RMS = 0.2  # rms of an update in units of the learning rate, about as with AdamW


@torch.no_grad()  # a thread of `parallel` has not step's
def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Return wide matrices (n, a, b), a <= b, with all of their singular values near 1."""
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def is_hidden_matrix(name: str, p: nn.Parameter, outputs: tuple[str, ...]) -> bool:
    """Return whether a weight is a matrix between hidden layers, which Muon is for: no embedding, no output layer.

    outputs: what the names of output layers' weights begin with.
    """
    return p.ndim == 2 and "embed" not in name and not name.startswith(outputs)


def is_tall(p: torch.Tensor) -> bool:
    """Return whether a matrix has more rows than columns."""
    return p.shape[0] > p.shape[1]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay, for matrices alone.

    parallel: a map, such as a thread pool's, over groups of matrices of one shape.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | list[dict],
        lr: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
        parallel: Callable = map,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.parallel = parallel

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every matrix that has a gradient. Matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            lr = group["lr"]
            shapes = defaultdict(list)  # {(shorter, longer side): matrices}
            for p in group["params"]:
                if p.grad is not None:
                    shapes[min(p.shape), max(p.shape)].append(p)
            # Computed when `parallel` asks for them: a plain map holds one stack at a time.
            stacks = (self.updates(ps, group["momentum"]) for ps in shapes.values())
            results = self.parallel(orthogonal, stacks)
            for ((_, longer), ps), new in zip(shapes.items(), results):
                for p, x in zip(ps, new):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(x.T if is_tall(p) else x, alpha=-lr * RMS * longer**0.5)

    def updates(self, params: list[nn.Parameter], momentum: float) -> torch.Tensor:
        """Add the gradients to the momenta. Return the updates (n, a, b), a <= b, not yet orthogonal."""
        wide = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(state["momentum"], momentum)
            wide.append(update.T if is_tall(p) else update)
        return torch.stack(wide)
