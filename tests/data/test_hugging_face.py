"""Hugging Face's datasets, with the real library."""

import keras
import numpy as np
import pytest

import legato
from legato.data import fit_source, task_source
from legato.errors import DataError, LegatoWarning
from tests.data.reading import assert_equal, digest, read, read_with_states
from tests.data.sources import NAMES, X, Y, hugging_face, hugging_face_stream

datasets = pytest.importorskip("datasets")


# -- map-style ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_rows_are_examples(kind):
    source = hugging_face(kind, shuffle=False)
    whole = read(source, 5)
    assert [len(batch["y"]) for batch in whole] == [5, 5, 5, 5, 3]
    x = np.concatenate([batch["x"] for batch in whole])
    y = np.concatenate([batch["y"] for batch in whole])
    names = np.concatenate([batch["name"] for batch in whole])
    assert x.dtype == "float32" and x.tolist() == X.tolist()
    assert y.tolist() == Y.tolist() and names.tolist() == NAMES
    assert source.inexact is None


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_resumed_at_every_position(kind):
    whole, states = read_with_states(hugging_face(kind), 12)
    assert len({digest(b) for b in whole}) == 12
    for position, state in enumerate(states[:-1]):
        rest = read(hugging_face(kind), 12 - position, state=state)
        assert_equal(rest, whole[position:])


def test_workers_give_the_same():
    wanted = read(hugging_face("numpy"), 12)
    for kwargs in ({"workers": 2}, {"workers": 2, "processes": True}):
        source = hugging_face("numpy", **kwargs)
        assert source.inexact is None
        assert_equal(read(source, 12), wanted)


def test_a_task_may_return_one():
    source = task_source(hugging_face().recipe.dataset, "d", shuffle=False)
    assert source.full_batch_size == 23
    assert sorted(source.batch_spec(5)) == ["name", "x", "y"]


class Pairs(legato.HostMetric):
    def reset_state(self):
        self.found = {}

    def update_state(self, labels, outputs):
        values = labels["y"][:, 0].astype(int).tolist()
        self.found |= dict(zip(labels["name"].tolist(), values, strict=True))

    def result(self):
        return {"pairs": float(len(self.found))}


class Task(legato.Task):
    def __init__(self, make):
        self._make = make
        self.metric = Pairs()

    def build_model(self):
        return keras.Sequential(
            [keras.layers.Input((2,)), keras.layers.Dense(1)]
        )

    def build_optimizer(self):
        return keras.optimizers.SGD(1e-4)

    def build_inputs(self, split):
        return self._make()

    def _parts(self, row):
        y = keras.ops.cast(row["y"], "float32")[:, None]
        return row["x"], {"y": y, "name": row["name"]}

    def train_step(self, inputs, model, optimizer, metrics=None):
        inputs = self._parts(inputs)
        return super().train_step(inputs, model, optimizer, metrics)

    def validation_step(self, inputs, model, metrics=None):
        return super().validation_step(self._parts(inputs), model, metrics)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return keras.ops.mean((labels["y"] - model_outputs) ** 2)

    def build_metrics(self, training):
        return [] if training else [self.metric]


@pytest.mark.filterwarnings("ignore:.*they are counted")
@pytest.mark.parametrize(
    "make",
    [hugging_face, hugging_face_stream, lambda: hugging_face_stream(True)],
)
def test_a_run_that_is_resumed_is_the_same(make, tmp_path):
    def train(run_dir, epochs):
        keras.utils.set_random_seed(1)
        task = Task(make)
        config = legato.TrainerConfig(epochs=epochs, progress="none")
        trainer = legato.Trainer(task, run_dir=run_dir, config=config)
        history = trainer.train().history
        assert task.metric.found == dict(zip(NAMES, Y.tolist(), strict=True))
        return history, [np.array(w) for w in trainer.model.get_weights()]

    whole = train(tmp_path / "whole", 3)
    train(tmp_path / "run", 1)
    again = train(tmp_path / "run", 3)
    assert again[0] == whole[0]
    assert all(map(np.array_equal, again[1], whole[1]))


# -- streams ------------------------------------------------------------------


def data():
    return hugging_face().recipe.dataset.to_iterable_dataset(num_shards=3)


def added(example):
    return {"x": [value + 1 for value in example["x"]]}


def noisy(example):
    return {"x": [value + np.random.rand() for value in example["x"]]}


def odd(example):
    return example["y"] % 2 == 1


STREAMS = {
    "plain": (lambda: data().batch(5), "state"),
    "numpy": (lambda: data().with_format("numpy").batch(5), "state"),
    "torch": (lambda: data().batch(5).with_format("torch"), "state"),
    "mapped": (lambda: data().map(added).batch(4), "state"),
    "filtered": (lambda: data().skip(3).filter(odd).batch(3), "state"),
    "together": (
        lambda: datasets.concatenate_datasets([data(), data()]).batch(7),
        "state",
    ),
    "mixed": (
        lambda: datasets.interleave_datasets([data(), data()], seed=3).batch(7),
        "state",
    ),
    "endless": (lambda: data().repeat(None).batch(5), "state"),
    "random": (lambda: data().map(noisy).batch(5), "replay"),
    "shuffled": (
        lambda: data().shuffle(seed=3, buffer_size=7).batch(5),
        "replay",
    ),
}


def stream(name):
    return fit_source(
        STREAMS[name][0](), steps_per_epoch=7 if name == "endless" else None
    )


@pytest.mark.filterwarnings("ignore:.*they are counted")
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_resumed_at_every_position(name):
    source = stream(name)
    assert source.reader.method == STREAMS[name][1]
    assert source.inexact is None
    whole, states = read_with_states(source, 15)
    for position, state in enumerate(states[:-1]):
        rest = read(stream(name), 15 - position, state=state)
        assert_equal(rest, whole[position:])


@pytest.mark.filterwarnings("ignore:.*they are counted")
@pytest.mark.parametrize("name", ["plain", "shuffled"])
def test_two_iterators_do_not_meet(name):
    """Of one dataset: they share what they count in the library."""
    source = stream(name)
    wanted = read(source, 7)
    one = source.iterate(seed=5, capacity=1)
    two = source.iterate(seed=5, capacity=1)
    found = []
    for number in range(7):
        found += read_one(source, one)
        if number % 2:
            read_one(source, two)
            two.get_state()
    state = one.get_state()
    one.close(), two.close()
    assert_equal(found, wanted)
    assert_equal(read(source, 2, state=state), read(source, 9)[7:])


def read_one(source, iterator):
    from tests.data.reading import take

    return take(iterator, source, 1)


@pytest.mark.filterwarnings("ignore:.*they are counted")
def test_shuffled_anew_in_each_pass():
    """As its own trainer does it; what is not shuffled stays as it is."""
    for name, differ in (("shuffled", True), ("plain", False)):
        source = stream(name)
        found = [digest(batch) for batch in read(source, 10)]
        assert (found[:5] != found[5:]) == differ


@pytest.mark.filterwarnings("ignore:.*they are counted")
def test_the_users_dataset_is_left_alone():
    given = data().batch(5)
    before = list(given)
    read(fit_source(given), 3)
    assert list(given) == before


def test_a_stream_is_counted_once():
    with pytest.warns(LegatoWarning, match="they are counted"):
        source = stream("plain")
    assert source.batches_per_epoch == 5


def test_what_is_wrong_is_named():
    with pytest.raises(DataError, match="has no end: give steps_per_epoch"):
        fit_source(STREAMS["endless"][0]())
    with pytest.raises(DataError, match=r"'y' is 0.*give dataset\.batch"):
        fit_source(data(), steps_per_epoch=3)
    ragged = datasets.Dataset.from_dict({"x": [[1], [1, 2]], "y": [1, 2]})
    ragged = ragged.to_iterable_dataset().batch(2)
    with pytest.raises(DataError, match=r"example 1 of a batch.*column 'x'"):
        fit_source(ragged, steps_per_epoch=3)
    with pytest.raises(DataError, match=r"y was given.*IterableDataset"):
        fit_source(data().batch(5), Y, steps_per_epoch=3)


def test_a_shuffle_without_a_seed_is_named():
    source = fit_source(
        data().shuffle(buffer_size=7).batch(5), steps_per_epoch=5
    )
    assert "a shuffle has no seed" in source.inexact
    read(source, 7)
