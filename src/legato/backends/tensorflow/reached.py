"""Which variables a loss depends on differentiably.

TensorFlow gives zeros for what a loop (`tf.while_loop`, and so `ops.scan` and
the recurrent layers) uses without its reaching the loss; elsewhere it gives
None. Such a graph is walked backwards from the loss: what is not understood
counts as reached.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

_LOOPS = {"While", "StatelessWhile"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}

# Nothing flows back through these.
_ENDS = {
    "StopGradient", "Shape", "ShapeN", "Size", "Rank", "ArgMax", "ArgMin",
    "Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual",
    "LogicalAnd", "LogicalOr", "LogicalNot", "IsFinite", "IsInf", "IsNan",
    "ZerosLike", "OnesLike", "TensorListLength", "VariableShape",
}  # fmt: skip


def reached_handles(loss: Any, handles: Sequence[Any]) -> list[bool]:
    """Whether a loss depends on each variable.

    Args:
        loss: in the graph under construction.
        handles: of the variables; None stands for one that is not reached.
    """
    graph = tf.compat.v1.get_default_graph()
    found = [handle is not None for handle in handles]
    inner = _LOOPS | _BRANCHES | _CALLS
    if not any(op.type in inner for op in graph.get_operations()):
        return found
    definition = graph.as_graph_def()
    functions = {f.signature.name: f for f in definition.library.function}
    if not any(
        node.op in _LOOPS
        for body in (definition.node, *(f.node_def for f in functions.values()))
        for node in body
    ):
        return found
    names = Walk(functions).reached(
        {node.name: node for node in definition.node}, [loss.name]
    )
    return [
        # What the graph knows the handle by.
        handle is not None and graph.capture(handle).op.name in names
        for handle in handles
    ]


class Walk:
    """Goes from outputs of a graph back to what they depend on.

    Args:
        functions: definitions of the functions that nodes refer to.
    """

    def __init__(self, functions: dict[str, Any]) -> None:
        self._functions = functions
        self._nodes = {
            name: {node.name: node for node in function.node_def}
            for name, function in functions.items()
        }

    def reached(
        self, nodes: dict[str, Any], outputs: Iterable[str]
    ) -> set[str]:
        """Names of all nodes, and of arguments, behind the outputs.

        Args:
            nodes: of the graph or function, by name.
            outputs: their names, as nodes refer to them.
        """
        wanted: dict[str, set[int]] = {}
        queue = list(outputs)
        while queue:
            name, index = _parse(queue.pop())
            known = wanted.setdefault(name, set())
            if index in known:
                continue
            known.add(index)
            node = nodes.get(name)
            if node is not None:
                inputs = [i for i in node.input if not i.startswith("^")]
                queue += [inputs[i] for i in self._inputs(node, known, inputs)]
        return set(wanted)

    def _inputs(
        self, node: Any, outputs: set[int], inputs: list[str]
    ) -> Iterable[int]:
        """Which inputs of a node some of its outputs depend on."""
        attributes = node.attr
        if node.op in _ENDS:
            return ()
        if node.op == "Cast":
            types = attributes["SrcT"].type, attributes["DstT"].type
            is_smooth = all(map(_carries_gradient, types))
            return (0,) if is_smooth else ()
        if node.op in _LOOPS:
            return self._loop_inputs(attributes["body"].func.name, outputs)
        if node.op in _CALLS:
            return self._arguments(attributes["f"].func.name, outputs)
        if node.op in _BRANCHES:
            branches = [
                *(attributes[name].func for name in _branch_names(node)),
                *attributes["branches"].list.func,
            ]
            # The first input decides between them.
            return {
                i + 1
                for b in branches
                for i in self._arguments(b.name, outputs)
            }
        return range(len(inputs))

    def _loop_inputs(self, body: str, outputs: set[int]) -> set[int]:
        """What one iteration uses is wanted of the one before."""
        wanted = set(outputs)
        while not wanted >= (used := self._arguments(body, wanted)):
            wanted |= used
        return wanted

    def _arguments(self, name: str, outputs: set[int]) -> set[int]:
        """Which arguments of a function some of its outputs depend on."""
        function = self._functions[name]
        results = [function.ret[a.name] for a in function.signature.output_arg]
        names = self.reached(self._nodes[name], [results[i] for i in outputs])
        arguments = enumerate(function.signature.input_arg)
        return {i for i, argument in arguments if argument.name in names}


def _branch_names(node: Any) -> list[str]:
    return [n for n in ("then_branch", "else_branch") if n in node.attr]


def _parse(reference: str) -> tuple[str, int]:
    """`"node"`, `"node:1"` or, in a function, `"node:output:1"`.

    The index is that of all outputs for the nodes where it counts: they have
    one list of outputs.
    """
    name, *rest = reference.split(":")
    return name, int(rest[-1]) if rest else 0


def _carries_gradient(number: int) -> bool:
    dtype = tf.as_dtype(number)
    return dtype.is_floating or dtype.is_complex
