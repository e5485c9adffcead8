"""PyTorch's `DataLoader` and torchdata's stateful one, on any backend."""

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from legato.data.attributes import Attributes, Look
from legato.data.encoding import decode, encode
from legato.data.readers import END, Iterable, Method, Passes, told_by
from legato.data.source import DataState
from legato.data.stream_state import StreamState, is_stream, streams_in
from legato.errors import DamagedError, RestoreError
from legato.workers.loading import Numbers, SeedsBatches


class TorchLoader(Iterable):
    """Reads a `DataLoader`.

    Its samplers, and the seeds of its workers, draw from PyTorch's global
    generator when a pass begins, or from a generator of the user's, which is
    saved; so is what changes in the dataset and the samplers. Workers begin
    anew in each pass, because they may keep something of their own.

    Where the examples are loaded by their numbers, batches are skipped by
    drawing their numbers alone: unless loading them changes what comes later.
    In workers, each batch has seeds of its own for that.

    Args:
        loader: the loader.
    """

    def __init__(self, loader: DataLoader) -> None:
        super().__init__(None, "torch DataLoader", _length(loader))
        self._loader = loader
        self.cheap = loader.num_workers == 0
        parts = {id(part): part for part in _parts(loader) if part is not None}
        found = [
            getattr(p, "generator", None) for p in (loader, *parts.values())
        ]
        generators = {
            id(each): each
            for each in found
            if isinstance(each, torch.Generator)
        }
        streams = {
            id(each): each
            for part in parts.values()
            for each in (part, *streams_in(part))
            if is_stream(each)
        }
        self.tracked.clear()
        self.tracked.extend(map(_Generator, generators.values()))
        self.tracked.extend(map(StreamState, streams.values()))
        apart = {**parts, **generators, **streams}.values()
        for part in parts.values():
            if hasattr(part, "__dict__") and not is_stream(part):
                others = [other for other in apart if other is not part]
                self.track(Attributes(part, apart=others))
        self.methods = tuple(self._find_methods())
        orders = [*_orders(loader), loader]
        ordering = {id(part) for part in orders} | {
            id(getattr(part, "generator", None)) for part in orders
        }
        self.loading = [
            index
            for index, tracked in enumerate(self.tracked)
            if id(tracked.subject) not in ordering
        ]

    def _find_methods(self) -> Iterator[Method]:
        loader = self._loader
        if told_by(loader) is not None:
            yield "state"
        by_number = not isinstance(
            loader.dataset, torch.utils.data.IterableDataset
        )
        tells = told_by(loader) is not None
        self.seeds_batches = by_number and loader.num_workers > 0 and not tells
        if self.seeds_batches:
            self.before = loader.num_workers + 1  # each has loaded something
        if by_number and (loader.num_workers == 0 or self.seeds_batches):
            yield "skip"
        elif not tells:
            self.why = "its dataset is read in the order that it gives"

        if not getattr(loader, "in_order", True):
            self.notes.append(
                "its order varies, for it has in_order=False. Leave that out"
            )

    def open(self) -> Passes:
        """Iterates over the loader."""
        if self.seeds_batches:
            return _WorkerPasses(self._loader)
        return _Passes(self._loader)


def _length(loader: DataLoader) -> int | None:
    # As Keras does: an iterable dataset may have a length too.
    return len(loader) if hasattr(loader.dataset, "__len__") else None


def _parts(loader: DataLoader) -> Iterator[Any]:
    yield loader.dataset
    yield from _orders(loader)
    if not isinstance(loader.collate_fn, types.FunctionType):
        yield loader.collate_fn


def _orders(loader: DataLoader) -> Iterator[Any]:
    yield loader.sampler
    yield loader.batch_sampler
    yield getattr(loader.batch_sampler, "sampler", None)


def _told(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; a worker that dies is told also where PyTorch is not.

    It is while it hands a batch over that PyTorch knows only of an end.
    """
    try:
        yield from batches
    except EOFError as error:
        raise RuntimeError(
            "A worker process of the DataLoader ended while it handed a batch "
            "over: it was killed, perhaps for want of memory, or crashed"
        ) from error


class _Passes(Passes):
    def __init__(self, loader: DataLoader) -> None:
        self._loader: Any = loader
        self._iterator: Any = None

    def begin(self, number: int) -> Iterator[Any]:
        self.close()
        if self._loader.persistent_workers or told_by(self._loader):
            self._loader._iterator = None
        self._iterator = iter(self._loader)
        return _told(self._iterator)

    def get_state(self) -> DataState | None:
        names = told_by(self._loader)
        return names and encode(getattr(self._loader, names[0])())

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        names = told_by(self._loader)
        assert names is not None  # it told the state
        self.close()
        self._loader._iterator = None
        getattr(self._loader, names[1])(decode(state))
        self._iterator = iter(self._loader)
        return _told(self._iterator)

    def skip_to(
        self, number: int, skipped: int, each: Callable[[int], None]
    ) -> Iterator[Any]:
        batches = self.begin(number)
        for batch in range(skipped):
            each(batch)
            if next(self._iterator._sampler_iter, END) is END:
                raise RestoreError(
                    f"the checkpoint is at batch {skipped} of pass {number} "
                    f"over the data, and there are only {batch} now. Resume "
                    "with the data of the run"
                )
        return batches

    def close(self) -> None:
        # Now: it would be done when garbage is collected, perhaps in a fork.
        end_workers = getattr(self._iterator, "_shutdown_workers", None)
        if end_workers is not None:
            end_workers()
        self._iterator = None


class _WorkerPasses(_Passes):
    """Passes in which each batch has seeds of its own, in whatever worker."""

    def begin(self, number: int) -> Iterator[Any]:
        return self._begin_after(0)

    def _begin_after(self, skipped: int) -> Iterator[Any]:
        self.close()
        loader: Any = copy.copy(self._loader)
        # (It refuses to have them set.)
        parts = vars(loader)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        parts[name] = Numbers(parts[name], skipped, loader.num_workers)
        parts["worker_init_fn"] = SeedsBatches(loader.worker_init_fn)
        parts["_iterator"] = None
        self._iterator = iter(loader)
        return _told(self._iterator)

    def skip_to(
        self, number: int, skipped: int, each: Callable[[int], None]
    ) -> Iterator[Any]:
        iterator = self._begin_after(skipped)
        for _ in range(skipped % self._loader.num_workers):
            if next(iterator, END) is END:
                raise RestoreError(
                    f"the checkpoint is at batch {skipped} of pass {number} "
                    "over the data, and there are fewer now. Resume with the "
                    "data of the run"
                )
        return iterator


class _Generator:
    """A `torch.Generator` of the user's."""

    def __init__(self, generator: torch.Generator) -> None:
        self.subject: Any = generator
        self._built = self._get()

    def _get(self) -> np.ndarray:
        return self.subject.get_state().numpy().copy()

    def look(self) -> Look:
        now = self._get()
        if np.array_equal(now, self._built):
            return Look(None, [], {})
        return Look({"generator": now}, [], {})

    def reset(self) -> None:
        self.subject.set_state(torch.from_numpy(self._built.copy()))

    def set(self, state: DataState) -> None:
        match state:
            case None:
                pass
            case {"generator": np.ndarray() as saved} if (
                saved.dtype == np.uint8 and saved.shape == self._built.shape
            ):
                self.subject.set_state(torch.from_numpy(saved.copy()))
            case _:
                raise DamagedError("data state: not that of a generator.")
