"""Run directories on the command line, and whether their code is imported.

A run directory may come from anywhere. What it names is imported only if the
user says so.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from legato.cli import experiments
from legato.cli.inspecting import printable, read_config
from legato.errors import ConfigError

if TYPE_CHECKING:
    from legato.experiment import Experiment

_IN_PYTHON = {
    "evaluate": (
        'Use legato.evaluate(model, ..., checkpoint="{}") for legato.fit, and '
        "Trainer(...).evaluate() for a Trainer"
    ),
    "export": 'Use legato.export(model, "model.keras", checkpoint="{}")',
}


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that says that a run directory is trusted."""
    parser.add_argument(
        "--trust-run-dir",
        action="store_true",
        help="import the code that the config.yaml in RUN_DIR names",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that says which checkpoint of a run is meant."""
    parser.add_argument(
        "--checkpoint",
        metavar="best|latest|STEP",
        type=_parse_which,
        help=(
            "default: latest, which is what the run ended with, or its newest "
            "intact checkpoint"
        ),
    )


def find_experiment(args: argparse.Namespace, verb: str) -> "Experiment":
    """Finds the experiment of CONFIG, or of RUN_DIR if that is trusted.

    Args:
        args: what was parsed; `run_dir` is filled in for RUN_DIR.
        verb: the command, for messages.

    Raises:
        ConfigError: if there is none, it is not valid, or not trusted.
    """
    from legato.experiment import built_in_names
    from legato.run_directory import CONFIG, RUN

    run_dir = Path(args.config)
    is_run = os.path.lexists(run_dir / RUN)
    # A package may be called as a built-in experiment is.
    if not is_run and not (
        run_dir.is_dir() and args.config not in built_in_names()
    ):
        return experiments.find(args)
    _check_run_dir(run_dir, args, verb)
    args.run_dir = args.config
    args.config = str(run_dir / CONFIG)
    return experiments.find(args)


def _check_run_dir(run_dir: Path, args: argparse.Namespace, verb: str) -> None:
    """Refuses to import what a run directory names, unless it is trusted."""
    from legato.run_directory import CONFIG, RUN

    name_it = f"name the experiment: legato {verb} CONFIG --run-dir {run_dir}"
    if args.run_dir is not None:
        raise ConfigError(
            f"--run-dir={args.run_dir}: {run_dir} is a run directory itself. "
            "Give one of the two."
        )
    if not os.path.lexists(run_dir / RUN):
        raise ConfigError(
            f"{run_dir}: is not the directory of a run: it holds no {RUN}. "
            f"Give one, or {name_it}."
        )
    config = read_config(run_dir / CONFIG)
    if config is None:
        raise ConfigError(
            f"{run_dir}: holds no {CONFIG}, so what its run is made of cannot "
            f"be told: {name_it}."
        )
    if "problem" not in config and "task" not in config:
        raise ConfigError(
            f"{run_dir / CONFIG} names no task: the run was made in Python, "
            "by legato.fit or legato.Trainer, and only there its model can be "
            f"made again. {_IN_PYTHON[verb].format(run_dir)}; or {name_it}."
        )
    if not args.trust_run_dir:
        task = printable(f"{config.get('task', 'what it names')!s:.80}")
        raise ConfigError(
            f"{run_dir}: to {verb} it, the code that its {CONFIG} names must "
            f"be imported ({task}). If you trust whoever wrote it, add "
            f"--trust-run-dir; or {name_it}."
        )


def _parse_which(text: str) -> str | int:
    """Parses best, latest or a step."""
    if text in ("best", "latest"):
        return text
    if text.isascii() and text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}: must be best, latest or a step, such as 100"
    )
