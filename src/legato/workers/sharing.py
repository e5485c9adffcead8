"""Memory that two processes share, and that no name can leak.

A file without a name is gone when the last process that has it open is gone,
however that ended.
"""

import mmap
import os
import pickle
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

_ALIGNMENT = 64  # of arrays: a cache line
_GROWTH = 2**20  # sizes are multiples of it, not to grow at each batch


class Written(NamedTuple):
    """Where a value lies in a `SharedFile`.

    Attributes:
        pickled: the value without its arrays.
        spans: the offset and size of each of them.
    """

    pickled: bytes
    spans: list[tuple[int, int]]


class SharedFile:
    """Values with arrays, written by one process and read by another.

    It grows with what is written. The arrays that are read lie in it: they
    change when something else is written.

    Args:
        descriptor: of a file from `anonymous_file`; stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def write(
        self,
        value: Any,
        dump: Callable[..., bytes] = pickle.dumps,
    ) -> Written:
        """Put a value in the place of the one before.

        Args:
            value: anything that can be pickled.
            dump: what pickles it.
        """
        buffers: list[pickle.PickleBuffer] = []
        pickled = dump(value, protocol=5, buffer_callback=buffers.append)
        raws = [buffer.raw() for buffer in buffers]
        spans, end = [], 0
        for raw in raws:
            spans.append((end, raw.nbytes))
            end += -(-raw.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end:
            view = self._mapped(end, grow=True)
            for raw, (start, size) in zip(raws, spans, strict=True):
                view[start : start + size] = raw
        return Written(pickled, spans)

    def read(self, written: Written, *, copy_on_write: bool = False) -> Any:
        """The value, whose arrays lie in this file.

        Args:
            written: what `write` returned, perhaps in another process.
            copy_on_write: what the reader changes in the arrays is its own.
        """
        end = max((start + size for start, size in written.spans), default=0)
        if not end:
            buffers = [memoryview(b"") for _ in written.spans]
        elif copy_on_write:
            private = mmap.mmap(self._descriptor, end, access=mmap.ACCESS_COPY)
            buffers = _cut(memoryview(private), written.spans)
        else:
            buffers = _cut(self._mapped(end, grow=False), written.spans)
        return pickle.loads(written.pickled, buffers=buffers)

    def _mapped(self, size: int, *, grow: bool) -> memoryview:
        if self._map is None or len(self._map) < size:
            if grow:
                size = -(-size // _GROWTH) * _GROWTH
                os.ftruncate(self._descriptor, size)
            # The map before goes when nothing lies in it any more.
            whole = os.fstat(self._descriptor).st_size
            self._map = mmap.mmap(self._descriptor, whole)
        return memoryview(self._map)


def anonymous_file() -> int:
    """The descriptor of a new file without a name, in memory if possible."""
    if hasattr(os, "memfd_create"):  # Linux
        return os.memfd_create("legato", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _cut(view: memoryview, spans: list[tuple[int, int]]) -> list[memoryview]:
    return [view[start : start + size] for start, size in spans]
