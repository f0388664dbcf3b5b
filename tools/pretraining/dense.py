"""Targets for each patch of an image: the labels that the vision tower learns from, and their losses.

A linear layer reads them from each patch's output: for each of its 16 cells of 2 x 2 pixels the noun,
the colour and the depth; then the way to the nearest named part in the same view, its noun and its
colour; and the way to the tip of the fingers.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tools.pretraining.scenes import CELLS, COLOUR, NOUN, SIZE, VIEWS
from tools.pretraining.things import BACKGROUND, COLOUR_WORDS, NOUNS

C = len(COLOUR_WORDS)
N = len(NOUNS) + 1  # the last one is the void behind everything
VOID = len(NOUNS)
BACKGROUND_IDS = [NOUNS.index(noun) for noun in BACKGROUND]
HIDDEN = -100  # a class that cross-entropy ignores
BACKGROUND_WEIGHT = 0.25
PIXELS = 16.0  # px that count as 1 in the ways' errors


@dataclass
class Targets:
    """Labels of B images of P patches, with k cells each."""

    noun: torch.Tensor  # (B, P, k)
    colour: torch.Tensor  # (B, P, k)
    depth: torch.Tensor  # (B, P, k)
    near_way: torch.Tensor  # (B, P, 2) rows and columns in PIXELS, NaN where there is no part
    near_noun: torch.Tensor  # (B, P)
    near_colour: torch.Tensor  # (B, P)
    tip_way: torch.Tensor  # (B, P, 2)

    def choose(self, patches: torch.Tensor) -> "Targets":
        """Return the targets of some patches."""
        return Targets(*(getattr(self, name)[:, patches] for name in self.__annotations__))


def part_views(batch: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the parts are in the two views: rows and columns (B, 2, PARTS, 2), visible cells, named or not."""
    tables = batch["tables"].astype(np.float32)
    views = np.stack([tables[..., VIEWS : VIEWS + 4], tables[..., VIEWS + 4 : VIEWS + 8]], 1)
    named = ~np.isin(tables[..., NOUN], BACKGROUND_IDS) & ~np.isnan(tables[..., NOUN])
    return views[..., :2], views[..., 3], named


def make_targets(batch: dict, patch: int) -> Targets:
    """Return the targets of a batch of scenes for patches of `patch` pixels."""
    B = len(batch["images"])
    side = SIZE // patch
    k = CELLS // side
    tables = batch["tables"].astype(np.float32)
    rows = np.arange(B)[:, None, None]
    parts = batch["parts"]
    void = parts == 255
    parts = np.where(void, 0, parts)
    noun = np.where(void, VOID, tables[rows, parts, NOUN])
    colour = tables[rows, parts, COLOUR]
    colour = np.where(void | (colour < 0), HIDDEN, colour)
    depth = batch["depth"] / 85 - 1.5

    def in_patches(x: np.ndarray) -> np.ndarray:
        x = x.reshape(B, side, k, side, k).swapaxes(2, 3)
        return x.reshape(B, side * side, k * k)

    # The nearest visible named part of the same view.
    where, cells, named = part_views(batch)
    where = np.where((named[:, None] & (cells > 0))[..., None], where, np.nan)
    middle = (np.arange(side) + 0.5) * patch
    middles = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)  # (P, 2)
    two = batch["gripper"][:, 5] > 1
    view = np.where(two[:, None], middles[:, 0] >= SIZE / 2, 0).astype(int)  # (B, P)
    ways = where[np.arange(B)[:, None], view] - middles[None, :, None]  # (B, P, PARTS, 2)
    distance = np.where(np.isnan(ways[..., 0]), np.inf, np.hypot(ways[..., 0], ways[..., 1]))
    nearest = distance.argmin(-1)  # (B, P)
    some = np.isfinite(distance.min(-1))
    near_way = np.take_along_axis(ways, nearest[..., None, None], 2)[:, :, 0]
    near = tables[np.arange(B)[:, None], nearest]
    near_noun = np.where(some, near[..., NOUN], HIDDEN)
    near_colour = np.where(some & (near[..., COLOUR] >= 0), near[..., COLOUR], HIDDEN)
    tip = batch["gripper"][:, :4].astype(np.float32).reshape(B, 2, 2)
    tip_way = tip[np.arange(B)[:, None], view] - middles
    long = [in_patches(noun), in_patches(colour)]
    return Targets(
        noun=torch.from_numpy(long[0]).long(),
        colour=torch.from_numpy(long[1]).long(),
        depth=torch.from_numpy(in_patches(depth)).float(),
        near_way=torch.from_numpy(near_way / PIXELS).float(),
        near_noun=torch.from_numpy(near_noun).long(),
        near_colour=torch.from_numpy(near_colour).long(),
        tip_way=torch.from_numpy(tip_way / PIXELS).float(),
    )


class DenseHead(nn.Module):
    """Reads the targets of a patch from its output: (..., dim) -> a dictionary of predictions."""

    def __init__(self, dim: int, cells: int):
        super().__init__()
        self.sizes = {
            "noun": cells * N,
            "colour": cells * C,
            "depth": cells,
            "near_way": 2,
            "near_noun": N,
            "near_colour": C,
            "tip_way": 2,
        }
        self.cells = cells
        self.linear = nn.Linear(dim, sum(self.sizes.values()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = self.linear(x).split(list(self.sizes.values()), -1)
        out = dict(zip(self.sizes, parts))
        out["noun"] = out["noun"].unflatten(-1, (self.cells, N))
        out["colour"] = out["colour"].unflatten(-1, (self.cells, C))
        return out


def way_loss(way: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean error of ways (..., 2) whose targets are known."""
    known = ~target.isnan().any(-1)
    return F.smooth_l1_loss(way[known], target[known], beta=0.25) if known.any() else way.sum() * 0


def dense_loss(out: dict[str, torch.Tensor], t: Targets) -> torch.Tensor:
    """Return the weighted sum of the targets' losses: a scalar."""
    weight = torch.full((N,), 1.0)
    weight[[*BACKGROUND_IDS, VOID]] = BACKGROUND_WEIGHT
    noun = F.cross_entropy(out["noun"].flatten(0, -2), t.noun.flatten(), weight)
    colour = F.cross_entropy(
        out["colour"].flatten(0, -2), t.colour.flatten(), ignore_index=HIDDEN, reduction="none"
    )
    importance = weight[t.noun.flatten()]
    colour = (colour * importance).sum() / importance.sum()
    depth = F.smooth_l1_loss(out["depth"], t.depth, beta=0.1)
    near = way_loss(out["near_way"], t.near_way) + way_loss(out["tip_way"], t.tip_way)
    near_noun = F.cross_entropy(
        out["near_noun"].flatten(0, -2), t.near_noun.flatten(), ignore_index=HIDDEN
    )
    near_colour = F.cross_entropy(
        out["near_colour"].flatten(0, -2), t.near_colour.flatten(), ignore_index=HIDDEN
    )
    return noun + colour + 2 * depth + 2 * near + 0.3 * (near_noun + near_colour)


def dense_scores(out: dict[str, torch.Tensor], t: Targets) -> dict[str, float]:
    """Return how much is right: shares of the named parts' cells, and rms errors in px."""
    named = torch.ones(N, dtype=torch.bool)
    named[[*BACKGROUND_IDS, VOID]] = False
    cells = named[t.noun]
    coloured = cells & (t.colour >= 0)
    near = t.near_way.norm(dim=-1) < 6 / PIXELS
    tip = t.tip_way.norm(dim=-1) < 32 / PIXELS

    def px(way, target, known) -> float:
        return PIXELS * (way[known] - target[known]).square().sum(-1).mean().sqrt().item()

    return {
        "noun": (out["noun"].argmax(-1) == t.noun)[cells].float().mean().item(),
        "colour": (out["colour"].argmax(-1) == t.colour)[coloured].float().mean().item(),
        "depth": (out["depth"] - t.depth).abs().mean().item(),
        "near_px": px(out["near_way"], t.near_way, near),
        "tip_px": px(out["tip_way"], t.tip_way, tip),
        "near_noun": (out["near_noun"].argmax(-1) == t.near_noun)[near].float().mean().item(),
    }
