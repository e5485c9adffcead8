"""Where the values of variables live while a step runs on PyTorch."""

from typing import Any

import keras
import torch

from legato.backends.scope import RecordingScope, initial_value
from legato.compat import keras_tracing


class StepScope(RecordingScope):
    """Keeps what is assigned until the step ends.

    A tensor that was read from a variable keeps its value when the variable
    is assigned later in the step, and autograd may still need it: so assigned
    values stay here, and `commit` moves them into the variables. Optimizers
    do not assign: they change the memory that they read, in place.

    Args:
        parent: the scope around this one.
        losses: whether `add_loss` collects here.
        values: tensors that stand for variables, by id.
        copied: ids of variables that a step both reads by itself and lets an
            optimizer change: what it reads is a copy.
        guarded: keep a copy of all that is read, for `roll_back`.
        isolated: give copies of all that is read, so that nothing outside
            changes.
        reached: what the loss of each `value_and_grad` depends on, as a
            guarded scope found it.

    Attributes:
        root: the outermost scope of the step.
        reached: as given, or as found.
        made: variables that did not have a value yet.
        changed_elsewhere: variables changed in a branch not taken.
    """

    parent: "StepScope | None"

    def __init__(
        self,
        *,
        parent: "StepScope | None" = None,
        losses: bool = False,
        values: dict[int, torch.Tensor] | None = None,
        copied: frozenset[int] = frozenset(),
        guarded: bool = False,
        isolated: bool = False,
        reached: list[list[bool]] | None = None,
    ) -> None:
        super().__init__(parent=parent, losses=losses)
        self.root: StepScope = self if parent is None else parent.root
        self._values = {} if values is None else values
        self._copied = copied
        self._guarded = guarded
        self._isolated = isolated
        self.reached: list[list[bool]] = [] if reached is None else reached
        self._num_reached = 0
        self.made: dict[int, keras.Variable] = {}
        self.changed_elsewhere: dict[int, keras.Variable] = {}
        # (tensor, its version, its value), by the variable's id.
        self._before: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._read_by_step: set[int] = set()
        # Tensors that were handed out or are held, alive until the end: no
        # other can have their ids.
        self._handled: dict[int, torch.Tensor] = {}

    def get_current_value(self, variable: keras.Variable) -> torch.Tensor:
        key = id(variable)
        value = self.state_mapping.get(key)
        if value is None:
            if self.parent is not None:
                value = self.parent.get_current_value(variable)
            else:
                value = self._read(variable)
            if self._isolated:
                value = value.clone()
                self.hold(variable, value)
        if self._guarded and key not in self._before:
            # On the host: a device may not have room for all of it twice.
            copy = value.detach().to("cpu", copy=True)
            self._before[key] = value, value._version, copy
        return value

    def _read(self, variable: keras.Variable) -> torch.Tensor:
        """The outermost scope's value of a variable."""
        key = id(variable)
        self.read[key] = variable
        value = self._values.get(key)
        if value is None:
            if variable._value is None:
                self.made[key] = variable
            # Detached: what autograd follows is `value_and_grad`'s to say.
            value = initial_value(variable).detach()
            self._values[key] = value
        self._handled[id(value)] = value
        if not keras_tracing.in_apply() and not _in_forward():
            self._read_by_step.add(key)
            if key in self._copied:
                return value.clone()
        return value

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        variable, value = update
        self.updated[id(variable)] = variable
        if self.root._is_shared(value):
            value = value.clone()
        self.hold(variable, value)

    def hold(self, variable: keras.Variable, value: torch.Tensor) -> None:
        """Give this tensor to whoever reads the variable in this scope."""
        self.root.read.setdefault(id(variable), variable)
        if variable._value is None:
            self.root.made[id(variable)] = variable
        self.root._handled[id(value)] = value
        self.state_mapping[id(variable)] = value

    def own(self, value: Any) -> Any:
        """A tensor without autograd's graph, and no variable's memory."""
        if not isinstance(value, torch.Tensor):
            return value
        own = value.detach()
        return own.clone() if self._is_shared(value) else own

    def _is_shared(self, value: torch.Tensor) -> bool:
        """Whether it is memory of a variable, which may change."""
        base = value if value._base is None else value._base
        return id(base) in self._handled

    def note_reached(self, found: list[bool]) -> list[bool]:
        """What this `value_and_grad` reaches, in whichever branch.

        Args:
            found: what it reached in the branches that were run.
        """
        number, self._num_reached = self._num_reached, self._num_reached + 1
        if self._guarded:
            self.reached.append(found)
        return self.reached[number] if number < len(self.reached) else found

    def commit(self, *, detached: bool = False) -> None:
        """Move what was assigned into the scope around, or the variables.

        Args:
            detached: without autograd's graph.
        """
        for key, variable in self.updated.items():
            value = self.state_mapping[key]
            if detached:
                value = value.detach()
            if self.parent is not None:
                self.parent.updated[key] = variable
                self.parent.hold(variable, value)
            else:
                self._values_of(variable).copy_(value)

    def _values_of(self, variable: keras.Variable) -> torch.Tensor:
        value = self._values.get(id(variable))
        return variable._value.detach() if value is None else value

    def roll_back(self) -> dict[int, keras.Variable]:
        """Undo all changes in place, and drop what was assigned.

        Returns:
            The variables that were changed in one way or the other.
        """
        changed = dict(self.updated)
        for key in self.changed_in_place():
            tensor, _, copy = self._before[key]
            changed[key] = self.root.read[key]
            with torch.no_grad():
                tensor.copy_(copy)
        self._before.clear()
        return changed

    def changed_in_place(self) -> set[int]:
        """Ids of variables whose memory an optimizer changed."""
        return {
            key
            for key, (tensor, version, _) in self._before.items()
            if tensor._version != version
        }

    def to_be_copied(self) -> frozenset[int]:
        """What `copied` should be for this step; asked before `roll_back`."""
        return frozenset(self._read_by_step & self.changed_in_place())


def _in_forward() -> bool:
    """Whether what is read now goes into a forward pass."""
    scope: Any = keras_tracing.current_scope()
    while isinstance(scope, StepScope):
        if scope.collect_losses:
            return True
        scope = scope.parent
    return False
