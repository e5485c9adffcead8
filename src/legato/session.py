"""One call of `Trainer.train`: everything that is open while it lasts."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

from legato import backends, identity, initial, phases, restoring
from legato.callbacks import CallbackRunner
from legato.checkpoint import Checkpoint, CheckpointStore
from legato.compat.keras_seeds import set_random_seed
from legato.config import TrainerConfig
from legato.data import Feed, join_arrays, split_arrays
from legato.errors import BadLossError, CheckpointError
from legato.exactness import Exactness
from legato.interrupts import Interrupts
from legato.metrics import described, label
from legato.parts import Parts
from legato.program import choose_program, choose_seed, make_schedule
from legato.progress import VERBOSE, make_reporter
from legato.recorder import Recorder
from legato.recovery import Recovery, watch_losses
from legato.settings import ChangedSettings
from legato.sinks import RunLog
from legato.state import Clock, metric_paths, variable_paths
from legato.training import TrainSteps
from legato.types import JSON, AuditEntry, AuditStatus


class Session:
    """Restores or begins a run, and trains it to its end or to a stop.

    Make one only while holding the lock of the run directory, in a `with`
    statement. Call `identify`, then `steps.trace` within `compiling`, then
    `begin`, then `loop.run` within `training`, or `end` if the clock says
    that the run is finished. (The trace and the loop are called from the
    outside so that few frames of ours lie above the user's step.)

    Args:
        parts: what the Task built.
        config: how the run is driven.
        run_dir: the run directory.
        run_id: the run's id.
        callbacks: the user's callbacks.
        references: what callbacks may hold and must not save a copy of.
        interrupts: what asks the run to stop.
        before: the session of this process that recovers, if one does.
        summary_managers: see `RunLog`.

    Attributes:
        steps: the training step, once `identify` was called.
        clock: where the run is.
        history: of the whole run.
        audit: what became of each part of the state; empty for a new run.
        recovers: whether the loss went wrong, and another session, which goes
            back to a checkpoint before that, is to go on.
        held: after a failure in training, what the variables hold.

    Raises:
        RunDirError: `resume=` forbids it.
        CheckpointError: there are checkpoints, and none is intact.
    """

    def __init__(
        self,
        parts: Parts,
        config: TrainerConfig,
        run_dir: Path,
        run_id: str,
        callbacks: Sequence[keras.callbacks.Callback],
        references: Mapping[str, object],
        interrupts: Interrupts,
        before: "Session | None" = None,
        summary_managers: Mapping[str, Any] | None = None,
    ) -> None:
        self.clock = Clock()
        self.recovers = False
        self.held: restoring.Held | None = None
        self.audit: list[AuditEntry] = []
        self._parts = parts
        self._readings = parts.readings((summary_managers or {}).get("train"))
        self._config = config
        self._run_dir = run_dir
        self._backend = backends.current()
        self._last_save = time.monotonic()
        self._variables: dict[str, keras.Variable] = {}
        self._inexact: list[str] = []
        self._exactness = Exactness(config.exact)
        self._saved_step = 0
        self._begins = False
        self._references = references
        self._compiled = before.steps if before else None
        # (What is gone back from may have changed some.)
        self._settings = before._settings if before else ChangedSettings()
        self._phases = before._phases if before else phases.Phases()
        self._store = CheckpointStore(
            run_dir,
            run_id=run_id,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            timeout_secs=config.checkpoint_timeout,
        )
        self._recovery = Recovery(run_dir, config.recovery_max_trials)
        if before is None:
            restoring.check_resume(config.resume, run_dir, self._store.steps())
        self._checkpoint = self._recovery.find_checkpoint(self._store)
        self._seed = choose_seed(parts.task, config, self._checkpoint)
        self._reporter = make_reporter(config.progress)
        self._interrupts = interrupts
        interrupts.before_exit = self._store.wait
        self._schedule = make_schedule(
            config,
            parts.source.batches_per_epoch,
            validates=parts.evaluator is not None,
            skipped=self._recovery.skipped,
        )
        self._callbacks = self._make_callbacks(callbacks, before)
        assert self._callbacks.history is not None  # asked for
        self.history = self._callbacks.history
        self._log = RunLog(  # the last: it holds files open
            run_dir,
            sinks=config.sinks,
            managers=summary_managers,
            run_id=run_id,
            dropped=before._log.dropped if before else (),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        # In this order: what is being written still refers to the logs.
        try:
            self._store.close()
        finally:
            self._callbacks.close()
            self._log.close()

    def _make_callbacks(
        self,
        callbacks: Sequence[keras.callbacks.Callback],
        before: "Session | None",
    ) -> CallbackRunner:
        config, schedule = self._config, self._schedule
        epochs = schedule.train_steps / schedule.steps_per_epoch
        return CallbackRunner(
            callbacks,
            model=self._parts.whole,
            params={
                "epochs": config.epochs or int(np.ceil(epochs)),
                "steps": schedule.steps_per_epoch,
                "verbose": VERBOSE.get(config.progress, 1),
            },
            exact=config.exact,
            metric_directions=self._parts.directions(),
            references=self._references,
            notes=self._run_dir / "callbacks.json",
            add_history=True,
            as_made=before and before._callbacks.as_made,
        )

    # -- beginning ----------------------------------------------------------

    def identify(self) -> None:
        """Check that this program is the run; asked before anything dear.

        Raises:
            RestoreError: the checkpoint is another run's.
        """
        parts, config = self._parts, self._config
        self._identity = identity.make_identity(
            parts.program,
            config,
            parts.source.identity,
            parts.evaluator and parts.evaluator.source.identity,
            described(parts.metrics),
        )
        saved: Any = None
        if self._checkpoint is not None:
            saved = self._checkpoint.host.get("identity")
            identity.keep_origin(saved, self._identity)
            self._inexact = identity.compare(
                saved, self._identity, override=config.resume == "override"
            )
        else:
            parts.task.initialize(parts.model)
        program = choose_program(
            config, parts.source, self._schedule.train_steps, saved
        )
        self._capacity = program.capacity
        one_by_one = self._callbacks.batch_hooks_active
        self.steps = self._compiled or TrainSteps(
            parts.task,
            parts.model,
            parts.optimizer,
            parts.source,
            parts.metrics if config.trains_metrics else None,
            mode=program.mode,
            capacity=program.capacity,
            compilation=program.compilation,
            max_steps=config.steps_per_loop,
            checks=parts.checks if config.check_numerics else None,
            max_shapes=config.max_batch_shapes,
            summary_interval=config.summary_interval,
            # (Where each step is a call of its own, nothing need be kept.)
            readings=None if one_by_one else self._readings,
            one_by_one=one_by_one,
            phases=self._phases,
        )
        if self._checkpoint is None and config.init_from is not None:
            self.steps.build_model()  # optimizers are built of its values
            self._identity[identity.ORIGIN] = initial.initialize(
                parts.model, config.init_from, self._reporter.message
            )
        self.steps.compiling = self.compiling
        self.steps.announce = self._reporter.message

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around what may take long; a signal ends it at once.

        That is, if nothing new is to be saved.
        """
        self._interrupts.compiling = self.clock.step == self._saved_step
        try:
            with self._phases.within(phases.COMPILE):
                yield
        finally:
            self._interrupts.compiling = False

    def begin(self) -> None:
        """Call `on_train_begin`, and restore or initialise.

        To be called when `steps` has been traced, so that every variable
        exists.

        Raises:
            RestoreError: the checkpoint does not fit.
            ExactnessError: `exact="strict"`, and resuming is not exact.
        """
        parts, checkpoint = self._parts, self._checkpoint
        self._identity["program"] = {
            "mode": self.steps.mode,
            "capacity": self._capacity,
        }
        if parts.evaluator is not None:
            parts.evaluator.announce = self._reporter.message
            parts.evaluator.follow(self.steps.mode, self._config, parts.source)
        self._collect_variables()
        self._recorder = Recorder(
            task=parts.task,
            clock=self.clock,
            config=self._config,
            schedule=self._schedule,
            metrics=parts.metrics,
            directions=parts.directions(),
            log_names=lambda: self.steps.log_names,
            readings=self._readings,
            log=self._log,
            reporter=self._reporter,
            watch=watch_losses(
                self._config,
                loss=parts.task.loss,
                log_names=self.steps.log_names,
                scales_loss=parts.scales_loss(),
                ends_on_nan=self._callbacks.end_on_nan,
                is_one_shot=parts.source.is_one_shot,
            ),
            checks=parts.checks,
            phases=self._phases,
        )
        self._settings.begin(self._roots(), parts.all_metrics())
        self._exactness.name_parts(*parts.that_may_be_inexact())
        for why in self._log.inexact:
            self._exactness.name(why)
        if unrepeatable := self._backend.unrepeatable():
            self._exactness.name(
                "This run may differ from itself, killed or not: "
                f"{'; '.join(unrepeatable)}"
            )
        self._feed = Feed(
            parts.source,
            seed=self._seed,
            capacity=self._capacity,
            draws_here=self._backend.overlaps is not None,
            stop_requested=self._interrupts.is_asked,
        )
        draws_here = (
            self._feed.draws_here and not self._callbacks.batch_hooks_active
        )
        if draws_here or self.steps.keeps_many:
            self.steps.make_overlap()
        if self._recovery.is_on:
            self._prepare_to_recover()
        if checkpoint is None:
            self._begin_new()
        else:
            self._callbacks.on_train_begin(resuming=True)
            self._restore(checkpoint)
            if self._inexact:
                self._exactness.name(
                    f"Resumed at step {self.clock.step}, but not exactly "
                    f"(checkpoint -> program): {'; '.join(self._inexact)}"
                )
        self._checkpoint = None  # its arrays are large

    def _prepare_to_recover(self) -> None:
        if not self._callbacks.as_made:
            self._callbacks.remember()
        if self._parts.evaluator:
            # Any checkpoint must hold all variables that there will be.
            self._parts.evaluator.build()

    def _begin_new(self) -> None:
        self._log.rewind(None)
        if self._parts.task.order_seed is None:
            set_random_seed(self._config.seed)  # nothing before it counts
        # Before one is due a loss may go wrong, or the weights' origin be lost.
        self._begins = self._recovery.is_on or bool(self._config.init_from)
        self.clock.epoch = self._config.initial_epoch
        self._parts.whole.stop_training = False
        if self._parts.source.resuming is not None:
            self._reporter.message(self._parts.source.resuming)
        self._callbacks.on_train_begin(resuming=False)

    # -- training -----------------------------------------------------------

    def for_loop(self) -> dict[str, Any]:
        """The arguments of `loop.run`."""
        return {
            "clock": self.clock,
            "schedule": self._schedule,
            "steps": self.steps,
            "feed": self._feed,
            "hooks": self._callbacks,
            "recorder": self._recorder,
            "validate": self._validate,
            "save": self._save,
            "save_is_due": self._save_is_due,
            "stop_requested": self._interrupts.is_asked,
            "callbacks_stop": lambda: bool(self._parts.whole.stop_training),
            "phases": self._phases,
        }

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around `loop.run`: ends the run, and leaves valid variables.

        Raises:
            Stopped: a signal or `max_time` ended it; everything is saved.
            Interrupted: Ctrl-C ended it; everything is saved.
            Others: see `Trainer.train`.
        """
        clock = self.clock
        self._recorder.start()
        self._reporter.start(
            self._schedule.train_steps,
            initial_step=clock.step,
            description=self._parts.task.title,
            epochs=self._config.epochs,
        )
        reason = "failed"
        try:
            with contextlib.closing(self.steps):  # nothing is under way after
                yield
            with self._phases.within(phases.CHECKPOINT):
                self._store.wait()
            self._recorder.finish()
            reason = self._interrupts.reason or "done"
        except BaseException as error:
            if isinstance(error, BadLossError) and self._recover(error):
                reason = "recovering"
                return
            self._leave_valid_variables(error)
            raise
        finally:
            self._feed.close()
            self._reporter.finish(clock.step, reason)
        if not clock.finished:
            raise self._interrupts.error(
                f"stopped at step {clock.step} of {self._schedule.train_steps} "
                f"with everything saved in {self._run_dir}."
            )
        self._finish()

    def _recover(self, error: BadLossError) -> bool:
        """Write down what is to be skipped; the next session goes back."""
        self._store.wait()  # the best, which is to stay
        best = self._recorder.best.get_state()
        trial = self._recovery.plan(error, best, self._store.steps())
        if trial is not None:
            self._recovery.record(trial)
            self.recovers = True
        return self.recovers

    def end(self) -> None:
        """In the place of training, where the last step is done already.

        A run that was killed between the last checkpoint and its end does the
        rest now.
        """
        if not self._load_final():
            self._finish()

    def _finish(self) -> None:
        """After the last checkpoint: hooks may put other weights in."""
        for optimizer in self._parts.optimizers.values():
            if optimizer.built:
                # As Keras does, and then: averaged weights, if there are any.
                updated: Any = optimizer
                optimizer.finalize_variable_values(updated._trainable_variables)
        self._callbacks.on_train_end(dict(self.clock.training_logs))
        try:
            self._log.flush()
        except OSError as error:
            raise CheckpointError(
                f"The logs in {self._run_dir} could not be written: {error}. "
                "The checkpoints are not affected: run it again."
            ) from error
        self._store.save_final(self.clock.step, self._read_arrays())

    def _load_final(self) -> bool:
        """Take the weights that the run ended with, if it came to that."""
        final = self._store.load_final()
        if final is None or final.step != self.clock.step:
            return False
        restoring.assign_arrays(self._variables, final, lenient=self._lenient)
        return True

    def _validate(self) -> dict[str, Any] | None:
        evaluator = self._parts.evaluator
        assert evaluator is not None
        stop, step = self._interrupts.is_asked, self.clock.step
        with self._parts.measured(self._config.validation_weights):
            return evaluator(self._callbacks, stop, step)

    def _save_is_due(self) -> bool:
        self._store.poll()
        every = self._config.checkpoint_seconds
        late = every is not None and time.monotonic() - self._last_save > every
        return late or self._begins or self._recorder.best.is_new

    def _leave_valid_variables(self, error: BaseException) -> None:
        """After a failure: values in all variables, and word of whose."""
        step = self.clock.step + self.steps.steps_untold
        self.held = restoring.hold_valid(
            self._variables, self._store, step, self._lenient
        )
        error.add_note(
            f"legato: the model's variables hold {self.held}. The same call "
            f"(run_dir={str(self._run_dir)!r}) goes on from the newest "
            "checkpoint."
        )

    # -- state: the parts listed in `state.PARTS` ---------------------------

    def _roots(self) -> dict[str, Any]:
        parts = self._parts
        return {
            "model": parts.model,
            "optimizer": parts.optimizer,
            "metrics": {label(metric): metric for metric in parts.metrics},
            "task": vars(parts.task),
        }

    def _collect_variables(self) -> None:
        """Name all variables; again when a step turns out to use more."""
        evaluator = self._parts.evaluator
        used = [
            *self.steps.variables,
            *(evaluator.variables if evaluator else ()),
        ]
        known = {id(variable) for variable in self._variables.values()}
        if not self._variables or not known.issuperset(map(id, used)):
            self._variables = variable_paths(self._roots(), used)
            self._metrics = metric_paths(self._roots())
            self._lenient = {"metrics", *self._metrics}

    def _read_arrays(self) -> dict[str, np.ndarray]:
        self._collect_variables()
        values = self._backend.read(list(self._variables.values()))
        return dict(zip(self._variables, values, strict=True))

    def _save(self) -> None:
        """Hand everything to the checkpoint writer."""
        parts = self._parts
        settings = self._settings.get_state()
        self._exactness.name_parts(*parts.that_may_be_inexact(), self._settings)
        arrays = self._read_arrays()
        callbacks, callback_arrays = self._callbacks.get_state()
        random, random_arrays = restoring.get_random_state()
        data, data_arrays = split_arrays(self._feed.get_state())
        arrays |= {f"callbacks/{k}": v for k, v in callback_arrays.items()}
        arrays |= {f"data/{k}": v for k, v in data_arrays.items()}
        arrays |= {f"random/{k}": v for k, v in random_arrays.items()}
        best = self._recorder.best
        host: dict[str, JSON] = {
            "clock": self.clock.to_json(),
            "data": data,
            "seed": self._seed,
            "callbacks": callbacks,
            "random": random,
            "best": best.get_state(),
            "recovery": self._recovery.get_state(),
            "sinks": self._log.get_state(),
            "trainable": restoring.get_frozen(self._roots(), self._variables),
            "settings": settings,
            "identity": self._identity,
            "train_steps": self._schedule.train_steps,
        }
        self._store.save(
            self.clock.step,
            arrays,
            host,
            best=best.is_new,
            before_commit=self._before_commit,
        )
        best.is_new = self._begins = False
        self._saved_step = self.clock.step
        self._last_save = time.monotonic()

    def _before_commit(self) -> None:
        """In the writer's thread; a checkpoint counts the logs' lines."""
        self._log.sync()
        self._backend.publish_programs()

    def _restore(self, checkpoint: Checkpoint) -> None:
        host, parts = checkpoint.host, self._parts
        saved = host.get("identity")
        unknown = [
            path
            for path in checkpoint.arrays
            if path not in self._variables
            and not path.startswith(("callbacks/", "data/", "random/"))
        ]
        if unknown and parts.evaluator:
            # Perhaps validation uses them, which is traced when it is due.
            parts.evaluator.build()
            self._collect_variables()
        override = self._config.resume == "override"
        # Metrics may come and go: they decide no bits of anything else.
        lenient = {*self._lenient, *["optimizer"] * override}
        self.audit = restoring.assign_arrays(
            self._variables, checkpoint, lenient=lenient
        )
        if override:
            restoring.set_rates(
                identity.rates_that_differ(saved, self._identity),
                parts.optimizers,
                parts.initial_rates,
            )
        self._inexact += identity.reset_metrics(
            parts.metrics, saved, self._identity, self._metrics, self.audit
        )
        arrays = restoring.by_root(checkpoint.arrays)

        def take(part: str, restore: Callable[[Any], Any]) -> None:
            restored = restore(host.get(part)) is not False
            status = AuditStatus.RESTORED if restored else AuditStatus.NEW
            self.audit.append(AuditEntry(part, "", status))

        take("clock", self.clock.load)
        take(
            "trainable",
            lambda state: restoring.set_frozen(
                state, self._roots(), self._variables
            ),
        )
        self.audit += self._settings.set_state(host.get("settings"))
        take(
            "data",
            lambda state: self._feed.set_state(
                join_arrays(state, arrays.get("data", {}))
            ),
        )
        self.audit += self._callbacks.set_state(
            host.get("callbacks"), arrays.get("callbacks", {})
        )
        take(
            "random",
            lambda state: restoring.set_random_state(
                state, arrays.get("random", {})
            ),
        )
        trial = self._recovery.last_after(host.get("recovery", []))
        if self._recorder.best.is_kept:
            take("best", self._recorder.best.set_state)
            if trial is not None:
                self._recorder.best.set_state(trial.best)
        take("sinks", lambda s: self._log.rewind(s, lenient=override))
        self.clock.extend(host.get("train_steps"), self._schedule.train_steps)
        parts.whole.stop_training = self.clock.stop_training
        self._saved_step = self.clock.step
        title = f"Resumed {self._run_dir} at step {self.clock.step}"
        title += f"{self._feed.rereading}:"
        self._reporter.message(restoring.audit_table(title, self.audit))
