"""The order of data: a permutation, uniform, the same for ever."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from legato.errors import DamagedError
from legato.rng import (
    Permutation,
    derive_seed,
    get_host_state,
    set_host_state,
)


def order(length: int, seed: int, epoch: int) -> np.ndarray:
    key = derive_seed(seed, "order", epoch)
    return Permutation(length, key)(np.arange(length))


@pytest.mark.parametrize(
    "length", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 1797, 65536, 100003]
)
def test_it_is_a_permutation(length):
    assert sorted(order(length, 0, 3).tolist()) == list(range(length))


def test_any_part_of_a_vast_one_is_computed_alone():
    length = 10**12
    permutation = Permutation(length, derive_seed(1))
    far = permutation(np.arange(length - 1000, length))
    assert len(set(far.tolist())) == 1000
    assert 0 <= far.min() < length // 10 and length * 9 // 10 < far.max()
    assert far.max() < length
    again = permutation(np.array([[length - 1], [length - 3]]))
    assert again.tolist() == [[far[-1]], [far[-3]]]


@pytest.mark.parametrize(
    "length, expected", [(2, 200), (3, 200), (4, 100), (5, 40)]
)
def test_all_orders_of_few_elements_are_as_likely(length, expected):
    trials = expected * math.factorial(length)
    counts = Counter(
        tuple(order(length, 7, epoch).tolist()) for epoch in range(trials)
    )
    chi_squared = sum(
        (counts[p] - expected) ** 2 / expected
        for p in itertools.permutations(range(length))
    )
    degrees = math.factorial(length) - 1
    # Four standard deviations; the seed is fixed, so it cannot flicker.
    assert chi_squared < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("length", [10, 50, 101])
def test_every_element_is_as_likely_in_every_place(length):
    trials = 1500
    counts = np.zeros((length, length))
    for epoch in range(trials):
        counts[np.arange(length), order(length, 2, epoch)] += 1
    expected = trials / length
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    degrees = (length - 1) ** 2
    assert abs(chi_squared - degrees) < 4 * math.sqrt(2 * degrees)


def test_the_order_never_changes():
    # A run that is resumed with another version must see the same data.
    assert order(12, 0, 0).tolist() == [1, 0, 4, 11, 5, 10, 6, 8, 2, 9, 3, 7]
    assert order(1000, 5, 9)[:4].tolist() == [471, 460, 294, 962]


def test_the_global_generators_are_put_back():
    random.seed(3)
    np.random.seed(4)
    random.gauss(0, 1)
    np.random.normal()  # both keep half of a pair
    saved = get_host_state()
    expected = random.gauss(0, 1), random.random(), np.random.normal()
    random.seed(0)
    np.random.seed(0)
    set_host_state(*saved)
    assert (
        random.gauss(0, 1),
        random.random(),
        np.random.normal(),
    ) == expected


@pytest.mark.parametrize(
    "state, arrays",
    [
        (None, {}),
        ({"python": {}, "numpy": {}}, {}),
        (
            {
                "python": {"version": 3, "gauss": None},
                "numpy": {"position": 0, "has_gauss": 0, "cached": 0.0},
            },
            {"python": np.zeros(3), "numpy": np.zeros(624, np.uint32)},
        ),
    ],
)
def test_what_is_no_state_is_damage(state, arrays):
    with pytest.raises(DamagedError, match="random state"):
        set_host_state(state, arrays)


@pytest.mark.parametrize("length", [5, 100, 181 * 181, 10**6, 2**24 + 5])
def test_many_positions_are_sent_where_each_is_alone(length):
    positions = np.arange(max(0, length - 20_000), length)
    together = Permutation(length, 7)(positions)
    for i in (0, len(positions) // 2, len(positions) - 1):
        assert Permutation(length, 7)(positions[i : i + 1]) == together[i]
    assert len(np.unique(together)) == len(positions)
