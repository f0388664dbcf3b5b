"""Signals that must not end a program before its arm holds."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

# SIGHUP: the terminal was closed, or the ssh connection was lost. SIGTSTP: Ctrl-Z would suspend the
# program while the arm keeps moving to its last target, so it ends the program instead. SIGINT is
# Python's KeyboardInterrupt already.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


class SignalExit(SystemExit):
    """A signal ends this program, once everything is closed. The exit code is 128 + its number, as in a shell.

    It is a SystemExit and not common.errors.Stopped, because an environment's worker process ends
    by it in silence.
    """

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn STOP_SIGNALS into SignalExit, so that every `finally` runs. Ignored signals (nohup) stay ignored."""

    def stop(signum, _):
        raise SignalExit(signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def delay_signals(reason: str = "") -> Iterator[None]:
    """Keep back Ctrl-C and STOP_SIGNALS until the block is left, and deliver them then.

    reason: printed when one arrives.
    """
    arrived = []

    def remember(signum, _):
        if signum not in arrived:
            arrived.append(signum)
        if reason:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"\n{signal.Signals(signum).name}: {reason}", file=sys.stderr, flush=True)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, remember)
    try:
        yield
    finally:
        restore(before)
        for signum in arrived:
            signal.raise_signal(signum)


def restore(handlers: dict) -> None:
    """Install these signal handlers."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
