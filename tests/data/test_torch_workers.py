"""PyTorch's loaders with worker processes: batches are skipped by number."""

import multiprocessing
import random

import keras
import numpy as np
import pytest

from legato.data import fit_source
from tests.data.reading import assert_equal, digest, read, read_with_states
from tests.data.sources import X

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="a fork of JAX's many threads may deadlock",
)

LOADED = multiprocessing.get_context("fork").Value("i", 0)
"""Examples that were loaded, by all workers."""


class Noisy:
    """Draws from all global generators, and tells who loads it."""

    def __init__(self):
        self.prepared = 0

    def __len__(self):
        return 63

    def __getitem__(self, index):
        import torch

        with LOADED.get_lock():
            LOADED.value += 1
        info = torch.utils.data.get_worker_info()
        noise = np.random.rand() + random.random() + torch.rand(()).item()
        noise += float(keras.random.uniform(()))
        x = X[index % 23] + np.float32(noise)
        return x, np.array([index, info.id, info.dataset.prepared])


class Keeps(Noisy):
    """Has a generator of its own, which a worker takes on from example to
    example; the same in each at first."""

    def __init__(self):
        super().__init__()
        self.own = random.Random(3)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + np.float32(self.own.random()), y


def prepare(worker):
    import torch

    torch.utils.data.get_worker_info().dataset.prepared = 100 + worker


def source(dataset=None, *, workers=2, **kwargs):
    import torch

    kwargs = {"batch_size": 5, "shuffle": True, "num_workers": workers} | kwargs
    data = Noisy() if dataset is None else dataset
    return fit_source(torch.utils.data.DataLoader(data, **kwargs))


CASES = {
    "2": {},
    "1": {"workers": 1},
    "3": {"workers": 3, "batch_size": 4, "worker_init_fn": prepare},
    "persistent": {"persistent_workers": True, "prefetch_factor": 4},
    "single": {"batch_size": None, "shuffle": False, "workers": 3},
    "in order": {"shuffle": False, "drop_last": True},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_without_loading_again(case):
    kwargs = CASES[case]
    first = source(**kwargs)
    assert first.reader.method == "skip" and first.inexact is None
    count = first.batches_per_epoch + 4
    whole, states = read_with_states(first, count)
    assert len({digest(b) for b in whole}) == count
    if "worker_init_fn" in kwargs:
        assert all((b[1][:, 2] == 100 + b[1][:, 1]).all() for b in whole)
    for position in range(1, count, 5):
        again = source(**kwargs)
        iterator = again.iterate(seed=5, capacity=4)
        iterator.set_state(states[position])
        assert iterator.rereads == 0
        iterator.close()
        rest = read(again, count - position, state=states[position])
        assert_equal(rest, whole[position:])


@pytest.mark.parametrize("workers", [2, 5])
def test_what_a_worker_keeps_is_found_out(workers):
    """With more workers than batches that are compared, too."""
    make = lambda: source(Keeps(), workers=workers)  # noqa: E731
    first = make()
    assert first.reader.method == "replay"
    assert "depends on what it gave before" in first.reader.why
    whole, states = read_with_states(first, 15)
    for position in (1, 6, 14):
        rest = read(make(), 15 - position, state=states[position])
        assert_equal(rest, whole[position:])


def test_too_few_batches_to_try():
    make = lambda: source(workers=3, batch_size=30)  # noqa: E731
    assert make().reader.method == "replay"
    assert "too few batches" in make().reader.why
    whole, states = read_with_states(make(), 5)
    assert_equal(read(make(), 3, state=states[2]), whole[2:])


def test_the_number_of_workers_changes_no_noise():
    """But what is made of the number of the worker."""
    one, other = read(source(), 9), read(source(workers=3), 9)
    for (x, _), (z, _) in zip(one, other, strict=True):
        assert x.tolist() == z.tolist()


def test_what_is_skipped_is_not_loaded():
    make = lambda: source(Noisy(), shuffle=False)  # noqa: E731
    _, states = read_with_states(make(), 12)
    data = make()
    with LOADED.get_lock():
        LOADED.value = 0
    read(data, 1, state=states[10])
    # (2 workers load up to 2 batches ahead.)
    assert 5 <= LOADED.value <= 15
