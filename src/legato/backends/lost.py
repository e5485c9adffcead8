"""Variables whose values mean nothing, since a device call failed midway."""

from collections.abc import Iterable

import keras


class LostVariables:
    """Remembers them until they are written."""

    def __init__(self) -> None:
        # Keyed by identity, as in Keras: comparing variables compares values.
        self._lost: dict[int, keras.Variable] = {}

    def add(self, variables: Iterable[keras.Variable]) -> None:
        """A call that updates these failed."""
        self._lost |= {id(v): v for v in variables}

    def remove(self, variables: Iterable[keras.Variable]) -> None:
        """These have been given values."""
        for variable in variables:
            self._lost.pop(id(variable), None)

    def among(
        self, variables: Iterable[keras.Variable]
    ) -> list[keras.Variable]:
        """Which of these are lost."""
        return [v for v in variables if id(v) in self._lost]
