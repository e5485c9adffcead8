"""Reading sources as the engine does, and resuming them as it does."""

import hashlib

import keras
import numpy as np

from legato.data import HostValue, join_arrays, split_arrays
from legato.storage import strict_json
from legato.storage.tensors import TensorLayout


def numbers(batch):
    """A batch as nested NumPy arrays; None stays."""

    def number(a):
        if a is None or isinstance(a, np.ndarray):
            return a
        return keras.ops.convert_to_numpy(a)

    return keras.tree.map_structure(number, batch)


def digest(batch):
    found = hashlib.sha256()
    for path, leaf in keras.tree.flatten_with_path(batch):
        if leaf is not None:
            found.update(repr((path, leaf.dtype.name, leaf.shape)).encode())
            if leaf.dtype.hasobject:
                found.update(repr(leaf.tolist()).encode())
            else:
                found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def chunk_batches(source, chunk):
    for i in range(chunk.num_batches):
        batch = source.fetch(source.resident, chunk.operands, i)
        others = chunk.beside[i] if chunk.beside else ()
        yield numbers(
            keras.tree.map_structure(
                lambda leaf, others=others: (
                    others[leaf.index] if isinstance(leaf, HostValue) else leaf
                ),
                batch,
            )
        )


def take(iterator, source, count, most=4):
    """The next batches, as the device would see them."""
    found = []
    while len(found) < count:
        chunk = iterator.next_chunk(min(most, count - len(found)))
        found.extend(chunk_batches(source, chunk))
    return found


def read(source, count, *, state=None, capacity=4, most=4, seed=5):
    iterator = source.iterate(seed=seed, capacity=capacity)
    if state is not None:
        iterator.set_state(through_disk(state))
    try:
        return take(iterator, source, count, most)
    finally:
        iterator.close()


def read_with_states(source, count, *, seed=5):
    """Each batch, and the state before it and after the last."""
    iterator = source.iterate(seed=seed, capacity=1)
    states, found = [through_disk(iterator.get_state())], []
    for _ in range(count):
        found += take(iterator, source, 1)
        states.append(through_disk(iterator.get_state()))
    iterator.close()
    return found, states


def through_disk(state):
    """A state as it comes back from a checkpoint."""
    tree, arrays = split_arrays(state)
    arrays = {name: array.copy() for name, array in arrays.items()}
    TensorLayout({name: (a.dtype, a.shape) for name, a in arrays.items()})
    return join_arrays(strict_json.loads(strict_json.dumps(tree)), arrays)


def assert_equal(one, other):
    assert [digest(b) for b in one] == [digest(b) for b in other]
