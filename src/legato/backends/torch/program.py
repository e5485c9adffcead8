"""A step captured whole, as a program of tensor operations, and compiled.

Python runs once, on tensors without values; what it did to tensors is
recorded, differentiation and updates included, and `torch.compile` makes one
program of it. It holds no Python: nothing about the user's objects can make
it compile again.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from legato.backends.torch.arrays import current_device
from legato.backends.torch.conditional import merging_cond
from legato.backends.torch.modules import scoped_modules
from legato.backends.torch.randomness import kept_random_state
from legato.backends.torch.step import ExaminedStep, to_row
from legato.compat import keras_tracing
from legato.errors import LegatoWarning, StepError


# A copy that the compiler must make: Inductor (2.13) drops a clone of an input
# also where the input is changed in place later on, and the clone is read after
# that. (Registered like this and not by `custom_op`, whose wrapping takes longer
# than the copy of a small tensor.)
_OPERATORS = torch.library.Library("legato", "DEF")
_OPERATORS.define("own(Tensor value) -> Tensor")
_OPERATORS.impl("own", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("legato::own", torch.empty_like)


# Shapes and types are those that it was compiled for: nobody needs to look again
# at each step, which takes a fifth of the time of a small one.
_OPTIONS = {
    "size_asserts": False,
    "guard_filter_fn": lambda guards: [False] * len(guards),
}


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
        self._compiled = torch.compile(
            graph, fullgraph=True, dynamic=False, options=_OPTIONS
        )

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
    """Capture a step, and compile it.

    Args:
        step: the step.
        resident: see `Fetch`.
        operands: of one batch.
        required: whether it is an error if that cannot be done.

    Returns:
        The program; None, with a warning, for a step that cannot be compiled.

    Raises:
        StepError: it cannot be compiled, and is required to be.
    """
    variables = [*step.updated, *step.read_only]
    values = {id(v): v._value.detach() for v in variables}
    at = torch.zeros((), dtype=torch.int32, device=current_device())
    try:
        with kept_random_state(), torch.no_grad():
            graph = record(step, variables, values, resident, operands, at)
            _keep_copies_of_inputs(graph)
            program = StepProgram(graph, variables)
            # Compiles it now: before step 0 there is still a choice.
            before = [values[id(v)].to("cpu", copy=True) for v in step.updated]
            try:
                program(values, resident, operands, [at])
            finally:
                for variable, value in zip(step.updated, before, strict=True):
                    values[id(variable)].copy_(value)
    except Exception as error:
        # The step has just run without being compiled: it is sound.
        message = (
            f"The step cannot be compiled by PyTorch: {_reason(error)}. Most "
            "often Python needs the value of a tensor, as keras.random with a "
            "SeedGenerator, keras.ops.cond inside `forward` and some "
            "optimizers (Nadam) do on PyTorch; or there is no C++ compiler."
        )
        if required:
            raise StepError(
                f"{message} Train it with torch_compile=False (and with "
                'resume="override", if the run was compiled from the '
                "beginning)."
            ) from error
        warnings.warn(
            f"{message} It runs without being compiled.",
            LegatoWarning,
            stacklevel=2,
        )
        return None
    return program


def record(
    step: ExaminedStep,
    variables: Sequence[keras.Variable],
    values: dict[int, torch.Tensor],
    resident: Any,
    operands: Any,
    at: torch.Tensor,
    cond: Any = merging_cond,
) -> torch.fx.GraphModule:
    """What the step does to tensors; it runs as Python, on none with values.

    Args:
        step: the step.
        variables: all that it uses.
        values: memory of these, by id.
        resident: see `Fetch`.
        operands: of one batch.
        at: the index of a step.
        cond: in place of `keras.ops.cond`.

    Returns:
        Takes the values of the variables, resident, operands and `at`;
        returns the logs, float32 `[names]`.
    """

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

    with keras_tracing.traced_step(cond), scoped_modules():
        return make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(
            [values[id(v)] for v in variables], resident, operands, at
        )


def _keep_copies_of_inputs(graph: torch.fx.GraphModule) -> None:
    """Make the compiler keep them: see `_OPERATORS`. It may drop all others."""
    nodes = list(graph.graph.nodes)
    inputs = {_memory(node) for node in nodes if node.op == "placeholder"}
    for node in nodes:
        if (
            node.target is torch.ops.aten.clone.default
            and _memory(node.args[0]) in {*inputs, None}
        ):
            node.target, node.kwargs = torch.ops.legato.own.default, {}
    graph.recompile()


def _memory(node: torch.fx.Node) -> int | None:
    """Which memory its value lies in, whatever view it is; None: not known."""
    value = node.meta.get("val")
    known = isinstance(value, torch.Tensor)
    return value.untyped_storage()._cdata if known else None


def _reason(error: Exception) -> str:
    """The first words of an error, without colours and line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    # Keras says first in which layer it was.
    text = re.sub(r"^Exception encountered when calling [^\n]*\n", "", text)
    words = " ".join(text.split())[:160]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
