"""Data that can only be read from the beginning: resumed by reading again."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from legato.data import streams
from legato.data.batches import (
    BatchSource,
    Chunks,
    Layout,
    Leaves,
    check_count,
    digest,
    shown,
    standardise,
)
from legato.data.holding import Hold
from legato.data.readers import OneShot, Passes, Reader
from legato.data.source import Chunk, DataIterator, DataState
from legato.errors import (
    DamagedError,
    DataError,
    LegatoError,
    LegatoWarning,
    RestoreError,
)
from legato.types import JSON


class IterableSource(BatchSource):
    """Batches that a reader gives, pass after pass over the data.

    To resume, the pass is begun anew and the batches that were trained on are
    skipped. So what the pass began with is put back first: the global
    generators are functions of the seed and of the pass while the user's code
    runs, and what changed in the user's objects is saved.

    Args:
        reader: reads the data.
        class_weight: class -> weight of its examples.
        steps_per_epoch: the length of an epoch. Data that end sooner begin
            anew in mid-epoch.
        name: what the caller calls the data, for messages.
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
        as_given: bool = False,
    ) -> None:
        self.reader = reader
        self._as_given = as_given
        self.is_one_shot = reader.one_shot
        self.what = f"{name} ({reader.kind})"
        self._class_weight = class_weight
        self._steps = steps_per_epoch
        self._lost: list[str] = []
        if reader.length is not None:
            check_count(reader.length, f"The length of {self.what}")
        elif steps_per_epoch is None and reader.one_shot:
            raise DataError(
                f"{self.what} can be read once, and does not say how long it "
                "is: give steps_per_epoch, the number of batches in an epoch."
            )
        elif steps_per_epoch is None and reader.endless:
            raise DataError(
                f"{self.what} has no end: give steps_per_epoch, the number of "
                "batches in an epoch."
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
        if isinstance(self.reader, OneShot):
            first = self._standardised(self.reader.peek())
            return Layout(first, self.what), False
        layout = Layout(self._first(), self.what)
        if not self.reader.cheap:
            return layout, False
        again = digest(layout.leaves(self._first()))
        if again != digest(layout.first):
            self.reader.notes.append(
                "its first batch was drawn twice and was not the same: it "
                "uses something that cannot be put back. Give it seeds, or "
                "let it draw from `numpy.random`"
            )
        return layout, not self.reader.notes

    def _first(self) -> Any:
        """The first batch of the first pass, and all as it was before."""
        passes = self.reader.open()
        with streams.kept():
            streams.begin(0, "first")
            before = streams.fingerprint()
            batches = passes.begin(0)
            for batch in batches:
                first = self._standardised(batch)
                break
            else:
                raise DataError("it gave no batch: it must give at least one.")
            if self.reader.threads and streams.fingerprint() != before:
                self.reader.threads = False  # said once
                self.reader.notes.append(
                    "it draws from the global generators of Python, NumPy or "
                    "PyTorch in other threads, in an order that varies. Use "
                    "random operations that take seeds"
                )
            del batches
        passes.close()
        self._reset()
        return first

    def _count(self) -> int:
        """The number of batches in a pass, by reading them all."""
        warnings.warn(
            f"{self.what} does not say how many batches it has: they are "
            "counted, by reading all of them once. Give steps_per_epoch to "
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
        return _Iterator(self, seed, capacity)


class _Named:
    """Puts the name of the data before the messages of readers."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, LegatoError):
            return
        text = str(error)
        if not text.startswith(self._what) and self._what not in text:
            raise type(error)(f"{self._what}: {text}") from error


class _Iterator(DataIterator):
    """Draws in this thread, when it is asked: it runs the user's code.

    The state: the pass, the batches of it that were given out, and what the
    user's objects were when the pass began.
    """

    draws_ahead = False

    def __init__(
        self, source: IterableSource, seed: int, capacity: int
    ) -> None:
        self._source = source
        self._seed = seed
        self._chunks = Chunks(self._draw, capacity)
        self._pass = 0
        self._given = 0
        self._drawn = 0
        self._tracked: list[DataState] | None = None
        self._hold = Hold(source.reader.tracked)
        self._passes: Passes | None = None
        self._batches: Iterator[Any] | None = None
        self._stream: streams.Stream | None = None

    def get_state(self) -> DataState:
        return {
            "pass": self._pass,
            "batch": self._given,
            "tracked": self._tracked,
        }

    def set_state(self, state: DataState) -> None:
        source = self._source
        match state:
            case {
                "pass": int(pass_),
                "batch": int(batch),
                "tracked": list() | None as tracked,
            } if (
                pass_ >= 0
                and 0 <= batch <= (source.length or batch)
                and len(tracked or source.reader.tracked)
                == len(source.reader.tracked)
            ):
                pass
            case _:
                raise RestoreError(
                    f"The saved data position {shown(state)} is not one of "
                    f"{source.what}, which has {source.batches_per_epoch} "
                    "batches in an epoch. Resume with the data of the run."
                )
        self._leave()
        self._hold.release()
        self._pass, self._given, self._tracked = pass_, batch, tracked
        self._drawn = batch

    def _leave(self) -> None:
        self._batches = None
        self._chunks.pending = None
        if self._passes is not None:
            self._passes.close()
            self._passes = None

    def close(self) -> None:
        self._leave()
        self._hold.release()

    def next_chunk(self, max_batches: int) -> Chunk:
        with self._source.named():
            found = None
            self._source.reader.notes += self._hold.take()
            while found is None:
                if self._batches is None:
                    self._begin()
                assert self._stream is not None
                with self._stream.active():
                    found = self._chunks.next(max_batches)
                if found is None:  # the pass is over
                    self._end_pass()
        count, operands = found
        self._given += count
        return Chunk(
            num_batches=count,
            batch_size=operands[0].shape[1],
            operands=operands,
            state=None,
        )

    def _begin(self) -> None:
        """Begin the pass where the position is."""
        source = self._source
        tracked = source.reader.tracked
        if self._passes is None:
            self._passes = source.reader.open()
            if self._tracked is not None:
                # As a new process finds them: then what had changed by then.
                source._reset()
                for each, state in zip(tracked, self._tracked, strict=True):
                    if not isinstance(state, dict | None):
                        raise DamagedError("data state: not that of objects.")
                    each.set(state)
        if self._tracked is None:
            looks = [each.look() for each in tracked]
            self._tracked = [look.state for look in looks]
            source.lost([path for look in looks for path in look.lost])
        self._stream = self._passes.stream(self._seed, self._pass)
        with self._stream.active():
            self._batches = self._passes.begin_at(self._pass, self._given)

    def _end_pass(self) -> None:
        source = self._source
        assert self._batches is not None and self._stream is not None
        with self._stream.active():
            # To its very end: a generator may do something there.
            next(self._batches, None)
        if self._given == 0:
            raise DataError("it gave no batch: it must give at least one.")
        if self._drawn != source.length and not source.restarts:
            raise DataError(
                f"it ended after {self._drawn} batches, and has "
                f"{source.length} by its length. Give steps_per_epoch, and "
                "the data begin anew when they end."
            )
        self._pass, self._given, self._drawn = self._pass + 1, 0, 0
        self._tracked = self._batches = None

    def _draw(self) -> Leaves | None:
        assert self._batches is not None
        if self._drawn == self._source.length:
            return None
        for batch in self._batches:
            self._drawn += 1
            return self._source.leaves(batch)
        return None
