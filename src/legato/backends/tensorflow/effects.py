"""What a traced step reads, writes, and must not do."""

import dataclasses
import gc
from collections.abc import Collection, Iterable, Iterator, Set
from typing import Any

import keras
import tensorflow as tf

from legato.errors import StepError

_READS = {
    "ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape",
    "VarIsInitializedOp",
}  # fmt: skip

# They draw from generators inside of TensorFlow's kernels, or in a
# tf.random.Generator: no checkpoint could hold these.
_STATEFUL_RANDOM = {
    "RandomStandardNormal", "RandomUniform", "RandomUniformInt",
    "TruncatedNormal", "ParameterizedTruncatedNormal", "RandomShuffle",
    "Multinomial", "RandomGamma", "RandomPoisson", "RandomPoissonV2",
    "StatefulRandomBinomial", "StatefulUniform", "StatefulUniformInt",
    "StatefulUniformFullInt", "StatefulStandardNormal",
    "StatefulStandardNormalV2", "StatefulTruncatedNormal", "RngSkip",
    "RngReadAndSkip", "NonDeterministicInts", "RandomCrop",
    "SampleDistortedBoundingBox", "SampleDistortedBoundingBoxV2",
    "UniformCandidateSampler", "LogUniformCandidateSampler",
    "LearnedUnigramCandidateSampler", "ThreadUnsafeUnigramCandidateSampler",
    "FixedUnigramCandidateSampler", "AllCandidateSampler",
}  # fmt: skip

_PYTHON = {"PyFunc", "EagerPyFunc", "PyFuncStateless"}

# The state behind these is not a variable's.
_OTHER_STATE = {
    "IteratorGetNext", "IteratorGetNextSync", "IteratorGetNextAsOptional",
    "LookupTableInsertV2", "LookupTableRemoveV2", "LookupTableImportV2",
    "QueueDequeueV2", "QueueDequeueManyV2", "QueueDequeueUpToV2",
    "QueueEnqueueV2", "QueueEnqueueManyV2",
}  # fmt: skip


@dataclasses.dataclass
class Effects:
    """The variables of a traced step.

    Attributes:
        updated: those that it writes, or that may be written.
        read_only: the others.
        runs_python: whether it calls back into Python.
    """

    updated: list[keras.Variable]
    read_only: list[keras.Variable]
    runs_python: bool


def find_effects(
    traced: Any,
    used: Collection[keras.Variable],
    assigned: Collection[keras.Variable],
) -> Effects:
    """Look through a step's graph.

    Args:
        traced: the step, a `ConcreteFunction`.
        used: the variables that are known to be used.
        assigned: those of them that are known to be written.

    Raises:
        StepError: it keeps state that is not in Keras variables.
    """
    nodes = list(_nodes(traced.graph))
    _refuse_hidden_state(nodes)
    written = {
        id(handle): _is_written(inside)
        for handle, inside in traced.graph.captures
        if handle.dtype == tf.resource
    }
    variables = {id(v): v for v in used}
    unknown = written.keys() - {id(v._value.handle) for v in used}
    if unknown:
        # Used without passing through the scope (as `layer.kernel._value`).
        variables |= {id(v): v for v in _keras_variables(unknown)}
        known = {id(v._value.handle) for v in variables.values()}
        _refuse_foreign(
            [
                v.name
                for v in traced.variables
                if id(v.handle) not in known and written.get(id(v.handle))
            ]
        )
    is_assigned = {id(v) for v in assigned}
    effects = Effects([], [], any(node.op in _PYTHON for node in nodes))
    for key, variable in variables.items():
        handle = id(variable._value.handle)
        updated = key in is_assigned or written.get(handle, False)
        (effects.updated if updated else effects.read_only).append(variable)
    return effects


def _is_written(handle: Any) -> bool:
    """Whether anything but a read uses a variable's handle."""
    for op in handle.consumers():
        if op.type in _READS:
            continue
        try:
            # Control flow and calls say so of the functions inside.
            read_only = op.get_attr("_read_only_resource_inputs")
        except ValueError:
            return True
        if any(
            each is handle and index not in read_only
            for index, each in enumerate(op.inputs)
        ):
            return True
    return False


def _keras_variables(handles: Set[int]) -> list[keras.Variable]:
    """The Keras variables with these handles; slow, and seldom needed."""
    found = [
        each
        for each in gc.get_objects()
        # Not `isinstance`, which runs code of lazy objects.
        if issubclass(type(each), keras.Variable)
        and getattr(each, "_value", None) is not None
        and id(each._value.handle) in handles
    ]
    # The collector's order is not the same in every process.
    return sorted(found, key=lambda v: v.path)


def _refuse_foreign(names: list[str]) -> None:
    if names:
        raise StepError(
            f"The step writes to {', '.join(names[:3])}, which is a "
            "tf.Variable and no keras.Variable: its value would not be part "
            "of the run's state. Make it a keras.Variable (in the place of a "
            "tf.random.Generator, a keras.random.SeedGenerator)."
        )


def _nodes(graph: Any) -> Iterator[Any]:
    """All operations, those of functions that are called too."""
    definition = graph.as_graph_def()
    yield from definition.node
    for function in definition.library.function:
        yield from function.node_def


def _refuse_hidden_state(nodes: Iterable[Any]) -> None:
    for node in nodes:
        if node.op in _STATEFUL_RANDOM:
            raise StepError(
                f"The step draws random numbers with {node.op} "
                f"({node.name}), whose generator is TensorFlow's own: it "
                "would not be part of the run's state. Use keras.random "
                "with a keras.random.SeedGenerator(seed) that is an "
                "attribute of the Task or of a layer."
            )
        if node.op in _OTHER_STATE:
            raise StepError(
                f"The step calls {node.op} ({node.name}), which changes "
                "something that is no variable: it would not be part of "
                "the run's state. Keep state in keras.Variables, and let "
                "data come in by build_inputs."
            )
