"""Where reads and assignments of variables go while a step is traced."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from legato.backends.scope import RecordingScope, refuse_new_variables
from legato.compat import keras_tracing


class StepScope(RecordingScope):
    """Puts what a step does with variables into its graph.

    State stays in the variables' own memory: a read is an operation of the
    graph, and so is an assignment, in the order of the program. This scope
    notes what is used, and gives values to what is made lazily.

    Args:
        parent: the scope around this one.
        losses: whether `add_loss` collects here and `model.losses` may be
            read.
        may_make: whether variables may be made while this is the outermost
            scope.
        native: what is read is the `tf.Variable` itself, which a tape of the
            step's own can differentiate by.
    """

    def __init__(
        self,
        *,
        parent: "StepScope | None" = None,
        losses: bool = False,
        may_make: bool = True,
        native: bool = False,
    ) -> None:
        super().__init__(parent=parent, losses=losses)
        self._root: StepScope = self if parent is None else parent._root
        self._may_make = may_make
        self._native = native

    def get_current_value(self, variable: keras.Variable) -> Any:
        memory = self.memory(variable)
        if self._root._native or keras_tracing.in_apply():
            # Keras's optimizers assign to it.
            return memory
        # A tensor, so that it stays what it is when the variable is assigned.
        return memory.value()

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        variable, value = update
        memory = self.memory(variable)
        self._root.updated[id(variable)] = variable
        memory.assign(tf.cast(value, memory.dtype), read_value=False)

    def memory(self, variable: keras.Variable) -> Any:
        """The variable's own `tf.Variable`; noted as used."""
        self._root.read[id(variable)] = variable
        if variable._value is None:
            if not self._root._may_make:
                refuse_new_variables([variable])
            # At once, and outside of the graph: a value in the graph could
            # not be read after the branch or loop where the variable was made.
            keras_tracing.initialize_variables()
        return variable._value

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """A context in which an optimizer can be built."""
        keras_tracing.initialize_variables()  # the model's, for their shapes
        with tf.init_scope():
            yield
