"""How examples become a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from legato.errors import ConfigError


class UnevenError(Exception):
    """An example does not go with the others of its batch.

    Args:
        position: which, within the batch.
        message: what it has, and the others; goes on from "example 17".
    """

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position
        self.message = message


def stack(examples: Sequence[Any]) -> Any:
    """A batch of examples that have the same structure, shapes and dtypes.

    Args:
        examples: nested structures of dicts, tuples and lists that hold
            arrays of any library, numbers, strings, other objects, or None. A
            list of numbers or strings is an array.

    Returns:
        The same structure with arrays of shape `[examples, ...]`. Strings and
        objects are in arrays of objects; arrays of them may differ in shape,
        and are each an element of one then.

    Raises:
        UnevenError: they are not the same.
    """
    return _combine(examples, _stacked, ())


class Pad:
    """Makes batches of examples whose arrays have different lengths.

    The length is an array's first axis. Each batch is as long as the longest
    example in it, or as the next of `boundaries` or `multiple`: then there
    are few shapes, each of which is compiled once.

    Args:
        values: what to fill up with: a number for all arrays that have an
            axis; or numbers nested as the examples are, where arrays at None,
            and at keys that are left out, are not padded.
        boundaries: the lengths that batches may have, ascending.
        multiple: batches have lengths that are multiples of it.
        truncate: cut off what is longer than the last boundary, instead of
            refusing it.
        mask: beside each padded array of a dict, add a boolean array
            `[batch, length]` under its key and "_mask": True where the
            example is.

    Raises:
        ConfigError: these do not go together.
    """

    def __init__(
        self,
        values: Any = 0,
        *,
        boundaries: Sequence[int] | None = None,
        multiple: int | None = None,
        truncate: bool = False,
        mask: bool = False,
    ) -> None:
        self.boundaries = None if boundaries is None else list(boundaries)
        if self.boundaries is not None and (
            not self.boundaries
            or self.boundaries != sorted(set(self.boundaries))
            or self.boundaries[0] < 1
        ):
            raise ConfigError(
                f"boundaries={boundaries!r}: they must be lengths of at least "
                "1, each above the one before."
            )
        if multiple is not None and multiple < 1:
            raise ConfigError(f"multiple={multiple}: it must be at least 1.")
        if multiple is not None and boundaries is not None:
            raise ConfigError(
                "boundaries and multiple were both given: each says how long "
                "a batch is. Leave one out."
            )
        if truncate and boundaries is None:
            raise ConfigError(
                "truncate=True without boundaries: nothing is too long. Give "
                "boundaries, of which the last is the greatest length."
            )
        self.values = values
        self.multiple = multiple
        self.truncate = truncate
        self.mask = mask

    def __call__(self, examples: Sequence[Any]) -> Any:
        """The batch of these examples.

        Raises:
            UnevenError: one is too long, or they differ in more than lengths.
        """
        found = _combine(examples, self._leaf, (), self.values)
        _refuse_mask(found, ())
        return found

    def __repr__(self) -> str:
        given = {
            name: value
            for name, value in vars(self).items()
            if value not in (None, False)
        }
        return f"Pad({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def _leaf(self, values: Sequence[Any], path: tuple, fill: Any) -> Any:
        if fill is None:
            return _stacked(values, path, None)
        arrays = _arrays(values, path)
        first = arrays[0]
        if not is_numeric(first.dtype):
            return _stacked(values, path, None)
        if first.ndim == 0:
            if not _is_number(self.values):
                raise UnevenError(
                    0, f"has a single number at {_shown(path)}: it has no "
                    "length to be padded. Leave it out of Pad's values."
                )  # fmt: skip
            return _stacked(values, path, None)
        for position, array in enumerate(arrays):
            if array.ndim != first.ndim or array.shape[1:] != first.shape[1:]:
                raise UnevenError(
                    position,
                    f"has the shape {array.shape} at {_shown(path)}, and the "
                    f"first of its batch {first.shape}: only lengths, the "
                    "first axis, may differ.",
                )
        lengths = [len(array) for array in arrays]
        length = self._length(lengths, path)
        filled = np.array(fill).astype(first.dtype)
        if filled != fill and fill == fill:
            raise UnevenError(
                0, f"has {first.dtype} at {_shown(path)}, which cannot hold "
                f"the value {fill!r} that Pad is to fill up with."
            )  # fmt: skip
        shape = (len(arrays), length, *first.shape[1:])
        out = np.full(shape, filled, first.dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array[:length]
        if not self.mask:
            return out
        return _Masked(out, np.arange(length) < np.array(lengths)[:, None])

    def _length(self, lengths: list[int], path: tuple) -> int:
        longest = max(lengths)
        if self.multiple is not None:
            return -(-max(longest, 1) // self.multiple) * self.multiple
        if self.boundaries is None:
            return longest
        for boundary in self.boundaries:
            if longest <= boundary:
                return boundary
        if self.truncate:
            return self.boundaries[-1]
        raise UnevenError(
            lengths.index(longest),
            f"has the length {longest} at {_shown(path)}, above the last of "
            f"boundaries={self.boundaries}. Add a longer one, or cut it off "
            "with truncate=True.",
        )


class _Masked:
    """A padded array and its mask, until they lie in a dict."""

    def __init__(self, array: np.ndarray, mask: np.ndarray) -> None:
        self.array = array
        self.mask = mask


def _refuse_mask(found: Any, path: tuple) -> None:
    if isinstance(found, _Masked):
        raise UnevenError(
            0, f"has no name for the mask of the array at {_shown(path)}: "
            "with mask=True, padded arrays must be values of a dict."
        )  # fmt: skip
    if isinstance(found, tuple | list):
        for key, value in enumerate(found):
            _refuse_mask(value, (*path, key))


Leaf = Callable[[Sequence[Any], tuple, Any], Any]


def _combine(
    values: Sequence[Any], leaf: Leaf, path: tuple, fills: Any = None
) -> Any:
    """Goes down into all examples at once.

    Args:
        values: what the examples hold at `path`.
        leaf: makes an array of what is no dict, tuple or list; gets the
            values, the path, and what `fills` has there.
        path: keys and positions.
        fills: a number for all leaves, or nested like the examples.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return _combine_dicts(values, leaf, path, fills)
    if isinstance(first, tuple) or (
        isinstance(first, list) and not _is_array(first)
    ):
        if len({*map(type, values)}) > 1 or len({*map(len, values)}) > 1:
            position, value = next(
                (i, each)
                for i, each in enumerate(values)
                if type(each) is not type(first) or len(each) != len(first)
            )
            raise _nested_otherwise(position, value, first, path)
        parts = [
            _combine(column, leaf, (*path, i), _below(fills, i, first, path))
            for i, column in enumerate(zip(*values, strict=True))
        ]
        named = isinstance(first, tuple) and hasattr(first, "_fields")
        return type(first)(*parts) if named else type(first)(parts)
    if first is None:
        for position, value in enumerate(values):
            if value is not None:
                raise _nested_otherwise(position, value, first, path)
        return None
    return leaf(values, path, fills)


def _combine_dicts(
    values: Sequence[Any], leaf: Leaf, path: tuple, fills: Any
) -> dict:
    first = values[0]
    for position, value in enumerate(values):
        if not isinstance(value, Mapping) or value.keys() != first.keys():
            raise _nested_otherwise(position, value, first, path)
    found = {}
    for key in first:
        part = _combine(
            [value[key] for value in values],
            leaf,
            (*path, key),
            _below(fills, key, first, path),
        )
        if isinstance(part, _Masked):
            name = f"{key}_mask"
            if name in first:
                raise UnevenError(
                    0, f"has {name!r} at {_shown(path)} already: Pad's mask "
                    "would take its place. Rename it, or leave mask out."
                )  # fmt: skip
            found[name] = part.mask
            part = part.array
        found[key] = part
    return found


def _below(fills: Any, key: Any, first: Any, path: tuple) -> Any:
    if fills is None or _is_number(fills):
        return fills
    if isinstance(first, Mapping) and isinstance(fills, Mapping):
        return fills.get(key)
    both = isinstance(fills, tuple | list) and isinstance(first, tuple | list)
    if both and len(fills) == len(first):
        return fills[key]
    raise UnevenError(
        0, f"is not nested as Pad's values are: at {_shown(path)} it has a "
        f"{type(first).__name__}, and they have {fills!r:.80}."
    )  # fmt: skip


def _stacked(values: Sequence[Any], path: tuple, _: Any = None) -> np.ndarray:
    stacked = _alike(values)
    if stacked is not None:
        return stacked
    arrays = _arrays(values, path)
    first = arrays[0]
    for position, array in enumerate(arrays):
        if array.shape != first.shape:
            if not is_numeric(first.dtype):
                return of_objects(arrays)
            raise UnevenError(
                position,
                f"has the shape {array.shape} at {_shown(path)}, and the "
                f"first of its batch {first.shape}. Make them the same in the "
                "dataset or in a transform, or pad them: "
                "collate=legato.Pad().",
            )
    return np.stack(arrays)


def _alike(values: Sequence[Any]) -> np.ndarray | None:
    """The quick way for what is most usual; None where it is not that."""
    first, kinds = values[0], {*map(type, values)}
    if kinds == {np.ndarray}:
        shapes = {value.shape for value in values}
        if len(shapes) > 1 or len({value.dtype for value in values}) > 1:
            return None
        # (A third of the time that `np.stack` takes. Into an array of ours, or
        # its axes would lie as the examples' do, its bytes as the machine's.)
        out = np.empty((len(values), *first.shape), first.dtype)
        if first.ndim:
            rows = len(values) * len(first), *first.shape[1:]
            np.concatenate(values, out=out.reshape(rows))
        else:
            for row, value in enumerate(values):
                out[row] = value
        return out
    if len(kinds) == 1 and _is_number(first):
        return np.array(values)
    if len(kinds) == 1 and isinstance(first, str | bytes):
        return of_objects(values)
    return None


def of_objects(values: Sequence[Any]) -> np.ndarray:
    """An array of objects, `[values]`."""
    # (An array of strings would lose zeros at the end of each.)
    out = np.empty(len(values), object)
    for index, value in enumerate(values):
        out[index] = value
    return out


def is_numeric(dtype: np.dtype) -> bool:
    """Whether it is one of numbers, and not of strings, dates or objects."""
    # (bfloat16 and its like are of kind "V" for NumPy.)
    return dtype.kind in "biufc" or "float" in dtype.name


def _arrays(values: Sequence[Any], path: tuple) -> list[np.ndarray]:
    """Arrays of one dtype."""
    arrays = [_as_array(value, i, path) for i, value in enumerate(values)]
    dtype = next((a.dtype for a in arrays if a.size), arrays[0].dtype)
    for position, array in enumerate(arrays):
        if array.dtype == dtype or array.dtype.kind == dtype.kind in "US":
            continue
        if array.size:
            raise UnevenError(
                position,
                f"has {array.dtype} at {_shown(path)}, and others of its "
                f"batch {dtype}. Give the same in every example.",
            )
        # (An empty list of numbers has no dtype of its own.)
        arrays[position] = array.astype(dtype)
    return arrays


def _as_array(value: Any, position: int, path: tuple) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str | bytes):
        return of_objects([value]).reshape(())
    if value is None or isinstance(value, Mapping):
        raise UnevenError(
            position,
            f"has a {type(value).__name__} at {_shown(path)}, and the first "
            "of its batch an array or a number. Give the same in every "
            "example.",
        )
    try:
        array = np.asarray(value)
        if array.dtype.kind in "US" and isinstance(value, list):
            array = np.array(value, object)
        return array
    except Exception as error:
        raise UnevenError(
            position,
            f"has a {type(value).__name__} at {_shown(path)} that is no "
            f"array: {error}. Turn it into one in a transform.",
        ) from error


def _is_array(value: list) -> bool:
    """Whether a list is an array of numbers or strings, and no structure."""
    return all(
        _is_number(each)
        or isinstance(each, str | bytes)
        or (isinstance(each, list) and _is_array(each))
        for each in value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def _nested_otherwise(
    position: int, value: Any, first: Any, path: tuple
) -> UnevenError:
    return UnevenError(
        position,
        f"has {_kind(value)} at {_shown(path)}, and the first of its batch "
        f"{_kind(first)}. Give the same structure in every example.",
    )


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _shown(path: tuple) -> str:
    return ".".join(map(str, path)) or "its top"
