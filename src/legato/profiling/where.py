"""Where the time of the training loop goes: a piece of it, as it is."""

import functools
import time
from collections.abc import Sequence
from typing import Any

from legato import backends, loop, restoring
from legato.callbacks import CallbackRunner
from legato.data import Feed
from legato.phases import between
from legato.profiling.contestants import Saving
from legato.profiling.workbench import Workbench
from legato.state import Clock
from legato.types import Logs

_WARM_SHARE = 0.3
_MAX_TRIES = 3


class Piece:
    """A piece of training, by the engine's own loop.

    Args:
        bench: whose steps, data and books.
        runners: of the callbacks, one each.
        saving: takes the checkpoints.
    """

    def __init__(
        self,
        bench: Workbench,
        runners: Sequence[CallbackRunner],
        saving: Saving,
    ) -> None:
        self._bench = bench
        self._saving = saving
        self._clock = Clock()
        self._hooks = _Hooks(runners)
        self._ends_at, self._last = 0.0, 0
        self._feed = Feed(
            bench.parts.source,
            seed=bench.seed,
            capacity=bench.capacity,
            draws_here=backends.current().overlaps is not None,
        )
        self._recorder = bench.make_recorder(self._clock)
        self._train = functools.partial(
            loop.run,
            clock=self._clock,
            schedule=bench.schedule,
            steps=bench.configured,
            feed=self._feed,
            hooks=self._hooks,
            recorder=self._recorder,
            validate=self._validate,
            save=self._save,
            save_is_due=lambda: False,
            stop_requested=self._is_over,
            callbacks_stop=lambda: False,
            phases=bench.phases,
        )

    def close(self) -> None:
        """Stop drawing."""
        self._feed.close()

    def measure(self, secs: float) -> tuple[int, dict[str, float]]:
        """Train for about so long, or less, where the run ends before that.

        A first part of it is not counted: calls grow, and steps are compiled.
        Where a shape of batches comes only after it, as in an epoch's last
        step, another piece is counted instead, if there is one.

        Returns:
            How many steps that were, and what each phase took of one, in
            microseconds; empty if there were none.
        """
        bench, clock = self._bench, self._clock
        bench.restore()
        bench.configured.begin_anew()
        self._recorder.summary()  # how results are read is compiled
        if self._feed.draws_here and not self._hooks.batch_hooks_active:
            bench.configured.make_overlap()
        self._last = bench.schedule.train_steps // 4
        self._ends_at = time.monotonic() + _WARM_SHARE * secs
        self._train()
        self._last = bench.schedule.train_steps
        count, spent = 0, {}
        for _ in range(_MAX_TRIES):
            first, before = clock.step, bench.phases.read()
            self._ends_at = time.monotonic() + secs
            self._train()
            if clock.step == first:
                break
            count = clock.step - first
            spent = between(before, bench.phases.read())
            if not spent["compile"]:
                break
        bench.configured.close()
        return count, {k: 1e6 * v / count for k, v in spent.items()}

    def _is_over(self) -> bool:
        late = time.monotonic() >= self._ends_at
        return late or self._clock.step >= self._last

    def _save(self) -> None:
        if not self._is_over():  # else it is only because it stops here
            self._saving.save()

    def _validate(self) -> dict[str, Any] | None:
        bench = self._bench
        assert bench.evaluator is not None  # or none is due
        hooks = CallbackRunner([], model=bench.parts.whole, params={})
        with restoring.kept(bench.parts.shared_variables()):
            return bench.evaluator(hooks, self._is_over)


class _Hooks:
    """All callbacks, each of which has a runner of its own."""

    def __init__(self, runners: Sequence[CallbackRunner]) -> None:
        self._runners = runners
        self.batch_hooks_active = any(r.batch_hooks_active for r in runners)
        self.wants_batch_logs = any(r.wants_batch_logs for r in runners)

    def on_epoch_begin(self, epoch: int) -> None:
        for runner in self._runners:
            runner.on_epoch_begin(epoch)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        for runner in self._runners:
            runner.on_epoch_end(epoch, logs)

    def on_train_batch_begin(self, batch: int) -> None:
        for runner in self._runners:
            runner.on_train_batch_begin(batch)

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        for runner in self._runners:
            runner.on_train_batch_end(batch, logs)
