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
        values: memory of the variables, by id; filled as they are read.
        copied: ids of variables that a step both reads by itself and lets an
            optimizer change: what it reads is a copy.
        in_forward: whether it is that of a forward pass.
        reached: what the loss of each `value_and_grad` depends on, if that is
            known.

    Attributes:
        root: the outermost scope of the step.
        in_forward: whether it is in a forward pass.
        reached: as given.
        made: variables that did not have a value yet.
        leaves: for each forward pass that it is in, by ids of variables: the
            tensors to differentiate by. An assignment begins another one.
    """

    parent: "StepScope | None"

    def __init__(
        self,
        *,
        parent: "StepScope | None" = None,
        losses: bool = False,
        values: dict[int, torch.Tensor] | None = None,
        copied: frozenset[int] = frozenset(),
        in_forward: bool = False,
        reached: Reached | None = None,
    ) -> None:
        super().__init__(parent=parent, losses=losses)
        self.root: StepScope = self if parent is None else parent.root
        self.in_forward: bool = in_forward or (
            parent is not None and parent.in_forward
        )
        self.reached: Reached = {} if reached is None else reached
        self.made: dict[int, keras.Variable] = {}
        self.leaves: tuple[dict[int, list[torch.Tensor]], ...] = (
            () if parent is None else parent.leaves
        )
        self._values = {} if values is None else values
        self._copied = copied
        # Where in the step's conditionals it is, and what was met there.
        self._branch: tuple[Any, ...] = ()
        self._met: collections.Counter[Any] = collections.Counter()
        # Memory that was handed out or is held; kept alive until the end, so
        # that no other can have its address.
        self._handled: dict[int, torch.Tensor] = {}

    # -- reading ------------------------------------------------------------

    def get_current_value(self, variable: keras.Variable) -> torch.Tensor:
        value = self.state_mapping.get(id(variable))
        if value is None and self.parent is not None:
            value = self.parent.get_current_value(variable)
        elif value is None:
            value = self._read(variable)
            scope: Any = keras_tracing.current_scope()
            if not (
                keras_tracing.in_apply() or getattr(scope, "in_forward", False)
            ):
                return self.read_by_step(variable, value)
        return value

    def _read(self, variable: keras.Variable) -> torch.Tensor:
        """The memory of a variable, for the outermost scope."""
        key = id(variable)
        value = self._values.get(key)
        if value is not None and key in self.read:
            return value  # read before, and known
        self.read[key] = variable
        if value is None:
            if variable._value is None:
                self.made[key] = variable
            # Detached: what autograd follows is `value_and_grad`'s to say.
            value = initial_value(variable).detach()
            self._values[key] = value
        self.root._handled[_memory(value)] = value
        return value

    def read_by_step(
        self, variable: keras.Variable, value: torch.Tensor
    ) -> torch.Tensor:
        """What the step itself gets: not a forward pass, not an optimizer."""
        return value.clone() if id(variable) in self._copied else value

    # -- assigning ----------------------------------------------------------

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        variable, value = update
        self.updated[id(variable)] = variable
        # Optimizers change values in place, also ones that were assigned.
        if not keras_tracing.in_apply() or self.root._is_shared(value):
            value = value.clone()
        self.hold(variable, self._cut(variable, value))

    def _cut(
        self, variable: keras.Variable, value: torch.Tensor
    ) -> torch.Tensor:
        """What is assigned in a forward pass: no gradient flows through it."""
        if not self.in_forward:
            return value
        value = value.detach()
        # (The user may have assigned it under `torch.no_grad`.)
        with torch.enable_grad():
            for leaves in self.leaves:
                if id(variable) in leaves:
                    value = leaf_of(value)
                    leaves[id(variable)].append(value)
        return value

    def hold(self, variable: keras.Variable, value: torch.Tensor) -> None:
        """Give this tensor to whoever reads the variable in this scope."""
        root = self.root
        root.read.setdefault(id(variable), variable)
        if variable._value is None:
            root.made[id(variable)] = variable
        root._handled[_memory(value)] = value
        self.state_mapping[id(variable)] = value

    def own(self, value: Any) -> Any:
        """A tensor without autograd's graph, and no variable's memory."""
        if not isinstance(value, torch.Tensor):
            return value
        own: Any = value.detach()
        own = own.clone() if self._is_shared(value) else own
        mask = getattr(value, "_keras_mask", None)
        if mask is not None:
            own._keras_mask = mask  # metrics look for it
        return own

    def _is_shared(self, value: torch.Tensor) -> bool:
        """Whether it is memory of a variable, which may change."""
        return _memory(value) in self._handled

    def commit(self, *, detached: bool = False) -> None:
        """Move what was assigned into the scope around, or the variables.

        No two of the values share memory, so that their order is free.

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
                self._read(variable).copy_(value)

    # -- places in the step -------------------------------------------------

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
        return self.reached.get(self.meet("value_and_grad"), found)


class ExaminingScope(StepScope):
    """For a first run, which finds out what a step does and is undone.

    What is read is copied to the host, for `roll_back`: a device may not have
    room for all of it twice.

    Attributes:
        changed_elsewhere: variables changed in branches not taken.
    """

    def __init__(
        self, *, parent: StepScope | None = None, losses: bool = False
    ) -> None:
        super().__init__(parent=parent, losses=losses)
        self.changed_elsewhere: dict[int, keras.Variable] = {}
        # (tensor, its version, its value), by the variable's id.
        self._before: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        # (variable, copy of it, its version): what the step itself read.
        self._given: list[tuple[keras.Variable, torch.Tensor, int]] = []

    def get_current_value(self, variable: keras.Variable) -> torch.Tensor:
        value = super().get_current_value(variable)
        self._guard(variable, value)
        return value

    def _guard(self, variable: keras.Variable, value: torch.Tensor) -> None:
        if id(variable) not in self._before:
            copy = value.detach().to("cpu", copy=True)
            self._before[id(variable)] = value, value._version, copy

    def read_by_step(
        self, variable: keras.Variable, value: torch.Tensor
    ) -> torch.Tensor:
        self._guard(variable, value)
        copy = value.clone()
        self._given.append((variable, copy, copy._version))
        return copy

    def note_reached(self, found: list[bool]) -> list[bool]:
        self.reached[self.meet("value_and_grad")] = found
        return found

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

    def to_be_copied(self) -> frozenset[int]:
        """What `copied` should be for this step; asked before `roll_back`."""
        read = {id(variable) for variable, _, _ in self._given}
        return frozenset(read & self._changed_in_place())

    def roll_back(self) -> dict[int, keras.Variable]:
        """Undo all changes in place, and drop what was assigned.

        Returns:
            The variables that were changed in one way or the other.
        """
        changed = self.updated | self.changed_elsewhere
        for key in self._changed_in_place():
            tensor, _, copy = self._before[key]
            changed[key] = self.root.read[key]
            with torch.no_grad():
                tensor.copy_(copy)
        self._before.clear()
        return changed

    def _changed_in_place(self) -> set[int]:
        return {
            key
            for key, (tensor, version, _) in self._before.items()
            if tensor._version != version
        }


class IsolatedScope(StepScope):
    """For one of several branches that are all run: it reads copies."""

    parent: StepScope

    def __init__(self, parent: StepScope) -> None:
        super().__init__(parent=parent, losses=parent.collect_losses)
        # (variable, copy of it, its version), by the variable's id.
        self._copies: dict[int, tuple[Any, torch.Tensor, int]] = {}

    def get_current_value(self, variable: keras.Variable) -> torch.Tensor:
        if id(variable) not in self.state_mapping:
            copy = self.parent.get_current_value(variable).clone()
            self._copies[id(variable)] = variable, copy, copy._version
            self.hold(variable, copy)
        return self.state_mapping[id(variable)]

    def changed(self) -> dict[int, keras.Variable]:
        """The variables that were assigned or changed in place in it."""
        in_place = {
            key: variable
            for key, (variable, copy, version) in self._copies.items()
            if copy._version != version
        }
        return self.updated | in_place


def leaf_of(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the same memory to differentiate by.

    Of whole numbers, which there are no gradients of, the tensor itself.
    """
    if not (value.is_floating_point() or value.is_complex()):
        return value
    if value.requires_grad:
        # Of a `value_and_grad` around this one, which goes on through it.
        return value.view_as(value)
    return value.detach().requires_grad_()


def _memory(value: torch.Tensor) -> int:
    """The address of the memory behind a tensor, whatever view of it."""
    return value.untyped_storage()._cdata
