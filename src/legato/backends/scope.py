"""What every backend's scopes of a step have in common."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import keras

from legato.backends.protocol import COLUMNS, Columns, Keeping
from legato.errors import StepError

# A trace that finds variables it did not know of is repeated with them. What
# is made lazily appears in the first one; what still makes new variables in
# the fourth makes them in every step.
MAX_TRACES = 4

PYTHON_VALUE = (
    "The step asks for the value of a tensor in Python (by `if`, `while`, "
    "`for`, `float()` or NumPy), but it is traced once for all batches, and "
    "there is no value yet. Use keras.ops.cond, keras.ops.where, "
    "keras.ops.while_loop or keras.ops.scan, and return tensors as logs."
)

_KEPT_BYTES = 1 << 20
"""Of the values that a call keeps; it sets them to zero first."""

_OUTPUT_BYTES = 16 << 20
"""Of the steps of one call, for the host; a few calls wait for it."""


class RecordingScope(keras.StatelessScope):
    """A scope that sees every variable a step reads or writes.

    The outermost one of a step notes them; inner ones (a `forward`, the
    branch of a conditional) look up what they do not hold. What a read gives
    and where a new value is kept is the backend's business.

    Args:
        parent: the scope around this one.
        losses: whether `add_loss` collects here and `model.losses` may be
            read.

    Attributes:
        read: variables that were asked for; noted in the outermost scope.
        updated: variables that were assigned in this scope.
    """

    def __init__(
        self, *, parent: "RecordingScope | None" = None, losses: bool = False
    ) -> None:
        super().__init__(collect_losses=losses, initialize_variables=False)
        self.parent = parent
        # Keyed by identity, as in Keras: comparing variables compares values.
        self.state_mapping: dict[int, Any] = {}
        self.read: dict[int, keras.Variable] = {}
        self.updated: dict[int, keras.Variable] = {}
        if not losses:
            self.losses = _UndefinedLosses()


class _UndefinedLosses(list):
    """In the place of a scope's losses where reading them means nothing."""

    def __iter__(self) -> Iterator[Any]:
        raise StepError(
            "`model.losses` was read outside of `forward`. The losses of "
            "`add_loss` and of regularizers belong to one forward pass: read "
            "them in the function that you give to legato.value_and_grad."
        )


def split_outputs(returned: Any) -> tuple[Any, list[Any] | None]:
    """The logs that a step returned, and what goes to the host beside them."""
    return returned if isinstance(returned, tuple) else (returned, None)


def steps_with_outputs(num_bytes: int, operands: Any) -> int:
    """How many steps with outputs fit in a call.

    Args:
        num_bytes: of one step's outputs.
        operands: of a chunk.
    """
    capacity: int = keras.tree.flatten(operands)[0].shape[0]
    return max(1, min(capacity, _OUTPUT_BYTES // max(num_bytes, 1)))


def kept_variables(
    keeping: Keeping | None,
    updated: Sequence[keras.Variable],
    operands: Any,
) -> list[keras.Variable] | None:
    """Those that a loop keeps; see `CompiledLoop.kept`.

    Args:
        keeping: what it was asked to.
        updated: those that it writes.
        operands: of a chunk.
    """
    wanted = keeping and keeping.variables()
    if keeping is None or wanted is None:
        return None
    written = set(map(id, updated))
    found = [v for v in wanted if id(v) in written]
    num_bytes = sum(8 * math.prod(v.shape) for v in found)
    capacity: int = keras.tree.flatten(operands)[0].shape[0]
    times = capacity // keeping.every + 2  # with the ends of the call
    return found if times * num_bytes <= _KEPT_BYTES else None


def columns_of(variables: Sequence[keras.Variable]) -> Columns | None:
    """How logs hold the bits of these variables.

    None if there are none, or not all of them are single numbers.
    """
    dtypes = [_held_dtype(v) for v in variables]
    are_numbers = all(v.shape == () for v in variables)
    if not dtypes or not are_numbers or not COLUMNS.keys() >= set(dtypes):
        return None
    return Columns(dtypes)


def _held_dtype(variable: keras.Variable) -> str:
    """That of the memory: JAX keeps a float64 in 32 bits, for example."""
    return keras.backend.standardize_dtype(initial_value(variable).dtype)


def own_dtype(variable: keras.Variable) -> str:
    """The dtype a variable is stored in."""
    # `variable.dtype` is what autocasting makes of it, in a layer's call.
    return variable._dtype


def initial_value(variable: keras.Variable) -> Any:
    """The concrete value, or for one not yet initialised a stand-in."""
    # `variable.value` would ask the scope again, and cast.
    if variable._value is not None:
        return variable._value
    return variable._initializer(variable.shape, dtype=own_dtype(variable))


def refuse_new_variables(made: list[keras.Variable]) -> NoReturn:
    """Raise for a step that makes variables each time it runs.

    Raises:
        StepError: always.
    """
    names = ", ".join(v.path for v in made[:3])
    raise StepError(
        f"The step makes new variables each time it runs ({names}). Make "
        "variables, layers, metrics and SeedGenerators once, in the Task's "
        "__init__ or build_model, and use them in the step."
    )
