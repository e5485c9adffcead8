import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from legato.errors import CheckpointError, DamagedError
from legato.storage import tensors

NAMES = sorted(tensors._DTYPES)


def random_array(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.name in (
        "bool",
        "int2",
        "uint2",
        "int4",
        "uint4",
        "int1",
        "uint1",
    ):
        return rng.integers(0, 2, shape).astype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 256, count, np.uint8)
    if dtype.name.startswith(("float4", "float6")):
        raw &= 0x0F
    return raw.view(dtype).reshape(shape)


def to_file(arrays):
    arena = tensors.TensorArena(tensors.TensorLayout(tensors.spec(arrays)))
    arena.fill(arrays)
    return arena.buffer.tobytes(), arena.layout


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def test_the_table_has_what_keras_has():
    keras = {
        "bfloat16", "float16", "float32", "float64", "int4", "uint4", "int8",
        "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
        "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    }  # fmt: skip
    assert keras <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3, 7)])
def test_every_dtype_and_shape_returns(name, shape):
    arrays = {
        "other": random_array("uint8", (3,)),
        "x": random_array(name, shape),
    }
    data, layout = to_file(arrays)
    tree = json.loads(json.dumps(layout.tree()))
    again = tensors.read_tensors(
        data, tensors.parse_tree(tree, name="t"), name="t"
    )
    assert list(again) == list(arrays)
    for key in arrays:
        assert_same(arrays[key], again[key])


def test_the_library_reads_the_file():
    arrays = {
        name: random_array(name, shape) for name in NAMES for shape in [(3, 5)]
    } | {"scalar é": np.float32(3).reshape(()), "empty": np.empty((0, 4), "i8")}
    data, _ = to_file(arrays)
    read = dict(safetensors.deserialize(data))
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert bytes(read[name]["data"]) == array.tobytes()
        native = tensors._NATIVE.get(array.dtype.name)
        assert read[name]["dtype"] == (native or "U8")
        if native:
            assert tuple(read[name]["shape"]) == array.shape


def test_the_file_is_the_librarys_own():
    arrays = {
        "b": np.arange(6, dtype="f4").reshape(2, 3),
        "a": np.ones(2, "f8"),
    }
    again = safetensors.numpy.load(to_file(arrays)[0])
    for name in arrays:
        assert_same(arrays[name], again[name])


def test_no_arrays_at_all():
    data, layout = to_file({})
    assert tensors.read_tensors(data, layout, name="t") == {}
    assert safetensors.deserialize(data) == []


def test_unusual_memory_layouts_return_as_their_values():
    base = np.arange(24, dtype="f4").reshape(4, 6)
    arrays = {
        "transposed": base.T,
        "strided": base[::2, ::-1],
        "big endian": base.astype(">f4"),
        "big endian int": np.arange(5, dtype=">i2"),
        "broadcast": np.broadcast_to(np.float64(2), (3, 2)),
        "read-only": np.frombuffer(b"abcd", "u1"),
    }
    data, layout = to_file(arrays)
    again = tensors.read_tensors(data, layout, name="t")
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype.isnative
    assert layout.fits(arrays)


def test_every_array_is_aligned():
    arrays = {n: random_array(n, (3,)) for n in NAMES} | {
        "z": random_array("complex128", (5,))
    }
    layout = tensors.TensorLayout(tensors.spec(arrays))
    for entry in layout.entries.values():
        assert entry.begin % entry.dtype.itemsize == 0
    assert len(layout.header) % 64 == 0


def test_an_arena_is_used_again_and_keeps_nothing_of_before():
    first = {"x": np.full((1000,), 1.0), "y": np.full((), 7, "i4")}
    second = {"y": np.full((), 9, "i4"), "x": np.full((1000,), 2.0)}
    arena = tensors.TensorArena(tensors.TensorLayout(tensors.spec(first)))
    place = arena.buffer.ctypes.data
    assert place % 4096 == 0  # where a disk can read it
    arena.fill(first)
    before = hashlib.sha256(arena.buffer).digest()
    arena.fill(second)
    assert arena.buffer.ctypes.data == place
    again = tensors.read_tensors(arena.buffer, arena.layout, name="t")
    assert_same(again["x"], second["x"])
    assert_same(again["y"], second["y"])
    arena.fill(first)
    assert hashlib.sha256(arena.buffer).digest() == before


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((3, 2), "f4")},
        {"x": np.zeros((2, 3), "f2")},
        {"y": np.zeros((2, 3), "f4")},
        {"x": np.zeros((2, 3), "f4"), "y": np.zeros(1)},
        {},
    ],
)
def test_a_layout_fits_only_its_own(other):
    layout = tensors.TensorLayout({"x": ("float32", (2, 3))})
    assert layout.fits({"x": np.ones((2, 3), "f4")})
    assert not layout.fits(other)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a"]),
        np.array([None]),
        np.array([b"x"]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, np.longdouble),
    ],
)
def test_what_cannot_be_stored_is_named(array):
    with pytest.raises(CheckpointError, match="'weird'"):
        tensors.TensorLayout(tensors.spec({"weird": array}))
    with pytest.raises(CheckpointError, match="__metadata__"):
        tensors.TensorLayout({"__metadata__": ("uint8", ())})


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        {"x": None},
        {"x": ["float32"]},
        {"x": ["float32", None]},
        {"x": ["float32", [-1]]},
        {"x": ["float32", [1.0]]},
        {"x": ["float32", [True]]},
        {"x": ["float32", "3"]},
        {"x": ["O", [1]]},
        {"x": ["f4", [1]]},
        {"x": ["i4,i4", [1]]},
        {"x": [1, [1]]},
        {"x": [["a", "f4"], [1]]},
        {"x": ["float32", [1] * 100]},
    ],
)
def test_a_malformed_tree_is_damage(tree):
    with pytest.raises(DamagedError):
        tensors.parse_tree(tree, name="t")


def test_a_tree_that_claims_terabytes_allocates_nothing():
    layout = tensors.parse_tree({"x": ["float64", [10**15, 10**9]]}, name="t")
    with pytest.raises(DamagedError, match="bytes"):
        tensors.read_tensors(b"\0" * 100, layout, name="t")


def test_a_header_that_claims_terabytes_is_damage():
    data, layout = to_file({"x": np.zeros(4, "f4")})
    huge = (10**13).to_bytes(8, "little") + data[8:]
    with pytest.raises(DamagedError, match="header"):
        tensors.read_tensors(huge, layout, name="t")


@pytest.mark.parametrize("other", ["int32", "uint32"])
def test_a_dtype_other_than_the_manifests_is_damage(other):
    data, _ = to_file({"x": np.zeros(4, "f4")})
    layout = tensors.parse_tree({"x": [other, [4]]}, name="t")
    with pytest.raises(DamagedError):
        tensors.read_tensors(data, layout, name="t")


def test_int4_keeps_its_type():
    x = np.array([-8, 7, 0], ml_dtypes.int4)
    data, layout = to_file({"x": x})
    again = tensors.read_tensors(data, layout, name="t")["x"]
    assert again.dtype == ml_dtypes.int4 and again.astype(int).tolist() == [
        -8,
        7,
        0,
    ]
