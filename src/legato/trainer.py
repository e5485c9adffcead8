"""Trains a Task in a run directory, and resumes it exactly."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import keras

from legato import backends, loop, storage
from legato.callbacks import CallbackRunner
from legato.callbacks.entries import flatten
from legato.checkpoint import (
    FINAL,
    Checkpoint,
    RunReader,
    check_which,
    find_checkpoint,
    watch_checkpoints,
)
from legato.config import TrainerConfig, dump_yaml
from legato.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    LegatoWarning,
    Stopped,
)
from legato.evaluation import Evaluator
from legato.interrupts import Interrupts
from legato.metrics import HostMetric
from legato.parts import build_parts, precision
from legato.progress import make_reporter
from legato.restoring import assign_arrays
from legato.run_directory import (
    CONFIG,
    is_run,
    prepare_run_directory,
    read_run_id,
)
from legato.session import Session
from legato.sinks import SUMMARIES, EvaluationSink, check_managers
from legato.state import variable_paths
from legato.summaries import SummaryManagerInterface, as_step
from legato.task import Optimizers, Task
from legato.types import AuditEntry


class Trainer:
    """Trains a Task; killed at any instant, the same call goes on exactly.

    What a run does::

        build model, optimizer, data; trace the step
        restore the newest intact checkpoint, or begin at step 0
        until the end: steps in device loops; and, when they are due,
            summaries, validation, on_epoch_end, a checkpoint
        where the loss went wrong: restore an earlier one, and skip those steps

    Args:
        task: what is learned.
        run_dir: where everything is written; resumed if a run is there.
        config: how the run is driven.
        callbacks: Keras callbacks, called after those of the Task; their
            state is saved and restored.
        summary_manager: writes the summaries of training; None is the run's
            own, in `run_dir/summaries/train`, if `config.sinks` has
            "tensorboard".
        eval_summary_manager: writes the results of validation, likewise; and
            those of `evaluate` and `evaluate_continuously`, which otherwise
            write nothing.
        config_yaml: what `config.yaml` in the run directory will say; None
            for `config` alone.

    Attributes:
        task: as given.
        config: as given.
        run_dir: as given.
        audit: what became of each part of the state at the last resume.
        session_type: of what `train` makes; `legato.verify` watches by it.

    Raises:
        ConfigError: an argument is wrong, or the Task builds something else
            than it must.
        DataError: the data are wrong.
    """

    session_type: ClassVar[Callable[..., Session]] = Session

    def __init__(
        self,
        task: Task,
        *,
        run_dir: str | os.PathLike[str],
        config: TrainerConfig,
        callbacks: Any = (),
        summary_manager: SummaryManagerInterface | None = None,
        eval_summary_manager: SummaryManagerInterface | None = None,
        config_yaml: str | None = None,
    ) -> None:
        if not isinstance(task, Task):
            raise ConfigError(
                f"task={task!r}: it must be an object of a subclass of "
                "legato.Task."
            )
        if not isinstance(config, TrainerConfig):
            raise ConfigError(
                f"config={config!r}: it must be a legato.TrainerConfig."
            )
        if not isinstance(run_dir, str | os.PathLike):
            raise ConfigError(
                f"run_dir={run_dir!r:.80}: it must be a path, such as "
                '"runs/first": where everything is written.'
            )
        if "://" in str(run_dir):
            raise ConfigError(
                f"run_dir={str(run_dir)!r}: a remote directory is not "
                "supported yet. Give a local path and copy it afterwards."
            )
        if keras.distribution.distribution() is not None:
            raise ConfigError(
                "A keras.distribution is in force: training on several "
                "devices is not supported yet. Call "
                "keras.distribution.set_distribution(None) first."
            )
        self.task = task
        self.config = config
        self.run_dir = Path(run_dir)
        self.audit: list[AuditEntry] = []
        check_managers(
            self.run_dir,
            SUMMARIES,
            summary_manager=summary_manager,
            eval_summary_manager=eval_summary_manager,
        )
        self._summary_manager = summary_manager
        self._eval_summary_manager = eval_summary_manager
        self._config_yaml = config_yaml or _nested("trainer", dump_yaml(config))
        self._has_trained = False
        self._step = 0  # of the weights that the model holds
        given = flatten(callbacks, "callbacks")
        backends.current().keep_programs()
        self._parts = build_parts(task, config)
        own = flatten(task.build_callbacks(), "build_callbacks")
        self._callbacks = [*own, *given]

    @property
    def model(self) -> Any:
        """What `Task.build_model` returned."""
        return self._parts.model

    @property
    def optimizer(self) -> Optimizers:
        """What `Task.build_optimizer` returned, or the config describes."""
        return self._parts.optimizer

    def train(self) -> keras.callbacks.History:
        """Train to the end of the run, from where it was left.

        Returns:
            The history of the whole run, over all resumes. A finished run
            returns its history and trains nothing.

        Raises:
            Stopped: a signal or `max_time` ended it; everything is saved.
            Interrupted: Ctrl-C ended it; everything is saved.
            NonFiniteLossError: the loss became NaN or infinite (and no
                recovery is left).
            BadLossError: it rose above `loss_upper_bound`, likewise.
            StepError: the step broke its contract.
            RestoreError: the checkpoint is another run's.
            RunDirError: the run directory is in use, or is something else.
            CheckpointError: nothing could be written for
                `checkpoint_timeout`.
            ExactnessError: `exact="strict"` and something is not exact.
        """
        self.config.require_length()
        self.config.require_sinks()
        prepare_run_directory(self.run_dir)
        self._has_trained = True
        session = None
        with (
            precision(self.config.precision),
            storage.RunLock(self.run_dir),
            Interrupts(max_seconds=self.config.max_seconds) as interrupts,
        ):
            while True:
                with (
                    self.session_type(
                        self._parts,
                        self.config,
                        self.run_dir,
                        read_run_id(self.run_dir),
                        self._callbacks,
                        references=self._references(),
                        interrupts=interrupts,
                        before=session,
                        summary_managers={
                            "train": self._summary_manager,
                            "validation": self._eval_summary_manager,
                        },
                    ) as session,
                    self._noting_step(session),
                    as_step(lambda clock=session.clock: clock.step),
                ):
                    session.identify()
                    if not session.steps.is_traced:
                        with session.compiling():
                            session.steps.trace()
                    session.begin()
                    _write_config(self.run_dir / CONFIG, self._config_yaml)
                    self.audit = session.audit
                    if session.clock.finished:
                        session.end()
                    else:
                        with session.training():
                            loop.run(**session.for_loop())
                if not session.recovers:
                    return session.history

    @contextlib.contextmanager
    def _noting_step(self, session: Session) -> Iterator[None]:
        """Note of which step the weights are that a session leaves."""
        try:
            yield
        finally:
            if session.held is not None and session.held.step is not None:
                self._step = session.held.step
            elif session.audit or session.clock.step:
                # Otherwise it failed before it changed any.
                self._step = session.clock.step

    def evaluate(
        self,
        *,
        checkpoint: str | int | Checkpoint | None = None,
        metrics: Sequence[keras.metrics.Metric | HostMetric] | None = None,
        weights: Literal["model", "average"] = "model",
    ) -> dict[str, Any]:
        """Measure the model on the validation split.

        Takes no lock and writes nothing into the run, another process of
        which may train meanwhile; an `eval_summary_manager` is given what was
        measured, at the checkpoint's step; if that fails, a warning says so.

        Args:
            checkpoint: whose weights are measured, and held by the model
                afterwards: "best", a step, or "latest": those that the run
                ended with, or else its newest intact checkpoint. None
                measures the model as it is, if this process has trained it,
                and else does as "latest" (with a warning, if there is no run
                yet, and the model is as `build_model` made it).
            metrics: what to measure beside the step's own logs; also what
                was never measured in training. Each is updated by
                `Task.process_metrics`. None takes `build_metrics(False)`.
            weights: "average" measures the averages that the optimizer keeps
                (`use_ema=True`); the model has its own weights afterwards.

        Returns:
            The mean of each of `validation_step`'s logs, the metrics, and
            what the Task makes of aggregated logs: floats by name. Host
            metrics and the Task may return groups of them too, as dicts, and
            images, texts or figures.

        Raises:
            ConfigError: there is no validation split, an argument is wrong, or
                there are no averages.
            RunDirError: the run directory is not a run's.
            CheckpointError: there is no such checkpoint, or it is damaged.
            RestoreError: the checkpoint does not fit the model.
        """
        evaluator = self._evaluator(metrics)
        if isinstance(checkpoint, Checkpoint):
            found = checkpoint
        elif checkpoint is not None:
            which = check_which(checkpoint, "checkpoint")
            found = find_checkpoint(self.run_dir, which)
        else:
            found = None if self._has_trained else self._find_newest()
        if found is not None:
            self._load(found, evaluator)
        with self._parts.averaged(weights, found):
            logs = self._measure(evaluator, lambda: False)
        assert logs is not None  # nothing asks it to stop
        EvaluationSink(self._eval_summary_manager).write(self._step, logs)
        return logs

    def evaluate_continuously(
        self,
        *,
        metrics: Sequence[keras.metrics.Metric | HostMetric] | None = None,
        weights: Literal["model", "average"] = "model",
        timeout: float | None = None,
        on_result: Callable[[Checkpoint, dict[str, Any]], None] | None = None,
    ) -> dict[int | str, dict[str, Any]]:
        """Measure each checkpoint of the run, as another process writes them.

        Begins with those that are there, and ends when the run has: then what
        it ended with is measured too. A checkpoint that is removed before it
        can be read is left out, and so is a damaged one, with a warning.
        Nothing is written into the run: results are returned, and given to
        `on_result` and to an `eval_summary_manager`.

        Args:
            metrics: as for `evaluate`.
            weights: as for `evaluate`.
            timeout: end when no new checkpoint came for so many seconds; None
                waits for ever.
            on_result: called with each result and the checkpoint that it is
                of; None shows it as `config.progress` says.

        Returns:
            The results, as those of `evaluate`, by step; and as "final" of
            what the run ended with.

        Raises:
            Stopped: a signal ended it.
            Interrupted: Ctrl-C ended it.
            ConfigError: there is no validation split, or an argument is wrong.
            CheckpointError: no checkpoint came within `timeout`, or one
                cannot be read.
            RestoreError: a checkpoint does not fit the model.
        """
        if timeout is not None and not timeout >= 0:
            raise ConfigError(
                f"timeout={timeout!r}: it must be seconds, 0 or more; or None "
                "to wait for ever."
            )
        evaluator = self._evaluator(metrics)
        report = on_result or self._show_result
        results: dict[int | str, dict[str, Any]] = {}
        sink = EvaluationSink(self._eval_summary_manager)
        with Interrupts() as interrupts:
            for checkpoint in watch_checkpoints(
                self.run_dir,
                timeout_secs=timeout,
                stop_requested=interrupts.is_asked,
            ):
                # The first one waits for the compiler.
                interrupts.compiling = not results
                self._load(checkpoint, evaluator)
                with self._parts.averaged(weights, checkpoint):
                    logs = self._measure(evaluator, interrupts.is_asked)
                interrupts.compiling = False
                if logs is None:
                    break
                ended = checkpoint.path.name == FINAL
                results[FINAL if ended else checkpoint.step] = logs
                if not ended or checkpoint.step not in results:
                    sink.write(checkpoint.step, logs)
                report(checkpoint, logs)
        reason = interrupts.reason
        if reason is not None and FINAL not in results:
            message = (
                f"{reason}: stopped measuring {self.run_dir}; checkpoints "
                f"measured: {len(results)}."
            )
            raise (Interrupted if reason == "SIGINT" else Stopped)(message)
        if not results:
            raise CheckpointError(
                f"{self.run_dir}: no checkpoint came within timeout={timeout} "
                "seconds. Is it the run_dir of the run that trains?"
            )
        return results

    def _evaluator(
        self, metrics: Sequence[keras.metrics.Metric | HostMetric] | None
    ) -> Evaluator:
        own = self._parts.evaluator
        if own is None:
            raise ConfigError(
                f"{type(self.task).__name__}.build_inputs('validation') "
                "returned None: there is nothing to evaluate on."
            )
        if metrics is None:
            return own
        several = isinstance(metrics, list | tuple)
        chosen: list[Any] = list(metrics) if several else [metrics]
        names = [self.task.loss]
        for metric in chosen:
            if not isinstance(metric, keras.metrics.Metric | HostMetric):
                raise ConfigError(
                    f"metrics: {metric!r} is neither a keras.metrics.Metric "
                    "nor a legato.HostMetric. Give objects, such as "
                    "[keras.metrics.MeanSquaredError()]."
                )
            if metric.name in names:
                raise ConfigError(
                    f"metrics: {metric.name!r} is the name of the loss or of "
                    "another metric. Give each one its own `name`."
                )
            names.append(metric.name)
        return Evaluator(
            self.task,
            self.model,
            own.source,
            chosen,
            seed=self.config.seed,
            max_batches=self.config.validation_steps,
        )

    def _references(self) -> dict[str, object]:
        """What callbacks may hold and must not save a copy of."""
        managers = {
            "summary_manager": self._summary_manager,
            "eval_summary_manager": self._eval_summary_manager,
        }
        given = {k: each for k, each in managers.items() if each is not None}
        return {"trainer": self, "task": self.task, **given}

    def _measure(
        self, evaluator: Evaluator, stop_requested: Callable[[], bool]
    ) -> dict[str, Any] | None:
        callbacks = CallbackRunner([], model=self._parts.whole, params={})
        with precision(self.config.precision):
            return evaluator(callbacks, stop_requested, self._step)

    def _find_newest(self) -> Checkpoint | None:
        found = None
        if is_run(self.run_dir):
            found = RunReader(self.run_dir).latest()
        if found is None:
            warnings.warn(
                f"There is no run in {self.run_dir} that has come to a "
                "checkpoint: the model is measured as build_model made it.",
                LegatoWarning,
                stacklevel=3,
            )
        return found

    def _load(self, checkpoint: Checkpoint, evaluator: Evaluator) -> None:
        """Put in the model, and whatever else validation uses."""
        with precision(self.config.precision):
            evaluator.build()  # makes what is made lazily
        self._step = checkpoint.step
        parts = self._parts
        # In the order in which they were saved, which names depend on.
        named = variable_paths(
            {
                "model": parts.model,
                "optimizer": parts.optimizer,
                "task": vars(self.task),
            },
            evaluator.variables,
        )
        # Not the seeds that only training uses: backends differ in their type.
        used = {id(v) for v in (*parts.whole.weights, *evaluator.variables)}
        chosen = {path: v for path, v in named.items() if id(v) in used}
        new = {
            path
            for path in chosen
            if not path.startswith("model/") and path not in checkpoint.arrays
        }
        if new:
            warnings.warn(
                f"Validation uses variables that the checkpoint of step "
                f"{checkpoint.step} does not hold, which keep the values that "
                f"the program gave them: {', '.join(sorted(new))}.",
                LegatoWarning,
                stacklevel=3,
            )
        arrays = {
            path: array
            for path, array in checkpoint.arrays.items()
            if path in chosen
            or (path.startswith("model/") and path not in named)
        }
        assign_arrays(
            {path: v for path, v in chosen.items() if path not in new},
            dataclasses.replace(checkpoint, arrays=arrays),
        )

    def _show_result(
        self, checkpoint: Checkpoint, logs: dict[str, Any]
    ) -> None:
        scalars = {k: v for k, v in logs.items() if isinstance(v, float)}
        reporter = make_reporter(self.config.progress)
        reporter.validation(checkpoint.step, scalars)


def _nested(key: str, yaml: str) -> str:
    return "".join([f"{key}:\n", *(f"  {x}\n" for x in yaml.splitlines())])


def _write_config(path: Path, text: str) -> None:
    """Write the resolved config, if it is another than is there."""
    if not path.exists() or path.read_text("utf-8") != text:
        storage.write_file(path, text.encode())
