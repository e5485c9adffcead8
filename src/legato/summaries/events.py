"""TensorBoard's event files: their framing, and what is in them.

tensorboardX's own writer hands events to a thread, and its `flush` does not
wait for that: what a checkpoint counts as written could be lost. Its protocol
buffers are used, and the bytes are written here.
"""

import dataclasses
import functools
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from crc32c import crc32c

from legato import storage
from legato.errors import DamagedError
from legato.types import Table

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


@dataclasses.dataclass(frozen=True)
class _Form:
    """How the events of some scalars are packed.

    Attributes:
        pack: makes an event of its fields.
        fields: what does not change of them.
    """

    pack: Callable[..., bytes]
    fields: list[Any]

    def event(
        self, wall_time: float, step: bytes, numbers: Iterable[float]
    ) -> bytes:
        """An event.

        Args:
            wall_time: in seconds.
            step: as protocol buffers have it.
            numbers: the scalars.
        """
        fields = self.fields.copy()
        fields[1], fields[3], fields[6::2] = wall_time, step, numbers
        try:
            return self.pack(*fields)
        except OverflowError:  # beyond float32 it is infinite
            with np.errstate(over="ignore"):
                fields[6::2] = np.array(numbers, "float32").tolist()
            return self.pack(*fields)


@functools.lru_cache(256)
def _form(names: tuple[str, ...], step_size: int) -> _Form:
    """How scalars of these names are packed, and a step of so many bytes.

    By the numbers of the fields: an event's 1 is the time, 2 the step, and 5 a
    summary, whose 1 is a value, whose 1 is its tag and whose 2 the number.
    """
    heads = []
    for name in names:
        tag = clean_tag(name).encode()
        value = b"".join([b"\x0a", _varint(len(tag)), tag, b"\x15"])
        heads.append(b"".join([b"\x0a", _varint(len(value) + 4), value]))
    size = sum(len(head) + 4 for head in heads)
    begin = b"\x2a" + _varint(size)
    key = b"\x10" if step_size else b""
    form = "".join(f"{len(head)}sf" for head in heads)
    fields: list[Any] = [b"\x09", 0.0, key, b"", begin]
    for head in heads:
        fields += [head, 0.0]
    return _Form(
        struct.Struct(f"<1sd{len(key)}s{step_size}s{len(begin)}s{form}").pack,
        fields,
    )


def _scalar_events(wall_time: float, table: Table) -> Iterator[bytes]:
    """An event for each step of a table of floats, serialised.

    The same bytes as of `scalar_values`, ten times as quick, and without
    protocol buffers, whose import takes seconds (see `protos`).
    """
    names = tuple(table.columns)
    columns = table.columns.values()
    for step, *numbers in zip(table.steps, *columns, strict=True):
        number = _varint(step) if step else b""
        yield _form(names, len(number)).event(wall_time, number, numbers)


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
        made = protos()
        summary = made.Summary(value=values)
        event = made.Event(wall_time=wall_time, step=step, summary=summary)
        self._make_ready(wall_time)
        self._add([event.SerializeToString()])

    def write_table(self, wall_time: float, table: Table) -> None:
        """Add an event for each step of a table of floats, in memory.

        Raises:
            DamagedError: the file is none of events.
        """
        self._make_ready(wall_time)
        self._add(_scalar_events(wall_time, table))

    def _make_ready(self, wall_time: float) -> None:
        if self._is_ready:
            return
        if not self._is_whole:
            self.truncate_to(_whole_size(self._path))
        if self.offset == 0:
            # The wall time (field 1) and the version of the file (field 3).
            self._add([b"\x09" + _DOUBLE.pack(wall_time) + _FIRST])
        self._is_ready = True

    def _add(self, events: Iterable[bytes]) -> None:
        """In the framing of TFRecord files: length, its CRC, data, its CRC."""
        parts: list[bytes] = []
        for data in events:
            crc = _CRC.pack(masked_crc32c(data))
            parts += (_head(len(data)), data, crc)
        self.append_bytes(b"".join(parts))

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
