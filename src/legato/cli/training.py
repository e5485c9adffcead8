"""`legato train`."""

import argparse
import contextlib
import json
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from legato.errors import Stopped


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
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help=(
            "a YAML file, package.module:experiment (also from the working "
            "directory), or a built-in name such as digits"
        ),
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="changes to the config, such as trainer.train_steps=1000",
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="default: runs/ and CONFIG's name"
    )
    parser.add_argument(
        "--backend",
        choices=["jax", "tensorflow", "torch"],
        help=(
            "default: KERAS_BACKEND, then the config's, then the first "
            "installed"
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
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        LegatoError: if the config is wrong, or training fails.
    """
    # Late, here and below: `legato --help` needs none of this.
    from legato.backend_choice import activate_backend, choose_backend
    from legato.config import dump_yaml
    from legato.experiment import resolve, run_experiment

    # A module that holds an experiment may import Keras, which then must find
    # its backend chosen, although the experiment itself has not been heard.
    guessed = ":" in args.config and not os.environ.get("KERAS_BACKEND")
    if guessed:
        activate_backend(choose_backend(args.backend))
    experiment = resolve(args.config, _all_overrides(args))
    if guessed:
        del os.environ["KERAS_BACKEND"]
    if args.print_config:
        print(dump_yaml(experiment), end="")
        return 0
    experiment.trainer.require_length()
    activate_backend(choose_backend(args.backend, experiment.backend))
    _quieten_libraries()
    with _stoppable_while_starting():
        run_experiment(experiment)
    return 0


@contextlib.contextmanager
def _stoppable_while_starting() -> Iterator[None]:
    """Until training takes the signals over: stop with the status for it.

    Importing a backend takes seconds, and a scheduler that stops the process
    then should start it again too.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        raise Stopped(f"{name} before training began. Run it again.")

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _all_overrides(args: argparse.Namespace) -> list[str]:
    """Returns the overrides and, after them, the flags in their form."""
    overrides = list(args.overrides)
    if args.run_dir is not None:
        overrides.append(f"run_dir={json.dumps(args.run_dir)}")
    for name in ("max_time", "resume", "exact", "progress"):
        value = getattr(args, name)
        if value is not None:
            # Quoted, "off" stays a word and a name with a colon a name; a
            # plain number of seconds is one.
            number = value.replace(".", "", 1).isdecimal()
            text = value if number else json.dumps(value)
            overrides.append(f"trainer.{name}={text}")
    return overrides


def _quieten_libraries() -> None:
    """Keeps notes about hardware that is not there from hiding ours.

    Errors still show. A program that uses legato as a library decides this
    itself, so it is done here alone.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("absl", "jax._src.xla_bridge", "tensorflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
