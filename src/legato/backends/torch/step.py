"""One step, and what is known of it."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import keras
import torch
from torch.utils._pytree import tree_leaves

from legato.backends.lost import LostVariables
from legato.backends.protocol import Fetch, Step
from legato.backends.torch.scope import Reached, StepScope

LOST = LostVariables()
"""Those that a failed call left in the midst of a step."""


Values = dict[int, torch.Tensor]
"""Memory of the variables, by id."""


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

    def new_scope(self, values: Values) -> StepScope:
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


def run_each(
    programs: Sequence[Callable[..., list[torch.Tensor]]],
    given: Sequence[torch.Tensor],
    operands: Any,
    at: torch.Tensor,
) -> Generator[list[torch.Tensor]]:
    """Run a program for each step, on its batch, when it is asked for.

    Args:
        programs: one for each step; see `Recording.run`.
        given: to all of them: values of variables, and what is resident.
        operands: of as many batches.
        at: the index of each step, int32 `[steps]`.

    Yields:
        For each step its logs, float32 `[names]`, and its outputs.
    """
    # In the order of recordings: other libraries sort keys. (And lying in
    # memory as they did then.)
    leaves = [leaf.contiguous() for leaf in tree_leaves(operands)]
    for index, (program, now) in enumerate(
        zip(programs, at.unbind(), strict=True)
    ):
        batch = [leaf[index : index + 1] for leaf in leaves]
        yield program(*given, *batch, now)
