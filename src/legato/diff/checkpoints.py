"""Two checkpoints, array by array and value by value."""

import dataclasses
import enum
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from legato.checkpoint import Checkpoint

_SHOWN = 60  # characters of a value


class Absent(enum.Enum):
    """What is on one side only is compared with this."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent.ABSENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayDifference:
    """Two arrays of one dtype and shape whose bytes differ.

    Attributes:
        path: of the array, such as `model/dense/kernel`.
        dtype: of both.
        shape: of both.
        differing: how many elements have other bytes.
        size: how many elements there are.
        max_abs: the largest absolute difference between two finite elements;
            None where there is none, or no such thing.
        max_ulp: the largest difference in units in the last place: how many
            values of the dtype lie between the two; None likewise.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    differing: int
    size: int
    max_abs: float | None
    max_ulp: int | None

    def __str__(self) -> str:
        text = f"{self.differing:,} of {self.size:,} elements differ"
        if self.max_abs is not None:
            text += f", by at most {self.max_abs:.3g}"
        if self.max_ulp is not None:
            text += f" ({self.max_ulp:,} ULP)"
        return text

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueDifference:
    """Two values that differ.

    Attributes:
        path: of the value, such as `callbacks.EarlyStopping.0.wait`.
        before: the first one; `ABSENT` if there is none.
        after: the second one; likewise.
    """

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{_shortened(self.before)} -> {_shortened(self.after)}"

    def to_json(self) -> dict[str, Any]:
        """Its fields; what is absent is left out."""
        values = {"before": self.before, "after": self.after}
        return {
            "path": self.path,
            **{k: v for k, v in values.items() if v is not ABSENT},
        }


Difference = ArrayDifference | ValueDifference


# What a library's threads held ready at one instant: see `legato.data.state`.
_OPAQUE = "data/opaque_"


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """What differs: arrays first, then values, then opaque data.

    Args:
        a: the first.
        b: the second.

    Returns:
        A difference for each array and each value. Equal are the same bytes:
        two NaNs may differ, and 0.0 and -0.0 do. (Of what is known to vary
        without consequences, it is only said whether it is there.)
    """
    found: list[Difference] = []
    if a.step != b.step:
        found.append(ValueDifference(path="step", before=a.step, after=b.step))
    for path in dict.fromkeys((*a.arrays, *b.arrays)):
        if path.startswith(_OPAQUE) and path in a.arrays and path in b.arrays:
            continue
        found += compare_arrays(path, a.arrays.get(path), b.arrays.get(path))
    found += compare_values(a.host, b.host)
    for name in sorted({*a.data, *b.data}):
        ours, theirs = a.data.get(name, ABSENT), b.data.get(name, ABSENT)
        if ours != theirs:
            found.append(
                ValueDifference(
                    path=f"data/{name}",
                    before=_as_opaque(ours),
                    after=_as_opaque(theirs),
                )
            )
    return found


def compare_arrays(
    path: str, a: np.ndarray | None, b: np.ndarray | None
) -> list[Difference]:
    """What differs between two arrays of one path; None where one lacks it."""
    kinds = [
        ABSENT if array is None else f"{array.dtype}{list(array.shape)}"
        for array in (a, b)
    ]
    if a is None or b is None or kinds[0] != kinds[1]:
        return [ValueDifference(path=path, before=kinds[0], after=kinds[1])]
    ours, theirs = (np.ascontiguousarray(array).reshape(-1) for array in (a, b))
    differ = (_as_bytes(ours) != _as_bytes(theirs)).any(axis=1)
    count = int(np.count_nonzero(differ))
    if not count:
        return []
    ours, theirs = ours[differ], theirs[differ]
    finite = _are_finite(ours) & _are_finite(theirs)
    ours, theirs = ours[finite], theirs[finite]
    return [
        ArrayDifference(
            path=path,
            dtype=str(a.dtype),
            shape=a.shape,
            differing=count,
            size=a.size,
            max_abs=_max_abs(ours, theirs) if len(ours) else None,
            max_ulp=_max_ulp(ours, theirs) if len(ours) else None,
        )
    ]


def compare_values(a: Any, b: Any, path: str = "") -> Iterator[ValueDifference]:
    """What differs between two trees of JSON: the innermost values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            yield from compare_values(
                a.get(key, ABSENT), b.get(key, ABSENT), _join(path, str(key))
            )
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for k, (ours, theirs) in enumerate(zip(a, b, strict=True)):
            yield from compare_values(ours, theirs, _join(path, str(k)))
    elif _as_written(a) != _as_written(b):
        yield ValueDifference(path=path, before=a, after=b)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _as_written(value: Any) -> Any:
    """Something that is equal where the written bytes are."""
    if isinstance(value, float):
        return "float", value.hex()  # by which NaN equals NaN, and 0 not -0
    if isinstance(value, Mapping):
        return {k: _as_written(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_as_written(each) for each in value]
    return type(value), value  # True is not 1


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint8).reshape(len(array), array.dtype.itemsize)


def _is_float(dtype: np.dtype) -> bool:
    # (bfloat16 and the float8 types are "void" to NumPy.)
    return dtype.kind == "f" or (
        dtype.kind == "V" and "float" in dtype.name and dtype.itemsize <= 2
    )


def _are_finite(array: np.ndarray) -> np.ndarray:
    if _is_float(array.dtype) or array.dtype.kind == "c":
        return np.isfinite(array)
    return np.ones(len(array), bool)


def _max_abs(a: np.ndarray, b: np.ndarray) -> float | None:
    if a.dtype.kind in "iu":
        # Unsigned, so that the distance between extremes fits.
        distance = np.maximum(a, b) - np.minimum(a, b)
        return float(distance.view(f"u{a.dtype.itemsize}").max())
    if a.dtype.kind == "c":
        return float(np.abs(a - b).max())
    if _is_float(a.dtype):
        with np.errstate(over="ignore"):
            return float(np.abs(a.astype("f8") - b.astype("f8")).max())
    return None


def _max_ulp(a: np.ndarray, b: np.ndarray) -> int | None:
    """See `ArrayDifference`; 0.0 and -0.0 are one value."""
    if not _is_float(a.dtype):
        return None
    bits = 8 * a.dtype.itemsize
    sign = np.uint64(1 << (bits - 1))
    raw = [x.view(f"u{a.dtype.itemsize}").astype("u8") for x in (a, b)]
    (sign_a, size_a), (sign_b, size_b) = ((x & sign, x & ~sign) for x in raw)
    apart = np.where(
        sign_a == sign_b,
        np.maximum(size_a, size_b) - np.minimum(size_a, size_b),
        size_a + size_b,
    )
    return int(apart.max())


def _as_opaque(data: Any) -> Any:
    if data is ABSENT:
        return data
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
