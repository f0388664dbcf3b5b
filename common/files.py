"""Files that are complete or absent, folder locks, and what is read back. Nothing is read with pickle."""

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError, disk_is_full


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a temporary file next to `path`, flush it, rename it: `with atomic_write(path) as tmp: write(tmp)`.

    Raises UserError when the disk is full. The temporary file is then removed and the old file is
    kept.
    """
    path = Path(path)
    make_folder(path.parent)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        yield tmp
        flush(tmp)
        os.replace(tmp, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise UserError(
                f"no space left while writing {path}: free some, then rerun the same command"
            ) from error
        raise
    finally:
        tmp.unlink(missing_ok=True)


def check_links(path: str | Path) -> None:
    """Raise UserError if a path is or passes a link whose target is missing, such as a disk that is not mounted."""
    for part in (Path(path), *Path(path).parents):
        if part.is_symlink() and not part.exists():
            raise UserError(
                f"{part} is a link to {os.readlink(part)}, which does not exist: mount or create it"
            )


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents if they are missing. Raises UserError for a link whose target is missing."""
    path = Path(path)
    check_links(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(folder: str | Path, remedy: str) -> None:
    """Raise UserError, with the remedy, if no file can be written into an existing folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} is not writable ({error.strerror}): {remedy}") from error


def check_output(path: str | Path) -> None:
    """Raise UserError, before the work, if its result cannot be written to this file. Creates the file's folder."""
    if Path(path).is_dir():
        raise UserError(f"--out {path} is a folder: name a file")
    check_writable(make_folder(Path(path).parent), "use another --out")


def flush(path: Path) -> None:
    """Make a file's content, or a rename inside a folder, survive a power cut.

    Some network file systems (CIFS, FUSE, WSL shares) cannot flush a folder, which is not an error.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Lock an open folder until it is closed or this process ends. Return False if another process holds the lock.

    On a file system without locks this always succeeds.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Create the folder if it is missing, and wait until no other process holds its lock."""
    fd = os.open(make_folder(folder), os.O_RDONLY)
    try:
        if not try_lock(fd):
            print(f"waiting for another process that is working in {folder}", flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, remedy: str = "restore it, or use another checkpoint") -> object:
    """Return a JSON file's value. Raises UserError if it is missing, or not JSON: with the remedy."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        check_links(path)
        raise UserError(
            f"incomplete checkpoint: {path} is missing; use another checkpoint"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from error


def check_entries(
    path: str | Path, value: object, kinds: dict[str, type], remedy: str = "restore it"
) -> None:
    """Raise UserError if the value of a JSON file is not an object with these entries of these types."""
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: {remedy}")
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind):
            raise UserError(
                f"{path}: {name} is not a {kind.__name__} (got {value.get(name)!r}): {remedy}"
            )


def read_entries(path: str | Path, kinds: dict[str, type], remedy: str = "restore it") -> dict:
    """Return a JSON file's object. Raises UserError if it lacks one of these entries, or one has another type."""
    value = read_json(path, remedy)
    check_entries(path, value, kinds, remedy)
    return value


def read_tensors(
    path: str | Path, device: str = "cpu", remedy: str = "restore it, or use another checkpoint"
) -> tuple[dict, dict]:
    """Return ({name: tensor}, metadata) of a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  it is not a dict
            return tensors, f.metadata() or {}
    except FileNotFoundError as error:
        check_links(path)
        raise UserError(
            f"incomplete checkpoint: {path} is missing; use another checkpoint"
        ) from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
