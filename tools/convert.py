"""
Import LeRobot and Minari data sets into D_e, and export episodes to LeRobot.

An imported episode's header holds a digest of its source, so a data set is recognized under any
name or path, and two data sets of one name stay two data sets. Export followed by import is
lossless. LeRobot needs a Python environment of its own (docs/data.md).

    python -m tools.convert import --from minari --dataset USER/DATASET --domain NAME
    python -m tools.convert import --from lerobot --dataset USER/DATASET --domain NAME --task TASK
    python -m tools.convert export --to lerobot --data runs/D_e/NAME --out FOLDER
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg, subcommand

from common.cli import parse


@dataclass
class Import:
    """Add a data set's episodes to D_e, where they count among a task's demonstrations."""

    dataset: str  # LeRobot: a folder or hub name; Minari: a data set's name
    source: Annotated[Literal["lerobot", "minari"], arg(name="from")]  # format of the data set
    domain: str = ""  # name of a file in domains/; not needed for what `export` wrote
    data: str = "runs/D_e"  # folder of the expert episodes; for an export, that of its --data
    task: str = ""  # LeRobot: expert task of the episodes; not needed for an export
    instruction: tuple[str, ...] = ()  # LeRobot: instructions of the episodes to import
    image_size: int = 64  # pixels of the square image; what `export` wrote keeps its own
    image_key: str = ""  # LeRobot: name of the camera (default: the only one)
    action_key: str = "action"  # LeRobot: name of the action
    scale: tuple[float, ...] = ()  # LeRobot: divisor of the action, or one for each dimension
    clip: bool = False  # LeRobot: clip actions to [-1, 1], as an environment does
    action_dim: int = (
        # LeRobot: dimensions of the domain's action, if the domain cannot be loaded in this
        # environment.
        0
    )


@dataclass
class Export:
    """Write episodes as a LeRobot data set (version 3, images as PNG), which `import` reads back unchanged."""

    out: str  # folder to write
    data: str  # folder of the episodes, at any depth: a domain's D_e, a task's, or a run's D_rl
    to: Literal["lerobot"] = "lerobot"  # format to write
    fps: int = 10  # environment steps a second, which LeRobot records and this project does not use


Args = Annotated[Import, subcommand("import")] | Annotated[Export, subcommand("export")]


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

from common.errors import run_cli
from tools.lerobot_format import export_lerobot, import_lerobot
from tools.minari_format import import_minari


def main(args: Import | Export) -> None:
    if isinstance(args, Export):
        export_lerobot(args)
    elif args.source == "minari":
        import_minari(args)
    else:
        import_lerobot(args)


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
