"""Image augmentation of the SFT stages: stretched, recoloured and partly hidden images."""

import numpy as np
import torch
import torch.nn.functional as F


def draw_augmentation(
    n: int, num_views: int, rng: np.random.Generator, rank: int = 0, world: int = 1
) -> list[torch.Tensor]:
    """Draw the random numbers of `augment` for n images of `num_views` views, and return this rank's share."""
    zoom = rng.normal(0, 0.13, (n, num_views, 2))  # logarithm
    shift = rng.uniform(-0.1, 0.1, (n, num_views, 2))  # in half views
    # Half of the images get their channels swapped, each with its own brightness.
    order = rng.permuted(np.tile([0, 1, 2], (n, 1)), axis=1)
    brightness = rng.uniform(0.6, 1.4, (n, 3))
    colour = np.eye(3)[order] * brightness[:, None]  # (n, 3, 3)
    colour[rng.random(n) < 0.5] = np.eye(3)
    # Each of three patches is there in half of the images.
    size = rng.uniform(0.05, 0.2, (n, 3, 2)) * (rng.random((n, 3, 1)) < 0.5)
    corner = rng.random((n, 3, 2))
    patch_colour = rng.integers(0, 256, (n, 3, 3))
    drawn = [zoom, shift, colour, corner, size, patch_colour]
    return [torch.from_numpy(x[rank::world].astype(np.float32)) for x in drawn]


def augment(images: np.ndarray, drawn: list[torch.Tensor]) -> np.ndarray:
    """Augment images (B, H, W, 3) uint8 and return (B, H, W, 3) uint8.

    Each of the views, stacked vertically, is stretched and shifted on its own (DrQ 2004.13649
    shifts); half of the images change colours; up to three patches are covered by one colour
    (random erasing, 1708.04896).
    """
    zoom, shift, colour, corner, size, patch_colour = drawn
    B, H, W, _ = images.shape
    V = zoom.shape[1]
    x = torch.from_numpy(images).float()
    x = x.view(B * V, H // V, W, 3).permute(0, 3, 1, 2)  # (B V, 3, H/V, W)
    # (B V, 2, 3)
    affine = torch.cat([torch.diag_embed(zoom.exp()), shift[..., None]], -1).flatten(0, 1)
    grid = F.affine_grid(affine, x.shape, align_corners=False)  # (B V, H/V, W, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)  # (B V, 3, H/V, W)
    x = colour.mT.repeat_interleave(V, 0) @ x.flatten(2)  # (B V, 3, H/V W)
    images = x.round_().clamp_(0, 255).byte().mT.reshape(B, H, W, 3).numpy()
    extent = torch.tensor([H, W])
    begin = (corner * extent).round().long()  # (B, 3, 2)
    end = begin + (size * extent).round().long()
    patches = torch.cat([begin, end], -1).tolist()
    for b, k in (size[..., 0] > 0).nonzero().tolist():
        top, left, bottom, right = patches[b][k]
        images[b, top:bottom, left:right] = patch_colour[b, k]
    return images
