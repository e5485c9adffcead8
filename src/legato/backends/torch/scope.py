"""Where the values of variables live while a step runs on PyTorch."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import torch

from legato.backends.scope import RecordingScope, initial_value
from legato.compat import keras_tracing
from legato.errors import StepError

Reached = dict[tuple[Any, ...], list[bool]]
"""Which variables the loss reaches, for each place of a `value_and_grad`.

A conditional runs one branch, and autograd gives None for what only the other
one uses. A compiled step serves both, so that the other backends give zeros:
what is reached is found when both branches run, and looked up from then on.
"""


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
        in_forward: whether it is that of a forward pass.
        reached: what the loss of each `value_and_grad` depends on, as a
            guarded scope found it.

    Attributes:
        root: the outermost scope of the step.
        in_forward: whether it is in a forward pass.
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
        in_forward: bool = False,
        reached: Reached | None = None,
    ) -> None:
        super().__init__(parent=parent, losses=losses)
        self.root: StepScope = self if parent is None else parent.root
        self.in_forward: bool = in_forward or (
            parent is not None and parent.in_forward
        )
        self._values = {} if values is None else values
        self._copied = copied
        self._guarded = guarded
        self._isolated = isolated
        # (variable, copy of it, its version), by the variable's id.
        self._isolates: dict[int, tuple[Any, torch.Tensor, int]] = {}
        self.reached: Reached = {} if reached is None else reached
        # Where in the step's conditionals it is, and what was met there.
        self._branch: tuple[Any, ...] = ()
        self._met: collections.Counter[Any] = collections.Counter()
        self.made: dict[int, keras.Variable] = {}
        self.changed_elsewhere: dict[int, keras.Variable] = {}
        # (tensor, its version, its value), by the variable's id.
        self._before: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._read_by_step: set[int] = set()
        # (variable, copy of it, its version): what the step itself was given.
        self._given: list[tuple[keras.Variable, torch.Tensor, int]] = []
        # Memory that was handed out or is held; kept alive until the end, so
        # that no other can have its address.
        self._handled: dict[int, torch.Tensor] = {}

    def get_current_value(self, variable: keras.Variable) -> torch.Tensor:
        key = id(variable)
        value = self.state_mapping.get(key)
        is_live = value is None and self.parent is None
        if value is None:
            if self.parent is not None:
                value = self.parent.get_current_value(variable)
            else:
                value = self._read(variable)
            if self._isolated:
                value = value.clone()
                self._isolates[key] = variable, value, value._version
                self.hold(variable, value)
        if self._guarded and key not in self._before:
            # On the host: a device may not have room for all of it twice.
            copy = value.detach().to("cpu", copy=True)
            self._before[key] = value, value._version, copy
        return self._for_the_step(variable, value) if is_live else value

    def _read(self, variable: keras.Variable) -> torch.Tensor:
        """The memory of a variable, for the outermost scope."""
        key = id(variable)
        self.read[key] = variable
        value = self._values.get(key)
        if value is None:
            if variable._value is None:
                self.made[key] = variable
            # Detached: what autograd follows is `value_and_grad`'s to say.
            value = initial_value(variable).detach()
            self._values[key] = value
        self._note_memory(value)
        return value

    def _for_the_step(
        self, variable: keras.Variable, value: torch.Tensor
    ) -> torch.Tensor:
        """A copy, where an optimizer will change what the step itself read."""
        scope: Any = keras_tracing.current_scope()
        if keras_tracing.in_apply() or getattr(scope, "in_forward", False):
            return value
        self._read_by_step.add(id(variable))
        if self._guarded:
            value = value.clone()
            self._given.append((variable, value, value._version))
        elif id(variable) in self._copied:
            value = value.clone()
        return value

    def _note_memory(self, value: torch.Tensor) -> None:
        self.root._handled[_memory(value)] = value

    def check_given(self) -> None:
        """Check that the step did not change what it read in place.

        Raises:
            StepError: it did, and the change would be lost.
        """
        for variable, copy, version in self._given:
            if copy._version != version:
                raise StepError(
                    f"The step changed the tensor of {variable.path!r} in "
                    "place. Assign to the variable instead: "
                    "variable.assign(keras.ops.clip(variable, -1, 1)), for "
                    "example."
                )

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        variable, value = update
        self.updated[id(variable)] = variable
        # Optimizers change values in place, also ones that were assigned.
        if not keras_tracing.in_apply() or self.root._is_shared(value):
            value = value.clone()
        self.hold(variable, value)

    def hold(self, variable: keras.Variable, value: torch.Tensor) -> None:
        """Give this tensor to whoever reads the variable in this scope."""
        self.root.read.setdefault(id(variable), variable)
        if variable._value is None:
            self.root.made[id(variable)] = variable
        self._note_memory(value)
        self.state_mapping[id(variable)] = value

    def own(self, value: Any) -> Any:
        """A tensor without autograd's graph, and no variable's memory."""
        if not isinstance(value, torch.Tensor):
            return value
        own = value.detach()
        return own.clone() if self._is_shared(value) else own

    def _is_shared(self, value: torch.Tensor) -> bool:
        """Whether it is memory of a variable, which may change."""
        return _memory(value) in self._handled

    def meet(self, what: str) -> tuple[Any, ...]:
        """A name for this place in the step, the same in every run.

        Args:
            what: is met there.
        """
        place = (*self._branch, what)
        self._met[place] += 1
        return (*place, self._met[place])

    @contextlib.contextmanager
    def branch(self, place: tuple[Any, ...], taken: bool) -> Iterator[None]:
        """While a branch of the conditional at a place is run."""
        before, self._branch = self._branch, (*place, taken)
        try:
            yield
        finally:
            self._branch = before

    def note_reached(self, found: list[bool]) -> list[bool]:
        """What this `value_and_grad` reaches, in whichever branch.

        Args:
            found: what it reached in the branches that were run.
        """
        place = self.meet("value_and_grad")
        if self._guarded:
            self.reached[place] = found
        return self.reached.get(place, found)

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

    def changed(self) -> dict[int, keras.Variable]:
        """The variables that were changed in this isolated scope."""
        in_place = {
            key: variable
            for key, (variable, copy, version) in self._isolates.items()
            if copy._version != version
        }
        return self.updated | in_place

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


def _memory(value: torch.Tensor) -> int:
    """The address of the memory behind a tensor, whatever view of it."""
    return value.untyped_storage()._cdata
