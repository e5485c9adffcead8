"""The states that other libraries' iterators tell, as states of ours.

They are dicts, tuples, bytes, tensors: whatever their authors chose. All come
back as they were. What a file holds decides on none but the types listed
here, of which none runs code when it is made.
"""

import hashlib
import sys
from typing import Any

import numpy as np

from legato.data.source import DataState
from legato.data.state import split_arrays
from legato.errors import DamagedError
from legato.storage import strict_json
from legato.workers.collating import is_numeric

# Each stands alone in a dict, for what JSON has no word for. (Other dicts
# with a key that begins so are written as pairs.)
_TUPLE, _BYTES, _PAIRS, _SCALAR, _TENSOR = (
    *("~tuple", "~bytes", "~pairs"),
    *("~scalar", "~tensor"),
)


class CannotEncodeError(Exception):
    """A state holds something that cannot be saved; the message says what."""


def encode(value: Any, where: str = "its state") -> DataState:
    """A state as JSON values and NumPy arrays, which are copies.

    Args:
        value: None, bool, int, float, str, bytes, NumPy arrays and scalars,
            PyTorch tensors, and dicts, lists and tuples of them, of exactly
            these types.
        where: its place, for the message.

    Raises:
        CannotEncodeError: it is something else.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return _encode_all(value, where)
    if kind is tuple:
        return {_TUPLE: _encode_all(value, where)}
    if kind is dict:
        plain = all(type(key) is str and key[:1] != "~" for key in value)
        items = [
            (key, encode(item, f"{where}[{key!r:.40}]"))
            for key, item in value.items()
        ]
        if plain:
            return dict(items)
        return {_PAIRS: [[encode(k, f"a key of {where}"), v] for k, v in items]}
    if kind is bytes:
        return {_BYTES: np.frombuffer(value, np.uint8).copy()}
    if kind is np.ndarray and is_numeric(value.dtype):
        return value.copy()
    if isinstance(value, np.generic) and is_numeric(value.dtype):
        return {_SCALAR: np.asarray(value)}
    tensor: Any = value
    torch: Any = sys.modules.get("torch")
    if torch is not None and kind is torch.Tensor and not tensor.requires_grad:
        return {_TENSOR: tensor.cpu().numpy().copy()}
    raise CannotEncodeError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which is "
        "neither a JSON value, bytes, an array nor a tensor"
    )


def _encode_all(values: Any, where: str) -> list[DataState]:
    return [encode(v, f"{where}[{i}]") for i, v in enumerate(values)]


def decode(state: DataState) -> Any:
    """What was given to `encode`.

    Raises:
        DamagedError: this is not what it returned.
    """
    if isinstance(state, list):
        return [decode(item) for item in state]
    if not isinstance(state, dict):
        return state
    if not any(key[:1] == "~" for key in state):
        return {key: decode(item) for key, item in state.items()}
    if len(state) > 1:
        state = {"~": None}
    match state:
        case {"~tuple": list(items)}:
            return tuple(decode(item) for item in items)
        case {"~bytes": np.ndarray() as array} if array.dtype == np.uint8:
            return array.tobytes()
        case {"~scalar": np.ndarray() as array} if array.ndim == 0:
            return array[()]
        case {"~tensor": np.ndarray() as array} if "torch" in sys.modules:
            torch: Any = sys.modules["torch"]
            return torch.from_numpy(array.copy())
        case {"~pairs": list(pairs)}:
            return dict(_pair(pair) for pair in pairs)
    raise DamagedError("data state: not what a library's state was saved as.")


def _pair(pair: Any) -> tuple[Any, Any]:
    match pair:
        case [key, value]:
            key = decode(key)
            try:
                hash(key)
            except TypeError:
                raise DamagedError("data state: a key is none.") from None
            return key, decode(value)
    raise DamagedError("data state: not the pairs of a dict.")


def fingerprint(state: DataState) -> str:
    """Tells states apart, as `encode` returns them."""
    tree, arrays = split_arrays(state)
    found = hashlib.sha256(strict_json.dumps(tree))
    for array in arrays.values():
        found.update(repr((array.dtype.name, array.shape)).encode())
        found.update(array.tobytes())
    return found.hexdigest()
