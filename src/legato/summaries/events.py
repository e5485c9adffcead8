"""TensorBoard's event files: their framing, and what is in them.

tensorboardX's own writer hands events to a thread, and its `flush` does not
wait for that: what a checkpoint counts as written could be lost. Its protocol
buffers are used, and the bytes are written here.
"""

import functools
import itertools
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from crc32c import crc32c

from legato import storage
from legato.errors import DamagedError

# One file for the whole run, whatever number of processes write it: files
# named by the second, as usual, can meet, and sort wrongly when a clock is
# set back.
EVENTS = "events.out.tfevents.legato"
"""How the names of event files begin."""

_HEAD = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_DOUBLE = struct.Struct("<d")
_FIRST = b"\x1a\x0dbrain.Event:2"
_NOT_IN_TAGS = re.compile(r"[^-/\w.]")


@functools.cache
def protos() -> SimpleNamespace:
    """The protocol buffers.

    Imported late: where torch is installed, tensorboardX imports it.
    """
    from tensorboardX.proto import event_pb2, summary_pb2

    names: Any = (event_pb2, summary_pb2)
    return SimpleNamespace(
        Event=names[0].Event,
        Summary=names[1].Summary,
        Value=names[1].Summary.Value,
        Image=names[1].Summary.Image,
        Histogram=names[1].HistogramProto,
    )


@functools.lru_cache(4096)
def clean_tag(name: str) -> str:
    """A name as TensorBoard takes it."""
    return _NOT_IN_TAGS.sub("_", name).lstrip("/")


def scalar_values(scalars: Iterable[tuple[str, float]]) -> list[Any]:
    """The values of an event for some scalars."""
    value = protos().Value
    return [
        value(tag=clean_tag(name), simple_value=number)
        for name, number in scalars
    ]


def scalar_summary(scalars: Mapping[str, float]) -> bytes:
    """The summary of an event for some scalars, serialised.

    The same bytes as of a `Summary` of `scalar_values`, ten times as quick,
    and without protocol buffers, whose import takes seconds (see `protos`).
    """
    pack, heads = _scalars_form(tuple(scalars))
    numbers = scalars.values()
    try:
        return pack(*itertools.chain(*zip(heads, numbers, strict=True)))
    except OverflowError:  # beyond float32 it is infinite
        with np.errstate(over="ignore"):
            single = [float(np.float32(number)) for number in numbers]
        return pack(*itertools.chain(*zip(heads, single, strict=True)))


@functools.lru_cache(256)
def _scalars_form(
    names: tuple[str, ...],
) -> tuple[Callable[..., bytes], list[bytes]]:
    """How numbers of these names are packed, and what stands before each.

    By the numbers of the fields: a summary's 1 is a value, whose 1 is its tag
    and whose 2 the number.
    """
    heads = []
    for name in names:
        tag = clean_tag(name).encode()
        value = b"".join([b"\x0a", _varint(len(tag)), tag, b"\x15"])
        heads.append(b"".join([b"\x0a", _varint(len(value) + 4), value]))
    form = "".join(f"{len(head)}sf" for head in heads)
    return struct.Struct(f"<{form}").pack, heads


def _event(wall_time: float, step: int, summary: bytes) -> bytes:
    """An event, serialised: its fields by their numbers."""
    fields = [b"\x09", _DOUBLE.pack(wall_time)]
    if step:
        fields += [b"\x10", _varint(step)]
    return b"".join([*fields, b"\x2a", _varint(len(summary)), summary])


def _varint(number: int) -> bytes:
    """A number as protocol buffers have it: seven bits a byte."""
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    digits.append(number)
    return bytes(digits)


class EventFile(storage.RecordFile):
    """An event file that can be rewound.

    Where it was there before, and is not rewound, an event that a kill left
    torn is cut off before the first one is added.

    Args:
        path: see `storage.RecordFile`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._is_whole = self.offset == 0
        self._is_ready = False  # whole, and begun

    def write(self, wall_time: float, step: int, values: list[Any]) -> None:
        """Add an event, in memory.

        Raises:
            DamagedError: the file is none of events.
        """
        summary = protos().Summary(value=values)
        self.write_summary(wall_time, step, summary.SerializeToString())

    def write_summary(
        self, wall_time: float, step: int, summary: bytes
    ) -> None:
        """Add an event, in memory, whose summary is serialised already.

        Raises:
            DamagedError: the file is none of events.
        """
        if not self._is_ready:
            self._make_ready(wall_time)
        # One event for all values: each is framed and hashed by itself.
        self._add(_event(wall_time, step, summary))

    def _make_ready(self, wall_time: float) -> None:
        if not self._is_whole:
            self.truncate_to(_whole_size(self._path))
        if self.offset == 0:
            # The wall time (field 1) and the version of the file (field 3).
            self._add(b"\x09" + _DOUBLE.pack(wall_time) + _FIRST)
        self._is_ready = True

    def _add(self, data: bytes) -> None:
        """In the framing of TFRecord files: length, its CRC, data, its CRC."""
        crc = _CRC.pack(masked_crc32c(data))
        self.append_bytes(b"".join((_head(len(data)), data, crc)))

    def truncate_to(self, offset: int) -> None:
        """See `storage.RecordFile`."""
        super().truncate_to(offset)
        self._is_whole, self._is_ready = True, False


def masked_crc32c(data: bytes) -> int:
    """The checksum as it stands in event files."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.lru_cache(256)
def _head(size: int) -> bytes:
    return _HEAD.pack(size, masked_crc32c(size.to_bytes(8, "little")))


def _whole_size(path: Path) -> int:
    """The size without a torn last event."""
    whole = 0
    with storage.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while whole + _HEAD.size + _CRC.size <= size:
            file.seek(whole)
            length, crc = _HEAD.unpack(file.read(_HEAD.size))
            if crc != masked_crc32c(length.to_bytes(8, "little")):
                raise DamagedError(
                    f"{path}: at byte {whole} begins no event: the file is "
                    "damaged, or something else. Move it away."
                )
            end = whole + _HEAD.size + length + _CRC.size
            if end > size:
                break
            whole = end
    return whole
