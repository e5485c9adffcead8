"""Batches of examples of like length."""

import itertools
import math
from collections import Counter

import keras
import numpy as np
import pytest

import legato
from legato.data import Buckets
from legato.errors import ConfigError, DataError
from tests.data.reading import assert_equal, digest, read, read_with_states

LENGTHS = np.random.default_rng(0).integers(1, 30, 101)
BOUNDARIES = [5, 12, 20]


class Sentences:
    """Example i holds i, as often as it is long."""

    def __init__(self, lengths=LENGTHS):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return {"x": np.full(self.lengths[index], index, "int32"), "i": index}


def source(**kwargs):
    arguments = {
        "batch_size": 8,
        "bucket_by": Buckets(LENGTHS, BOUNDARIES),
        "collate": legato.Pad({"x": -1}, boundaries=[*BOUNDARIES, 30]),
        **kwargs,
    }
    return legato.RandomAccessSource(Sentences(), **arguments)


def indices(batches):
    return [batch["i"].tolist() for batch in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def bucket(index):
    return int(np.searchsorted(BOUNDARIES, LENGTHS[index]))


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_every_example_once_in_an_epoch_and_with_its_like(shuffle):
    data = source(shuffle=shuffle)
    size = data.batches_per_epoch
    counts = Counter(map(bucket, range(101)))
    assert size == sum(math.ceil(n / 8) for n in counts.values())
    batches = read(data, 3 * size)
    for epoch in range(3):
        found = indices(batches[epoch * size : (epoch + 1) * size])
        assert sorted(flat(found)) == list(range(101))
        assert all(len({*map(bucket, each)}) == 1 for each in found)
        partial = Counter(bucket(e[0]) for e in found if len(e) < 8)
        assert partial == {b: 1 for b, n in counts.items() if n % 8}


def test_few_shapes():
    shapes = {batch["x"].shape for batch in read(source(), 60)}
    assert {shape[1] for shape in shapes} == {*BOUNDARIES, 30}
    assert len(shapes) <= 8


def test_epochs_and_seeds_differ():
    size = source().batches_per_epoch
    found = [digest(b) for b in read(source(), 3 * size)]
    other = [digest(b) for b in read(source(), size, seed=6)]
    assert not {*found[:size]} & {*found[size : 2 * size]}
    assert not {*found[:size]} & {*other}
    own = source(seed=5)
    assert_equal(read(own, size, seed=77), read(source(), size))


def test_without_a_shuffle_they_come_in_their_order():
    found = indices(read(source(shuffle=False), source().batches_per_epoch))
    assert [bucket(e[0]) for e in found] == sorted(bucket(e[0]) for e in found)
    for which in range(4):
        inside = flat(e for e in found if bucket(e[0]) == which)
        assert inside == sorted(inside)
    mixed = indices(read(source(shuffle="batch"), len(found)))
    assert mixed != found
    assert [sorted(each) for each in mixed] == found


@pytest.mark.parametrize("kwargs", [{}, {"workers": 2, "prefetch": 3}])
def test_resumed_at_every_position(kwargs):
    count = 2 * source().batches_per_epoch + 3
    whole, states = read_with_states(source(), count)
    assert states[7] == {"epoch": 0, "batch": 7}
    data = source(**kwargs)
    for position in range(0, count, 1 + 4 * bool(kwargs)):
        rest = read(data, count - position, state=states[position])
        assert_equal(rest, whole[position:])


def test_every_batch_is_as_likely_at_every_place():
    """Chi-squared over places, of the bucket of a batch and of an example."""
    data = source()
    size, trials = data.batches_per_epoch, 800
    order = data.plan.order(9)
    longest = Counter(map(bucket, range(101)))[3]
    at_place = np.zeros(size)
    of_example = np.zeros(101)
    for epoch in range(trials):
        batches = [order.batch(epoch, i) for i in range(size)]
        at_place += [bucket(batch[0]) == 3 for batch in batches]
        partial = next(
            b for b in batches if bucket(b[0]) == 3 and len(b) == longest % 8
        )
        of_example[partial] += 1
    for found, expected in (
        (at_place, trials * math.ceil(longest / 8) / size),
        (
            of_example[[bucket(i) == 3 for i in range(101)]],
            trials * (longest % 8) / longest,
        ),
    ):
        degrees = len(found) - 1
        chi_squared = ((found - expected) ** 2 / expected).sum()
        # (Below it, for the places of several are not independent.)
        assert chi_squared < degrees + 4 * math.sqrt(2 * degrees)
        assert found.min() > 0


def test_lengths_may_be_a_function():
    calls = []

    def length(example):
        calls.append(int(example["i"]))
        return len(example["x"])

    found = source(bucket_by=Buckets(length, BOUNDARIES))
    assert sorted(calls) == list(range(101))
    assert_equal(read(found, 20), read(source(), 20))
    assert found.identity == source().identity
    # Of several datasets, too.
    buckets = Buckets(length, BOUNDARIES)
    source(bucket_by=buckets)
    legato.RandomAccessSource(Sentences([3, 3]), 2, bucket_by=buckets)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_a_number_of_buckets(count):
    buckets = Buckets(LENGTHS, count)
    assert buckets.boundaries[-1] == LENGTHS.max()
    data = source(bucket_by=buckets)
    assert len(data.plan.counts) == len(buckets.boundaries) <= count
    if count in (2, 5):
        assert max(data.plan.counts) - min(data.plan.counts) < 12
    found = indices(read(data, data.batches_per_epoch))
    assert sorted(flat(found)) == list(range(101))


def test_batches_of_sizes_of_their_own():
    sizes = [16, 8, 4, 2]
    data = source(bucket_by=Buckets(LENGTHS, BOUNDARIES, batch_sizes=sizes))
    found = indices(read(data, data.batches_per_epoch))
    assert sorted(flat(found)) == list(range(101))
    for which, size in enumerate(sizes):
        most = [len(each) for each in found if bucket(each[0]) == which]
        assert max(most) == size and min(most) > 0


def test_partial_batches_may_be_left_out():
    data = source(drop_remainder=True)
    found = indices(read(data, 2 * data.batches_per_epoch))
    assert {len(each) for each in found} == {8}
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    seen = flat(first)
    assert len(seen) == len({*seen}) > 101 - 4 * 8
    assert {*seen} != {*flat(second)}


def test_an_empty_bucket():
    lengths = np.array([1, 9, 1, 9, 9])
    data = legato.RandomAccessSource(
        Sentences(lengths), 2, bucket_by=Buckets(lengths, [2, 4, 6, 10])
    )
    assert sorted(flat(indices(read(data, 3)))) == list(range(5))


def test_other_buckets_are_other_data():
    one, other = source(), source(bucket_by=Buckets(LENGTHS, [6, 12, 20]))
    assert one.identity != other.identity
    assert "buckets" not in source(bucket_by=None).identity


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Buckets([1.5], [3]), "array of float64.*must be ints"),
        (lambda: Buckets([[1]], [3]), r"shape \(1, 1\)"),
        (lambda: Buckets([1], []), r"boundaries=\[\].*at least one"),
        (lambda: Buckets([1], 0), "boundaries=0.*at least one"),
        (lambda: Buckets([1], True), "boundaries=True.*at least one"),
        (lambda: Buckets([1], [3, 2]), r"\[3, 2\].*above the one before"),
        (lambda: Buckets([1], [1.5]), r"\[1\.5\].*must be lengths"),
        (lambda: Buckets([1], [3], batch_sizes=[0]), "batch_size=0"),
        (lambda: source(bucket_by=LENGTHS), "must be a legato.Buckets"),
        (lambda: source(bucket_by=Buckets([1, 2], [3])), "2 lengths.*one for"),
        (
            lambda: source(bucket_by=Buckets(LENGTHS, [9], batch_sizes=[3])),
            r"batch_sizes=\[3\]: there are 2 buckets",
        ),
        (
            lambda: source(batch_size=500, drop_remainder=True),
            "no bucket holds a whole batch",
        ),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make()


class Sums(legato.Task):
    def build_model(self):
        return keras.Sequential(
            [
                keras.layers.Input((None,)),
                keras.layers.Embedding(102, 3),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(1),
            ]
        )

    def build_optimizer(self):
        return keras.optimizers.Adam(0.01)

    def build_inputs(self, split):
        return source(collate=_collate) if split == "train" else None

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return keras.ops.mean((labels - model_outputs) ** 2)


def _collate(examples):
    pad = legato.Pad({"x": 101}, boundaries=[*BOUNDARIES, 30])
    batch = pad(examples)
    return batch["x"], batch["i"][:, None].astype("float32") / 101


def test_a_run_that_is_resumed_is_the_same(tmp_path):
    def train(run_dir, epochs):
        keras.utils.set_random_seed(1)
        config = legato.TrainerConfig(epochs=epochs, progress="none")
        trainer = legato.Trainer(Sums(), run_dir=run_dir, config=config)
        history = trainer.train().history
        return history, [np.array(w) for w in trainer.model.get_weights()]

    whole = train(tmp_path / "whole", 3)
    train(tmp_path / "run", 1)
    train(tmp_path / "run", 2)
    again = train(tmp_path / "run", 3)
    assert again[0] == whole[0]
    assert all(map(np.array_equal, again[1], whole[1]))
