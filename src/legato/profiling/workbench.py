"""The parts of a run, put together so that each can be timed by itself."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.config import TrainerConfig
from legato.config.sinks import BUILT_IN
from legato.data import Chunk, DataSource
from legato.errors import ConfigError
from legato.evaluation import Evaluator
from legato.parts import build_parts, precision
from legato.phases import COMPILE, Phases
from legato.program import choose_program, make_schedule
from legato.progress import make_reporter
from legato.readings import Readings
from legato.recorder import Recorder
from legato.recovery import watch_losses
from legato.sinks import RunLog
from legato.state import Clock
from legato.task import Task
from legato.training import TrainSteps
from legato.types import LogStyle
from legato.when import Every, When

_CALL_SECS = 0.2
"""What a device call takes at most, if it holds more than one step."""

_DRAW_SECS = 5.0
"""What the batches for it take at most to be drawn."""

_WARM_STEPS = 40
"""So many steps are quick to come, and PyTorch's replay has begun after."""

_WARM_SECS = 3.0

NEVER = Every(2**31 - 1)


class Workbench:
    """What a run is made of, and its steps in several variants.

    Args:
        task: the task.
        config: how it would be trained.
        folder: an empty directory for the logs.

    Attributes:
        config: the same, and nothing is printed or recovered from.
        parts: what the task built.
        schedule: of the run.
        evaluator: None where the run does not validate.
        notes: what could not be measured as it should be.
        bare: the steps without metrics.
        single: the steps with one of the metrics, at every step.
        configured: the steps as they are configured.
        has_configured: whether these are others than the ones before.
        are_metrics_off: whether the run is without them.
        chunk: batches that stay on the device, for one call.
        log: the logs, in the folder.
        clock: of the recorder.
        phases: what steps spend time on.

    Raises:
        ConfigError: the config trains nothing, or the task builds something
            else than it must.
        StepError: the step broke its contract.
    """

    def __init__(self, task: Task, config: TrainerConfig, folder: Path) -> None:
        config.require_length()
        self.are_metrics_off = not config.trains_metrics
        self.config = config.replace(
            **(
                {"train_metrics_interval": 1, "train_metrics": {}}
                if self.are_metrics_off
                else {}
            ),
            progress="none",
            # Batches that are trained on again and again mean nothing.
            nonfinite_loss="warn",
            loss_upper_bound=None,
            recovery_max_trials=0,
            recovery_begin_steps=0,
        )
        self.notes: list[str] = []
        self.parts = build_parts(task, self.config)
        self._backend = backends.current()
        source = self.parts.source
        self.schedule = make_schedule(
            self.config,
            source.batches_per_epoch,
            validates=self.parts.evaluator is not None,
        )
        if self.schedule.train_steps < 1:
            raise ConfigError(
                f"epochs={config.epochs} and initial_epoch="
                f"{config.initial_epoch}: no step is trained, so that there is "
                "nothing to measure. Raise epochs."
            )
        never = self.schedule.validation_interval is None
        self.evaluator = None if never else self.parts.evaluator
        self._program = choose_program(
            self.config, source, self.schedule.train_steps, None
        )
        self._source: Any = _Placed(source)
        self._values: list[np.ndarray] = []
        self._variables: list[keras.Variable] = []
        config.require_sinks()
        # A plug-in may tell a server of a run that there is not.
        sinks = [name for name in config.sinks if name in BUILT_IN]
        self.log = RunLog(folder, sinks=sinks)
        self.clock = Clock()
        self.phases = Phases()

    # -- steps --------------------------------------------------------------

    def trace(self) -> None:
        """Trace the steps in all variants; no value changes."""
        with precision(self.config.precision):
            self._trace()

    def _trace(self) -> None:
        metrics = self.metrics()
        base: Mapping[keras.metrics.Metric, When] | None = None
        try:
            self._trace_each(base, metrics)
        except Exception:
            if not metrics:
                raise
            # A step may take its metrics apart: then it needs all of them.
            base = dict.fromkeys(metrics, NEVER)
            self._trace_each(base, metrics)
            self.notes.append(
                "train_step cannot do without some of its metrics, so the bare "
                "step holds all of them, and updates none"
            )
        own = self.parts.metrics
        self.configured = self.bare
        self.has_configured = False
        if metrics and not self.are_metrics_off:
            self.configured, self.has_configured = self._find(metrics)
        if self.evaluator is not None:
            # As a run has it.
            if self.configured.mode == "compiled":
                self.evaluator.compilation = "auto"
            elif self.config.torch_compile is False:
                self.evaluator.compilation = "never"
            self.evaluator.build()  # what is made lazily is made now
        if self.parts.task.train_logs is LogStyle.OWN and own:
            self.notes.append(
                "the model's own train_step computes its metrics, so they are "
                "part of the bare step"
            )

    def _find(
        self, metrics: Mapping[keras.metrics.Metric, When]
    ) -> tuple[TrainSteps, bool]:
        """The steps with all metrics, and whether they are new ones."""
        if len(metrics) == 1:
            ((metric, when),) = metrics.items()
            if when.is_always:
                return self.single[metric], False
        return self._steps(metrics), True

    def metrics(self) -> dict[keras.metrics.Metric, When]:
        """The metrics that can be switched off."""
        if self.parts.task.train_logs is LogStyle.OWN:
            return {}
        return self.parts.metrics

    def _trace_each(
        self,
        base: Mapping[keras.metrics.Metric, When] | None,
        metrics: Mapping[keras.metrics.Metric, When],
    ) -> None:
        self.bare = self._steps(base)
        self.single = {
            metric: self._steps({**(base or {}), metric: Every(1)})
            for metric in metrics
        }

    def _steps(
        self, metrics: Mapping[keras.metrics.Metric, When] | None
    ) -> TrainSteps:
        parts, program = self.parts, self._program
        steps = TrainSteps(
            parts.task,
            parts.model,
            parts.optimizer,
            self._source,
            metrics,
            mode=program.mode,
            capacity=program.capacity,
            compilation=program.compilation,
            max_steps=self.config.steps_per_loop,
            phases=self.phases,
        )
        steps.compiling = functools.partial(self.phases.within, COMPILE)
        steps.trace()
        return steps

    def warm(self, steps: TrainSteps) -> None:
        """Compile, and run until steps are as quick as they will be."""
        began = time.perf_counter()
        # From the host, twice: a partial batch is traced in the second call.
        for _ in range(2):
            steps.rows(steps.run(0, self._one), self._one)
        done = 0
        while done < _WARM_STEPS and time.perf_counter() - began < _WARM_SECS:
            steps.rows(steps.run(0, self.chunk), self.chunk)
            done += self.chunk.num_batches

    # -- batches ------------------------------------------------------------

    def draw(self) -> None:
        """Draw the batches that bare steps are run on, and place them."""
        source, steps = self.parts.source, self.bare
        capacity = self._program.capacity
        most = min(steps.capacity, self.schedule.steps_per_epoch)
        began = time.perf_counter()
        # (By itself: the same batch is run again and again.)
        one = self._draw(capacity, 1)
        self._one = dataclasses.replace(one, block=None)
        draw_secs = time.perf_counter() - began
        step_secs = self._seconds(steps)
        most = max(
            1,
            min(
                most,
                int(_CALL_SECS / step_secs),
                int(_DRAW_SECS / max(draw_secs, 1e-9)),
            ),
        )
        chunk = self._one
        if most > 1 and not source.is_one_shot:
            chunk = self._draw(capacity, most)
        elif most > 1:
            chunk = dataclasses.replace(chunk, num_batches=most)
        placed = self._backend.place(chunk.operands)
        self.chunk = dataclasses.replace(chunk, operands=placed)
        self.one = dataclasses.replace(self.chunk, num_batches=1)

    def _draw(self, capacity: int, max_batches: int) -> Chunk:
        source = self.parts.source
        if source.is_one_shot:
            # What is read is gone: the same first batch, everywhere.
            operands = keras.tree.map_structure(
                lambda a: None if a is None else np.repeat(a[:1], len(a), 0),
                source.example(capacity),
            )
            return Chunk(
                num_batches=1,
                batch_size=source.full_batch_size,
                operands=operands,
                state=None,
            )
        iterator = source.iterate(seed=self.seed, capacity=capacity)
        try:
            return iterator.next_chunk(max_batches)
        finally:
            iterator.close()

    def _seconds(self, steps: TrainSteps) -> float:
        """About how long a step takes that is a device call of its own."""
        times = []
        for _ in range(5):
            began = time.perf_counter()
            steps.rows(steps.run(0, self._one), self._one)
            times.append(time.perf_counter() - began)
        return max(min(times), 1e-6)

    @property
    def seed(self) -> int:
        """Of the order of the data."""
        own = self.parts.task.order_seed
        return self.config.seed if own is None else own

    @property
    def capacity(self) -> int:
        """Batches that a chunk has room for."""
        return self._program.capacity

    # -- values -------------------------------------------------------------

    def remember(self) -> None:
        """Remember the values of all variables, which are known by now."""
        evaluator = self.evaluator
        all_steps = [self.bare, self.configured, *self.single.values()]
        metrics = [
            *self.parts.metrics,
            *(evaluator.metrics if evaluator else ()),
        ]
        found = {
            id(variable): variable
            for variable in (
                *self.parts.whole.variables,
                *(v for steps in all_steps for v in steps.variables),
                *(evaluator.variables if evaluator else ()),
                *(v for m in metrics for v in getattr(m, "variables", ())),
            )
        }
        self._variables = list(found.values())
        self._values = [
            np.array(value, copy=True)
            for value in self._backend.read(self._variables)
        ]

    def restore(self) -> None:
        """Put back the values that were remembered.

        Each measurement begins with the same ones. Those of the one before
        have been trained on a few batches for long: their gradients vanish,
        and tiny numbers are slow on some processors.
        """
        self._backend.write(self._variables, self._values)

    def named_variables(self) -> list[keras.Variable]:
        """Those that a checkpoint holds."""
        evaluator = self.evaluator
        found = {
            id(variable): variable
            for variable in (
                *self.configured.variables,
                *(evaluator.variables if evaluator else ()),
            )
        }
        return list(found.values())

    # -- books --------------------------------------------------------------

    def make_recorder(self, clock: Clock | None = None) -> Recorder:
        """The books of the run.

        Args:
            clock: where the run is; None for the one of the workbench.
        """
        parts = self.parts
        metrics = {} if self.are_metrics_off else parts.metrics
        return Recorder(
            task=parts.task,
            clock=clock or self.clock,
            config=self.config,
            schedule=self.schedule,
            metrics=metrics,
            directions=parts.directions(),
            log_names=lambda: self.configured.log_names,
            readings=Readings(list(metrics), parts.optimizers),
            log=self.log,
            reporter=make_reporter("none"),
            watch=watch_losses(
                self.config,
                loss=parts.task.loss,
                log_names=self.configured.log_names,
                scales_loss=parts.scales_loss(),
                ends_on_nan=False,
                is_one_shot=parts.source.is_one_shot,
            ),
            checks=parts.checks,
            phases=self.phases,
        )

    def make_evaluator(self, max_batches: int) -> Evaluator:
        """Validation, of at most so many batches."""
        own = self.evaluator
        assert own is not None
        evaluator = Evaluator(
            self.parts.task,
            self.parts.model,
            own.source,
            own.metrics,
            seed=self.config.seed,
            max_batches=max_batches,
        )
        evaluator.compilation = own.compilation
        return evaluator


class _Placed:
    """A source whose resident arrays are on the device once, for all steps."""

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self.resident = backends.current().place(source.resident)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
