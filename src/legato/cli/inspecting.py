"""`legato inspect`: what is in a run directory or a checkpoint.

It imports neither Keras nor any code of the user's, and takes what it reads
for data: the directory may come from anywhere.
"""

import argparse
import datetime
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_DAMAGED = 1  # the exit status
_TAIL_BYTES = 64 * 1024
_CONFIG_BYTES = 256 * 1024


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "inspect",
        help="show what is in a run directory or a checkpoint",
        description=(
            "Shows what is in a run directory or a checkpoint, and checks "
            "every byte of its checkpoints. Status 1 if one is damaged."
        ),
    )
    parser.add_argument("path", metavar="RUN_DIR|CHECKPOINT", type=Path)
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigError: if the path is neither a run directory nor a checkpoint.
        DamagedError: if it is a checkpoint, and damaged.
    """
    report = inspect(args.path)
    if args.json:
        print(json.dumps(finite(report), indent=2, allow_nan=False))
    else:
        _show(report)
    damaged = [
        checkpoint["problem"]
        for checkpoint in (*report.get("checkpoints", ()), report.get("best"))
        if checkpoint is not None and not checkpoint["intact"]
    ]
    for problem in damaged:
        print(f"legato: damaged: {printable(problem)}", file=sys.stderr)
    return _DAMAGED if damaged else 0


def inspect(path: Path) -> dict[str, Any]:
    """Returns what is in a run directory or a checkpoint, as plain data.

    Raises:
        ConfigError: if it is neither.
        DamagedError: if it is a checkpoint, and damaged.
        CheckpointError: if it cannot be read.
    """
    from legato.checkpoint.format import parse_step
    from legato.errors import ConfigError
    from legato.storage.commit import MANIFEST

    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ConfigError(f"{path}: {what}.")
    if (path / "checkpoints").is_dir():
        return _inspect_run(path)
    named_like_one = parse_step(path.resolve().name) is not None
    if named_like_one or (path / MANIFEST).exists():
        return _inspect_checkpoint(path)
    if (path / "config.yaml").is_file():
        return _inspect_run(path)  # it ended before its first checkpoint
    raise ConfigError(
        f"{path}: is neither a run directory (which has checkpoints/) nor a "
        f"checkpoint (which has {MANIFEST})."
    )


def _inspect_run(path: Path) -> dict[str, Any]:
    from legato.checkpoint.format import parse_step

    checkpoints, set_aside = [], []
    directory = path / "checkpoints"
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    for name in names:
        if parse_step(name) is not None:
            checkpoints.append(_check(directory / name))
        elif not name.startswith("."):
            set_aside.append(name)
    best = path / "best"
    run_ids = [each["run_id"] for each in checkpoints if each["intact"]]
    return {
        "kind": "run",
        "path": str(path),
        "run_id": run_ids[-1] if run_ids else None,
        "config": read_config(path / "config.yaml"),
        "checkpoints": checkpoints,
        "set_aside": set_aside,
        "best": _check(best) if best.is_dir() else None,
        "skipped_steps": _skipped_steps(path),
        "last_record": _last_record(path / "metrics.jsonl"),
    }


def _skipped_steps(path: Path) -> list[list[int]] | str:
    """First and last of those that recoveries skipped; or what is wrong."""
    from legato.errors import RunDirError
    from legato.recovery import Recovery

    try:
        return [list(each) for each in Recovery(path, 0).skipped]
    except RunDirError as error:
        return str(error)


def _check(path: Path) -> dict[str, Any]:
    """Checks every byte of a checkpoint; tells instead of raising."""
    from legato.checkpoint import load_checkpoint
    from legato.checkpoint.format import parse_step
    from legato.errors import CheckpointError

    about: dict[str, Any] = {
        "name": path.name,
        "step": parse_step(path.name),
        "run_id": None,
        "bytes": None,
        "date": None,
        "intact": False,
        "problem": None,
    }
    try:
        checkpoint = load_checkpoint(path)
        size, date = _size_and_date(path)
    except CheckpointError as error:
        return {**about, "problem": str(error)}
    return {
        **about,
        "step": checkpoint.step,
        "run_id": checkpoint.run_id,
        "bytes": size,
        "date": date,
        "intact": True,
    }


def _inspect_checkpoint(path: Path) -> dict[str, Any]:
    from legato.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    size, date = _size_and_date(path)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "step": checkpoint.step,
        "run_id": checkpoint.run_id,
        "intact": True,
        "bytes": size,
        "date": date,
        "arrays": [
            {
                "path": name,
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "bytes": array.nbytes,
            }
            for name, array in checkpoint.arrays.items()
        ],
        "data": {name: len(blob) for name, blob in checkpoint.data.items()},
        "host": checkpoint.host,
    }


def _size_and_date(path: Path) -> tuple[int, str]:
    from legato import storage
    from legato.errors import CheckpointError
    from legato.storage.commit import MANIFEST

    manifest = storage.read_manifest(storage.locate(path))
    try:
        written = os.lstat(storage.locate(path) / MANIFEST).st_mtime
    except OSError as error:  # its writer removed it just now
        raise CheckpointError(f"{path}: {error.strerror}") from error
    date = datetime.datetime.fromtimestamp(written)
    return (
        sum(size for size, _ in manifest.files.values()),
        date.isoformat(" ", "seconds"),
    )


def read_config(path: Path) -> dict[str, Any] | None:
    """Reads a config as plain data; None where there is no plain file."""
    from legato.config import parse_yaml
    from legato.errors import ConfigError

    raw = _read_tail(path, _CONFIG_BYTES)
    if raw is None:
        return None
    try:
        return parse_yaml(raw.decode("utf-8", "replace"), path.name).data
    except ConfigError as error:
        return {"problem": str(error)}


def _last_record(path: Path) -> Any:
    """Returns the last whole line of a log; None where there is none."""
    lines = (_read_tail(path, _TAIL_BYTES) or b"").split(b"\n")
    if len(lines) < 2 or not lines[-2]:
        return None
    try:
        # Ordinary JSON, of a few kilobytes at most; see `storage.JsonLines`.
        return json.loads(lines[-2])
    except (ValueError, RecursionError) as error:
        return {"problem": f"{path}: {error}"}


def _read_tail(path: Path, size: int) -> bytes | None:
    """Reads the end of a plain file; None where there is no such file."""
    from legato import storage
    from legato.errors import DamagedError

    try:
        with storage.open_regular(path) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            return file.read(size)
    except (OSError, DamagedError):
        return None


def _show(report: dict[str, Any]) -> None:
    console = make_console()
    if report["kind"] == "run":
        _show_run(report, console)
    else:
        _show_checkpoint(report, console)


def make_console() -> "Console":
    """Where tables are printed."""
    from rich.console import Console

    # Files and pipes have no width: let long names have their line.
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, markup=False)


def _show_run(report: dict[str, Any], console: "Console") -> None:
    _show_pairs(
        console,
        {
            "run directory": report["path"],
            "run id": report["run_id"] or "unknown",
            **_flat(report["config"] or {}, "config"),
        },
    )
    console.print()
    best = report["best"]
    rows = [
        [
            each["name"],
            str(each["step"]),
            _size(each["bytes"]),
            each["date"] or "",
            "intact" if each["intact"] else "DAMAGED",
            "best" if best and best["step"] == each["step"] else "",
        ]
        for each in report["checkpoints"]
    ]
    if rows:
        show_table(
            console,
            ["checkpoint", "step", "size", "written", "state", ""],
            rows,
        )
    else:
        console.print("no checkpoints yet")
    for name in report["set_aside"]:
        console.print(f"set aside: {printable(name)}")
    if best is not None:
        state = f"step {best['step']}" if best["intact"] else "DAMAGED"
        console.print(f"best: {state}")
    skipped = report["skipped_steps"]
    if isinstance(skipped, str):
        console.print(printable(skipped))
    elif skipped:
        steps = ", ".join(f"{first} to {last}" for first, last in skipped)
        console.print(f"skipped by recoveries: steps {steps}")
    if report["last_record"] is not None:
        console.print()
        console.print("last record of metrics.jsonl:")
        _show_pairs(console, _flat(report["last_record"], ""))


def _show_checkpoint(report: dict[str, Any], console: "Console") -> None:
    _show_pairs(
        console,
        {
            "checkpoint": report["path"],
            "step": report["step"],
            "run id": report["run_id"],
            "state": "intact",
            "size": _size(report["bytes"]),
            "written": report["date"],
        },
    )
    console.print()
    arrays = report["arrays"]
    rows = [
        [
            each["path"],
            each["dtype"],
            "x".join(map(str, each["shape"])) or "scalar",
            _size(each["bytes"]),
        ]
        for each in arrays
    ]
    total = _size(sum(each["bytes"] for each in arrays))
    rows.append([f"{len(arrays)} arrays", "", "", total])
    show_table(console, ["array", "dtype", "shape", "size"], rows)
    console.print()
    pairs: dict[str, Any] = {}
    for part, value in report["host"].items():
        # Where the run is and what it ran on are shown whole; the rest of it
        # can be long, and is in --json.
        if part in ("clock", "identity"):
            pairs |= _flat(value, part)
        else:
            pairs[part] = _outline(value)
    for name, size in report["data"].items():
        pairs[f"data/{name}"] = _size(size)
    _show_pairs(console, pairs)


def _show_pairs(console: "Console", pairs: dict[str, Any]) -> None:
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        console.print(f"{printable(name):{width}}  {printable(str(value))}")


def show_table(
    console: "Console", headers: list[str], rows: list[list[str]]
) -> None:
    """Prints a table; what is in it may come from a file."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(
            header,
            justify="right" if header in ("step", "size") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Returns the scalars in nested mappings, by dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else str(key))
    return flat


def _outline(value: Any) -> str:
    """Returns the first level of something long, in one line."""
    if isinstance(value, dict):
        return ", ".join(map(str, value)) or "nothing"
    if isinstance(value, list):
        names = [_name(each) for each in value]
        return ", ".join(filter(None, names)) or f"{len(value)} entries"
    return str(value)


def _name(value: Any) -> str:
    if isinstance(value, dict):
        for key in ("class", "name", "type"):
            if isinstance(value.get(key), str):
                return value[key]
        return ""
    return value if isinstance(value, str) else ""


def printable(text: str) -> str:
    """Makes text that may come from a file harmless to a terminal."""
    return "".join(
        each if each.isprintable() or each == "\n" else repr(each)[1:-1]
        for each in text
    )


def show_logs(*logs: dict[str, Any]) -> None:
    """Prints a line for each value."""
    for name, value in (pair for each in logs for pair in each.items()):
        print(printable(f"{name} = {value}"))


def finite(value: Any) -> Any:
    """Replaces what JSON has no number for by its name."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _size(size: int | None) -> str:
    if size is None:
        return ""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size} B"
