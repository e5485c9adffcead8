"""At which steps a training metric is updated, and over which it is taken.

Both are functions of the step alone: the same in a run that was killed.
"""

import dataclasses
import operator
from typing import Any, Literal, get_args

import numpy as np

from legato.errors import ConfigError

Window = Literal["epoch", "summary", "batch"]
"""What a result is taken over: the steps at which the metric was updated since
the epoch began ("epoch"), since the last summary before this one ("summary"),
or the last one of these in the epoch ("batch")."""


_LEAST_SHARE = 2**-30  # what steps are drawn by has 30 bits


def _check_window(when: "Every | Sample") -> None:
    if when.over not in get_args(Window):
        raise ConfigError(
            f"{type(when).__name__}(over={when.over!r}): it must be "
            '"epoch" (since the epoch began), "summary" (since the last '
            'summary) or "batch" (the last batch).'
        )


@dataclasses.dataclass(frozen=True)
class Every:
    """After each so many steps of the run.

    Args:
        steps: 1 is each step, 50 the 50th, the 100th, ...
        over: what a result is taken over; see `Window`.

    Raises:
        ConfigError: an argument is out of range.
    """

    steps: int = 1
    over: Window = "epoch"

    def __post_init__(self) -> None:
        _check_window(self)
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(
                f"Every({self.steps!r}): it must be a whole number of steps, "
                "at least 1."
            )

    @property
    def is_always(self) -> bool:
        """Whether every step is among them."""
        return self.steps == 1

    def is_due(self, step: Any) -> Any:
        """Whether the step with this index (from 0) is one of them.

        Args:
            step: an int32 scalar tensor, or NumPy integers.
        """
        return (step + 1) % self.steps == 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """After a random share of the steps.

    Args:
        share: how many of them, as a number of at least 2**-30 and at most 1.
        seed: another one gives other steps.
        over: what a result is taken over; see `Window`.

    Raises:
        ConfigError: an argument is out of range.
    """

    share: float
    seed: int = 0
    over: Window = "epoch"

    def __post_init__(self) -> None:
        _check_window(self)
        in_range = (
            isinstance(self.share, int | float)
            and not isinstance(self.share, bool)
            and _LEAST_SHARE <= self.share <= 1
        )
        if not in_range:
            raise ConfigError(
                f"Sample({self.share!r}): the share must be a number above 0 "
                "and at most 1, as 0.02 for one step in fifty, and at least "
                "2**-30, for one below that is never due. Give None instead "
                "of Sample to switch the metric off."
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise ConfigError(
                f"Sample(seed={self.seed!r}): it must be an int from 0 to "
                "2**31 - 1."
            )

    @property
    def is_always(self) -> bool:
        """Whether every step is among them."""
        return self.share == 1

    def is_due(self, step: Any) -> Any:
        """Whether the step with this index (from 0) is one of them.

        Args:
            step: an int32 scalar tensor, or NumPy integers.
        """
        return _hash(step, self.seed) < round(self.share / _LEAST_SHARE)


When = Every | Sample

_FORMS = (
    "it must be a number of steps (50 for every 50th), {every: 50} or "
    "{sample: 0.02}, each also with over: epoch, summary or batch; "
    "legato.Every(50) or legato.Sample(0.02); or null (None) for never"
)


def read_when(value: Any) -> When | None:
    """When a metric is updated, as users write it; None for never.

    Raises:
        ConfigError: it is no such thing.
    """
    if value is None or isinstance(value, When):
        return value
    number = as_whole(value)
    if number is not None:
        return Every(number)
    try:
        match value:
            case {"every": steps, **others}:
                whole = as_whole(steps)
                return Every(steps if whole is None else whole, **others)
            case {"sample": share, **others}:
                return Sample(share, **others)
    except TypeError:  # others are none of its arguments
        pass
    raise ConfigError(f"{value!r:.80}: {_FORMS}.")


def as_whole(value: Any) -> int | None:
    """A whole number; takes NumPy's integers and YAML's `1e5`, not True."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


# Multipliers below 2**15, so that no product leaves an int32.
_ROUNDS = (
    (31153, 40503), (27191, 51437), (32719, 30011),
    (29881, 44497), (30707, 25847), (28603, 59929),
)  # fmt: skip


def _hash(step: Any, seed: int) -> Any:
    """A number in [0, 2**30), in int32 arithmetic that all backends share.

    A Feistel network over the two halves of the step, keyed by the seed.
    """
    high, low = step // 65536, step % 65536
    for number, (factor, offset) in enumerate(_ROUNDS):
        key = (offset + (seed >> (5 * number)) + 7 * seed) % 65536
        mixed = (low * factor + key) % 32749
        # Squared, because sums and products alone leave a pattern.
        high, low = low, (high + mixed * mixed // 64) % 65536
    return (high % 16384) * 65536 + low


def any_due(when: When, first: int, stop: int) -> bool:
    """Whether any step with an index in `[first, stop)` is one of them."""
    if isinstance(when, Every):
        return stop // when.steps > first // when.steps
    block = 4096
    return any(
        bool(np.any(when.is_due(np.arange(k, min(k + block, stop)))))
        for k in range(first, stop, block)
    )
