"""What the commands share that run an experiment."""

import argparse
import contextlib
import json
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from legato.errors import Interrupted, Stopped

if TYPE_CHECKING:
    from legato.experiment import Experiment

CONFIG_HELP = (
    "a YAML file, package.module:experiment (also from the working "
    "directory), or a built-in name such as digits"
)


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    metavar: str = "CONFIG",
    config_help: str = CONFIG_HELP,
) -> None:
    """Adds the arguments that say what is run, and on which backend."""
    parser.add_argument("config", metavar=metavar, help=config_help)
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="changes to the config, such as trainer.train_steps=1000",
    )
    parser.add_argument(
        "--backend",
        choices=["jax", "tensorflow", "torch"],
        help=(
            "default: KERAS_BACKEND, then the config's, then the first "
            "installed"
        ),
    )


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that says where."""
    parser.add_argument(
        "--run-dir", metavar="DIR", help="default: runs/ and CONFIG's name"
    )


def find(args: argparse.Namespace, flags: Iterable[str] = ()) -> "Experiment":
    """Finds the experiment that the arguments name.

    Args:
        args: what was parsed.
        flags: overrides that come from flags, and so go last.

    Raises:
        ConfigError: if there is no such experiment, or it is not valid.
    """
    # Late, here and below: `legato --help` needs none of this.
    from legato.backend_choice import activate_backend, choose_backend
    from legato.experiment import resolve

    overrides = list(args.overrides)
    if args.run_dir is not None:
        overrides.append(run_dir_override(args.run_dir))
    # A module that holds an experiment may import Keras, which then must find
    # its backend chosen, although the experiment itself has not been heard.
    guessed = ":" in args.config and not os.environ.get("KERAS_BACKEND")
    if guessed:
        activate_backend(choose_backend(args.backend))
    experiment = resolve(args.config, [*overrides, *flags])
    if guessed:
        del os.environ["KERAS_BACKEND"]
    return experiment


def run_dir_override(run_dir: str | os.PathLike[str]) -> str:
    """Returns a run directory as an override of the config."""
    return f"run_dir={json.dumps(str(run_dir))}"


def prepare(args: argparse.Namespace, experiment: "Experiment") -> None:
    """Chooses the backend, before Keras is imported.

    Raises:
        BackendError: if it is not installed, or comes too late.
    """
    from legato.backend_choice import activate_backend, choose_backend

    activate_backend(choose_backend(args.backend, experiment.backend))
    _quieten_libraries()


@contextlib.contextmanager
def stoppable(signals: Iterable[signal.Signals], why: str) -> Iterator[None]:
    """While active, and until others take the signals over: they stop it.

    Importing a backend takes seconds, and a scheduler that stops the process
    then should start it again too.

    Args:
        signals: which.
        why: what to say after the signal's name.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        message = f"{signal.Signals(number).name} {why}"
        raise (Interrupted if number == signal.SIGINT else Stopped)(message)

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quieten_libraries() -> None:
    """Keeps notes about hardware that is not there from hiding ours.

    Errors still show. A program that uses legato as a library decides this
    itself, so it is done here alone.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("absl", "jax._src.xla_bridge", "tensorflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
