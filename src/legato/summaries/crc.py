"""CRC-32C, the checksum of event files, fast enough for pictures.

In plain Python a picture of a megabyte takes a tenth of a second, in which no
other thread runs: training would wait for what is written in the background.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78
_BLOCK = 1024  # bytes
_TOGETHER = 64  # blocks


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
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """The checksum of some bytes."""
    register = 0xFFFFFFFF
    if len(data) >= 2 * _BLOCK:
        whole = len(data) - len(data) % _BLOCK
        register = _over_blocks(register, np.frombuffer(data, "uint8", whole))
        data = data[whole:]
    table = _TABLE
    for byte in data:
        register = table[(register ^ byte) & 255] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def _over_blocks(register: int, data: np.ndarray) -> int:
    """The register after whole blocks of bytes.

    The checksum is linear: the register after a block is the sum of what each
    byte does to it, given how many follow, and of what it does itself, as if
    it were added to the block's first four bytes.
    """
    tables = _block_tables()
    place = np.arange(_BLOCK)
    first = [tables[k].tolist() for k in range(4)]
    blocks = data.reshape(-1, _BLOCK)
    for begin in range(0, len(blocks), _TOGETHER):
        effects = tables[place, blocks[begin : begin + _TOGETHER]]
        for effect in np.bitwise_xor.reduce(effects, axis=1).tolist():
            register = (
                effect
                ^ first[0][register & 255]
                ^ first[1][(register >> 8) & 255]
                ^ first[2][(register >> 16) & 255]
                ^ first[3][register >> 24]
            )
    return register


@functools.cache
def _block_tables() -> np.ndarray:
    """What a byte does to the register, by its place in a block."""
    table = np.array(_TABLE, "uint32")
    tables = np.empty((_BLOCK, 256), "uint32")
    tables[-1] = table
    for place in range(_BLOCK - 2, -1, -1):
        after = tables[place + 1]
        tables[place] = (after >> 8) ^ table[after & 255]
    return tables
