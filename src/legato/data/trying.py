"""Finds out how a pass over data is resumed, by trying.

What an iterator says of its own state is believed only if another iterator
that is given this state goes on with the same bytes, and leaves the same
traces.
"""

from collections.abc import Callable, Iterator
from typing import Any

from legato.data import streams
from legato.data.attributes import Look
from legato.data.batches import Leaves, digest
from legato.data.encoding import CannotEncodeError
from legato.data.readers import Method, Passes, Reader

# So many batches are compared, after those that are drawn before.
_AFTER = 2


class Attempt:
    """The first pass over some data, in the streams that the key gives.

    To be used in `streams.kept`. Nothing remains of it when it is closed:
    what it changed in the user's objects is put back.

    Args:
        reader: of the data.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.passes: Passes = reader.open()
        self._batches: Iterator[Any] | None = None
        self.drawn = 0
        self.drew_globally = False

    def begin(self) -> None:
        """Begin the pass."""
        self._batches = self._watched(lambda: self.passes.begin(0))

    def resume(self, state: Any, drawn: int) -> None:
        """Begin it where another attempt was, after so many batches."""
        self._batches = self._watched(lambda: self.passes.resume(0, state))
        self.drawn = drawn

    def skip(self, count: int) -> None:
        """Begin it, and leave batches out."""
        self._batches = self._watched(
            lambda: self.passes.skip_to(
                0, count, lambda batch: streams.begin(0, "first", batch)
            )
        )
        self.drawn = count

    def draw(self) -> Any:
        """The next batch; None at the end of the pass."""
        found = self._watched(self._next)
        self.drawn += found is not None
        return found

    def _next(self) -> Any:
        assert self._batches is not None
        for batch in self._batches:
            return batch
        return None

    def _watched(self, call: Callable[[], Any]) -> Any:
        streams.begin(0, "first", self.drawn)
        before = streams.fingerprint()
        found = call()
        if streams.fingerprint() != before:
            self.drew_globally = True
        return found

    def looks(self) -> list[Look]:
        """What has changed in the user's objects by now."""
        return [tracked.look() for tracked in self._reader.tracked]

    def close(self) -> None:
        """Put all back as it was."""
        self._batches = None
        self.passes.close()
        for tracked in self._reader.tracked:
            if tracked.look().state is not None:
                tracked.reset()


def choose_method(
    reader: Reader, opened: Attempt, leaves: Callable[[Any], Leaves]
) -> None:
    """Sets the reader's `method`, and `why` if that is to read again.

    Args:
        reader: of the data.
        opened: an attempt that drew the first batch already; used up.
        leaves: the arrays of a batch.
    """
    state: Any = None
    try:
        if not _has_candidates(reader, opened):
            return
        while opened.drawn < reader.before and opened.draw() is not None:
            pass
        position = opened.drawn
        if "state" in reader.methods:
            try:
                state = opened.passes.get_state()
            except Exception as error:  # of a library unknown to us
                reader.why = _shown(error)
        expected = _follow(opened, leaves)
        if expected == [None] and reader.before > Reader.before:
            reader.why = "a pass has too few batches to try it"
            return
        looks = opened.looks()
    finally:
        opened.close()
    for method in reader.methods:
        if method == "state" and state is None:
            continue
        attempt = Attempt(reader)
        try:
            if method == "state":
                attempt.resume(state, position)
            else:
                attempt.skip(position)
            if _follow(attempt, leaves) == expected and all(
                one.same(other)
                for one, other in zip(attempt.looks(), looks, strict=True)
            ):
                reader.method = method
                return
            reader.why = _NOT_THE_SAME[method]
        except Exception as error:
            reader.why = _shown(error)
        finally:
            attempt.close()


def _has_candidates(reader: Reader, opened: Attempt) -> bool:
    """Whether it is worth while to draw more than the first batch."""
    if "skip" in reader.methods:
        return True
    try:
        return bool(reader.methods) and opened.passes.get_state() is not None
    except Exception as error:  # of a library unknown to us
        reader.why = _shown(error)
        return False


_NOT_THE_SAME: dict[Method, str] = {
    "state": "its state was put back, and what followed was not the same",
    "skip": "what it gives depends on what it gave before",
}


def _shown(error: Exception) -> str:
    if isinstance(error, CannotEncodeError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip():.200}"


def _follow(
    attempt: Attempt, leaves: Callable[[Any], Leaves]
) -> list[str | None]:
    found: list[str | None] = []
    for _ in range(_AFTER):
        batch = attempt.draw()
        found.append(None if batch is None else digest(leaves(batch)))
        if batch is None:
            break
    return found
