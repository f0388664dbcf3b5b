"""Worker processes: forked from a server that has imported the domain, and neither torch nor the stage's script."""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from common.errors import UserError

ROOT = Path(__file__).parent.parent
PRELOADED_DOMAIN = "IRE_VLA_DOMAIN"  # environment variable: the domain that workers need
SHARED_MEMORY_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSYS)


def start_fork_server(domain: str) -> None:
    """Start the process that all workers are forked from. It imports a domain (a name), and neither torch nor a stage.

    Called before a stage's own imports, it does so at the same time. Later calls do nothing.
    """
    os.environ[PRELOADED_DOMAIN] = domain
    multiprocessing.set_forkserver_preload(["domains._preload"])
    # The server is a `python -c`, which would import from the current folder first: a user's own
    # domains/, for example.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Ctrl-C is for the main process. The server inherits the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with patch.dict(os.environ, PYTHONSAFEPATH="1", PYTHONPATH=path):
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Start worker processes in here: they find this project, and do not import this process's script, hence torch.

    Raises UserError if the shared memory that processes communicate through cannot be used.
    """
    # From these two multiprocessing knows the script, or the module of `python -m`.
    main = vars(sys.modules["__main__"])
    known = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(dict.fromkeys(known))
    try:
        start_fork_server(os.environ.get(PRELOADED_DOMAIN, ""))  # again, if it has been killed
        yield
    except (EOFError, ConnectionError) as error:
        raise UserError("worker processes do not start: their own error is above") from error
    except OSError as error:
        if error.errno in SHARED_MEMORY_ERRORS:
            raise UserError(
                f"no shared memory for worker processes ({error.strerror}): free space in /dev/shm and in "
                f"{tempfile.gettempdir()}, and make them writable; a container needs a larger --shm-size"
            ) from error
        raise
    finally:
        main.update(known)
