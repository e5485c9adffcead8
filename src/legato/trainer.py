"""Trains a Task in a run directory, and resumes it exactly."""

import contextlib
import json
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import rich.console
import rich.table

from legato import backends, identity, loop, storage
from legato.callbacks import CallbackRunner
from legato.checkpoint import Checkpoint, CheckpointStore
from legato.compat import keras_tracing
from legato.config import TrainerConfig, dump_yaml
from legato.data import DataSource, Feed
from legato.errors import (
    ConfigError,
    ExactnessError,
    ExactnessWarning,
    Interrupted,
    LegatoWarning,
    RestoreError,
    RunDirError,
    Stopped,
)
from legato.evaluation import Evaluator, loop_capacity
from legato.interrupts import Interrupts
from legato.metrics import check_metrics
from legato.progress import make_reporter
from legato.recorder import Recorder, directions
from legato.rng import get_host_state, set_host_state
from legato.schedule import Schedule
from legato.state import Clock, missing_and_new, variable_paths
from legato.summaries import RunLog
from legato.task import ModelGroup, OptimizerGroup, Task
from legato.training import TrainSteps
from legato.types import JSON, AuditEntry, AuditStatus, Logs
from legato.version import __version__

_RUN = "run.json"


class Trainer:
    """Trains a Task; killed at any instant, the same call goes on exactly.

    What a run does::

        build model, optimizer, data; trace the step
        restore the newest intact checkpoint, or begin at step 0
        until the end: steps in device loops; and, when they are due,
            summaries, validation, on_epoch_end, a checkpoint

    Args:
        task: what is learned.
        run_dir: where everything is written; resumed if it is there.
        config: how the run is driven.
        callbacks: Keras callbacks; their state is saved and restored.

    Attributes:
        task: as given.
        config: as given.
        run_dir: as given.
        model: what `Task.build_model` returned.
        optimizer: what `Task.build_optimizer` returned.
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
        run_dir: str | Path,
        config: TrainerConfig,
        callbacks: Sequence[keras.callbacks.Callback] = (),
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
        self._warned: set[str] = set()
        self._clock = Clock()
        # Everything random that follows is a function of the seed.
        keras.utils.set_random_seed(config.seed)
        self._build()

    def _build(self) -> None:
        task = self.task
        name = type(task).__name__
        self.model = task.build_model()
        models = (
            list(self.model.values())
            if isinstance(self.model, dict)
            else [self.model]
        )
        if not models or not all(isinstance(m, keras.Model) for m in models):
            raise ConfigError(
                f"{name}.build_model returned {self.model!r}: it must return a "
                "keras.Model, or a dict of them."
            )
        # Callbacks want one model, with an optimizer.
        self._model: keras.Model = (
            ModelGroup(self.model)
            if isinstance(self.model, dict)
            else self.model
        )
        self.optimizer = task.build_optimizer()
        self._optimizers = (
            self.optimizer
            if isinstance(self.optimizer, dict)
            else {"": self.optimizer}
        )
        for optimizer in self._optimizers.values():
            if not isinstance(optimizer, keras.optimizers.Optimizer):
                raise ConfigError(
                    f"{name}.build_optimizer returned {self.optimizer!r}: it "
                    "must return a keras.optimizers.Optimizer, or a dict of "
                    "them."
                )
        single = not isinstance(self.optimizer, dict)
        self._model.optimizer = (
            self.optimizer
            if single
            else OptimizerGroup(list(self._optimizers.values()))
        )
        self._train_metrics: list[keras.metrics.Metric] = []
        if self.config.train_metrics_interval:
            self._train_metrics = check_metrics(
                task.build_metrics(training=True), f"{name}.build_metrics(True)"
            )
        self._source = self._build_inputs("train")
        self._evaluator = self._build_evaluator()
        if task.loss in {m.name for m in self._train_metrics}:
            raise ConfigError(
                f"{name}.build_metrics returned a metric named {task.loss!r}, "
                "which is the name of the loss. Give it another `name`."
            )

    def _build_inputs(self, split: str) -> DataSource:
        source = self.task.build_inputs(split)
        if not isinstance(source, DataSource):
            raise ConfigError(
                f"{type(self.task).__name__}.build_inputs({split!r}) returned "
                f"{type(source).__name__}: it must return a data source, such "
                "as legato.ArraySource((features, labels), batch_size=32)."
            )
        return source

    def _build_evaluator(self) -> Evaluator | None:
        if self.task.build_inputs("validation") is None:
            return None
        name = type(self.task).__name__
        return Evaluator(
            self.task,
            self.model,
            self._build_inputs("validation"),
            check_metrics(
                self.task.build_metrics(training=False),
                f"{name}.build_metrics(False)",
            ),
            seed=self.config.seed,
            max_batches=self.config.validation_steps,
        )

    # -- public verbs -------------------------------------------------------

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
        run_id = self._open_run_dir()
        with storage.RunLock(self.run_dir), contextlib.ExitStack() as stack:
            run = stack.enter_context(_opened(_Run(self, run_id)))
            run.begin()
            if not self._clock.finished:
                run.train()
            return run.history

    def evaluate(self) -> Logs:
        """Measure the model on the validation split.

        The variables are those of this process if it has trained; otherwise
        the newest checkpoint's, if there is one.

        Returns:
            The mean of each of `validation_step`'s logs, and the metrics.

        Raises:
            ConfigError: there is no validation split.
            RestoreError: the checkpoint does not fit the model.
        """
        if self._evaluator is None:
            raise ConfigError(
                f"{type(self.task).__name__}.build_inputs('validation') "
                "returned None: there is nothing to evaluate on."
            )
        if self._clock.step == 0 and (self.run_dir / _RUN).exists():
            run_id = self._open_run_dir()
            with storage.RunLock(self.run_dir):
                store = CheckpointStore(self.run_dir, run_id=run_id)
                checkpoint = store.restore()
            if checkpoint is not None:
                self._load_model(checkpoint)
        callbacks = CallbackRunner([], model=self._model, params={})
        logs = self._evaluator(callbacks, lambda: False)
        assert logs is not None
        return logs

    def _load_model(self, checkpoint: Checkpoint) -> None:
        """Take the model's variables alone, not what training needs."""
        paths = variable_paths({"model": self.model})
        _assign(paths, checkpoint, lenient=())

    # -- the run directory --------------------------------------------------

    def _open_run_dir(self) -> str:
        """Make or recognise the directory; returns the run's id."""
        run_dir = self.run_dir
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            found = {p.name for p in run_dir.iterdir()}
        except OSError as error:
            raise RunDirError(
                f"run_dir={str(run_dir)!r} cannot be used as a directory: "
                f"{error}. Choose another one."
            ) from error
        if _RUN in found:
            try:
                record = json.loads((run_dir / _RUN).read_bytes())
                return str(uuid.UUID(record["run_id"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunDirError(
                    f"{run_dir / _RUN} is not readable as a run's: {error}"
                ) from error
        strange = {n for n in found if n != "lock" and not n.startswith(".")}
        if strange:
            raise RunDirError(
                f"run_dir={str(run_dir)!r} holds something else than a run "
                f"({', '.join(sorted(strange)[:3])}, ...). Choose an empty or "
                "a new directory."
            )
        run_id = str(uuid.uuid4())
        record = json.dumps({"run_id": run_id, "legato": __version__})
        try:
            storage.write_file(run_dir / _RUN, record.encode() + b"\n")
        except OSError as error:
            raise RunDirError(
                f"run_dir={str(run_dir)!r} cannot be written: {error}. Choose "
                "another one."
            ) from error
        return run_id

    def _warn(self, message: str, category: type[LegatoWarning]) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, category, stacklevel=2)

    def _inexact(self, message: str) -> None:
        """Promise 3: what cannot be exact is named before training goes on."""
        if self.config.exact == "strict":
            raise ExactnessError(
                f'{message}. exact="strict" refuses to go on; "warn" would.'
            )
        if self.config.exact == "warn":
            self._warn(message, ExactnessWarning)


class _Run:
    """One call of `Trainer.train`: what is open while it lasts."""

    def __init__(self, trainer: Trainer, run_id: str) -> None:
        config = trainer.config
        self._trainer = trainer
        self._backend = backends.current()
        self._clock = trainer._clock = Clock()
        self._last_save = time.monotonic()
        self._variables: dict[str, keras.Variable] = {}
        self._store = CheckpointStore(
            trainer.run_dir,
            run_id=run_id,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            timeout_secs=config.checkpoint_timeout,
        )
        self._log = RunLog(trainer.run_dir)
        self._reporter = make_reporter(config.progress)
        self._interrupts = Interrupts(
            max_seconds=config.max_seconds, before_exit=self._store.wait
        )
        self._resume = self._find_checkpoint()

    def close(self) -> None:
        self._log.close()
        self._store.close()

    def _find_checkpoint(self) -> Checkpoint | None:
        resume, run_dir = self._trainer.config.resume, self._trainer.run_dir
        checkpoint = self._store.restore()
        if resume == "must" and checkpoint is None:
            raise RunDirError(
                f'resume="must": there is no checkpoint in {run_dir}.'
            )
        if resume == "never" and checkpoint is not None:
            raise RunDirError(
                f'resume="never": {run_dir} holds a run at step '
                f"{checkpoint.step}. Choose another run_dir, or resume it."
            )
        return checkpoint

    # -- beginning ----------------------------------------------------------

    def begin(self) -> None:
        """Trace, call `on_train_begin`, and restore or initialise."""
        trainer, config = self._trainer, self._trainer.config
        saved = self._resume.host.get("identity") if self._resume else None
        program = saved.get("program", {}) if isinstance(saved, dict) else {}
        source = trainer._source
        self._steps = TrainSteps(
            trainer.task,
            trainer.model,
            trainer.optimizer,
            source,
            trainer._train_metrics,
            metrics_interval=config.train_metrics_interval,
            mode=program.get("mode"),
            capacity=program.get("capacity") or loop_capacity(source),
            compiling=lambda on: setattr(self._interrupts, "compiling", on),
        )
        if self._resume is None:
            trainer.task.initialize(trainer.model)
        before = identity.make_identity(
            trainer.task,
            trainer.optimizer,
            config,
            source.identity,
            mode="",
            capacity=self._steps.capacity,
        )
        self._rates = {
            name: float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            for name, optimizer in trainer._optimizers.items()
        }
        inexact: list[str] = []
        if self._resume is not None:
            # Before anything dear: is this the same run?
            inexact = identity.compare(
                saved, before, override=config.resume == "override"
            )
        with self._interrupts:
            self._interrupts.compiling = True
            self._steps.trace()
            self._interrupts.compiling = False
        before["program"] = {
            "mode": self._steps.mode,
            "capacity": self._steps.capacity,
        }
        self._identity = before
        if trainer._evaluator is not None and trainer._evaluator.mode is None:
            trainer._evaluator.mode = self._steps.mode
        self._make_schedule()
        self._make_callbacks()
        self._variables = variable_paths(
            {
                "model": trainer.model,
                "optimizer": trainer.optimizer,
                "metrics": trainer._train_metrics,
                "task": vars(trainer.task),
            },
            self._steps.variables,
        )
        self._recorder = Recorder(
            task=trainer.task,
            clock=self._clock,
            config=config,
            metrics=trainer._train_metrics,
            log_names=lambda: self._steps.log_names,
            learning_rates=self._learning_rates,
            log=self._log,
            reporter=self._reporter,
            tolerates_nonfinite=self._tolerates_nonfinite(),
            warn=trainer._warn,
        )
        self._feed = Feed(
            source.iterate(seed=config.seed, capacity=self._steps.capacity)
        )
        trainer._model.stop_training = False
        if self._resume is None:
            self._log.rewind(None, 0)
            self._write_config()
            keras.utils.set_random_seed(config.seed)
            self._callbacks.on_train_begin(resuming=False)
        else:
            self._callbacks.on_train_begin(resuming=True)
            self._restore(self._resume)
            for sentence in inexact:
                trainer._inexact(
                    f"resumed at step {self._clock.step}, not exactly: "
                    f"{sentence}"
                )
            self._resume = None  # its arrays are large

    def _make_schedule(self) -> None:
        config = self._trainer.config
        per_epoch = self._trainer._source.batches_per_epoch
        interval = config.checkpoint_interval
        in_steps = config.checkpoint_seconds is None
        self._schedule = Schedule(
            train_steps=config.train_steps or (config.epochs or 0) * per_epoch,
            steps_per_epoch=per_epoch,
            validation_interval=None
            if self._trainer._evaluator is None
            else config.validation_interval,
            checkpoint_interval=interval if in_steps else None,  # type: ignore[arg-type]
            summary_interval=config.summary_interval,
        )

    def _make_callbacks(self) -> None:
        trainer = self._trainer
        steps = self._schedule.steps_per_epoch
        self._callbacks = CallbackRunner(
            [*trainer._callbacks],
            model=trainer._model,
            params={
                "epochs": -(-self._schedule.train_steps // steps),
                "steps": steps,
                "verbose": 0,
            },
            exact=trainer.config.exact,
            metric_directions={
                f"{prefix}{name}": direction
                for name, direction in directions(
                    [
                        *trainer._train_metrics,
                        *(
                            trainer._evaluator.metrics
                            if trainer._evaluator
                            else ()
                        ),
                    ]
                ).items()
                for prefix in ("", "val_")
            },
        )
        found = [
            c
            for c in self._callbacks.callbacks
            if isinstance(c, keras.callbacks.History)
        ]
        if not found:
            found = [keras.callbacks.History()]
            trainer._callbacks = [*trainer._callbacks, found[0]]
            self._make_callbacks()
        else:
            self.history = found[0]
            trainer._model.history = self.history

    def _tolerates_nonfinite(self) -> bool:
        policy = self._trainer.config.nonfinite_loss
        scales = any(
            isinstance(o, keras.optimizers.LossScaleOptimizer)
            for o in self._trainer._optimizers.values()
        )
        return policy == "warn" or (policy is None and scales)

    def _learning_rates(self) -> Logs:
        return {
            f"learning_rate/{name}" if name else "learning_rate": float(
                keras.ops.convert_to_numpy(optimizer.learning_rate)
            )
            for name, optimizer in self._trainer._optimizers.items()
        }

    def _write_config(self) -> None:
        path = self._trainer.run_dir / "config.yaml"
        if not path.exists():  # the command line wrote a fuller one
            text = f"trainer:\n{_indented(dump_yaml(self._trainer.config))}"
            storage.write_file(path, text.encode())

    # -- training -----------------------------------------------------------

    def train(self) -> None:
        """Run the loop, and leave valid variables whatever happens."""
        trainer, clock = self._trainer, self._clock
        self._reporter.start(
            self._schedule.train_steps,
            initial_step=clock.step,
            description=type(trainer.task).__name__,
            epochs=trainer.config.epochs,
        )
        reason = "failed"
        try:
            with self._interrupts:
                loop.run(
                    clock=clock,
                    schedule=self._schedule,
                    steps=self._steps,
                    feed=self._feed,
                    hooks=self._callbacks,
                    recorder=self._recorder,
                    validate=self._validate,
                    save=self._save,
                    save_is_due=self._save_is_due,
                    stop_requested=lambda: self._interrupts.reason is not None,
                    callbacks_stop=lambda: bool(trainer._model.stop_training),
                )
                self._store.wait()
            reason = self._interrupts.reason or "done"
        except BaseException as error:
            self._repair(error)
            raise
        finally:
            self._feed.close()
            self._reporter.finish(clock.step, reason)
        if not clock.finished:
            self._raise_stopped()
        self._callbacks.on_train_end(
            {k: v[-1] for k, v in self.history.history.items() if v}
        )
        for optimizer in trainer._optimizers.values():
            # As Keras does at the end of `fit`: averaged weights, if any.
            if optimizer.built:
                optimizer.finalize_variable_values(
                    trainer._model.trainable_variables
                )

    def _raise_stopped(self) -> None:
        reason = self._interrupts.reason
        message = (
            f"{reason}: stopped at step {self._clock.step} of "
            f"{self._schedule.train_steps} with everything saved in "
            f"{self._trainer.run_dir}. Run it again to go on."
        )
        raise Interrupted(message) if reason == "SIGINT" else Stopped(message)

    def _validate(self) -> Logs | None:
        assert self._trainer._evaluator is not None
        return self._trainer._evaluator(
            self._callbacks, lambda: self._interrupts.reason is not None
        )

    def _save_is_due(self) -> bool:
        self._store.poll()
        every = self._trainer.config.checkpoint_seconds
        late = every is not None and time.monotonic() - self._last_save > every
        return late or self._recorder.best.is_new

    def _repair(self, error: BaseException) -> None:
        """After a failure the model's variables are valid, and it is said
        which step they hold."""
        held = f"step {self._clock.step}"
        variables = list(self._variables.values())
        if self._backend.lost_variables(variables):
            # A device call took its inputs and failed.
            self._store.wait()
            checkpoint = self._store.restore()
            if checkpoint is None:
                held = "nothing valid, for there is no checkpoint yet"
            else:
                _assign(self._variables, checkpoint, lenient=())
                held = f"step {checkpoint.step}, the newest checkpoint"
        error.add_note(
            f"legato: the model's variables hold {held}. Resume from the "
            f"newest checkpoint with the same call (run_dir="
            f"{str(self._trainer.run_dir)!r})."
        )

    # -- state --------------------------------------------------------------

    def _save(self) -> None:
        """Hand all parts of the state (see `state.PARTS`) to the writer."""
        names = list(self._variables)
        values = self._backend.read(list(self._variables.values()))
        arrays = dict(zip(names, values, strict=True))
        callbacks, callback_arrays = self._callbacks.get_state()
        random, random_arrays = _random_state(self._backend)
        for prefix, group in (
            ("callbacks", callback_arrays),
            ("random", random_arrays),
        ):
            arrays.update({f"{prefix}/{k}": v for k, v in group.items()})
        self._log.flush()
        host: dict[str, JSON] = {
            "clock": self._clock.to_json(),
            "data": self._feed.get_state(),
            "callbacks": callbacks,
            "random": random,
            "best": self._recorder.best.get_state(),
            "sinks": self._log.get_state(),
            "identity": self._identity,
            "train_steps": self._schedule.train_steps,
        }
        self._store.save(
            self._clock.step, arrays, host, best=self._recorder.best.is_new
        )
        self._recorder.best.is_new = False
        self._last_save = time.monotonic()

    def _restore(self, checkpoint: Checkpoint) -> None:
        host = checkpoint.host
        trainer, clock = self._trainer, self._clock
        override = trainer.config.resume == "override"
        audit = _assign(
            self._variables,
            checkpoint,
            # Metrics may be switched on or off; it is said in the audit.
            lenient=("metrics/", "optimizer/") if override else ("metrics/",),
        )
        if override:
            # The program's learning rate, not the restored one. A schedule is
            # no variable and was the program's all along.
            for name, optimizer in trainer._optimizers.items():
                if isinstance(optimizer.learning_rate, keras.Variable):
                    optimizer.learning_rate = self._rates[name]
        groups: dict[str, dict[str, np.ndarray]] = {}
        for name, array in checkpoint.arrays.items():
            prefix, _, rest = name.partition("/")
            groups.setdefault(prefix, {})[rest] = array
        clock.load(host.get("clock"))
        self._feed.set_state(host.get("data"))
        audit += [
            AuditEntry(part, "", AuditStatus.RESTORED)
            for part in ("clock", "data", "random")
        ]
        audit += self._callbacks.set_state(
            host.get("callbacks"), groups.get("callbacks", {})
        )
        _set_random_state(
            self._backend, host.get("random"), groups.get("random", {})
        )
        if not self._recorder.best.set_state(host.get("best")):
            audit.append(AuditEntry("best", "", AuditStatus.NEW))
        self._log.rewind(host.get("sinks"), clock.step)
        trainer._model.stop_training = clock.stop_training
        self._extend(host.get("train_steps"))
        trainer.audit = audit
        self._reporter.message(_audit_table(trainer, clock.step, audit))

    def _extend(self, train_steps: JSON) -> None:
        """More steps than before: a finished run goes on."""
        steps, clock = self._schedule.train_steps, self._clock
        longer = isinstance(train_steps, int) and steps > train_steps
        if longer and clock.finished:
            clock.finished = clock.stop_training = False
            self._trainer._model.stop_training = False
        elif clock.step < steps and not clock.stop_training:
            clock.finished = False


@contextlib.contextmanager
def _opened(run: _Run) -> Iterator[_Run]:
    try:
        yield run
    finally:
        run.close()


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _random_state(
    backend: backends.Backend,
) -> tuple[JSON, dict[str, np.ndarray]]:
    state, arrays = get_host_state()
    arrays.update(
        {f"backend.{k}": v for k, v in backend.get_random_state().items()}
    )
    unseeded = keras_tracing.global_seed_state()
    if unseeded is not None:
        arrays["keras"] = np.array(backend.read([unseeded])[0])
    return state, arrays


def _set_random_state(
    backend: backends.Backend, state: Any, arrays: dict[str, np.ndarray]
) -> None:
    set_host_state(state, arrays)
    backend.set_random_state(
        {
            name.removeprefix("backend."): array
            for name, array in arrays.items()
            if name.startswith("backend.")
        }
    )
    if "keras" in arrays:
        backend.write(
            [keras_tracing.make_global_seed_state()], [arrays["keras"]]
        )


def _assign(
    variables: dict[str, keras.Variable],
    checkpoint: Checkpoint,
    *,
    lenient: tuple[str, ...],
) -> list[AuditEntry]:
    """Put a checkpoint's arrays into variables, all of them or none.

    Args:
        variables: by path.
        checkpoint: what was saved.
        lenient: prefixes of paths that may differ: what is missing keeps its
            initial value.

    Raises:
        RestoreError: a variable is missing, new, or of another shape or
            dtype; the message names it.
    """
    roots = {name.partition("/")[0] for name in variables}
    saved = {
        name: array
        for name, array in checkpoint.arrays.items()
        if name.partition("/")[0] in roots
    }
    missing, new = missing_and_new(list(saved), list(variables))
    problems = []
    audit = []
    for names, status, what in (
        (missing, AuditStatus.MISSING, "is in the checkpoint only"),
        (new, AuditStatus.NEW, "is in the program only"),
    ):
        for name in names:
            audit.append(AuditEntry("arrays", name, status))
            if not name.startswith(lenient or ("\0",)):
                problems.append(f"{name} {what}")
    fitting = []
    for name in variables:
        if name not in saved:
            continue
        array, variable = saved[name], variables[name]
        if array.shape != tuple(variable.shape) or (
            str(array.dtype) != variable._dtype
        ):
            status = AuditStatus.IGNORED
            problem = (
                f"{name} is {array.dtype}{list(array.shape)} in the checkpoint "
                f"and {variable._dtype}{list(variable.shape)} in the program"
            )
            if not name.startswith(lenient or ("\0",)):
                problems.append(problem)
            audit.append(AuditEntry("arrays", name, status, problem))
        else:
            fitting.append(name)
            audit.append(AuditEntry("arrays", name, AuditStatus.RESTORED))
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" * (len(problems) > 10)
        raise RestoreError(
            f"The checkpoint of step {checkpoint.step} does not fit the "
            "program:\n  " + "\n  ".join(problems[:10]) + f"{more}\nThe model "
            "or the optimizer changed since. Put it back, or train the new "
            "one in another run_dir."
        )
    backends.current().write(
        [variables[n] for n in fitting], [saved[n] for n in fitting]
    )
    return audit


def _audit_table(
    trainer: Trainer, step: int, audit: Sequence[AuditEntry]
) -> str:
    """A line for each part, and one for each thing that was not restored."""
    table = rich.table.Table(box=None, pad_edge=False)
    for column in ("part", "restored", "otherwise"):
        table.add_column(column)
    for part in dict.fromkeys(entry.part for entry in audit):
        entries = [e for e in audit if e.part == part]
        restored = sum(e.status is AuditStatus.RESTORED for e in entries)
        others = [e for e in entries if e.status is not AuditStatus.RESTORED]
        shown = "; ".join(
            f"{e.name} {e.status}" + (f" ({e.detail})" if e.detail else "")
            for e in others[:5]
        )
        if len(others) > 5:
            shown += f"; ... {len(others) - 5} more"
        table.add_row(part, str(restored), shown or "-")
    console = rich.console.Console(width=100, record=True, file=None)
    with console.capture() as captured:
        console.print(f"Resumed {trainer.run_dir} at step {step}:")
        console.print(table)
    return captured.get().rstrip()
