"""The next chunk is made ready in the background while the device works."""

from concurrent.futures import Future, ThreadPoolExecutor

from legato.data.source import Chunk, DataIterator, DataState


class Feed:
    """Hands out chunks, one prepared ahead, and knows the true position.

    The position is that after the last chunk *taken*, never the prefetched
    one: a checkpoint must hold what completed steps consumed.
    """

    def __init__(self, iterator: DataIterator) -> None:
        self._iterator = iterator
        self._state = iterator.get_state()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="legato-feed")
        self._ahead: Future[Chunk] | None = None

    def prefetch(self, max_batches: int) -> None:
        """Begin to make the chunk that `take(max_batches)` will want.

        Nothing is done where the data must be drawn in this thread, in turn
        with the callbacks.
        """
        if self._ahead is not None or not self._iterator.draws_ahead:
            return
        if max_batches > 1:
            self._ahead = self._executor.submit(
                self._iterator.next_chunk, max_batches
            )
            return
        # A single batch is made sooner than it is handed over, and the device
        # works meanwhile.
        future: Future[Chunk] = Future()
        try:
            future.set_result(self._iterator.next_chunk(1))
        except Exception as error:  # for `take` to raise, in its turn
            future.set_exception(error)
        self._ahead = future

    @property
    def ahead(self) -> Chunk | None:
        """The prefetched chunk, if it is made already."""
        future = self._ahead
        if future is None or not future.done() or future.exception():
            return None
        return future.result()

    def take(self, max_batches: int) -> Chunk:
        """The next chunk, of at most `max_batches` batches.

        Raises:
            Whatever the data raised while the chunk was made.
        """
        chunk = None
        if self._ahead is not None:
            future, self._ahead = self._ahead, None
            chunk = future.result()
            if chunk.num_batches > max_batches:
                # The plan changed (a callback stopped training, say): go back.
                self._iterator.set_state(self._state)
                chunk = None
        if chunk is None:
            chunk = self._iterator.next_chunk(max_batches)
        self._state = chunk.state
        return chunk

    def end_epoch(self) -> None:
        """The last batch of the epoch has been trained on: tell the data."""
        if self._ahead is None:
            self._iterator.end_epoch()
            self._state = self._iterator.get_state()

    def get_state(self) -> DataState:
        """The position after the last chunk taken."""
        if not self._iterator.draws_ahead:
            # Asked for when it is wanted: it may be dear to tell.
            return self._iterator.get_state()
        return self._state

    def set_state(self, state: DataState) -> None:
        """Go to a position, dropping what was prefetched."""
        if self._ahead is not None:
            if not self._ahead.cancel():
                self._ahead.exception()  # wait; what it raised is moot
            self._ahead = None
        self._iterator.set_state(state)
        self._state = state

    def close(self) -> None:
        """Stop the thread and close the iterator."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._iterator.close()
