"""A step captured whole, as a program of tensor operations, and compiled.

Python runs once, on tensors without values; what it did to tensors is
recorded, differentiation and updates included, and `torch.compile` makes one
program of it. It holds no Python: nothing about the user's objects can make
it compile again.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from legato.backends.torch.arrays import current_device
from legato.backends.torch.conditional import merging_cond
from legato.backends.torch.randomness import kept_random_state
from legato.backends.torch.step import ExaminedStep, to_row
from legato.compat import keras_tracing
from legato.errors import LegatoWarning, StepError


class StepProgram:
    """A captured step, compiled when it is first called.

    Args:
        graph: takes `(values, resident, operands, at)`; `operands` hold one
            batch.
        variables: whose values it takes, in order.
    """

    def __init__(
        self, graph: torch.fx.GraphModule, variables: list[keras.Variable]
    ) -> None:
        self._variables = variables
        self._compiled = torch.compile(graph, fullgraph=True, dynamic=False)

    def __call__(
        self,
        values: dict[int, torch.Tensor],
        resident: Any,
        operands: Any,
        at: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Run a step for each of `at`; the logs of each, float32 `[names]`."""
        arguments = [values[id(v)] for v in self._variables]
        rows = []
        # Keras's SGD hands its learning rate over as a number.
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            for index, now in enumerate(at):
                batch = keras.tree.map_structure(
                    lambda x, i=index: x[i : i + 1], operands
                )
                rows.append(self._compiled(arguments, resident, batch, now))
        return rows


def capture(
    step: ExaminedStep, resident: Any, operands: Any, *, required: bool
) -> StepProgram | None:
    """Capture a step.

    Args:
        step: the step.
        resident: see `Fetch`.
        operands: of one batch.
        required: whether it is an error if that cannot be done.

    Returns:
        The program; None, with a warning, for a step that cannot be captured.

    Raises:
        StepError: it cannot be captured, and is required to be.
    """
    variables = [*step.updated, *step.read_only]

    def run(
        values: list[torch.Tensor], resident: Any, operands: Any, at: Any
    ) -> Any:
        given = dict(zip(map(id, variables), values, strict=True))
        scope = step.new_scope(given)
        with scope:
            row = to_row(step.run(step.fetch(resident, operands, 0), at))
        scope.commit()
        if len(given) > len(variables):
            raise NotImplementedError("it uses other variables each time")
        return row

    at = torch.zeros((), dtype=torch.int32, device=current_device())
    arguments = [v._value.detach() for v in variables], resident, operands, at
    try:
        with (
            keras_tracing.traced_step(merging_cond),
            kept_random_state(),
            torch.no_grad(),
        ):
            graph = make_fx(
                run, tracing_mode="fake", _allow_non_fake_inputs=True
            )(*arguments)
    except Exception as error:
        # The step has just run: it is the capture that failed.
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 160 else f"{reason[:160]}..."
        message = (
            "The step cannot be compiled by PyTorch, because Python needs "
            f"values of tensors in it ({type(error).__name__}: {reason}). On "
            "PyTorch keras.random with a SeedGenerator, and keras.ops.cond "
            "inside `forward`, are of that kind."
        )
        if required:
            raise StepError(
                f"{message} Train it with torch_compile=False."
            ) from error
        warnings.warn(
            f"{message} It runs without being compiled.",
            LegatoWarning,
            stacklevel=2,
        )
        return None
    return StepProgram(graph, variables)
