"""A step recorded as a graph of operations, without what is not due.

`keras.ops.cond` runs one branch. A recording holds both, so a condition that
is known before the step runs, for it depends on the step's index alone, is
decided then: what only the branch not taken does is cut out.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
)

from legato.backends.scope import split_outputs
from legato.backends.torch.conditional import Branch, merging_cond
from legato.backends.torch.layers import layers_of_step
from legato.backends.torch.step import ExaminedStep, Values, to_row
from legato.compat import keras_tracing


class Recording:
    """What a step did to tensors.

    Args:
        step: the step.
        variables: all that it uses.
        values: memory of these, by id.
        resident: see `Fetch`.
        operands: of one batch.
        at: the index of a step, an int32 scalar.

    Attributes:
        at: as given.
        selects: whether conditionals depend on more than the step's index:
            both of their branches run.

    Raises:
        Exception: it cannot be recorded: Python needs the value of a tensor.
    """

    def __init__(
        self,
        step: ExaminedStep,
        variables: Sequence[keras.Variable],
        values: Values,
        resident: Any,
        operands: Any,
        at: torch.Tensor,
    ) -> None:
        conditionals: list[_Conditional] = []

        def cond(pred: Any, true_fn: Branch, false_fn: Branch) -> Any:
            conditional = _Conditional()
            conditionals.append(conditional)
            return merging_cond(pred, true_fn, false_fn, note=conditional.note)

        def run(
            values: list[torch.Tensor], resident: Any, operands: Any, at: Any
        ) -> list[torch.Tensor]:
            given = dict(zip(map(id, variables), values, strict=True))
            scope = step.new_scope(given)
            with scope:
                logs, outputs = split_outputs(
                    step.run(step.fetch(resident, operands, 0), at)
                )
                row = to_row(logs)
            scope.commit()
            if len(given) > len(variables):
                raise NotImplementedError("it uses other variables each time")
            return [row, *(outputs or ())]

        # Runs as Python, on tensors without values.
        trace = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
        with keras_tracing.traced_step(cond), layers_of_step():
            self._module = trace(
                [values[id(v)] for v in variables], resident, operands, at
            )
        self._conditionals, self._decide = self._make_decide(conditionals, at)
        self.selects = len(self._conditionals) < len(conditionals)
        self.at = at
        self._runs: dict[tuple[bool, ...], GraphModule] = {}

    @property
    def graph(self) -> Graph:
        """All operations, both branches of conditionals among them."""
        return self._module.graph

    def decisions(self, at: torch.Tensor) -> list[tuple[bool, ...]]:
        """How each step's conditionals go.

        Args:
            at: the index of each step, int32 `[steps]`.
        """
        if self._decide is None:
            return [()] * len(at)
        columns = [column.tolist() for column in self._decide(at)]
        return list(zip(*columns, strict=True))

    def run(self, decided: tuple[bool, ...]) -> GraphModule:
        """The operations of a step whose conditionals go like this.

        Args:
            decided: as in `decisions`; `()` leaves all undecided.

        Returns:
            Takes the values of the variables and the leaves of `resident` and
            `operands`, and `at`; returns the logs, float32 `[names]`, and
            the step's outputs.
        """
        if decided not in self._runs:
            self._runs[decided] = self._cut(decided)
        return self._runs[decided]

    def _make_decide(
        self, conditionals: list["_Conditional"], at: torch.Tensor
    ) -> tuple[list["_Conditional"], GraphModule | None]:
        """Those that can be decided, and what decides them, of many steps."""
        found, decide = [], None
        for conditional in conditionals:
            with contextlib.suppress(Exception):  # it depends on more
                decide = self._deciding([*found, conditional], at)
                found.append(conditional)
        return found, decide

    def _deciding(
        self, conditionals: list["_Conditional"], at: torch.Tensor
    ) -> GraphModule:
        nodes = list(self._module.graph.nodes)
        given = [n for n in nodes if n.op == "placeholder"][-1]
        wanted = {given}
        for conditional in conditionals:
            wanted |= _ancestors(conditional.pred)
        graph, copies = Graph(), {}
        for node in nodes:
            if node not in wanted:
                continue
            if node is not given and node.op in ("placeholder", "get_attr"):
                raise NotImplementedError("a condition depends on more")
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output([copies[c.pred] for c in conditionals])
        decide = GraphModule({}, graph)
        # Elementwise they are, or else they cannot be asked at once.
        steps = torch.arange(3, dtype=at.dtype, device=at.device)
        for column in decide(steps):
            if column.shape != steps.shape:
                raise NotImplementedError("a condition is no scalar")
        return decide

    def _cut(self, decided: tuple[bool, ...]) -> GraphModule:
        graph, copies = Graph(), {}
        outputs: Any = self._module.graph.output_node().args[0]
        graph.graph_copy(self._module.graph, copies)
        graph.output([copies[output] for output in outputs])
        # (Those that are not decided stay, and select.)
        for conditional, taken in zip(
            self._conditionals, decided, strict=bool(decided)
        ):
            for node in conditional.select:
                # (One in a branch that is not taken is gone already.)
                copy = copies.get(node)
                if copy and node.target is torch.ops.aten.where.self:
                    copy.replace_all_uses_with(copy.args[1 if taken else 2])
            unused = conditional.false if taken else conditional.true
            for node in reversed([*unused, *conditional.select]):
                # (In-place operations too, which nothing else removes.)
                if node in copies and not copies[node].users:
                    graph.erase_node(copies[node])
                    del copies[node]
        _erase_copies_to_themselves(graph)
        graph.eliminate_dead_code()
        return GraphModule(self._module, graph)


@dataclasses.dataclass
class _Conditional:
    """The nodes of a conditional in the graph that is being recorded.

    Attributes:
        true: those of the branch.
        false: those of the other.
        select: which choose between what the two made.
    """

    true: list[Node] = dataclasses.field(default_factory=list)
    false: list[Node] = dataclasses.field(default_factory=list)
    select: list[Node] = dataclasses.field(default_factory=list)
    _pred: Node | None = None
    _begin: int = 0
    _part: str = ""

    @property
    def pred(self) -> Node:
        assert self._pred is not None
        return self._pred

    def note(self, pred: Any, part: str) -> None:
        """See `merging_cond`."""
        mode = get_proxy_mode()
        assert mode is not None
        slot: Any = get_proxy_slot(pred, mode.tracer)
        self._pred = slot.proxy.node
        nodes = list(mode.tracer.graph.nodes)
        if self._part:
            getattr(self, self._part).extend(nodes[self._begin :])
        self._begin, self._part = len(nodes), part


def memory_of(node: Node) -> int | None:
    """Which memory its value lies in, whatever view it is; None: not known."""
    value = node.meta.get("val")
    known = isinstance(value, torch.Tensor)
    return value.untyped_storage()._cdata if known else None


def _erase_copies_to_themselves(graph: Graph) -> None:
    """What a variable holds that is not updated after all."""
    changing = [n for n in graph.nodes if _changes_something(n)]
    for node in changing:
        if node.target is not torch.ops.aten.copy_.default or node.users:
            continue
        into, value = node.all_input_nodes[0], node.all_input_nodes[-1]
        passed = {memory_of(into)}
        while _is_copy(value):
            passed.add(memory_of(value))
            value = value.all_input_nodes[0]
        if value is not into or None in passed:
            continue
        # An optimizer may have changed one of the copies, or what is copied.
        touched = {
            memory_of(each)
            for other in changing
            if other is not node
            for each in other.all_input_nodes
        }
        if not passed & touched:
            graph.erase_node(node)


def _is_copy(node: Node) -> bool:
    # (By name: `own` is known to those who compile alone.)
    return str(node.target) in (
        "aten.clone.default", "aten.detach.default", "legato.own.default",
    )  # fmt: skip


def _changes_something(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _ancestors(node: Node) -> set[Node]:
    """All that a node is made from, and itself."""
    found, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
