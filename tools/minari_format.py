"""Minari data sets: import. `args` is that of tools/convert.py."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from common.episode_file import EpisodeInfo
from common.errors import UserError
from common.files import folder_lock
from domains import load_domain
from tools.foreign_episodes import DemoFolder, digest, print_result


def open_minari(name: str):
    """Return a Minari data set, downloaded if it is missing. Raises UserError."""
    try:
        import minari
    except ImportError as error:
        raise UserError(
            "minari is not installed here: pip install -r requirements-dev.txt"
        ) from error
    try:
        return minari.load_dataset(name, download=True)
    except Exception as error:  # noqa: BLE001  the library and the network raise many kinds
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} is not a Minari data set that can be read ({reason}): see minari list remote"
        ) from error


def minari_episodes(args, domain: ModuleType, dataset) -> Iterator[tuple]:
    """Yield (task, image, action, reward) of each expert task in a Minari data set.

    Raises UserError for a data set of another environment.
    """
    for episode in tqdm(
        dataset.iterate_episodes(), desc=args.dataset, total=dataset.total_episodes
    ):
        try:
            found = list(domain.from_minari(episode, args.image_size))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{args.dataset} does not hold episodes of {args.domain}'s environment: observations or actions have "
                f"another form ({error})"
            ) from error
        yield from found


def import_minari(args) -> None:
    """Add the episodes of a Minari data set, with the domain's images and actions."""
    if args.image_size < 1:
        raise UserError(f"--image-size must be at least 1 (got {args.image_size})")
    if not args.domain:
        raise UserError(f"--domain is missing: {args.dataset} names no domain of this project")
    domain = load_domain(args.domain)  # before minari, which would have MuJoCo draw on a screen
    if not hasattr(domain, "from_minari"):
        raise UserError(
            f"domains/{args.domain}.py cannot read Minari's episodes: it has no from_minari"
        )
    dataset = open_minari(args.dataset)
    root = Path(args.data) / args.domain
    folders = {}
    for task, image, action, reward in minari_episodes(args, domain, dataset):
        with folder_lock(root):
            folder = folders.setdefault(task, DemoFolder(root / task))
            info = EpisodeInfo(
                domain=args.domain,
                task=task,
                instruction=domain.INSTRUCTIONS[task],
                source="expert",
                seed=0,
                protocol=domain.PROTOCOL,
                origin=digest(task, action, image).hexdigest(),
            )
            folder.add(image, action.astype(np.float32), reward.astype(np.float32), info)
    if not folders:
        raise UserError(
            f"{args.dataset} shows none of {args.domain}'s expert tasks: nothing was imported"
        )
    for folder in folders.values():
        print_result(args.dataset, folder.folder, folder.added, folder.present, folder.differing)
