"""Trains a Task in a run directory, and resumes it exactly."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from legato import loop, storage
from legato.callbacks import CallbackRunner
from legato.checkpoint import CheckpointStore
from legato.config import TrainerConfig, dump_yaml
from legato.errors import ConfigError, LegatoWarning
from legato.parts import build_parts
from legato.restoring import assign_arrays
from legato.run_directory import (
    CONFIG,
    is_run,
    prepare_run_directory,
    read_run_id,
)
from legato.session import Session
from legato.state import variable_paths
from legato.task import Optimizers, Task
from legato.types import AuditEntry, Logs


class Trainer:
    """Trains a Task; killed at any instant, the same call goes on exactly.

    What a run does::

        build model, optimizer, data; trace the step
        restore the newest intact checkpoint, or begin at step 0
        until the end: steps in device loops; and, when they are due,
            summaries, validation, on_epoch_end, a checkpoint

    Args:
        task: what is learned.
        run_dir: where everything is written; resumed if a run is there.
        config: how the run is driven.
        callbacks: Keras callbacks; their state is saved and restored.
        config_yaml: what `config.yaml` in the run directory will say; None
            for `config` alone.

    Attributes:
        task: as given.
        config: as given.
        run_dir: as given.
        audit: what became of each part of the state at the last resume.

    Raises:
        ConfigError: an argument is wrong, or the Task builds something else
            than it must.
        DataError: the data are wrong.
    """

    def __init__(
        self,
        task: Task,
        *,
        run_dir: str | os.PathLike[str],
        config: TrainerConfig,
        callbacks: Sequence[keras.callbacks.Callback] = (),
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
        self._callbacks = callbacks
        self._config_yaml = config_yaml or _nested("trainer", dump_yaml(config))
        self._has_trained = False
        self._parts = build_parts(task, config)

    @property
    def model(self) -> Any:
        """What `Task.build_model` returned."""
        return self._parts.model

    @property
    def optimizer(self) -> Optimizers:
        """What `Task.build_optimizer` returned."""
        return self._parts.optimizer

    def train(self) -> keras.callbacks.History:
        """Train to the end of the run, from where it was left.

        Returns:
            The history of the whole run, over all resumes. A finished run
            returns its history and trains nothing.

        Raises:
            Stopped: a signal or `max_time` ended it; everything is saved.
            Interrupted: Ctrl-C ended it; everything is saved.
            NonFiniteLossError: the loss became NaN or infinite.
            StepError: the step broke its contract.
            RestoreError: the checkpoint is another run's.
            RunDirError: the run directory is in use, or is something else.
            CheckpointError: nothing could be written for
                `checkpoint_timeout`.
            ExactnessError: `exact="strict"` and something is not exact.
        """
        self.config.require_length()
        prepare_run_directory(self.run_dir)
        self._has_trained = True
        with (
            storage.RunLock(self.run_dir),
            Session(
                self._parts,
                self.config,
                self.run_dir,
                read_run_id(self.run_dir),
                self._callbacks,
                references={"trainer": self, "task": self.task},
            ) as session,
        ):
            session.identify()
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
        return session.history

    def evaluate(self) -> Logs:
        """Measure the model on the validation split.

        The variables are those of this process if it has trained; otherwise
        those that the run ended with, or of its newest checkpoint.

        Returns:
            The mean of each of `validation_step`'s logs, and the metrics.

        Raises:
            ConfigError: there is no validation split.
            RestoreError: the checkpoint does not fit the model.
        """
        evaluator = self._parts.evaluator
        if evaluator is None:
            raise ConfigError(
                f"{type(self.task).__name__}.build_inputs('validation') "
                "returned None: there is nothing to evaluate on."
            )
        if not self._has_trained:
            if is_run(self.run_dir):
                evaluator.build()
                self._load_newest()
            else:
                warnings.warn(
                    f"There is no run in {self.run_dir}: the model is measured "
                    "as build_model made it.",
                    LegatoWarning,
                    stacklevel=2,
                )
        callbacks = CallbackRunner([], model=self._parts.whole, params={})
        logs = evaluator(callbacks, lambda: False)
        assert logs is not None  # nothing asks it to stop
        return logs

    def _load_newest(self) -> None:
        with storage.RunLock(self.run_dir):
            run_id = read_run_id(self.run_dir)
            store = CheckpointStore(self.run_dir, run_id=run_id)
            checkpoint = store.restore()
            final = store.load_final()
        if checkpoint is None:
            return
        if final is not None and final.step == checkpoint.step:
            checkpoint = final
        # The model alone, not what only training needs.
        assign_arrays(variable_paths({"model": self.model}), checkpoint)


def _nested(key: str, yaml: str) -> str:
    return "".join([f"{key}:\n", *(f"  {x}\n" for x in yaml.splitlines())])


def _write_config(path: Path, text: str) -> None:
    """Write the resolved config, if it is another than is there."""
    if not path.exists() or path.read_text("utf-8") != text:
        storage.write_file(path, text.encode())
