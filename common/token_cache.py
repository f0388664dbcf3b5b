"""The SFT stages' `--cache`: what a frozen vision tower and Q-Former make of each image, kept on disk.

With LoRA in the language model alone, no stage changes the image tokens. They are computed once for
each image and kept in <task>/.tokens-<fingerprint>/000017.safetensors, next to the episodes: q (T,
Q, D) bfloat16, 160 KB an image at the paper's size. Such a folder can be deleted at any time.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.distributed import barrier, rank_and_world_size
from common.errors import UserError
from common.files import atomic_write, folder_lock


def vision_weights(vla) -> dict[str, torch.Tensor]:
    """Return {name: weight} of everything that makes the image tokens."""
    weights = vla.blip.state_dict(keep_vars=True)
    return {name: w for name, w in weights.items() if not name.startswith("language_model.")}


def vision_fingerprint(vla) -> str:
    """Return 16 hex digits that differ if the weights or the preprocessing behind the image tokens differ."""
    config = vla.blip.config
    normalisation = (vla.image_mean.tolist(), vla.image_std.tolist())
    architecture = config.vision_config.to_json_string() + config.qformer_config.to_json_string()
    weights = vision_weights(vla)
    digest = hashlib.sha256(
        f"{vla.config['dtype']} {normalisation} {architecture} {list(weights)}".encode()
    )
    for w in weights.values():
        digest.update(w.detach().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:16]


def open_tokens(path: Path):
    """Return the memory-mapped handle of a file of image tokens, or None if there is no complete one."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        return None


@torch.no_grad()
def use_token_cache(dataset, vla) -> None:
    """Replace every image of an EpisodeDataset with vla.image_tokens(image), read from files next to the episodes.

    Files that are missing, damaged, or of other images are written; each process writes its share.
    The tokens are those of the recorded images, so with a cache there is no image augmentation.
    Raises UserError if SFT trains what makes the tokens, and if a random sample of the files does
    not match.
    """
    if any(w.requires_grad for w in vision_weights(vla).values()):
        raise UserError(
            "--cache needs a frozen vision tower and Q-Former: delete the stage's .partial folder, then leave --cache "
            "out, or run stage 0 with a pre-trained --vlm and --lora-targets language"
        )
    rank, world = rank_and_world_size()
    fingerprint = vision_fingerprint(vla)
    files = [path.parent / f".tokens-{fingerprint}" / path.name for path in dataset.paths]
    found = []
    root = dataset.paths[0].parents[1]
    with folder_lock(root) if rank == 0 else contextlib.nullcontext():  # runs may share D_e
        barrier()
        for e in tqdm(range(rank, len(files), world), desc="image tokens", disable=rank > 0):
            with open(dataset.paths[e], "rb") as f:
                header = {"episode": hashlib.file_digest(f, "sha256").hexdigest()}
            tokens = open_tokens(files[e])
            if tokens and tokens.metadata() == header:
                found.append(e)
                continue
            images = dataset.images[e][:].copy()  # torch warns of read-only arrays
            q = [vla.image_tokens(x) for x in np.split(images, range(32, len(images), 32))]
            with atomic_write(files[e]) as tmp:
                save_file({"q": torch.cat(q).bfloat16().cpu()}, tmp, header)
        barrier()
    check_sample(dataset, vla, files, found)
    dataset.images = [open_tokens(path).get_slice("q") for path in files]


def check_sample(dataset, vla, files: list[Path], found: list[int]) -> None:
    """Compare one frame of up to eight existing files with this VLM's tokens of its image. Raises UserError."""
    rng = np.random.default_rng()  # another sample each time; nothing that is trained depends on it
    for e in rng.choice(found, min(8, len(found)), replace=False):
        t = int(rng.integers(len(dataset.actions[e])))
        q = vla.image_tokens(dataset.images[e][t : t + 1].copy())[0].float().cpu()  # (Q, D)
        error = (open_tokens(files[e]).get_slice("q")[t].float() - q).norm() / q.norm()
        if not error < 0.05:  # the rounding of bfloat16, also another machine's, is far below
            raise UserError(
                f"{files[e]} does not match this VLM's output for {dataset.paths[e]}: delete its folder"
            )
