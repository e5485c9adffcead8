"""Data that can only be read from the beginning, library by library."""

import keras
import numpy as np
import pytest

from legato.data import Feed, fit_source
from legato.errors import DamagedError, LegatoWarning, RestoreError
from tests.data.reading import (
    assert_equal,
    chunk_batches,
    digest,
    read,
    read_with_states,
    through_disk,
)
from tests.data.sources import (
    KINDS,
    Augmented,
    Iterates,
    Unsized,
    X,
    Y,
    generator,
    tf_dataset,
    torch_augmented,
    torch_loader,
    torch_seeded,
)

# -- tf.data ----------------------------------------------------------------


def tf():
    import tensorflow

    return tensorflow


@pytest.fixture(autouse=True)
def unseeded():
    # What another test seeded in this process would give each dataset a seed.
    tf().random.set_seed(None)


def epochs(source, count):
    """The labels of each epoch."""
    size = source.batches_per_epoch
    labels = [b[-1].tolist() for b in read(source, size * count)]
    return [
        [i for batch in labels[size * e : size * (e + 1)] for i in batch]
        for e in range(count)
    ]


def tf_epochs(dataset, count):
    def labels(batch):
        return (batch[-1] if isinstance(batch, tuple) else batch).tolist()

    return [
        [i for batch in dataset.as_numpy_iterator() for i in labels(batch)]
        for _ in range(count)
    ]


def base():
    return tf().data.Dataset.from_tensor_slices((X, Y))


def without_autotuning(dataset):
    options = tf().data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


TF = {
    "plain": lambda: base().batch(5),
    "shuffled": lambda: base().shuffle(23, seed=3).batch(5),
    "shuffled once": lambda: (
        base().shuffle(9, seed=3, reshuffle_each_iteration=False).batch(5)
    ),
    "twice": lambda: base().shuffle(5, seed=3).shuffle(5, seed=4).batch(5),
    "thrice": lambda: (
        base()
        .shuffle(5, seed=3)
        .shuffle(5, seed=4, reshuffle_each_iteration=False)
        .map(lambda x, y: (x, y))
        .shuffle(5, seed=5)
        .batch(5)
    ),
    "random": lambda: (
        tf()
        .data.Dataset.random(seed=3, rerandomize_each_iteration=True)
        .map(lambda i: i % 100)
        .take(12)
        .shuffle(5, seed=2)
        .batch(5)
    ),
    "repeated": lambda: base().shuffle(9, seed=3).repeat(2).batch(5),
    "cached before": lambda: base().cache().shuffle(9, seed=3).batch(5),
    "cached after": lambda: base().shuffle(9, seed=3).cache().batch(5),
    "cached evenly": lambda: without_autotuning(
        base().take(20).shuffle(9, seed=3).cache().batch(5)
    ),
    "both caches": lambda: (
        base().cache().shuffle(9, seed=3).cache().shuffle(9, seed=4).batch(5)
    ),
    "concatenated": lambda: (
        base()
        .shuffle(9, seed=3)
        .concatenate(base().take(7).shuffle(9, seed=4))
        .batch(5)
    ),
    "zipped": lambda: (
        tf()
        .data.Dataset.zip(base().shuffle(9, seed=3), base().shuffle(9, seed=4))
        .map(lambda a, b: (a[0], b[1]))
        .batch(5)
    ),
    "mapped": lambda: (
        base()
        .shuffle(9, seed=3)
        .map(lambda x, y: (x * 2, y), num_parallel_calls=2)
        .batch(5, num_parallel_calls=2)
        .prefetch(2)
    ),
    "optioned": lambda: (
        base().shuffle(9, seed=3).batch(5).with_options(tf().data.Options())
    ),
}


@pytest.mark.parametrize("name", TF)
def test_the_orders_of_tf_are_its_own(name):
    """Epoch by epoch what `fit` would see, whatever else was read."""
    expected = tf_epochs(TF[name](), 4)
    source = fit_source(TF[name]())
    assert epochs(source, 4) == expected
    assert epochs(source, 4) == expected
    assert source.inexact is None
    # Resumed in a later epoch: nothing was read in between.
    size = source.batches_per_epoch
    _, states = read_with_states(source, 3 * size + 1)
    for position in (2 * size, 2 * size + 1, 3 * size + 1):
        rest = read(
            fit_source(TF[name]()),
            4 * size - position,
            state=states[position],
        )
        found = [i for b in rest for i in b[-1].tolist()]
        whole = [i for epoch in expected for i in epoch]
        assert found == whole[-len(found) :]


def test_a_split_that_shares_a_shuffle():
    """Reading one of its parts does not move the other on."""
    expected = tf_epochs(base().shuffle(23, seed=3).skip(8).batch(5), 3)
    shuffled = base().shuffle(23, seed=3)
    train = fit_source(shuffled.skip(8).batch(5))
    validation = fit_source(shuffled.take(8).batch(4))
    first = epochs(validation, 1)
    assert epochs(train, 3) == expected
    assert epochs(validation, 1) == first


def test_a_cache_before_the_shuffle_is_filled_once():
    calls = []

    def count(i):
        calls.append(int(i))
        return i

    data = (
        base()
        .map(lambda x, y: (x, tf().numpy_function(count, [y], tf().int32)))
        .cache()
        .shuffle(23, seed=3)
        .batch(5)
    )
    source = fit_source(data)
    epochs(source, 2)
    read(source, 5)
    assert sorted(set(calls)) == list(range(23))
    assert len(calls) < 3 * 23


def random_function(parallel=None, **seed):
    return base().map(
        lambda x, y: (x + tf().random.uniform([], **seed), y),
        num_parallel_calls=parallel,
    )


def writes_variable():
    variable = tf().Variable(0)
    return base().map(lambda x, y: (x, y + variable.assign_add(1)))


def draws_numpy():
    def draw():
        return np.float32(np.random.rand())

    function = tf().numpy_function
    return base().map(lambda x, y: (x + function(draw, [], "float32"), y))


def parallel(deterministic):
    return base().map(
        lambda x, y: (x, y), num_parallel_calls=2, deterministic=deterministic
    )


def optioned():
    options = tf().data.Options()
    options.deterministic = False
    return base().with_options(options)


def large():
    return tf().data.Dataset.from_tensor_slices(np.zeros((9, 5)))


TF_INEXACT = {
    "shuffle": (lambda: base().shuffle(9), ["ShuffleDataset has no seed"]),
    "shuffle once": (
        lambda: base().shuffle(9, reshuffle_each_iteration=False),
        ["no seed", "seed=1"],
    ),
    "files": (
        lambda: (
            tf()
            .data.Dataset.list_files(__file__)
            .map(lambda name: tf().strings.length(name))
        ),
        ["no seed"],
    ),
    "random": (
        lambda: tf().data.Dataset.random().map(lambda i: i % 9).take(9),
        ["RandomDataset", "no seed"],
    ),
    "function": (random_function, ["RandomUniform in one of its functions"]),
    "variable": (writes_variable, ["writes to a tf.Variable"]),
    "numpy": (draws_numpy, ["global generators", "other threads"]),
    "sloppy": (lambda: parallel(False), ["deterministic=False"]),
    "options": (optioned, ["deterministic=False"]),
}


def noisy(x):
    return tf().cast(x, "float32") + tf().random.uniform([], seed=3)


def conditional(x):
    return tf().cond(x > 3, lambda: noisy(x), lambda: 0.0)


def generated():
    generator = tf().random.Generator.from_seed(1)
    return integers().map(lambda _: generator.uniform([]), num_parallel_calls=2)


def integers():
    return tf().data.Dataset.range(20)


def inner(_, **kwargs):
    return integers().map(noisy, **kwargs)


# The first batches may well come out right: no trial is needed to tell.
IN_TURNS = {
    "map": lambda: random_function(2, seed=3),
    "without a seed": lambda: random_function(2),
    "condition": lambda: integers().map(conditional, num_parallel_calls=2),
    "function": lambda: integers().map(
        tf().function(noisy), num_parallel_calls=2
    ),
    "generator": generated,
    "interleave": lambda: integers().interleave(
        inner, cycle_length=2, num_parallel_calls=2
    ),
    "within": lambda: integers().flat_map(
        lambda x: inner(x, num_parallel_calls=2)
    ),
    "large": lambda: large().map(noisy, num_parallel_calls=2),
    "large, within": lambda: large().flat_map(
        lambda x: inner(x, num_parallel_calls=2)
    ),
}


@pytest.mark.parametrize("name", IN_TURNS)
def test_draws_in_parallel_calls_of_tf_are_named(name, monkeypatch):
    from legato.data.adapters import tf_data

    monkeypatch.setattr(tf_data.TensorFlowDataset, "cheap", False)
    monkeypatch.setattr(tf_data, "_COPIED_BYTES", 300)
    source = fit_source(IN_TURNS[name]().batch(5), steps_per_epoch=4)
    assert "draws in calls that run in parallel, in an order" in source.inexact
    assert "stateless_uniform" in source.inexact
    assert "set_random_seed" not in source.inexact
    assert "first_sha256" not in source.identity


def test_draws_of_tf_one_after_another_are_exact():
    for data in (
        integers().map(noisy).map(tf().identity, num_parallel_calls=2),
        integers().interleave(inner, cycle_length=2),
        integers().filter(lambda x: noisy(x) > 4).prefetch(2),
    ):
        source = fit_source(data.batch(5), steps_per_epoch=3)
        assert source.inexact is None


@pytest.mark.parametrize("name", TF_INEXACT)
def test_what_is_inexact_about_tf_is_named(name):
    make, words = TF_INEXACT[name]
    source = fit_source(make().batch(5))
    for word in ["x (tf.data.Dataset): ", *words]:
        assert word in source.inexact
    assert "first_sha256" not in source.identity


def test_seeds_of_tf_are_taken_from_the_global_one():
    tf().random.set_seed(3)
    assert fit_source(base().shuffle(9).batch(5)).inexact is None


def test_exact_functions_of_tf():
    assert fit_source(parallel(True).batch(5)).inexact is None
    source = fit_source(random_function(seed=3).batch(5))
    assert source.inexact is None
    generated = tf().data.Dataset.from_generator(
        lambda: ((x, y) for x, y in zip(X, Y, strict=True)),
        output_signature=(
            tf().TensorSpec([2], "float32"),
            tf().TensorSpec([], "int32"),
        ),
    )
    source = fit_source(generated.batch(5), steps_per_epoch=4)
    assert source.inexact is None


def test_large_tf_datasets_are_not_copied(monkeypatch):
    from legato.data.adapters import tf_data

    monkeypatch.setattr(tf_data, "_COPIED_BYTES", 100)
    for make, words in (
        (lambda: large(), None),
        (lambda: large().shuffle(3, seed=1), "it is large"),
        (lambda: large().shuffle(3, 1, False), None),
        (lambda: large().shuffle(3), "a shuffle has no seed"),
    ):
        source = fit_source(make().batch(2))
        assert (source.inexact is None) == (words is None)
        assert words is None or words in source.inexact
        read(source, 7)


def test_tf_datasets_that_cannot_be_copied(monkeypatch):
    data = writes_variable().shuffle(9, seed=1)
    assert "writes to a tf.Variable" in fit_source(data.batch(5)).inexact

    def fail(*args, **kwargs):
        raise tf().errors.InvalidArgumentError(None, None, "a handle")

    monkeypatch.setattr(tf().raw_ops, "DatasetToGraphV2", fail)
    source = fit_source(base().shuffle(9, seed=1).batch(5))
    assert "refers to what is outside of it" in source.inexact


def test_distributed_datasets_are_refused():
    distributed = (
        tf()
        .distribute.MirroredStrategy(["CPU:0"])
        .experimental_distribute_dataset(base().batch(4))
    )
    with pytest.raises(Exception, match="belongs to a distribution"):
        fit_source(distributed)


# -- PyTorch ----------------------------------------------------------------


def test_a_loader_whose_sampler_has_a_state_of_its_own():
    import torch

    class Sampler(torch.utils.data.Sampler):
        def __init__(self):
            self.epoch = 0
            self.order = np.arange(23)

        def __iter__(self):
            self.epoch += 1
            np.random.shuffle(self.order)
            return iter((self.order + self.epoch) % 23)

        def __len__(self):
            return 23

    def make():
        return fit_source(torch_loader(sampler=Sampler()))

    whole, states = read_with_states(make(), 16)
    assert len({digest(b) for b in whole}) == 16
    for position in (0, 3, 5, 6, 11, 15):
        source = make()
        rest = read(source, 16 - position, state=states[position])
        assert_equal(rest, whole[position:])
        assert source.inexact is None


def test_a_loader_gives_what_it_gave_before():
    """The generator of the user's is as it was when it was made."""
    import torch

    loader = torch_seeded()
    torch.manual_seed(0)
    expected = [y.tolist() for _, y in loader]
    found = [b[1].tolist() for b in read(fit_source(torch_seeded()), 5)]
    assert found == expected


def test_out_of_order_loaders_are_named():
    loader = torch_loader(num_workers=1, in_order=False)
    reader = pytest.importorskip("legato.data.adapters.torch_loader")
    assert "in_order=False" in reader.TorchLoader(loader).notes[0]


def test_hidden_randomness_of_a_loader_is_named():
    class Hidden(Augmented):
        def __getitem__(self, index):
            return self.x[index] + np.random.default_rng().random(), index

    import torch
    from torch.utils.data import DataLoader

    source = fit_source(DataLoader(Hidden(torch.ones(9, 2)), batch_size=3))
    assert "drawn twice and was not the same" in source.inexact


def test_iterable_datasets_of_pytorch():
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            for i in range(10):
                yield X[i] + np.float32(np.random.rand())

    with pytest.warns(LegatoWarning, match="torch DataLoader.*counted"):
        source = fit_source(DataLoader(Stream(), batch_size=4))
    assert source.batches_per_epoch == 3
    whole, states = read_with_states(source, 8)
    for position in (1, 3, 4, 7):
        source = fit_source(
            DataLoader(Stream(), batch_size=4), steps_per_epoch=3
        )
        rest = read(source, 8 - position, state=states[position])
        assert_equal(rest, whole[position:])


def test_bfloat16_tensors():
    import torch
    from torch.utils.data import DataLoader

    data = torch.linspace(0, 1, 8).to(torch.bfloat16)
    ((batch,), *_) = read(fit_source(DataLoader(data, batch_size=4)), 2)
    assert str(batch.dtype) == "bfloat16"
    expected = data[:4].float().numpy()
    np.testing.assert_array_equal(batch.astype("float32"), expected)


# -- any iterable, generators -----------------------------------------------


class Counts(Iterates):
    """Changes in a way that cannot be saved."""

    def __iter__(self):
        self.opaque = iter(self.__dict__.get("opaque", b"abc"))
        yield from super().__iter__()


def test_what_cannot_be_saved_is_named():
    source = fit_source(Counts())
    read(source, 9)
    assert "opaque" in source.inexact
    assert "changed while it was read and cannot be saved" in source.inexact


def test_a_pass_is_read_to_its_very_end():
    class Ends(Iterates):
        epoch = 0

        def __iter__(self):
            for i in range(self.length):
                yield X + self.epoch, Y + i
            self.epoch += 1

    source = fit_source(Ends())
    found = [int(b[0][0, 0]) for b in read(source, 9)]
    assert found == [0] * 4 + [1] * 4 + [2]
    _, states = read_with_states(source, 9)
    for position in (0, 3, 4, 5, 8):
        rest = read(fit_source(Ends()), 1, state=states[position])
        assert int(rest[0][0][0, 0]) == found[position]


def test_hidden_randomness_is_named():
    class Hidden(Iterates):
        def __iter__(self):
            yield X + np.random.default_rng().random(), Y

    source = fit_source(Hidden(1))
    assert "drawn twice and was not the same" in source.inexact


def test_generators_depend_on_kerass_seed_alone():
    def batches(seed):
        keras.utils.set_random_seed(seed)
        source = fit_source(generator(), steps_per_epoch=3)
        return [digest(b) for b in read(source, 4)]

    assert batches(1) == batches(1) != batches(2)


AHEAD = {
    "grain": True,
    "grain iter": True,
    "grain plain": False,
    "grain loader": False,
    "tf": True,
    "torch": False,
    "iterator": False,
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_is_drawn_ahead(name):
    """Only where none of the user's code runs in the thread that draws."""
    if "grain" in name:
        pytest.importorskip("grain")
    source = KINDS[name]()
    whole = read(source, 15, capacity=3)
    iterator = source.iterate(seed=5, capacity=3)
    assert iterator.draws_ahead == AHEAD[name]
    iterator.close()
    feed = Feed(source, seed=5, capacity=3)
    found, states = [], []
    for _ in range(4):
        chunk = feed.take(3)
        feed.prefetch(3)
        found += chunk_batches(source, chunk)
        np.random.rand()  # as callbacks do
        states.append((len(found), through_disk(feed.get_state())))
    feed.close()
    assert_equal(found, whole[: len(found)])
    for position, state in states:
        source = KINDS[name]()
        feed = Feed(source, seed=5, capacity=3)
        feed.set_state(state)
        rest = list(chunk_batches(source, feed.take(3)))
        feed.close()
        assert_equal(rest, whole[position : position + len(rest)])


def test_iterables_do_not_draw_ahead():
    drawn = []

    def counting():
        for i in range(9):
            drawn.append(i)
            yield X[:3], Y[:3]

    feed = Feed(fit_source(counting(), steps_per_epoch=3), seed=1, capacity=4)
    feed.take(2)
    feed.prefetch(2)
    feed.end_epoch()
    assert drawn == [0, 1]
    feed.close()


def test_a_position_found_in_another_way_is_refused():
    """The streams that the user's code draws from are others."""
    iterator = fit_source(torch_seeded()).iterate(seed=1, capacity=1)
    with pytest.raises(RestoreError, match=r"by 'replay' .* by 'skip' now"):
        iterator.set_state({"pass": 0, "batch": 2, "tracked": None})


@pytest.mark.parametrize(
    "change",
    [
        {"pass": -1},
        {"batch": 5},
        {"batch": None},
        {"tracked": 3},
        None,
        {"library": 3},
        {"library": {"batch": 3, "state": 1, "pending": None}},
        {"library": {"batch": 2, "state": 1, "pending": [np.zeros(2)]}},
        {"library": {"batch": 3, "state": 1, "pending": [np.zeros(2)]}},
        {"library": {"batch": 2, "state": 1, "pending": None, "first": 1}},
    ],
)
def test_a_position_of_something_else_is_refused(change):
    good = {"pass": 0, "batch": 2, "tracked": None}
    state = {} if change is None else {**good, **change}
    iterator = fit_source(Iterates()).iterate(seed=1, capacity=1)
    with pytest.raises(RestoreError, match=r"data position.*4 batches"):
        iterator.set_state(state)
    iterator.set_state(good)


def test_damaged_objects_are_refused():
    iterator = fit_source(Iterates()).iterate(seed=1, capacity=1)
    with pytest.raises(DamagedError, match="not that of objects"):
        iterator.set_state({"pass": 0, "batch": 2, "tracked": [3]})
    iterator = fit_source(torch_seeded()).iterate(seed=1, capacity=1)
    size = len(iterator._source.reader.tracked)
    for damage in (3, {}, {"generator": np.zeros(3, "uint8")}):
        tracked = [damage, *[None] * (size - 1)]
        state = {"pass": 0, "batch": 2, "tracked": tracked}
        with pytest.raises(DamagedError):
            iterator.set_state({**state, "method": "skip"})
        whole = {**state, "tracked": [None] * size, "drawn": 2}
        with pytest.raises(DamagedError):
            iterator.set_state({**whole, "now": tracked, "method": "skip"})


def test_data_that_became_shorter():
    source = fit_source(Unsized(), steps_per_epoch=7)
    iterator = source.iterate(seed=1, capacity=1)
    iterator.set_state({"pass": 0, "batch": 5, "tracked": None})
    with pytest.raises(RestoreError, match=r"batch 5 of pass 0.*only 3 now"):
        iterator.next_chunk(1)


def test_identity_tells_data_apart():
    found = [
        fit_source(*args, **kwargs).identity
        for args, kwargs in (
            ((Iterates(),), {}),
            ((Iterates(3),), {}),
            ((Iterates(),), {"steps_per_epoch": 4}),
            ((Iterates(),), {"class_weight": {0: 2.0}}),
            ((tf_dataset(),), {}),
            ((torch_loader(),), {}),
            ((torch_loader(shuffle=True),), {}),
            ((torch_augmented(),), {}),
        )
    ]
    for i, one in enumerate(found):
        assert all(one != other for other in found[:i])
