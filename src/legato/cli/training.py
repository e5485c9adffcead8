"""`legato train`."""

import argparse
import json
import signal
from typing import Any

from legato.cli import experiments
from legato.cli.inspecting import show_logs
from legato.types import flat_logs


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "train",
        help="train an experiment, or go on with it",
        description=(
            "Trains an experiment. The same command again goes on where the "
            "run was stopped or killed."
        ),
    )
    experiments.add_arguments(parser)
    experiments.add_run_dir(parser)
    parser.add_argument(
        "--mode",
        choices=["train_and_eval", "train", "train_and_post_eval"],
        default="train_and_eval",
        help=(
            "validate as the config says (the default), never, or once at the "
            "end; see legato evaluate for the rest"
        ),
    )
    parser.add_argument(
        "--max-time",
        metavar="T",
        help="stop after T (such as 50min) with everything saved, status 75",
    )
    parser.add_argument(
        "--resume",
        choices=["auto", "must", "never", "override"],
        help="what to do with what is in the run directory (auto)",
    )
    parser.add_argument(
        "--exact",
        choices=["strict", "warn", "off"],
        help="what to do about what cannot be resumed exactly (warn)",
    )
    parser.add_argument(
        "--progress",
        choices=["auto", "rich", "plain", "none"],
        help="a live bar, lines, or nothing (auto)",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved config and exit",
    )
    parser.add_argument(
        "--help-config",
        action=_HelpConfig,
        nargs=0,
        help="show all that can stand in a config and exit",
    )
    return parser


class _HelpConfig(argparse.Action):
    """As --help does: needs no other argument."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # Late: `legato --help` needs none of this.
        from legato.config import Experiment
        from legato.config.reference import describe

        print(describe(Experiment), end="")
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        LegatoError: if the config is wrong, or training fails.
    """
    # Late: `legato --help` needs none of this.
    from legato.config import dump_yaml
    from legato.experiment import run_experiment

    experiment = experiments.find(args, _flags(args))
    if args.print_config:
        print(dump_yaml(experiment), end="")
        return 0
    experiment.trainer.require_length()
    experiment.trainer.require_sinks()
    experiments.prepare(args, experiment)
    with experiments.stoppable(
        (signal.SIGTERM, signal.SIGUSR1),
        "outside of training. Run it again.",
    ):
        result = run_experiment(experiment, args.mode)
    if args.mode == "train_and_post_eval":
        show_logs(flat_logs(result[1]))
    return 0


def _flags(args: argparse.Namespace) -> list[str]:
    """Returns the flags as overrides."""
    overrides = []
    for name in ("max_time", "resume", "exact", "progress"):
        value = getattr(args, name)
        if value is not None:
            # Quoted, "off" stays a word and a name with a colon a name; a
            # plain number of seconds is one.
            number = value.replace(".", "", 1).isdecimal()
            text = value if number else json.dumps(value)
            overrides.append(f"trainer.{name}={text}")
    return overrides
