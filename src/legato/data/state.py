"""The state of an iterator, taken apart for a checkpoint and put together."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from legato.data.source import DataState
from legato.errors import DamagedError
from legato.types import JSON

# Stands in the tree for an array; reserved, like the key of floats in JSON.
_ARRAY_KEY = "~a"
_MAX_DEPTH = 60

# What the names of opaque arrays begin with.
OPAQUE = "opaque_"


class Opaque(np.ndarray):
    """An array whose bytes may differ where what it stands for does not.

    Such as what the threads of another library held ready at one instant. It
    is saved like any other, and not compared.
    """


def split_arrays(state: DataState) -> tuple[JSON, dict[str, np.ndarray]]:
    """Takes the arrays out of a state.

    Args:
        state: JSON values, and NumPy arrays as leaves.

    Returns:
        The JSON values, with `{"~a": name}` for each array, and the arrays
        by name (not copied).

    Raises:
        ValueError: a dict in it has the reserved key.
    """
    arrays: dict[str, np.ndarray] = {}

    def split(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            kind = OPAQUE if isinstance(value, Opaque) else "array_"
            name = f"{kind}{len(arrays)}"
            arrays[name] = value.view(np.ndarray)
            return {_ARRAY_KEY: name}
        if isinstance(value, dict):
            if _ARRAY_KEY in value:
                raise ValueError(f"the key {_ARRAY_KEY!r} is reserved")
            return {key: split(item) for key, item in value.items()}
        if isinstance(value, list):
            return [split(item) for item in value]
        return value

    return split(state), arrays


def join_arrays(state: JSON, arrays: Mapping[str, np.ndarray]) -> DataState:
    """Puts together what `split_arrays` took apart.

    Args:
        state: the JSON values, as they were read.
        arrays: the arrays, as they were read.

    Raises:
        DamagedError: an array is missing, or there is one too many, or the
            values are not what `split_arrays` gave.
    """
    rest = dict(arrays)

    def join(value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise DamagedError("data state: nested too deeply.")
        if isinstance(value, dict):
            if _ARRAY_KEY not in value:
                return {k: join(item, depth + 1) for k, item in value.items()}
            name = value[_ARRAY_KEY]
            if len(value) != 1 or not isinstance(name, str):
                raise DamagedError("data state: not the name of an array.")
            # Each is used once: `pop`.
            array = rest.pop(name, None)
            if not isinstance(array, np.ndarray):
                raise DamagedError(f"data state: no array {name!r:.80}.")
            return array.view(Opaque) if name.startswith(OPAQUE) else array
        if isinstance(value, list):
            return [join(item, depth + 1) for item in value]
        return value

    joined = join(state, 0)
    if rest:
        raise DamagedError(
            f"data state: {len(rest)} arrays belong to nothing, such as "
            f"{min(rest)!r:.80}."
        )
    return joined
