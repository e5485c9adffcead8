"""When something is due: pure functions of the step, the one clock."""

import dataclasses
from collections.abc import Set
from typing import Literal

Interval = int | Literal["epoch"] | None
"""Every so many steps, at the end of each epoch, or never."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The cadences of a run.

    Attributes:
        train_steps: the step at which training ends.
        steps_per_epoch: steps from one `on_epoch_end` to the next.
        validation_interval: see `Interval`.
        validation_freq: where that is "epoch": validate after each so many
            epochs, or after those with these numbers (from 1).
        checkpoint_interval: see `Interval`; None where it is a duration.
        summary_interval: steps between summaries; 0 for none.
        skipped: first and last of the steps, from 1, whose batches are not
            trained on; ascending, with steps between them.
    """

    train_steps: int
    steps_per_epoch: int
    validation_interval: Interval
    checkpoint_interval: Interval
    summary_interval: int
    validation_freq: int | Set[int] = 1
    skipped: tuple[tuple[int, int], ...] = ()

    def next_stop(self, step: int, *, at_summaries: bool = True) -> int:
        """The nearest step after `step` at which anything is due.

        Those up to it are all trained on, or all skipped.

        Args:
            step: a step.
            at_summaries: whether summaries count.
        """
        return min(
            self.train_steps,
            *(
                edge
                for first, last in self.skipped
                for edge in (first - 1, last)
                if edge > step
            ),
            *(
                step + every - step % every
                for every in (
                    self.steps_per_epoch,
                    self._every(self.validation_interval),
                    self._every(self.checkpoint_interval),
                    self.summary_interval if at_summaries else 0,
                )
                if every
            ),
        )

    def is_skipped(self, step: int) -> bool:
        """Whether the batch of this step is not trained on."""
        return any(first <= step <= last for first, last in self.skipped)

    def trained(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The parts of `[first, stop)`, counted from 0, that are trained on."""
        parts = []
        for skipped, until in self.skipped:
            if skipped - 1 < stop and until > first:
                parts.append((first, skipped - 1))
                first = until
        return [(a, b) for a, b in [*parts, (first, stop)] if a < b]

    def epoch_ends(self, step: int) -> bool:
        """Whether an epoch ends with this step."""
        return _is_due(step, self.steps_per_epoch)

    def validation_is_due(
        self, step: int, epoch: int, *, epoch_ends: bool
    ) -> bool:
        """Whether to validate after this step.

        Args:
            step: that was completed.
            epoch: that it belongs to, from 0.
            epoch_ends: whether it is the last one of it.
        """
        if self.validation_interval != "epoch":
            return _is_due(step, self._every(self.validation_interval))
        if isinstance(self.validation_freq, int):
            return epoch_ends and (epoch + 1) % self.validation_freq == 0
        return epoch_ends and epoch + 1 in self.validation_freq

    def calls_back(self, step: int) -> bool:
        """Whether callbacks may be called, or a save is due, at this step.

        Those that act at each batch are not meant.
        """
        return (
            step >= self.train_steps
            or self.epoch_ends(step)
            or self.checkpoint_is_due(step)
            or self.validation_is_due(step, 0, epoch_ends=False)
        )

    def checkpoint_is_due(self, step: int) -> bool:
        """Whether to save after this step (time apart)."""
        return _is_due(step, self._every(self.checkpoint_interval))

    def summary_is_due(self, step: int) -> bool:
        """Whether to write a summary after this step."""
        return _is_due(step, self.summary_interval)

    def summaries(self, first: int, stop: int) -> range:
        """The steps in `[first, stop)` after which there is a summary."""
        every = self.summary_interval
        return range(-(-first // every) * every, stop, every)

    def last_summary(self, step: int) -> int:
        """The last step before `step` after which there was one, or 0."""
        every = self.summary_interval
        return (step - 1) // every * every if every and step else 0

    def _every(self, interval: Interval) -> int:
        return self.steps_per_epoch if interval == "epoch" else interval or 0


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step > 0 and step % every == 0
