"""Whether layers and variables are trainable, asked of many of them often.

Keras's own properties return a private attribute each. It is read here
without them: with hundreds of variables, their calls would be what most of the
time between two calls of the device goes to.
"""

import operator
from collections.abc import Sequence

import keras

_FLAG = operator.attrgetter("_trainable")
_OWN = (keras.Layer.trainable, keras.Variable.trainable)


class TrainableFlags:
    """What is trainable, and whether that changed.

    Args:
        objects: layers and variables.
    """

    def __init__(self, objects: Sequence[keras.Layer | keras.Variable]) -> None:
        self._plain = [o for o in objects if type(o).trainable in _OWN]
        # A class of the user's may have a property of its own.
        self._others = [o for o in objects if type(o).trainable not in _OWN]
        self._flags = self._read()

    def _read(self) -> list[bool]:
        flags = list(map(_FLAG, self._plain))
        if self._others:
            flags += [other.trainable for other in self._others]
        return flags

    @property
    def have_changed(self) -> bool:
        """Whether one is another now than when this was made."""
        return self._read() != self._flags
