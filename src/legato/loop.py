"""The training loop.

`run` is the whole of it. What it drives is handed in, each as the few verbs
that the loop needs; who they are is the trainer's business.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from legato.data import Chunk, Feed, StoppedWaiting
from legato.errors import WorkerError
from legato.pace import Pace
from legato.phases import (
    CHECKPOINT,
    DATA,
    DELIVERY,
    DEVICE,
    LAUNCH,
    PLAN,
    VALIDATION,
    Phases,
)
from legato.schedule import Schedule
from legato.state import Clock
from legato.types import Logs


class Steps(Protocol):
    """The compiled training step."""

    capacity: int

    @property
    def keeps(self) -> bool:
        """Whether it goes on at summaries, and keeps what they need."""
        ...

    @property
    def overlap(self) -> bool:
        """Whether `run` returns while the device is at work."""
        ...

    def run(self, step: int, chunk: Chunk) -> Any:
        """Begin the chunk's steps on the device."""
        ...

    def begin(self, step: int, chunk: Chunk) -> None:
        """Begin a chunk early, of which nothing shows until `run` is called."""

    def rows(
        self, logs: Any, chunk: Chunk
    ) -> tuple[np.ndarray, Mapping[int, np.ndarray] | None]:
        """Wait for them; their logs, float32 `[steps, names]`.

        And what was kept of variables at the steps of summaries, by ids.
        """
        ...


class Hooks(Protocol):
    """The callbacks."""

    batch_hooks_active: bool
    wants_batch_logs: bool

    def on_epoch_begin(self, epoch: int) -> None:
        """An epoch begins."""

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """An epoch ended."""

    def on_train_batch_begin(self, batch: int) -> None:
        """A batch begins."""

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """A batch ended."""


class Recorder(Protocol):
    """Keeps the books: means, summaries, progress."""

    def begin_epoch(self) -> None:
        """Reset what counts within an epoch."""

    def begin_interval(self) -> None:
        """Reset what counts from one summary to the next.

        A step that is trained on does so itself.
        """

    def steps(
        self,
        chunk: Chunk,
        rows: np.ndarray,
        kept: Mapping[int, np.ndarray] | None,
    ) -> None:
        """Take the logs of completed steps, and what was kept of them.

        Write the summaries that are due before the last one.
        """

    def batch_logs(self) -> Logs:
        """What batch hooks see after the last step."""
        ...

    def summary(self) -> None:
        """Write the summary that is due after the last step."""

    def catch_up(self, *, only_late: bool = False) -> None:
        """Write what was put off; or if it is late, since the device works."""

    def validation(self, logs: Logs) -> None:
        """Take the results of a validation."""

    def epoch_logs(self) -> Logs:
        """The logs of the epoch that ends."""
        ...

    def epoch(self, logs: Logs) -> None:
        """Write them, after the callbacks have seen them."""


def run(
    *,
    clock: Clock,
    schedule: Schedule,
    steps: Steps,
    feed: Feed,
    hooks: Hooks,
    recorder: Recorder,
    validate: Callable[[], dict[str, Any] | None],
    save: Callable[[], None],
    save_is_due: Callable[[], bool],
    stop_requested: Callable[[], bool],
    callbacks_stop: Callable[[], bool],
    phases: Phases,
) -> None:
    """Train until `clock.finished`, or until `stop_requested()`.

    Either way a checkpoint of the last step has been handed to `save`::

        do what the restored step still has to do
        until the end:
            on_epoch_begin, if an epoch begins
            n steps in one device call, up to the next stop
            deliver their logs (or, for steps that are skipped, neither)
            summary; validation; on_epoch_end; save: what is due

    Args:
        clock: where the run is; moved on.
        schedule: what is due when.
        steps: the compiled step.
        feed: the batches, at the clock's position.
        hooks: the callbacks.
        recorder: means, summaries, progress.
        validate: returns the results, or None if a stop was requested.
        save: hands everything to the checkpoint writer.
        save_is_due: whether to save because of the time.
        stop_requested: whether a signal or the time asks to stop.
        callbacks_stop: whether a callback set `model.stop_training`.
        phases: told what the time is spent on.
    """
    pace = Pace(
        steps.capacity,
        alternates=feed.draws_here,
        num_bytes=feed.chunk_bytes,
    )
    limits = functools.partial(_limit, schedule, steps, hooks)
    # What was restored is on disk, unless duties are still to be done.
    saved_step = None if clock.duties or clock.step == 0 else clock.step
    while True:
        # ORDER MATTERS from here to the end of the loop: a checkpoint must
        # hold either all or nothing of what belongs to a step.
        if clock.duties:
            recorder.catch_up()  # callbacks may change what it looks at
            _do_duties(clock, hooks, recorder, validate, phases)
            phases.enter(PLAN)
        if clock.step > 0:  # else as in Keras: after one batch
            clock.stop_training = clock.stop_training or callbacks_stop()
        ended = clock.step >= schedule.train_steps or clock.stop_training
        clock.finished = ended and not clock.duties
        stops = clock.finished or stop_requested()
        if stops or save_is_due() or schedule.checkpoint_is_due(clock.step):
            if saved_step != clock.step or clock.duties:
                phases.enter(CHECKPOINT)
                save()
                phases.enter(PLAN)
            saved_step = None if clock.duties else clock.step
        if stops:
            return
        if not clock.epoch_begun:
            phases.enter(DELIVERY)
            recorder.begin_epoch()
            hooks.on_epoch_begin(clock.epoch)
            clock.epoch_begun = True
        is_skipped = schedule.is_skipped(clock.step + 1)
        if is_skipped and schedule.summary_is_due(clock.step):
            # Only now: the logs of an epoch that ended hold them too.
            recorder.begin_interval()

        # In a hook that came before: as in Keras, after one batch.
        limit = 1 if callbacks_stop() else limits(clock.step)
        phases.enter(DATA)
        try:
            chunk = feed.take(pace.of(limit), limit)
        except StoppedWaiting:
            continue  # to where it stops
        except WorkerError:
            # Nothing of the next step has been done: all can still be saved.
            if saved_step != clock.step:
                save()
            raise
        rows = kept = None
        after = clock.step + chunk.num_batches
        prefetch = functools.partial(
            feed.prefetch,
            pace.of(limits(after)),
            is_quiet=not hooks.batch_hooks_active
            and not schedule.calls_back(after),
        )
        if not is_skipped:
            if not steps.overlap:
                # By the feed's own thread, or not at all: a single batch would
                # be made here, and the device wait for it.
                prefetch(only_beside=True)
            if hooks.batch_hooks_active:
                phases.enter(DELIVERY)
                hooks.on_train_batch_begin(clock.step_in_epoch)
            phases.enter(LAUNCH)
            began = time.perf_counter()
            logs = steps.run(clock.step, chunk)
            phases.enter(DATA)
            prefetch()
            phases.enter(LAUNCH)
            is_begun = pace.is_quick and _begin_next(
                after, clock.epoch, schedule, steps, feed
            )
            recorder.catch_up(only_late=True)
            phases.enter(DEVICE)
            rows, kept = steps.rows(logs, chunk)
            pace.learn(
                max(chunk.num_batches, feed.num_drawn),
                time.perf_counter() - began,
            )
            if pace.is_quick and not is_begun:  # batches may have come by now
                phases.enter(LAUNCH)
                _begin_next(after, clock.epoch, schedule, steps, feed)

        phases.enter(DELIVERY)
        clock.step += chunk.num_batches
        clock.step_in_epoch += chunk.num_batches
        if rows is not None:
            recorder.steps(chunk, rows, kept)
            if hooks.wants_batch_logs:
                hooks.on_train_batch_end(
                    clock.step_in_epoch - 1, recorder.batch_logs()
                )
        if schedule.summary_is_due(clock.step):
            recorder.summary()
        phases.enter(PLAN)
        # As in Keras, a stop in mid-epoch still ends the epoch.
        clock.stop_training = callbacks_stop()
        epoch_ends = schedule.epoch_ends(clock.step) or clock.stop_training
        if epoch_ends:
            feed.end_epoch()
        validates = schedule.validation_is_due(
            clock.step, clock.epoch, epoch_ends=epoch_ends
        )
        clock.duties = ("validation",) * validates + (
            ("epoch_end",) * epoch_ends
        )


def _do_duties(
    clock: Clock,
    hooks: Hooks,
    recorder: Recorder,
    validate: Callable[[], Logs | None],
    phases: Phases,
) -> None:
    """Do what is due at this step, each thing whole or not at all."""
    while clock.duties:
        if clock.duties[0] == "validation":
            phases.enter(VALIDATION)
            results = validate()
            if results is None:
                return
            phases.enter(DELIVERY)
            recorder.validation(results)
        else:
            phases.enter(DELIVERY)
            logs = recorder.epoch_logs()
            hooks.on_epoch_end(clock.epoch, logs)
            recorder.epoch(logs)
            clock.epoch += 1
            clock.step_in_epoch = 0
            clock.epoch_begun = False
        clock.duties = clock.duties[1:]


def _begin_next(
    step: int, epoch: int, schedule: Schedule, steps: Steps, feed: Feed
) -> bool:
    """Let the device work on while callbacks and summaries look at a batch.

    Most of them change nothing that the next steps would see. (But an epoch's
    end and a validation reset metrics.)
    """
    chunk = feed.ahead
    if (
        chunk is None
        or step >= schedule.train_steps
        or schedule.epoch_ends(step)
        or schedule.is_skipped(step + 1)
        or schedule.validation_is_due(step, epoch, epoch_ends=False)
    ):
        return False
    steps.begin(step, chunk)
    return True


def _limit(schedule: Schedule, steps: Steps, hooks: Hooks, step: int) -> int:
    """The most steps that the next device call may take."""
    if hooks.batch_hooks_active:
        return 1
    stop = schedule.next_stop(step, at_summaries=not steps.keeps)
    return max(1, min(stop - step, steps.capacity))
