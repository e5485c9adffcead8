"""Data that fail while they are read: named, with their own traceback."""

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import keras
import numpy as np
import pytest

import legato
from legato.data import fit_source
from legato.errors import DataError, RestoreError
from tests.data.reading import read, read_with_states, take
from tests.data.sources import X, Y
from tests.processes import is_alive
from tests.waiting import until

on_torch = pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="a fork of JAX's many threads may deadlock",
)


def notes(error):
    return "".join(traceback.format_exception(error))


class Fails:
    def __iter__(self):
        for i in range(6):
            if i == 4:
                raise OSError("the disk is gone")
            yield X[:5], Y[:5]


def test_what_the_users_code_raises_is_named():
    source = fit_source(Fails(), steps_per_epoch=6, name="train")
    with pytest.raises(OSError, match="the disk is gone") as caught:
        read(source, 6)
    text = notes(caught.value)
    assert "legato: raised while train (iterable) was read." in text
    assert 'raise OSError("the disk is gone")' in text


@pytest.mark.any_backend
def test_training_stops_with_all_saved_and_goes_on(tmp_path):
    fails = [True]

    class Data(Fails):
        def __iter__(self):
            for i in range(6):
                if i == 4 and fails[0]:
                    raise OSError("the disk is gone")
                yield X[:5] + i, Y[:5]

    def train(run_dir):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        legato.fit(
            model,
            Data(),
            steps_per_epoch=6,
            epochs=2,
            verbose=0,
            checkpoint_interval=2,
            run_dir=tmp_path / run_dir,
        )
        return model.get_weights()

    with pytest.raises(OSError, match="the disk is gone") as caught:
        train("a")
    assert "goes on from the newest checkpoint" in notes(caught.value)
    fails[0] = False
    for ours, whole in zip(train("a"), train("b"), strict=True):
        np.testing.assert_array_equal(ours, whole)


class Short:
    """Ends early in its second pass, and is empty in the third."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.passes += 1
        for i in range([0, 4, 3, 0][self.passes]):
            yield X[:5] + i, Y[:5]


def test_data_that_end_early_in_a_later_pass():
    with pytest.raises(DataError, match=r"x \(iterable\): it ended after 3"):
        read(fit_source(Short()), 8)
    source = fit_source(Short(), steps_per_epoch=4)
    with pytest.raises(DataError, match="it gave no batch"):
        read(source, 8)


def test_empty_datasets_of_other_libraries():
    grain = pytest.importorskip("grain")
    import tensorflow as tf
    import torch

    for data in (
        grain.MapDataset.source([]).batch(2),
        tf.data.Dataset.range(0).batch(2),
        torch.utils.data.DataLoader([], batch_size=2),
    ):
        with pytest.raises(DataError, match=r"x \(.*\).*(no batch|is 0)"):
            fit_source(data)


class Changes:
    def __init__(self, second):
        self.second = second

    def __iter__(self):
        yield X[:5], Y[:5]
        yield X[:5], Y[:5]
        yield X[:5], Y[:5]
        yield X[:5], Y[:5]
        yield X[:5], Y[:5]
        yield self.second


@pytest.mark.parametrize(
    "second, words",
    [
        ((X[:5],), "nested as"),
        ({"x": X[:5]}, "nested as"),
        ((X[:5].astype("int32"), Y[:5]), r"int32 at 0, where .* float32"),
        ((X[:5], 3), "int 3 at 1"),
    ],
)
def test_batches_that_change(second, words):
    source = fit_source(Changes(second), steps_per_epoch=6)
    with pytest.raises(DataError, match=rf"x \(iterable\) gave.*{words}"):
        read(source, 6)


# -- states that do not fit ---------------------------------------------------


def test_a_state_that_does_not_fit_is_refused():
    from tests.data.sources import Told

    class Strict(Told):
        def set_state(self, state):
            if state["position"] == 3 and strict[0]:
                raise KeyError("worker 7")
            super().set_state(state)

    strict = [False]
    _, states = read_with_states(fit_source(Strict(), steps_per_epoch=9), 3)
    strict[0] = True
    iterator = fit_source(Strict(), steps_per_epoch=9).iterate(
        seed=5, capacity=1
    )
    iterator.set_state(states[3])
    with pytest.raises(RestoreError, match=r"x \(iterator\).*worker 7"):
        iterator.next_chunk(1)


class Forgets:
    """Its state leaves out its generator."""

    def __init__(self):
        self.position = 0
        self.generator = np.random.default_rng(3)

    def __len__(self):
        return 9

    def __iter__(self):
        while self.position < 9:
            self.position += 1
            yield X[:5] + self.generator.random(), Y[:5]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Unsaveable(Forgets):
    def state_dict(self):
        return {"position": {self.position}}


@pytest.mark.parametrize(
    "make, words",
    [(Forgets, "was not the same"), (Unsaveable, "is a builtins.set")],
)
def test_states_that_do_not_do_are_not_believed(make, words):
    source = fit_source(make())
    assert source.reader.method == "replay" and source.inexact is None
    assert words in source.reader.why
    whole, states = read_with_states(source, 20)
    for position in (3, 8, 12):
        rest = read(fit_source(make()), 20 - position, state=states[position])
        for ours, theirs in zip(rest, whole[position:], strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])


# -- worker processes ---------------------------------------------------------


def grain_source(workers=1, function=None):
    pytest.importorskip("grain")
    from tests.data import grain_examples

    return fit_source(
        grain_examples.dataset(
            workers=workers,
            function=function and getattr(grain_examples, function),
        ),
        steps_per_epoch=5,
        name="train",
    )


@pytest.mark.any_backend
def test_another_number_of_grains_workers_is_refused():
    _, states = read_with_states(grain_source(1), 2)
    iterator = grain_source(2).iterate(seed=5, capacity=1)
    iterator.set_state(states[2])
    with pytest.raises(RestoreError, match=r"train \(grain.*with 1 worker"):
        iterator.next_chunk(1)
    iterator.close()


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "function, words", [("fail", "is bad"), ("die", "terminated unexpectedly")]
)
def test_grains_workers_that_fail(function, words):
    with pytest.raises(Exception, match=words) as caught:
        read(grain_source(1, function), 5)
    assert "train (grain IterDataset) was read" in notes(caught.value)


_GRAIN = """
import os, signal
from tests.data import grain_examples

if __name__ == "__main__":
    from legato.data import fit_source  # workers start the sooner without it
    data = grain_examples.dataset(workers=2)
    source = fit_source(data, steps_per_epoch=5, name="train")
    iterator = source.iterate(seed=5, capacity=1)
    for _ in range(2):  # one from each, so that both have begun
        iterator.next_chunk(1)
    import multiprocessing
    print(*(c.pid for c in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.any_backend
def test_grains_workers_end_with_their_parent(tmp_path):
    pytest.importorskip("grain")
    script = tmp_path / "script.py"
    script.write_text(_GRAIN)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done
    pids = list(map(int, done.stdout.splitlines()[0].split()))
    assert len(pids) == 2
    until(lambda: not any(map(is_alive, pids)))


class Failing:
    """Something is wrong with one example.

    Args:
        how: what.
        fetched: a file that tells that those before it were fetched.
    """

    def __init__(self, how, fetched):
        self.how = how
        self.fetched = fetched

    def __len__(self):
        return 53

    def __getitem__(self, index):
        if index == 40 and self.how == "raises":
            raise ValueError(f"example {index} is bad")
        if index == 40 and self.how == "dies":
            while not self.fetched.exists():  # (What it made is its own.)
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 40 and self.how == "hangs":
            time.sleep(1000)
        return X[index % 23], Y[index % 23]


@on_torch
@pytest.mark.parametrize(
    "how, words",
    [
        ("raises", "DataLoader worker process 0"),
        ("dies", "DataLoader worker .*killed by signal|exited unexpectedly"),
        ("hangs", "timed out after"),
    ],
)
def test_torchs_workers_that_fail(how, words, tmp_path):
    from torch.utils.data import DataLoader

    fetched = tmp_path / "fetched"
    loader = DataLoader(
        Failing(how, fetched),
        batch_size=5,
        num_workers=1,
        # (Of all batches: the first ones wait until there is a worker.)
        timeout=3 if how == "hangs" else 60,
    )
    source = fit_source(loader, name="train")
    iterator = source.iterate(seed=5, capacity=1)
    take(iterator, source, 8)
    fetched.touch()
    with pytest.raises(Exception, match=words) as caught:
        take(iterator, source, 1)
    iterator.close()
    text = notes(caught.value)
    assert "train (torch DataLoader) was read" in text
    if how == "raises":
        assert "example 40 is bad" in text and "__getitem__" in text


def stateful():
    loader = pytest.importorskip("torchdata.stateful_dataloader")
    return loader.StatefulDataLoader(list(zip(X, Y, strict=True)), 5, True)


def split():
    from torch.utils import data

    part, _ = data.random_split(list(zip(X, Y, strict=True)), [15, 8])
    return data.DataLoader(part, 5)


@pytest.mark.parametrize("make", [stateful, split])
def test_of_data_without_a_seed_the_cause_is_told(make, tmp_path):
    import torch

    def fit(epochs):
        torch.manual_seed(epochs)  # as no two processes have the same
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        legato.fit(
            model, make(), epochs=epochs, verbose=0,
            run_dir=tmp_path, exact="strict",
        )  # fmt: skip

    fit(1)
    with pytest.raises(RestoreError) as error:
        fit(2)
    assert "data: the first batch is another one than when" in str(error.value)
    assert "random_split take a generator" in str(error.value)
