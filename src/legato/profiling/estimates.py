"""What samples that were taken in turns tell, and what they do not."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Self, TypeVar

_MIN_SAMPLES = 3
"""Fewer do not show how much they vary."""

# The standard error of a median, from the distance of the quartiles, for
# samples that are about normal: 1.2533 standard deviations over the root of
# their number, of which the quartiles are 1.349 apart. Twice that is noise.
_NOISE_FACTOR = 2 * 1.2533 / 1.349

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and how sure it is, in the unit of its samples.

    Attributes:
        median: of the samples.
        low: their lower quartile.
        high: their upper quartile.
        noise: a median that is not further from zero could be chance;
            infinite where too few samples were taken to tell.
    """

    median: float
    low: float
    high: float
    noise: float

    @property
    def is_told(self) -> bool:
        """Whether it can be told from nothing."""
        return abs(self.median) > self.noise

    def __add__(self, other: Self) -> Self:
        return dataclasses.replace(
            self,
            median=self.median + other.median,
            low=self.low + other.low,
            high=self.high + other.high,
            noise=math.hypot(self.noise, other.noise),
        )

    def scaled(self, factor: float) -> Self:
        """The same in another unit.

        Args:
            factor: not negative.
        """
        return dataclasses.replace(
            self,
            median=self.median * factor,
            low=self.low * factor,
            high=self.high * factor,
            noise=self.noise * factor,
        )


def estimate(samples: Sequence[float], *, least_noise: float = 0.0) -> Estimate:
    """The median of differences, one or more, that may all be chance.

    Args:
        samples: differences of times taken in turns.
        least_noise: how far differences of nothing were from zero.
    """
    found = timed(samples)
    noise = math.inf
    if len(samples) >= _MIN_SAMPLES:
        spread = found.high - found.low
        noise = _NOISE_FACTOR * spread / math.sqrt(len(samples))
    return dataclasses.replace(found, noise=max(noise, least_noise))


def timed(samples: Sequence[float]) -> Estimate:
    """The median of times that were taken by themselves: none is chance."""
    middle = statistics.median(samples)
    low = high = middle
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Estimate(median=middle, low=low, high=high, noise=0.0)


def differences(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round: a machine that is slow for a while is so for both."""
    return [a - b for a, b in zip(samples, base, strict=True)]


def take_turns(
    contestants: Mapping[Key, Callable[[], float]],
    *,
    until: float,
    told_until: float,
    max_rounds: int,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Key, list[float]]:
    """Measure each in turn, round after round: A B C A B C.

    Args:
        contestants: what measures each.
        until: no round is begun that would probably end after this time; the
            first one is always.
        told_until: the same of the rounds without which nothing can be told.
        max_rounds: at most so many.
        clock: tells the time, in seconds.
    """
    samples: dict[Key, list[float]] = {name: [] for name in contestants}
    for number in range(1, max_rounds + 1):
        began = clock()
        for name, measure in contestants.items():
            samples[name].append(measure())
        now = clock()
        limit = until if number >= _MIN_SAMPLES else max(until, told_until)
        if now + (now - began) > limit:
            break
    return samples
