"""How a run shows what it is doing: a live bar, plain lines, or nothing.

Everything goes to standard error, so that standard output stays free for
results. No thread draws: a bar moves when a loop ends, and what it shows
was fetched from the device anyway.
"""

import collections
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
)
from rich.text import Text

from legato.types import Logs

ProgressMode = Literal["auto", "rich", "plain", "none"]

# The rate is that of the last seconds: the first loop holds a compilation,
# and a mean over the whole run would carry it along for an hour.
_RATE_WINDOW_SECONDS = 30.0
_REDRAW_SECONDS = 0.1

# A closed terminal or a full disk under a log is no reason to stop training.
_LOST_TERMINAL = contextlib.suppress(OSError)

VERBOSE = {"none": 0, "plain": 2}
"""What Keras calls how progress is shown; the others are 1."""


class ProgressReporter(Protocol):
    """What the trainer tells about a run, on the host and between loops."""

    def start(
        self,
        total_steps: int | None,
        initial_step: int = 0,
        description: str = "",
        epochs: int | None = None,
    ) -> None:
        """Begins a run at `initial_step`; a total of None is not known."""
        ...

    def update(self, step: int, logs: Logs) -> None:
        """Tells that `step` steps are done; cheap enough for every loop."""
        ...

    def message(self, text: str) -> None:
        """Shows a line of text."""
        ...

    def validation(self, step: int, logs: Logs) -> None:
        """Shows the results of a validation."""
        ...

    def epoch(self, epoch: int, step: int, logs: Logs) -> None:
        """Shows the results of an epoch; the first one to end is 1."""
        ...

    def finish(self, step: int, reason: str = "done") -> None:
        """Ends the display; more calls of it do nothing."""
        ...


def make_reporter(
    mode: ProgressMode = "auto",
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    interval: float = 10.0,
) -> ProgressReporter:
    """Makes the reporter for a mode.

    Args:
        mode: "rich" for a live bar, "plain" for lines, "none" for nothing,
            and "auto" for a bar on a terminal or in a notebook, and else
            lines.
        stream: where to write; standard error by default.
        clock: tells seconds.
        interval: seconds between two plain lines.
    """
    if mode == "none":
        return _Silent()
    target: TextIO = stream or sys.stderr
    if mode != "plain":
        console = _Console(file=target)
        live = console.is_jupyter or (
            console.is_terminal and not console.is_dumb_terminal
        )
        if mode == "rich" or live:
            return _Bar(console, clock)
    return _Lines(target, clock, interval)


class _Silent:
    def start(self, total_steps, initial_step=0, description="", epochs=None):
        pass

    def update(self, step, logs):
        pass

    def message(self, text):
        pass

    def validation(self, step, logs):
        pass

    def epoch(self, epoch, step, logs):
        pass

    def finish(self, step, reason="done"):
        pass


class _Pace:
    """Steps per second over the last while, and the time that is left."""

    def __init__(self, total: int | None, step: int, now: float) -> None:
        self.total = total
        self.began = now
        self._seen = collections.deque([(now, step)])

    def add(self, step: int, now: float) -> None:
        self._seen.append((now, step))
        # The newest one that is old enough stays, so that the span never
        # falls short of the window where there is more to go by.
        while len(self._seen) > 2 and (
            now - self._seen[1][0] >= _RATE_WINDOW_SECONDS
        ):
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        (then, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - then) if now > then else None

    @property
    def seconds_left(self) -> float | None:
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self._seen[-1][1]) / self.rate

    def speed(self) -> str:
        return "" if self.rate is None else f"{_number(self.rate)} steps/s"

    def eta(self) -> str:
        left = self.seconds_left
        return "" if left is None else f"ETA {_clock_time(left)}"


class _Reporter:
    """What the bar and the lines have in common: what to say."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pace: _Pace | None = None
        self._epochs: int | None = None

    def start(
        self,
        total_steps: int | None,
        initial_step: int = 0,
        description: str = "",
        epochs: int | None = None,
    ) -> None:
        self._pace = _Pace(total_steps, initial_step, self._clock())
        self._epochs = epochs
        self._begin(total_steps, initial_step, description)
        if initial_step:
            self.message(f"going on from {self._position(initial_step)}")

    def validation(self, step: int, logs: Logs) -> None:
        self.message(
            _line("validation at " + self._position(step), _values(logs))
        )

    def epoch(self, epoch: int, step: int, logs: Logs) -> None:
        self.message(
            _line(
                self._epoch_text(epoch),
                self._position(step),
                self._pace.speed() if self._pace else "",
                _values(logs),
            )
        )

    def finish(self, step: int, reason: str = "done") -> None:
        if self._pace is None:
            return
        seconds = self._clock() - self._pace.began
        self._end(step)
        self.message(
            f"{reason}: {self._position(step)} after {_clock_time(seconds)}"
        )
        self._pace = None

    def message(self, text: str) -> None:
        raise NotImplementedError

    def _begin(self, total: int | None, step: int, description: str) -> None:
        raise NotImplementedError

    def _end(self, step: int) -> None:
        """Closes what `_begin` opened."""

    def _position(self, step: int) -> str:
        total = self._pace.total if self._pace else None
        return f"step {step}" if total is None else f"step {step}/{total}"

    def _current_epoch(self, step: int) -> str:
        total = self._pace.total if self._pace else None
        if not self._epochs or not total:
            return ""
        done = step * self._epochs // total
        return self._epoch_text(min(done + 1, self._epochs))

    def _epoch_text(self, epoch: int) -> str:
        total = "" if self._epochs is None else f"/{self._epochs}"
        return f"epoch {epoch}{total}"


class _Lines(_Reporter):
    """A line now and then: for logs, pipes and batch systems."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float], interval: float
    ) -> None:
        super().__init__(clock)
        self._stream = stream
        self._interval = interval
        self._last_line = clock()

    def _begin(self, total: int | None, step: int, description: str) -> None:
        if description:
            self.message(description)
        self._last_line = self._clock()

    def update(self, step: int, logs: Logs) -> None:
        now = self._clock()
        if self._pace is None or now - self._last_line < self._interval:
            return
        self._pace.add(step, now)
        self.message(
            _line(
                self._position(step),
                self._current_epoch(step),
                self._pace.speed(),
                self._pace.eta(),
                _values(logs),
            )
        )

    def epoch(self, epoch: int, step: int, logs: Logs) -> None:
        if self._pace is not None:
            self._pace.add(step, self._clock())
        super().epoch(epoch, step, logs)

    def message(self, text: str) -> None:
        self._last_line = self._clock()
        with _LOST_TERMINAL:
            print(text, file=self._stream, flush=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Does nothing, where rich would end the process."""


class _PaceColumn(ProgressColumn):
    """Speed, time left and the newest logs."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class _DescriptionColumn(ProgressColumn):
    """The description, as text: a name may hold brackets."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True)


class _Bar(_Reporter):
    """A live bar that stays at the bottom; lines of text go above it."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_draw = float("-inf")

    def _begin(self, total: int | None, step: int, description: str) -> None:
        self._progress = Progress(
            _DescriptionColumn(),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            _PaceColumn(),
            console=self._console,
            auto_refresh=False,
            # Prints go above the bar, unless the user sent them elsewhere.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(
            description or "training", total=total, completed=step, status=""
        )
        self._progress.start()

    def update(self, step: int, logs: Logs) -> None:
        now = self._clock()
        if (
            self._pace is None
            or self._progress is None
            or now - self._last_draw < _REDRAW_SECONDS
        ):
            return
        self._last_draw = now
        self._pace.add(step, now)
        with _LOST_TERMINAL:
            self._progress.update(
                self._task,
                completed=step,
                # What a narrow terminal cuts off matters least.
                status=_line(
                    self._pace.eta(),
                    _values(logs),
                    self._pace.speed(),
                    self._current_epoch(step),
                ),
                refresh=True,
            )

    def message(self, text: str) -> None:
        with _LOST_TERMINAL:
            self._console.print(Text(text))

    def _end(self, step: int) -> None:
        if self._progress is not None:
            with _LOST_TERMINAL:
                self._progress.update(self._task, completed=step, refresh=True)
                self._progress.stop()
            self._progress = None


def _line(*parts: str) -> str:
    return "  ".join(filter(None, parts))


def _values(logs: Logs) -> str:
    return "  ".join(
        f"{name} {_number(value)}"
        for name, value in logs.items()
        if isinstance(value, float)  # not whole matrices
    )


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _clock_time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
