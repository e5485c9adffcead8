"""What changes in Hugging Face's streams that the user's objects hold.

(One that is given itself is read by `adapters/hugging_face`.) Iterating over
one leaves much in it that is no state of its own: caches of file systems, and
its last position, from which no iteration begins.
"""

from collections.abc import Iterator
from typing import Any

from legato.data.attributes import Look
from legato.data.encoding import CannotEncodeError, decode, encode
from legato.data.source import DataState
from legato.errors import DamagedError


def is_stream(thing: object) -> bool:
    """Whether it is a Hugging Face `IterableDataset`."""
    return any(
        cls.__module__ == "datasets.iterable_dataset"
        and cls.__name__ == "IterableDataset"
        for cls in type(thing).__mro__
    )


def streams_in(owner: object) -> list[Any]:
    """Those in the attributes of an object, also in a list or a dict there."""
    found = {id(each): each for each in _values(owner) if is_stream(each)}
    return list(found.values())


def _values(owner: object) -> Iterator[Any]:
    for value in list(getattr(owner, "__dict__", {}).values()):
        yield value
        if type(value) in (list, tuple):
            yield from value
        elif type(value) is dict:
            yield from value.values()


class StreamState:
    """From where the next iteration over a stream begins; see `Tracked`.

    Args:
        stream: the stream, as a new process would find it.
    """

    def __init__(self, stream: Any) -> None:
        self.subject = stream
        self._built = self._get()

    def _get(self) -> tuple[int, Any]:
        # (There is no other word for what `load_state_dict` was given.)
        start = getattr(self.subject, "_starting_state_dict", None)
        return int(self.subject.epoch), start

    def _set(self, epoch: int, start: Any) -> None:
        if int(self.subject.epoch) != epoch:
            self.subject.set_epoch(epoch)
        self.subject.load_state_dict(start)

    def look(self) -> Look:
        """What changed since it was built."""
        epoch, start = self._get()
        if epoch == self._built[0] and start is self._built[1]:
            return Look(None, [], {})
        try:
            state = {"epoch": epoch, "start": encode(start)}
        except CannotEncodeError:
            return Look(None, ["what load_state_dict was given"], {})
        return Look(state, [], {})

    def reset(self) -> None:
        """Back to how it was built."""
        self._set(*self._built)

    def set(self, state: DataState) -> None:
        """Put a state back, after `reset`.

        Raises:
            DamagedError: it is none.
        """
        match state:
            case None:
                pass
            case {"epoch": int(epoch), "start": start}:
                self._set(epoch, decode(start))
            case _:
                raise DamagedError("data state: not that of a stream.")
