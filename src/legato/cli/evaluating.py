"""`legato evaluate`: measures a run's checkpoints on its validation data.

It writes nothing into the run directory and takes no lock there. What it
imports is named by the command line or by the user's own CONFIG; by the
`config.yaml` of a run directory only if the user says that it may.
"""

import argparse
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from legato.cli import experiments, trusting
from legato.cli.inspecting import finite, printable, show_logs
from legato.errors import ConfigError
from legato.types import flat_logs

if TYPE_CHECKING:
    from legato.checkpoint import Checkpoint
    from legato.experiment import Experiment

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a run on its validation data",
        description=(
            "Measures a checkpoint of a run, or each one as it appears, on "
            "the validation data. The run may be training meanwhile; nothing "
            "is written into its directory."
        ),
    )
    experiments.add_arguments(
        parser,
        metavar="CONFIG|RUN_DIR",
        config_help=(
            f"{experiments.CONFIG_HELP}; or the directory of a run, with "
            "--trust-run-dir"
        ),
    )
    experiments.add_run_dir(parser)
    trusting.add_checkpoint(parser)
    parser.add_argument(
        "--metric",
        metavar="NAME",
        action="append",
        default=[],
        help=(
            "measure this in place of the task's own metrics, whether or not "
            "training ever did; may be repeated: accuracy, a name in "
            "keras.metrics such as mse or AUC, or package.module:Name"
        ),
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="measure the averages of the weights that the optimizer keeps",
    )
    parser.add_argument(
        "--continuous",
        action="store_true",
        help="measure each checkpoint as it appears, until the run has ended",
    )
    parser.add_argument(
        "--timeout",
        metavar="T",
        type=_parse_seconds,
        help="with --continuous: end when none appeared for T (such as 30min)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object for each checkpoint",
    )
    trusting.add_trust(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        LegatoError: if the config is wrong, or there is nothing to measure.
        Stopped: if a signal ended it.
        Interrupted: if Ctrl-C ended it.
    """
    if args.timeout is not None and not args.continuous:
        raise ConfigError("--timeout is for --continuous: give both.")
    if args.checkpoint is not None and args.continuous:
        raise ConfigError(
            "--checkpoint names one checkpoint, and --continuous measures all: "
            "give one of the two."
        )
    with experiments.stoppable(_SIGNALS, "before all was measured."):
        experiment = trusting.find_experiment(args, "evaluate")
        if args.continuous:
            _measure_all(args, experiment)
        else:
            _measure_one(args, experiment)
    return 0


def _measure_one(args: argparse.Namespace, experiment: "Experiment") -> None:
    # Late, here and below: `legato --help` needs none of this.
    from legato.checkpoint import find_checkpoint

    assert experiment.run_dir is not None  # `resolve` fills it in
    # Before Keras is imported: what is missing is told at once.
    found = find_checkpoint(experiment.run_dir, args.checkpoint)
    trainer, metrics = _build(args, experiment, "eval")
    logs = flat_logs(
        trainer.evaluate(
            checkpoint=found, metrics=metrics, weights=_weights(args)
        )
    )
    if args.json:
        _print_json(found, logs)
        return
    show_logs({"checkpoint": found.path, "step": found.step}, logs)


def _measure_all(args: argparse.Namespace, experiment: "Experiment") -> None:
    from legato.checkpoint import FINAL

    def show(checkpoint: "Checkpoint", nested: dict[str, Any]) -> None:
        logs = flat_logs(nested)
        if args.json:
            _print_json(checkpoint, logs)
            return
        ended = "final, " if checkpoint.path.name == FINAL else ""
        values = ", ".join(f"{name} = {value}" for name, value in logs.items())
        line = f"{ended}step {checkpoint.step}: {values}"
        print(printable(line), flush=True)

    trainer, metrics = _build(args, experiment, "continuous_eval")
    results = trainer.evaluate_continuously(
        metrics=metrics,
        weights=_weights(args),
        timeout=args.timeout,
        on_result=show,
    )
    if FINAL not in results:
        print(
            f"legato: no checkpoint came for {args.timeout:g} seconds, and the "
            "run has not ended.",
            file=sys.stderr,
        )


def _weights(args: argparse.Namespace) -> str:
    return "average" if args.ema else "model"


def _build(
    args: argparse.Namespace, experiment: "Experiment", mode: str
) -> tuple[Any, Any]:
    """Makes the trainer, and the metrics if any were named."""
    from legato.cli.metrics import build_metric
    from legato.experiment import build_trainer

    experiments.prepare(args, experiment)
    metrics = [build_metric(name) for name in args.metric]
    return build_trainer(experiment, mode), metrics or None


def _print_json(checkpoint: "Checkpoint", logs: dict[str, Any]) -> None:
    record = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "results": finite(logs),
    }
    print(json.dumps(record, allow_nan=False), flush=True)


def _parse_seconds(text: str) -> float:
    from legato.config import parse_duration

    if text.isascii() and text.replace(".", "", 1).isdecimal():
        return float(text)
    try:
        return parse_duration(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(
            f"{error}, or seconds such as 90"
        ) from None
