"""`legato profile`: what a step costs, and what everything else adds."""

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from legato.cli import experiments
from legato.cli.inspecting import finite, make_console, printable


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "profile",
        help="show what metrics, data, callbacks and saving cost",
        description=(
            "Measures the bare training step of an experiment, and what each "
            "metric, the data, each callback, summaries, validation and "
            "checkpoints add to it. Trains nothing, and touches no run."
        ),
    )
    experiments.add_arguments(parser)
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        default=30.0,
        help="about how long to take (default: 30)",
    )
    parser.add_argument(
        "--budget",
        metavar="SHARE",
        help=(
            "show at which interval each part costs at most this share of the "
            "bare step, such as 1%% or 0.01"
        ),
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw it, as .png, .svg or .pdf",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        LegatoError: if an argument or the config is wrong, or a step fails.
    """
    # Late, all of it: `legato --help` needs none of this.
    from legato.experiment import build_callbacks, build_task
    from legato.profiling import chart, limits, profile

    limits.check_seconds(args.seconds)
    if args.budget is not None:
        limits.parse_budget(args.budget)
    if args.plot is not None:
        chart.check_picture(args.plot)
    args.run_dir = None
    experiment = experiments.find(args)
    experiment.trainer.require_length()
    experiments.prepare(args, experiment)

    def say(text: str) -> None:
        print(f"legato: {printable(text)}", file=sys.stderr, flush=True)

    with (
        # So that what was written for it is removed.
        experiments.stoppable(
            (signal.SIGTERM,), "while measuring. Run it again."
        ),
        # What callbacks print is no part of the result.
        contextlib.redirect_stdout(sys.stderr),
    ):
        result = profile(
            build_task(experiment),
            config=experiment.trainer,
            callbacks=build_callbacks(experiment),
            seconds=args.seconds,
            say=say,
        )
    if args.json:
        report = result.to_json()
        if args.budget is not None:
            report["intervals"] = result.intervals(args.budget)
        print(json.dumps(finite(report), indent=2, allow_nan=False))
    else:
        chart.show(result, make_console(), args.budget)
    if args.plot is not None:
        result.plot(args.plot)
        say(f"drawn: {args.plot}")
    return 0
