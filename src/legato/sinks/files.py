"""Sinks that are one file of text: JSON lines and CSV."""

import csv
import io
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from legato import storage
from legato.errors import RestoreError, SummaryError
from legato.summaries.values import as_array, is_figure, is_image, refused
from legato.types import JSON, Table, flatten

METRICS = "metrics.jsonl"
CSV = "summaries.csv"

MAX_ARRAY = 64
"""An array of more numbers has no place in a line."""

_PLAIN = {float, int, str, bool, type(None)}
_NOTHING = object()


class _FileSink:
    """A file of lines, which is rewound by its size."""

    def __init__(self, file: storage.Lines) -> None:
        self._file = file

    def flush(self) -> None:
        """See `Sink`."""
        self._file.flush()

    def sync(self) -> None:
        """See `SyncedSink`."""
        self._file.sync()

    def get_state(self) -> JSON:
        """See `Sink`."""
        return self._file.offset

    def set_state(self, state: JSON) -> None:
        """See `Sink`.

        Raises:
            RestoreError: it is no position.
            DamagedError: the file is shorter.
        """
        offset = 0 if state is None else state
        if type(offset) is not int:
            raise RestoreError(f"The saved log positions are {state!r:.80}.")
        self._file.truncate_to(offset)

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()


class JsonLinesSink(_FileSink):
    """`metrics.jsonl`: a record of JSON a line.

    Groups become names such as `group/name`. Numbers, texts, lists and small
    arrays are written; pictures, figures and large arrays have no place here.

    Args:
        run_dir: the directory of the run.

    Attributes:
        refuses: whether what is no summary at all is refused, and not left to
            another sink, which may take it.
    """

    refuses = True

    def __init__(self, run_dir: Path) -> None:
        self._lines = storage.JsonLines(run_dir / METRICS)
        super().__init__(self._lines)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """See `Sink`.

        Raises:
            SummaryError: two values have one name, or one is refused.
        """
        if not _PLAIN.issuperset(map(type, values.values())):
            values = _as_json(values, refuses=self.refuses)
        self._lines.append({"kind": kind, "step": step, **values})

    def write_table(self, kind: str, table: Table) -> None:
        """Write a record of floats for each step: the same lines, quicker."""
        names = "kind", "step", *table.columns
        kinds = itertools.repeat(kind, len(table.steps))
        rows = zip(kinds, table.steps, *table.columns.values(), strict=True)
        self._lines.extend(dict(zip(names, row, strict=False)) for row in rows)


class CsvSink(_FileSink):
    """`summaries.csv`: a row for each number.

    The columns are `kind`, `step`, `name` and `value`. A column for each name
    would have to be added when a name first appears, in rows that are written
    already; in this form the file only grows, and can be rewound.

    Args:
        run_dir: the directory of the run.
    """

    columns = ("kind", "step", "name", "value")

    def __init__(self, run_dir: Path) -> None:
        super().__init__(storage.Lines(run_dir / CSV))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._write(kind, [(step, _as_json(values, refuses=False))])

    def write_table(self, kind: str, table: Table) -> None:
        """Write floats."""
        self._write(kind, table.rows())

    def _write(
        self, kind: str, records: Iterable[tuple[int, Mapping[str, Any]]]
    ) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        if self._file.offset == 0:
            rows.writerow(self.columns)
        for step, values in records:
            for name, value in values.items():
                if isinstance(value, int | float):
                    rows.writerow((kind, step, name, repr(value)))
        # (What is no text in UTF-8 is no text in JSON either.)
        self._file.append_bytes(text.getvalue().encode("utf-8", "replace"))


def _as_json(values: Mapping[str, Any], *, refuses: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in flatten(values):
        if name in found:
            raise SummaryError(
                f"Two values have the name {name!r}, one of them in a group. "
                "Rename one."
            )
        plain = _plain(name, value, refuses)
        if plain is not _NOTHING:
            found[name] = plain
    return found


def _plain(name: str, value: Any, refuses: bool) -> Any:
    """A value as JSON holds it; `_NOTHING` if it has no place in a line.

    Raises:
        SummaryError: it is no summary at all, and that is refused.
    """
    if type(value) in _PLAIN:
        return value
    # Also of NumPy's, and members of enumerations.
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list | tuple):
        items = [_plain(name, each, refuses) for each in value]
        return _NOTHING if _NOTHING in items else items
    if is_figure(value):
        return _NOTHING
    array = as_array(value)
    if array is None or array.dtype.kind in "OSUMm":
        if refuses:
            raise refused(name, value)
        return _NOTHING
    if array.size > MAX_ARRAY or is_image(array):
        return _NOTHING
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype("float64")  # such as bfloat16
        except (TypeError, ValueError):
            return _NOTHING
    return np.asarray(array).tolist()
