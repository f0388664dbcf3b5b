"""
A run's folder: files that are whole or absent, stages that go on where they stopped, errors that are one sentence.

Every stage of the paper's Algorithm 1 trains inside `runs/<name>/.<stage>.partial/` and renames that folder to
`runs/<name>/<stage>/` when it is done, so a folder with its final name is always complete. In between it saves one
`state.safetensors` (weights, optimizer moments, counters). No generator state is stored: every random draw of a stage
comes from a generator seeded by (seed, step), so step 1000 draws the same numbers whether or not step 999 was run in
this process; only simulators, which cannot be stored, begin new episodes. Nothing in the project is read with pickle.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shlex
import sys
import time
import weakref
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def stopped():
    """End at once after Ctrl-C, without a traceback, and say how to go on."""
    print(f"\nstopped. {again()}", file=sys.stderr)
    os._exit(130)  # not sys.exit: that would wait for the simulators' processes to finish


def again():
    command = os.environ.get("AGAIN") or f"python {shlex.join(sys.argv)}"  # loop.sh names itself
    return f"The same command goes on from the last saved state: {command}"


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # a stage script, not somebody's import of it
    # for Ctrl-C in the seconds in which torch is imported, before `main` runs; so the scripts import this file first
    sys.excepthook = lambda kind, *about: stopped() if kind is KeyboardInterrupt else sys.__excepthook__(kind, *about)

import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

from domains import Refusal  # noqa: E402

PACKAGES = ("torch", "transformers", "peft", "gymnasium", "numpy")  # the simulators' are in each domain's PROTOCOL
FREE = (  # arguments that do not decide a stage's result
    "parent", "data", "out", "device", "threads", "episodes", "accumulate", "checkpointing",
)  # fmt: skip
COUNTS = (  # arguments that count from 1
    "accumulate", "actor_every", "batch", "envs", "epochs", "image_size", "minibatch", "n_step", "rollout", "threads",
)  # fmt: skip
PASSING = re.compile(r"(state|priority|replay-\d+)\.safetensors")  # the state, and SACfD's buffer
STATE_EVERY = float(os.environ.get("STATE_EVERY", 60))  # seconds between two saved states; the tests shorten it


def versions():
    """What made a result: {package: version}."""
    return {name: version(name) for name in PACKAGES if find_spec(name)}  # data.py also runs beside LeRobot


def main(story, args):
    """Run `story(args)`; a Refusal or Ctrl-C ends it with one sentence and a non-zero exit, never a traceback."""
    try:
        story(args)
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            sys.exit(f"error: no space left on the disk of {Path.cwd()}: free some. {again()}")
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            sys.exit(f"error: {error.filename} may not be written or read here ({error.strerror}): allow it, or name "
                     f"another place. {again()}")  # fmt: skip
        raise
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: no memory is left on the GPU ({str(error).split('. ')[0]}): give a stage of SFT --accumulate "
                 f"or --checkpointing, stage 1 a smaller --envs, --rollout or --minibatch. {again()}")  # fmt: skip
    except KeyboardInterrupt:
        stopped()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Files


def disk_is_full(error):
    """Is that what an OSError or a SafetensorError says?"""
    return "os error 28" in str(error) or getattr(error, "errno", None) == errno.ENOSPC


@contextlib.contextmanager
def whole(path):
    """Write a file beside its place, flush it, rename it: `with whole(path) as tmp: write(tmp)`.

    Raises Refusal when the disk is full; then the temporary file is removed and what stood at `path` still stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        yield tmp
        flush(tmp)
        os.replace(tmp, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise Refusal(f"no space left while writing {path}: free some and give the same command again") from error
        raise
    finally:
        tmp.unlink(missing_ok=True)


def flush(path):
    """Make a file's content, or a rename inside a folder, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def locked(fd):
    """Lock an open folder until it is closed, or this process is gone. False where another process has it. On a file
    system without locks nobody has."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def alone_in(folder):
    """Make the folder where it is missing, and wait until no other process is in here with it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        if not locked(fd):
            print(f"waiting for another process that is at work in {folder}", flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_json(path, value):
    with whole(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """A JSON file's value. Raises Refusal when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refusal(f"{path} is missing, so its folder is no whole checkpoint: use another") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not JSON ({error}): restore it, or delete its folder and train again") from error


def checkpoint_config(folder):
    """A checkpoint's config.json. Raises Refusal for a folder that is no checkpoint of this project."""
    config = read_json(Path(folder) / "config.json")
    if not {"domain", "weights", "action_dim"} <= set(config):
        raise Refusal(f"{folder} holds no policy of this project: give a checkpoint, such as runs/<name>/0-sft")
    return config


def on_hub(name):
    """Is this user/name on the Hugging Face hub, and not a path here?"""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))) and not Path(name).parent.exists()


def read_tensors(path, device="cpu"):
    """(tensors, metadata) of a safetensors file. Raises Refusal when it is missing or cut short."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise Refusal(f"{path} is missing, so its folder is no whole checkpoint: use another") from error
    except SafetensorError as error:
        raise Refusal(f"{path} is damaged ({error}): delete its folder and give the command again") from error


# ----------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun)


def ranks():
    """(this process's rank, how many there are): torchrun's, else (0, 1)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        patience = timedelta(days=1)  # the others wait while the first records D_e
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=patience)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def together():
    """Wait until every process is here."""
    if ranks()[1] > 1:
        torch.distributed.barrier()


def mean_over_ranks(x):
    """The mean of a scalar tensor over all processes, as a number."""
    rank, world = ranks()
    if world > 1:
        torch.distributed.all_reduce(x := x.detach().clone())
    return x.item() / world


# ----------------------------------------------------------------------------------------------------------------------
# A stage's folder


def check_counts(args, names=COUNTS, prefix=""):
    """Raises Refusal where a whole number of a dataclass of arguments, or of one among them, is below 0, or below 1 and
    among `names`."""
    for name, n in (args if isinstance(args, dict) else asdict(args)).items():
        if isinstance(n, dict):
            check_counts(n, names, f"{name}.")
        if isinstance(n, int) and n < (least := int(name in names)) and name != "seed":
            raise Refusal(f"--{prefix}{name.replace('_', '-')} {n} cannot be: it counts from {least}")


class Stage:
    """One stage of a run, `runs/<name>/<stage>/`, resumable until it is finished.

    args: the stage's arguments, a dataclass with `out`, the final folder, and perhaps `parent`. `decides` are those
    that decide the result: others, or another parent, are refused for the same folder once it has a state. unused:
    arguments that this stage does without, such as another algorithm's. Refused too: numbers below 0, or 1 where
    that is least (COUNTS), and a folder that another process is at work in.
    `done` is True when the folder exists already: the caller returns at once. Of several processes, rank 0 writes.
    """

    def __init__(self, args, unused=()):
        self.out = Path(args.out)
        self.decides = {k: v for k, v in asdict(args).items() if k not in FREE and k not in unused}
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self.done = self.out.is_dir()
        check_counts(args)
        task = getattr(args, "task", None)
        parent = getattr(args, "parent", None)  # beside `out`, wherever the run's folder may have been moved
        kind, args = type(args), self.decides | {"parent": parent and os.path.relpath(parent, self.out.parent)}
        if not 0 <= (seed := args.get("seed", 0)) < 600:  # RL's initial states of later ones are the evaluation's
            raise Refusal(f"--seed {seed} cannot be: give one of 0 to 599")
        record = (self.out if self.done else self.folder) / "stage.json"
        begun = self.done or (self.folder / "state.safetensors").exists()
        if record.exists() and begun:
            old = read_json(record)["args"]
            old = {k: getattr(kind, k, None) for k in args} | old  # an argument newer than the record had its default
            differ = [k for k in old if k not in unused and old[k] != args.get(k)]
            if differ:
                then_now = "; ".join(f"{k}: {old.get(k)} then, {args.get(k)} now" for k in differ)
                raise Refusal(
                    f"{record.parent} was started with other arguments ({then_now}): "
                    f"give the first ones again, choose another RUN, or delete that folder"
                    + (f" and what it recorded in {self.out.parent}/D_rl/{task}" if task else "")
                )
        together()  # everyone has seen what there was
        self.writes = ranks()[0] == 0
        if self.done and self.writes:
            self.drop()
        elif self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.folder, os.O_RDONLY)
            weakref.finalize(self, os.close, fd)
            if not locked(fd):
                raise Refusal(f"another process is at work in {self.folder}: wait for its end, or stop it")
            if not begun:
                write_json(record, {"args": args, "versions": versions()})
        self.writer, self.saved_at, self.began = None, time.time(), time.time()
        self.seconds, self.peak = 0.0, 0.0  # of earlier sittings

    # --- state

    def load(self):
        """(tensors, counters) of the last saved state, or ({}, {}). Cuts log.jsonl back to that moment."""
        path = self.folder / "state.safetensors"
        log = self.folder / "log.jsonl"
        if not path.exists():
            if self.writes:
                log.unlink(missing_ok=True)
            return {}, {}
        tensors, meta = read_tensors(path)
        together()  # before rank 0 may write another
        counters = json.loads(meta["counters"])
        self.seconds, self.peak = counters.pop("seconds"), counters.pop("peak_gb", 0.0)
        length = counters.pop("log_bytes")
        if log.exists() and self.writes:
            os.truncate(log, length)
        return tensors, counters

    def save(self, tensors, counters):
        """Save the state to go on from: {name: tensor} and a dict of plain values."""
        log = self.folder / "log.jsonl"
        counters = {**counters, "seconds": self.elapsed(), "peak_gb": self.peak_gb()}
        counters["log_bytes"] = 0
        if log.exists():
            flush(log)  # or a power cut could leave it shorter than this says
            counters["log_bytes"] = log.stat().st_size
        with whole(self.folder / "state.safetensors") as tmp:
            save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, {"counters": json.dumps(counters)})
        self.saved_at = time.time()

    def due(self):
        """Is it time to save again?"""
        return self.writes and time.time() - self.saved_at > STATE_EVERY

    def elapsed(self):
        return self.seconds + time.time() - self.began

    def peak_gb(self):
        """The most memory that this process has held, in GB: the GPU's where it uses one, else its own; that of the
        simulators' processes does not count."""
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        gpu = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())), default=0)
        return round(max(self.peak, gpu / 1e9 or own / 1e9), 2)

    # --- log

    def log(self, step, **values):
        """One line of log.jsonl and the same numbers for TensorBoard."""
        if not self.writes:
            return
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "seconds": round(self.elapsed(), 1), **values}) + "\n")
        if self.writer is None:
            self.writer = SummaryWriter(self.folder, purge_step=step)
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def finish(self, **summary):
        """Write summary.json, give the folder its final name, and drop the state."""
        if self.writer is not None:
            self.writer.close()
        cost = {"seconds": round(self.elapsed(), 1), "peak_gb": self.peak_gb()}
        write_json(self.folder / "summary.json", {**cost, **summary})
        for path in [p for p in self.folder.rglob("*") if not PASSING.fullmatch(p.name)] + [self.folder]:
            flush(path)
        os.replace(self.folder, self.out)
        flush(self.out.parent)
        self.drop()

    def drop(self):
        """Remove from the finished folder what only a stage on its way needs."""
        for path in [p for p in self.out.iterdir() if PASSING.fullmatch(p.name)]:
            path.unlink()


def optimizer_tensors(optimizer):
    """Adam's moments as {"opt.<parameter>.<moment>": tensor}, fit for safetensors."""
    state = optimizer.state_dict()["state"]
    return {f"opt.{i}.{key}": value.clone() for i, moments in state.items() for key, value in moments.items()}


def load_optimizer(optimizer, tensors):
    """Put back what `optimizer_tensors` took."""
    state = {}
    for name, value in tensors.items():
        if name.startswith("opt."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def pick_device(name=""):
    """`name`, or the GPU where there is one. Raises Refusal for a device that torch cannot use."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda"):  # of several processes each has its own
            device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {name} cannot be used here ({error}); leave it out or give cpu") from error
    return device


def free_memory(device):
    """Bytes of memory that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check_memory(size, device, what, instead):
    """Say how large `what` is, `size` bytes on the device. Raises Refusal, with the way out, when that is not free."""
    free = free_memory(device)
    sentence = f"{what} take {size / 1e9:,.2f} GB of the {free / 1e9:,.2f} GB of memory that are free on {device}"
    if size > free:
        raise Refusal(f"{sentence}: {instead}")
    print(sentence)
