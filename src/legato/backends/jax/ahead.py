"""Steps that are run before they are asked for, where callbacks see each.

A device call for each step costs more than a small step itself, and most
callbacks only look at the logs. So some steps are run in one call, their logs
are handed out one by one, and meanwhile the variables have no values. Whoever
asks for one gets it: the steps that were handed out are run once more, from
the values before them. Where a variable was set, the rest is dropped.

Bits are the same as those of one step at a time: it is the same loop, cut
elsewhere. So how far ahead it runs may depend on the clock.
"""

import contextlib
import dataclasses
import operator
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy as np

from legato.compat import keras_values
from legato.phases import DEVICE, LAUNCH

_FIRST_SIZE = 8
"""Steps in the first call after one that was in vain."""

_MAX_SIZE = 64

_MAX_SECONDS = 0.02
"""What a call may last: whatever a callback decides must not wait longer."""

_MAX_IN_VAIN = 10
"""After 2 to the power of that many steps it is tried again."""

_VALUE = operator.attrgetter("_value")


@dataclasses.dataclass
class _Stretch:
    """Consecutive steps that were run in one call.

    Attributes:
        operands: as given, by which the data are known.
        placed: the same on the device.
        step: the index of the first step.
        index: of its batch in the operands.
        size: how many steps.
        stop: one more than the index of the last batch of the operands.
        before: values of the updated variables before the step `begun`.
        read_only: values of the others.
        after: values of the updated variables at the end.
        rows: the logs, `[steps, names]`.
        seen: values of single numbers among the variables, `[steps, names]`.
        begun: of how many steps `before` are the values.
        done: how many were handed out.
        held: what the updated variables hold; None where they wait.
        looks: how often a value was asked for.
    """

    operands: Any
    placed: Any
    step: int
    index: int
    size: int
    stop: int
    before: list[Any]
    read_only: list[Any]
    after: list[Any] = dataclasses.field(init=False)
    rows: Any = None
    seen: Any = None
    begun: int = 0
    done: int = 0
    looks: int = 0

    def __post_init__(self) -> None:
        self.held: list[Any] | None = self.before


class Ahead:
    """Runs steps ahead, and hands them out one by one.

    Args:
        run: runs steps: `(updated, read_only, operands, step, index, number)`
            to new values, logs and the values of single numbers.
        updated: variables that the step writes.
        read_only: those that it reads only.
        seen: which of `updated` the single numbers are.
        enter: is told the phases of a call, which begins by launching.
    """

    def __init__(
        self,
        run: Callable[..., tuple[list[Any], Any, Any]],
        updated: Sequence[keras.Variable],
        read_only: Sequence[keras.Variable],
        seen: Sequence[int],
        enter: Callable[[int], None],
    ) -> None:
        self._run = run
        self._enter = enter
        self._updated = list(updated)
        self._read_only = list(read_only)
        self._columns = {id(updated[i]): k for k, i in enumerate(seen)}
        self._stretch: _Stretch | None = None
        self._next: _Stretch | None = None
        self._placed: tuple[Any, Any] = None, None
        self._size = _FIRST_SIZE
        self._in_vain = self._rests = 0
        # Any thread of the user's may ask for a value.
        self._lock = threading.RLock()

    @property
    def is_on(self) -> bool:
        """Whether the next step is likely to be had here."""
        return self._stretch is not None or not self._rests

    def pass_by(self) -> None:
        """A step was begun by itself: one less until the next attempt."""
        with self._lock:
            self._rests = max(0, self._rests - 1)

    def take(self, step: int, operands: Any, index: int, stop: int) -> Any:
        """See `CompiledLoop.run_ahead`."""
        with self._lock:
            stretch = self._stretch
            if stretch is not None and not (
                self._is_next(stretch, step, operands, index)
            ):
                self.drop()
                self._rest()
                stretch = None
            if stretch is None:
                if self._rests:
                    self._rests -= 1
                    return None
                stretch = self._begin(step, operands, index, stop)
            if stretch is None:
                self._rest()
                return None
            return self._hand_out(stretch)

    def _is_next(
        self, stretch: _Stretch, step: int, operands: Any, index: int
    ) -> bool:
        """Whether this step was run, with the values that there are now."""
        if (
            stretch.operands is not operands
            or stretch.step + stretch.done != step
            or stretch.index + stretch.done != index
            # (Arrays never change: a variable that is set has another.)
            or not _are(self._read_only, stretch.read_only)
        ):
            return False
        if stretch.held is None:
            return keras_values.are_waiting(self._updated)
        return _are(self._updated, stretch.held)

    def _begin(
        self, step: int, operands: Any, index: int, stop: int
    ) -> _Stretch | None:
        size = min(self._size, stop - index)
        if size < 2:
            return None
        if self._placed[0] is not operands:
            self._placed = operands, jax.device_put(operands)
        before = list(map(_VALUE, self._updated))
        began = time.perf_counter()
        try:
            stretch = self._launch(
                _Stretch(
                    operands, self._placed[1], step, index, size, stop,
                    before, list(map(_VALUE, self._read_only)),
                )
            )  # fmt: skip
            self._await(stretch)
        except Exception:  # the step by itself raises it in its turn
            return None
        seconds = (time.perf_counter() - began) / size
        fitting = int(_MAX_SECONDS / max(seconds, 1e-9))
        self._size = min(2 * size, fitting, _MAX_SIZE)
        self._stretch = stretch
        self._launch_next(stretch)
        return stretch

    def _launch(self, stretch: _Stretch) -> _Stretch:
        stretch.after, stretch.rows, stretch.seen = self._run(
            stretch.before, stretch.read_only, stretch.placed,
            stretch.step, stretch.index, stretch.size,
        )  # fmt: skip
        return stretch

    def _await(self, stretch: _Stretch) -> None:
        self._enter(DEVICE)
        stretch.rows = np.asarray(stretch.rows)
        stretch.seen = np.asarray(stretch.seen)
        self._enter(LAUNCH)

    def _launch_next(self, last: _Stretch) -> None:
        """The device works on while the callbacks look at the last ones."""
        index = last.index + last.size
        size = min(self._size, last.stop - index)
        if size < 1:
            return
        with contextlib.suppress(Exception):  # raised in its turn
            self._next = self._launch(
                _Stretch(
                    last.operands, last.placed, last.step + last.size, index,
                    size, last.stop, last.after, last.read_only,
                )
            )  # fmt: skip

    def _hand_out(self, stretch: _Stretch) -> np.ndarray:
        row = stretch.rows[stretch.done : stretch.done + 1]
        stretch.done += 1
        if stretch.done == stretch.size:
            self._end(stretch)
        elif stretch.held is not None:
            stretch.held = None
            keras_values.let_wait(self._updated, self)
        return row

    def _end(self, stretch: _Stretch) -> None:
        """All are done: the variables hold what the last one gave them."""
        for variable, value in zip(self._updated, stretch.after, strict=True):
            variable._value = value
        keras_values.set_waiting(self._updated, stretch.after)  # none is left
        self._stretch, self._next = self._next, None
        if 4 * stretch.looks > stretch.size:
            # Values are asked for at each step: they are had sooner so.
            self._stretch = None
            self._rest()
            return
        self._in_vain = 0
        if self._stretch is None:
            return
        try:
            self._await(self._stretch)
            self._launch_next(self._stretch)
        except Exception:  # as above
            self._stretch = None
            self._rest()

    def settle(self) -> None:
        """Give the variables that wait the values that they have."""
        with self._lock:
            stretch = self._stretch
            if stretch is None or stretch.held is not None:
                return
            stretch.looks += 1
            count = stretch.done - stretch.begun
            values = stretch.before
            if count:
                values, _, _ = self._run(
                    stretch.before, stretch.read_only, stretch.placed,
                    stretch.step + stretch.begun,
                    stretch.index + stretch.begun, count,
                )  # fmt: skip
            keras_values.set_waiting(self._updated, values)
            stretch.before, stretch.begun = values, stretch.done
            stretch.held = values

    def drop(self) -> None:
        """Steps that were not handed out have never been run."""
        with self._lock:
            self.settle()
            self._stretch = self._next = None

    def known(self, variable: keras.Variable) -> np.ndarray | None:
        """The value of a variable that waits, if it is a single number."""
        with self._lock:
            stretch = self._stretch
            column = self._columns.get(id(variable))
            if stretch is None or stretch.held is not None or column is None:
                return None
            return stretch.seen[stretch.done - 1, column]

    def _rest(self) -> None:
        """As under a callback that sets the learning rate at each batch."""
        self._in_vain = min(self._in_vain + 1, _MAX_IN_VAIN)
        self._rests = 2**self._in_vain
        self._size = _FIRST_SIZE


def value_of(variable: keras.Variable) -> Any:
    """The value of a variable, an array of the device or of the host."""
    owner = keras_values.owner_of(variable)
    if owner is not None:
        known = owner.known(variable)
        if known is not None:
            return known
    return variable._value


def _are(variables: list[keras.Variable], values: list[Any]) -> bool:
    return all(map(operator.is_, map(_VALUE, variables), values))
