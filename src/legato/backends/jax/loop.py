"""A step traced once, and run many times in one call on the device."""

import contextlib
import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import keras
import numpy as np
from jax.extend import core as jax_core

from legato.backends.jax.ahead import Ahead
from legato.backends.jax.scope import StepScope, merging_cond
from legato.backends.jax.unrolled import replay
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
    PYTHON_VALUE,
    columns_of,
    initial_value,
    kept_variables,
    refuse_new_variables,
    split_outputs,
    steps_with_outputs,
)
from legato.compat import keras_tracing, keras_values
from legato.errors import StepError
from legato.phases import LAUNCH, TRANSFER

_MAX_KEPT_BYTES = 4 << 20
"""A step that changes more gains nothing by being begun early."""

_VALUE = operator.attrgetter("_value")

_MAX_IN_VAIN = 10
"""After 2 to the power of that many steps it is tried again."""

_NO_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)

_LEAKED = (
    "A variable was assigned inside a construct that cannot carry it out "
    "(keras.ops.while_loop, scan, fori_loop, map or jax.checkpoint). Return "
    "the new value from the construct and assign it outside. keras.ops.cond "
    "may assign."
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
) -> "JaxLoop":
    """See `Backend.compile_loop`.

    It is one function on purpose: few frames of ours should lie above the
    user's step in a traceback.
    """
    del compilation  # nothing runs uncompiled here
    del native  # tracers are what JAX differentiates by
    known = list(variables)
    scopes: list[StepScope] = []
    names: list[str] = []

    def run(
        values: Any, resident: Any, operands: Any, index: Any, at: Any
    ) -> Any:
        scope = StepScope(
            zip(known, values, strict=True), losses=losses_in_step
        )
        with scope:
            batch = fetch(resident, operands, index)
            logs, outputs = split_outputs(step(batch, at))
            row: list[Any] = [
                keras.ops.convert_to_tensor(v, "float32") for v in logs.values()
            ]
        scopes.append(scope)
        names[:] = logs
        rows = jnp.stack(row) if row else jnp.zeros((0,), jnp.float32)
        return [value for _, value in scope.updates()], rows, outputs

    count = np.int32(0)
    for _ in range(MAX_TRACES):
        values = [initial_value(v) for v in known]
        # The outer scope is left after the trace: only then are variables that
        # were made while tracing initialised, with values and not tracers.
        with (
            keras.StatelessScope(),
            keras_tracing.traced_step(
                merging_cond, eager=jax.ensure_compile_time_eval
            ),
        ):
            try:
                closed = jax.make_jaxpr(run)(
                    values, resident, operands, count, count
                )
            except jax.errors.UnexpectedTracerError as error:
                raise StepError(_LEAKED) from error
            except _NO_VALUE as error:
                raise StepError(PYTHON_VALUE) from error
        # What leaked from an inner construct, which has ended, JAX takes for
        # a constant of the program, and complains when that is compiled.
        if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
            raise StepError(_LEAKED)
        unknown = list(scopes[-1].unknown.values())
        if not unknown:
            program = StepProgram(closed, known, scopes[-1], names)
            return JaxLoop(
                program, resident, operands, mode, len(scopes), keeping,
                one_by_one,
            )  # fmt: skip
        known += unknown
    refuse_new_variables(unknown)


class StepProgram:
    """A traced step as a pure function; user code is not called again.

    Args:
        closed: the trace, of `(values, resident, operands, index, at)`.
        known: the variables whose values it takes.
        scope: in which it was traced.
        log_names: names of the logs.
    """

    def __init__(
        self,
        closed: jax_core.ClosedJaxpr,
        known: Sequence[keras.Variable],
        scope: StepScope,
        log_names: Sequence[str],
    ) -> None:
        self.closed = closed
        self.log_names = list(log_names)
        self.updated = [v for v, _ in scope.updates()]
        # After the new values and the row come the outputs for the host.
        self.outputs = closed.out_avals[len(self.updated) + 1 :]
        self.read_only = [
            v for key, v in scope.read.items() if key not in scope.updated
        ]
        self._known = list(known)

    def __call__(
        self,
        updated: Any,
        read_only: Any,
        resident: Any,
        operands: Any,
        index: Any,
        at: Any,
    ) -> Any:
        """New values of `updated`, the logs, float32 `[names]`, and outputs."""
        variables = (*self.updated, *self.read_only)
        given = dict(
            zip(map(id, variables), (*updated, *read_only), strict=True)
        )
        # A known variable that this step does not use is not passed in.
        values = [
            given[id(v)] if id(v) in given else initial_value(v)
            for v in self._known
        ]
        flat = jax.tree.leaves((values, resident, operands, index, at))
        results = replay(self.closed, *flat)
        count = len(self.updated)
        return results[:count], results[count], results[count + 1 :]


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A call that was begun before its turn.

    Attributes:
        steps: its first step, and how many.
        operands: as given.
        values: of the variables, with which it was begun.
        results: new values of those that it updates, the logs, the outputs.
    """

    steps: tuple[int, int]
    operands: Any
    values: list[jax.Array]
    results: Any


class JaxLoop(CompiledLoop):
    """See `CompiledLoop`."""

    def __init__(
        self,
        program: StepProgram,
        resident: Any,
        operands: Any,
        mode: LoopMode | None,
        traces: int,
        keeping: Keeping | None,
        one_by_one: bool,
    ) -> None:
        self.read_only = program.read_only
        self.updated = program.updated
        self.log_names = program.log_names
        self._outputs = program.outputs
        if self._outputs:
            num_bytes = sum(o.size * o.dtype.itemsize for o in self._outputs)
            self.max_steps = steps_with_outputs(num_bytes, operands)
        self.mode = mode or _choose_mode(program.closed)
        self.traces = traces
        self._num_arrays = len(program.updated) + len(program.read_only)
        num_bytes = sum(v._value.nbytes for v in program.updated)
        # Without donation values live on, and a step that was begun early can
        # be dropped. (What prints or calls back cannot be undone.)
        self._donates = num_bytes > _MAX_KEPT_BYTES
        self._can_begin = not self._donates and not program.closed.effects
        self._begun: _Begun | None = None
        self._in_vain = self._rests = 0
        self._resident = resident
        self._every = 0
        if keeping is not None and self.mode == "fused":
            self.kept = kept_variables(keeping, self.updated, operands)
            self.columns = columns_of(self.kept or [])
            self._every = keeping.every
        self._capacity = jax.tree.leaves(operands)[0].shape[0]
        self._ahead: Ahead | None = None
        if self.mode == "stepwise":
            self._run = self._stepwise(program)
        elif one_by_one and self._can_run_ahead():
            self._run = self._fused_ahead(program)
        else:
            self._run = self._fused(program)

    def _can_run_ahead(self) -> bool:
        # (On other devices, where steps cost less, it is not measured.)
        return (
            jax.default_backend() == "cpu"
            and self._can_begin
            and not self._outputs
            and self.kept is None
            and all(map(keras_values.can_wait, self.updated))
        )

    @property
    def is_ahead(self) -> bool:
        return self._ahead is not None and self._ahead.is_on

    def run_ahead(
        self, step: int, operands: Any, index: int, stop: int
    ) -> Any | None:
        if self._ahead is None:
            return None
        if self._begun is not None:
            self._ahead.pass_by()
            return None
        return self._ahead.take(step, operands, index, stop)

    def begin(self, step: int, num_steps: int, operands: Any) -> None:
        if not self._can_begin or self._begun is not None:
            return
        if self._rests:
            self._rests -= 1
            return
        updated = list(map(_VALUE, self.updated))
        read_only = list(map(_VALUE, self.read_only))
        with contextlib.suppress(Exception):  # `__call__` raises it in time
            results = self._run(
                updated, read_only, self._resident, operands, step, num_steps
            )
            self._begun = _Begun(
                (step, num_steps), operands, [*updated, *read_only], results
            )

    def _take_begun(self, step: int, num_steps: int, operands: Any) -> Any:
        """The results of what was begun, if it is this, of these values."""
        begun, self._begun = self._begun, None
        assert begun is not None
        # (Arrays never change: a variable that is set has another.)
        values = map(_VALUE, itertools.chain(self.updated, self.read_only))
        if (
            begun.steps == (step, num_steps)
            and begun.operands is operands
            and all(map(operator.is_, values, begun.values))
        ):
            self._in_vain = 0
            return begun.results
        # As under a callback that sets the learning rate at each batch.
        self._in_vain = min(self._in_vain + 1, _MAX_IN_VAIN)
        self._rests = 2**self._in_vain
        return None

    def __call__(self, step: int, num_steps: int, operands: Any) -> Any:
        if self._ahead is not None:
            self._ahead.drop()
        results = None
        if self._begun is not None:
            results = self._take_begun(step, num_steps, operands)
        if results is None:
            results = self._call(step, num_steps, operands)
        new, logs, outputs = results
        for variable, value in zip(self.updated, new, strict=True):
            # By reference: `assign` would convert and check each one.
            variable._value = value
        return (logs, outputs) if outputs else logs

    def _call(self, step: int, num_steps: int, operands: Any) -> Any:
        updated = list(map(_VALUE, self.updated))
        read_only = list(map(_VALUE, self.read_only))
        if len({*map(id, updated), *map(id, read_only)}) < self._num_arrays:
            taken: set[int] = set()
            updated = [_own_array(a, taken) for a in updated]
            read_only = [_own_array(a, taken) for a in read_only]
        return self._run(
            updated, read_only, self._resident, operands, step, num_steps
        )

    def _donated(self) -> tuple[int, ...]:
        return (0,) if self._donates else ()

    def _places(self) -> list[int]:
        """Where those that are kept are among `updated`."""
        places = {id(v): place for place, v in enumerate(self.updated)}
        return [places[id(v)] for v in self.kept or ()]

    def _fused(self, run: Any) -> Any:
        in_rows = self._places() if self.columns else []
        num_columns = self.columns.count if self.columns else 0
        shape = (self._capacity, len(self.log_names) + num_columns)
        stacks = [((self.max_steps, *o.shape), o.dtype) for o in self._outputs]

        def loop(
            updated: Any, read_only: Any, resident: Any, operands: Any,
            numbers: Any,
        ) -> Any:  # fmt: skip
            step, num_steps = numbers

            def body(index: Any, carry: Any) -> Any:
                values, rows, stacked = carry
                values, row, outputs = run(
                    values, read_only, resident, operands, index, step + index
                )
                stacked = [
                    _put(stack, index, output)
                    for stack, output in zip(stacked, outputs, strict=True)
                ]
                if in_rows:
                    # (So that nothing of the step is computed in another way.)
                    held = jax.lax.optimization_barrier(
                        [values[place] for place in in_rows]
                    )
                    row = jnp.concatenate([row, *map(_bits, held)])
                return values, _put(rows, index, row), stacked

            rows = jnp.zeros(shape, jnp.float32)
            stacked = [jnp.zeros(*stack) for stack in stacks]
            carry = updated, rows, stacked
            if in_rows or not self.kept:
                return jax.lax.fori_loop(0, num_steps, body, carry)
            return self._loop_of_loops(body, carry, step, num_steps)

        compiled = jax.jit(loop, donate_argnums=self._donated())

        def call(
            updated: Any, read_only: Any, resident: Any, operands: Any,
            step: int, num_steps: int,
        ) -> Any:  # fmt: skip
            # (One array: each argument that is not on the device costs time.)
            numbers = np.array([step, num_steps], np.int32)
            return compiled(updated, read_only, resident, operands, numbers)

        return call

    def _fused_ahead(self, program: Any) -> Any:
        """The same where steps are mostly asked for one by one.

        It begins at any batch of the operands, and keeps what single numbers
        hold after each step: most metrics consist of them, and callbacks see
        metrics at each step.
        """
        seen = [
            i
            for i, v in enumerate(program.updated)
            if v._value.shape == () and v._value.dtype == jnp.float32
        ]

        def loop(
            updated: Any, read_only: Any, resident: Any, operands: Any,
            numbers: Any,
        ) -> Any:  # fmt: skip
            step, first, num_steps = numbers

            def body(index: Any, carry: Any) -> Any:
                values, rows, found = carry
                values, row, _ = program(
                    values, read_only, resident, operands, first + index,
                    step + index,
                )  # fmt: skip
                if seen:
                    now = jnp.stack([values[i] for i in seen])
                    found = _put(found, index, now)
                return values, _put(rows, index, row), found

            rows = jnp.zeros((self._capacity, len(self.log_names)), jnp.float32)
            found = jnp.zeros((self._capacity, len(seen)), jnp.float32)
            return jax.lax.fori_loop(0, num_steps, body, (updated, rows, found))

        # (Nothing is donated: see `_can_begin`.)
        compiled = jax.jit(loop)
        executable = None

        def run(
            updated: Any, read_only: Any, operands: Any,
            step: int, first: int, num_steps: int,
        ) -> Any:  # fmt: skip
            # The executable itself, which a call of `compiled` has too: that
            # would be traced, and compiled to something else, where somebody
            # asks for a value while he traces, or has `jit` disabled.
            nonlocal executable
            numbers = np.array([step, first, num_steps], np.int32)
            given = updated, read_only, self._resident, operands, numbers
            with jax.disable_jit(False):
                if executable is not None:
                    with contextlib.suppress(TypeError, ValueError):
                        return executable(*given)
                # The first time; or somebody put an array on another device.
                executable = compiled.lower(*given).compile()
                return executable(*given)

        def call(
            updated: Any, read_only: Any, resident: Any, operands: Any,
            step: int, num_steps: int,
        ) -> Any:  # fmt: skip
            numbers = np.array([step, 0, num_steps], np.int32)
            new, rows, _ = compiled(
                updated, read_only, resident, operands, numbers
            )
            return new, rows, []

        self._ahead = Ahead(
            run, self.updated, self.read_only, seen, self._enter
        )
        return call

    def _loop_of_loops(
        self, body: Any, carry: Any, step: Any, num_steps: Any
    ) -> Any:
        """Goes from one step after which values are kept to the next.

        The steps themselves are the same program as without.
        """
        every, kept = self._every, self._places()
        times = self._capacity // every + 2  # with the ends of the call

        def go_on(state: Any) -> Any:
            index, count, carry, stacks = state
            stop = index + every - (step + index) % every
            stop = jnp.minimum(stop, num_steps)
            carry = jax.lax.fori_loop(index, stop, body, carry)
            stacks = [
                _put(stack, count, carry[0][place])
                for stack, place in zip(stacks, kept, strict=True)
            ]
            return stop, count + 1, carry, stacks

        stacks = [
            jnp.zeros((times, *carry[0][place].shape), carry[0][place].dtype)
            for place in kept
        ]
        zero = jnp.zeros((), jnp.int32)
        _, _, (values, rows, _), stacks = jax.lax.while_loop(
            lambda state: state[0] < num_steps,
            go_on,
            (zero, zero, carry, stacks),
        )
        return values, rows, stacks

    def _stepwise(self, run: Any) -> Any:
        def one(
            updated: Any, read_only: Any, resident: Any, operands: Any,
            numbers: Any,
        ) -> Any:  # fmt: skip
            index, step = numbers
            return run(updated, read_only, resident, operands, index, step)

        compiled = jax.jit(one, donate_argnums=self._donated())

        def call(
            updated: Any, read_only: Any, resident: Any, operands: Any,
            step: int, num_steps: int,
        ) -> Any:  # fmt: skip
            rows, outputs = [], []
            if num_steps > 1:  # for one, the call does it, and quicker
                self._enter(TRANSFER)
                operands = jax.device_put(operands)
                self._enter(LAUNCH)
            for index in range(num_steps):
                numbers = np.array([index, step + index], np.int32)
                updated, row, given = compiled(
                    updated, read_only, resident, operands, numbers
                )
                rows.append(row)
                outputs.append(given)
            stacked = [jnp.stack(each) for each in zip(*outputs, strict=True)]
            return updated, rows, stacked

        return call


def _put(stack: Any, index: Any, value: Any) -> Any:
    """A stack with a value at a place that is sure to be in it.

    `stack.at[index].set(value)` would look whether it is, in three operations
    of their own.
    """
    return jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)


def _bits(number: Any) -> Any:
    """A number's bits as float32, `[columns]`."""
    return jax.lax.bitcast_convert_type(number, jnp.float32).reshape(-1)


def _choose_mode(closed: Any) -> LoopMode:
    """Stepwise where the program holds a convolution and the device is a CPU.

    XLA:CPU runs convolutions inside a device loop on a slow path (jax#12868):
    1.4 to 5 times slower, measured. The rule looks only at the traced program
    and the device, so that a resumed run comes to the same choice.
    """
    on_cpu = jax.default_backend() == "cpu"
    return "stepwise" if on_cpu and _has_convolution(closed.jaxpr) else "fused"


def _has_convolution(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "conv_general_dilated"
        or any(
            _has_convolution(inner)
            for inner in jax_core.jaxprs_in_params(eqn.params)
        )
        for eqn in jaxpr.eqns
    )


def _own_array(value: Any, taken: set[int]) -> Any:
    """A variable's array, copied if another one holds the same.

    `a.assign(b)` makes two variables share one array, which cannot be donated
    (its memory reused) twice.
    """
    if id(value) in taken:
        value = jnp.array(value, copy=True)
    taken.add(id(value))
    return value
