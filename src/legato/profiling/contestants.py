"""What is timed: steps in variants, and what is done between them."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from legato import backends, restoring
from legato.callbacks import CallbackRunner
from legato.checkpoint import CheckpointStore
from legato.data import Chunk, Feed, split_arrays
from legato.pace import Pace
from legato.profiling.workbench import Workbench
from legato.training import TrainSteps
from legato.types import JSON

_SUMMARIES = 4  # in a sample: one is quick
_FEW_BATCHES = 8
_VALIDATION_SECS = 1.0

After = Callable[[int, np.ndarray], None]


def now() -> float:
    """The time in microseconds."""
    return 1e6 * time.perf_counter()


class StepRun:
    """Runs the same chunk again and again.

    Args:
        bench: whose chunk, and values to begin with.
        steps: the steps.
        chunk: the batches of a call.
        period: steps after which metrics were updated as often as they
            should: a whole number of periods is run.
        before: is called before each call.
        after: is called after each call with its first step and its logs.

    Attributes:
        secs: about how long a measurement lasts.
        num_steps: of each measurement, in their order.
    """

    def __init__(
        self,
        bench: Workbench,
        steps: TrainSteps,
        chunk: Chunk,
        *,
        period: int = 1,
        before: Callable[[], None] = lambda: None,
        after: After | None = None,
    ) -> None:
        self.secs = 0.0
        self.num_steps: list[int] = []
        self._bench = bench
        self._steps = steps
        self._chunk = chunk
        self._period = period
        self._before = before
        self._after = after
        self._first = 0

    def call(self, step: int) -> None:
        """A device call, and what is done around it."""
        self._before()
        logs = self._steps.run(step, self._chunk)
        rows, _ = self._steps.rows(logs, self._chunk)
        if self._after is not None:
            self._after(step, rows)

    def prepare(self) -> None:
        """What is not timed before a measurement."""
        self._bench.restore()
        self.call(self._first)

    def is_done(self, done: int, elapsed_us: float) -> bool:
        """Whether to end after so many steps, and so long."""
        in_phase = done % self._period < self._chunk.num_batches
        return in_phase and elapsed_us >= 1e6 * self.secs

    def measure(self) -> float:
        """Microseconds of a step."""
        self.prepare()
        done, began = 0, now()
        while True:
            self.call(self._first + done)
            done += self._chunk.num_batches
            elapsed = now() - began
            if self.is_done(done, elapsed):
                break
        self.num_steps.append(done)
        # Other steps are sampled next time; the index stays an int32.
        self._first += -(-done // self._period) * self._period
        self._first %= self._period * (2**20 // self._period + 1)
        return elapsed / done


class DataRun:
    """Runs the bare steps on batches as they come.

    Args:
        bench: whose steps and data.

    Attributes:
        secs: about how long a measurement lasts.
    """

    def __init__(self, bench: Workbench) -> None:
        self.secs = 0.0
        self._bench = bench
        self._per_epoch = bench.schedule.steps_per_epoch
        self._step = 0
        self._feed = Feed(
            bench.parts.source,
            seed=bench.seed,
            capacity=bench.capacity,
            draws_here=backends.current().overlaps is not None,
        )
        self._pace = Pace(
            bench.chunk.num_batches,
            alternates=self._feed.draws_here,
            num_bytes=self._feed.chunk_bytes,
        )

    def close(self) -> None:
        """Stop drawing."""
        self._feed.close()

    def get_state(self) -> Any:
        """Of the data, for a checkpoint."""
        return self._feed.get_state()

    def _plan(self, ahead: int) -> int:
        left = self._per_epoch - (self._step + ahead) % self._per_epoch
        return self._pace.of(left)

    def _advance(self, chunk: Chunk) -> int:
        self._step += chunk.num_batches
        if self._step % self._per_epoch == 0:
            self._feed.end_epoch()
        return chunk.num_batches

    def _turn(self) -> int:
        """As the loop does it; returns the number of steps."""
        steps = self._bench.bare
        chunk = self._feed.take(self._plan(0))
        began, feed = time.perf_counter(), self._feed
        most = self._plan(chunk.num_batches)
        if not steps.overlap:
            feed.prefetch(most, only_beside=True)
        logs = steps.run(self._step, chunk)
        feed.prefetch(most)
        steps.rows(logs, chunk)
        num_batches = max(chunk.num_batches, feed.num_drawn)
        self._pace.learn(num_batches, time.perf_counter() - began)
        return self._advance(chunk)

    def _settle(self) -> None:
        """Leave nothing to be drawn while others are measured."""
        self._advance(self._feed.take(self._plan(0)))

    def warm(self, secs: float) -> None:
        """Compile for all shapes that come within an epoch, or so long."""
        began, first = now(), self._step
        while now() - began < 1e6 * secs:
            self._turn()
            if self._step - first > self._per_epoch:
                break
        self._settle()

    def measure(self) -> float:
        """Microseconds of a step."""
        self._bench.restore()
        if self._feed.draws_here:
            self._bench.bare.make_overlap()
        self._turn()  # from here on a chunk is ahead, as in training
        done, began = 0, now()
        while True:
            done += self._turn()
            elapsed = now() - began
            if elapsed >= 1e6 * self.secs:
                break
        self._settle()
        self._bench.bare.close()
        return elapsed / done


class Books:
    """The recorder, and what it is given.

    Args:
        bench: whose books.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self.recorder = bench.make_recorder()

    def begin(self) -> None:
        """Begin an epoch."""
        self.recorder.begin_epoch()

    def take(self, chunk: Chunk) -> After:
        """Takes the logs of a call, as the loop does."""

        def after(step: int, rows: np.ndarray) -> None:
            del step
            self._bench.clock.step += chunk.num_batches
            self.recorder.steps(chunk, rows)

        return after

    def run(self) -> StepRun:
        """Steps whose logs are taken."""
        bench = self._bench
        return StepRun(
            bench,
            bench.configured,
            bench.chunk,
            after=self.take(bench.chunk),
        )

    def measure_summary(self) -> float:
        """Microseconds of a summary."""
        self.run().prepare()
        spent = 0.0
        for _ in range(_SUMMARIES):
            self.run().call(0)
            began = now()
            self.recorder.summary()
            spent += now() - began
        return spent / _SUMMARIES


class Validation:
    """Validation, or as much of it as there is time for.

    Args:
        bench: whose data are validated on.

    Attributes:
        num_batches: in a whole one.
        measured: how many of these are measured.
    """

    def __init__(self, bench: Workbench) -> None:
        own = bench.evaluator
        assert own is not None
        self._bench = bench
        self._hooks = CallbackRunner([], model=bench.parts.whole, params={})
        whole = own.source.batches_per_epoch
        self.num_batches = min(bench.config.validation_steps or whole, whole)
        self.measured = min(self.num_batches, _FEW_BATCHES)
        self._evaluator = own
        if self.measured < self.num_batches:
            self._evaluator = bench.make_evaluator(self.measured)
            self.logs = self._run()
            began = now()
            self._run()
            each = (now() - began) / self.measured
            fitting = int(1e6 * _VALIDATION_SECS / each)
            self.measured = max(self.measured, min(fitting, self.num_batches))
            is_whole = self.measured == self.num_batches
            self._evaluator = (
                own if is_whole else bench.make_evaluator(self.measured)
            )
        self.logs = self._run()

    def _run(self) -> dict[str, float]:
        with restoring.kept(self._bench.parts.shared_variables()):
            logs = self._evaluator(self._hooks, lambda: False)
        assert logs is not None  # nothing asks it to stop
        return logs

    def measure(self) -> float:
        """Microseconds of a whole validation."""
        self._bench.restore()
        began = now()
        self._run()
        return (now() - began) * self.num_batches / self.measured


class Saving:
    """Checkpoints, in a directory that will not last.

    Args:
        bench: whose variables are saved.
        folder: where.
        runners: of the callbacks that are saved with them.
        data: what tells where the data are; None leaves it out.
    """

    def __init__(
        self,
        bench: Workbench,
        folder: Path,
        runners: list[CallbackRunner],
        data: DataRun | None,
    ) -> None:
        self._bench = bench
        self._runners = runners
        self._data = data
        self._step = 0
        self._store = CheckpointStore(
            folder,
            run_id="0" * 32,
            keep_last=bench.config.keep_last or 1,
        )

    def close(self) -> None:
        """Wait for what is being written."""
        self._store.close()

    def save(self) -> None:
        """Save, as training does."""
        self._step += 1
        variables = self._bench.named_variables()
        arrays = dict(
            zip(
                (f"variable/{k}" for k in range(len(variables))),
                backends.current().read(variables),
                strict=True,
            )
        )
        host: dict[str, JSON] = {"clock": self._bench.clock.to_json()}
        states: dict[str, tuple[JSON, dict[str, np.ndarray]]] = {
            f"callbacks/{k}": runner.get_state()
            for k, runner in enumerate(self._runners)
        }
        states["random"] = restoring.get_random_state()
        if self._data is not None:
            states["data"] = split_arrays(self._data.get_state())
        for name, (tree, more) in states.items():
            host[name] = tree
            arrays |= {f"{name}/{key}": a for key, a in more.items()}
        self._store.save(
            self._step, arrays, host, before_commit=self._bench.log.sync
        )

    def measure(self) -> float:
        """Microseconds that training waits for a checkpoint."""
        self._store.wait()
        bench = self._bench
        StepRun(bench, bench.configured, bench.chunk).prepare()
        began = now()
        self.save()
        taken = now() - began
        self._store.wait()
        return taken

    def run(self) -> StepRun:
        """Steps while a checkpoint is written, until it is."""
        bench = self._bench
        return _WhileWriting(self, bench, bench.configured, bench.chunk)

    def begin(self) -> None:
        """Save, and do not wait."""
        self._store.wait()
        self.save()

    def is_written(self) -> bool:
        """Whether the last one is."""
        return os.path.exists(self._store.path(self._step))


class _WhileWriting(StepRun):
    """See `Saving.run`."""

    def __init__(self, saving: Saving, *args: Any) -> None:
        super().__init__(*args)
        self._saving = saving

    def prepare(self) -> None:
        super().prepare()
        self._saving.begin()

    def is_done(self, done: int, elapsed_us: float) -> bool:
        return self._saving.is_written()


@dataclasses.dataclass(eq=False)
class Called:
    """One callback, in a run of its own.

    Args:
        bench: whose steps it looks at.
        books: what it is told.
        callback: the callback.
        runner: of it alone.
        validation_logs: those of an epoch.
        epoch: that is next.
        batch: of it that is next.
    """

    bench: Workbench
    books: Books
    callback: keras.callbacks.Callback
    runner: CallbackRunner
    validation_logs: dict[str, float]
    epoch: int = 0
    batch: int = 0

    def run(self) -> StepRun | None:
        """Steps with its batch hooks; None if it has none."""
        if not self.runner.batch_hooks_active:
            return None
        one = self.bench.one
        take = self.books.take(one)

        def before() -> None:
            self.runner.on_train_batch_begin(self.batch)

        def after(step: int, rows: np.ndarray) -> None:
            # In the order of the loop: the device may go on meanwhile.
            self.bench.configured.begin(step + 1, one)
            take(step, rows)
            if self.runner.wants_batch_logs:
                logs = self.books.recorder.batch_logs()
                self.runner.on_train_batch_end(self.batch, logs)
            self.batch = (self.batch + 1) % self.bench.schedule.steps_per_epoch

        return StepRun(
            self.bench, self.bench.configured, one, before=before, after=after
        )

    def measure_epoch(self) -> float:
        """Microseconds of its hooks at an epoch's begin and end."""
        self.bench.restore()
        self.books.begin()
        self.books.run().call(0)
        logs = self.books.recorder.epoch_logs() | self.validation_logs
        began = now()
        self.runner.on_epoch_begin(self.epoch)
        self.runner.on_epoch_end(self.epoch, logs)
        taken = now() - began
        self.epoch += 1
        return taken


_FILES = (
    (keras.callbacks.ModelCheckpoint, "filepath"),
    (keras.callbacks.CSVLogger, "filename"),
    (keras.callbacks.TensorBoard, "log_dir"),
)
"""Keras's callbacks that write files, and the attribute that says where."""


@contextlib.contextmanager
def elsewhere(
    callback: keras.callbacks.Callback, folder: Path
) -> Iterator[None]:
    """While active, Keras's callbacks write into a folder of ours."""
    for cls, attribute in _FILES:
        if isinstance(callback, cls):
            path = getattr(callback, attribute)
            there = folder / Path(path).name
            # (As text: it may be formatted.)
            setattr(callback, attribute, str(there))
            try:
                yield
            finally:
                setattr(callback, attribute, path)
            return
    yield
