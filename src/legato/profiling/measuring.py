"""Measures everything in turns, and makes a profile of it."""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import keras

from legato import restoring
from legato.callbacks import CallbackRunner
from legato.callbacks.entries import flatten
from legato.config import TrainerConfig
from legato.errors import ConfigError
from legato.profiling.contestants import (
    Books,
    Called,
    DataRun,
    Saving,
    StepRun,
    Validation,
    elsewhere,
)
from legato.profiling.estimates import (
    Estimate,
    differences,
    estimate,
    take_turns,
    timed,
)
from legato.profiling.report import Cost, Kind, Profile
from legato.profiling.where import Piece
from legato.profiling.workbench import Workbench
from legato.schedule import Schedule
from legato.summaries import as_step
from legato.task import Task
from legato.types import flat_logs
from legato.when import Every, When

_MAX_ROUNDS = 100
_LOOP_SHARE = 0.1  # of the time is for the loop
_LEAST_SHARE = 1 / 3  # of the time is for measuring
_MIN_LOOP_SECS = 0.5
_MIN_SECS, _MAX_SECS = 0.005, 0.25  # of one measurement
_MAX_PERIOD_SECS = 1.0  # between two updates of a metric, to be measured so

Part = Literal[
    "bare",
    "metric",
    "configured",
    "one a call",
    "logs",
    "data",
    "callback",
    "epoch",
    "summary",
    "validation",
    "saving",
    "writing",
    "bare again",
]
Key = tuple[Part, Any]
"""What is measured; of which metric or callback, or None."""


def measure(
    task: Task,
    config: TrainerConfig,
    callbacks: Sequence[keras.callbacks.Callback],
    seconds: float,
    say: Callable[[str], None],
) -> Profile:
    """See `legato.profile`."""
    _check(task, config)
    chosen = flatten(callbacks, "callbacks")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="legato-profile-")
            )
        )
        stack.enter_context(_kept_random_state())
        say("building and tracing")
        bench = Workbench(task, config, folder)
        # Of what callbacks write to summary managers.
        stack.enter_context(as_step(lambda: bench.clock.step))
        stack.callback(bench.log.close)
        stack.enter_context(_kept_model(bench.parts.whole))
        task.initialize(bench.parts.model)
        chosen = [*flatten(task.build_callbacks(), "build_callbacks"), *chosen]
        bench.trace()
        bench.remember()
        stack.callback(bench.restore)
        contestants = _Contestants(bench, folder, chosen, stack, say)
        # However long it took to compile: it would be in vain otherwise.
        left = (1 - _LOOP_SHARE) * seconds + began - time.monotonic()
        left = max(left, _LEAST_SHARE * seconds)
        contestants.set_time(left)
        say(f"measuring, for about {left:.0f} s")
        samples = take_turns(
            contestants.timed,
            until=time.monotonic() + left,
            told_until=time.monotonic() + seconds,
            max_rounds=_MAX_ROUNDS,
        )
        piece = contestants.train(max(_LOOP_SHARE * seconds, _MIN_LOOP_SECS))
        return _Accounts(bench, contestants, samples).profile(
            time.monotonic() - began, *piece
        )


def _check(task: Task, config: TrainerConfig) -> None:
    if not isinstance(task, Task):
        raise ConfigError(
            f"task={task!r:.80}: it must be an object of a subclass of "
            "legato.Task."
        )
    if not isinstance(config, TrainerConfig):
        raise ConfigError(
            f"config={config!r:.80}: it must be a legato.TrainerConfig."
        )
    if keras.distribution.distribution() is not None:
        raise ConfigError(
            "A keras.distribution is in force: training on several devices is "
            "not supported yet. Call keras.distribution.set_distribution(None) "
            "first."
        )


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    state = restoring.get_random_state()
    try:
        yield
    finally:
        restoring.set_random_state(*state)


@contextlib.contextmanager
def _kept_model(whole: Any) -> Iterator[None]:
    """A task may return a model that it goes on using."""
    stops = getattr(whole, "stop_training", False)
    with restoring.kept(whole.weights):
        try:
            yield
        finally:
            whole.stop_training = stops


class _Contestants:
    """All that is measured, compiled and ready.

    Args:
        bench: what is run.
        folder: for what is written.
        callbacks: the user's.
        stack: what has to be undone.
        say: is told how it goes.

    Attributes:
        timed: what measures each, in microseconds.
        called: the callbacks that are measured.
        validation: None where there is none.
        writing: steps while a checkpoint is written.
        period: steps between updates of the metric that is updated most
            rarely; None where that is too long to wait for.
    """

    def __init__(
        self,
        bench: Workbench,
        folder: Path,
        callbacks: Sequence[keras.callbacks.Callback],
        stack: contextlib.ExitStack,
        say: Callable[[str], None],
    ) -> None:
        self._bench = bench
        self._runs: list[StepRun | DataRun] = []
        self.timed: dict[Key, Callable[[], float]] = {}
        self.validation: Validation | None = None
        bench.draw()
        variants = {
            id(each): each
            for each in (bench.bare, *bench.single.values(), bench.configured)
        }
        say(f"compiling {len(variants)} variants of the step")
        for steps in variants.values():
            bench.warm(steps)
        self.period = self._period()
        self._add_steps()
        if bench.evaluator is not None:
            self.validation = Validation(bench)
        books = Books(bench)
        books.begin()
        self._add(("logs", None), books.run())
        data = self._add_data(stack)
        self.called = [
            called
            for number, each in enumerate(callbacks)
            if (
                called := self._call(
                    each, books, folder / f"callback-{number}", stack
                )
            )
        ]
        for number, called in enumerate(self.called):
            run = called.run()
            if run is not None:
                self._add(("callback", number), run)
            self.timed["epoch", number] = called.measure_epoch
        self.timed["summary", None] = books.measure_summary
        if self.validation is not None:
            self.timed["validation", None] = self.validation.measure
        saving = self._saving = Saving(
            bench, folder, [called.runner for called in self.called], data
        )
        stack.callback(saving.close)
        self.timed["saving", None] = saving.measure
        saving.measure()  # the first of its two buffers; then the other one
        self.writing = saving.run()
        self._add(("writing", None), self.writing)
        self._add(("bare again", None), StepRun(bench, bench.bare, bench.chunk))
        for each in self.timed.values():
            each()
        self.writing.num_steps.clear()

    def train(self, secs: float) -> tuple[int, dict[str, float]]:
        """Train for so long, by the loop: see `Piece.measure`."""
        bench = self._bench
        if bench.parts.source.is_one_shot:
            return 0, {}  # which is noted
        piece = Piece(bench, [c.runner for c in self.called], self._saving)
        with contextlib.closing(piece):
            return piece.measure(secs)

    def set_time(self, secs: float) -> None:
        """Share out so many seconds."""
        each = secs / (_MAX_ROUNDS * len(self.timed))
        for run in self._runs:
            run.secs = max(_MIN_SECS, min(_MAX_SECS, each))

    def _add(self, key: Key, run: StepRun | DataRun) -> None:
        self._runs.append(run)
        self.timed[key] = run.measure

    def _period(self) -> int | None:
        bench = self._bench
        longest = max(
            (interval_of(when) or 1 for when in bench.metrics().values()),
            default=1,
        )
        period = math.ceil(longest)
        if period > 1:
            run = StepRun(bench, bench.configured, bench.chunk)
            if 1e-6 * run.measure() * period > _MAX_PERIOD_SECS:
                return None
        return period

    def _add_steps(self) -> None:
        bench, chunk = self._bench, self._bench.chunk
        self._add(("bare", None), StepRun(bench, bench.bare, chunk))
        for metric, steps in bench.single.items():
            self._add(("metric", metric), StepRun(bench, steps, chunk))
        if bench.has_configured:
            run = StepRun(
                bench, bench.configured, chunk, period=self.period or 1
            )
            self._add(("configured", None), run)
        if chunk.num_batches > 1:
            run = StepRun(bench, bench.configured, bench.one)
            self._add(("one a call", None), run)

    def _add_data(self, stack: contextlib.ExitStack) -> DataRun | None:
        bench = self._bench
        if bench.parts.source.is_one_shot:
            bench.notes.append(
                "the data can be read only once, so they were left alone"
            )
            return None
        data = DataRun(bench)
        stack.callback(data.close)
        data.warm(_MAX_PERIOD_SECS)
        self._add(("data", None), data)
        return data

    def _call(
        self,
        callback: keras.callbacks.Callback,
        books: Books,
        folder: Path,
        stack: contextlib.ExitStack,
    ) -> Called | None:
        bench = self._bench
        if isinstance(callback, keras.callbacks.RemoteMonitor):
            bench.notes.append(
                "RemoteMonitor sends to a server, and was not called"
            )
            return None
        folder.mkdir()
        stack.enter_context(elsewhere(callback, folder))
        schedule = bench.schedule
        epochs = math.ceil(schedule.train_steps / schedule.steps_per_epoch)
        runner = CallbackRunner(
            [callback],
            model=bench.parts.whole,
            params={
                "epochs": bench.config.epochs or epochs,
                "steps": schedule.steps_per_epoch,
                "verbose": 0,
            },
            exact="off",
            metric_directions=bench.parts.directions(),
            references={"task": bench.parts.task},
        )
        runner.remember()
        stack.callback(runner.make_anew)
        stack.callback(runner.close)
        runner.on_train_begin(resuming=False)
        stack.callback(runner.on_train_end)
        runner.on_epoch_begin(0)
        logs = self.validation.logs if self.validation else {}
        return Called(
            bench,
            books,
            callback,
            runner,
            validation_logs=flat_logs(logs, "val_"),
        )


class _Accounts:
    """Makes costs of samples.

    Args:
        bench: what was run.
        contestants: what was measured.
        samples: of each, in microseconds, round by round.
    """

    def __init__(
        self,
        bench: Workbench,
        contestants: _Contestants,
        samples: dict[Key, list[float]],
    ) -> None:
        self._bench = bench
        self._contestants = contestants
        self._samples = samples
        first, last = samples["bare", None], samples["bare again", None]
        # Both ends of a round: what becomes slower meanwhile is no cost.
        self._bare = [(a + b) / 2 for a, b in zip(first, last, strict=True)]
        nothing = estimate(differences(last, first))
        self._least_noise = max(abs(nothing.median), nothing.noise)
        self._configured = self._find_configured()
        self._per_step = timed(self._bare)
        self._costs: list[Cost] = []

    def _find_configured(self) -> list[float]:
        bench, samples = self._bench, self._samples
        if bench.has_configured:
            return samples["configured", None]
        for metric, steps in bench.single.items():
            if steps is bench.configured:
                return samples["metric", metric]
        return self._bare

    def profile(
        self, seconds: float, loop_steps: int, phases: dict[str, float]
    ) -> Profile:
        """The profile.

        Args:
            seconds: that it took.
            loop_steps: how many steps the loop trained.
            phases: what it spent on each phase, in microseconds a step.
        """
        bench = self._bench
        self._account_metrics()
        self._account_loop()
        for number, called in enumerate(self._contestants.called):
            self._account_callback(number, called)
        self._account_duties()
        return Profile(
            task=bench.parts.task.title,
            backend=keras.config.backend(),
            mode=bench.bare.mode or "",
            steps_per_call=bench.chunk.num_batches,
            rounds=len(self._bare),
            seconds=seconds,
            bare=self._per_step,
            costs=self._costs,
            loop_steps=loop_steps,
            phases=phases,
            notes=bench.notes,
        )

    def _over(self, key: Key, base: list[float]) -> Estimate:
        """What it takes more than others, a step."""
        return estimate(
            differences(self._samples[key], base),
            least_noise=self._least_noise,
        )

    def _add(
        self,
        name: str,
        kind: Kind,
        per_call: Estimate,
        interval: float | None = 1,
        detail: str = "",
    ) -> None:
        taken = {cost.name for cost in self._costs}
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name} {number}"
        self._costs.append(
            Cost(
                name=unique,
                kind=kind,
                per_call=per_call,
                interval=interval,
                us_bare=self._per_step.median,
                detail=detail,
            )
        )

    def _account_metrics(self) -> None:
        bench = self._bench
        for metric, when in bench.metrics().items():
            self._add(
                metric.name,
                "metric",
                self._over(("metric", metric), self._bare),
                None if bench.are_metrics_off else interval_of(when),
            )
        if not bench.has_configured:
            return
        if self._contestants.period is None:
            bench.notes.append(
                "some metric is updated too rarely to wait for it, so all of "
                "them together, as configured, were not measured"
            )
            return
        self._add(
            "all metrics",
            "metrics",
            self._over(("configured", None), self._bare),
        )

    def _account_loop(self) -> None:
        self._add("logs", "logs", self._over(("logs", None), self._configured))
        if ("data", None) in self._samples:
            self._add("data", "data", self._over(("data", None), self._bare))

    def _one_a_call(self) -> Estimate | None:
        """What a step takes longer that is a device call of its own."""
        key: Key = ("one a call", None)
        if key not in self._samples:
            return None
        return self._over(key, self._configured)

    def _account_callback(self, number: int, called: Called) -> None:
        name = type(called.callback).__name__
        per_epoch = self._bench.schedule.steps_per_epoch
        epoch = timed(self._samples["epoch", number])
        if ("callback", number) not in self._samples:
            self._add(name, "callback", epoch, per_epoch)
            return
        each = self._over(("callback", number), self._configured)
        alone = self._one_a_call()
        detail = ""
        if alone is not None and alone.is_told:
            detail = (
                f"of it {alone.median:,.0f} µs since its batch hooks make each "
                "step a device call"
            )
        self._add(
            name,
            "callback",
            each + epoch.scaled(1 / per_epoch),
            detail=detail,
        )

    def _account_duties(self) -> None:
        """What is done between device calls, which have to end for it."""
        bench, schedule = self._bench, self._bench.schedule
        cut = self._cut()

        def due(part: Part) -> Estimate:
            taken = timed(self._samples[part, None])
            return taken if cut is None else taken + cut

        self._add(
            "summaries",
            "summaries",
            due("summary"),
            schedule.summary_interval or None,
        )
        validation = self._contestants.validation
        if validation is not None:
            part = ""
            if validation.measured < validation.num_batches:
                part = (
                    f"measured on {validation.measured} of its "
                    f"{validation.num_batches} batches"
                )
            self._add(
                "validation",
                "validation",
                due("validation"),
                validation_interval(schedule, bench.config.initial_epoch),
                part,
            )
        interval = self._checkpoint_interval()
        self._add("checkpoints", "checkpoints", due("saving"), interval)
        steps = self._contestants.writing.num_steps
        slower = differences(self._samples["writing", None], self._configured)
        self._add(
            "while written",
            "writing",
            estimate(
                [each * n for each, n in zip(slower, steps, strict=True)],
                least_noise=self._least_noise * max(steps),
            ),
            interval,
        )

    def _cut(self) -> Estimate | None:
        """What one more device call costs, for the same steps."""
        if any(c.runner.batch_hooks_active for c in self._contestants.called):
            return None  # each step is one already
        alone, steps = self._one_a_call(), self._bench.chunk.num_batches
        if alone is None or not alone.is_told or alone.median < 0:
            return None
        return dataclasses.replace(alone.scaled(steps / (steps - 1)), noise=0.0)

    def _checkpoint_interval(self) -> float:
        config, schedule = self._bench.config, self._bench.schedule
        if config.checkpoint_seconds is not None:
            return 1e6 * config.checkpoint_seconds / self._per_step.median
        interval = schedule.checkpoint_interval
        return (
            interval
            if isinstance(interval, int)
            else (schedule.steps_per_epoch)
        )


def interval_of(when: When) -> float | None:
    """Steps between two updates of a metric, in the mean."""
    return float(when.steps) if isinstance(when, Every) else 1 / when.share


def validation_interval(schedule: Schedule, initial_epoch: int) -> float | None:
    """Steps between two validations, in the mean; None if there is none."""
    interval = schedule.validation_interval
    if interval != "epoch":
        return interval
    freq = schedule.validation_freq
    if isinstance(freq, int):
        return schedule.steps_per_epoch * freq
    last = initial_epoch + math.ceil(
        schedule.train_steps / schedule.steps_per_epoch
    )
    count = sum(initial_epoch < epoch <= last for epoch in freq)
    return schedule.train_steps / count if count else None
