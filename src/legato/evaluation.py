"""Measuring a model on a split of the data, in device loops like training."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras

from legato import backends
from legato.backends import Compilation, CompiledLoop
from legato.data import Chunk, DataSource, Shapes, shapes_of
from legato.errors import StepError
from legato.metrics import Every, Results, StepMetric
from legato.task import AttributeReads, Task, tracing
from legato.types import Logs, LogStyle

MAX_CAPACITY = 256
_CHUNK_BYTES = 64 * 2**20


def loop_capacity(source: DataSource, limit: int | None = None) -> int:
    """Batches in one device call: at most 256, and 64 MB of them."""
    fitting = max(1, _CHUNK_BYTES // max(source.batch_bytes, 1))
    return max(1, min(MAX_CAPACITY, fitting, limit or MAX_CAPACITY))


def check_logs(logs: Any, task: Task, step: str, *, loss: bool) -> dict:
    """The logs of a step.

    Raises:
        StepError: they are no dict of scalars, or the loss is not in them.
    """
    where = f"{type(task).__name__}.{step}"
    if not isinstance(logs, dict):
        raise StepError(
            f"{where} returned {type(logs).__name__}: it must return a dict of "
            f"scalars, such as {{self.loss: loss}}."
        )
    if loss and task.loss not in logs:
        raise StepError(
            f"{where} returned no loss: its logs are {sorted(logs)}, and "
            f"{task.loss!r} must be among them. Return {{self.loss: loss}}."
        )
    for name, value in logs.items():
        shape = tuple(getattr(value, "shape", ()))
        if shape != ():
            raise StepError(
                f"{where} returned {name!r} of shape {shape}: the logs of a "
                "step must be scalars. Reduce it, for example with "
                "keras.ops.mean."
            )
    return logs


class TestHooks(Protocol):
    """The callbacks, as validation calls them."""

    test_hooks_active: bool
    test_batch_hooks_active: bool
    wants_test_batch_logs: bool

    @property
    def stop_evaluating(self) -> bool:
        """Whether one of them asked to end it."""
        ...

    def on_test_begin(self) -> None:
        """Validation begins."""

    def on_test_end(self, logs: Logs) -> None:
        """Validation ended."""

    def on_test_batch_begin(self, batch: int) -> None:
        """A batch begins."""

    def on_test_batch_end(self, batch: int, logs: Logs) -> None:
        """A batch ended."""


class Evaluator:
    """Runs `Task.validation_step` over a split.

    Args:
        task: the task.
        model: its model.
        source: the split.
        metrics: what is measured beside the step's own logs.
        seed: of the order, where the source has one.
        max_batches: how many batches; None takes the whole split.

    Attributes:
        metrics: as given.
        compilation: whether to compile, where that is a choice.
    """

    def __init__(
        self,
        task: Task,
        model: Any,
        source: DataSource,
        metrics: Sequence[keras.metrics.Metric],
        *,
        seed: int,
        max_batches: int | None = None,
    ) -> None:
        self._task = task
        self._model = model
        self._source = source
        self.metrics = metrics
        self._results = Results(metrics)
        self._seed = seed
        self.compilation: Compilation = "replay"
        whole = source.batches_per_epoch
        self._num_batches = min(max_batches or whole, whole)
        self._capacity = loop_capacity(source)
        self._resident: Any = None
        self._loops: dict[Shapes, CompiledLoop] = {}
        self._reads = AttributeReads()

    @property
    def source(self) -> DataSource:
        """The split."""
        return self._source

    @property
    def variables(self) -> list[keras.Variable]:
        """What validation reads or writes, its metrics apart.

        Metrics are reset before each validation, and are no state.
        """
        own = self._metric_variables()
        found = {id(v): v for v in self._traced_variables()}
        return [v for key, v in found.items() if key not in own]

    def _traced_variables(self) -> list[keras.Variable]:
        return [v for loop in self._loops.values() for v in loop.variables]

    def _metric_variables(self) -> set[int]:
        return {id(v) for metric in self.metrics for v in metric.variables}

    def _leaves_no_trace(self, hooks: TestHooks) -> bool:
        """Whether a validation that is broken off can be repeated whole."""
        own = self._metric_variables()
        return not hooks.test_hooks_active and all(
            id(v) in own for loop in self._loops.values() for v in loop.updated
        )

    def __call__(
        self, hooks: TestHooks, stop_requested: Callable[[], bool]
    ) -> Logs | None:
        """Validate from the first batch to the last.

        Returns:
            The mean of each log over the examples, and the metrics' results;
            None if a stop was requested meanwhile, and nothing happened that
            could not be repeated. (Otherwise it is finished first.)
        """
        self._reads.check()
        hooks.on_test_begin()
        for metric in self.metrics:
            metric.reset_state()
        sums: Logs = {}
        last: Logs = {}
        examples = done = 0
        iterator = self._source.iterate(
            seed=self._seed, capacity=self._capacity
        )
        while done < self._num_batches:
            if stop_requested() and self._leaves_no_trace(hooks):
                return None
            most = 1 if hooks.test_batch_hooks_active else self._capacity
            chunk = iterator.next_chunk(min(most, self._num_batches - done))
            if hooks.test_batch_hooks_active:
                hooks.on_test_batch_begin(done)
            names, rows = self._run(done, chunk)
            for k, name in enumerate(names):
                total = sums.get(name, 0.0)
                for value in rows[:, k].tolist():
                    total += value * chunk.batch_size
                sums[name] = total
            examples += chunk.num_batches * chunk.batch_size
            done += chunk.num_batches
            last = dict(zip(names, rows[-1].tolist(), strict=True))
            if hooks.wants_test_batch_logs:
                logs = last
                if self._task.validation_logs is LogStyle.RUNNING:
                    logs = self._logs(sums, examples, last)
                hooks.on_test_batch_end(done - 1, dict(sorted(logs.items())))
            if hooks.stop_evaluating:
                break
        iterator.close()
        logs = self._logs(sums, examples, last)
        hooks.on_test_end(logs)
        return logs

    def _logs(self, sums: Logs, examples: int, last: Logs) -> Logs:
        """Means and metrics, or what the last batch's own step reported."""
        results = self._results()
        match self._task.validation_logs:
            case LogStyle.OWN:
                own = results if results.keys() == last.keys() else last
                return dict(sorted(own.items()))
            case style:
                logs = {name: total / examples for name, total in sums.items()}
                logs.update(results)
                running = style is LogStyle.RUNNING
                return dict(sorted(logs.items())) if running else logs

    def build(self) -> None:
        """Trace the step, so that lazily made variables exist."""
        self._loop(self._source.example(self._capacity))

    def _run(self, step: int, chunk: Chunk) -> tuple[list[str], Any]:
        loop = self._loop(chunk.operands)
        logs = loop(step, chunk.num_batches, chunk.operands)
        rows = backends.current().to_host(logs, chunk.num_batches)
        return loop.log_names, rows

    def _loop(self, operands: Any) -> CompiledLoop:
        shapes = shapes_of(operands)
        loop = self._loops.get(shapes)
        if loop is None:
            backend = backends.current()
            if self._resident is None:
                self._resident = backend.place(self._source.resident)
            with tracing(self._reads):
                loop = backend.compile_loop(
                    self._step,
                    fetch=self._source.fetch,
                    resident=self._resident,
                    operands=operands,
                    # By a rule: the same in every process.
                    mode=None,
                    losses_in_step=True,
                    variables=self._traced_variables(),
                    compilation=self.compilation,
                    native=self._task.validation_logs is LogStyle.OWN,
                )
            self._loops[shapes] = loop
        return loop

    def _step(self, batch: Any, step: Any) -> dict[str, Any]:
        del step
        metrics = [StepMetric(metric, Every(1)) for metric in self.metrics]
        logs = self._task.validation_step(batch, self._model, metrics)
        return check_logs(logs, self._task, "validation_step", loss=False)
