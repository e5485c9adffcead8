"""Keeps a run's books: means, metrics, summaries, the best, progress."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.compat.keras_arrays import to_numpy
from legato.config import TrainerConfig
from legato.data import Chunk, InputChecks
from legato.errors import BadLossError, ConfigError, LegatoWarning
from legato.phases import DELIVERY, PLAN, Phases, between
from legato.progress import ProgressReporter
from legato.readings import Readings
from legato.recovery import LossWatch
from legato.schedule import Schedule
from legato.sinks import RunLog
from legato.state import Clock
from legato.task import Task
from legato.types import JSON, Logs, LogStyle, Table, flat_logs
from legato.when import When, any_due

TIMING_SECONDS = 1.0
"""Between the lines of timing that summaries write, at the least."""

Kept = Mapping[int, np.ndarray]
"""What variables held at some steps, `[steps, ...]`, by their ids."""


class Recorder:
    """Takes the logs of steps and validations, and writes what is due.

    Sums are kept on the host in float64, added step by step, so that they do
    not depend on where device loops are cut.

    Args:
        task: names the loss, and says what logs mean.
        clock: holds the sums, so that they are saved with it.
        config: policies.
        schedule: which steps are trained on.
        metrics: the training metrics, and when each is updated.
        directions: whether less or more of a log is better.
        log_names: names of the step's logs, known once it is traced.
        readings: what summaries read.
        log: where summaries go.
        reporter: where progress goes.
        watch: looks at each loss.
        checks: looks at the inputs where a loss is bad.
        phases: what the time was spent on.

    Attributes:
        best: the best value so far.
    """

    def __init__(
        self,
        *,
        task: Task,
        clock: Clock,
        config: TrainerConfig,
        schedule: Schedule,
        metrics: Mapping[keras.metrics.Metric, When],
        directions: Mapping[str, str],
        log_names: Callable[[], Sequence[str]],
        readings: Readings,
        log: RunLog,
        reporter: ProgressReporter,
        watch: LossWatch,
        checks: InputChecks,
        phases: Phases,
    ) -> None:
        self.best = Best(config, directions)
        self._task = task
        self._clock = clock
        self._schedule = schedule
        self._metrics = metrics
        self._are_always_due = not schedule.skipped and all(
            when.is_always and when.over != "summary"
            for when in metrics.values()
        )
        self._log_names = log_names
        self._readings = readings
        self._log = log
        self._reporter = reporter
        self._watch = watch
        self._checks = checks
        self._phases = phases
        self._timed_from = 0, phases.read()

    def start(self) -> None:
        """Training begins, or goes on, at the clock's step."""
        self._phases.enter(PLAN)
        self._timed_from = self._clock.step, self._phases.read()

    def finish(self) -> None:
        """Training ended: write what was not timed yet."""
        self._write_timing()

    def begin_epoch(self) -> None:
        """Reset the sums and the metrics of the epoch."""
        self._clock.epoch_first_step = self._clock.step
        self._clock.epoch_logs = {}
        self._clock.epoch_examples = 0
        self._clock.last_logs = {}
        self._clock.validation_logs = {}
        for metric, when in self._metrics.items():
            # (A model's own metrics may hold what was measured before.)
            if when.over != "summary" or self._clock.step == 0:
                metric.reset_state()

    def begin_interval(self) -> None:
        """Reset the metrics that are taken since the last summary.

        Only where the next step is skipped: others begin with it themselves.
        """
        for metric, when in self._metrics.items():
            if when.over == "summary":
                metric.reset_state()

    def steps(
        self, chunk: Chunk, rows: np.ndarray, kept: Kept | None = None
    ) -> None:
        """Add the logs of completed steps to the sums.

        Summaries that are due before the last of them are written. (That of
        the last one waits for `summary`.)

        Args:
            chunk: whose steps they are.
            rows: float32 of shape `[steps, names]`.
            kept: what variables held at the steps of these summaries; None if
                there are none.

        Raises:
            BadLossError: a loss is not finite, or above the bound.
        """
        clock = self._clock
        first, stop = clock.step - chunk.num_batches, clock.step
        columns = dict(zip(self._log_names(), rows.T.tolist(), strict=True))
        try:
            self._check_losses(columns.get(self._task.loss, ()), chunk)
        except BadLossError as error:
            stop = error.step - 1
            raise
        finally:
            self._add(columns, chunk.batch_size, first, stop, kept)
        clock.last_logs = {name: each[-1] for name, each in columns.items()}
        self._reporter.update(clock.step, clock.last_logs)

    def _check_losses(self, losses: Sequence[float], chunk: Chunk) -> None:
        first = self._clock.step + 1 - chunk.num_batches

        def explain(step: int) -> str:
            found = self._checks.explain(chunk, step - first)
            return f"It is the data: {found}. " if found else ""

        self._watch.check(losses, self._clock.step, explain)

    def _add(
        self,
        columns: Mapping[str, Sequence[float]],
        batch_size: int,
        first: int,
        stop: int,
        kept: Kept | None,
    ) -> None:
        """Add the logs of the steps from `first` to `stop` to the sums.

        And write the summaries among them whose values were kept.
        """
        clock = self._clock
        summaries: Sequence[int] = ()
        if kept is not None:
            end = min(stop + 1, clock.step)  # (that one waits for `summary`)
            summaries = self._schedule.summaries(first + 1, end)
        bounds = [first, *summaries]
        sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
        if sizes:
            sizes[0] += clock.interval_steps
            clock.interval_steps = 0
        means: dict[str, list[float]] = {}
        for name, column in columns.items():
            epoch = clock.epoch_logs.get(name, 0.0)
            for value in column[: stop - first]:
                epoch += value * batch_size
            clock.epoch_logs[name] = epoch
            interval = clock.interval_logs.get(name, 0.0)
            found = means[name] = []
            begin = 0
            for step, size in zip(summaries, sizes, strict=True):
                for value in column[begin : step - first]:
                    interval += value
                found.append(interval / size)
                interval, begin = 0.0, step - first
            for value in column[begin : stop - first]:
                interval += value
            clock.interval_logs[name] = interval
        clock.epoch_examples += (stop - first) * batch_size
        clock.interval_steps += stop - bounds[-1]
        if kept is not None and summaries:
            self._write_summaries(summaries, means, kept)

    def batch_logs(self) -> Logs:
        """What batch hooks see after a step; see `LogStyle`."""
        match self._task.train_logs:
            case LogStyle.RUNNING:
                return _by_name(self._means() | self._results())
            case LogStyle.OWN:
                return _by_name(self._clock.last_logs)
            case _:
                return dict(self._clock.last_logs)

    def _means(self) -> Logs:
        """The means of the step's logs over the epoch's examples."""
        clock = self._clock
        if not clock.epoch_examples:  # all its steps were skipped
            return dict.fromkeys(self._log_names(), math.nan)
        return {
            name: total / clock.epoch_examples
            for name, total in clock.epoch_logs.items()
        }

    def _results(self) -> dict[str, Any]:
        """The metrics; NaN for those that no step of theirs has updated."""
        clock, results = self._clock, self._readings.results()
        for name in self._unmeasured(clock.epoch_first_step, clock.step):
            results[name] = math.nan
        return results

    def _unmeasured(self, begin: int, step: int) -> Iterator[str]:
        """The results of metrics that no step up to this one has updated.

        Args:
            begin: the first step of the epoch.
            step: the last one.
        """
        if self._are_always_due and step > begin:
            return
        for metric, when in self._metrics.items():
            first = begin
            if when.over == "summary":
                first = self._schedule.last_summary(step)
            if not self._is_any_due(when, first, step):
                yield from self._readings.results.names(metric)

    def _is_any_due(self, when: When, first: int, stop: int) -> bool:
        if when.is_always and not self._schedule.skipped:  # quickly: most are
            return stop > first
        trained = self._schedule.trained(first, stop)
        return any(any_due(when, *part) for part in trained)

    def summary(self) -> None:
        """Write means since the last summary, metrics and learning rates."""
        clock = self._clock
        values = {
            name: total / clock.interval_steps
            for name, total in clock.interval_logs.items()
            if clock.interval_steps
        } or dict.fromkeys(self._log_names(), math.nan)
        clock.interval_logs, clock.interval_steps = {}, 0
        values |= self._results() | self._readings.rates()
        columns = {name: [value] for name, value in values.items()}
        table = Table([clock.step], columns)
        self._log.write_later("train", lambda: table)
        self._write_timing_of_summary()

    def _write_summaries(
        self,
        steps: Sequence[int],
        means: Mapping[str, list[float]],
        kept: Kept,
    ) -> None:
        """Write summaries of steps whose values were kept.

        Args:
            steps: the steps.
            means: of the logs that lead to each.
            kept: what variables held after each.
        """
        variables = self._readings.variables
        assert variables is not None  # or nothing is kept
        times = len(steps)
        # What was not kept, no step changes (but callbacks may, later).
        others = [v for v in variables if id(v) not in kept]
        read = zip(others, backends.current().read(others), strict=True)
        held = {id(v): np.repeat(value[None], times, 0) for v, value in read}
        values = [
            kept[id(v)][:times] if id(v) in kept else held[id(v)]
            for v in variables
        ]
        begin = self._clock.epoch_first_step

        def make() -> Table:
            results, rates = self._readings.series(values, times)
            if not self._are_always_due:
                for i, step in enumerate(steps):
                    for name in self._unmeasured(begin, step):
                        results[name][i] = math.nan
            return Table(steps, {**means, **results, **rates})

        self._log.write_later("train", make)
        self._write_timing_of_summary()

    def _write_timing_of_summary(self) -> None:
        """Unless a line was written just now: small steps take microseconds."""
        since = sum(self._phases.read()) - sum(self._timed_from[1])
        if since >= TIMING_SECONDS * 1e9:
            self._write_timing_of_steps()

    def _write_timing_of_steps(self) -> None:
        """Unless it is written: at an epoch's end a summary may be due too."""
        if self._clock.step > self._timed_from[0]:
            self._write_timing()

    def _write_timing(self) -> None:
        first, before = self._timed_from
        self._timed_from = step, now = self._clock.step, self._phases.read()
        phases = between(before, now)
        seconds, steps = sum(phases.values()), step - first
        self._log.write_timing(
            step,
            {
                "steps_per_sec": steps / seconds,
                "steps": steps,
                "seconds": round(seconds, 6),
                "phases": {k: round(v, 6) for k, v in phases.items()},
            },
        )

    def catch_up(self, *, only_late: bool = False) -> None:
        """Write what was put off.

        Args:
            only_late: unless it was put off just now.
        """
        if self._log.is_late if only_late else self._log.is_behind:
            with self._phases.within(DELIVERY):
                self._log.catch_up()

    def validation(self, logs: dict[str, Any]) -> None:
        """Write the results of a validation and keep them for the epoch.

        Args:
            logs: also groups of them, and what only summaries can show.
        """
        clock = self._clock
        self._log.write("validation", clock.step, logs)
        # Groups would fill the screen.
        ungrouped = {k: v for k, v in logs.items() if not isinstance(v, dict)}
        self._reporter.validation(clock.step, flat_logs(ungrouped))
        clock.validation_logs = flat_logs(logs, "val_")
        self.best.consider(clock.step, clock.validation_logs)

    def epoch_logs(self) -> Logs:
        """The epoch's means, its metrics, its last validation."""
        clock, results = self._clock, self._results()
        if self._task.train_logs is LogStyle.OWN:
            # As in Keras: the metrics of the model, if these are meant.
            same = results.keys() == clock.last_logs.keys()
            logs = results if same else dict(clock.last_logs)
            logs = logs or dict.fromkeys(self._log_names(), math.nan)
        else:
            logs = self._means() | results
        logs |= clock.validation_logs
        if self._task.train_logs is not LogStyle.MEANS:
            logs = _by_name(logs)
        clock.training_logs = dict(logs)
        return logs

    def epoch(self, logs: Logs) -> None:
        """Write the logs of an epoch, with what callbacks added."""
        clock = self._clock
        # Callbacks may have put anything in.
        values = {name: _loggable(value) for name, value in logs.items()}
        self._log.write("epoch", clock.step, {"epoch": clock.epoch, **values})
        self._reporter.epoch(clock.epoch + 1, clock.step, logs)
        self.best.consider(
            clock.step,
            {k: v for k, v in logs.items() if k not in clock.validation_logs},
        )
        # (The first validation may be due in a later epoch.)
        if clock.validation_logs or self._schedule.validation_interval is None:
            self.best.warn_if_unknown(logs)
        self._write_timing_of_steps()


def _by_name(logs: Logs) -> Logs:
    return dict(sorted(logs.items()))


class Best:
    """The best value so far of the log that tells the best checkpoint.

    Args:
        config: names the log and the direction.
        directions: whether less ("min") or more ("max") of a log is better.

    Attributes:
        is_kept: whether there is such a log.
        step: of the best value; None before there is one.
        value: the best value.
        is_new: whether it was found since the last save.

    Raises:
        ConfigError: the direction is not known.
    """

    def __init__(
        self, config: TrainerConfig, directions: Mapping[str, str]
    ) -> None:
        self._name = config.best_metric
        self._in_group = (self._name or "").replace(".", "/")
        self._less_is_better = False
        if self._name is not None:
            mode = config.best_mode
            if mode == "auto":
                mode = directions.get(self._name)
            if mode is None:
                raise ConfigError(
                    f"best_metric={self._name!r}: whether less or more of it "
                    'is better is not known. Set best_mode to "min" or "max".'
                )
            self._less_is_better = mode == "min"
        self.is_kept = self._name is not None
        self.step: int | None = None
        self.value = math.nan
        self.is_new = False
        self._warned = False

    def consider(self, step: int, logs: Logs) -> None:
        """Take a value, if the log is among these."""
        value = logs.get(self._name or "", logs.get(self._in_group))
        if not isinstance(value, float) or math.isnan(value):
            return
        better = (
            value < self.value if self._less_is_better else value > self.value
        )
        if self.step is None or better:
            self.step, self.value, self.is_new = step, value, True

    def warn_if_unknown(self, logs: Logs) -> None:
        """At an epoch's end: is the log that tells the best among the logs?"""
        if self.is_kept and self.step is None and not self._warned:
            self._warned = True
            if self._name not in logs and self._in_group not in logs:
                warnings.warn(
                    f"best_metric={self._name!r} is not among the logs of the "
                    f"epoch ({', '.join(logs)}): no best checkpoint is kept.",
                    LegatoWarning,
                    stacklevel=2,
                )

    def get_state(self) -> JSON:
        """For a checkpoint."""
        return {"step": self.step, "value": self.value, "metric": self._name}

    def set_state(self, state: JSON) -> bool:
        """Take a saved state; False if it is of another metric."""
        match state:
            case {"step": int(step), "value": float(value), "metric": name} if (
                name == self._name
            ):
                self.step, self.value = step, value
                return True
            case _:
                return False


def _loggable(value: Any) -> Any:
    """A value as JSON can hold it, or what it looks like."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_loggable(each) for each in value]
    try:
        array = to_numpy(value)
    except Exception:
        return repr(value)
    is_plain = array.dtype.kind in "biufUV"  # (V: such as bfloat16)
    return array.tolist() if is_plain else repr(value)
