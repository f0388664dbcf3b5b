"""
Print a fact that a shell script needs.

    python -m tools.lookup rl-tasks NAME
    python -m tools.lookup config CHECKPOINT image_size
"""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, subcommand

from common.cli import parse


@dataclass
class RLTasks:
    """Print a domain's RL tasks, one a line."""

    domain: Positional[str]  # name of a file in domains/


@dataclass
class Config:
    """Print an entry of a checkpoint's config.json."""

    checkpoint: Positional[str]  # checkpoint folder
    entry: Positional[str]  # name of the entry


Args = Annotated[RLTasks, subcommand("rl-tasks")] | Annotated[Config, subcommand("config")]


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

from common.errors import UserError, run_cli
from common.runs import checkpoint_config
from domains import load_domain


def main(args: Args) -> None:
    if isinstance(args, RLTasks):
        print("\n".join(load_domain(args.domain).RL_TASKS))
    else:
        config = checkpoint_config(args.checkpoint)
        if args.entry not in config:
            raise UserError(
                f"{args.checkpoint}/config.json has no entry {args.entry}: it has {', '.join(config)}"
            )
        print(config[args.entry])


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
