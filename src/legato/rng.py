"""Randomness as a function of (seed, stream, position), never stored state.

What is keyed needs no saving: the order of any epoch can be computed at any
position, in any process, by any number of workers, and is the same.
"""

import contextlib
import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from legato.errors import DamagedError


def derive_seed(seed: int, *stream: int | str) -> int:
    """A 64-bit seed for one named stream of a run.

    Args:
        seed: the run's seed.
        *stream: what the stream is for, such as `"order", 3`.

    Returns:
        An int in [0, 2**64), independent for different streams.
    """
    text = repr((int(seed), *stream)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): uint64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A random permutation of range(length) that needs no memory.

    A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002): a position is a pair (left, right) in
    Z_a x Z_b with a * b just above `length`; each round adds a keyed hash of
    one half to the other. The few results outside range(length) are sent
    through again. Any position costs the same, so that a run resumes anywhere
    in an epoch of any length in constant time.

    Args:
        length: the number of elements, in [1, 2**62).
        key: 64 bits that choose the permutation.
    """

    def __init__(self, length: int, key: int) -> None:
        self.length = length
        a = max(math.isqrt(length - 1) + 1, 2)
        b = max(-(-length // a), 2)
        self._a, self._b = np.uint64(a), np.uint64(b)
        # A round on a small half moves little: few elements need more rounds
        # to be uniform over all orders (the chi-squared tests hold this).
        rounds = 24 if length <= 64 else 8
        self._round_keys = [
            np.uint64(derive_seed(key, "round", i)) for i in range(rounds)
        ]
        self._tables: list[np.ndarray] = []

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where each position is sent.

        Args:
            positions: ints in [0, length), of any shape.

        Returns:
            int64 of the same shape, in [0, length), without repeats if
            `positions` has none.
        """
        out = self._network(positions.astype(np.uint64))
        outside = out >= np.uint64(self.length)
        while outside.any():
            out[outside] = self._network(out[outside])
            outside = out >= np.uint64(self.length)
        return out.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self._b)
        # Halves have few values: it is quicker to hash each of them once, where
        # there are more positions.
        most = int(max(self._a, self._b))
        if not self._tables and most <= min(x.size, _MAX_TABLE):
            self._tables = [
                _hashed(np.arange(most, dtype=np.uint64), *self._round(i))
                for i in range(len(self._round_keys))
            ]
        for i in range(len(self._round_keys)):
            key, modulus = self._round(i)
            half, other = (right, left) if i % 2 else (left, right)
            if self._tables:
                moved = half + self._tables[i].take(other.view(np.int64))
            else:
                moved = half + _hashed(other, key, modulus)
            # (The difference is unsigned: huge, where there is none.)
            moved = np.minimum(moved, moved - modulus)
            left, right = (left, moved) if i % 2 else (moved, right)
        return left * self._b + right

    def _round(self, number: int) -> tuple[np.uint64, np.uint64]:
        """Its key, and how many values the half has that is moved."""
        modulus = self._b if number % 2 else self._a
        return self._round_keys[number], modulus


_MAX_TABLE = 4096


def _hashed(half: np.ndarray, key: np.uint64, modulus: np.uint64) -> np.ndarray:
    """A keyed hash in [0, modulus), without a division."""
    mixed = _mix(half * np.uint64(0x9E3779B97F4A7C15) + key)
    # Multiply-shift maps 32 random bits evenly onto [0, modulus); halves are
    # below 2**31, so nothing overflows.
    return (mixed >> np.uint64(32)) * modulus >> np.uint64(32)


def get_host_state() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The global generators of Python and NumPy, for a checkpoint.

    Returns:
        JSON values, and arrays by name.
    """
    version, internal, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return (
        {
            "python": {"version": version, "gauss": gauss},
            "numpy": {
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached": float(cached),
            },
        },
        {
            "python": np.array(internal, np.uint32),
            "numpy": np.array(key, np.uint32),
        },
    )


def set_host_state(state: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Put back what `get_host_state` returned.

    Raises:
        DamagedError: it is not that.
    """
    try:
        python, numpy = state["python"], state["numpy"]
        internal = tuple(arrays["python"].tolist())
        random.setstate((python["version"], internal, python["gauss"]))
        np.random.set_state(
            (
                "MT19937",
                arrays["numpy"],
                numpy["position"],
                numpy["has_gauss"],
                numpy["cached"],
            )
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(
            f"The saved random state is not one: {error}"
        ) from error


@contextlib.contextmanager
def kept_host_state() -> Iterator[None]:
    """What is drawn inside leaves the generators as they were."""
    state = get_host_state()
    try:
        yield
    finally:
        set_host_state(*state)
