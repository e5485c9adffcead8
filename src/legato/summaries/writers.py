"""The writer that is current, and the functions that write to it."""

import contextlib
import contextvars
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any

from legato.errors import SummaryError
from legato.summaries import values as kinds
from legato.summaries.events import EventFile, clean_tag
from legato.summaries.worker import Worker
from legato.types import Table

_writer: contextvars.ContextVar["SummaryWriter | None"] = (
    contextvars.ContextVar("legato_summary_writer", default=None)
)
_step: contextvars.ContextVar[Callable[[], int | None]] = (
    contextvars.ContextVar("legato_summary_step", default=lambda: None)
)


_MAX_STEP = 2**63 - 1
"""What an event's step holds."""


class SummaryWriter:
    """Writes the summaries of one directory; made by a `SummaryManager`.

    Args:
        file: the event file.
        worker: converts what takes long, in order.
    """

    def __init__(self, file: EventFile, worker: Worker) -> None:
        self._file = file
        self._worker = worker
        self._names: dict[str, str] = {}  # by the tags that they become
        self._seen: set[tuple[str, ...]] = set()

    @contextlib.contextmanager
    def as_default(self) -> Iterator["SummaryWriter"]:
        """While active: `legato.summaries.scalar` and others write here."""
        token = _writer.set(self)
        try:
            yield self
        finally:
            _writer.reset(token)

    def write(self, step: int, prepared: kinds.Prepared, name: str) -> None:
        """Write a value, at once or when what was given before is written.

        Raises:
            SummaryError: see `write_table`.
        """
        self._check_names((name,))
        now = time.time()
        if prepared.is_quick and self._worker.is_idle:
            self._file.write(now, step, prepared.make())
            return

        def convert() -> None:
            try:
                values = prepared.make()
            except Exception as error:
                raise SummaryError(
                    f"The summary {name!r} of step {step} could not be made, "
                    f"and is left out: {type(error).__name__}: {error}"
                ) from error
            self._file.write(now, step, values)

        self._worker.submit(convert)

    def write_table(self, table: Table) -> None:
        """Write floats, those of a step in one event.

        Raises:
            SummaryError: TensorBoard would take two names for one.
        """
        self._check_names(tuple(table.columns))
        now = time.time()
        if self._worker.is_idle:
            self._file.write_table(now, table)
        else:
            self._worker.submit(lambda: self._file.write_table(now, table))

    def _check_names(self, names: tuple[str, ...]) -> None:
        if names in self._seen:  # the same ones come again and again
            return
        for name in names:
            tag = clean_tag(name)
            if not tag:
                raise SummaryError(
                    f"The summary {name!r} has no name that TensorBoard shows: "
                    "slashes at its beginning are dropped. Rename it."
                )
            other = self._names.setdefault(tag, name)
            if other != name:
                raise SummaryError(
                    f"The summaries {other!r} and {name!r} would be one: "
                    f"TensorBoard takes both for {tag!r}, since only letters, "
                    "digits and -_./ are kept. Rename one of them."
                )
        self._seen.add(names)


@contextlib.contextmanager
def as_step(step: int | Callable[[], int]) -> Iterator[None]:
    """While active: the step of summaries that are written without one.

    Args:
        step: the step, or what returns it whenever it is asked.
    """
    token = _step.set(step if callable(step) else lambda: step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> int | None:
    """The step that a run is at; None outside of one."""
    return _step.get()()


def scalar(name: str, value: Any, step: int | None = None) -> None:
    """Write a number to the current writer: a point of a curve.

    Args:
        name: of the curve.
        value: a number, or an array or tensor of shape [].
        step: of the point; None is that of the run that has it written.

    Raises:
        SummaryError: it is no number, or no writer is current.
    """
    _write(name, kinds.prepare_scalar(name, value), step)


def text(name: str, value: str, step: int | None = None) -> None:
    """Write a text, shown as Markdown, to the current writer.

    Args:
        name: of the text.
        value: the text.
        step: see `scalar`.

    Raises:
        SummaryError: it is no text, or no writer is current.
    """
    _write(name, kinds.prepare_text(name, value), step)


def image(
    name: str,
    value: Any,
    step: int | None = None,
    max_images: int = kinds.MAX_IMAGES,
) -> None:
    """Write a picture, or several, to the current writer.

    Args:
        name: of the picture; several are `name/0`, `name/1` and so on.
        value: of shape [H, W, C] or [N, H, W, C] with C of 1, 3 or 4; of
            uint8, or floats from 0 to 1. It is copied.
        step: see `scalar`.
        max_images: of several pictures, the first so many.

    Raises:
        SummaryError: it is no picture, Pillow is not installed, or no writer
            is current.
    """
    _write(name, kinds.prepare_image(name, value, max_images), step)


def histogram(
    name: str, value: Any, step: int | None = None, bins: int = kinds.BINS
) -> None:
    """Write how numbers are distributed to the current writer.

    Args:
        name: of the histogram.
        value: numbers in any shape; those that are not finite are left out.
            It is copied.
        step: see `scalar`.
        bins: how many buckets of one width.

    Raises:
        SummaryError: they are no numbers, or no writer is current.
    """
    _write(name, kinds.prepare_histogram(name, value, bins), step)


def figure(name: str, value: Any, step: int | None = None) -> None:
    """Write a Matplotlib figure as a picture to the current writer.

    The figure is the summaries' from then on: it is closed, and drawn in the
    background. Make a new one for each summary, and leave it alone.

    Args:
        name: of the picture.
        value: the figure.
        step: see `scalar`.

    Raises:
        SummaryError: it is no figure, was given before, or no writer is
            current.
    """
    _write(name, kinds.prepare_figure(name, value), step)


def by_type(name: str, value: Any, step: int | None = None) -> None:
    """Write a value to the current writer as its type and shape say.

    A number or an array of shape [] is a scalar; a str is a text; an array of
    uint8 or floats of shape [H, W, C] or [N, H, W, C] with C of 1, 3 or 4 is
    a picture, or several; another array of numbers is a histogram; a
    Matplotlib Figure is a figure.

    Args:
        name: of the summary.
        value: the value.
        step: see `scalar`.

    Raises:
        SummaryError: the value is none of these, or no writer is current.
    """
    _write(name, kinds.prepare(name, value), step)


def as_step_number(step: Any, where: str) -> int:
    """A step: a whole number, what a function returns, or a variable's.

    Raises:
        SummaryError: it is none of these.
    """
    value: Any = step() if callable(step) else step
    array = kinds.as_array(value)
    try:
        if isinstance(value, bool):
            raise TypeError
        # (A variable may be of floats.)
        number = operator.index(value) if array is None else int(array)
        whole = array is None or number == array
        if not (whole and 0 <= number <= _MAX_STEP):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise SummaryError(
            f"{where}={step!r:.80} gives {value!r:.80}: it must be a step, a "
            "whole number of at least 0 and below 2**63; or a function that "
            "returns one; or a keras.Variable that holds one."
        ) from None
    return number


def _write(name: str, prepared: kinds.Prepared, step: int | None) -> None:
    writer = _writer.get()
    if writer is None:
        raise SummaryError(
            f"The summary {name!r} has nowhere to go: no writer is current. "
            "Call it in the summary_fn of a SummaryManager, or within `with "
            "manager.summary_writer().as_default():`."
        )
    at = current_step() if step is None else as_step_number(step, "step")
    if at is None:
        raise SummaryError(
            f"The summary {name!r} has no step, and no run has it written: "
            "give step=..."
        )
    writer.write(at, prepared, name)
