"""Going back when the loss goes wrong, and leaving out the steps that did it.

A step is bad when its loss is not finite, or above a bound. The run then goes
back to a checkpoint before it, and comes to the same step once more, exactly;
there the steps in question are skipped: their batches are drawn and not
trained on, so that the clock, the data and all cadences stay together. What
becomes of the run does therefore not depend on which checkpoint it went back
to, nor on when it was killed.

What is skipped is written down in the run directory before anything is undone,
and in every checkpoint from then on: restarting does not forget the trials.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from legato import storage
from legato.checkpoint import Checkpoint, CheckpointStore
from legato.config import TrainerConfig
from legato.errors import (
    BadLossError,
    CheckpointError,
    ConfigError,
    DamagedError,
    LegatoWarning,
    NonFiniteLossError,
    RunDirError,
    StepError,
)
from legato.storage import strict_json
from legato.types import JSON

RECOVERY = "recovery.json"

_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One recovery.

    Attributes:
        step: the step whose loss was bad.
        loss: what it was.
        first: the first step that is skipped, from 1.
        last: the last one.
        best: the best checkpoint by then, which stays the best.
    """

    step: int
    loss: float
    first: int
    last: int
    best: JSON

    @classmethod
    def parse(cls, record: JSON) -> "Trial":
        """Of what `dataclasses.asdict` made.

        Raises:
            DamagedError: it is something else.
        """
        match record:
            case {
                "step": int(step),
                "loss": float(loss),
                "first": int(first),
                "last": int(last),
                "best": best,
            } if len(record) == 5 and 1 <= first <= last <= step:
                return cls(
                    step=step, loss=loss, first=first, last=last, best=best
                )
        raise DamagedError(f"a trial is {record!r:.80}")


class Recovery:
    """The trials of a run.

    Args:
        run_dir: the run directory, locked by this process.
        max_trials: how many are allowed.

    Attributes:
        trials: so far.

    Raises:
        RunDirError: their file cannot be read.
    """

    def __init__(self, run_dir: Path, max_trials: int) -> None:
        self._path = run_dir / RECOVERY
        self._max_trials = max_trials
        self.trials: list[Trial] = self._read()

    @property
    def is_on(self) -> bool:
        """Whether a bad loss may be recovered from."""
        return self._max_trials > 0

    @property
    def skipped(self) -> tuple[tuple[int, int], ...]:
        """First and last step of what is skipped, ascending and apart."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted((t.first, t.last) for t in self.trials):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(merged[-1][1], last)
            else:
                merged.append((first, last))
        return tuple(merged)

    def get_state(self) -> JSON:
        """For a checkpoint."""
        return [dataclasses.asdict(trial) for trial in self.trials]

    def last_after(self, state: JSON) -> Trial | None:
        """The last trial that a checkpoint does not know of.

        Args:
            state: what `get_state` returned when it was saved.

        Raises:
            DamagedError: it did not.
        """
        unknown = self._unknown_to(state)
        return unknown[-1] if unknown else None

    def _unknown_to(self, state: JSON) -> list[Trial]:
        known = _parse(state)
        if _records(known[: len(self.trials)]) != _records(
            self.trials[: len(known)]
        ):
            raise DamagedError(
                f"{self._path} tells of other trials than the checkpoint. It "
                "is another run's: put the right one back, or move it away "
                "to go by the checkpoint"
            )
        return self.trials[len(known) :]

    def find_checkpoint(self, store: CheckpointStore) -> Checkpoint | None:
        """The newest intact checkpoint that the run may go on from.

        Where the newest of all was overtaken by a recovery, it and others
        like it are set aside.

        Raises:
            CheckpointError: there are checkpoints, and none will do.
            RunDirError: the trials cannot be written.
        """
        newest = store.restore()
        if newest is None:
            return None
        known = _parse(newest.host.get("recovery", []))
        if len(known) > len(self.trials):
            # The file was removed, or its last version did not reach the disk.
            self._unknown_to(newest.host["recovery"])  # or it is another's
            self.trials = known
            try:
                self._write()
            except OSError as error:
                raise RunDirError(f"{self._path}: {error}.") from error
        if self._is_on_path(newest):
            return newest
        for step in reversed(store.steps()):
            found = store.find(step) if step < newest.step else None
            if found is not None and self._is_on_path(found):
                store.rewind(step, keep_best=True)
                return found
        first = min(trial.first for trial in self.trials)
        raise CheckpointError(
            f"{self._path} says to go back before step {first}, and no "
            "checkpoint from there is intact. Put one back, or move the file "
            "away to go on from the newest."
        )

    def _is_on_path(self, checkpoint: Checkpoint) -> bool:
        unknown = self._unknown_to(checkpoint.host.get("recovery", []))
        return all(trial.first > checkpoint.step for trial in unknown)

    def plan(
        self, error: BadLossError, best: JSON, steps: Sequence[int]
    ) -> Trial | None:
        """What to skip after a bad loss; None to give up, and `error` says why.

        The step itself is skipped at first. Where the loss goes wrong again
        within twice as many steps as were skipped, the weights were spoilt
        before: as many more are skipped before those, and all up to the bad
        step.

        Args:
            error: tells which step, and what its loss was.
            best: of the recorder.
            steps: of which there are checkpoints.
        """
        if not self.is_on:
            return None
        if len(self.trials) >= self._max_trials:
            error.explain(
                f"Gave up after {len(self.trials)} of recovery_max_trials="
                f"{self._max_trials} recoveries, which skipped {self._list()}.",
            )
            return None
        first = last = error.step
        earlier = [each for each in self.skipped if each[1] < last]
        if earlier:
            before, end = earlier[-1]
            width = end - before + 1
            if last - end <= 2 * width:
                first = max(1, before - width)
        if not any(step < first for step in steps):
            oldest = f"the oldest is that of {min(steps)}" if steps else "none"
            error.explain(
                f"Recovering would take a checkpoint from before step {first}; "
                f"of those kept, {oldest}. Raise keep_last.",
            )
            return None
        return Trial(
            step=last, loss=error.loss, first=first, last=last, best=best
        )

    def record(self, trial: Trial) -> None:
        """Write it down, durably.

        Raises:
            RunDirError: it could not be written; nothing was changed.
        """
        self.trials.append(trial)
        try:
            self._write()
        except OSError as error:
            self.trials.pop()
            raise RunDirError(
                f"{self._path} could not be written, so that the run cannot "
                f"go back: {error}. Run it again."
            ) from error
        skipped = (
            f"step {trial.first} is"
            if trial.first == trial.last
            else f"steps {trial.first} to {trial.last} are"
        )
        warnings.warn(
            f"The loss became {trial.loss} at step {trial.step}: going back, "
            f"{skipped} skipped (recovery {len(self.trials)} of "
            f"{self._max_trials}).",
            LegatoWarning,
            stacklevel=2,
        )

    def _list(self) -> str:
        return ", ".join(
            f"step {a}" if a == b else f"steps {a} to {b}"
            for a, b in self.skipped
        )

    def _read(self) -> list[Trial]:
        try:
            raw = storage.read_file(self._path, max_bytes=_MAX_BYTES)
        except FileNotFoundError:
            return []
        except (OSError, DamagedError) as error:
            raise self._refuse(error) from error
        try:
            return _parse(strict_json.loads(raw, name=RECOVERY))
        except DamagedError as error:
            raise self._refuse(error) from error

    def _refuse(self, error: Exception) -> RunDirError:
        why = error.strerror if isinstance(error, OSError) else error
        return RunDirError(
            f"{self._path} cannot be read: {why}. Put it back, or move it "
            "away: the trials that the newest checkpoint knows are taken then."
        )

    def _write(self) -> None:
        storage.write_file(self._path, strict_json.dumps(self.get_state()))


def _parse(state: JSON) -> list[Trial]:
    if not isinstance(state, list):
        raise DamagedError(f"the trials are {state!r:.80}")
    return [Trial.parse(record) for record in state]


def _records(trials: Sequence[Trial]) -> list[bytes]:
    # (As bytes, in which NaN equals NaN.)
    return [strict_json.dumps(dataclasses.asdict(trial)) for trial in trials]


class LossWatch:
    """Says when a loss is bad.

    Args:
        config: policies.
        is_expected: whether a loss that is not finite is handled by someone
            else, unless `config` says otherwise.
    """

    def __init__(self, config: TrainerConfig, *, is_expected: bool) -> None:
        self._bound = config.loss_upper_bound
        self._begin = config.recovery_begin_steps
        policy = config.nonfinite_loss
        self._tolerates = is_expected if policy is None else policy == "warn"
        self._warned = False

    def check(
        self,
        losses: Sequence[float],
        last: int,
        explain: Callable[[int], str],
    ) -> None:
        """Look at the losses of completed steps.

        Args:
            losses: of consecutive steps.
            last: the last of these.
            explain: a sentence on the inputs of a step; "" if there is
                nothing to say.

        Raises:
            NonFiniteLossError: one is NaN or infinite.
            BadLossError: one is above the bound.
        """
        highest = math.inf if self._bound is None else self._bound
        # Quickly: this is done for each step, and the sum of all tells.
        if math.isfinite(sum(losses)) and max(losses, default=0.0) <= highest:
            return
        for step, loss in enumerate(losses, last + 1 - len(losses)):
            if not math.isfinite(loss):
                self._take_nonfinite(loss, step, explain)
            elif (
                self._bound is not None
                and loss > self._bound
                and step > self._begin
            ):
                raise BadLossError(
                    f"The loss became {loss} at step {step}, above "
                    f"loss_upper_bound={self._bound}. {explain(step)}{_KEPT} "
                    "Lower the learning rate, clip gradients (clipnorm=), look "
                    "at the inputs of that batch, or raise the bound.",
                    step,
                    loss,
                )

    def _take_nonfinite(
        self, loss: float, step: int, explain: Callable[[int], str]
    ) -> None:
        message = f"The loss became {loss} at step {step}"
        if not self._tolerates:
            raise NonFiniteLossError(
                f"{message}. {explain(step)}{_KEPT} Lower the learning rate, "
                "clip gradients (clipnorm=), look at the inputs of that batch, "
                "set recovery_max_trials to go back and skip it, or "
                'nonfinite_loss="warn" to go on.',
                step,
                loss,
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{message}; training goes on. {explain(step)}".rstrip(),
                LegatoWarning,
                stacklevel=3,
            )


def watch_losses(
    config: TrainerConfig,
    *,
    loss: str,
    log_names: Sequence[str],
    scales_loss: bool,
    ends_on_nan: bool,
    is_one_shot: bool,
) -> LossWatch:
    """What says when a loss is bad, in a run where that can be told.

    Args:
        config: policies.
        loss: the name of the loss.
        log_names: of what a step returns.
        scales_loss: whether a LossScaleOptimizer skips what is not finite.
        ends_on_nan: whether a callback ends training then.
        is_one_shot: whether the data cannot be drawn again.

    Raises:
        ConfigError: the run can never recover, and is asked to.
        StepError: so does its step.
    """
    if config.recovery_max_trials:
        asked = f"recovery_max_trials={config.recovery_max_trials}"
        if is_one_shot:
            raise ConfigError(
                f"{asked}: going back takes data that can be drawn again, and "
                "a generator cannot. Give an object whose __iter__ makes a "
                "new one, a keras.utils.PyDataset or arrays; or set it to 0."
            )
        if scales_loss and config.loss_upper_bound is None:
            raise ConfigError(
                f"{asked}: a LossScaleOptimizer skips the steps that are not "
                "finite, so that there is nothing to recover from. Give a "
                "loss_upper_bound, or set it to 0."
            )
        if loss not in log_names:
            raise StepError(
                f"{asked}: train_step returns no {loss!r} to go by, but "
                f"{', '.join(log_names) or 'nothing'}. Return the loss by "
                "that name, or set it to 0."
            )
        ends_on_nan = False  # a recovery comes first
    return LossWatch(config, is_expected=ends_on_nan or scales_loss)


_KEPT = (
    "No checkpoint was written since; resuming repeats the steps before it "
    "exactly."
)
