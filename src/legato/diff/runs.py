"""Two run directories: everything that is part of an exact run."""

import dataclasses
import hashlib
import itertools
import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from legato import storage
from legato.checkpoint import FINAL, Checkpoint, load_checkpoint
from legato.checkpoint.format import list_steps, step_name
from legato.checkpoint.store import BEST, CHECKPOINTS
from legato.diff.checkpoints import (
    ABSENT,
    Difference,
    ValueDifference,
    compare_checkpoints,
    compare_values,
)
from legato.diff.events import EVENTS, Series, read_series, show_value
from legato.errors import CheckpointError, DamagedError, RunDirError
from legato.sinks import METRICS, SUMMARIES, TIMING

# Not of the exact run: who trains where and how fast, and what was committed
# when. (What a checkpoint holds is compared, its manifest is not: it names
# the run.)
_OWN = {
    CHECKPOINTS, BEST, FINAL, METRICS, SUMMARIES, TIMING,
    "callbacks.json", "commits.jsonl", "config.yaml", "lock", "run.json",
}  # fmt: skip
_MAX_FILES = 10_000
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One thing that both runs should have alike.

    Attributes:
        name: what it is, such as `step_00000100` or `metrics.jsonl`.
        kind: "checkpoint", "best", "final", "log", "curves" or "file".
        step: of a checkpoint; of a log or a curve, the first step at which it
            differs, where that can be told.
        num_bytes: how many bytes of the first were compared.
        differences: what differs; empty if nothing does.
    """

    name: str
    kind: str
    step: int | None = None
    num_bytes: int = 0
    differences: list[Difference] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunComparison:
    """What `compare_runs` found.

    Attributes:
        compared: everything that was looked at, checkpoints by their steps.
    """

    compared: list[Compared]

    @property
    def differing(self) -> list[Compared]:
        """What is not the same."""
        return [each for each in self.compared if each.differences]

    @property
    def num_bytes(self) -> int:
        """How many bytes were compared."""
        return sum(each.num_bytes for each in self.compared)


def compare_runs(a: Path, b: Path) -> RunComparison:
    """Compares the checkpoints, logs, curves and files of two runs.

    Wall-clock times, run ids and who holds the lock are left out; `.keras`
    files, which hold a date, are compared by what is in them.

    Args:
        a: the directory of a run.
        b: the directory of another.

    Raises:
        RunDirError: one of them has no checkpoints and no logs.
    """
    for run in (a, b):
        if not (run / CHECKPOINTS).is_dir() and not (run / METRICS).is_file():
            raise RunDirError(
                f"{run}: is not the directory of a run: it holds neither "
                f"{CHECKPOINTS}/ nor {METRICS}."
            )
    compared = [
        _compare_saved(step_name(step), "checkpoint", step, *_paths(a, b, step))
        for step in sorted(_steps(a) | _steps(b))
    ]
    for name, kind in ((BEST, "best"), (FINAL, "final")):
        if os.path.lexists(a / name) or os.path.lexists(b / name):
            compared.append(
                _compare_saved(name, kind, None, a / name, b / name)
            )
    compared.append(_compare_metrics(a / METRICS, b / METRICS))
    compared += _compare_files(a, b)
    return RunComparison(compared=compared)


def _steps(run: Path) -> set[int]:
    try:
        return set(list_steps(run / CHECKPOINTS))
    except OSError:
        return set()


def _paths(a: Path, b: Path, step: int) -> tuple[Path, Path]:
    return (
        a / CHECKPOINTS / step_name(step),
        b / CHECKPOINTS / step_name(step),
    )


def _compare_saved(
    name: str, kind: str, step: int | None, a: Path, b: Path
) -> Compared:
    ours, theirs = _load(a), _load(b)
    if isinstance(ours, Checkpoint) and isinstance(theirs, Checkpoint):
        return Compared(
            name=name,
            kind=kind,
            step=ours.step if step is None else step,
            num_bytes=sum(array.nbytes for array in ours.arrays.values())
            + len(json.dumps(ours.host, default=str))
            + sum(map(len, ours.data.values())),
            differences=compare_checkpoints(ours, theirs),
        )
    values = [
        "intact" if isinstance(each, Checkpoint) else each
        for each in (ours, theirs)
    ]
    problem = ValueDifference(path=name, before=values[0], after=values[1])
    return Compared(name=name, kind=kind, step=step, differences=[problem])


def _load(path: Path) -> Any:
    """The checkpoint; what is wrong with it; or that it is not there."""
    if not os.path.lexists(path):
        return ABSENT
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        return f"damaged ({error})"


def _compare_metrics(a: Path, b: Path) -> Compared:
    """Line by line; the step is that of the first line that differs."""
    raw = [_read_text(path) for path in (a, b)]
    size = len(raw[0])
    lines = [_lines(text) for text in raw]
    for k, (ours, theirs) in enumerate(
        itertools.zip_longest(*lines, fillvalue=None)
    ):
        if ours == theirs:
            continue
        records = [_parse(each) for each in (ours, theirs)]
        steps = [
            step
            for record in records
            if isinstance(record, dict)
            and isinstance(step := record.get("step"), int)
        ]
        return Compared(
            name=METRICS,
            kind="log",
            step=min(steps, default=None),
            num_bytes=size,
            differences=[
                *compare_values(records[0], records[1], f"line {k + 1}")
            ]
            # (Written otherwise, but of the same values.)
            or [
                ValueDifference(path=f"line {k + 1}", before=ours, after=theirs)
            ],
        )
    return Compared(name=METRICS, kind="log", num_bytes=size)


def _lines(text: str) -> list[str]:
    """Without `splitlines`, which ends a line within a name of some kinds."""
    *lines, last = text.split("\n")
    return [*lines, last] if last else lines


def _read_text(path: Path) -> str:
    try:
        with storage.open_regular(path) as file:
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    except DamagedError as error:
        return str(error)  # it names the path: no two are the same


def _parse(line: str | None) -> Any:
    if line is None:
        return ABSENT
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _compare_files(a: Path, b: Path) -> Iterator[Compared]:
    """Curves of the run and of callbacks, and other files of callbacks."""
    ours, theirs = _list_files(a), _list_files(b)
    events = {f.parent for f in (*ours, *theirs) if EVENTS in f.name}
    for folder in sorted(events):
        yield _compare_curves(
            str(folder),
            *(
                [
                    run / file
                    for file in sorted(found)
                    if file.parent == folder and EVENTS in file.name
                ]
                for run, found in ((a, ours), (b, theirs))
            ),
        )
    for file in sorted(ours | theirs):
        if EVENTS in file.name:
            continue
        sizes = [
            f"{os.lstat(run / file).st_size} bytes" if file in found else ABSENT
            for run, found in ((a, ours), (b, theirs))
        ]
        difference = ValueDifference(
            path=str(file), before=sizes[0], after=sizes[1]
        )
        same = ABSENT not in sizes and _contents(a / file) == _contents(
            b / file
        )
        yield Compared(
            name=str(file),
            kind="file",
            num_bytes=os.lstat(a / file).st_size if file in ours else 0,
            differences=[] if same else [difference],
        )


def _list_files(run: Path) -> set[Path]:
    """Regular files, by their path in the run, that the engine did not make.

    Event files are among them, also its own.
    """
    found: set[Path] = set()
    for folder, folders, names in os.walk(run):
        place = Path(folder)
        if place == run:
            folders[:] = [n for n in folders if n not in _OWN - {SUMMARIES}]
            names = [n for n in names if n not in _OWN]
        folders[:] = [n for n in folders if not n.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if stat.S_ISREG(os.lstat(place / name).st_mode):
                found.add((place / name).relative_to(run))
            if len(found) > _MAX_FILES:
                raise RunDirError(
                    f"{run}: holds more than {_MAX_FILES} files beside the "
                    "run's own; compare single checkpoints instead."
                )
    return found


def _compare_curves(name: str, a: list[Path], b: list[Path]) -> Compared:
    size = sum(os.lstat(path).st_size for path in a)
    found: list[Difference] = []
    steps: list[int] = []
    read = [_read_or_say(paths) for paths in (a, b)]
    ours, theirs = (each if isinstance(each, dict) else {} for each in read)
    problems = ["intact" if isinstance(each, dict) else each for each in read]
    if problems != ["intact", "intact"]:
        found.append(
            ValueDifference(path=name, before=problems[0], after=problems[1])
        )
    for tag in sorted({*ours, *theirs}):
        difference = _first_difference(tag, ours, theirs)
        if difference is not None:
            steps.append(difference[0])
            found.append(difference[1])
    return Compared(
        name=name,
        kind="curves",
        step=min(steps, default=None),
        num_bytes=size,
        differences=found,
    )


def _read_or_say(paths: list[Path]) -> Series | str:
    try:
        return read_series(paths)
    except (DamagedError, OSError) as error:
        return str(error)


def _first_difference(
    tag: str, ours: Series, theirs: Series
) -> tuple[int, ValueDifference] | None:
    for a, b in itertools.zip_longest(ours.get(tag, ()), theirs.get(tag, ())):
        if a != b:
            step = min(each[0] for each in (a, b) if each is not None)
            before, after = (
                ABSENT
                if each is None
                else f"{show_value(each[1])} at step {each[0]}"
                for each in (a, b)
            )
            return step, ValueDifference(path=tag, before=before, after=after)
    return None


def _contents(path: Path) -> Any:
    """Something that is equal where two files mean the same."""
    if path.suffix == ".keras":
        try:
            with (
                storage.open_regular(path) as file,
                zipfile.ZipFile(file) as archive,
            ):
                # (The metadata hold the date at which it was saved.)
                return sorted(
                    (member.filename, member.file_size, member.CRC)
                    for member in archive.infolist()
                    if member.filename != "metadata.json"
                )
        except (zipfile.BadZipFile, OSError, NotImplementedError):
            pass  # then by its bytes
    digest = hashlib.sha256()
    with storage.open_regular(path) as file:
        for block in iter(_reader(file), b""):
            digest.update(block)
    return digest.hexdigest()


def _reader(file: Any) -> Callable[[], bytes]:
    return lambda: file.read(_BLOCK)
