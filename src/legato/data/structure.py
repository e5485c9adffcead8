"""How the arrays of a batch are nested, apart from the arrays."""

import functools
from collections.abc import Sequence
from typing import Any

import keras

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
