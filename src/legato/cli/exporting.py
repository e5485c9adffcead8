"""`legato export`: writes a run's model for plain Keras."""

import argparse
from pathlib import Path
from typing import Any

from legato.cli import experiments, trusting
from legato.cli.inspecting import printable

_FORMATS = ("keras", "weights")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "export",
        help="write a run's model for plain Keras",
        description=(
            "Writes the model of a run, with the weights of one of its "
            "checkpoints, to a file that plain Keras loads. The run may be "
            "training meanwhile; nothing is written into its directory."
        ),
    )
    experiments.add_arguments(
        parser,
        metavar="CONFIG|RUN_DIR|CHECKPOINT",
        config_help=(
            f"{experiments.CONFIG_HELP}; or the directory of a run, or of one "
            "of its checkpoints, with --trust-run-dir"
        ),
    )
    experiments.add_run_dir(parser)
    trusting.add_checkpoint(parser)
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the averages of the weights that the optimizer keeps",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        help="the model (.keras), or its weights alone (.weights.h5)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: the name of the run directory, in the working directory",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FILE if it is there"
    )
    trusting.add_trust(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        LegatoError: if the config is wrong, or there is nothing to export.
    """
    # Late, here and below: `legato --help` needs none of this.
    from legato.checkpoint import enclosing_run, find_checkpoint
    from legato.errors import ConfigError

    place = None
    run_dir = enclosing_run(Path(args.config))
    if run_dir is not None:
        if args.checkpoint is not None:
            raise ConfigError(
                f"--checkpoint={args.checkpoint}: {args.config} is a "
                "checkpoint itself. Give one of the two."
            )
        place, args.config = args.config, str(run_dir)
    experiment = trusting.find_experiment(args, "export")
    assert experiment.run_dir is not None  # `resolve` fills it in
    # Before Keras is imported: what is missing is told at once.
    found = find_checkpoint(place or experiment.run_dir, args.checkpoint)
    experiments.prepare(args, experiment)

    from legato.experiment import build_model
    from legato.exporting import FORMATS, export

    output = args.output
    if output is None:
        suffix = FORMATS[args.format or "keras"]
        output = f"{Path(experiment.run_dir).resolve().name}{suffix}"
    elif args.format and not output.endswith(FORMATS[args.format]):
        raise ConfigError(
            f"--output={output}: with --format={args.format} its name must end "
            f"in {FORMATS[args.format]}."
        )
    files = export(
        build_model(experiment),
        output,
        checkpoint=found,
        weights="average" if args.ema else "model",
        overwrite=args.overwrite,
    )
    for file in files:
        print(printable(f"{file}: step {found.step} of {found.path}"))
    return 0
