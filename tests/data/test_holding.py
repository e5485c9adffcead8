"""Objects that training and validation share."""

import numpy as np
import pytest

from legato.data import fit_source
from tests.data.reading import (
    assert_equal,
    digest,
    read,
    read_with_states,
    take,
    through_disk,
)
from tests.data.sources import (
    Buckets,
    Iterates,
    Reshuffles,
    X,
    torch_augmented,
)


def loaders():
    """Two loaders that draw from one generator."""
    import torch
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(5)
    data = torch.from_numpy(X)
    return (
        DataLoader(data, batch_size=5, shuffle=True, generator=generator),
        DataLoader(data[:7], batch_size=5, generator=generator),
    )


def same(make):
    data = make()
    return data, data


PAIRS = {
    "py": lambda: same(Reshuffles),
    "py buckets": lambda: same(Buckets),
    "iterable": lambda: same(Iterates),
    "torch": lambda: same(torch_augmented),
    "torch, a generator": loaders,
}


def make(name):
    return [fit_source(data) for data in PAIRS[name]()]


@pytest.mark.parametrize("every", [1, 3, 5])
@pytest.mark.parametrize("name", PAIRS)
def test_validation_changes_nothing(name, every):
    train, validation = make(name)
    whole = read(train, 16)
    expected = read(validation, 3)
    train, validation = make(name)
    iterator = train.iterate(seed=5, capacity=4)
    found, states = [], []
    for i in range(16):
        found += take(iterator, train, 1)
        if i % every == 0:
            assert_equal(read(validation, 3), expected)
        states.append(through_disk(iterator.get_state()))
    assert_equal(found, whole)
    for position in (1, 5, 6, 12):
        train, validation = make(name)
        iterator = train.iterate(seed=5, capacity=4)
        iterator.set_state(states[position - 1])
        rest = []
        for _ in range(position, 16):
            rest += take(iterator, train, 1)
            assert_equal(read(validation, 3), expected)
        assert_equal(rest, whole[position:])


@pytest.mark.parametrize("name", PAIRS)
def test_an_iterator_that_was_suspended_is_sent_back(name):
    train, validation = make(name)
    whole, states = read_with_states(train, 9)
    for position in (0, 2, 6):
        iterator = train.iterate(seed=5, capacity=4)
        other = validation.iterate(seed=5, capacity=4)
        take(iterator, train, 3)
        take(other, validation, 1)
        iterator.set_state(states[position])
        assert_equal(take(iterator, train, 3), whole[position : position + 3])
        iterator.close()
        other.close()


def test_the_epoch_ends_after_validation():
    train, validation = make("py")
    whole = read(train, 15)
    iterator = train.iterate(seed=5, capacity=1)
    found = []
    for _ in range(3):
        found += take(iterator, train, 5)
        read(validation, 3)
        iterator.end_epoch()
    assert_equal(found, whole)


def test_the_order_still_changes_with_the_epoch():
    train, validation = make("torch, a generator")
    iterator = train.iterate(seed=5, capacity=1)
    epochs = []
    for _ in range(3):
        epochs.append(tuple(map(digest, take(iterator, train, 5))))
        read(validation, 2)
    assert len(set(epochs)) == 3


def test_what_a_callback_changes_stays():
    data = Reshuffles()
    train, validation = fit_source(data), fit_source(Reshuffles())
    iterator = train.iterate(seed=5, capacity=1)
    take(iterator, train, 2)
    read(validation, 5)
    data.indices = np.zeros(23, int)
    assert not take(iterator, train, 2)[0][1].any() or data.drawn > 0
    assert (data.indices == 0).all()
    assert iterator.get_state()["attributes"] is not None


def test_a_checkpoint_while_validation_has_the_data():
    train, validation = make("py")
    whole, _ = read_with_states(train, 8)
    train, validation = make("py")
    iterator = train.iterate(seed=5, capacity=1)
    take(iterator, train, 3)
    other = validation.iterate(seed=1, capacity=1)
    take(other, validation, 2)
    state = through_disk(iterator.get_state())
    other.close()
    iterator.close()
    assert_equal(read(make("py")[0], 5, state=state), whole[3:])


def test_it_comes_back_from_several_that_took_it():
    train, validation = make("py")
    dataset = train.dataset
    iterator = train.iterate(seed=5, capacity=1)
    take(iterator, train, 2)
    drawn = dataset.drawn
    first = validation.iterate(seed=1, capacity=1)
    second = validation.iterate(seed=1, capacity=1)
    take(second, validation, 1)
    first.close()  # while the second one has it
    second.close()
    assert dataset.drawn == drawn
    dataset.drawn += 5
    take(iterator, train, 1)
    assert dataset.drawn > drawn + 5
