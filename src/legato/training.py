"""The training step of a Task, compiled, for the loop to drive."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.backends import Compilation, CompiledLoop, Keeping, LoopMode
from legato.by_shape import LoopsByShape
from legato.calls import Calls
from legato.compat.keras_trainable import TrainableFlags
from legato.config import MAX_SHAPES
from legato.data import (
    Chunk,
    DataSource,
    InputChecks,
    Shapes,
    partial_batches,
    shapes_of,
)
from legato.errors import StepError
from legato.evaluation import check_logs
from legato.metrics import StepMetric, run_recorded
from legato.phases import Phases
from legato.readings import Readings
from legato.settings import Settings
from legato.state import layer_paths
from legato.task import AttributeReads, Task, tracing
from legato.types import LogStyle
from legato.when import When

_MANY = 8
"""Summaries in a call that take longer to write than to hand the call over."""


class TrainSteps:
    """Compiles `Task.train_step` and runs chunks of batches through it.

    Args:
        task: the task.
        model: its model or models.
        optimizer: its optimizer or optimizers.
        source: the training data.
        metrics: the training metrics, and when each is updated; None where
            they are off.
        mode: how steps reach the device; None chooses.
        compilation: whether to compile, where that is a choice and `mode`
            is None.
        capacity: batches in one device call, which is part of the program.
        max_steps: the most to run in one; None for the capacity.
        checks: looks at each batch before it is used; None: nobody does.
        max_shapes: for how many shapes of batches the step may be compiled.
        summary_interval: steps between summaries; 0 for none.
        readings: what summaries read.
        one_by_one: whether steps are asked for one by one.
        phases: told what the time is spent on; None where nobody asks.

    Attributes:
        compiling: a context around what may compile for long.
        announce: told what takes time and was not to be expected.
        capacity: the most steps in one call of `run`.
        mode: the one chosen, once `trace` was called.
        log_names: names of the step's logs, likewise.
        traces: how often the step has been traced.
        steps_untold: of the last call, as long as nobody has waited for it;
            the variables hold what they make.
    """

    def __init__(
        self,
        task: Task,
        model: Any,
        optimizer: Any,
        source: DataSource,
        metrics: Mapping[keras.metrics.Metric, When] | None,
        *,
        mode: LoopMode | None,
        capacity: int,
        compilation: Compilation = "never",
        max_steps: int | None = None,
        checks: InputChecks | None = None,
        max_shapes: int = MAX_SHAPES,
        summary_interval: int = 0,
        readings: Readings | None = None,
        one_by_one: bool = False,
        phases: Phases | None = None,
    ) -> None:
        self.announce: Callable[[str], None] = lambda _: None
        self._checks = checks
        self._max_shapes = max_shapes
        self.compiling: Callable[[], AbstractContextManager[Any]] = (
            contextlib.nullcontext
        )
        self.capacity = min(capacity, max_steps or capacity)
        self._operand_capacity = capacity
        self.mode: LoopMode | None = mode
        self._compilation: Compilation = compilation
        self._summary_interval = summary_interval
        self._keeping: Keeping | None = None
        if readings is not None and summary_interval:
            self._keeping = Keeping(
                summary_interval, lambda: readings.variables
            )
        self._one_by_one = one_by_one
        self._phases = phases
        self.log_names: list[str] = []
        self.traces = 0
        self._task = task
        self._model = model
        self._optimizer = optimizer
        self._source = source
        self._metrics = metrics or {}
        self._are_metrics_on = metrics is not None
        self._backend = backends.current()
        self._resident: Any = None
        self._calls = Calls()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._loops = LoopsByShape(
            self._source,
            f"{type(self._task).__name__}.train_step",
            self._max_shapes,
            lambda text: self.announce(text),
        )
        self._called: set[Shapes] = set()
        self._first = 0  # of the steps that were begun last
        self.steps_untold = 0
        self._usual: Shapes | None = None
        self._variables: dict[int, keras.Variable] = {}
        self._trainable = TrainableFlags([])
        self._settings = Settings({})
        self._reads = AttributeReads()

    @property
    def is_traced(self) -> bool:
        """Whether `trace` was called."""
        return len(self._loops) > 0

    @property
    def keeps(self) -> bool:
        """Whether it goes on at summaries, and keeps what they need."""
        return all(loop.kept is not None for loop in self._loops)

    @property
    def keeps_many(self) -> bool:
        """Whether what is kept in a long call takes the host long to write."""
        often = 0 < self._summary_interval <= self.capacity // _MANY
        return often and self.keeps

    @property
    def variables(self) -> list[keras.Variable]:
        """Every variable that the step reads or writes."""
        return list(self._variables.values())

    def trace(self, operands: Any = None) -> None:
        """Trace the step; values do not change.

        Args:
            operands: those of a chunk of other shapes than usual; None traces
                the usual ones.

        Raises:
            StepError: the step broke its contract.
        """
        expected = self.variables
        if operands is None:
            self._resident = self._backend.place(self._source.resident)
            operands = self._source.example(self._operand_capacity)
            self._usual = shapes_of(operands)
            self.build_model()
            expected = self._expected_variables()
        before = Settings(self._roots())
        with tracing(self._reads):
            try:
                loop = self._backend.compile_loop(
                    self._step,
                    fetch=self._source.fetch,
                    resident=self._resident,
                    operands=operands,
                    mode=self.mode,
                    losses_in_step=self._task.train_logs is LogStyle.OWN,
                    variables=expected,
                    compilation=self._compilation,
                    native=self._task.train_logs is LogStyle.OWN,
                    keeping=self._keeping,
                    one_by_one=self._one_by_one,
                )
            except ValueError as error:
                # Keras's message goes on with the variable's values.
                if not str(error).startswith("Unknown variable"):
                    raise
                raise StepError(
                    f"{str(error)[:100]}... is not one that the optimizer was "
                    "built with, as when a layer is unfrozen during training. "
                    "Build it with all variables that it will ever update "
                    "(optimizer.build(model.variables) before freezing)."
                ) from None
        self._add_loop(shapes_of(operands), loop)
        self._settings = Settings(self._roots(), before)

    def _trace_partial_batch(self, operands: Any) -> None:
        """Its turn comes with the second call of `run`.

        So the first step is not kept waiting, and an error that only this
        batch meets still shows at once, not at the end of an epoch.

        Args:
            operands: those of a chunk of full batches.
        """
        operands = partial_batches(self._source, operands)
        if shapes_of(operands) not in self._loops:
            with self.compiling():
                self.trace(operands)

    def build_model(self) -> None:
        """A model that is built by its first call, is called in the abstract.

        The engine's own step asks for its variables before it calls it.
        """
        model = self._model
        own = type(self._task).train_step is Task.train_step
        if not own or all(layer.built for layer in self._layers()):
            return
        batch = self._source.batch_spec(self._source.full_batch_size)
        if isinstance(batch, tuple) and len(batch) == 2:
            for make in (keras.KerasTensor, keras.ops.zeros):
                features = keras.tree.map_structure(
                    lambda spec, make=make: make(spec.shape, str(spec.dtype)),
                    batch[0],
                )
                try:
                    model(features)
                    return
                except NotImplementedError:
                    # A layer that cannot tell the shape of what it returns.
                    continue

    def _layers(self) -> list[keras.layers.Layer]:
        return list(layer_paths({"model": self._model}).values())

    def _expected_variables(self) -> list[keras.Variable]:
        """Those that the step is sure to use: one trace instead of two.

        That is known of the engine's own step alone, which applies its
        optimizer to all trainable variables.
        """
        model, optimizer = self._model, self._optimizer
        own = type(self._task).train_step is Task.train_step
        if not own or not isinstance(model, keras.Model) or not model.built:
            return []
        if isinstance(optimizer, keras.optimizers.Optimizer):
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
            return [
                *model.variables,
                *optimizer.variables,
                *(v for metric in self._metrics for v in metric.variables),
            ]
        return []

    def _add_loop(self, shapes: Shapes, loop: CompiledLoop) -> None:
        name = f"{type(self._task).__name__}.train_step"
        variables = {id(v): v for v in loop.variables}
        new = [v.path for k, v in variables.items() if k not in self._variables]
        if len(self._loops) and new:
            # They would be missing in the checkpoints.
            raise StepError(
                f"{name} uses {', '.join(new[:3])} for batches of the shape "
                f"{shapes} only. Use the same variables for every "
                "batch."
            )
        if len(self._loops) and loop.log_names != self.log_names:
            raise StepError(
                f"{name} returned the logs {self.log_names} for one shape of "
                f"batch and {loop.log_names} for another. Return the same for "
                "all."
            )
        self.mode = loop.mode
        self.log_names = loop.log_names
        self.traces += loop.traces
        self._loops.add(shapes, loop)
        self._variables |= variables
        self._trainable = TrainableFlags([*self.variables, *self._layers()])

    def _roots(self) -> dict[str, Any]:
        return {
            "model": self._model,
            "optimizer": self._optimizer,
            "metrics": list(self._metrics),
            "task": vars(self._task),
        }

    def _is_another_step(self) -> bool:
        """Whether a callback changed what the step holds as a constant."""
        if self._trainable.have_changed:  # layers were frozen, or unfrozen
            return True
        # (Where Python runs at each step, it sees for itself.)
        if self.mode == "eager" or not self._settings.have_changed:
            return False
        changed = self._settings.differences()
        self.announce(f"The training step is made anew: {changed}.")
        return True

    def _step(self, batch: Any, step: Any) -> dict[str, Any]:
        metrics = None
        if self._are_metrics_on:
            metrics = [StepMetric(m, when) for m, when in self._metrics.items()]
            self._begin_interval(step)
        logs = self._task.train_step(
            batch, self._model, self._optimizer, metrics
        )
        if metrics:
            run_recorded(metrics, step)
        own = self._task.train_logs is LogStyle.OWN
        check_logs(logs, self._task, "train_step", loss=not own)
        if self._task.train_logs is not LogStyle.MEANS:
            return logs
        for metric in self._metrics:
            if metric.name in logs:
                raise StepError(
                    f"{type(self._task).__name__}.train_step returned a log "
                    f"named {metric.name!r}, which is the name of a metric. "
                    "Give one of them another name."
                )
        return logs

    def _begin_interval(self, step: Any) -> None:
        """Reset what is taken since the last summary, after one.

        Not at the summary: the logs of an epoch that ends there hold it too.
        """
        windowed = [
            metric
            for metric, when in self._metrics.items()
            if when.over == "summary"
        ]
        if windowed and self._summary_interval:

            def reset() -> None:
                for metric in windowed:
                    metric.reset_state()

            # (Without a constant tensor: replays on PyTorch decide what depends
            # on the step alone.)
            due = step % self._summary_interval == 0
            due = keras.ops.convert_to_tensor(due, "bool")
            keras.ops.cond(due, reset, lambda: None)

    def run(self, step: int, chunk: Chunk) -> Any:
        """Begin a chunk's steps on the device.

        Raises:
            StepError: a plain attribute of the Task, which the compiled step
                holds as a constant, changed.
            DataError: the chunk does not pass the checks, or its batches have
                one more shape than there may be.
        """
        self._reads.check()
        self._first, self.steps_untold = step, 0
        if self._checks is not None:
            self._checks.check(chunk, step)
        if self._is_another_step():
            self._begin_anew()
            self.trace()
        shapes = chunk.shapes
        if shapes not in self._loops:
            self._loops.make_room(
                shapes, is_expected=self._source.partial_batch_size > 0
            )
            which = f"the batch of step {step + 1}"
            with self.compiling(), self._loops.naming(shapes, which):
                self.trace(chunk.operands)
        elif (
            len(self._loops) == 1
            and shapes in self._called
            and self._source.partial_batch_size
        ):
            self._trace_partial_batch(chunk.operands)
        loop = self._loops[shapes]
        if shapes in self._called:
            if block := chunk.block:
                logs = loop.run_ahead(
                    step, block.operands, block.index, block.stop
                )
                if logs is not None:
                    self.steps_untold = 1
                    return logs
            logs = self._calls.begin(loop, step, chunk)
        else:
            with self.compiling():
                logs = loop(step, chunk.num_batches, chunk.operands)
            self._called.add(shapes)
            self._tell_phases()
        self.steps_untold = chunk.num_batches
        return logs

    @property
    def overlap(self) -> bool:
        """Whether `run` returns while the device is at work."""
        return self._calls.do_overlap

    def make_overlap(self) -> None:
        """Have `run` do so, if it can be done: there is use for the time."""
        self._calls.make_overlap()
        self._tell_phases()

    def begin_anew(self) -> None:
        """Take the next calls for first ones, which may compile.

        Where batches will come in another way, as from the host.
        """
        for shapes in self._called:
            if shapes in self._loops:
                self._loops[shapes].phases = None
        self._called.clear()

    def close(self) -> None:
        """Wait for what was begun, and overlap no more."""
        self._calls.close()
        self._tell_phases()

    def _tell_phases(self) -> None:
        """Have calls tell their phases, but first ones, which compile.

        Not in another thread: that is not what this one is doing.
        """
        told = None if self._calls.in_thread else self._phases
        for shapes in self._called:
            if shapes in self._loops:
                self._loops[shapes].phases = told

    def begin(self, step: int, chunk: Chunk) -> None:
        """Begin a chunk that `run` will be asked for, if that can be undone.

        Whatever changes before it is, `run` does the right thing.
        """
        if chunk.shapes in self._called:
            loop = self._loops[chunk.shapes]
            if chunk.block and loop.is_ahead:
                return
            loop.begin(step, chunk.num_batches, chunk.operands)

    def rows(
        self, logs: Any, chunk: Chunk
    ) -> tuple[np.ndarray, Mapping[int, np.ndarray] | None]:
        """Wait for a chunk's steps; their logs, float32 `[steps, names]`.

        And what was kept of variables at the steps of summaries,
        `[times or more, ...]`, by their ids; None if the steps do not go on
        at summaries.
        """
        try:
            logs = self._calls.result(logs)
        except Exception:
            self.steps_untold = 0  # it made none, or variables are lost
            raise
        loop = self._loops[chunk.shapes]
        variables, stacks = loop.kept, []
        if variables and not loop.columns:
            logs, stacks = logs
        rows = self._backend.to_host(logs, chunk.num_batches)
        if loop.columns:
            every = self._summary_interval
            first = every - 1 - self._first % every
            rows, stacks = loop.columns.split(rows, first, every)
        elif variables:
            stacks = self._backend.values(stacks, variables)
        self.steps_untold = 0
        if variables is None:
            return rows, None
        ids = map(id, variables)
        return rows, dict(zip(ids, stacks, strict=True))
