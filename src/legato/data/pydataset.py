"""`keras.utils.PyDataset`: batches that are asked for by their number."""

import collections
import contextlib
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

from legato.data import streams
from legato.data.attributes import Attributes, Look
from legato.data.batches import (
    BatchSource,
    Chunks,
    Layout,
    Leaves,
    check_count,
    digest,
    shown,
    standardise,
)
from legato.data.holding import Hold
from legato.data.source import Chunk, DataIterator, DataState
from legato.errors import DataError, LegatoWarning, RestoreError
from legato.rng import Permutation, derive_seed
from legato.types import JSON
from legato.workers.watching import Watch

# Of Keras's base class: how batches are made, not which.
_SETTINGS = frozenset({"_workers", "_use_multiprocessing", "_max_queue_size"})

_DRAWS = "draws from the global generators"


class PyDatasetSource(BatchSource):
    """A PyDataset, resumed in constant time at any position.

    The order is a permutation computed from (seed, pass over the data). What
    `__getitem__` and the hooks draw from the global generators of Python,
    NumPy, PyTorch and Keras is a function of the seed and of the place in the
    data; nobody else's draws matter, nor theirs to others. What they change
    in the dataset itself is saved with the position.

    Args:
        dataset: the dataset.
        shuffle: in a new order in each pass; not if it is infinite.
        class_weight: class -> weight of its examples.
        steps_per_epoch: the length of an epoch for the hooks, where that is
            not a whole pass.
        name: what the caller calls it, for messages.
        steps_name: what it calls `steps_per_epoch`, likewise.
        as_given: batches are nested in any way, and stay so; not those of
            `fit`.

    Raises:
        DataError: it has no length and `steps_per_epoch` is None, or its
            first batch is none.
    """

    def __init__(
        self,
        dataset: keras.utils.PyDataset,
        *,
        shuffle: bool = False,
        class_weight: Mapping[int, float] | None = None,
        steps_per_epoch: int | None = None,
        name: str = "x",
        steps_name: str = "steps_per_epoch",
        as_given: bool = False,
    ) -> None:
        self.dataset = dataset
        self._as_given = as_given
        self.what = f"{name} ({type(dataset).__name__})"
        self.length = self._count()
        if self.length is None and steps_per_epoch is None:
            raise DataError(
                f"{self.what} has no length (num_batches is None): give "
                f"{steps_name}, the number of batches in an epoch."
            )
        # Infinite ones order themselves, as in Keras.
        self.shuffle = bool(shuffle) and self.length is not None
        self.workers = max(1, int(dataset.workers or 1))
        self._class_weight = class_weight
        self._steps = steps_per_epoch
        self._notes: list[str] = []
        self.watch = Watch() if self.workers > 1 else None
        if dataset.use_multiprocessing:
            warnings.warn(
                f"{self.what} has use_multiprocessing=True: its batches are "
                "made in threads instead, which gives the same batches.",
                LegatoWarning,
                stacklevel=3,
            )
        with streams.kept():
            streams.begin(0, "first")
            self._layout = Layout(
                self._standardised(0), self.what, of_fit=not as_given
            )
            # After the first batch: files that are opened once are open now.
            self.attributes = Attributes(dataset, _SETTINGS)
            self._repeatable = self._draws_repeat()

    def _count(self) -> int | None:
        try:
            count = self.dataset.num_batches
        except NotImplementedError:
            raise DataError(
                f"{self.what} has no length: define __len__, the number of "
                "batches, or let the property num_batches return None if "
                "there is no end."
            ) from None
        if count is None:
            return None
        return check_count(count, f"The length of {self.what}")

    def _standardised(self, index: int) -> Any:
        batch = self.dataset[index]
        if self._as_given:
            return batch
        return standardise(batch, self._class_weight, f"{self.what}[{index}]")

    def draw(self, index: int) -> Leaves:
        """The arrays of one batch."""
        return self._layout.leaves(self._standardised(index))

    def draw_in_thread(self, index: int) -> Leaves:
        """The same, in one of several threads."""
        watch = self.watch
        if watch is None:
            return self.draw(index)
        return watch.watched(index, index, self.draw)

    def _draws_repeat(self) -> bool:
        """Draws the first batch again, and tells what is not the same."""
        if self.attributes.unseen is not None:
            self.note(
                "its attributes cannot be looked at "
                f"({self.attributes.unseen})",
                "Keep what changes in attributes that are numbers or arrays",
            )
        first = digest(self._layout.first)
        streams.begin(0, "first")
        before = streams.fingerprint()
        again = digest(self.draw(0))
        drawn = streams.fingerprint() != before
        look = self.attributes.look()
        if look.state is not None:
            # It has generators or counters of its own: from the same state.
            self.attributes.reset()
            first = again
            streams.begin(0, "first")
            again = digest(self.draw(0))
            self.attributes.reset()
        if first != again:
            self.note(
                "batch 0 was drawn twice and was not the same: __getitem__ "
                "uses something that cannot be put back",
                "Draw from a seeded generator in an attribute, or from "
                "`numpy.random`",
            )
        if look.state is not None:
            self._note_threads("changes attributes")
        elif drawn or self._others_draw():
            self._note_threads(_DRAWS)
        return first == again

    def _note_threads(self, what: str, arguments: str = "") -> None:
        """It does something that several threads must not; said once."""
        if self.watch is None:
            return
        self.watch = None
        self.note(
            f"with workers={self.workers}, __getitem__{arguments} {what} in "
            "an order that varies",
            "Set workers=1, or make what is random a function of the index",
        )

    def _others_draw(self) -> bool:
        """Whether batches do from which threads would take turns to draw.

        What is drawn once, and kept, shows in what was not drawn yet only.
        """
        if self.watch is None:
            return False
        last = 2 if self.length is None else self.length - 1
        before = streams.fingerprint()
        for index in sorted({last // 2, last} - {0}):
            # (What it raises there is raised again in its turn.)
            with contextlib.suppress(Exception):
                self.draw(index)
        drawn = streams.fingerprint() != before
        if self.attributes.look().state is not None:
            self.attributes.reset()
        return drawn

    def note(self, why: str, remedy: str) -> None:
        """Remember something that makes resuming inexact."""
        sentence = f"{self.what}: {why}. {remedy}."
        if sentence not in self._notes:
            self._notes.append(sentence)

    @property
    def inexact(self) -> str | None:
        """What was found when its batches were drawn."""
        if self.watch is not None and self.watch.suspects:
            was_as_made = self.attributes.look().state is None
            with streams.kept():
                index = self.watch.drawing(self.draw)
            if was_as_made and self.attributes.look().state is not None:
                self.attributes.reset()  # that was another draw
            if index is not None:
                self._note_threads(_DRAWS, f"({index})")
        return " ".join(self._notes) or None

    @property
    def batches_per_epoch(self) -> int:
        """Its length, or what stands for it."""
        return self.length or self._steps or 1

    @property
    def period(self) -> int:
        """Batches between the hooks: the epoch of training, as in Keras."""
        return self._steps or self.batches_per_epoch

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Its class, its length and its first batch."""
        weights = self._class_weight or {}
        return {
            "kind": "PyDataset",
            "class": type(self.dataset).__name__,
            "batches": self.length,
            "steps_per_epoch": self._steps,
            "shuffle": self.shuffle,
            "class_weight": [
                [str(k), float(weights[k])] for k in sorted(weights)
            ],
            **self._layout.identity(repeatable=self._repeatable),
        }

    def iterate(self, *, seed: int, capacity: int) -> DataIterator:
        """Start at the first batch; the dataset is put back with it."""
        return _Iterator(self, seed, capacity)


class _Iterator(DataIterator):
    """Draws in this thread, and with workers also in a pool, never ahead.

    Hooks and `__getitem__` are the user's code: what they do must come in one
    order with what callbacks do. A pool runs ahead by itself, within an epoch.

    The state: the pass over the data and the batches of it that were drawn,
    the batches since the hooks were called, how many hooks were called, what
    changed in the dataset, and a batch that was drawn and not given out.
    """

    draws_ahead = False

    def __init__(
        self, source: PyDatasetSource, seed: int, capacity: int
    ) -> None:
        self._source = source
        self._seed = seed
        self._chunks = Chunks(self._draw, capacity)
        self._pass = 0
        self._batch = 0
        self._step = 0
        # on_epoch_end, on_epoch_begin, on_epoch_end, ...: Keras calls the
        # first of them before the first epoch.
        self._hooks = 0
        self._hold = Hold([source.attributes])
        self._order: tuple[int, np.ndarray] | None = None
        self._after_hooks: Look | None = None
        # Whether only the hooks have changed the dataset.
        self._steady = True
        self._pool = _Pool(source) if source.workers > 1 else None

    # -- the position -------------------------------------------------------

    def get_state(self) -> DataState:
        state: dict[str, Any] = {
            "pass": self._pass,
            "batch": self._batch,
            "step": self._step,
            "hooks": self._hooks,
            "attributes": None,
            "repeat_hooks": False,
            "pending": self._source.saved(self._chunks.pending),
        }
        if not self._hooks:
            look = self._hold.look(self._source.attributes)
            state["attributes"] = look.state
            return state
        look = self._look()
        state["attributes"] = look.state
        if look.lost:
            state["repeat_hooks"] = self._can_repeat_hooks(look)
        return state

    def _look(self) -> Look:
        attributes = self._source.attributes
        if self._after_hooks is None:  # nothing was drawn since
            self._after_hooks = self._hold.look(attributes)
        elif self._pool is None:
            return self._hold.look(attributes)
        else:
            self._look_beside_pool(self._after_hooks)
        return self._after_hooks

    def _look_beside_pool(self, after_hooks: Look) -> None:
        """Whether it changed where threads are reading it."""
        try:
            look = self._hold.look(self._source.attributes)
        except RuntimeError:  # they change it just now
            return
        if not look.same(after_hooks):
            self._source.note(
                f"its attributes changed while workers={self._source.workers} "
                "made batches of it ahead: which of them see that varies",
                "Change it where an epoch begins or ends (on_epoch_begin of a "
                "callback, on_epoch_end of the dataset), or set workers=1",
            )

    def _can_repeat_hooks(self, look: Look) -> bool:
        """Whether what cannot be saved can be made again by the hooks."""
        after = self._after_hooks
        if self._steady and after is not None and look.same(after):
            return True
        self._source.note(
            f"{', '.join(look.lost[:3])} changed and cannot be saved",
            "Change it in on_epoch_end only, or keep it in an attribute of "
            "numbers or arrays",
        )
        return False

    def set_state(self, state: DataState) -> None:
        source = self._source
        match state:
            case {
                "pass": int(pass_),
                "batch": int(batch),
                "step": int(step),
                "hooks": int(hooks),
                "attributes": attributes,
                "repeat_hooks": bool(repeat_hooks),
                "pending": pending,
            } if (
                source.fits(pending)
                and pass_ >= 0
                and 0 <= batch <= (source.length or batch)
                and 0 <= step <= source.period
                and hooks >= 0
            ):
                pass
            case _:
                raise RestoreError(
                    f"The saved data position {shown(state)} is not one of "
                    f"{source.what}, which has {source.batches_per_epoch} "
                    "batches in an epoch. Resume with the data of the run."
                )
        if self._pool is not None:
            self._pool.drop()
        self._pass, self._batch, self._step = pass_, batch, step
        self._chunks.pending = source.restored(pending)
        self._hooks = 0
        self._hold.forget()
        self._take()
        source.attributes.reset()
        while repeat_hooks and self._hooks < hooks:
            self._call_hook()
        source.attributes.set(attributes)
        self._hooks = hooks
        self._after_hooks = None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._hold.release()

    # -- hooks --------------------------------------------------------------

    def end_epoch(self) -> None:
        # (A callback may have ended training's epoch in the middle of ours.)
        ended = self._step == self._source.period
        if ended and self._chunks.pending is None:
            with streams.kept():
                self._take()
                self._close_epoch()

    def _close_epoch(self) -> None:
        if self._pool is not None:
            self._pool.drop()
        elif self._after_hooks is not None:
            look = self._hold.look(self._source.attributes)
            self._steady = self._steady and look.same(self._after_hooks)
        self._step = 0
        self._call_hook()

    def _open_epoch(self) -> None:
        """The hooks that are due before the next batch."""
        if self._hooks == 0 or self._step == self._source.period:
            self._close_epoch()
        if self._hooks % 2:
            self._call_hook()
        if self._after_hooks is None:
            self._look()

    def _take(self) -> None:
        for problem in self._hold.take():
            self._source.note(
                f"it cannot be put back to how it was built: {problem}",
                "Let on_epoch_end change an index array, not the data",
            )

    def _call_hook(self) -> None:
        dataset = self._source.dataset
        streams.begin(self._seed, "hook", self._hooks)
        if self._hooks % 2:
            dataset.on_epoch_begin()
        else:
            dataset.on_epoch_end()
        self._hooks += 1
        self._after_hooks = None
        length = self._source._count()
        if length != self._source.length:
            raise DataError(
                f"The length of {self._source.what} was {self._source.length} "
                f"and is {length} now. Keep it, or let num_batches be None and "
                "give steps_per_epoch."
            )

    # -- batches ------------------------------------------------------------

    def next_chunk(self, max_batches: int) -> Chunk:
        found = None
        with streams.kept():
            self._take()
            if self._chunks.pending is None:
                self._open_epoch()
                self._begin_pass()
            if self._pool is None:
                found = self._chunks.next(max_batches)
        if self._pool is not None:
            # (What threads draw is not undone: it is to be seen.)
            found = self._chunks.next(max_batches)
        assert found is not None  # an epoch has a batch
        return found.chunk(state=None)

    def _begin_pass(self) -> None:
        if self._batch == self._source.length:
            self._pass, self._batch = self._pass + 1, 0

    def _draw(self) -> Leaves | None:
        """The next batch of this epoch and of this pass."""
        source = self._source
        if self._step == source.period or self._batch == source.length:
            return None
        if self._pool is None:
            streams.begin(self._seed, "batch", self._pass, self._batch)
            leaves = source.draw(self._index(self._batch))
        else:
            leaves = self._pool.take(self._upcoming())
        self._batch += 1
        self._step += 1
        return leaves

    def _upcoming(self) -> Iterator[int]:
        """The numbers of the batches up to the next hooks, or a new order."""
        left = self._source.period - self._step
        if self._source.length is not None:
            left = min(left, self._source.length - self._batch)
        for i in range(left):
            yield self._index(self._batch + i)

    def _index(self, position: int) -> int:
        source = self._source
        if not source.shuffle or source.length is None:
            return position
        if self._order is None or self._order[0] != self._pass:
            key = derive_seed(self._seed, "order", self._pass)
            order = Permutation(source.length, key)(np.arange(source.length))
            self._order = self._pass, order
        return int(self._order[1][position])


class _Pool:
    """Makes the next batches in threads, in their order."""

    def __init__(self, source: PyDatasetSource) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(
            source.workers, thread_name_prefix="legato-data"
        )
        size: Any = source.dataset.max_queue_size
        self._ahead = max(source.workers, int(size or 1))
        self._futures: collections.deque[Future[Leaves]] = collections.deque()

    def take(self, upcoming: Iterator[int]) -> Leaves:
        """The first of some batches; the next ones are begun."""
        for i, index in enumerate(upcoming):
            if i >= self._ahead:
                break
            if i >= len(self._futures):
                self._futures.append(
                    self._threads.submit(self._source.draw_in_thread, index)
                )
        return self._futures.popleft().result()

    def drop(self) -> None:
        """Forget what was begun, and wait for it."""
        for future in self._futures:
            if not future.cancel():
                future.exception()  # what it raised is moot
        self._futures.clear()

    def close(self) -> None:
        """Let go of the threads."""
        self.drop()
        self._threads.shutdown()
