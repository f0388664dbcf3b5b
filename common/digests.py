"""Digests of a checkpoint's files: a flipped byte of a weight would load in silence."""

import hashlib
from pathlib import Path

from common.errors import UserError

# The weights, and all that decides how they are used. config.json holds the digests.
PATTERNS = ("heads.safetensors", "adapter_model.safetensors", "adapter_config.json", "vlm/*")


def digests(folder: Path) -> dict[str, str]:
    """Return {file: SHA-256} of a checkpoint's files."""
    files = [
        path for pattern in PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()
    ]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_digests(folder: Path, expected: dict[str, str]) -> None:
    """Raise UserError if a file differs. Older checkpoints have no digests, and are not checked."""
    for name, digest in expected.items():
        path = folder / name
        if path.exists() and sha256(path) != digest:
            raise UserError(
                f"{path} is damaged: its SHA-256 is not the one in config.json; use another checkpoint"
            )
