"""A step run again without Python between its operations.

Keras's and our own Python takes more time than the arithmetic of a small
step. What is replayed are the operations that the step ran one by one, in
their order and with fewer views (`views`), so that the bits are the same; and
that they are is tried out on a real step before the replay takes over. So
nothing depends on when it does, nor on whether it does at all.
"""

import logging
from collections.abc import Generator
from typing import Any

import keras
import torch
from torch.utils._pytree import tree_leaves

from legato.backends.torch.randomness import (
    get_random_state,
    kept_random_state,
    set_random_state,
)
from legato.backends.torch.step import ExaminedStep, Values, run_each
from legato.backends.torch.watching import PythonState, Watcher, drawn
from legato.rng import kept_host_state

_LOG = logging.getLogger(__name__)

AFTER_STEPS = 30
"""Recording takes as long as some tens of steps."""

_MAX_BYTES = 1 << 30
"""Of what a step changes: it is held three times while a replay is tried."""


class Replayer:
    """Records a step when it has run often enough, and replays it.

    Args:
        step: the step.
        resident: see `Fetch`.
    """

    def __init__(self, step: ExaminedStep, resident: Any) -> None:
        self._step = step
        self._variables = [*step.updated, *step.read_only]
        self._resident = resident
        self._countdown = AFTER_STEPS
        self._patience = 1
        self._python: PythonState | None = None
        self._replay: Replay | None = None
        num_bytes = sum(v._value.nbytes for v in step.updated)
        self._gave_up = num_bytes > _MAX_BYTES

    def ready(self) -> "Replay | None":
        """The replay, if it would do what Python would."""
        if self._replay is not None and not self._replay.is_right():
            self._replay = None
            self._wait()
        return self._replay

    def _wait(self) -> None:
        """Something was set from outside, and may be again and again."""
        self._patience *= 4
        self._countdown = AFTER_STEPS * self._patience

    def begin(self, values: Values) -> "Trial | None":
        """A context for the next step, if it is to be watched or recorded.

        Two are: what Python sees is noted in one, and must be the same after
        the next. So a step that changes it is not run in vain.

        Args:
            values: memory of the variables.
        """
        self._countdown -= 1
        is_done = self._gave_up or self._replay is not None
        if is_done or self._countdown > 0:
            return None
        return Trial(values, [values[id(v)] for v in self._step.updated])

    def finish(
        self,
        trial: "Trial",
        returned: list[torch.Tensor],
        operands: Any,
        at: torch.Tensor,
    ) -> None:
        """Try out whether a replay does what Python did; keep what that did.

        Args:
            trial: of the step.
            returned: its logs, float32 `[names]`, and its outputs.
            operands: of its batch.
            at: its index, int32 `[1]`.
        """
        if self._python is None:
            with kept_host_state():
                self._python = trial.watcher.state()
            return
        python, self._python = self._python, None
        if not python.is_same():
            self._wait()
            return
        # Unless it succeeds: what failed once fails again.
        self._gave_up = True
        changed = trial.changed
        after, random_after = _copies(changed), get_random_state()
        try:
            with kept_host_state():
                replay = self._make_replay(python, trial, operands, at)
                expected = [*returned, *after, *_tensors(random_after)]
                for _ in range(2):  # (The first run of a program is another.)
                    trial.put_back()
                    (again,) = replay(trial.values, operands, at)
                    state = _tensors(get_random_state())
                    if not _are_same(expected, [*again, *changed, *state]):
                        raise NotImplementedError("the replay differs")
        except Exception as error:
            _LOG.info("the step is not replayed: %s", error)
            return
        finally:
            _put(changed, after)
            set_random_state(random_after)
        self._gave_up, self._replay = False, replay

    def _make_replay(
        self,
        python: PythonState,
        trial: "Trial",
        operands: Any,
        at: torch.Tensor,
    ) -> "Replay":
        # What it needs of PyTorch takes long to import.
        from legato.backends.torch.recording import Recording

        drawn_after = drawn()
        if drawn_after != trial.drawn:
            raise NotImplementedError("Python draws random numbers")
        with kept_random_state():
            recording = Recording(
                self._step,
                self._variables,
                trial.values,
                self._resident,
                operands,
                at[0],
            )
        if recording.selects:
            raise NotImplementedError("a condition depends on more")
        if not python.is_same() or drawn() != drawn_after:
            raise NotImplementedError("the step changes Python's values")
        return Replay(recording, self._variables, python, self._resident)


class Trial:
    """A context around a step that Python runs; see `Replayer.begin`.

    Args:
        values: memory of the variables.
        changed: of those that the step updates.

    Attributes:
        values: as given.
        changed: as given.
        watcher: of its Python.
        drawn: where Python's generators were before it.
    """

    def __init__(self, values: Values, changed: list[torch.Tensor]) -> None:
        self.values = values
        self.changed = changed
        self.watcher = Watcher()
        self.drawn = drawn()
        self._before = _copies(changed)
        self._random = get_random_state()

    def __enter__(self) -> None:
        self.watcher.begin()

    def __exit__(self, *exception: object) -> None:
        self.watcher.end()

    def put_back(self) -> None:
        """Everything on the device is as it was before the step."""
        _put(self.changed, self._before)
        set_random_state(self._random)


class Replay:
    """A recorded step, as long as it is what Python would do.

    Args:
        recording: of the step.
        variables: whose values it takes, in order.
        python: what the step's Python saw.
        resident: see `Fetch`.
    """

    def __init__(
        self,
        recording: Any,
        variables: list[keras.Variable],
        python: PythonState,
        resident: Any,
    ) -> None:
        self._recording = recording
        self._programs: dict[tuple[bool, ...], Any] = {}
        self._variables = variables
        self._python = python
        # In the order of the recording: other libraries sort keys.
        self._resident = tree_leaves(resident)
        self._strides = self._strides_now()

    def _strides_now(self) -> list[tuple[int, ...]]:
        return [v._value.stride() for v in self._variables]

    def is_right(self) -> bool:
        """Whether the step would do the same if Python ran it now."""
        return self._python.is_same() and self._strides == self._strides_now()

    def __call__(
        self, values: Values, operands: Any, at: torch.Tensor
    ) -> Generator[list[torch.Tensor]]:
        """Run a step for each of `at`; see `run_each`.

        Args:
            values: memory of the variables.
            operands: of as many batches.
            at: the index of each step, int32 `[steps]`.
        """
        given = [values[id(v)] for v in self._variables] + self._resident
        programs = map(self._program, self._recording.decisions(at))
        return run_each([*programs], given, operands, at)

    def _program(self, decided: tuple[bool, ...]) -> Any:
        # What it needs of PyTorch takes long to import.
        from legato.backends.torch.views import WithoutViews

        if decided not in self._programs:
            recorded = self._recording.run(decided)
            self._programs[decided] = WithoutViews(recorded)
        return self._programs[decided]


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def _put(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in state.values()]


def _are_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether all bits are equal."""
    return all(
        torch.equal(
            a.contiguous().view(-1).view(torch.uint8),
            b.contiguous().view(-1).view(torch.uint8),
        )
        for a, b in zip(ours, theirs, strict=True)
    )
