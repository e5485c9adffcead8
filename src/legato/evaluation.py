"""Measuring a model on a split of the data, in device loops like training."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras

from legato import backends, restoring
from legato.backends import Compilation, CompiledLoop, LoopMode
from legato.by_shape import LoopsByShape
from legato.calls import Calls
from legato.config import MAX_SHAPES, TrainerConfig
from legato.data import (
    ArraySpec,
    Chunk,
    DataSource,
    Feed,
    HostValue,
    InputChecks,
    Shapes,
    StoppedWaiting,
    partial_batches,
    shapes_of,
)
from legato.errors import StepError
from legato.metrics import HostMetric, HostStepMetric, Results, StepMetric
from legato.on_host import HostSide, HostThread, Packed
from legato.pace import Pace
from legato.settings import Settings
from legato.task import AttributeReads, Task, tracing
from legato.types import Logs, LogStyle, flat_logs
from legato.when import Every

MAX_CAPACITY = 256
_CHUNK_BYTES = 16 * 2**20
"""Of a call's operands: it copies them all, and two calls are alive."""


def loop_capacity(source: DataSource, limit: int | None = None) -> int:
    """Batches in one device call: at most 256, and 16 MB of them."""
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


def _inputs(source: DataSource) -> Any:
    """The shapes of what a model gets of an example."""
    batch = source.batch_spec(source.full_batch_size)
    return keras.tree.map_structure(
        lambda leaf: (
            tuple(leaf.shape[1:])
            if isinstance(leaf, ArraySpec)
            else type(leaf).__name__
        ),
        batch[0] if isinstance(batch, tuple) and batch else batch,
    )


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
        checks: looks at each batch before it is used; None: nobody does.
        max_shapes: for how many shapes of batches it may be compiled.

    Attributes:
        announce: told what takes time and was not to be expected.
        metrics: as given.
        on_device: those among them that are not measured on the host.
        compilation: whether to compile, where that is a choice.
    """

    def __init__(
        self,
        task: Task,
        model: Any,
        source: DataSource,
        metrics: Sequence[keras.metrics.Metric | HostMetric],
        *,
        seed: int,
        max_batches: int | None = None,
        checks: InputChecks | None = None,
        max_shapes: int = MAX_SHAPES,
    ) -> None:
        self.announce: Callable[[str], None] = lambda _: None
        self._task = task
        self._checks = checks
        self._model = model
        self._source = source
        self.metrics = metrics
        self.on_device = [
            m for m in metrics if isinstance(m, keras.metrics.Metric)
        ]
        self._results = Results(self.on_device)
        self._host = HostSide(
            task, [m for m in metrics if isinstance(m, HostMetric)]
        )
        # How what goes to the host is made of tensors, by shapes of batches.
        self._packed: dict[Shapes, Packed | None] = {}
        self._last_packed: Packed | None = None
        self._seed = seed
        self.compilation: Compilation = "replay"
        whole = source.batches_per_epoch
        self._num_batches = min(max_batches or whole, whole)
        # What goes to the host is to be there soon.
        limit = backends.current().host_steps if self._host.is_needed else None
        self._capacity = loop_capacity(source, limit)
        self._pace: Pace | None = None
        self._resident: Any = None
        self._max_shapes = max_shapes
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._loops = LoopsByShape(
            self._source,
            f"{type(self._task).__name__}.validation_step",
            self._max_shapes,
            lambda text: self.announce(text),
        )
        self._reads = AttributeReads()
        self._settings = Settings({})

    @property
    def inexact(self) -> str | None:
        """What host metrics keep that no checkpoint holds; None if nothing."""
        return self._host.inexact

    def follow(
        self, mode: LoopMode | None, config: TrainerConfig, train: DataSource
    ) -> None:
        """Compile where training does; before any training.

        Inputs of other shapes than those of training are tried now: what the
        model does not take would be found after the first epoch.

        Args:
            mode: how training's steps reach the device.
            config: of the trainer.
            train: the data of training.
        """
        if mode == "compiled":
            self.compilation = "auto"
        elif config.torch_compile is False:
            self.compilation = "never"
        theirs, ours = _inputs(train), _inputs(self._source)
        if ours != theirs:
            try:
                self.build()
            except Exception as error:
                error.add_note(
                    "(These are the validation data: their inputs have the "
                    f"shapes {ours}, and those of training {theirs}.)"
                )
                raise

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
        return [v for loop in self._loops for v in loop.variables]

    def _metric_variables(self) -> set[int]:
        return {id(v) for metric in self.on_device for v in metric.variables}

    def _leaves_no_trace(self, hooks: TestHooks) -> bool:
        """Whether a validation that is broken off can be repeated whole."""
        own = self._metric_variables()
        return not hooks.test_hooks_active and all(
            id(v) in own for loop in self._loops for v in loop.updated
        )

    def __call__(
        self,
        hooks: TestHooks,
        stop_requested: Callable[[], bool],
        step: int = 0,
    ) -> dict[str, Any] | None:
        """Validate from the first batch to the last.

        Args:
            hooks: the callbacks.
            stop_requested: whether a signal or the time asks to stop.
            step: the number of training steps completed, for the Task.

        Returns:
            The mean of each log over the examples, the metrics' results, and
            what was measured on the host, where dicts are groups and not all
            values are numbers: see `flat_logs`. None if a stop was requested
            meanwhile, and nothing happened that could not be repeated.
            (Otherwise it is finished first.)

        Raises:
            StepError: the step or what is measured broke its contract.
            Anything: what a host metric raised.
        """
        self._reads.check()
        is_traced = any(loop.mode != "eager" for loop in self._loops)
        if is_traced and self._settings.have_changed:
            # A callback changed what the step holds as a constant.
            self._begin_anew()
        hooks.on_test_begin()
        for metric in self.on_device:
            metric.reset_state()
        max_steps = self._capacity
        if self._host.is_needed:
            self._trace_all()
            max_steps = min(
                loop.max_steps or self._capacity for loop in self._loops
            )
        means = _Means()
        # What is broken off will be repeated whole; data and host metrics may
        # draw from the global generators.
        random = restoring.get_random_state()
        found: tuple[dict[str, Any], dict[str, Any]] | None = ({}, {})

        def gives_up() -> bool:
            return stop_requested() and self._leaves_no_trace(hooks)

        with contextlib.ExitStack() as stack:
            host = None
            if self._host.is_needed:
                host = stack.enter_context(
                    self._host.begin(step, gives_up, max_steps)
                )
            feed = Feed(
                self._source,
                seed=self._seed,
                capacity=self._capacity,
                stop_requested=gives_up,
            )
            stack.callback(feed.close)
            calls = Calls()
            stack.callback(calls.close)
            draws_here = host is None and not feed.draws_ahead
            if draws_here and not hooks.test_batch_hooks_active:
                calls.make_overlap()
            if self._pace is None:
                self._pace = Pace(
                    self._capacity,
                    alternates=draws_here and calls.do_overlap,
                    num_bytes=feed.chunk_bytes,
                )
            is_done = self._measure(
                feed, calls, means, hooks, gives_up, host, max_steps
            )
            if not is_done:
                found = None
            elif host is not None:
                found = host.finish()
        if found is None:
            restoring.set_random_state(*random)
            return None
        results, reduced = found
        logs = self._logs(means)
        clashes = logs.keys() & results.keys()
        if clashes:
            raise StepError(
                f"A host metric returned {', '.join(sorted(clashes))}, and so "
                "do the step or a metric of the device. Give it another name."
            )
        logs = logs | results | reduced
        if self._task.validation_logs is not LogStyle.MEANS:
            logs = dict(sorted(logs.items()))
        hooks.on_test_end(flat_logs(logs))
        return logs

    def _measure(
        self,
        feed: Feed,
        calls: Calls,
        means: "_Means",
        hooks: TestHooks,
        gives_up: Callable[[], bool],
        host: HostThread | None,
        max_steps: int,
    ) -> bool:
        """Run all batches; False if it was broken off."""
        pace, one_by_one = self._pace, hooks.test_batch_hooks_active
        assert pace is not None
        done, ended = 0, 0.0
        late: list[_Begun] = []

        def end_first() -> None:
            nonlocal ended
            begun = late.pop(0)
            means.add(begun.chunk, begun.names, calls.result(begun.logs))
            began, ended = max(begun.at, ended), time.perf_counter()
            # Meanwhile the batches of the next one were made.
            num_drawn = late[0].chunk.num_batches if late else 0
            pace.learn(max(begun.chunk.num_batches, num_drawn), ended - began)

        while done < self._num_batches:
            if gives_up():
                return False
            left = self._num_batches - done
            most = min(pace.of(left), max_steps)
            if one_by_one or hooks.stop_evaluating:  # then as in Keras: one
                most = 1
            try:
                chunk = feed.take(most, min(left, max_steps))
            except StoppedWaiting:
                return False
            left -= chunk.num_batches
            if left and not one_by_one and not hooks.stop_evaluating:
                most = min(pace.of(left), max_steps)
                feed.prefetch(most, only_beside=True)
            if one_by_one:
                hooks.on_test_batch_begin(done)
            begun = self._begin(done, chunk, host, calls)
            if begun is None:
                return False
            late.append(begun)
            # The one before: the device works on this one meanwhile, and on
            # while the batches of the next are made.
            if one_by_one or len(late) > 1:
                end_first()
            done += chunk.num_batches
            if hooks.wants_test_batch_logs:
                logs = means.last
                if self._task.validation_logs is LogStyle.RUNNING:
                    logs = self._logs(means)
                hooks.on_test_batch_end(done - 1, dict(sorted(logs.items())))
            if hooks.stop_evaluating:
                break
        while late:
            end_first()
        return True

    def _logs(self, means: "_Means") -> Logs:
        """Means and metrics, or what the last batch's own step reported."""
        results = self._results()
        if self._task.validation_logs is LogStyle.OWN:
            same = results.keys() == means.last.keys()
            return results if same else means.last
        return means.read() | results

    def build(self) -> None:
        """Trace the step, so that lazily made variables exist."""
        self._loop(self._source.example(self._capacity), "the first batch")

    def _trace_all(self) -> None:
        """Trace what is known to come, before any thread is begun.

        A trace leaves the global random state as it was before: what host
        metrics draw meanwhile would be drawn again.
        """
        self.build()
        is_whole = self._num_batches == self._source.batches_per_epoch
        if is_whole and self._source.partial_batch_size:
            operands = self._source.example(self._capacity)
            partial = partial_batches(self._source, operands)
            self._loop(partial, "the partial last batch")

    def _begin(
        self, step: int, chunk: Chunk, host: HostThread | None, calls: Calls
    ) -> "_Begun | None":
        """Begin the steps of a chunk; None if the host gave up."""
        if self._checks is not None:
            self._checks.check(chunk, step)
        loop = self._loop(chunk.operands, f"batch {step}")
        at = time.perf_counter()
        logs = calls.begin(loop, step, chunk)
        if host is not None:
            outputs = []
            if isinstance(logs, tuple):
                logs, outputs = logs
            packed = self._packed[chunk.shapes]
            assert packed is not None  # made by each trace, where it is needed
            if not host.take(packed, outputs, chunk):
                return None
        return _Begun(chunk, at, loop.log_names, logs)

    def _loop(self, operands: Any, which: str) -> CompiledLoop:
        shapes = shapes_of(operands)
        if shapes not in self._loops:
            self._loops.make_room(
                shapes, is_expected=self._source.partial_batch_size > 0
            )
            backend = backends.current()
            if self._resident is None:
                self._resident = backend.place(self._source.resident)
            roots = {
                "model": self._model,
                "metrics": self.metrics,
                "task": vars(self._task),
            }
            before = Settings(roots)
            which += " of the validation data"
            with self._loops.naming(shapes, which), tracing(self._reads):
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
            self._loops.add(shapes, loop)
            self._settings = Settings(roots, before)
            self._packed[shapes] = self._last_packed
        return self._loops[shapes]

    def _step(self, batch: Any, step: Any) -> Any:
        del step
        metrics = [
            HostStepMetric(metric)
            if isinstance(metric, HostMetric)
            else StepMetric(metric, Every(1))
            for metric in self.metrics
        ]
        logs = self._task.validation_step(batch, self._model, metrics)
        on_host = [m for m in metrics if isinstance(m, HostStepMetric)]
        if not self._host.is_needed:
            return check_logs(logs, self._task, "validation_step", loss=False)
        aggregated = logs if self._host.aggregates else None
        if aggregated is not None and isinstance(logs, dict):
            logs = {k: v for k, v in logs.items() if _is_scalar(v)}
        scalars = check_logs(logs, self._task, "validation_step", loss=False)
        self._last_packed = Packed(aggregated, on_host)
        tensors = self._last_packed.tensors
        return (scalars, tensors) if tensors else scalars


@dataclasses.dataclass(frozen=True)
class _Begun:
    """Steps that may be under way.

    Attributes:
        chunk: their batches.
        at: when they were begun, in seconds.
        names: of their logs.
        logs: for `Calls.result`.
    """

    chunk: Chunk
    at: float
    names: list[str]
    logs: Any


class _Means:
    """Means over examples of the logs of validation's steps.

    Attributes:
        last: the logs of the last step.
    """

    def __init__(self) -> None:
        self.last: Logs = {}
        self._sums: Logs = {}
        self._examples = 0

    def add(self, chunk: Chunk, names: list[str], logs: Any) -> None:
        """Wait for the logs of a chunk's steps, and add them."""
        rows = backends.current().to_host(logs, chunk.num_batches)
        for k, name in enumerate(names):
            total = self._sums.get(name, 0.0)
            for value in rows[:, k].tolist():
                total += value * chunk.batch_size
            self._sums[name] = total
        self._examples += chunk.num_batches * chunk.batch_size
        self.last = dict(zip(names, rows[-1].tolist(), strict=True))

    def read(self) -> Logs:
        """The means so far."""
        return {
            name: total / self._examples for name, total in self._sums.items()
        }


def _is_scalar(value: Any) -> bool:
    if isinstance(value, dict | list | tuple | str | HostValue | None):
        return False
    return tuple(getattr(value, "shape", ())) == ()
