"""Grain's datasets and loaders, on any backend."""

import json
from collections.abc import Iterator
from typing import Any

import grain

from legato.data.encoding import decode, encode
from legato.data.readers import Iterable, Passes
from legato.data.source import DataState
from legato.errors import DamagedError, RestoreError
from legato.workers.guarding import Guard

_ENDLESS = 2**62  # Grain's length of a dataset that is repeated without end

# Of a MapDataset, which has not said how it is to be read. Grain's default is
# to read 500 elements ahead, which are batches here.
_READ = grain.ReadOptions(num_threads=16, prefetch_buffer_size=16)

# These do nothing by themselves. (Grain does not export its datasets.)
_WRAPPERS = ("WithOptionsIterDataset", "_MpContextIterDataset")

# How the parts of a loader print, perhaps with their addresses.
_PRINTED = ("sampler", "data_source")


class GrainDataset(Iterable):
    """Reads a Grain dataset or loader; each pass is the same, as in Keras.

    Args:
        dataset: `grain.MapDataset`, `grain.IterDataset`, `grain.DataLoader`.
    """

    threads = True
    tells_end = True

    def __init__(self, dataset: Any) -> None:
        kinds = (grain.MapDataset, grain.IterDataset, grain.DataLoader)
        kind = next(k.__name__ for k in kinds if isinstance(dataset, k))
        super().__init__(dataset, f"grain {kind}")
        # What its transformations may not have is state.
        self.tracked = []
        if self.length is not None and self.length >= _ENDLESS:
            self.length, self.endless = None, True
        if isinstance(dataset, grain.MapDataset):
            self.data = dataset.to_iter_dataset(_READ)
        outermost = _unwrapped(self.data)
        self.ahead = _has_processes(outermost) or _has_threads(outermost)
        self._processes = any(map(_has_processes, _chain(self.data)))
        if self._processes:
            self.cheap = False
            _mark_flags()

    def open(self) -> Passes:
        """Iterates over the dataset."""
        return _Passes(self.data, guarded=self._processes)


class _Passes(Passes):
    def __init__(self, dataset: Any, *, guarded: bool) -> None:
        self._dataset = dataset
        self._guarded = guarded
        self._guard: Guard | None = None
        self._iterator: Any = None

    def begin(self, number: int) -> Iterator[Any]:
        self.close()
        if self._guarded:
            self._guard = Guard()
        self._iterator = iter(self._dataset)
        return iter(self._iterator)

    def get_state(self) -> DataState:
        state = _state_of(self._iterator)
        return {"workers": _workers(state), "iterator": encode(state)}

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        match state:
            case {"workers": int(workers), "iterator": told}:
                pass
            case _:
                raise DamagedError("data state: not that of Grain.")
        batches = self.begin(number)
        iterator = self._iterator
        now = _state_of(iterator)
        if _workers(now) != workers:
            raise RestoreError(
                f"the position was saved with {workers} worker processes, and "
                f"the dataset has {_workers(now)} now. Resume with "
                f"{workers}: Grain deals the data out to them"
            )
        told = decode(told)
        if isinstance(self._dataset, grain.DataLoader):
            # Which data they are, is known by the data (see `identity`).
            told = json.dumps({**json.loads(iterator.get_state()), **told})
            told = told.encode()
        iterator.set_state(told)
        return batches

    def close(self) -> None:
        # Now, with its processes: not when garbage is collected.
        iterator = getattr(self._iterator, "_iterator", self._iterator)
        if iterator is not None:
            iterator.close()
        self._iterator = None
        if self._guard is not None:
            self._guard.close()
            self._guard = None


def _state_of(iterator: Any) -> dict[str, Any]:
    state = iterator.get_state()
    if not isinstance(state, bytes):
        return state
    told = json.loads(state)
    return {k: v for k, v in told.items() if k not in _PRINTED}


def _workers(state: dict[str, Any]) -> int:
    found = state.get("worker_count")
    if found is None:
        found = len(state.get("iterators_in_use_states", ()))
    return int(found)


def _chain(dataset: Any) -> Iterator[Any]:
    yield dataset
    for parent in getattr(dataset, "_parents", ()):
        yield from _chain(parent)


def _unwrapped(dataset: Any) -> Any:
    """The outermost dataset that does something."""
    while type(dataset).__name__ in _WRAPPERS:
        dataset = dataset._parent
    return dataset


def _has_processes(dataset: Any) -> bool:
    if isinstance(dataset, grain.DataLoader):
        return dataset._multiprocessing_options.num_workers > 0
    parts: Any = getattr(dataset, "_datasets", None)
    return _is(dataset, "ProcessPrefetchIterDataset") or (
        _is(dataset, "InterleaveIterDataset")
        and isinstance(parts, list | tuple)
        and all(_is(p, "ProcessPrefetchIterDataset") for p in parts)
    )


def _has_threads(dataset: Any) -> bool:
    """Whether other threads than the one that draws run the user's code."""
    if _is(dataset, "PrefetchIterDataset"):
        options = dataset._read_options
        return options.num_threads > 0 and options.prefetch_buffer_size > 0
    return _is(dataset, "ThreadPrefetchIterDataset")


def _is(dataset: Any, name: str) -> bool:
    return type(dataset).__name__ == name


def _mark_flags() -> None:
    """Grain's processes are started with the flags of this one."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
