"""Every kind of data, resumed at every position and in a new process."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from legato.data import Feed, HostValue
from tests.data import fresh
from tests.data.reading import (
    assert_equal,
    chunk_batches,
    digest,
    read,
    read_with_states,
    take,
    through_disk,
)
from tests.data.sources import GRAIN, HUGGING_FACE, KINDS, SOURCES

COUNT = 17  # over two ends of epochs of any of them


def make(name):
    if name in GRAIN:
        pytest.importorskip("grain")
    if name in HUGGING_FACE:
        pytest.importorskip("datasets")
    return KINDS[name]()


@pytest.mark.parametrize("name", SOURCES)
def test_resumed_at_every_position(name):
    whole, states = read_with_states(make(name), COUNT)
    assert len({digest(b) for b in whole}) > 3
    one_shot = name == "generator"
    source = None if one_shot else make(name)
    for position, state in enumerate(states[:-1]):
        rest = read(
            make(name) if one_shot else source, COUNT - position, state=state
        )
        assert_equal(rest, whole[position:])


@pytest.mark.parametrize("name", [n for n in KINDS if n not in SOURCES])
def test_resumed_at_some_positions(name):
    whole, states = read_with_states(make(name), 9)
    for position in (1, 5, 7):
        rest = read(make(name), 9 - position, state=states[position])
        assert_equal(rest, whole[position:])


@pytest.mark.parametrize("name", KINDS)
def test_how_it_is_cut_changes_nothing(name):
    whole = read(make(name), COUNT, most=1, capacity=1)
    for capacity, most in ((3, 2), (256, 256)):
        assert_equal(
            read(make(name), COUNT, capacity=capacity, most=most), whole
        )


@pytest.mark.parametrize("name", KINDS)
def test_what_others_draw_changes_nothing(name):
    torch = pytest.importorskip("torch")
    source = make(name)
    iterator = source.iterate(seed=5, capacity=1)
    found = []
    before = random.getstate()
    np.random.seed(0)
    drawn = []
    for _ in range(7):
        found += chunk_batches(source, iterator.next_chunk(1))
        random.random(), torch.rand(3)
        drawn.append(np.random.rand())
    assert_equal(found, read(make(name), 7))
    # ... nor do the data change what others draw.
    np.random.seed(0)
    assert drawn == np.random.rand(7).tolist()
    random.setstate(before)
    iterator.close()


@pytest.mark.parametrize("name", SOURCES)
def test_the_next_iterator_begins_anew(name):
    if name == "generator":
        pytest.skip("it comes once")
    source = make(name)
    first = read(source, 7)
    assert_equal(read(source, 7), first)
    source.example(4)
    assert_equal(read(source, 7), first)


@pytest.mark.parametrize("name", SOURCES)
def test_an_iterator_can_be_sent_back(name):
    if name == "generator":
        pytest.skip("it comes once")
    source = make(name)
    whole, states = read_with_states(source, 9)
    iterator = source.iterate(seed=5, capacity=4)
    for position in (2, 0, 6, 4):
        iterator.set_state(states[position])
        assert_equal(take(iterator, source, 3), whole[position : position + 3])
    iterator.close()


@pytest.mark.parametrize(
    "name",
    [
        *("arrays", "arrays, batch", "py", "py reshuffles", "iterable", "tf"),
        *("torch", "torch seeded", "torch augmented"),
    ],
)
def test_epochs_differ(name):
    source = make(name)
    size = source.batches_per_epoch
    digests = [digest(b) for b in read(source, 3 * size)]
    epochs = [tuple(digests[size * i : size * (i + 1)]) for i in range(3)]
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("name", SOURCES)
def test_the_seed_orders_the_data(name):
    source = make(name)
    states = [source.iterate(seed=s, capacity=1).get_state() for s in (1, 2)]
    assert states[0] == states[1]
    random_ones = ("arrays", "arrays, batch", "py", "py augments", "torch")
    if name in random_ones:
        digests = {
            tuple(map(digest, read(make(name), 5, seed=seed)))
            for seed in (1, 2)
        }
        assert len(digests) == 2


@pytest.mark.parametrize("name", SOURCES)
def test_the_feed_tells_the_state(name):
    source = make(name)
    feed = Feed(source, seed=5, capacity=4)
    feed.take(2)
    state = through_disk(feed.get_state())
    feed.prefetch(2)
    one = [b for b in chunk_batches(source, feed.take(1))]
    feed.close()
    source = make(name)
    feed = Feed(source, seed=5, capacity=4)
    feed.set_state(state)
    assert_equal(chunk_batches(source, feed.take(1)), one)
    feed.close()


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_inexact(name):
    source = make(name)
    read(source, 7)
    assert source.inexact is None


@pytest.mark.parametrize("name", SOURCES)
def test_identity_repeats(name):
    identity = make(name).identity
    assert identity == make(name).identity
    json.dumps(identity)


@pytest.mark.parametrize("name", SOURCES)
def test_the_example_has_the_shapes_of_the_chunks(name):
    source = make(name)
    example = source.example(4)
    chunk = source.iterate(seed=5, capacity=4).next_chunk(1)
    leaves = [a.shape for a in _leaves(example)]
    assert all(shape[0] == 4 for shape in leaves)
    if not name.startswith("py"):  # (which may begin with a partial batch)
        assert tuple(shape[1:] for shape in leaves) == chunk.shapes
    spec = source.batch_spec(source.full_batch_size)
    batch = source.fetch(source.resident, example, 0)
    for array, each in zip(_leaves(batch), _leaves(spec), strict=True):
        assert tuple(array.shape) == each.shape


def _leaves(nested):
    """But what stays on the host."""
    return [
        leaf
        for leaf in keras.tree.flatten(nested)
        if not isinstance(leaf, HostValue)
    ]


def _is_installed(module):
    return importlib.util.find_spec(module) is not None


def test_in_a_new_process(tmp_path):
    positions, expected = {}, {}
    keras.utils.set_random_seed(11)  # on which generators depend
    for name in KINDS:
        if (name in GRAIN and not _is_installed("grain")) or (
            name in HUGGING_FACE and not _is_installed("datasets")
        ):
            continue
        whole, states = read_with_states(KINDS[name](), 14)
        positions[name], expected[name] = [], []
        for position in (0, 3, 5, 11):
            path = tmp_path / f"{len(positions)}_{position}.npz"
            fresh.save(path, states[position])
            positions[name].append([str(path), 14 - position])
            expected[name].append([digest(b) for b in whole[position:]])
    (tmp_path / "positions.json").write_text(json.dumps(positions))
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.fresh", tmp_path / "positions.json"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("FOUND"))
    found = json.loads(line.removeprefix("FOUND"))
    for name in expected:
        assert found[name] == expected[name], name
