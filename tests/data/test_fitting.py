"""What `fit_source` takes, against Keras's own adapters, and refuses."""

import keras
import numpy as np
import pytest
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import array_slicing, data_adapter_utils

import legato
from legato.data import arrays as arrays_module
from legato.data import fit_source, split_validation
from legato.errors import DataError, LegatoWarning
from tests.data.reading import numbers, read
from tests.data.sources import (
    Buckets,
    Endless,
    Iterates,
    Plain,
    Unsized,
    X,
    Y,
    generator,
    grain_dataset,
    tf_dataset,
    torch_loader,
)

LABELS = (Y % 3).astype("int32")
WEIGHTS = {0: 0.5, 2: 3.0}
FLOATS = np.linspace(0, 1, 23)


def tensors():
    import tensorflow as tf
    import torch

    x, y = np.float64(X), FLOATS.astype("float16")
    return {
        "numpy": lambda a: a,
        "tensorflow": tf.constant,
        "torch": lambda a: torch.tensor(a, requires_grad=a.dtype.kind == "f"),
        "keras": keras.ops.convert_to_tensor,
    }, (x, y)


def kerass(*args, **kwargs):
    """The batches of Keras's adapter, as (x, y, sample_weight)."""
    adapter = data_adapters.get_data_adapter(*args, **kwargs)
    return [
        data_adapter_utils.unpack_x_y_sample_weight(batch)
        for batch in adapter.get_numpy_iterator()
    ]


def assert_as_kerass(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        one = one + (None,) * (3 - len(one))
        keras.tree.assert_same_structure(one, other)
        for a, b in zip(
            keras.tree.flatten(one), keras.tree.flatten(other), strict=True
        ):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(a, np.asarray(b).astype(a.dtype))
                assert a.shape == b.shape


def check_arrays(*args, **kwargs):
    source = fit_source(*args, **kwargs)
    if "steps_per_epoch" in kwargs:
        kwargs["steps_per_epoch"] = kwargs.pop("steps_per_epoch")
    expected = kerass(*args, **kwargs)
    assert source.batches_per_epoch == len(expected)
    assert_as_kerass(read(source, len(expected)), expected)
    return source


@pytest.fixture(params=["resident", "staged"])
def staging(request, monkeypatch):
    if request.param == "staged":
        monkeypatch.setattr(arrays_module, "_RESIDENT_BYTES", 0)


@pytest.mark.usefixtures("staging")
@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((X,), {}),
        ((X, Y), {}),
        ((X, Y, FLOATS), {"batch_size": 5}),
        ((X, Y), {"steps_per_epoch": 4}),
        (({"b": X, "a": Y}, [Y, X]), {"batch_size": 7}),
        (([X, (Y, {"deep": X})], Y), {"batch_size": 7}),
        ((X, {"a": Y, "b": None}), {"batch_size": 6}),
        ((X, [Y, X], [FLOATS, None]), {"batch_size": 6}),
        ((X, [Y, X], FLOATS), {"batch_size": 6}),
        ((X, [None, X], [None, FLOATS]), {"batch_size": 6}),
        ((X, LABELS), {"class_weight": WEIGHTS, "batch_size": 5}),
        ((X, LABELS[:, None]), {"class_weight": WEIGHTS}),
        # All of these are numbers of classes, and weights, to Keras.
        ((X, LABELS), {"class_weight": {0.0: 1, np.int64(1): -2, True: 3}}),
        ((X, LABELS), {"class_weight": {np.float32(2): np.array(0.5)}}),
        ((X, np.eye(3)[LABELS]), {"class_weight": WEIGHTS}),
        ((X.astype("float16"), Y > 3), {"batch_size": 5}),
    ],
)
def test_arrays_as_keras_gives_them(args, kwargs):
    check_arrays(*args, **kwargs)


@pytest.mark.parametrize("name", ["numpy", "tensorflow", "torch", "keras"])
def test_tensors_of_every_backend(name):
    convert, arrays = tensors()
    x, y = map(convert[name], arrays)
    source = fit_source(x, y, batch_size=5)
    plain = fit_source(*arrays, batch_size=5)
    assert source.identity == plain.identity
    for one, other in zip(read(source, 5), read(plain, 5), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
        assert one[0].dtype == one[1].dtype == "float32"


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": FLOATS, "b": Y, "c": Y > 4})
    check_arrays(frame, pandas.Series(LABELS), class_weight=WEIGHTS)
    check_arrays(frame[["b"]], {"out": pandas.Series(FLOATS)}, batch_size=4)


def test_scipys_sparse_matrices():
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.random(40, 6, 0.3, rng=np.random.default_rng(1))
    source = check_arrays(matrix, np.arange(40), batch_size=7)
    for kind in (sparse.csr_matrix, sparse.coo_array):
        again = fit_source(kind(matrix), np.arange(40), batch_size=7)
        assert again.identity == source.identity


def test_memory_mapped_arrays_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_module, "_RESIDENT_BYTES", 1000)
    for dtype in ("float64", "int64"):
        np.save(tmp_path / "x.npy", np.arange(9000, dtype=dtype).reshape(-1, 3))
        whole = np.load(tmp_path / "x.npy", mmap_mode="r")
        source = fit_source(whole[100:], batch_size=10, shuffle=True)
        column = source._columns[0]
        read_rows = []
        record(monkeypatch, column, read_rows)
        assert isinstance(column._array.base, np.ndarray)
        assert column._array.dtype == dtype
        batch = read(source, 1)[0][0]
        expected = {"float64": "float32", "int64": batch.dtype}[dtype]
        assert batch.dtype == expected
        assert sum(np.size(i) for i in read_rows) <= 40
        first = read_rows[0].reshape(-1)[:10]
        np.testing.assert_array_equal(batch, whole[100:][first])


def record(monkeypatch, column, read_rows):
    rows = column.rows

    def recording(index):
        read_rows.append(index)
        return rows(index)

    monkeypatch.setattr(column, "rows", recording)


def test_a_memory_mapped_integer_that_does_not_fit(tmp_path, monkeypatch):
    if keras.config.backend() != "jax":
        pytest.skip("int64 is computed with as it is")
    monkeypatch.setattr(arrays_module, "_RESIDENT_BYTES", 0)
    np.save(tmp_path / "x.npy", np.array([[1], [2**40]]))
    source = fit_source(np.load(tmp_path / "x.npy", mmap_mode="r"))
    with pytest.raises(DataError, match=r"outside of int32.* ids from 0"):
        read(source, 1)


def test_shuffle_batch_keeps_the_batches():
    source = fit_source(X, Y, batch_size=5, shuffle="batch")
    found = read(source, 10)
    for i, (x, y) in enumerate(found):
        i %= 5
        assert sorted(y.tolist()) == list(range(23))[5 * i : 5 * i + 5]
        assert (x == X[y]).all()
    pairs = zip(found[:5], found[5:], strict=True)
    assert any((a[1] != b[1]).any() for a, b in pairs)


@pytest.mark.parametrize("part", [0.1, 0.25, 0.5, 0.9])
def test_split_validation_takes_the_same_rows(part):
    arrays = ({"a": X, "b": Y}, [Y, None], FLOATS)
    ours = split_validation(*arrays, part)
    theirs = array_slicing.train_validation_split(arrays, part)
    for one, other in zip(ours, theirs, strict=True):
        assert_as_kerass(
            read(fit_source(*one, batch_size=4), 1),
            kerass(*other, batch_size=4)[:1],
        )
        assert len(one[0]["b"].rows(slice(None))) == len(other[0]["b"])


# -- what gives batches by itself ------------------------------------------


class Labelled(Plain):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return [{"one": x}, x * 2], y % 3


class Weighted(Plain):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, {"a": y, "b": None}, {"a": y * 0.5, "b": None}


class Dicts(Plain):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


class Alone(Plain):
    def __getitem__(self, index):
        return np.float64(super().__getitem__(index)[0])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("cls", [Plain, Labelled, Weighted, Dicts, Alone])
def test_py_datasets_as_keras_gives_them(cls, workers):
    source = fit_source(cls(workers=workers))
    expected = kerass(cls())
    assert source.batches_per_epoch == len(expected) == 5
    assert_as_kerass(read(source, 10), expected * 2)


def test_py_datasets_with_class_weight():
    expected = kerass(Labelled(), class_weight=WEIGHTS)
    source = fit_source(Labelled(), class_weight=WEIGHTS)
    assert_as_kerass(read(source, 5), expected)
    assert source.identity != fit_source(Labelled()).identity


def test_a_shuffled_py_dataset_gives_each_batch_once():
    source = fit_source(Plain(), shuffle=True)
    epochs = read(source, 5), read(source, 10)[5:]
    orders = [[int(b[1][0]) // 5 for b in epoch] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(5))
    assert orders[0] != orders[1]


def tf_labelled():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(
        ({"a": np.float64(X), "b": X > 4}, LABELS)
    ).batch(5)


def tf_ragged():
    import tensorflow as tf

    ragged = tf.ragged.constant([[1, 2], [3], [], [4, 5, 6]])
    return tf.data.Dataset.from_tensor_slices((ragged, Y[:4])).batch(2)


def tf_sparse():
    import tensorflow as tf

    sparse = tf.sparse.from_dense(X * (X % 3 == 0))
    return tf.data.Dataset.from_tensor_slices((sparse, Y)).batch(4)


def torch_list():
    import torch
    from torch.utils.data import DataLoader

    pairs = [(torch.tensor([float(i)]), {"y": i}) for i in range(9)]
    return DataLoader(pairs, batch_size=4)


@pytest.mark.parametrize(
    "make", [tf_labelled, tf_ragged, tf_sparse, torch_loader, torch_list]
)
def test_iterables_as_keras_gives_them(make):
    expected = kerass(make())
    source = fit_source(make())
    assert source.batches_per_epoch == len(expected)
    assert_as_kerass(read(source, len(expected)), expected)
    assert source.inexact is None


def test_tf_with_class_weight():
    expected = kerass(tf_labelled(), class_weight=WEIGHTS)
    source = fit_source(tf_labelled(), class_weight=WEIGHTS)
    assert_as_kerass(read(source, 5), expected)


def test_grain_as_keras_gives_it():
    pytest.importorskip("grain")
    expected = kerass(grain_dataset())
    assert_as_kerass(read(fit_source(grain_dataset()), 5), expected)


def test_generators_as_keras_gives_them():
    def batches():
        for i in range(6):
            yield ([X[i : i + 4], None], Y[i : i + 4])

    expected = kerass(batches())
    source = fit_source(batches(), steps_per_epoch=3)
    source.example(2)
    assert_as_kerass(read(source, 6), expected)


@pytest.mark.parametrize("kind", ["single tensor", "dict"])
def test_loaders_where_kerass_numpy_iterator_fails(kind):
    """It takes a tensor or a dict for the tuple of a batch."""
    import torch
    from torch.utils.data import DataLoader

    data = torch.from_numpy(X)
    if kind == "dict":
        data = [{"a": row} for row in data]
    found = read(fit_source(DataLoader(data, batch_size=5)), 5)
    for i, batch in enumerate(found):
        x = batch[0]["a"] if kind == "dict" else batch[0]
        assert len(batch) == 1
        np.testing.assert_array_equal(x, X[5 * i : 5 * i + 5])


def test_a_custom_adapter_of_kerass():
    adapter = data_adapters.get_data_adapter(X, Y, batch_size=5)
    expected = list(kerass(X, Y, batch_size=5))
    source = fit_source(adapter)
    assert source.batches_per_epoch == 5
    assert_as_kerass(read(source, 10), expected * 2)


@pytest.mark.filterwarnings("ignore:x .generator. can be read once")
def test_an_array_that_is_filled_again_and_again():
    class Refills(Plain):
        buffer = np.zeros((5, 2), "float32")

        def __getitem__(self, index):
            self.buffer[:] = index
            return self.buffer, Y[:5]

    def refills():
        for i in range(9):
            Refills.buffer[:] = i
            yield Refills.buffer, Y[:5]

    for source in (
        fit_source(Refills()),
        fit_source(refills(), steps_per_epoch=3),
        fit_source(refills(), steps_per_epoch=5, keep=True),
    ):
        found = [int(batch[0][0, 0]) for batch in read(source, 5, capacity=8)]
        assert found == [0, 1, 2, 3, 4]
        assert not source.example(1)[0].any()


def test_batches_of_any_shapes():
    source = fit_source(Buckets())
    assert source.full_batch_size == 4 and source.partial_batch_size == 0
    iterator = source.iterate(seed=1, capacity=4)
    found = [iterator.next_chunk(4) for _ in range(5)]
    assert [c.num_batches for c in found] == [2, 1, 1, 2, 1]
    assert [c.batch_size for c in found] == [4, 4, 4, 4, 2]
    assert [c.shapes for c in found] == [
        ((4, 3), (4,)),
        ((4, 5), (4,)),
        ((4, 3), (4,)),
        ((4, 5), (4,)),
        ((2, 5), (2,)),
    ]
    assert all(a.shape[0] == 4 for c in found for a in c.operands)
    assert not found[0].operands[1][2:].any()


def test_dtypes():
    class Wide(Plain):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return np.float64(x), np.int64(y)

    (x, y), *_ = read(fit_source(Wide()), 1)
    assert x.dtype == "float32"
    assert y.dtype == ("int32" if keras.config.backend() == "jax" else "int64")


# -- lengths ----------------------------------------------------------------


def test_an_unknown_length_is_counted():
    with pytest.warns(LegatoWarning, match="counted, by reading all of them"):
        source = fit_source(Unsized())
    assert source.batches_per_epoch == 3


def test_an_unknown_length_of_tf_is_counted():
    import tensorflow as tf

    data = tf.data.Dataset.range(9).filter(lambda i: i % 2 == 0).batch(2)
    with pytest.warns(LegatoWarning, match=r"tf.data.Dataset.*counted"):
        source = fit_source(data)
    assert source.batches_per_epoch == 3


def test_steps_stand_for_an_unknown_length():
    source = fit_source(Unsized(), steps_per_epoch=5)
    assert source.batches_per_epoch == 5
    labels = [int(b[1].min()) // 5 for b in read(source, 9)]
    # They begin anew in mid-epoch.
    assert [sorted(labels[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


def test_data_that_end_before_their_length():
    class Short(Iterates):
        def __len__(self):
            return 9

    source = fit_source(Short())
    with pytest.raises(DataError, match=r"ended after 4 batches.*9 by its"):
        read(source, 9)
    source = fit_source(Short(), steps_per_epoch=3)
    assert len(read(source, 9)) == 9


def test_a_generator_that_ends():
    def three():
        for i in range(3):
            yield X[:2] + i, Y[:2]

    source = fit_source(three(), steps_per_epoch=2)
    iterator = source.iterate(seed=1, capacity=1)
    for _ in range(3):
        iterator.next_chunk(1)
    with pytest.raises(DataError, match=r"x \(generator\): it ended: an ep"):
        iterator.next_chunk(1)
    with pytest.raises(Exception, match=r"3 batches of it were taken already"):
        read(source, 1)


def test_a_generator_goes_on_in_the_same_process():
    whole = read(fit_source(generator(), steps_per_epoch=3), 6)
    source = fit_source(generator(), steps_per_epoch=3)
    iterator = source.iterate(seed=5, capacity=1)
    for _ in range(2):
        iterator.next_chunk(1)
    state = iterator.get_state()
    rest = read(source, 4, state=state)
    for one, other in zip(rest, whole[2:], strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_a_generator_that_is_kept():
    with pytest.warns(
        LegatoWarning,
        match=r"val \(generator\).*first validation_steps=3 batches .*0\.0 MB",
    ):
        source = kept(generator())
    assert source.batches_per_epoch == 3
    first = read(source, 3)
    for found in (read(source, 3), read(source, 6)[3:]):
        for one, other in zip(found, first, strict=True):
            np.testing.assert_array_equal(one[0], other[0])
    with pytest.raises(
        DataError, match=r"ended after 1 batches, and 3 .*validation_steps"
    ):
        kept(iter([(X, Y)]))


@pytest.mark.filterwarnings("ignore::legato.errors.LegatoWarning")
@pytest.mark.parametrize("made", ["numpy", "torch"])
def test_a_kept_generator_may_fill_the_same_array(made):
    import torch

    def filled():
        array = np.zeros((2, 1), "float32")
        batch = array if made == "numpy" else torch.from_numpy(array)
        for i in range(3):
            array[:] = i
            yield (batch,)

    found = [batch[0][0, 0] for batch in read(kept(filled()), 6)]
    assert found == [0, 1, 2, 0, 1, 2]


def kept(batches):
    return fit_source(
        batches,
        steps_per_epoch=3,
        keep=True,
        name="val",
        steps_name="validation_steps",
    )


@pytest.mark.parametrize(
    "data, words",
    [
        (generator, r"\(generator\) can be read once, .*: give validation_st"),
        (Endless, r"no length"),
        (lambda: tf_dataset().repeat(), r"no end: give validation_steps, the"),
    ],
)
def test_the_callers_steps_are_named(data, words):
    with pytest.raises(DataError, match=words):
        fit_source(data(), steps_name="validation_steps")


# -- what is refused --------------------------------------------------------


class Bad(Plain):
    def __init__(self, batch, **kwargs):
        super().__init__(**kwargs)
        self.batch = batch

    def __getitem__(self, index):
        return self.batch if index == 0 else (X[:3], Y[:3])


class Empty(Plain):
    def __len__(self):
        return 0


class NoLength(keras.utils.PyDataset):
    def __getitem__(self, index):
        return X, Y


def tf_strings():
    import tensorflow as tf

    return tf.data.Dataset.from_tensors((["a", "b"],))


def torch_dataset():
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            yield from X

    return Stream()


def tf_endless():
    return tf_dataset().repeat()


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        ((None, Y), {}, ["x=None"]),
        ((X, Y[:20]), {}, ["different numbers", "x: 23", "y: 20"]),
        (({"a": X, "b": Y[:4]},), {}, ["x.a: 23", "x.b: 4"]),
        ((X, Y, FLOATS[:3]), {}, ["sample_weight: 3", "Every array"]),
        ((X[:0], Y[:0]), {}, ["x is empty", "0 examples"]),
        (([1, 2, 3], Y), {}, ["x is a list that holds a int", "np.array(x)"]),
        ((X, [0, 1]), {}, ["y is a list that holds a int", "np.array(y)"]),
        ((X, (i for i in "a")), {}, ["y is a generator", "no data"]),
        ((print,), {}, ["x is a builtin_function", "tf.data.Dataset"]),
        (("data.csv",), {}, ["x is a str", "PyDataset"]),
        (({},), {}, ["x={} holds no array"]),
        (([None],), {}, ["x=[None] holds no array"]),
        ((X, None, Y), {}, ["sample_weight was given and y was not"]),
        ((X,), {"class_weight": {0: 1.0}}, ["class_weight", "y was not"]),
        ((X, Y, FLOATS), {"class_weight": WEIGHTS}, ["both given"]),
        ((X, [Y, Y]), {"class_weight": WEIGHTS}, ["several y", "single out"]),
        ((X, [Y, Y], [FLOATS]), {}, ["not nested as y", "['.']"]),
        ((X, [Y, Y], X), {}, ["shape (23, 2)", "(examples,)"]),
        ((X, Y), {"class_weight": [1, 2]}, ["class_weight=[1, 2]", "dict"]),
        ((X, Y), {"class_weight": {}}, ["class_weight={}", "dict"]),
        *(
            ((X, LABELS), {"class_weight": {0: 1, key: 2}}, words)
            for key, words in [
                ("1", ["class_weight has the key '1'", "numbers of classes"]),
                (0.5, ["class_weight has the key 0.5", "numbers of classes"]),
                (np.nan, ["class_weight has the key nan"]),
                (None, ["class_weight has the key None"]),
            ]
        ),
        *(
            ((X, LABELS), {"class_weight": {0: 1, 2: weight}}, words)
            for weight, words in [
                (np.nan, ["class_weight[2]=nan", "finite number"]),
                (np.float32("inf"), ["class_weight[2]=", "finite number"]),
                ("3", ["class_weight[2]='3'", "finite number"]),
                ([1.0], ["class_weight[2]=[1.0]", "finite number"]),
            ]
        ),
        ((Plain(),), {"class_weight": {"1": 2}}, ["has the key '1'"]),
        ((X, Y), {"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ((X, Y), {"batch_size": 2.0}, ["batch_size=2.0", "int"]),
        ((X, Y), {"steps_per_epoch": True}, ["steps_per_epoch=True", "int"]),
        ((np.array(["a", "b"]),), {}, ["dtype <U1", "strings"]),
        ((np.array([None, 1]),), {}, ["dtype object", "numbers"]),
        ((Plain(), Y), {}, ["y was given", "Plain", "Leave y out"]),
        ((Plain(), None, FLOATS), {}, ["sample_weight was given", "Leave"]),
        ((Plain(),), {"batch_size": 3}, ["batch_size=3", "Plain", "itself"]),
        ((iter([]),), {"steps_per_epoch": 3}, ["gave no batch"]),
        ((generator(),), {}, ["read once", "steps_per_epoch"]),
        ((iter([(X, Y)]), Y), {}, ["y was given", "list_iterator"]),
        ((Endless(),), {}, ["no length", "steps_per_epoch"]),
        ((NoLength(),), {}, ["no length", "__len__"]),
        ((Empty(),), {}, ["length of x (Empty) is 0", "at least 1 batch"]),
        ((tf_endless,), {}, ["no end", "steps_per_epoch"]),
        ((tf_strings,), {}, ["dtype object", "one of numbers too"]),
        ((tf_dataset, Y), {}, ["y was given"]),
        ((torch_dataset,), {}, ["x is a Stream", "loader around it"]),
        ((torch_loader,), {"batch_size": 5}, ["batch_size=5", "DataLoader"]),
        ((Bad((X,) * 4),), {}, ["Bad)[0]", "a tuple of 4", "(x, y)"]),
        ((Bad((X, 3)),), {}, ["the int 3 at 1"]),
        ((Bad((None, Y)),), {}, ["without any x"]),
        ((Bad((X, Y, Y)),), {"class_weight": {0: 1}}, ["gives sample_weight"]),
        ((Bad((X, [Y, Y])),), {"class_weight": {0: 1}}, ["several y"]),
        ((Bad((X, "abc")),), {}, ["the str 'abc' at 1"]),
        ((Bad((["a", "b"],)),), {}, ["dtype object", "one of numbers too"]),
    ],
)
def test_what_is_wrong_is_named(args, kwargs, words):
    if callable(args[0]) and args[0] is not print:
        args = (args[0](), *args[1:])
    with pytest.raises(DataError) as caught:
        fit_source(*args, **kwargs)
    for word in words:
        assert word in str(caught.value)


def test_the_callers_name_is_used():
    with pytest.raises(DataError, match="validation_data is a str"):
        fit_source("x", name="validation_data")


@pytest.mark.parametrize(
    "batch, words",
    [
        (({"a": X}, Y), ["nested as ({'a': '.'}, '.')", "the first was"]),
        ((X,), ["nested as ('.',)", "every batch"]),
        ((X > 3, Y), ["gave bool at 0", "first batch has float32"]),
    ],
)
def test_batches_that_are_unlike_the_first(batch, words):
    class Changes(Plain):
        def __getitem__(self, index):
            return batch if index == 3 else (X[:3], Y[:3])

    source = fit_source(Changes())
    with pytest.raises(DataError) as caught:
        read(source, 5)
    for word in ["Changes", *words]:
        assert word in str(caught.value)


class Given:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    "batch, words",
    [
        ((X[:3], Y[:2], Y[:3]), "(x: 3, y: 2, sample_weight: 3). Every"),
        ((X[:3], Y[:3], Y[:1]), "(x: 3, y: 3, sample_weight: 1). Every"),
        ((X[:0], Y[:0], Y[:0]), "gave a batch of 0 examples: there must be"),
        (([X[:3]], Y[:3], Y[:3]), "Give the same in every batch."),
    ],
)
def test_a_batch_that_is_no_good_is_numbered(batch, words):
    whole = X[:3], Y[:3], Y[:3]
    source = fit_source(Given([whole, whole, whole, batch]))
    with pytest.raises(DataError) as caught:
        read(source, 4)
    assert words in str(caught.value)
    assert "(It was batch 4 of a pass.)" in str(caught.value)


def test_a_first_batch_without_examples():
    with pytest.raises(DataError, match=r"Bad\)\[0\] gave a batch of 0 exam"):
        fit_source(Bad(({"a": X[:0], "b": Y[:0]},)))


@pytest.mark.parametrize("size", [1, 3])
def test_bags_of_examples_may_have_one_label(size):
    """As long as the first, or all, are not equally long by chance."""
    bags = [(X[: size + i], Y[:1]) for i in range(4)]
    for one, other in zip(read(fit_source(Given(bags)), 4), bags, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_a_length_that_changes():
    class Grows(Plain):
        length = 3

        def __len__(self):
            return self.length

        def on_epoch_end(self):
            self.length += 1

    source = fit_source(Grows())
    with pytest.raises(DataError, match="was 3 and is 4 now"):
        read(source, 4)


@pytest.mark.parametrize("part", [0, 1, -0.5, True, "half", None, np.nan])
def test_bad_validation_split(part):
    with pytest.raises(DataError, match=r"validation_split=.*between 0 and 1"):
        split_validation(X, Y, None, part)


def test_a_split_that_leaves_nothing():
    with pytest.raises(DataError, match="of 23 examples, this leaves none"):
        split_validation(X, Y, None, 0.999999)
    with pytest.raises(DataError, match="x of type Plain: only arrays"):
        split_validation(Plain(), None, None, 0.5)
    with pytest.raises(DataError, match="different numbers"):
        split_validation(X, Y[:4], None, 0.5)


def test_multiprocessing_is_threads_and_says_so():
    with pytest.warns(LegatoWarning, match=r"use_multiprocessing.*threads"):
        source = fit_source(Plain(workers=2, use_multiprocessing=True))
    assert_as_kerass(read(source, 5), kerass(Plain()))


def test_numbers_of_batches():
    assert numbers((X, None))[1] is None


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_the_size_of_validation_batches(size, tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(DataError, match=f"validation_batch_size={size}"):
        legato.fit(
            model,
            X,
            Y,
            validation_data=(X, Y),
            validation_batch_size=size,
            run_dir=tmp_path,
        )


def test_a_generator_function_that_draws_from_outside_is_named():
    source = fit_source(Iterates().__iter__, steps_per_epoch=5)
    assert "drawn twice and was not the same" in source.inexact
