"""A step examined once, and run in a loop by Python."""

import contextlib
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import torch

from legato.backends.protocol import (
    Compilation,
    CompiledLoop,
    Fetch,
    Keeping,
    LoopMode,
    Step,
)
from legato.backends.scope import (
    MAX_TRACES,
    kept_variables,
    refuse_new_variables,
    split_outputs,
)
from legato.backends.torch.arrays import current_device, to_tensors
from legato.backends.torch.conditional import plain_cond, probing_cond
from legato.backends.torch.layers import layers_of_step
from legato.backends.torch.native import compile_native
from legato.backends.torch.randomness import kept_random_state
from legato.backends.torch.replay import Replayer
from legato.backends.torch.scope import ExaminingScope, StepScope
from legato.backends.torch.step import LOST, ExaminedStep, to_row
from legato.compat import keras_tracing
from legato.errors import StepError
from legato.phases import DEVICE, TRANSFER

if TYPE_CHECKING:
    from legato.backends.torch.program import StepProgram

_NO_AUTOGRAD = (
    "The step differentiates by itself (`backward()` or torch.autograd.grad), "
    "but only what is in the function given to legato.value_and_grad is "
    "followed by autograd. Use that: it works on every backend."
)


def compile_loop(
    step: Step,
    *,
    fetch: Fetch,
    resident: Any,
    operands: Any,
    mode: LoopMode | None,
    losses_in_step: bool,
    variables: Sequence[keras.Variable] = (),
    compilation: Compilation = "never",
    native: bool = False,
    keeping: Keeping | None = None,
    one_by_one: bool = False,
) -> CompiledLoop:
    """See `Backend.compile_loop`.

    The step is run on the example batch, both branches of its conditionals
    too, and everything it changes is put back. It is one function on purpose:
    few frames of ours should lie above the user's step in a traceback.
    """
    del variables  # all are found in the run
    del one_by_one  # a call is little quicker than its steps
    if native:
        return compile_native(
            step, fetch=fetch, resident=resident, operands=operands
        )
    first = to_tensors(keras.tree.map_structure(lambda a: a[:1], operands))
    at = torch.zeros((), dtype=torch.int32, device=current_device())
    found = ExaminedStep(run=step, fetch=fetch, losses_in_step=losses_in_step)
    for _ in range(MAX_TRACES):
        scope = ExaminingScope(losses=losses_in_step)
        with (
            # Left last: only then are variables that were made meanwhile
            # initialised, with values of their own.
            keras.StatelessScope(),
            keras_tracing.traced_step(probing_cond),
            layers_of_step(),
            kept_random_state(),
            torch.no_grad(),
        ):
            try:
                with scope:
                    logs, outputs = split_outputs(
                        step(fetch(resident, first, 0), at)
                    )
                scope.check_given()
                found.copied = scope.to_be_copied()
            except RuntimeError as error:
                if "does not require grad" in str(error):
                    raise StepError(_NO_AUTOGRAD) from error
                raise
            finally:
                changed = scope.roll_back()
        found.traces += 1
        if not scope.made:
            break
    else:
        refuse_new_variables(list(scope.made.values()))
    found.updated = list(changed.values())
    found.read_only = [v for k, v in scope.read.items() if k not in changed]
    found.reached = scope.reached
    found.log_names = list(logs)
    program = None
    may_compile = mode is None and compilation in ("auto", "always")
    if outputs is None and (mode == "compiled" or may_compile):
        # What it needs of PyTorch takes seconds to import.
        from legato.backends.torch.program import capture

        required = mode is not None or compilation == "always"
        program = capture(found, resident, first, required=required)
    replays = program is None and compilation != "never"
    loop = TorchLoop(
        found,
        resident,
        program,
        replays=replays,
        has_outputs=outputs is not None,
    )
    if keeping is not None and outputs is None:
        loop.keep(keeping, operands)
    return loop


class TorchLoop(CompiledLoop):
    """See `CompiledLoop`."""

    def __init__(
        self,
        step: ExaminedStep,
        resident: Any,
        program: "StepProgram | None",
        *,
        replays: bool,
        has_outputs: bool,
    ) -> None:
        self.read_only = step.read_only
        self.updated = step.updated
        self.log_names = step.log_names
        self.traces = step.traces
        self.mode = "eager" if program is None else "compiled"
        self.max_steps = 1 if has_outputs else None
        self._step = step
        self._known = {id(v) for v in self.variables}
        self._resident = resident
        self._program = program
        self._replayer = Replayer(step, resident) if replays else None
        self._every = 0

    def keep(self, keeping: Keeping, operands: Any) -> None:
        """See `CompiledLoop.kept`."""
        self.kept = kept_variables(keeping, self.updated, operands)
        self._every = keeping.every

    def __call__(self, step: int, num_steps: int, operands: Any) -> Any:
        LOST.refuse(self.variables)
        self._enter(TRANSFER)
        operands = to_tensors(
            keras.tree.map_structure(lambda a: a[:num_steps], operands)
        )
        self._enter(DEVICE)
        at = torch.arange(
            step, step + num_steps, dtype=torch.int32, device=current_device()
        )
        # Without autograd's wrapping: the same memory.
        values = {id(v): v._value.detach() for v in self.variables}
        held = _Held(self.kept or [], values, step, self._every)
        returned: list[list[torch.Tensor]] = []
        try:
            with torch.no_grad():
                replay = self._replayer and self._replayer.ready()
                if program := self._program or replay:
                    for each in program(values, operands, at):
                        returned.append(each)
                        held.add()
                    return self._returned(returned, held)
                # (Here, for there to be few frames above the user's step.)
                replayer = self._replayer
                fetch, run = self._step.fetch, self._step.run
                with keras_tracing.traced_step(plain_cond), layers_of_step():
                    for index, now in enumerate(at.unbind()):
                        scope = self._step.new_scope(values)
                        trial = replayer and replayer.begin(values)
                        with trial or contextlib.nullcontext(), scope:
                            batch = fetch(self._resident, operands, index)
                            logs, outputs = split_outputs(run(batch, now))
                            returned.append([to_row(logs), *(outputs or ())])
                        self._check_variables(scope)
                        scope.commit()
                        if replayer and trial:
                            one = slice(index, index + 1)
                            replayer.finish(
                                trial,
                                returned[-1],
                                keras.tree.map_structure(
                                    operator.itemgetter(one), operands
                                ),
                                at[one],
                            )
                        held.add()
                return self._returned(returned, held)
        except BaseException:
            # It ended in the midst of a step.
            LOST.add(self.updated)
            raise

    def _returned(self, steps: list[list[torch.Tensor]], held: "_Held") -> Any:
        """What a call returns: rows of its steps, outputs, what was kept."""
        rows = [row for row, *_ in steps]
        if self.kept:
            return rows, held.stacks()
        if self.max_steps is None:
            return rows
        ((_, *outputs),) = steps
        return rows, [output[None] for output in outputs]

    def _check_variables(self, scope: StepScope) -> None:
        if len(scope.read) <= len(self._known):
            return
        new = [v.path for k, v in scope.read.items() if k not in self._known]
        if new:
            raise StepError(
                f"The step used {', '.join(new[:3])}, which it did not use "
                "when it was examined: it would be missing in checkpoints. "
                "What depends on the value of a tensor belongs into "
                "keras.ops.cond, not into Python's `if` or ops.switch."
            )


class _Held:
    """What variables hold after some steps of a call.

    Args:
        variables: these.
        values: memory of all variables, by id.
        step: steps completed before the call.
        every: values are taken after each so many steps of the run.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        values: dict[int, torch.Tensor],
        step: int,
        every: int,
    ) -> None:
        self._memory = [values[id(v)] for v in variables]
        self._step = step
        self._every = every
        # Numbers, which most are, are taken together: in one operation each
        # time, not in one for each.
        groups: dict[Any, list[int]] = {}
        for index, memory in enumerate(self._memory):
            alone = index if memory.ndim else memory.dtype
            groups.setdefault(alone, []).append(index)
        self._groups = list(groups.values())
        self._taken: list[list[torch.Tensor]] = [[] for _ in self._groups]

    def add(self) -> None:
        """A step was completed."""
        self._step += 1
        if self._memory and self._step % self._every == 0:
            for group, taken in zip(self._groups, self._taken, strict=True):
                taken.append(torch.stack([self._memory[i] for i in group]))

    def stacks(self) -> list[torch.Tensor]:
        """The values of each variable, `[times, ...]`."""
        found = list(self._memory)
        for group, taken in zip(self._groups, self._taken, strict=True):
            values = torch.stack(taken, 1) if taken else None
            for row, index in enumerate(group):
                none = self._memory[index][None][:0]
                found[index] = none if values is None else values[row]
        return found
