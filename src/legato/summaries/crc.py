"""CRC-32C, the checksum of event files, fast enough for pictures.

In plain Python it is most of what a few numbers cost, and a picture of a
megabyte takes a tenth of a second, in which no other thread runs: training
would wait for what is written in the background.
"""

import functools
from collections.abc import Sequence

import numpy as np

_POLYNOMIAL = 0x82F63B78
_START = 0xFFFFFFFF  # of the register
_BLOCK = 1024  # bytes
_TOGETHER = 64  # blocks
_FEW = 24  # bytes, of which NumPy takes longer


def _make_table() -> tuple[int, ...]:
    table = []
    for register in range(256):
        for _ in range(8):
            odd = register & 1
            register = (register >> 1) ^ (_POLYNOMIAL if odd else 0)
        table.append(register)
    return tuple(table)


_TABLE = _make_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum as it stands in event files."""
    return _masked(crc32c(data))


def masked_crc32c_of_many(records: Sequence[bytes]) -> list[int]:
    """The checksum of each of some records, together where they are alike."""
    found = [0] * len(records)
    by_size: dict[int, list[int]] = {}
    for k, record in enumerate(records):
        by_size.setdefault(len(record), []).append(k)
    for size, members in by_size.items():
        if not _FEW <= size < _BLOCK:
            for k in members:
                found[k] = masked_crc32c(records[k])
            continue
        effects, places = _effects()
        places, begun = places[_BLOCK - size :], _begun(size) ^ _START
        for first in range(0, len(members), _TOGETHER):
            some = members[first : first + _TOGETHER]
            data = np.frombuffer(b"".join(records[k] for k in some), "uint8")
            sums = np.bitwise_xor.reduce(
                effects.take(places + data.reshape(-1, size)), axis=1
            )
            for k, crc in zip(some, sums.tolist(), strict=True):
                found[k] = _masked(crc ^ begun)
    return found


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """The checksum of some bytes."""
    first = len(data) % _BLOCK
    register = _over_part(data[:first])
    if first < len(data):
        blocks = np.frombuffer(data, "uint8", offset=first)
        register = _over_blocks(register, blocks.reshape(-1, _BLOCK))
    return register ^ _START


def _over_part(data: bytes) -> int:
    """The register after the first bytes, less than a block.

    The checksum is linear: the register is the sum of what each byte does to
    it, given how many follow, and of what becomes of its beginning.
    """
    if len(data) < _FEW:
        register = _START
        for byte in data:
            register = _TABLE[(register ^ byte) & 255] ^ (register >> 8)
        return register
    effects, places = _effects()
    places = places[_BLOCK - len(data) :] + np.frombuffer(data, "uint8")
    return int(np.bitwise_xor.reduce(effects.take(places))) ^ _begun(len(data))


def _over_blocks(register: int, blocks: np.ndarray) -> int:
    """The register after whole blocks of bytes.

    Before each, it is as if it were added to the block's first four bytes.
    """
    effects, places = _effects()
    first = effects[: 4 * 256].reshape(4, 256).tolist()
    for begin in range(0, len(blocks), _TOGETHER):
        found = effects.take(places + blocks[begin : begin + _TOGETHER])
        for effect in np.bitwise_xor.reduce(found, axis=1).tolist():
            register = (
                effect
                ^ first[0][register & 255]
                ^ first[1][(register >> 8) & 255]
                ^ first[2][(register >> 16) & 255]
                ^ first[3][register >> 24]
            )
    return register


@functools.lru_cache(_BLOCK)
def _begun(num_bytes: int) -> int:
    """What becomes of the register's beginning after some bytes."""
    register = _START
    for _ in range(num_bytes):
        register = _TABLE[register & 255] ^ (register >> 8)
    return register


@functools.cache
def _effects() -> tuple[np.ndarray, np.ndarray]:
    """What a byte does to the register, by its place in a block.

    Returns:
        256 effects for each place, and where those of each place begin.
    """
    table = np.array(_TABLE, "uint32")
    effects = np.empty((_BLOCK, 256), "uint32")
    effects[-1] = table
    for place in range(_BLOCK - 2, -1, -1):
        after = effects[place + 1]
        effects[place] = (after >> 8) ^ table[after & 255]
    return effects.ravel(), np.arange(_BLOCK) * 256
