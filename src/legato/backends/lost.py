"""Variables whose values mean nothing, since a device call failed midway."""

import weakref
from collections.abc import Iterable, MutableMapping

import keras

from legato.errors import BackendError


class LostVariables:
    """Remembers them until they are written."""

    def __init__(self) -> None:
        # Keyed by identity, as in Keras: comparing variables compares values.
        self._lost: MutableMapping[int, keras.Variable] = (
            weakref.WeakValueDictionary()
        )

    def add(self, variables: Iterable[keras.Variable]) -> None:
        """A call that updates these failed."""
        self._lost.update({id(v): v for v in variables})

    def remove(self, variables: Iterable[keras.Variable]) -> None:
        """These have been given values."""
        for variable in variables:
            self._lost.pop(id(variable), None)

    def among(
        self, variables: Iterable[keras.Variable]
    ) -> list[keras.Variable]:
        """Which of these are lost."""
        return [v for v in variables if id(v) in self._lost]

    def refuse(self, variables: Iterable[keras.Variable]) -> None:
        """Check that none of these is lost, before they are used.

        Raises:
            BackendError: one is.
        """
        if self._lost and self.among(variables):
            raise BackendError(
                "The variables hold no valid values since a device call "
                "failed. Restore a checkpoint, or build the model anew."
            )
