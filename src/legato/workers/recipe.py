"""How a batch is made of examples; the same in whatever thread or process."""

import dataclasses
import datetime
import hashlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from legato.errors import DataError
from legato.rng import derive_seed
from legato.workers import seeding
from legato.workers.collating import UnevenError

PLAIN = (
    *(str, bytes, bool, int, float, complex, type(None), np.generic),
    *(datetime.date, datetime.time, datetime.timedelta),
)
"""Of these nothing can change, and what is printed tells all."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch that is to be made.

    Attributes:
        seed: the run's.
        epoch: from 0.
        batch: which of the epoch, from 0.
        indices: of its examples, int64.
    """

    seed: int
    epoch: int
    batch: int
    indices: np.ndarray

    def __reduce__(self) -> Any:
        # A tenth of the time that dataclasses and arrays take.
        fixed = self.seed, self.epoch, self.batch
        return _job, (*fixed, self.indices.astype(np.int64).tobytes())


def _job(seed: int, epoch: int, batch: int, indices: bytes) -> Job:
    return Job(seed, epoch, batch, np.frombuffer(indices, np.int64))


@dataclasses.dataclass(frozen=True)
class Findings:
    """What showed when a batch was made twice.

    Attributes:
        same: both times it was the same.
        draws: something was drawn from the global generators.
    """

    same: bool
    draws: bool


class Recipe:
    """Makes batches; a function of the job alone, as far as we can see to it.

    Args:
        dataset: has `__getitem__(int)`, and perhaps `__getitems__(list)`.
        transform: gets an example and a generator of its own.
        collate: makes a batch of a list of examples.
        what: names the dataset in messages.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any, np.random.Generator], Any] | None,
        collate: Callable[[Sequence[Any]], Any],
        what: str,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.collate = collate
        self.what = what

    def make(self, job: Job, *, alone: bool) -> Any:
        """The batch.

        Args:
            job: which.
            alone: whether nobody else in this process draws from the global
                generators meanwhile; they are set for the batch then.

        Raises:
            Exception: the user's code raised it; a note names the example.
        """
        if not alone:
            return self._make(job)
        while True:
            known = seeding.imported()
            seeding.begin(job.seed, "batch", job.epoch, job.batch)
            batch = self._make(job)
            if seeding.imported() == known:
                return batch

    def try_out(self, job: Job) -> tuple[Any, Findings]:
        """Makes a batch twice, with nobody else in the process."""
        # What is opened or imported the first time is there from now on.
        first = digest(self.make(job, alone=True))
        seeding.begin(job.seed, "batch", job.epoch, job.batch)
        before = seeding.fingerprint()
        batch = self._make(job)
        draws = seeding.fingerprint() != before
        return batch, Findings(same=digest(batch) == first, draws=draws)

    def _make(self, job: Job) -> Any:
        indices: list[int] = job.indices.tolist()
        examples = self._examples(job, indices)
        try:
            return _numpy(self.collate(examples))
        except UnevenError as error:
            raise DataError(
                f"{self.what}: example {indices[error.position]} "
                f"{error.message}"
            ) from error
        except Exception as error:
            error.add_note(f"(in collate, for {self._place(job)})")
            raise

    def _examples(self, job: Job, indices: list[int]) -> list[Any]:
        dataset, transform = self.dataset, self.transform
        at_once = getattr(dataset, "__getitems__", None)
        examples: list[Any] = []
        which: int | str = "one"
        try:
            if at_once is not None:
                examples = list(at_once(indices))
                if len(examples) != len(indices):
                    raise DataError(
                        f"{self.what}: __getitems__ gave {len(examples)} "
                        f"examples for {len(indices)} indices. Give one for "
                        "each."
                    )
                if transform is None:
                    return examples
            found = []
            for position, index in enumerate(indices):
                which = index
                example = examples[position] if examples else dataset[index]
                if transform is not None:
                    key = derive_seed(job.seed, "transform", job.epoch, index)
                    example = transform(example, np.random.default_rng(key))
                found.append(example)
        except Exception as error:
            error.add_note(f"(example {which}, in {self._place(job)})")
            raise
        return found

    def _place(self, job: Job) -> str:
        return f"batch {job.batch} of epoch {job.epoch} of {self.what}"


class Rows:
    """Arrays nested in dicts and tuples, as a dataset of their rows.

    Arrays that lie in files are opened again in a worker process, not sent.
    """

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        lengths = {len(array) for array in leaves(self.arrays)}
        if len(lengths) > 1:
            raise DataError(
                "The arrays have different numbers of examples: "
                f"{sorted(lengths)}. Every array must have one row for each."
            )
        return lengths.pop() if lengths else 0

    def __getitem__(self, index: int) -> Any:
        return mapped(lambda array: array[index], self.arrays)

    def __getstate__(self) -> Any:
        return mapped(_InFile.of, self.arrays)

    def __setstate__(self, state: Any) -> None:
        self.arrays = mapped(
            lambda a: a.opened() if isinstance(a, _InFile) else a, state
        )


@dataclasses.dataclass
class _InFile:
    """A memory-mapped array, by where it lies."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @staticmethod
    def of(array: Any) -> Any:
        # A view into a mapped array does not know its own offset.
        if (
            isinstance(array, np.memmap)
            and isinstance(array.base, mmap.mmap)
            and array.flags.c_contiguous
            and array.filename is not None
        ):
            return _InFile(
                str(array.filename), array.offset, array.shape, array.dtype
            )
        return array

    def opened(self) -> np.ndarray:
        return np.memmap(
            self.path, self.dtype, "r", self.offset, self.shape, "C"
        )


class StoppedWaiting(Exception):
    """A batch was not waited for any longer, because somebody asks to stop."""


POLL_SECS = 0.1
"""So long one waits for a batch until one looks whether to stop."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


class Workers(Protocol):
    """Makes batches elsewhere, and gives them in the order of the jobs.

    Attributes:
        broken: it makes none any more, after an error.
        gives_up: asked while a batch is waited for: whether to stop that.
    """

    broken: bool
    gives_up: Callable[[], bool]

    def room(self) -> int:
        """How many more jobs can be begun; ends the use of what was taken."""
        ...

    def begin(self, job: Job, *, try_out: bool = False) -> None:
        """Begin to make a batch; waits where there is no room.

        Args:
            job: which.
            try_out: take what `Recipe.try_out` returns; processes only, for
                elsewhere nobody else may draw meanwhile.
        """
        ...

    def take(self) -> Any:
        """The batch of the oldest job, to be used up to the next call.

        Raises:
            WorkerError: it could not be made.
            StoppedWaiting: see `gives_up`.
        """
        ...

    def drop(self) -> None:
        """Forget what was begun and not taken."""
        ...

    def close(self) -> None:
        """End the workers; idempotent."""
        ...


def mapped(function: Callable[[Any], Any], nested: Any) -> Any:
    """A nested structure with `function(leaf)` for each leaf but None."""
    if isinstance(nested, dict):
        return {key: mapped(function, each) for key, each in nested.items()}
    if isinstance(nested, tuple | list):
        parts = [mapped(function, each) for each in nested]
        named = isinstance(nested, tuple) and hasattr(nested, "_fields")
        return type(nested)(*parts) if named else type(nested)(parts)
    return None if nested is None else function(nested)


def leaves(nested: Any) -> Iterator[Any]:
    """The leaves of a nested structure, without None."""
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, tuple | list):
        if nested is not None:
            yield nested
        return
    for each in nested:
        yield from leaves(each)


def digest(batch: Any) -> str:
    """The hash of the bytes of a batch."""
    found = hashlib.sha256()
    for leaf in leaves(batch):
        array = np.ascontiguousarray(leaf)
        found.update(repr((array.dtype.str, array.shape)).encode())
        found.update(content(array))
    return found.hexdigest()


def content(array: np.ndarray) -> bytes:
    """The bytes of an array; of objects, what is the same in any process."""
    if not array.dtype.hasobject:
        return np.ascontiguousarray(array).tobytes()
    return repr([_told(each) for each in array.flat]).encode()


def _told(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, content(value)
    if isinstance(value, list | tuple):
        return type(value).__name__, [_told(each) for each in value]
    if isinstance(value, dict):
        return "dict", [(_told(k), _told(v)) for k, v in value.items()]
    plain = isinstance(value, PLAIN)
    # (Others may be printed with their addresses.)
    return type(value).__qualname__, repr(value) if plain else ""


def _numpy(batch: Any) -> Any:
    """Tensors on the CPU as arrays: they travel better."""
    return mapped(
        lambda leaf: np.asarray(leaf) if hasattr(leaf, "__array__") else leaf,
        batch,
    )
