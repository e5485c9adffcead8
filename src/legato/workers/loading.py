"""What PyTorch's worker processes do for us, in each of them.

It is here because a new interpreter that imports this needs no Keras for it.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from legato.workers import seeding


class Numbered(NamedTuple):
    """What a sampler gave, with its number.

    Attributes:
        number: of the batch in its pass.
        index: what is to be loaded.
        loads: whether it is; otherwise there is None in its place.
    """

    number: int
    index: Any
    loads: bool


class Numbers:
    """A sampler that numbers what another one gives, and skips the first.

    Args:
        sampler: of batches, or of examples where these are not put together.
        skipped: how many are not to be loaded.
        workers: so many take turns; the turns stay as they were.
    """

    def __init__(
        self, sampler: Iterable[Any], skipped: int, workers: int
    ) -> None:
        self._sampler = sampler
        self._skipped = skipped
        self._first = skipped - skipped % workers

    def __iter__(self) -> Iterator[Numbered]:
        for number, index in enumerate(self._sampler):
            if number >= self._first:
                yield Numbered(number, index, number >= self._skipped)


class SeedsBatches:
    """In the place of a `worker_init_fn`: each batch has seeds of its own.

    So that the global generators do not depend on what the worker loaded
    before.

    Args:
        before: the user's own, or None.
    """

    def __init__(self, before: Callable[[int], None] | None) -> None:
        self._before = before

    def __call__(self, worker: int) -> None:
        """Prepare this process; called in it."""
        torch: Any = sys.modules["torch"]
        data = torch.utils.data
        seed = data.get_worker_info().seed - worker  # the same for all
        fetcher = data._utils.fetch._MapDatasetFetcher
        fetch = fetcher.fetch

        @functools.wraps(fetch)
        def seeded(self: Any, task: Numbered) -> Any:
            if not task.loads:
                return None
            seeding.begin(seed, "loader", task.number)
            return fetch(self, task.index)

        fetcher.fetch = seeded
        if self._before is not None:
            self._before(worker)
