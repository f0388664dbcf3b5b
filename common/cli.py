"""The command line of a script."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], doc: str) -> T:
    """Return the command line's arguments as a `kind`. Ends the process for --help and for wrong arguments.

    doc: the script's docstring.
    """
    with help_page(doc, sys.argv[1:]) as prog:
        return tyro.cli(kind, prog=prog, description="")


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
