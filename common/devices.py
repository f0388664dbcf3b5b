"""The device that a stage runs on, and its free memory."""

import contextlib
import os
from collections.abc import Iterator

import psutil
import torch

from common import cgroups
from common.errors import UserError


def pick_device(name: str = "") -> torch.device:
    """Return the named device, or the GPU if there is one. Raises UserError for a device that torch cannot use."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda"):  # each of several processes has its own
            device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} is not usable here ({error}): leave it out, or use cpu"
        ) from error
    return device


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limit = cgroups.free_memory()  # psutil does not know a container's
    available = psutil.virtual_memory().available
    return available if limit is None else min(available, limit)


def check_memory(size: int, device: torch.device, what: str, remedy: str) -> None:
    """Print how many bytes `what` needs on the device. Raises UserError, with the remedy, if they are not free."""
    free = free_memory(device)
    sentence = f"{what}: {size / 1e9:,.2f} GB of the {free / 1e9:,.2f} GB of memory that are free on {device}"
    if size > free:
        raise UserError(f"not enough memory for {sentence}; {remedy}")
    print(sentence)


def use_threads(n: int) -> None:
    """Let torch use n CPU threads, at most one for each CPU. Far too many would end the process."""
    torch.set_num_threads(min(n, os.cpu_count() or 1))


@contextlib.contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Let torch use n CPU threads in here."""
    before = torch.get_num_threads()
    use_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
