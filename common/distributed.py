"""Several processes of one SFT stage, as torchrun starts them."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch

from common.errors import UserError

LAUNCHER_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
PATIENCE = 10  # seconds of waiting before it is reported


def launched_world_size() -> int:
    """Return how many processes a launcher has started. Raises UserError if its variables are not all there."""
    value = os.environ.get("WORLD_SIZE", "").strip()
    if value in ("", "1"):
        return 1
    wrong = [name for name in LAUNCHER_NUMBERS if not os.environ.get(name, "").isdecimal()]
    wrong += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if wrong or value == "0":
        raise UserError(
            f"WORLD_SIZE={value} is set, but {', '.join(wrong) or 'WORLD_SIZE'} is missing or not valid: unset it, or "
            f"start the stage with torchrun, which sets them all"
        )
    return int(value)


def rank_and_world_size() -> tuple[int, int]:
    """Return (this process's rank, number of processes): torchrun's, else (0, 1)."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = launched_world_size()
    if world == 1:
        return 0, 1
    timeout = timedelta(days=1)  # the others wait while rank 0 records D_e
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with report_waiting(world):
        torch.distributed.init_process_group(backend, timeout=timeout)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def require_one_process(script: str) -> None:
    """Raise UserError if a launcher has started several processes of a stage that is one process by design."""
    world = launched_world_size()
    if world > 1:
        raise UserError(
            f"{script} runs as one process, but WORLD_SIZE={world}: start it with python, not torchrun"
        )


@contextlib.contextmanager
def report_waiting(world: int) -> Iterator[None]:
    """Print a line if the other processes keep this one waiting."""
    message = f"rank {os.environ['RANK']}: waiting for {world - 1} other process(es)"
    timer = threading.Timer(PATIENCE, print, [message], {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def barrier() -> None:
    """Wait until every process is here."""
    _, world = rank_and_world_size()
    if world > 1:
        with report_waiting(world):
            torch.distributed.barrier()


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Set tensors to the first process's, in place."""
    if rank_and_world_size()[1] > 1:
        for x in tensors:
            torch.distributed.broadcast(x.data, 0)


def mean_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Set float tensors to their mean over all processes, in place, in one exchange."""
    _, world = rank_and_world_size()
    if world > 1:
        flat = torch.cat([x.flatten() for x in tensors]) / world
        torch.distributed.all_reduce(flat)
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))
