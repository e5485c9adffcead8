"""PyTorch's `DataLoader`, on any backend."""

import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from legato.data.attributes import Attributes, Look
from legato.data.readers import Iterable, Passes
from legato.data.source import DataState
from legato.errors import DamagedError


class TorchLoader(Iterable):
    """Reads a `DataLoader`.

    Its samplers, and the seeds of its workers, draw from PyTorch's global
    generator when a pass begins, or from a generator of the user's, which is
    saved; so is what changes in the dataset and the samplers. Workers begin
    anew in each pass, because they keep generators of their own.

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
        self.tracked.clear()
        self.tracked.extend(map(_Generator, generators.values()))
        for part in parts.values():
            if hasattr(part, "__dict__"):
                apart = [*parts.values(), *generators.values()]
                apart = [other for other in apart if other is not part]
                self.track(Attributes(part, apart=apart))
        if not getattr(loader, "in_order", True):
            self.notes.append(
                "its order varies, for it has in_order=False. Leave that out"
            )

    def open(self) -> Passes:
        """Iterates over the loader."""
        return _Passes(self._loader)


def _length(loader: DataLoader) -> int | None:
    # As Keras does: an iterable dataset may have a length too.
    return len(loader) if hasattr(loader.dataset, "__len__") else None


def _parts(loader: DataLoader) -> Iterator[Any]:
    yield loader.dataset
    yield loader.sampler
    yield loader.batch_sampler
    yield getattr(loader.batch_sampler, "sampler", None)
    if not isinstance(loader.collate_fn, types.FunctionType):
        yield loader.collate_fn


class _Passes(Passes):
    def __init__(self, loader: DataLoader) -> None:
        self._loader: Any = loader
        self._iterator: Any = None

    def begin(self, number: int) -> Iterator[Any]:
        self.close()
        if self._loader.persistent_workers:
            self._loader._iterator = None
        self._iterator = iter(self._loader)
        return self._iterator

    def close(self) -> None:
        # Now: it would be done when garbage is collected, perhaps in a fork.
        end_workers = getattr(self._iterator, "_shutdown_workers", None)
        if end_workers is not None:
            end_workers()
        self._iterator = None


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
