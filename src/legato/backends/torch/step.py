"""One step, and what is known of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import torch

from legato.backends.lost import LostVariables
from legato.backends.protocol import Fetch, Step
from legato.backends.torch.scope import Reached, StepScope

LOST = LostVariables()
"""Those that a failed call left in the midst of a step."""


@dataclasses.dataclass(kw_only=True)
class ExaminedStep:
    """A step, and what was found when it was run for the first time.

    Attributes:
        run: the step.
        fetch: makes its batch.
        losses_in_step: whether `model.losses` may be read in it.
        traces: how often it was run to examine it.
        read_only: variables that it reads and never writes.
        updated: variables that it writes.
        log_names: names of its logs.
        copied: see `StepScope`.
        reached: see `StepScope`.
    """

    run: Step
    fetch: Fetch
    losses_in_step: bool
    traces: int = 0
    read_only: list[keras.Variable] = dataclasses.field(default_factory=list)
    updated: list[keras.Variable] = dataclasses.field(default_factory=list)
    log_names: list[str] = dataclasses.field(default_factory=list)
    copied: frozenset[int] = frozenset()
    reached: Reached = dataclasses.field(default_factory=dict)

    def new_scope(self, values: dict[int, torch.Tensor]) -> StepScope:
        """A scope to run it in.

        Args:
            values: memory of the variables, by id; filled as they are read.
        """
        return StepScope(
            losses=self.losses_in_step,
            values=values,
            copied=self.copied,
            reached=self.reached,
        )


def to_row(logs: Mapping[str, Any]) -> torch.Tensor:
    """The logs of a step: float32 `[names]`."""
    row: list[Any] = [
        keras.ops.convert_to_tensor(v, "float32") for v in logs.values()
    ]
    return torch.stack(row) if row else torch.zeros((0,))
