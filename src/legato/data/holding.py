"""One object of the user's, read by several iterators in turn.

Training and validation may share a dataset, or a generator that both of their
loaders draw from. Each iterator finds it as it left it itself: otherwise the
order of training would depend on what validation did, and a validation that
begins anew would take training back to the beginning.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from legato.data.attributes import Look
from legato.data.source import DataState
from legato.errors import RestoreError


class Tracked(Protocol):
    """Something of the user's that changes while it is read.

    Attributes:
        subject: the user's object.
    """

    subject: Any

    def look(self) -> Look:
        """What changed since it was built."""
        ...

    def reset(self) -> None:
        """Back to how it was built."""
        ...

    def set(self, state: DataState) -> None:
        """Put a state back, after `reset`."""
        ...


class Hold:
    """An iterator's hold on the objects that it reads.

    It has it from when it is made until it is closed; while another one has
    it, that is suspended. What others (callbacks) change meanwhile stays.

    Args:
        tracked: these.
    """

    def __init__(self, tracked: Sequence[Tracked]) -> None:
        self._tracked = tracked
        # What they were like when they were taken over by another one.
        self._looks: dict[int, Look] = {}
        self._suspended: dict[int, Callable[[], Hold | None]] = {}
        self._problems: list[str] = []
        self._take_all()

    def take(self) -> list[str]:
        """Before the user's code runs: they are as this iterator left them.

        Returns:
            Why some could not be put back to how they were built.
        """
        self._take_all()
        problems, self._problems = self._problems, []
        return problems

    def _take_all(self) -> None:
        for tracked in self._tracked:
            self._take(tracked)

    def _take(self, tracked: Tracked) -> None:
        key = id(tracked.subject)
        holder = _holder(key)
        if holder is self:
            return
        if holder is not None:
            holder._looks[key] = holder._of(key).look()
            self._suspended[key] = weakref.ref(holder)
        _HOLDERS[key] = weakref.ref(self)
        look = self._looks.pop(key, None)
        try:
            tracked.reset()
        except RestoreError as error:
            self._problems.append(str(error))
        if look is not None:
            tracked.set(look.state)

    def _of(self, key: int) -> Tracked:
        return next(t for t in self._tracked if id(t.subject) == key)

    def look(self, tracked: Tracked) -> Look:
        """What one was like when this iterator had it last."""
        given = self._looks.get(id(tracked.subject))
        return tracked.look() if given is None else given

    def forget(self) -> None:
        """The iterator is sent to another position."""
        self._looks.clear()

    def release(self) -> None:
        """The iterator is closed: whoever had them before has them again."""
        self._looks.clear()
        for tracked in self._tracked:
            key = id(tracked.subject)
            before = self._suspended.pop(key, _nobody)
            holder = _holder(key)
            if holder is self:
                del _HOLDERS[key]
                again = before()
                if again is not None and key in again._looks:
                    again._take(again._of(key))
                continue
            while holder is not None:  # whoever suspended this one, if any
                next_ = holder._suspended.get(key, _nobody)()
                if next_ is self:
                    holder._suspended[key] = before
                holder = next_


def _nobody() -> None:
    """In the place of a reference to who had an object before."""


# By the id of an object, which its holder keeps alive.
_HOLDERS: dict[int, "weakref.ref[Hold]"] = {}


def _holder(key: int) -> Hold | None:
    found = _HOLDERS.get(key)
    return None if found is None else found()
