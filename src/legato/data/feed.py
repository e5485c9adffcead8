"""The next chunk is made ready while the device works."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

from legato.data import beside
from legato.data.source import (
    Chunk,
    DataIterator,
    DataSource,
    DataState,
    array_specs,
)
from legato.errors import DamagedError
from legato.workers.recipe import never


class _Made:
    """A chunk that is made already, with the verbs of a `Future`.

    Without its locks, which cost as much as a single batch of indices.
    """

    def __init__(
        self, chunk: Chunk | None, error: Exception | None = None
    ) -> None:
        self._chunk = chunk
        self._error = error

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return True

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> Chunk:
        if self._error is not None:
            raise self._error
        assert self._chunk is not None
        return self._chunk


class Feed:
    """Hands out chunks, one prepared ahead, and knows the true position.

    The position is that after the last chunk *taken*, never the prefetched
    one: a checkpoint must hold what completed steps consumed. Data that
    cannot go back are saved with the chunk that they gave already.

    Args:
        source: the data.
        seed: of their order.
        capacity: the fixed first axis of a chunk's operands.
        draws_here: whether data that must be drawn in the calling thread may
            be drawn by `prefetch`: where the device works meanwhile.
        stop_requested: whether to wait no longer for what makes the batches.

    Attributes:
        draws_here: whether that is done.
        chunk_bytes: of a chunk's operands.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        seed: int,
        capacity: int,
        draws_here: bool = False,
        stop_requested: Callable[[], bool] = never,
    ) -> None:
        self._iterator: DataIterator = source.iterate(
            seed=seed, capacity=capacity
        )
        self._iterator.watch(stop_requested)
        self._source = source
        self._capacity = capacity
        self.chunk_bytes = capacity * source.batch_bytes
        self.draws_here = draws_here and not self._iterator.draws_ahead
        self._state = self._iterator.get_state()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="legato-feed")
        self._ahead: Future[Chunk] | _Made | None = None

    def prefetch(
        self,
        max_batches: int,
        *,
        is_quiet: bool = True,
        only_beside: bool = False,
    ) -> None:
        """Begin to make the chunk that `take(max_batches)` will want.

        Nothing is done where the data must be drawn in this thread, in turn
        with the callbacks, and one of these comes first.

        Args:
            max_batches: batches in it, at most.
            is_quiet: no callback will be called before that.
            only_beside: only if another thread makes it.
        """
        draws_ahead = self._iterator.draws_ahead
        if self._ahead is not None or not (
            draws_ahead or (is_quiet and self.draws_here)
        ):
            return
        if draws_ahead and max_batches > 1:
            self._ahead = self._executor.submit(
                self._iterator.next_chunk, max_batches
            )
            return
        if only_beside:
            return
        # (A single batch is made sooner than it is handed over.)
        try:
            self._ahead = _Made(self._iterator.next_chunk(max_batches))
        except Exception as error:  # for `take` to raise, in its turn
            self._ahead = _Made(None, error)

    @property
    def ahead(self) -> Chunk | None:
        """The prefetched chunk, if it is made already."""
        future = self._ahead
        if future is None or not future.done() or future.exception():
            return None
        return future.result()

    @property
    def draws_ahead(self) -> bool:
        """Whether batches may be made in another thread."""
        return self._iterator.draws_ahead

    @property
    def num_drawn(self) -> int:
        """Batches that this thread made ahead; 0 if it does not."""
        chunk = self.ahead if self.draws_here else None
        return 0 if chunk is None else chunk.num_batches

    def take(self, max_batches: int, limit: int | None = None) -> Chunk:
        """The next chunk, of at most `max_batches` batches.

        Args:
            max_batches: wanted.
            limit: batches in one that is made already; more are made again,
                or kept. None: as many as are wanted.

        Raises:
            StoppedWaiting: a stop is requested, and it is not there.
            Anything: what the data raised while the chunk was made.
        """
        chunk = None
        if self._ahead is not None:
            future, self._ahead = self._ahead, None
            chunk = future.result()
            if chunk.num_batches > (limit or max_batches):
                # The plan changed (a callback stopped training, say).
                chunk = self._part(chunk, max_batches)
        if chunk is None:
            chunk = self._iterator.next_chunk(max_batches)
        self._state = chunk.state
        return chunk

    def _part(self, chunk: Chunk, count: int) -> Chunk | None:
        """The first batches of a chunk; None: they are to be drawn again."""
        if self._iterator.draws_ahead:
            self._iterator.set_state(self._state)
            return None
        self._keep(self._cut(chunk, count, chunk.num_batches))
        return self._cut(chunk, 0, count)

    def _keep(self, chunk: Chunk) -> None:
        self._ahead = _Made(chunk)

    def _cut(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        return dataclasses.replace(
            chunk,
            num_batches=stop - start,
            operands=self._padded(
                [a[start:stop] for a in keras.tree.flatten(chunk.operands)],
                like=chunk.operands,
            ),
            rows=None if chunk.rows is None else chunk.rows[start:stop],
            beside=chunk.beside[start:stop],
        )

    def _padded(self, arrays: Sequence[np.ndarray], like: Any) -> Any:
        padded = []
        for array in arrays:
            whole = np.zeros((self._capacity, *array.shape[1:]), array.dtype)
            whole[: len(array)] = array
            padded.append(whole)
        return keras.tree.pack_sequence_as(like, padded)

    def end_epoch(self) -> None:
        """The last batch of the epoch has been trained on: tell the data."""
        if self._ahead is None:
            self._iterator.end_epoch()
            self._state = self._iterator.get_state()

    def get_state(self) -> DataState:
        """The position after the last chunk taken."""
        if self._iterator.draws_ahead:
            return {"position": self._state, "ahead": None}
        # Asked for when it is wanted: it may be dear to tell.
        position, ahead = self._iterator.get_state(), self._ahead
        if ahead is None or ahead.exception():
            return {"position": position, "ahead": None}
        chunk = ahead.result()
        state = {
            "position": position,
            "ahead": [
                array[: chunk.num_batches]
                for array in keras.tree.flatten(chunk.operands)
            ],
        }
        if chunk.beside:
            state["beside"] = [
                [beside.saved(array) for array in batch]
                for batch in chunk.beside
            ]
        return state

    def set_state(self, state: DataState) -> None:
        """Go to a position, dropping what was prefetched.

        Raises:
            DamagedError: it is none.
            RestoreError: it is another source's.
        """
        match state:
            case {"position": position, "ahead": list() | None as ahead}:
                pass
            case _:
                raise DamagedError("data state: not a position.")
        if self._ahead is not None:
            if not self._ahead.cancel():
                self._ahead.exception()  # wait; what it raised is moot
            self._ahead = None
        chunk = None
        if ahead is not None:
            chunk = self._read_ahead(ahead, state.get("beside", []))
        self._iterator.set_state(position)
        self._state = position
        if chunk is not None:
            self._keep(chunk)

    def _read_ahead(self, arrays: list[Any], others: Any) -> Chunk:
        dtypes = [spec.dtype for spec in array_specs(self._source).values()]
        num_beside = self._num_beside()
        if (
            not all(isinstance(a, np.ndarray) and a.ndim > 1 for a in arrays)
            or [a.dtype for a in arrays] != dtypes
            or len({len(a) for a in arrays}) != 1
            or not 1 <= len(arrays[0]) <= self._capacity
            or not isinstance(others, list)
            or len(others) != (len(arrays[0]) if num_beside else 0)
            or not all(
                isinstance(batch, list) and len(batch) == num_beside
                for batch in others
            )
        ):
            raise DamagedError("data state: not batches of these data.")
        return Chunk(
            num_batches=len(arrays[0]),
            batch_size=arrays[0].shape[1],
            operands=self._padded(arrays, like=arrays),
            state=None,
            beside=[list(map(beside.restored, batch)) for batch in others],
        )

    def _num_beside(self) -> int:
        """How many arrays of a batch stay on the host."""
        leaves = keras.tree.flatten(self._source.batch_spec(1))
        return sum(isinstance(leaf, beside.HostValue) for leaf in leaves)

    @property
    def rereading(self) -> str:
        """What is read again before the next chunk; empty if nothing is."""
        count = self._iterator.rereads
        return f", {count} batches are read again" if count else ""

    def close(self) -> None:
        """Stop the thread and close the iterator."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._iterator.close()
