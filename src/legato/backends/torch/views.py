"""A recorded step with fewer views and copies of its tensors.

Each takes as long as the arithmetic of a small tensor, and a third of what
Keras's layers do are views of views.
"""

from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""


class WithoutViews:
    """A recorded step, whose views of views become one view, or none.

    And what is copied although it was just made, is not.

    Where a tensor lies is known from the recording, which saw no real one. So
    the first run is that of the recording as it is, and looks whether it is
    true.

    Args:
        recorded: as `Recording.run` gives it.
    """

    def __init__(self, recorded: GraphModule) -> None:
        self._first: _Looking | None
        self._run, expected = _merged(recorded)
        self._first = _Looking(recorded, expected)

    def __call__(self, *given: Any) -> list[torch.Tensor]:
        """As the recording is called."""
        if self._first is None:
            return self._run(*given)
        first, self._first = self._first, None
        returned = first.run(*given)
        if not first.is_right:
            self._run = first.module
        return returned


class _Looking(Interpreter):
    """Runs a graph, and compares layouts.

    Args:
        module: the graph.
        expected: layouts by names of nodes.

    Attributes:
        is_right: whether all were as expected.
    """

    def __init__(
        self, module: GraphModule, expected: dict[str, Layout]
    ) -> None:
        super().__init__(module)
        self._expected = expected
        self.is_right = True

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        expected = self._expected.get(n.name)
        if expected is not None and _layout(result) != expected:
            self.is_right = False
        return result


def _merged(
    recorded: GraphModule,
) -> tuple[GraphModule, dict[str, Layout]]:
    """A copy with fewer views, and the layouts that it takes for granted."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    returned: Any = graph.graph_copy(recorded.graph, copies)
    graph.output(returned)
    originals = {copy: node.name for node, copy in copies.items()}
    expected: dict[str, Layout] = {}
    roots: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if not _is_view(node):
            continue
        (base,) = node.all_input_nodes
        root: Any = roots.get(base, base)
        value, held = node.meta["val"], root.meta.get("val")
        if not isinstance(held, torch.Tensor) or not _is_part(value, held):
            continue
        if _layout(value) == _layout(held):
            merged: Any = root
        elif root is base:
            roots[node] = root
            continue
        else:
            with graph.inserting_before(node):
                merged = graph.call_function(
                    torch.ops.aten.as_strided.default, (root, *_layout(value))
                )
            merged.meta = dict(node.meta)
            roots[merged] = root
        expected[originals[root]] = _layout(held)
        node.replace_all_uses_with(merged)
        graph.erase_node(node)
    _drop_copies_of_results(graph)
    graph.eliminate_dead_code()
    return GraphModule(recorded, graph), expected


def _drop_copies_of_results(graph: torch.fx.Graph) -> None:
    """Copies of what an operation made, and nobody else ever sees."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.clone.default or node.kwargs:
            continue
        (made,) = node.all_input_nodes
        if len(made.users) == 1 and _is_new(made):
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _is_new(node: Node) -> bool:
    """Whether it is the only result, in memory of its own, of an operation."""
    schema = getattr(node.target, "_schema", None)
    return (
        node.op == "call_function"
        and schema is not None
        and not schema.is_mutable
        and len(schema.returns) == 1
        and schema.returns[0].alias_info is None
        and isinstance(node.meta.get("val"), torch.Tensor)
        # `clone` may lay it out otherwise, and so may what follows.
        and node.meta["val"].is_contiguous()
    )


def _is_view(node: Node) -> bool:
    """Whether it shows the memory of its only tensor, and does nothing else."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.is_mutable:
        return False
    return (
        len(schema.returns) == 1
        and schema.returns[0].alias_info is not None
        and len(node.all_input_nodes) == 1
        and isinstance(node.meta.get("val"), torch.Tensor)
    )


def _is_part(value: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether strides alone lead from one to the other."""
    return (
        value.dtype == held.dtype
        and value.storage_offset() == held.storage_offset()
        and not (value.is_conj() or value.is_neg())
        and value.untyped_storage()._cdata == held.untyped_storage()._cdata
    )


def _layout(tensor: torch.Tensor) -> Layout:
    return tuple(tensor.shape), tensor.stride()
