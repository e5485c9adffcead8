"""A step written for PyTorch, as a Keras model's own `train_step` is.

It differentiates by itself (`loss.backward()`, `variable.value.grad`), so it
has to work on the variables' own tensors, as in Keras.
"""

from typing import Any

import keras
import torch

from legato.backends.protocol import CompiledLoop, Fetch, Step
from legato.backends.scope import (
    MAX_TRACES,
    RecordingScope,
    refuse_new_variables,
)
from legato.backends.torch.arrays import current_device, to_tensors
from legato.backends.torch.randomness import kept_random_state
from legato.backends.torch.step import LOST, to_row
from legato.compat import keras_tracing


class NativeScope(RecordingScope):
    """Sees what a step does with variables, lets it, and can undo it."""

    def __init__(self) -> None:
        super().__init__(losses=True)
        self.made: dict[int, keras.Variable] = {}
        # (value, its version, copy, gradient), by the variable's id.
        self._before: dict[int, tuple[Any, int, torch.Tensor, Any]] = {}

    def get_current_value(self, variable: keras.Variable) -> torch.Tensor:
        key = id(variable)
        if key not in self.read:
            self.read[key] = variable
            if variable._value is None:
                self.made[key] = variable
                keras_tracing.initialize_variables()
            value: Any = variable._value
            copy = value.detach().to("cpu", copy=True)
            self._before[key] = value, value._version, copy, value.grad
        return self._before[key][0]

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        variable, value = update
        self.updated[id(variable)] = variable
        with torch.no_grad():
            self.get_current_value(variable).copy_(value)

    def roll_back(self) -> None:
        """Undo all changes; `updated` tells of them."""
        for key, (value, version, copy, gradient) in self._before.items():
            value.grad = gradient
            if value._version != version:
                self.updated[key] = self.read[key]
                with torch.no_grad():
                    value.copy_(copy)


def compile_native(
    step: Step, *, fetch: Fetch, resident: Any, operands: Any
) -> "NativeLoop":
    """See `Backend.compile_loop`, with `native=True`.

    The step is run once on the example batch, and what it changes is put
    back.
    """
    first = to_tensors(
        keras.tree.map_structure(
            lambda a: None if a is None else a[:1], operands
        )
    )
    at = torch.zeros((), dtype=torch.int32, device=current_device())
    for traces in range(1, MAX_TRACES + 1):
        scope = NativeScope()
        with keras_tracing.traced_step(None), kept_random_state():
            batch = fetch(resident, first, 0)
            try:
                with scope:
                    logs = step(batch, at)
            finally:
                scope.roll_back()
        if not scope.made:
            loop = NativeLoop(step, fetch, resident, scope)
            loop.log_names, loop.traces = list(logs), traces
            return loop
    refuse_new_variables(list(scope.made.values()))


class NativeLoop(CompiledLoop):
    """See `CompiledLoop`."""

    mode = "eager"

    def __init__(
        self, step: Step, fetch: Fetch, resident: Any, scope: NativeScope
    ) -> None:
        self.updated = list(scope.updated.values())
        self.read_only = [
            v for key, v in scope.read.items() if key not in scope.updated
        ]
        self._step = step
        self._fetch = fetch
        self._resident = resident

    def __call__(self, step: int, num_steps: int, operands: Any) -> Any:
        LOST.refuse(self.variables)
        operands = to_tensors(
            keras.tree.map_structure(
                lambda a: None if a is None else a[:num_steps], operands
            )
        )
        at = torch.arange(
            step, step + num_steps, dtype=torch.int32, device=current_device()
        ).unbind()
        rows = []
        try:
            with keras_tracing.traced_step(None):
                for index, now in enumerate(at):
                    batch = self._fetch(self._resident, operands, index)
                    logs = self._step(batch, now)
                    with torch.no_grad():
                        rows.append(to_row(logs))
        except BaseException:
            # It ended in the midst of a step.
            LOST.add(self.updated)
            raise
        return rows
