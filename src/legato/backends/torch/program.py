"""A step captured whole, as a program of tensor operations, and compiled.

Python runs once, on tensors without values; what it did to tensors is
recorded, differentiation and updates included, and `torch.compile` makes one
program of it. It holds no Python: nothing about the user's objects can make
it compile again.
"""

import re
import warnings
from collections.abc import Generator
from typing import Any

import keras
import torch
from torch.utils._pytree import tree_leaves

from legato.backends.torch import operators
from legato.backends.torch.arrays import current_device
from legato.backends.torch.randomness import kept_random_state
from legato.backends.torch.recording import Recording, memory_of
from legato.backends.torch.step import ExaminedStep, Values, run_each
from legato.errors import LegatoWarning, StepError

# Shapes and types are those that it was compiled for: it is enough to look once
# in a call. At each step it takes a fifth of the time of a small one.
_OPTIONS = {
    "size_asserts": False,
    "guard_filter_fn": lambda guards: [False] * len(guards),
}


MAX_OPERATIONS = 3000
"""Of a step that is compiled without being asked: the compiler takes some 10 ms
for each on two cores, and saves a microsecond or two."""


class StepProgram:
    """A captured step, compiled when it is first called.

    Where conditionals depend on the step's index alone, as those of metrics
    that are not due at each step, there is a second program without what
    they guard, for the steps at which nothing of it is due. (Not one for each
    combination: to compile one takes seconds.)

    Args:
        recording: of the step.
        variables: whose values it takes, in order.
        resident: see `Fetch`.
    """

    def __init__(
        self,
        recording: Recording,
        variables: list[keras.Variable],
        resident: Any,
    ) -> None:
        self._recording = recording
        self._variables = variables
        self._resident = tree_leaves(resident)
        _keep_copies_of_inputs(recording.graph)
        self._whole = _compiled(recording.run(()))
        (decided,) = recording.decisions(recording.at[None])
        self._without = None
        if decided:
            self._without = _compiled(recording.run((False,) * len(decided)))
        self._layouts: list[Any] = []

    def try_all(self, values: Values, operands: Any) -> None:
        """Compile everything, and run it once; values change.

        Args:
            values: memory of the variables, by id.
            operands: of one batch.
        """
        self._layouts = self._layouts_now(values)
        given = [*self._given(values), *tree_leaves(operands)]
        # Keras's SGD hands its learning rate over as a number.
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            for program in (self._whole, self._without):
                if program is not None:
                    program(*given, self._recording.at)

    def _given(self, values: Values) -> list[torch.Tensor]:
        return [values[id(v)] for v in self._variables] + self._resident

    def _layouts_now(self, values: Values) -> list[Any]:
        given = [values[id(v)] for v in self._variables]
        return [(v.shape, v.stride(), v.dtype) for v in given]

    def __call__(
        self, values: Values, operands: Any, at: torch.Tensor
    ) -> Generator[list[torch.Tensor]]:
        """Run a step for each of `at`; see `run_each`.

        Args:
            values: memory of the variables, by id.
            operands: of as many batches.
            at: the index of each step, int32 `[steps]`.

        Raises:
            StepError: a variable lies otherwise in memory than when the step
                was compiled.
        """
        if self._layouts_now(values) != self._layouts:
            raise StepError(
                "A variable was given another shape, dtype or layout in memory "
                "after the step was compiled. Leave its tensor as it is, and "
                "assign to the variable; or train with torch_compile=False."
            )
        programs = [self._whole] * len(at)
        if self._without is not None:
            programs = [
                self._whole if any(decided) else self._without
                for decided in self._recording.decisions(at)
            ]
        return run_each(programs, self._given(values), operands, at)


def _compiled(graph: torch.fx.GraphModule) -> Any:
    # (A copy: PyTorch 2.13 takes some options out of it.)
    return torch.compile(
        graph, fullgraph=True, dynamic=False, options=dict(_OPTIONS)
    )


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
        The program; None, with a warning, for a step that cannot be compiled,
        or would take long.

    Raises:
        StepError: it cannot be compiled, and is required to be.
    """
    variables = [*step.updated, *step.read_only]
    values = {id(v): v._value.detach() for v in variables}
    at = torch.zeros((), dtype=torch.int32, device=current_device())
    try:
        with kept_random_state(), torch.no_grad():
            recording = Recording(
                step, variables, values, resident, operands, at
            )
            count = len(recording.graph.nodes)
            if count > MAX_OPERATIONS and not required:
                warnings.warn(
                    f"The step has {count:,} operations, which PyTorch takes a "
                    "minute or more to compile: it runs without being "
                    "compiled. Set torch_compile=True (in `compile`, "
                    "jit_compile=True) to wait for it.",
                    LegatoWarning,
                    stacklevel=2,
                )
                return None
            program = StepProgram(recording, variables, resident)
            # Compiles it now: before step 0 there is still a choice.
            before = [values[id(v)].to("cpu", copy=True) for v in step.updated]
            try:
                program.try_all(values, operands)
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


def _keep_copies_of_inputs(graph: torch.fx.Graph) -> None:
    """Make the compiler keep them: see `operators`. It may drop all others."""
    nodes = list(graph.nodes)
    inputs = {memory_of(node) for node in nodes if node.op == "placeholder"}
    for node in nodes:
        copied = node.target is torch.ops.aten.clone.default
        if copied and memory_of(node.args[0]) in {*inputs, None}:
            node.target = operators.own


def _reason(error: Exception) -> str:
    """The first words of an error, without colours and line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    # Keras says first in which layer it was.
    text = re.sub(r"^Exception encountered when calling [^\n]*\n", "", text)
    words = " ".join(text.split())[:160]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
