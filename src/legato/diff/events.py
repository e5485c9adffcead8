"""The curves in TensorBoard's event files, whoever wrote them."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from legato import storage
from legato.errors import DamagedError
from legato.summaries.events import masked_crc32c

EVENTS = "tfevents"
"""What is in the name of each event file."""

_LENGTH = struct.Struct("<Q")
_CRC_SIZE = 4

Series = dict[str, list[tuple[int, bytes]]]


def read_series(paths: list[Path]) -> Series:
    """Tag -> steps and values, in their order; wall-clock times are left out.

    Args:
        paths: files, in the order in which TensorBoard reads them.

    Returns:
        Values as the bytes that are written for them: of a scalar, a
        histogram, an image alike.

    Raises:
        DamagedError: a file is not of events, or a checksum is wrong. (One
            that ends within a record was cut by a kill, and is none.)
    """
    # Imported late: where torch is installed, tensorboardX imports it.
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import (
        Event,  # type: ignore[reportAttributeAccessIssue]
    )

    series: Series = {}
    for path in paths:
        for record in _records(path):
            try:
                event: Any = Event.FromString(record)
            except DecodeError as error:
                raise DamagedError(
                    f"{path.name}: not a file of events"
                ) from error
            for value in event.summary.value:
                tag = value.tag
                value.ClearField("tag")
                series.setdefault(tag, []).append(
                    (event.step, value.SerializeToString(deterministic=True))
                )
    return series


def show_value(value: bytes) -> str:
    """A value for people: the number, if it is a scalar."""
    from tensorboardX.proto.summary_pb2 import (
        Summary,  # type: ignore[reportAttributeAccessIssue]
    )

    parsed: Any = Summary.Value.FromString(value)
    if parsed.WhichOneof("value") == "simple_value":
        return repr(parsed.simple_value)
    return f"{len(value)} bytes"


def _records(path: Path) -> Iterator[bytes]:
    """In the framing of TFRecord files: length, its CRC, data, its CRC."""
    with storage.open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while left >= _LENGTH.size + 2 * _CRC_SIZE:
            head = file.read(_LENGTH.size)
            crc = file.read(_CRC_SIZE)
            left -= _LENGTH.size + _CRC_SIZE
            if len(head) < _LENGTH.size or _crc(masked_crc32c(head)) != crc:
                raise DamagedError(
                    f"{path.name}: a length has a wrong checksum"
                )
            # Never more than there is, whatever the length claims.
            (length,) = _LENGTH.unpack(head)
            if length + _CRC_SIZE > left:
                return
            record = file.read(length)
            if _crc(masked_crc32c(record)) != file.read(_CRC_SIZE):
                raise DamagedError(
                    f"{path.name}: an event has a wrong checksum"
                )
            left -= length + _CRC_SIZE
            yield record


def _crc(value: int) -> bytes:
    return struct.pack("<I", value)
