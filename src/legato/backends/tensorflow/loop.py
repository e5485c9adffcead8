"""A step traced once, and run many times in one call of a graph."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from legato.backends.lost import LostVariables
from legato.backends.protocol import (
    Compilation,
    CompiledLoop,
    Fetch,
    Keeping,
    LoopMode,
    Step,
)
from legato.backends.scope import (
    PYTHON_VALUE,
    columns_of,
    kept_variables,
    split_outputs,
    steps_with_outputs,
)
from legato.backends.tensorflow import xla
from legato.backends.tensorflow.effects import find_effects
from legato.backends.tensorflow.scope import StepScope
from legato.compat import keras_tracing
from legato.errors import StepError
from legato.phases import DEVICE, TRANSFER

_NOT_COMPILABLE = (
    "The step cannot be compiled by XLA: {}. Train it with "
    'torch_compile=False (and with resume="override", if the run was compiled '
    "from the beginning)."
)

LOST = LostVariables()
"""Those that a failed call left in the midst of a step."""


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
) -> "TensorFlowLoop":
    """See `Backend.compile_loop`.

    It is one function on purpose: few frames of ours should lie above the
    user's step in a traceback.
    """
    del variables  # those that exist are found in the first trace
    del one_by_one  # a call costs little beside the step
    scopes: list[StepScope] = []
    names: list[str] = []
    leaves = keras.tree.flatten(operands)

    def run(index: Any, at: Any, *flat: Any) -> Any:
        # What is made lazily is made in the first trace; what is made in the
        # second is made anew in every step.
        scope = StepScope(
            losses=losses_in_step, may_make=not scopes, native=native
        )
        scopes.append(scope)
        with scope:
            batch = fetch(
                resident, keras.tree.pack_sequence_as(operands, flat), index
            )
            logs, outputs = split_outputs(step(batch, at))
            names[:] = logs
            row = [keras.ops.cast(log, "float32") for log in logs.values()]
            rows = tf.stack(row) if row else tf.zeros((0,))
            return rows if outputs is None else (rows, outputs)

    count = tf.TensorSpec((), tf.int32)
    specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves]
    # The outer scope is left after the trace: only then is what was made while
    # tracing, and not used, given its value.
    with (
        keras.StatelessScope(),
        keras_tracing.traced_step(None, eager=lambda: scopes[-1].building()),
        keras_tracing.read_by_conversion(),
    ):
        try:
            # A trace that makes variables is repeated by TensorFlow.
            traced = tf.function(run, autograph=False).get_concrete_function(
                count, count, *specs
            )
        except tf.errors.OperatorNotAllowedInGraphError as error:
            raise StepError(PYTHON_VALUE) from error
        except (AttributeError, NotImplementedError, TypeError) as error:
            if "ymbolic" not in str(error):  # of no such tensor
                raise
            raise StepError(PYTHON_VALUE) from error
    loop = TensorFlowLoop(traced, scopes[-1], names, leaves, len(scopes))
    loop.choose_mode(mode, compilation, keeping)
    return loop


class TensorFlowLoop(CompiledLoop):
    """See `CompiledLoop`."""

    def __init__(
        self,
        traced: Any,
        scope: StepScope,
        names: list[str],
        leaves: list[Any],
        traces: int,
    ) -> None:
        effects = find_effects(
            traced, scope.read.values(), scope.updated.values()
        )
        self.updated = effects.updated
        self.read_only = effects.read_only
        self.runs_python = effects.runs_python
        self.log_names = list(names)
        self.traces = traces
        self._traced = traced
        self._leaves = leaves
        self._run: Any = None

    def choose_mode(
        self,
        mode: LoopMode | None,
        compilation: Compilation,
        keeping: Keeping | None,
    ) -> None:
        """Make the graph that is run; see `Backend.compile_loop`.

        Raises:
            StepError: it has to be compiled, and cannot be.
        """
        leaves = self._leaves
        if isinstance(self._traced.structured_outputs, tuple):
            self.max_steps = _max_steps(
                self._traced.structured_outputs[1], leaves
            )
            self._run = self._make_loop(self._traced, 0, is_compiled=False)
            self.mode = "fused"
            return
        self.kept = kept_variables(keeping, self.updated, leaves)
        every = keeping.every if keeping and self.kept else 0
        required = mode == "compiled" or (
            mode is None and compilation == "always"
        )
        if required or (
            mode is None and compilation == "auto" and xla.gains(self._traced)
        ):
            step = xla.quick_step(self._traced)
            try:
                self._run = self._make_loop(step, every, is_compiled=True)
                self.mode = "compiled"
                self.columns = columns_of(self.kept or [])
                return
            except xla.NotCompilableError as error:
                if required:
                    raise StepError(_NOT_COMPILABLE.format(error)) from error
        self._run = self._make_loop(self._traced, every, is_compiled=False)
        self.mode = "fused"

    def __call__(self, step: int, num_steps: int, operands: Any) -> Any:
        LOST.refuse(self.variables)
        self._enter(TRANSFER)
        flat = [tf.constant(leaf) for leaf in keras.tree.flatten(operands)]
        self._enter(DEVICE)
        try:
            return self._run(
                tf.constant(step, tf.int32),
                tf.constant(num_steps, tf.int32),
                *flat,
            )
        except BaseException:
            # It may have stopped between any two assignments.
            LOST.add(self.updated)
            raise

    def _make_loop(self, step: Any, every: int, *, is_compiled: bool) -> Any:
        """A graph that runs a step a number of times, given with a call.

        Args:
            step: the step.
            every: what is kept, is after each so many; 0 keeps nothing.
            is_compiled: whether by XLA.

        Raises:
            NotCompilableError: XLA is to compile it, and cannot.
        """
        leaves, num_columns = self._leaves, len(self.log_names)
        # (Not compiled, reading them at each step would be dear.)
        held: list[Any] = []
        if is_compiled and (columns := columns_of(self.kept or [])):
            held = [variable._value for variable in self.kept or ()]
            num_columns += columns.count
        capacity = leaves[0].shape[0]
        structure = self._traced.structured_outputs
        outputs = structure[1] if isinstance(structure, tuple) else []
        count = tf.TensorSpec((), tf.int32)
        specs = [
            count,
            count,
            *(tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves),
        ]

        def loop(first: Any, num_steps: Any, *flat: Any) -> Any:
            def body(index: Any, rows: Any, *stacks: Any) -> Any:
                row = step(index, first + index, *flat)
                if outputs:
                    row, given = row
                    stacks = tuple(
                        stack.write(index, output)
                        for stack, output in zip(stacks, given, strict=True)
                    )
                if held:
                    row = tf.concat([row, *map(_bits, held)], 0)
                if num_columns:
                    rows = tf.tensor_scatter_nd_update(rows, [[index]], [row])
                return index + 1, rows, *stacks

            def run(stop: Any, *state: Any) -> Any:
                return tf.while_loop(
                    lambda index, *_: index < stop,
                    body,
                    state,
                    parallel_iterations=1,
                )

            stacks = [
                tf.TensorArray(spec.dtype, num_steps, element_shape=spec.shape)
                for spec in outputs
            ]
            start = tf.constant(0), tf.zeros((capacity, num_columns))
            if every and not held:
                return self._loop_of_loops(run, start, first, num_steps, every)
            _, rows, *stacks = run(num_steps, *start, *stacks)
            if outputs:
                return rows, [stack.stack() for stack in stacks]
            return rows

        if is_compiled:
            return xla.compile_function(loop, specs)
        return tf.function(loop, autograph=False).get_concrete_function(*specs)

    def _loop_of_loops(
        self, run: Any, start: Any, first: Any, num_steps: Any, every: int
    ) -> Any:
        """Goes from one step after which values are kept to the next.

        The steps themselves are the same graph as without.
        """
        kept: list[Any] = [variable._value for variable in self.kept or ()]
        capacity = self._leaves[0].shape[0]
        times = capacity // every + 2  # with the ends of the call

        def go_on(time: Any, index: Any, rows: Any, *stacks: Any) -> Any:
            stop = index + every - (first + index) % every
            index, rows = run(tf.minimum(stop, num_steps), index, rows)
            stacks = tuple(
                tf.tensor_scatter_nd_update(
                    stack, [[time]], memory.read_value()[None]
                )
                for stack, memory in zip(stacks, kept, strict=True)
            )
            return time + 1, index, rows, *stacks

        _, _, rows, *stacks = tf.while_loop(
            lambda time, index, *_: index < num_steps,
            go_on,
            (
                tf.constant(0),
                *start,
                *(tf.zeros((times, *m.shape), m.dtype) for m in kept),
            ),
            parallel_iterations=1,
        )
        return rows, stacks


def _bits(memory: Any) -> Any:
    """The bits of a number that a variable holds, as float32 `[columns]`."""
    return tf.reshape(tf.bitcast(memory.read_value(), tf.float32), [-1])


def _max_steps(outputs: Sequence[Any], leaves: list[Any]) -> int:
    """How many steps one call takes that give these to the host."""
    if not all(spec.shape.is_fully_defined() for spec in outputs):
        return 1  # they may not stack
    num_bytes = sum(o.shape.num_elements() * o.dtype.size for o in outputs)
    return steps_with_outputs(num_bytes, leaves)
