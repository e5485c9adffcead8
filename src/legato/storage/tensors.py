"""Arrays as the bytes of a safetensors file, in a buffer that is used again.

A `TensorLayout` fixes once where each array lies; a `TensorArena` is one
buffer with exactly the bytes of the file, into which arrays are copied. So
saving costs the training thread one copy into warm memory, and a background
thread hashes and writes that same buffer.

The header is a function of the names, dtypes and shapes alone. The reader
therefore computes it from the tree in the manifest and compares the bytes: it
never parses a header that a file supplies, the dtypes are the manifest's by
construction, and a header that claims terabytes is just a header that differs.
The files are ordinary safetensors files, which the library reads.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from legato.errors import CheckpointError, DamagedError
from legato.storage import strict_json
from legato.storage.files import BLOCK

# dtypes by their NumPy name, and what safetensors calls them. The rest goes as
# plain bytes ("U8"); the manifest keeps the true name.
_NATIVE = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_EXTENDED = [
    np.dtype(t)
    for t in vars(ml_dtypes).values()
    if isinstance(t, type) and issubclass(t, np.generic)
]
_DTYPES = {
    d.name: d
    for d in [*_EXTENDED, *map(np.dtype, [*_NATIVE, "complex64", "complex128"])]
}

_BY_NATIVE = {native: _DTYPES[key] for key, native in _NATIVE.items()}

# Data begin at a multiple of this, so that no array needs an unaligned copy.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # in the file
    end: int


class TensorLayout:
    """Where each array lies in the file.

    Args:
        specs: names, and each one's dtype (a `numpy.dtype`, or its name) and
            shape.

    Attributes:
        entries: name -> dtype, shape and place.
        header: the first bytes of the file.
        size: the size of the file.

    Raises:
        CheckpointError: if a dtype, a shape or a name cannot be stored.
    """

    def __init__(self, specs: Mapping[str, tuple[Any, tuple[int, ...]]]):
        checked = {
            name: (_storable(name, dtype), _shape(name, shape))
            for name, (dtype, shape) in specs.items()
        }
        # The format allows no gaps. Sizes of items are powers of two, so in
        # descending order every array is aligned to its own.
        order = sorted(
            checked, key=lambda name: (-checked[name][0].itemsize, name)
        )
        described: dict[str, Any] = {}
        places = {}
        offset = 0
        for name in order:
            dtype, shape = checked[name]
            begin, offset = offset, offset + math.prod(shape) * dtype.itemsize
            places[name] = (begin, offset)
            native = _NATIVE.get(dtype.name)
            wide = native is None and dtype.itemsize > 1
            described[name] = {
                "dtype": native or "U8",
                "shape": (*shape, dtype.itemsize) if wide else shape,
                "data_offsets": [begin, offset],
            }
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        start = len(self.header)
        self.size = start + offset
        self.entries = {
            name: _Entry(
                dtype=dtype,
                shape=shape,
                begin=start + places[name][0],
                end=start + places[name][1],
            )
            for name, (dtype, shape) in checked.items()
        }

    def fits(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether these arrays have the names, dtypes and shapes of this."""
        entries = self.entries
        if len(arrays) != len(entries):
            return False
        for name, array in arrays.items():
            entry = entries.get(name)
            if entry is None or array.shape != entry.shape:
                return False
            if array.dtype != entry.dtype and _native(array) != entry.dtype:
                return False
        return True

    def tree(self) -> dict[str, Any]:
        """The names, dtypes and shapes as JSON, for a manifest."""
        return {
            name: [entry.dtype.name, list(entry.shape)]
            for name, entry in self.entries.items()
        }

    def views(self, buffer: Any) -> dict[str, np.ndarray]:
        """The arrays in a buffer with the bytes of the file; no copies."""
        return {
            name: np.frombuffer(
                buffer,
                entry.dtype,
                count=math.prod(entry.shape),
                offset=entry.begin,
            ).reshape(entry.shape)
            if entry.end > entry.begin
            else np.empty(entry.shape, entry.dtype)
            for name, entry in self.entries.items()
        }


class TensorArena:
    """One buffer that holds the bytes of a safetensors file.

    The first copy into fresh memory costs about ten times the later ones (the
    kernel must find the pages): keep an arena, and use it again.

    Attributes:
        layout: where each array lies.
        buffer: all bytes of the file, from where a disk can read them.
    """

    def __init__(self, layout: TensorLayout):
        self.layout = layout
        self.buffer = _in_blocks(layout.size)
        header = layout.header
        self.buffer[: len(header)] = np.frombuffer(header, np.uint8)
        self._views = layout.views(self.buffer)

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copies arrays that fit the layout; any order, strides and endian."""
        views = self._views
        for name, array in arrays.items():
            # One thread: a second gained nothing where it was measured (the
            # memory is the limit).
            np.copyto(views[name], array, casting="equiv")


def _in_blocks(size: int) -> np.ndarray:
    """Memory that a disk can read itself."""
    whole = np.empty(size + BLOCK, np.uint8)
    begin = -whole.ctypes.data % BLOCK
    return whole[begin : begin + size]


def spec(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of arrays, to make a layout of."""
    return {name: (_native(a), a.shape) for name, a in arrays.items()}


def parse_tree(tree: Any, *, name: str) -> TensorLayout:
    """The layout that a manifest's tree (see `TensorLayout.tree`) describes.

    Raises:
        DamagedError: if it is not such a tree.
    """
    try:
        return TensorLayout(
            {key: (d, tuple(s)) for key, (d, s) in tree.items()}
        )
    except (CheckpointError, TypeError, ValueError, AttributeError) as e:
        raise DamagedError(f"{name}: not a tree of arrays: {e}") from e


def read_tensors(
    buffer: Any, layout: TensorLayout, *, name: str
) -> dict[str, np.ndarray]:
    """The arrays in the bytes of a file, as views into them.

    Args:
        buffer: the bytes; already checked against a hash.
        layout: what the manifest says is in them.
        name: the file, for the message.

    Raises:
        DamagedError: if the file holds anything else.
    """
    size = memoryview(buffer).nbytes
    if size != layout.size:
        raise DamagedError(
            f"{name}: {size} bytes, but the arrays in the manifest take "
            f"{layout.size}"
        )
    if bytes(memoryview(buffer)[: len(layout.header)]) != layout.header:
        raise DamagedError(
            f"{name}: its header does not list the arrays in the manifest"
        )
    return layout.views(buffer)


def read_safetensors(buffer: bytes, *, name: str) -> dict[str, np.ndarray]:
    """The arrays in a safetensors file of others, as views into it.

    Such a file comes without a manifest, so its header has to be read. Nothing
    that it claims is believed: all must lie within the file.

    Args:
        buffer: the bytes of the file.
        name: the file, for the message.

    Raises:
        DamagedError: if it is not such a file.
    """
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or length > len(buffer) - 8:
        raise DamagedError(f"{name}: not a safetensors file")
    header = strict_json.loads(buffer[8 : 8 + length], name=name)
    if not isinstance(header, dict):
        raise DamagedError(f"{name}: its header is not an object")
    body = memoryview(buffer)[8 + length :]
    arrays = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        match entry:
            case {
                "dtype": str(native),
                "shape": list(shape),
                "data_offsets": [int(begin), int(end)],
            } if native in _BY_NATIVE and all(
                type(n) is int and n >= 0 for n in shape
            ):
                dtype = _BY_NATIVE[native]
            case _:
                raise DamagedError(f"{name}: the entry of {key!r} is damaged")
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= begin <= end <= len(body) or end - begin != size:
            raise DamagedError(f"{name}: the place of {key!r} is damaged")
        arrays[key] = np.frombuffer(body[begin:end], dtype).reshape(shape)
    return arrays


def _native(array: np.ndarray) -> np.dtype:
    """The dtype in this machine's byte order."""
    dtype = array.dtype
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _storable(name: str, dtype: Any) -> np.dtype:
    # Not `np.dtype(dtype)` of a string: a file could then name structures.
    key = dtype if isinstance(dtype, str) else dtype.name
    if key not in _DTYPES:
        raise CheckpointError(
            f"the array {name!r} has the dtype {str(key)[:40]!r}, which cannot "
            "be stored; numbers and bool can"
        )
    if name == "__metadata__":
        raise CheckpointError(
            "'__metadata__' is no name for an array: safetensors reserves it"
        )
    return _DTYPES[key]


def _shape(name: str, shape: tuple[Any, ...]) -> tuple[int, ...]:
    if len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(
            f"the array {name!r} has the shape {str(shape)[:80]}, which is none"
        )
    return shape
