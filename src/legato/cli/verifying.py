"""`legato verify`: kills an experiment, and compares every bit."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from legato.cli import experiments
from legato.cli.diffing import show_differences
from legato.cli.inspecting import finite, make_console, printable, show_table

if TYPE_CHECKING:
    from legato.verify import Verdict

_DIFFERS = 1  # the exit status


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "verify",
        help="prove that an experiment resumes exactly",
        description=(
            "Trains an experiment in peace, and once more through SIGKILLs "
            "at random instants, resuming each time in a new process; then "
            "compares every checkpoint, log and curve. Status 1, and why, if "
            "anything differs."
        ),
    )
    experiments.add_arguments(parser)
    parser.add_argument(
        "--kills", metavar="N", type=int, default=5, help="default: 5"
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=int,
        default=0,
        help="of the instants (default: 0)",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=int,
        help="train so many steps only, in place of the config's",
    )
    parser.add_argument(
        "--keep",
        metavar="DIR",
        type=Path,
        help="keep the runs and what was met there, in a new directory",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of text"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigError: if the config is wrong.
        VerifyError: if an argument is wrong.
    """
    from legato.backend_choice import choose_backend
    from legato.verify import Target, verify

    overrides = list(args.overrides)
    if args.steps is not None:
        overrides += [
            "trainer.epochs=null",
            f"trainer.train_steps={args.steps}",
        ]
    args.overrides, args.run_dir = overrides, None
    # What is wrong with the config shows here, and not in five processes.
    experiment = experiments.find(args)
    experiment.trainer.require_length()
    backend = choose_backend(args.backend, experiment.backend)

    def say(text: str) -> None:
        print(f"legato: {printable(text)}", file=sys.stderr, flush=True)

    verdict = verify(
        Target(config=args.config, overrides=tuple(overrides), backend=backend),
        kills=args.kills,
        seed=args.seed,
        work=args.keep,
        say=say,
    )
    if args.json:
        report = finite(_as_json(verdict))
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _show(verdict, f"{args.config} on {backend}")
    return 0 if verdict.is_exact else _DIFFERS


def _show(verdict: "Verdict", what: str) -> None:
    console = make_console()
    if verdict.comparison is not None:
        _show_certificate(verdict, what, console)
    if verdict.failure is not None:
        console.print(f"\nNOT VERIFIED: {printable(verdict.failure)}")
    elif verdict.first is not None:
        _show_first(verdict, console)
    elif verdict.causes:
        console.print(
            "\nNOT VERIFIED: nothing differs this time, but it may another."
        )
    if verdict.causes:
        console.print("\nLikely cause:")
    for cause in verdict.causes[:3]:
        console.print(f"  {printable(cause.what)}.")
        if cause.remedy:
            console.print(f"  -> {printable(cause.remedy)}")


def _show_certificate(verdict: "Verdict", what: str, console: Any) -> None:
    from legato.verify import describe_kill

    comparison = verdict.comparison
    assert comparison is not None
    rows = []
    for kind in dict.fromkeys(each.kind for each in comparison.compared):
        those = [each for each in comparison.compared if each.kind == kind]
        differing = sum(bool(each.differences) for each in those)
        size = sum(each.num_bytes for each in those)
        rows.append([kind, str(len(those)), f"{size:,}", str(differing)])
    console.print(f"{printable(what)}: {verdict.last_step} steps")
    show_table(console, ["compared", "number", "bytes", "differ"], rows)
    console.print(f"killed {len(verdict.kills)} times:")
    for kill in verdict.kills:
        console.print(f"  {describe_kill(kill)}")
    if verdict.is_exact:
        console.print(
            f"\nEXACT: {comparison.num_bytes:,} bytes compared, 0 differ."
        )


def _show_first(verdict: "Verdict", console: Any) -> None:
    from legato.diff import Compared

    first = verdict.first
    assert first is not None
    console.print(
        f"\nDIFFERS first {first.where}, in "
        f"{printable(', '.join(first.parts[:4]))}"
        f"{' and more' if len(first.parts) > 4 else ''}."
    )
    if verdict.is_repeatable is False:
        console.print("Two runs in peace differ too.")
    found = Compared(
        name=first.name, kind="checkpoint", differences=first.differences
    )
    show_differences(console, found, every=False)


def _as_json(verdict: "Verdict") -> dict[str, Any]:
    comparison, first = verdict.comparison, verdict.first
    return {
        "exact": verdict.is_exact,
        "last_step": verdict.last_step,
        "kills": [
            {
                "phase": kill.phase.name.lower(),
                "step": kill.step,
                "is_writing": kill.is_writing,
            }
            for kill in verdict.kills
        ],
        "bytes": comparison.num_bytes if comparison else 0,
        "failure": verdict.failure,
        "repeatable": verdict.is_repeatable,
        "first_difference": first
        and {
            "step": first.step,
            "after": first.after,
            "name": first.name,
            "parts": first.parts,
            "differences": [each.to_json() for each in first.differences],
        },
        "causes": [
            {"what": cause.what, "remedy": cause.remedy}
            for cause in verdict.causes
        ],
    }
