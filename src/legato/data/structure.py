"""How the arrays of a batch are nested, apart from the arrays."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

_LEAF = "."


class Structure:
    """The nesting of dicts, lists and tuples; None is no array.

    Keras lets the labels or the weights of an output be None. No device
    takes that, so only the arrays travel and the Nones are put back.

    Args:
        nested: any example of it.
    """

    def __init__(self, nested: Any) -> None:
        self._skeleton = keras.tree.map_structure(
            lambda leaf: None if leaf is None else _LEAF, nested
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Structure) and self._skeleton == other._skeleton
        )

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return repr(self._skeleton)

    @functools.cached_property
    def _present(self) -> list[bool]:
        # Batches are packed by one structure, and each is compared by its own.
        return [leaf is not None for leaf in keras.tree.flatten(self._skeleton)]

    def is_flat(self, batch: Any) -> bool:
        """Whether it is of this structure, a tuple of NumPy's arrays.

        As most are, and ten times as quick as to compare structures.
        """
        return (
            type(batch) is tuple
            and len(batch) == self._flat
            and {*map(type, batch)} == {np.ndarray}
        )

    @functools.cached_property
    def _flat(self) -> int | None:
        """The length of a plain tuple of arrays; None: it is another."""
        skeleton = self._skeleton
        if type(skeleton) is tuple and all(s == _LEAF for s in skeleton):
            return len(skeleton)
        return None

    @staticmethod
    def leaves(nested: Any) -> list[Any]:
        """Those that are not None, in their order."""
        return [leaf for leaf in keras.tree.flatten(nested) if leaf is not None]

    def pack(self, leaves: Sequence[Any]) -> Any:
        """The nested structure that holds these leaves."""
        rest = iter(leaves)
        flat = [next(rest) if present else None for present in self._present]
        return keras.tree.pack_sequence_as(self._skeleton, flat)

    def paths(self) -> list[str]:
        """Where each of the arrays is, such as `"1.left"`."""
        return [
            ".".join(map(str, path)) or "data"
            for path, leaf in keras.tree.flatten_with_path(self._skeleton)
            if leaf is not None
        ]
