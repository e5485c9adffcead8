"""`legato diff`: what differs between two checkpoints, or two runs.

It imports neither Keras nor any code of the user's, and takes what it reads
for data: the directories may come from anywhere.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from legato.cli.inspecting import finite, make_console, printable, show_table

if TYPE_CHECKING:
    from legato.diff import Compared, Difference

_DIFFERS = 1  # the exit status
_SHOWN = 12  # differences of one checkpoint, unless all are asked for


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "diff",
        help="show what differs between two checkpoints, or two runs",
        description=(
            "Compares two checkpoints, or all that two run directories hold, "
            "byte by byte. Status 1 if anything differs."
        ),
    )
    for name in ("a", "b"):
        parser.add_argument(name, metavar="RUN_DIR|CHECKPOINT", type=Path)
    parser.add_argument(
        "--all", action="store_true", help="show every difference, however many"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigError: if a path is neither a run directory nor a checkpoint, or
            one is the one and the other the other.
        CheckpointError: if a checkpoint is damaged, or cannot be read.
    """
    from legato.errors import ConfigError

    a, b = _is_checkpoint(args.a), _is_checkpoint(args.b)
    if a != b:
        one, other = (args.a, args.b) if a else (args.b, args.a)
        raise ConfigError(
            f"{one} is a checkpoint, and {other} the directory of a run: give "
            "two of one kind, such as "
            f"{other}/checkpoints/{one.resolve().name}."
        )
    compared = _compare(args.a, args.b, checkpoints=a)
    if args.json:
        print(json.dumps(finite(_as_json(compared)), indent=2, allow_nan=False))
    else:
        _show(compared, every=args.all)
    return _DIFFERS if any(each.differences for each in compared) else 0


def _is_checkpoint(path: Path) -> bool:
    from legato.checkpoint.format import parse_step
    from legato.checkpoint.store import CHECKPOINTS
    from legato.errors import ConfigError
    from legato.run_directory import RUN
    from legato.storage.commit import MANIFEST

    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ConfigError(f"{path}: {what}.")
    if (path / CHECKPOINTS).is_dir() or (path / RUN).exists():
        return False
    named_like_one = parse_step(path.resolve().name) is not None
    if named_like_one or (path / MANIFEST).exists():
        return True
    raise ConfigError(
        f"{path}: is neither a run directory (which has {CHECKPOINTS}/) nor a "
        f"checkpoint (which has {MANIFEST})."
    )


def _compare(a: Path, b: Path, *, checkpoints: bool) -> "list[Compared]":
    from legato.checkpoint import load_checkpoint
    from legato.diff import Compared, compare_checkpoints, compare_runs

    if not checkpoints:
        return compare_runs(a, b).compared
    ours, theirs = load_checkpoint(a), load_checkpoint(b)
    return [
        Compared(
            name=f"{a} and {b}",
            kind="checkpoint",
            step=ours.step,
            num_bytes=sum(array.nbytes for array in ours.arrays.values()),
            differences=compare_checkpoints(ours, theirs),
        )
    ]


def _as_json(compared: "list[Compared]") -> dict[str, Any]:
    return {
        "differs": any(each.differences for each in compared),
        "compared": [
            {
                "name": each.name,
                "kind": each.kind,
                "step": each.step,
                "bytes": each.num_bytes,
                "differences": [d.to_json() for d in each.differences],
            }
            for each in compared
        ],
    }


def _show(compared: "list[Compared]", *, every: bool) -> None:
    console = make_console()
    differing = [each for each in compared if each.differences]
    if not differing:
        total = sum(each.num_bytes for each in compared)
        console.print(
            f"Nothing differs: {len(compared)} things, {total:,} bytes."
        )
        return
    if len(compared) > 1:
        rows = [[each.name, _first(each.differences)] for each in compared]
        show_table(console, ["", "first difference"], rows)
    # Of what is later than the first checkpoint that differs, all follows.
    saved = [each for each in differing if each.kind == "checkpoint"]
    for each in differing if every else (saved or differing)[:1]:
        show_differences(console, each, every=every)


def _first(differences: "list[Difference]") -> str:
    if not differences:
        return "none"
    first = f"{differences[0].path}: {differences[0]}"
    more = len(differences) - 1
    return f"{first}; and {more} more" if more else first


def show_differences(
    console: Any, compared: "Compared", *, every: bool
) -> None:
    """A table of what differs in one thing."""
    console.print(f"\n{printable(compared.name)}:")
    shown = compared.differences if every else compared.differences[:_SHOWN]
    show_table(
        console, ["", "difference"], [[each.path, str(each)] for each in shown]
    )
    left = len(compared.differences) - len(shown)
    if left:
        console.print(f"... and {left} more (--all shows them)")
