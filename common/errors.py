"""Errors that the user can fix: one sentence and a non-zero exit code, never a traceback."""

import contextlib
import errno
import gc
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path

from safetensors import SafetensorError

FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # the disk, a quota, or the file size of `ulimit -f`
_resumes = True  # whether this process's command continues from a saved state


class UserError(Exception):
    """A problem that the user can fix. The message names the fault (with the value), then the way out."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: end as after Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def disk_is_full(error: Exception) -> bool:
    """Return whether an OSError or a SafetensorError reports a full disk, quota or file size limit."""
    # A SafetensorError has its number in the text alone.
    return getattr(error, "errno", None) in FULL or any(
        f"os error {number})" in str(error) for number in FULL
    )


def resume_hint() -> str:
    """Return how to go on, in one sentence: by loop.sh's own command where it started this process."""
    command = os.environ.get("RESUME_COMMAND") or f"python {shlex.join(sys.argv)}"
    if _resumes:
        return f"Rerun the same command to resume from the last saved state: {command}"
    return f"Rerun the command to start again: {command}"


def raise_stopped(number: int, frame: object) -> None:
    """Signal handler: raise Stopped, once. A second signal must not interrupt the clean-up of the first."""
    signal.signal(number, signal.SIG_IGN)
    raise Stopped(number)


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """Let SIGTERM (a scheduler) and SIGHUP (a closed terminal) end this process as Ctrl-C does, in here."""
    handled = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL  # nohup has SIGHUP ignored
    ]
    for number in handled:
        signal.signal(number, raise_stopped)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def run_cli(main: Callable, args: object, resumes: bool = True) -> None:
    """Run `main(args)`. A UserError, a signal or Ctrl-C ends the process with one sentence and a non-zero exit code.

    resumes: whether the same command continues from a saved state; otherwise it starts again.
    """
    global _resumes
    _resumes = resumes
    gc.freeze()  # what was imported stays
    gc.enable()
    try:
        with signals_stop():
            main(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (OSError, SafetensorError) as error:
        name = getattr(error, "filename", None)
        if disk_is_full(error):
            sys.exit(
                f"error: no space left on the disk of {name or Path.cwd()}: free some. {resume_hint()}"
            )
        if name is None:  # not a file
            raise
        sys.exit(
            f"error: {name} cannot be used ({error.strerror}): correct it or its permissions, or choose another place. "
            f"{resume_hint()}"
        )
    except RuntimeError as error:
        # Not imported here, so that commands without it start quickly.
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        sys.exit(
            f"error: the GPU is out of memory ({str(error).split('. ')[0]}): use --accumulate or --checkpointing in "
            f"an SFT stage, or a smaller --envs, --rollout or --minibatch in stage 1. {resume_hint()}"
        )
    except KeyboardInterrupt as stop:
        print(f"\nstopped. {resume_hint()}", file=sys.stderr, flush=True)
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        util._run_finalizers(0)  # else Python's resource tracker reports leaked semaphores
        os._exit(128 + number)  # not sys.exit, which would wait for the environments' processes
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
