"""What no device takes: strings, dates, objects.

They travel beside the arrays of a chunk, and never to the device. In a step a
`HostValue` stands for each, which can only be passed on: to host metrics, and
to a Task's `aggregate_logs`.
"""

import contextlib
import copy
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import keras
import numpy as np

from legato.data.encoding import CannotEncodeError, decode, encode
from legato.data.source import DataState
from legato.data.structure import Structure
from legato.errors import DamagedError, StepError
from legato.workers.collating import is_numeric, of_objects
from legato.workers.recipe import PLAIN

_KINDS = {
    "U": "strings",
    "T": "strings",
    "S": "bytes",
    "M": "dates",
    "m": "durations",
    "O": "objects",
    "V": "records",
}

# By value, in a checkpoint: those whose bytes are all of them.
_SAVED_DTYPE = re.compile(r"[<>|]([SU]\d+|[Mm]8(\[\w+\])?)")

_ARRAY = "~beside"
"""Stands alone in a dict, for an array among objects. (`encode` knows none.)"""


def stays_on_host(dtype: np.dtype) -> bool:
    """Whether a device takes no array of this dtype."""
    return not is_numeric(dtype)


def what_holds(dtype: np.dtype) -> str:
    """What arrays of a dtype that stays on the host hold, in a word."""
    return _KINDS[dtype.kind]


def gathered(nested: Any) -> Any:
    """Lists and tuples of strings as arrays, `[strings]`, of objects.

    So loaders leave them that make batches of examples.
    """
    if isinstance(nested, dict):
        return _rebuilt(nested, {k: gathered(v) for k, v in nested.items()})
    if not isinstance(nested, list | tuple):
        return nested
    if nested and all(isinstance(each, str | bytes) for each in nested):
        return of_objects(nested)
    return _rebuilt(nested, [gathered(each) for each in nested])


def without(nested: Any) -> Any:
    """A batch, or a part of one, without what stays on the host in dicts."""
    if isinstance(nested, dict):
        kept = {
            key: without(each)
            for key, each in nested.items()
            if not isinstance(each, HostValue)
        }
        return _rebuilt(nested, kept)
    if isinstance(nested, list | tuple):
        return _rebuilt(nested, [without(each) for each in nested])
    return nested


def _rebuilt(nested: Any, parts: Any) -> Any:
    """A dict, list or tuple with other parts; itself if they are the same."""
    if len(parts) == len(nested):
        before = nested.values() if isinstance(nested, dict) else nested
        after = parts.values() if isinstance(nested, dict) else parts
        if all(a is b for a, b in zip(after, before, strict=True)):
            return nested
    if isinstance(nested, dict):
        return parts
    named = isinstance(nested, tuple) and hasattr(nested, "_fields")
    return type(nested)(*parts) if named else type(nested)(parts)


def owned(array: np.ndarray) -> np.ndarray:
    """A copy, of the objects in it too: the user's code may change them."""
    if not array.dtype.hasobject:
        return array.copy()
    found = np.empty(array.shape, object)
    for index, each in np.ndenumerate(array):
        is_plain = isinstance(each, PLAIN)
        found[index] = each if is_plain else copy.deepcopy(each)
    return found


class HostValue:
    """Stands in a step for what stays on the host; to be passed on alone.

    Whatever would make a tensor of it, raises a `StepError`.

    Attributes:
        index: which it is among those of its batch.
        holds: what it stands for, in a word.
    """

    __slots__ = ("_path", "holds", "index")

    def __init__(self, index: int, path: str, holds: str) -> None:
        self.index = index
        self._path = path
        self.holds = holds

    def __repr__(self) -> str:
        return f"<{self.holds} at {self._path!r}, on the host>"

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        # (What asks for the names of protocols asks everything.)
        if name.startswith("_"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StepError(
            f"A step used the {self.holds} at {self._path!r} of its batch as "
            "a tensor. No device takes them: a step can only pass them on, to "
            "host metrics (update_state) and to aggregate_logs. Turn them into "
            "numbers in the data (by a transform, or a dataset's map), or "
            "leave them out of what the model, the loss and other metrics get."
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        del func, types
        for leaf in keras.tree.flatten((args, kwargs or {})):
            if isinstance(leaf, cls):
                leaf._refuse()
        raise AssertionError("called for one of them")


_OPERATORS = (
    *("abs", "add", "and", "bool", "call", "contains", "divmod", "eq"),
    *("float", "floordiv", "ge", "getitem", "gt", "index", "int", "invert"),
    *("iter", "le", "len", "lshift", "lt", "matmul", "mod", "mul", "ne"),
    *("neg", "or", "pos", "pow", "radd", "rand", "rfloordiv", "rlshift"),
    *("rmatmul", "rmod", "rmul", "ror", "rpow", "rrshift", "rshift", "rsub"),
    *("rtruediv", "rxor", "setitem", "sub", "truediv", "xor"),
    # How NumPy, JAX and TensorFlow ask for a tensor.
    *("array", "jax_array", "tf_tensor"),
)
for _name in _OPERATORS:
    setattr(HostValue, f"__{_name}__", HostValue._refuse)


def placeholders(
    structure: Structure, leaves: Sequence[Any]
) -> list[HostValue | None]:
    """For each leaf of a batch what stands for it in a step; None: itself.

    Args:
        structure: of the batch.
        leaves: what has a dtype, for each.
    """
    found: list[HostValue | None] = []
    for path, leaf in zip(structure.paths(), leaves, strict=True):
        value = None
        if stays_on_host(leaf.dtype):
            index = sum(each is not None for each in found)
            value = HostValue(index, path, what_holds(leaf.dtype))
        found.append(value)
    return found


def merged(values: Sequence[HostValue | None], arrays: Sequence[Any]) -> list:
    """The leaves of a batch, from what stands for some and the others."""
    rest = iter(arrays)
    return [next(rest) if value is None else value for value in values]


def split(leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Those that a device takes, and those that stay.

    (None is what a checkpoint did not hold.)
    """
    device, host = [], []
    for leaf in leaves:
        stays = leaf is None or stays_on_host(leaf.dtype)
        (host if stays else device).append(leaf)
    return device, host


def saved(array: np.ndarray | None) -> DataState:
    """An array that stays on the host, for a checkpoint.

    None for objects that cannot be saved. (That is no loss: what a checkpoint
    holds of batches is for training, which never looks at them.)
    """
    if array is None:
        return None
    try:
        return _saved(array)
    except CannotEncodeError:
        return None


def _saved(array: np.ndarray) -> DataState:
    shape = list(array.shape)
    if _SAVED_DTYPE.fullmatch(array.dtype.str):
        held = np.frombuffer(array.tobytes(), np.uint8).copy()
        return {"dtype": array.dtype.str, "shape": shape, "bytes": held}
    if array.dtype.kind not in "OT":
        raise CannotEncodeError(f"it holds {what_holds(array.dtype)}")
    items = [
        {_ARRAY: _saved(each)}
        if isinstance(each, np.ndarray) and stays_on_host(each.dtype)
        else encode(each)
        for each in array.flat
    ]
    return {"shape": shape, "items": items}


def restored(state: DataState) -> np.ndarray | None:
    """What was given to `saved`.

    Raises:
        DamagedError: this is not what it returned.
    """
    match state:
        case None:
            return None
        case {
            "dtype": str(name),
            "shape": list(shape),
            "bytes": np.ndarray() as held,
        } if _SAVED_DTYPE.fullmatch(name) and _is_shape(shape):
            with contextlib.suppress(TypeError, ValueError):
                array = np.frombuffer(held.tobytes(), np.dtype(name))
                return array.reshape(shape).copy()
        case {"shape": list(shape), "items": list(items)} if _is_shape(
            shape
        ) and math.prod(shape) == len(items):
            array = np.empty(len(items), object)
            for index, item in enumerate(items):
                match item:
                    case {"~beside": dict(inner)}:
                        array[index] = restored(inner)
                    case _:
                        array[index] = decode(item)
            return array.reshape(shape)
    raise DamagedError("data state: not what stays on the host of a batch.")


def _is_shape(shape: list[Any]) -> bool:
    return all(type(size) is int and size >= 0 for size in shape)
