"""A run's folder: stages that resume where they stopped, their logs, and the config.json of a checkpoint.

A stage trains inside `runs/<name>/.<stage>.partial/` and renames that folder to
`runs/<name>/<stage>/` when it is done, so a folder with its final name is always complete.
Meanwhile it saves one `state.safetensors` (weights, optimizer moments, counters). No generator
state is stored: every random draw of a stage comes from a generator seeded by (seed, step), so step
1000 draws the same numbers whether or not step 999 ran in this process. Only environments, which
cannot be stored, start new episodes.
"""

import json
import os
import re
import resource
import sys
import time
import weakref
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from common.cli import check_numbers
from common.distributed import barrier, rank_and_world_size
from common.errors import UserError
from common.files import (
    atomic_write,
    check_entries,
    check_links,
    check_writable,
    flush,
    make_folder,
    read_entries,
    read_json,
    read_tensors,
    try_lock,
    write_json,
)
from common.processes import ROOT
from common.versions import versions

# Arguments that do not change a stage's result.
NON_IDENTITY_ARGS = (
    "parent",
    "data",
    "out",
    "device",
    "threads",
    "episodes",
    "all_tasks",
    "accumulate",
    "checkpointing",
)
# Arguments of older runs, by the names that they have today.
RENAMED_ARGS = {"noise": "action_noise_std", "kicks": "random_burst_prob"}
RENAMED_SACFD_ARGS = {
    "demos": "num_demos",
    "clone": "bc_weight",
    "priority": "per_alpha",
    "importance": "per_beta",
    "entropy": "target_entropy",
}
MAX_SEED = 600  # stage 1's initial states of later seeds would be the evaluation's
# The state, and SACfD's replay buffer.
TEMPORARY_FILES = re.compile(r"(state|priority|replay-\d+)\.safetensors")
# Seconds between two saved states; the tests shorten it.
SAVE_INTERVAL = float(os.environ.get("SAVE_INTERVAL") or 60)


# The entries of a checkpoint's config.json that are read.
CONFIG = {
    "vlm": str, "weights": str, "domain": str, "action_dim": int, "image_size": int, "dtype": str, "sha256": dict,
}  # fmt: skip


def checkpoint_config(folder: str | Path, *needed: str) -> dict:
    """Return a checkpoint's config.json. Raises UserError for a folder that is not a checkpoint of this project.

    needed: more entries that must be there.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or not {"domain", "weights", "action_dim"} <= set(config):
        raise UserError(
            f"{folder} is not a checkpoint of this project: use one such as runs/<name>/0-sft"
        )
    check_entries(path, config, {k: CONFIG[k] for k in CONFIG if k in config or k in needed})
    in_range = {
        "action_dim": config["action_dim"] > 0,
        "image_size": config.get("image_size", 1) > 0,
        "dtype": config.get("dtype", "float32") in ("bfloat16", "float32"),
    }
    for name, good in in_range.items():
        if not good:
            raise UserError(f"{path}: {name} {config[name]!r} is not possible: restore it")
    return config


def is_hub_name(name: str | Path) -> bool:
    """Return whether this is user/name on the Hugging Face hub, and not a path here or in the project."""
    local = any((base / name).parent.exists() for base in (Path(), ROOT))
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))) and not local


def renamed(args: dict) -> dict:
    """Return a stage's recorded arguments under the names that they have today."""
    today = {RENAMED_ARGS.get(name, name): value for name, value in args.items()}
    if "sacfd" in today:
        today["sacfd"] = {
            RENAMED_SACFD_ARGS.get(name, name): value for name, value in today["sacfd"].items()
        }
    return today


class StateEntries(dict):
    """The tensors or counters of a saved state. Raises UserError for one that another version has not saved."""

    def __init__(self, path: Path, entries: dict):
        super().__init__(entries)
        self.path = path

    def __missing__(self, name: str) -> object:
        raise UserError(
            f"{self.path} lacks {name}, which another version does not save: use that version, or delete its folder"
        )


class Stage:
    """One stage of a run, `runs/<name>/<stage>/`, resumable until it is finished.

    args: the stage's arguments, a dataclass with `out`, the final folder, and perhaps `parent`.
    unused: arguments that this stage ignores, such as another algorithm's.

    `identity_args` are those that change the result. Once the folder has a state, other values, or
    another parent, are refused. `done` is True if the final folder exists already: the caller then
    returns at once. `d_rl` is the run's D_rl, which holds a folder for each task. Of several
    processes only rank 0 writes. Raises UserError for these, for numbers out of range, and for a
    folder that is in use or cannot be written.
    """

    def __init__(self, args: object, unused: Iterable[str] = ()):
        check_numbers(args)
        seed = getattr(args, "seed", 0)
        if not 0 <= seed < MAX_SEED:
            raise UserError(f"--seed must be from 0 to {MAX_SEED - 1} (got {seed})")
        ignored = {*NON_IDENTITY_ARGS, *unused}
        self.out = Path(args.out)
        if not self.out.name:
            raise UserError(
                f"--out must name a new folder (got {args.out!r}): use one such as runs/<name>/0-sft"
            )
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self.d_rl = self.out.parent / "D_rl"
        self.done = (self.out / "stage.json").exists()
        check_links(self.out)
        if not self.done and self.out.exists():
            raise UserError(
                f"{self.out} exists and is not a finished stage: remove it, or use another --out"
            )
        self.identity_args = {k: v for k, v in asdict(args).items() if k not in ignored}
        self.writer = None
        self.seconds = 0.0  # spent before the last restart
        self.peak = 0.0  # peak memory in GB before the last restart
        self.saved_at = self.began = time.time()

        # The parent is recorded relative to `out`, so that a run's folder may be moved.
        parent = getattr(args, "parent", None)
        recorded = self.identity_args | {
            "parent": parent and os.path.relpath(parent, self.out.parent)
        }
        record = (self.out if self.done else self.folder) / "stage.json"
        begun = self.done or (self.folder / "state.safetensors").exists()
        if begun and record.exists():
            self.check_recorded(record, recorded, type(args), unused)
        barrier()  # every process has seen what was there
        self.writes = rank_and_world_size()[0] == 0
        if not self.writes:
            return
        if self.done:
            self.remove_temporary_files()
            return
        check_writable(make_folder(self.folder), "change its permissions, or use another --out")
        fd = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, fd)
        if not try_lock(fd):
            raise UserError(f"another process is working in {self.folder}: wait for it, or stop it")
        if not begun:
            write_json(record, {"args": recorded, "versions": versions()})

    def check_recorded(self, record: Path, args: dict, kind: type, unused: Iterable[str]) -> None:
        """Raise UserError if this folder was started with other arguments."""
        # An argument newer than the record had its default.
        defaults = {k: getattr(kind, k, None) for k in args}
        old = defaults | renamed(read_entries(record, {"args": dict})["args"])
        if old.get("steps") is None:  # older records of stage 0 do not resolve the default
            old.pop("steps", None)
        differ = [k for k in old if k not in unused and old[k] != args.get(k)]
        if not differ:
            return
        values = "; ".join(f"{k}: then {old.get(k)}, now {args.get(k)}" for k in differ)
        also = f" and its episodes in {self.d_rl / args['task']}" if "task" in args else ""
        raise UserError(
            f"{record.parent} was started with other arguments ({values}): "
            f"use those again, choose another RUN, or delete that folder{also}"
        )

    # --- state

    def load(self) -> tuple[dict, dict]:
        """Return (tensors, counters) of the last saved state, or ({}, {}). Cuts log.jsonl back to that moment."""
        path = self.folder / "state.safetensors"
        log = self.folder / "log.jsonl"
        if not path.exists():
            if self.writes:
                log.unlink(missing_ok=True)
            return {}, {}
        tensors, meta = read_tensors(path, remedy="delete its folder and rerun the command")
        barrier()  # before rank 0 may write another
        counters = StateEntries(path, json.loads(StateEntries(path, meta)["counters"]))
        self.seconds = counters["seconds"]
        self.peak = counters.pop("peak_gb", 0.0)
        length = counters["log_bytes"]
        del counters["seconds"], counters["log_bytes"]
        if log.exists() and self.writes:
            os.truncate(log, length)
        return StateEntries(path, tensors), counters

    def save(self, tensors: dict[str, torch.Tensor], counters: dict) -> None:
        """Save the state to resume from: {name: tensor} and a dict of plain values."""
        log = self.folder / "log.jsonl"
        counters = {
            **counters,
            "seconds": self.elapsed(),
            "peak_gb": self.peak_gb(),
            "log_bytes": 0,
        }
        if log.exists():
            flush(log)  # a power cut could leave it shorter than the number below
            counters["log_bytes"] = log.stat().st_size
        with atomic_write(self.folder / "state.safetensors") as tmp:
            save_file(
                {k: v.contiguous() for k, v in tensors.items()},
                tmp,
                {"counters": json.dumps(counters)},
            )
        self.saved_at = time.time()

    def should_save(self) -> bool:
        """Return whether the last saved state is older than SAVE_INTERVAL."""
        return self.writes and time.time() - self.saved_at > SAVE_INTERVAL

    def elapsed(self) -> float:
        """Return the seconds that this stage has taken, restarts included."""
        return self.seconds + time.time() - self.began

    def peak_gb(self) -> float:
        """Return the peak memory of this process in GB: the GPU's if it uses one, else its own.

        The memory of the environments' processes is not counted.
        """
        unit = 1 if sys.platform == "darwin" else 1024
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        gpus = range(torch.cuda.device_count())
        gpu = max((torch.cuda.max_memory_allocated(i) for i in gpus), default=0)
        return round(max(self.peak, (gpu or own) / 1e9), 2)

    # --- log

    def log(self, step: int, **values: float) -> None:
        """Add one line to log.jsonl and the same numbers to TensorBoard."""
        if not self.writes:
            return
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(
                json.dumps({"step": step, "seconds": round(self.elapsed(), 1), **values}) + "\n"
            )
        if self.writer is None:
            self.writer = SummaryWriter(self.folder, purge_step=step)
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def finish(self, **summary: object) -> None:
        """Write summary.json, rename the folder to its final name, and remove the state."""
        if self.writer is not None:
            self.writer.close()
        cost = {"seconds": round(self.elapsed(), 1), "peak_gb": self.peak_gb()}
        write_json(self.folder / "summary.json", {**cost, **summary})
        for path in [p for p in self.folder.rglob("*") if not TEMPORARY_FILES.fullmatch(p.name)]:
            flush(path)
        flush(self.folder)
        os.replace(self.folder, self.out)
        flush(self.out.parent)
        self.remove_temporary_files()

    def remove_temporary_files(self) -> None:
        """Remove from the finished folder what only an unfinished stage needs."""
        for path in [p for p in self.out.iterdir() if TEMPORARY_FILES.fullmatch(p.name)]:
            path.unlink()


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, name: str = "opt"
) -> dict[str, torch.Tensor]:
    """Return an optimizer's moments as {"<name>.<parameter>.<moment>": tensor}, ready for safetensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}.{i}.{key}": value for i, moments in state.items() for key, value in moments.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], name: str = "opt"
) -> None:
    """Restore what `optimizer_tensors` returned."""
    state = {}
    for key, value in tensors.items():
        if key.startswith(f"{name}."):
            _, i, moment = key.split(".")
            state.setdefault(int(i), {})[moment] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
