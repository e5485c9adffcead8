"""The position in data that come in passes."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from legato.data import streams
from legato.data.attributes import Look, same_states
from legato.data.batches import Chunks, Leaves, shown
from legato.data.encoding import CannotEncodeError, fingerprint
from legato.data.holding import Hold
from legato.data.readers import END, Passes
from legato.data.source import Chunk, DataIterator, DataState
from legato.errors import DamagedError, DataError, LegatoError, RestoreError

if TYPE_CHECKING:
    from legato.data.iterables import IterableSource

_SAME = "same"
"""As when the pass began."""

_NOT_SEEN = -1
"""In the place of a number of batches."""


class IterableIterator(DataIterator):
    """Draws in this thread, when it is asked: it may run the user's code.

    The state: the pass, the batches of it that were given out, what the
    user's objects were when the pass began and are now, and what the library's
    iterator told of its state, after how many batches.
    """

    def __init__(
        self, source: "IterableSource", seed: int, capacity: int
    ) -> None:
        self._source = source
        self._reader = source.reader
        self.draws_ahead = self._reader.ahead
        self._seed = seed
        self._chunks = Chunks(self._draw, capacity)
        self._pass = 0
        self._given = 0
        self._drawn = 0
        # As the pass began; None: it has not. (Callbacks may change them
        # before, and after: in `_begin` they are put back for a while.)
        self._tracked: list[DataState] | None = None
        # As they were when a position was saved, after so many batches.
        self._to_put_back: list[DataState] | None = None
        self._seen_at = 0
        self._hold = Hold(source.reader.tracked)
        self._passes: Passes | None = None
        self._batches: Iterator[Any] | None = None
        self._stream: streams.Stream | None = None
        # What the library told, and when: of the position that was restored,
        # and since then, where that is dear.
        self._told: dict[str, Any] | None = None
        self._marks: list[dict[str, Any]] = []
        self._first: str | None = None
        self._ended = False
        # What loading may change, as it was when the pass began.
        self._unloaded: list[Look] = []
        self._loads = False

    # -- the position -------------------------------------------------------

    def get_state(self) -> DataState:
        """The pass, the batch, and what is needed to come there again."""
        now: Any = self._look()
        begun = self._tracked
        if begun is not None and same_states(now, begun):
            now = _SAME
        return {
            "pass": self._pass,
            "batch": self._given,
            "tracked": now if begun is None else begun,
            "now": None if begun is None else now,
            "drawn": self._seen_at if self._batches is None else self._drawn,
            "method": self._reader.method,
            "library": self._library(),
            "loads": self._must_load(),
        }

    def _must_load(self) -> bool:
        """Whether batches, where they are skipped, must be loaded for it."""
        reader = self._reader
        if reader.method != "skip" or self._batches is None:
            return self._loads
        return not all(
            self._hold.look(reader.tracked[index]).same(look)
            for index, look in zip(reader.loading, self._unloaded, strict=True)
        )

    def _library(self) -> dict[str, Any] | None:
        """What the library's iterator tells of the position."""
        if self._batches is None or self._reader.method != "state":
            return self._told
        if self._reader.interval is not None:
            # (Whether one lies right here depends on where chunks were cut.)
            found = [m for m in self._marks if m["batch"] < self._given]
            return found[-1] if found else self._told
        mark = self._mark(self._chunks.pending)
        if mark is None or self._reader.tells_end:
            return mark
        # Many an object says at its end what it says before it begins.
        ended = self._ended or self._given == self._source.length
        is_first = fingerprint(mark["state"]) == self._first
        return None if ended or is_first else {**mark, "first": self._first}

    def _mark(self, pending: Leaves | None) -> dict[str, Any] | None:
        assert self._passes is not None
        with contextlib.suppress(CannotEncodeError):
            state = self._passes.get_state()
            if state is not None:
                return {
                    "batch": self._drawn,
                    "state": state,
                    "pending": self._source.saved(pending),
                }
        return None  # it is read again: the streams are those of batches

    def set_state(self, state: DataState) -> None:
        """Go to a position; nothing is read before the next chunk."""
        source = self._source
        if isinstance(state, dict) and "now" not in state:
            state = self._completed(state)
        match state:
            case {
                "pass": int(pass_),
                "batch": int(batch),
                "tracked": list(tracked),
                "now": list() | "same" | None as now,
                "drawn": int(drawn),
            } if (
                pass_ >= 0
                and drawn in (batch, batch + 1, _NOT_SEEN)
                and 0 <= batch <= (source.length or batch)
                and all(
                    len(states) == len(source.reader.tracked)
                    for states in (tracked, now)
                    if isinstance(states, list)
                )
                and self._is_told(state.get("library"), batch)
            ):
                pass
            case _:
                raise RestoreError(
                    f"The saved data position {shown(state)} is not one of "
                    f"{source.what}, which has {source.batches_per_epoch} "
                    "batches in an epoch. Resume with the data of the run."
                )
        saved = state.get("method", "replay")
        if saved != self._reader.method and not self.draws_ahead:
            # (Their streams are others.)
            why = f" ({self._reader.why})" if self._reader.why else ""
            raise RestoreError(
                f"{source.what} was resumed by {saved!r:.20} when the position "
                f"was saved, and is by {self._reader.method!r} now{why}. "
                "Resume with the data and the libraries of the run."
            )
        self._leave()
        self._hold.forget()
        self._reader.notes += self._hold.take()
        # At once: what callbacks change before the next batch is to stay.
        self._put_back(now if isinstance(now, list) else tracked)
        self._tracked = None if now is None else tracked
        self._pass, self._given, self._drawn = pass_, batch, batch
        self._seen_at, self._to_put_back = drawn, None
        self._loads = bool(state.get("loads"))
        self._told = None
        if self._reader.method == "state":
            self._told = state.get("library")

    def _completed(self, state: dict[str, Any]) -> dict[str, Any]:
        """One of a version that did not save what objects were like then."""
        begun = bool(state.get("batch") or state.get("library"))
        return {
            **state,
            "tracked": state.get("tracked")
            or [None] * len(self._reader.tracked),
            "now": _SAME if begun else None,
            "drawn": _NOT_SEEN,
        }

    def _is_told(self, told: Any, given: int) -> bool:
        match told:
            case None:
                return True
            case {"first": first} if not isinstance(first, str | None):
                return False
            case {"batch": int(batch), "state": _, "pending": None}:
                return 0 <= batch <= given
            case {"batch": int(batch), "state": _, "pending": pending}:
                return batch == given + 1 and self._source.fits(pending)
        return False

    @property
    def rereads(self) -> int:
        """Batches that are read again first, after `set_state`."""
        if self._batches is not None:
            return 0
        if self._reader.method == "skip" and not self._loads:
            return 0
        if self._told is None or self._reader.method != "state":
            return self._given
        return max(0, self._given - self._told["batch"])

    def _leave(self) -> None:
        self._batches = None
        self._chunks.pending = None
        self._ended = False
        self._marks.clear()
        if self._passes is not None:
            self._passes.close()
            self._passes = None

    def close(self) -> None:
        """Let go of the data."""
        self._leave()
        self._hold.release()

    # -- batches ------------------------------------------------------------

    @contextlib.contextmanager
    def _streams(self, key: int | str) -> Iterator[None]:
        """Around the user's code, which may draw from global generators."""
        if self.draws_ahead:
            yield
        elif self._reader.method == "replay":
            assert self._stream is not None
            with self._stream.active():
                yield
        else:
            with streams.kept():
                self._key(key)
                yield

    def _key(self, key: int | str) -> None:
        if self._reader.method != "replay" and not self.draws_ahead:
            streams.begin(self._seed, "batch", self._pass, key)

    def next_chunk(self, max_batches: int) -> Chunk:
        """The next batches of one shape."""
        with self._source.named():
            found = None
            self._reader.notes += self._hold.take()
            while found is None:
                if self._batches is None:
                    self._begin()
                with self._streams("chunk"):
                    found = self._chunks.next(max_batches)
                if found is None:
                    self._end_pass()
        self._given += found.count
        return found.chunk(self.get_state() if self.draws_ahead else None)

    def end_epoch(self) -> None:
        """End the pass, if all of it was trained on."""
        # Now, so that the position is the beginning of a pass.
        whole = self._drawn == self._source.length and self._given > 0
        if whole and self._batches is not None and not self._chunks.pending:
            with self._source.named():
                self._reader.notes += self._hold.take()
                self._end_pass()

    def _look(self) -> list[DataState]:
        """What the user's objects are like; what cannot be saved is noted."""
        looks = [self._hold.look(each) for each in self._reader.tracked]
        self._source.lost([path for look in looks for path in look.lost])
        return [look.state for look in looks]

    def _put_back(self, states: list[DataState]) -> None:
        """Have the user's objects as they were at some instant."""
        # As a new process finds them: then what had changed by then.
        self._source._reset()
        for each, state in zip(self._reader.tracked, states, strict=True):
            if not isinstance(state, dict | None):
                raise DamagedError("data state: not that of objects.")
            each.set(state)

    def _begin(self) -> None:
        """Begin the pass where the position is."""
        tracked = self._reader.tracked
        now = self._look()
        if self._passes is None:
            self._passes = self._source.reader.open()
        resumes = self._tracked is not None
        if self._tracked is None:
            self._tracked = now
        else:
            self._put_back(self._tracked)
        self._unloaded = [
            self._hold.look(tracked[index]) for index in self._reader.loading
        ]
        self._stream = self._passes.stream(self._seed, self._pass)
        self._drawn = self._given
        with self._streams("begin"):
            self._batches = self._begin_at(self._passes)
        if resumes:
            self._to_put_back = now
            self._put_back_in_time()

    def _put_back_in_time(self) -> None:
        """What reading again did not change, others had changed by then."""
        states = self._to_put_back
        if states is None or self._drawn != self._seen_at:
            return
        self._to_put_back = None
        if not same_states(self._look(), states):
            try:
                self._put_back(states)
            except RestoreError as error:
                self._reader.notes.append(str(error))

    def _begin_at(self, passes: Passes) -> Iterator[Any]:
        method, told = self._reader.method, self._told
        if method == "replay":
            return passes.begin_at(self._pass, self._given)
        if method == "skip" and self._given and not self._loads:
            return passes.skip_to(self._pass, self._given, self._key)
        self._drawn = 0
        if told is None:
            batches = self._begin_whole(passes)
        else:
            batches = self._resume(passes, told)
        while self._drawn < self._given:
            self._key(self._drawn)
            if next(batches, END) is END:
                raise RestoreError(
                    f"the checkpoint is at batch {self._given} of pass "
                    f"{self._pass} over the data, and there are only "
                    f"{self._drawn} now. Resume with the data of the run"
                )
            self._drawn += 1
        return batches

    def _begin_whole(self, passes: Passes) -> Iterator[Any]:
        batches = passes.begin(self._pass)
        if not self._reader.tells_end:
            mark = self._mark(None)
            self._first = fingerprint(mark["state"]) if mark else None
        return batches

    def _resume(self, passes: Passes, told: dict[str, Any]) -> Iterator[Any]:
        """Give the library's iterator what it told."""
        self._drawn = told["batch"]
        self._chunks.pending = self._source.restored(told["pending"])
        self._first = told.get("first")
        try:
            return passes.resume(self._pass, told["state"])
        except LegatoError:
            raise
        except Exception as error:  # of a library that we know nothing of
            raise RestoreError(
                "the state of its iterator could not be put back "
                f"({type(error).__name__}: {error!s:.200}). Resume with the "
                "data of the run, and with as many worker processes"
            ) from error

    def _end_pass(self) -> None:
        source = self._source
        assert self._batches is not None
        with self._streams("end"):
            # To its very end: a generator may do something there.
            next(self._batches, None)
        if self._given == 0:
            raise DataError("it gave no batch: it must give at least one.")
        if self._drawn != source.length and not source.restarts:
            raise DataError(
                f"it ended after {self._drawn} batches, and has "
                f"{source.length} by its length. Give {source.steps_name}, "
                "and the data begin anew when they end."
            )
        self._pass, self._given, self._drawn = self._pass + 1, 0, 0
        self._tracked = self._batches = self._told = None
        self._seen_at = 0
        self._loads = self._ended = False
        self._marks.clear()

    def _draw(self) -> Leaves | None:
        assert self._batches is not None
        if self._drawn == self._source.length:
            return None
        self._key(self._drawn)
        self._mark_if_due()
        for batch in self._batches:
            self._drawn += 1
            self._put_back_in_time()
            try:
                return self._source.leaves(batch)
            except DataError as error:
                raise DataError(
                    f"{error} (It was batch {self._drawn} of a pass.)"
                ) from error
        self._ended = True
        return None

    def _mark_if_due(self) -> None:
        every = self._reader.interval
        if every is None or self._reader.method != "state":
            return
        if self._drawn and self._drawn % every == 0:
            mark = self._mark(None)
            if mark is not None:
                self._marks = [*self._marks[-1:], mark]
