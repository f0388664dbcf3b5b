"""The command line of a script, and its numbers."""

import contextlib
import functools
import gc
import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import tyro

from common.errors import UserError
from common.files import read_json
from common.processes import start_fork_server

# Arguments that must be more than 0; the others must be at least 0.
POSITIVE_ARGS = (
    "accumulate", "actor_every", "alpha", "batch", "envs", "epochs", "image_size", "lora_rank", "minibatch", "n_step",
    "rollout", "threads",
)  # fmt: skip
ANY_SIGN_ARGS = ("target_entropy",)

T = TypeVar("T")


def parse(kind: type[T], doc: str, workers: bool = False) -> T:
    """Return the command line's arguments as a `kind`. Ends the process for --help and for wrong arguments.

    doc: the script's docstring. A script's heavy imports follow, so until `run_cli` the garbage
    collector is off: it would search the imported objects again and again.
    workers: start the process that the domain's workers are forked from. Its imports then run at
    the same time as the script's.
    """
    with help_page(doc, sys.argv[1:]) as prog:
        args = tyro.cli(kind, prog=prog, description="")
    gc.disable()
    if workers:
        start_fork_server(named_domain(args))
    return args


def named_domain(args: object) -> str:
    """Return the domain that the arguments name, or else their checkpoint. "" if neither does."""
    folder = getattr(args, "parent", None) or getattr(args, "checkpoint", None)
    with contextlib.suppress(UserError, OSError, AttributeError):
        return getattr(args, "domain", "") or read_json(Path(folder) / "config.json").get(
            "domain", ""
        )
    return ""


def parse_command(commands: list[Callable], doc: str) -> functools.partial:
    """Return the command that the command line names, with its arguments, to be called.

    commands: functions, named as on the command line. doc: the script's docstring.
    """
    deferred = {command.__name__: defer(command) for command in commands}
    with help_page(doc, sys.argv[1:2]) as prog:
        return tyro.extras.subcommand_cli_from_dict(deferred, prog=prog, description="")


@contextlib.contextmanager
def help_page(doc: str, words: list[str]) -> Iterator[str | None]:
    """Print the docstring as it is if help is asked for, and yield the program's name.

    tyro would join the docstring's example commands into one line. `--help | head` ends without a traceback.
    """
    module = sys.modules["__main__"].__spec__
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        if {"-h", "--help"} & set(words):
            print(doc.strip(), end="\n\n")
        yield f"python -m {module.name}" if module else None
    finally:
        sys.stdout.flush()
        signal.signal(signal.SIGPIPE, before)  # a broken pipe is an exception again


def defer(command: Callable) -> Callable:
    """Return a function with the same arguments that returns the call instead of making it."""

    @functools.wraps(command)
    def later(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    return later


def check_numbers(args: object, positive: Iterable[str] = POSITIVE_ARGS, prefix: str = "") -> None:
    """Check that numbers are finite and >= 0, and > 0 if listed in `positive`. Raises UserError."""
    values = args if isinstance(args, dict) else asdict(args)
    for name, value in values.items():
        if isinstance(value, dict):
            check_numbers(value, positive, f"{name}.")
        if not isinstance(value, (int, float)):
            continue
        flag = f"--{prefix}{name.replace('_', '-')}"
        if not math.isfinite(value):
            raise UserError(f"{flag} must be finite (got {value})")
        if name in positive and isinstance(value, float) and value <= 0:
            raise UserError(f"{flag} must be more than 0 (got {value})")
        least = int(name in positive and isinstance(value, int))
        if value < least and name not in ANY_SIGN_ARGS:
            raise UserError(f"{flag} must be at least {least} (got {value})")
