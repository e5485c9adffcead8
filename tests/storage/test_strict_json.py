import enum
import math
import random
import struct
import time

import numpy as np
import pytest

from legato.errors import DamagedError
from legato.storage import strict_json

VALUE = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**64, -(2**127), 10**3990],
    "floats": [0.0, -0.0, 1.5, 0.1, 5e-324, 1.7976931348623157e308],
    "texts": ["", "é\n\0\x1f\u2028", "\U0001f3bc", '"\\{[', "~f"],
    "nested": {"": {"a": [[], {}]}},
}


def test_a_value_returns_exactly():
    again = strict_json.loads(strict_json.dumps(VALUE))
    assert again == VALUE
    assert math.copysign(1, again["floats"][1]) == -1
    assert [type(b) for b in again["bools"]] == [bool, bool]


def test_any_float_returns_to_the_last_bit():
    rng = random.Random(0)
    floats = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000)] + [
        math.inf,
        -math.inf,
    ]
    again = strict_json.loads(strict_json.dumps(floats))
    for before, after in zip(floats, again, strict=True):
        if math.isnan(before):
            assert math.isnan(after)
        else:
            assert struct.pack("<d", before) == struct.pack("<d", after)


def test_equal_values_give_equal_bytes():
    assert strict_json.dumps({"b": 1, "a": 2.0}) == strict_json.dumps(
        {"a": 2.0, "b": 1}
    )
    assert strict_json.dumps(1.5) == b'{"~f":"0x1.8000000000000p+0"}'


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1),
        np.float32(1),
        np.int64(1),
        Colour.RED,
        (1, 2),
        {1: 2},
        b"x",
        {1, 2},
        object(),
    ],
)
def test_other_types_are_refused_with_their_place(value):
    with pytest.raises(TypeError, match=r"\$\.a\[1\]"):
        strict_json.dumps({"a": [0, value]})


@pytest.mark.parametrize(
    "value",
    [{"~f": "0x1p+0"}, "\ud800", 10**5000],
    ids=["reserved key", "not Unicode", "digits"],
)
def test_values_that_would_not_return_are_refused(value):
    with pytest.raises(ValueError):
        strict_json.dumps([value])


def test_what_can_be_written_can_be_read():
    deep: list = []
    for _ in range(strict_json.MAX_DEPTH - 1):
        deep = [deep]
    assert strict_json.loads(strict_json.dumps(deep)) == deep
    with pytest.raises(ValueError, match="deeper"):
        strict_json.dumps([deep])
    cyclic: list = []
    cyclic.append(cyclic)
    with pytest.raises(ValueError, match="deeper"):
        strict_json.dumps(cyclic)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nul",
        b"1 2",
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":1}',
        b"1.5",
        b"1e5",
        b"NaN",
        b"-Infinity",
        b'{"~f":"1.5"}',
        b'{"~f":" 0x1.8000000000000p+0"}',
        b'{"~f":"0x1.8p+0"}',
        b'{"~f":"0x1.0000000000000p+99999"}',
        b'{"~f":1}',
        b'{"~f":"inf","a":1}',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'"\\ud800"',
        b'"\n"',
        "[1]".encode("utf-16"),
        b"\xef\xbb\xbf[1]",
        b"[1,]",
        b"9" * 4001,
        b"[" * 65 + b"]" * 65,
        b"]" * 65,
    ],
    ids=lambda data: repr(data[:16]),
)
def test_malformed_bytes_are_damage(data):
    with pytest.raises(DamagedError, match=r"^the file: "):
        strict_json.loads(data, name="the file")


def test_brackets_in_strings_do_not_count():
    assert strict_json.loads(b'["' + b"[{" * 100 + b'\\"[\\\\"]')


def test_depth_is_counted_exactly():
    mixed = b'[{"a":[{}]}]'
    assert strict_json.loads(mixed, max_depth=4)
    with pytest.raises(DamagedError, match="deeper than 3"):
        strict_json.loads(mixed, max_depth=3)


def test_size_is_checked_first():
    with pytest.raises(DamagedError, match="more than the 3"):
        strict_json.loads(b"    ", max_bytes=3)


@pytest.mark.parametrize(
    "bomb",
    [b"[", b'{"a":', b'"', b'"\\', b'\\"', b"9", b"[]", b'["",'],
    ids=repr,
)
def test_bombs_are_refused_in_linear_time(bomb):
    began = time.perf_counter()
    with pytest.raises(DamagedError):
        strict_json.loads(bomb * (2_000_000 // len(bomb)))
    assert time.perf_counter() - began < 5


def test_random_mutations_raise_nothing_else():
    rng = random.Random(1)
    data = strict_json.dumps(VALUE | {"ints": [1, 2]})
    refused = 0
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randint(0, 2)] = rng.randbytes(
                rng.randint(0, 2)
            )
        try:
            strict_json.loads(bytes(changed))
        except DamagedError:
            refused += 1
    assert refused > 1000
