"""The global generators while the user's data code runs."""

import random

import keras
import numpy as np
import pytest
import torch

from legato.data import streams

DRAWS = {
    "random": random.random,
    "numpy": np.random.rand,
    "numpy, normal": np.random.normal,
    "torch": lambda: float(torch.rand(())),
    "keras": lambda: float(keras.random.uniform(())),
}


def seed_all(seed):
    keras.utils.set_random_seed(seed)
    torch.manual_seed(seed)


def draw_all():
    return [draw() for draw in DRAWS.values()]


@pytest.mark.parametrize("name", DRAWS)
def test_others_draws_go_on_as_if_nothing_happened(name):
    draw = DRAWS[name]
    seed_all(3)
    expected = [draw() for _ in range(6)]
    seed_all(3)
    found = [draw()]
    with streams.kept():
        streams.begin(0, "x")
        inside = draw()
        found_inside = [draw()]
    found.append(draw())
    stream = streams.Stream(0, "x")
    with stream.active():
        assert draw() == inside
    found.append(draw())
    with stream.active():
        assert [draw()] == found_inside
    found += [draw() for _ in range(3)]
    assert found == expected


def test_streams_are_functions_of_their_keys():
    found = []
    for key in ((0, "x"), (0, "y"), (1, "x"), (0, "x", 1), (0, "x")):
        keras.utils.set_random_seed(len(found))
        with streams.Stream(*key).active():
            found.append(draw_all())
    assert found[0] == found[4]
    for k in range(len(DRAWS)):
        assert len({each[k] for each in found}) == 4


def test_a_stream_begins_whatever_was_drawn_before():
    found = []
    with streams.kept():
        for draws in (0, 1, 3):
            streams.begin(1, "x")
            found.append(draw_all())
            for _ in range(draws):
                draw_all()
    assert found[0] == found[1] == found[2]


def test_an_error_inside_puts_everything_back():
    seed_all(3)
    expected = draw_all()
    seed_all(3)
    with pytest.raises(KeyError), streams.Stream(0).active():
        draw_all()
        raise KeyError
    assert draw_all() == expected


@pytest.mark.parametrize("name", [n for n in DRAWS if n != "keras"])
def test_the_fingerprint_tells_of_draws(name):
    before = streams.fingerprint()
    assert streams.fingerprint() == before
    DRAWS[name]()
    assert streams.fingerprint() != before


def test_seeding_leaves_what_is_not_seeded_elsewhere():
    """`torch.manual_seed` would also seed the GPUs."""
    with streams.kept():
        streams.begin(0, "x")
        assert torch.default_generator.initial_seed() != 0
