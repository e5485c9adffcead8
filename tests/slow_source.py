"""Arrays that take their time."""

import time

import legato
from legato.data import DataIterator


class SlowSource(legato.ArraySource):
    """Takes so many seconds to draw a batch."""

    secs = 0.01

    def iterate(self, *, seed, capacity):
        whole = super().iterate(seed=seed, capacity=capacity)
        return _SlowIterator(whole, self.secs)


class _SlowIterator(DataIterator):
    def __init__(self, iterator, secs):
        self._iterator = iterator
        self._secs = secs

    def next_chunk(self, max_batches):
        chunk = self._iterator.next_chunk(max_batches)
        time.sleep(self._secs * chunk.num_batches)
        return chunk

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, state):
        self._iterator.set_state(state)

    def close(self):
        self._iterator.close()
