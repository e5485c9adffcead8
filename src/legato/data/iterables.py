"""Data that come in passes: resumed in mid-pass, or by reading it again."""

import warnings
from collections.abc import Mapping
from typing import Any

from legato.data import streams
from legato.data.batches import (
    BatchSource,
    Layout,
    Leaves,
    check_count,
    digest,
    standardise,
)
from legato.data.iterating import IterableIterator
from legato.data.readers import OneShot, Reader
from legato.data.source import DataIterator
from legato.data.trying import Attempt, choose_method
from legato.errors import (
    DataError,
    LegatoError,
    LegatoWarning,
)
from legato.types import JSON

# A pass of fewer batches is read again without a word.
_MANY = 1000

_NO_STATE = "it does not tell its state"


class IterableSource(BatchSource):
    """Batches that a reader gives, pass after pass over the data.

    To resume, the pass is begun anew, at the position where its iterator says
    that it was; or, where it has no word for that, at the first batch, and the
    batches that were trained on are skipped. So what the pass began with is
    put back first: while the user's code runs, the global generators are
    functions of the seed and of the pass (and of the batch, where batches are
    not drawn again), and what changed in the user's objects is saved.

    Args:
        reader: reads the data.
        class_weight: class -> weight of its examples.
        steps_per_epoch: the length of an epoch. Data that end sooner begin
            anew in mid-epoch.
        name: what the caller calls the data, for messages.
        steps_name: what it calls `steps_per_epoch`, likewise.
        as_given: batches are nested in any way, and stay so; not those of
            `fit`.

    Raises:
        DataError: the data have no end, or can be read once only, and
            `steps_per_epoch` is None; or the first batch is none.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        class_weight: Mapping[int, float] | None = None,
        steps_per_epoch: int | None = None,
        name: str = "x",
        steps_name: str = "steps_per_epoch",
        as_given: bool = False,
    ) -> None:
        self.reader = reader
        self.steps_name = steps_name
        self._as_given = as_given
        self.is_one_shot = reader.one_shot
        self.what = f"{name} ({reader.kind})"
        self._class_weight = class_weight
        self._steps = steps_per_epoch
        self._lost: list[str] = []
        if reader.length is not None:
            check_count(reader.length, f"The length of {self.what}")
        elif steps_per_epoch is None and (reader.one_shot or reader.endless):
            why = "has no end"
            if reader.one_shot:
                why = "can be read once, and does not say how long it is"
            share = "an epoch"
            if steps_name != "steps_per_epoch":
                share = "a pass over it"
            raise DataError(
                f"{self.what} {why}: give {steps_name}, the number of batches "
                f"in {share}."
            )
        with self.named():
            self._layout, self._repeatable = self._look()
            self.length = reader.length
            if self.length is None and steps_per_epoch is None:
                self.length = self._count()

    def named(self) -> "_Named":
        """A context whose errors say whose they are."""
        return _Named(self.what)

    # -- the first batch ----------------------------------------------------

    def _look(self) -> tuple[Layout, bool]:
        reader = self.reader
        if isinstance(reader, OneShot):
            first = self._standardised(reader.peek())
            return self._layout_of(first), False
        with streams.kept():
            attempt = self._attempt()
            layout = self._layout_of(self._first(attempt))
            if reader.threads and attempt.drew_globally:
                reader.threads = reader.ahead = False  # said once
                reader.notes.append(
                    "it draws from the global generators of Python, NumPy or "
                    "PyTorch in other threads, in an order that varies. Use "
                    "random operations that take seeds"
                )

            def leaves(batch: Any) -> Leaves:
                return layout.leaves(self._standardised(batch))

            choose_method(reader, attempt, leaves)
            if not reader.cheap:
                return layout, False
            attempt = self._attempt()
            again = layout.leaves(self._first(attempt))
            attempt.close()
        if digest(again) != digest(layout.first):
            reader.notes.append(
                "its first batch was drawn twice and was not the same: it "
                "uses something that cannot be put back. Give it seeds, or "
                "let it draw from `numpy.random`"
            )
        return layout, not reader.notes

    def _layout_of(self, first: Any) -> Layout:
        return Layout(first, self.what, of_fit=not self._as_given)

    def _attempt(self) -> Attempt:
        attempt = Attempt(self.reader)
        attempt.begin()
        return attempt

    def _first(self, attempt: Attempt) -> Any:
        """The first batch of the first pass."""
        batch = attempt.draw()
        if batch is None:
            raise DataError("it gave no batch: it must give at least one.")
        return self._standardised(batch)

    def _count(self) -> int:
        """The number of batches in a pass, by reading them all."""
        warnings.warn(
            f"{self.what} does not say how many batches it has: they are "
            f"counted, by reading all of them once. Give {self.steps_name} to "
            "save the time.",
            LegatoWarning,
            stacklevel=4,
        )
        passes = self.reader.open()
        with passes.stream(0, 0).active():
            count = sum(1 for _ in passes.begin(0))
        passes.close()
        self._reset()
        return check_count(count, f"The length of {self.what}")

    def _reset(self) -> None:
        for tracked in self.reader.tracked:
            if tracked.look().state is not None:
                tracked.reset()

    def _standardised(self, batch: Any) -> Any:
        if self._as_given:
            return batch
        return standardise(batch, self._class_weight, self.what)

    def leaves(self, batch: Any) -> Leaves:
        """The arrays of a batch as the reader gave it."""
        return self._layout.leaves(self._standardised(batch))

    # -- the source ---------------------------------------------------------

    @property
    def inexact(self) -> str | None:
        """What was found when the data were looked at, and read."""
        notes = [*self.reader.notes, *self._lost]
        if not notes:
            return None
        return " ".join(f"{self.what}: {note}." for note in notes)

    @property
    def resuming(self) -> str | None:
        """That, and why, the data are read again, where they are many."""
        reader = self.reader
        if reader.method != "replay" or (
            not self.is_one_shot and self.batches_per_epoch < _MANY
        ):
            return None
        where = "its first batch"
        if not self.is_one_shot:
            where = "the beginning of a pass over it"
        return (
            f"{self.what}: a run that is resumed reads again all from {where} "
            f"up to its position, for {reader.why or _NO_STATE}. Data that "
            "tell their state are resumed at once."
        )

    def lost(self, paths: list[str]) -> None:
        """Remember what changes and cannot be saved."""
        note = (
            f"{', '.join(paths[:3])} changed while it was read and cannot be "
            "saved. Keep what changes in attributes that are numbers, arrays "
            "or seeded generators"
        )
        if paths and not self._lost:
            self._lost.append(note)

    @property
    def restarts(self) -> bool:
        """Whether data that end before the epoch does begin anew."""
        return self._steps is not None

    @property
    def batches_per_epoch(self) -> int:
        """Batches in a pass, or what stands for it."""
        return self.length or self._steps or 1

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Its kind, its length and its first batch."""
        weights = self._class_weight or {}
        return {
            "kind": self.reader.kind,
            "batches": self.length,
            "steps_per_epoch": self._steps,
            "class_weight": [
                [str(k), float(weights[k])] for k in sorted(weights)
            ],
            **self._layout.identity(repeatable=self._repeatable),
        }

    def iterate(self, *, seed: int, capacity: int) -> DataIterator:
        """Start at the first batch of the first pass."""
        return IterableIterator(self, seed, capacity)


class _Named:
    """Puts the name of the data before the messages of readers."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, LegatoError):
            if error is not None:
                error.add_note(f"legato: raised while {self._what} was read.")
            return
        text = str(error)
        if not text.startswith(self._what) and self._what not in text:
            raise type(error)(f"{self._what}: {text}") from error
