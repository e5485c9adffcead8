"""The table of sources in docs/data.md says what is."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

from legato.data import fit_source, split_arrays
from legato.storage import strict_json
from tests.data import sources
from tests.data.reading import assert_equal, take, through_disk

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
COLUMNS = ["Source", "Exact", "Read again to resume", "Its state"]


def rows():
    lines = PAGE.read_text("utf-8").split("## What resumes")[1].splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    assert cells[0][:4] == COLUMNS
    return {row[0]: row[1:] for row in cells[2:]}


def tf_plain():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((sources.X, sources.Y))
    return data.shuffle(64, seed=3).repeat().batch(5)


def tf_stateful():
    import tensorflow as tf

    tf.random.set_seed(None)
    return tf_plain().map(lambda x, y: (x + tf.random.uniform([], seed=3), y))


MAKERS = {
    "arrays": "arrays",
    "`keras.utils.PyDataset`": "py reshuffles",
    "Grain `MapDataset`": "grain",
    "Grain `IterDataset`": "grain iter",
    "Grain `IterDataset`, `mp_prefetch`": lambda: fit_source(
        sources.grain_iter(workers=1), steps_per_epoch=5
    ),
    "Grain `DataLoader`": "grain loader",
    "`tf.data.Dataset`": lambda: fit_source(tf_plain(), steps_per_epoch=200),
    "`tf.data.Dataset` with stateful operations": lambda: fit_source(
        tf_stateful(), steps_per_epoch=200
    ),
    "PyTorch `DataLoader`": "torch",
    "PyTorch `DataLoader` whose examples change it": "torch augmented",
    "PyTorch `DataLoader` of an `IterableDataset`": "torch stream",
    "PyTorch `DataLoader` with workers": "torch workers, seeded",
    "PyTorch `DataLoader` with workers that keep something": "torch workers",
    "torchdata `StatefulDataLoader` of an `IterableDataset` that tells its "
    "state": "torchdata stream",
    "Hugging Face `Dataset`": "hf",
    "Hugging Face `IterableDataset`": "hf stream",
    "Hugging Face `IterableDataset`, shuffled": "hf shuffled",
    "an iterator that tells its state": "iterator",
    "an iterable whose iterators tell their state": "iterators tell",
    "an iterable that tells its state": "iterable tells",
    "any other iterable": "iterable",
    "a generator function, called for each pass": "generator function",
    "a generator": "generator",
}


def test_the_table_is_whole():
    assert list(rows()) == list(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_a_row(name):
    if "workers" in name and keras.config.backend() != "torch":
        pytest.skip("a fork of JAX's many threads may deadlock")
    if "Grain" in name:
        pytest.importorskip("grain")
    if "Hugging" in name:
        pytest.importorskip("datasets")
    make = MAKERS[name]
    make = make if callable(make) else sources.KINDS[make]
    exact, again, size, _ = rows()[name]
    # In mid-pass, and late in it where passes are long.
    count = 150 if "200" in repr(make.__code__.co_consts) else 6
    source = make()
    assert source.inexact is None
    iterator = source.iterate(seed=5, capacity=4)
    take(iterator, source, count)
    state = through_disk(iterator.get_state())
    expected = take(iterator, source, 3)
    iterator.close()

    resumed = make()
    iterator = resumed.iterate(seed=5, capacity=4)
    iterator.set_state(state)
    rereads = iterator.rereads
    found = take(iterator, resumed, 3)
    iterator.close()
    assert_equal(found, expected)
    assert exact.startswith("yes")
    if exact == "yes, in a new process":
        with pytest.raises(Exception, match="cannot begin anew"):
            source.iterate(seed=5, capacity=4).next_chunk(1)

    in_pass = state.get("batch", 0)
    if again.startswith("nothing"):
        assert rereads == 0
    elif again.startswith("at most"):
        most = int(re.findall(r"\d+", again)[0])
        assert 0 < rereads <= most < in_pass
    elif again == "the pass":
        assert rereads == in_pass > 0
    else:
        assert again == "all" and rereads == count

    tree, arrays = split_arrays(state)
    found = len(strict_json.dumps(tree)) + sum(
        np.asarray(a).nbytes for a in arrays.values()
    )
    unit = {"kB": 1000, "MB": 2**20}
    number, name = re.findall(r"(\d+) ([kM]B)", size)[0]
    assert found <= int(number) * unit[name]
    if int(number) > 1 and name == "kB":
        assert found > 0.2 * int(number) * unit[name]
