"""How fast training is, beside everything that a user might take instead.

    KERAS_BACKEND=torch python benchmarks/speed [--models mlp ...] [--write]

Each model is measured in a process of its own, and can be measured at another
time: `--write` keeps it in `results/speed`, and makes the table and the picture
of the backend anew from all that are there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report

MODELS = (
    "mlp",
    "tiny-lstm",
    "tiny-transformer",
    "cnn",
    "lstm",
    "transformer",
    "many-variables",
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL",
        help=f"of {', '.join(MODELS)}; all where none is named",
    )  # fmt: skip
    parser.add_argument(
        "--contestants", nargs="+", default=[], metavar="NAME",
        help="beside legato; all where none is named",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of a turn, at least (0.5)"
    )
    parser.add_argument(
        "--write", action="store_true", help="keep it in results/"
    )
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write and arguments.contestants:
        parser.error("--write keeps whole pieces: without --contestants")
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return arguments


def _measure_here(arguments: argparse.Namespace) -> None:
    """In a process for one model."""
    from measure import measure
    from problems import PROBLEMS

    (model,) = arguments.models
    # Not in the main thread: all that train would take the signals there.
    piece = (
        ThreadPoolExecutor(1)
        .submit(
            measure,
            PROBLEMS[model],
            arguments.contestants,
            arguments.rounds,
            arguments.seconds,
        )
        .result()
    )
    arguments.into.write_text(json.dumps(piece))


def main() -> None:
    """Measures what is asked for, and prints a table."""
    arguments = _arguments()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    # What TensorFlow tells of the processor hides the rest.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if arguments.into is not None:
        _measure_here(arguments)
        return
    pieces = []
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder, "piece.json")
        for model in arguments.models:
            command = [
                sys.executable, str(Path(__file__).parent),
                "--models", model,
                "--rounds", str(arguments.rounds),
                "--seconds", str(arguments.seconds),
                "--into", str(into),
            ]  # fmt: skip
            if arguments.contestants:
                command += ["--contestants", *arguments.contestants]
            subprocess.run(command, check=True)
            pieces.append(json.loads(into.read_text()))
            if arguments.write:
                report.keep(pieces[-1])
    print(report.as_text(pieces))
    if arguments.write:
        path = report.write(os.environ["KERAS_BACKEND"], MODELS)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
