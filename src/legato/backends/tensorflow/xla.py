"""Steps that XLA compiles: which gain by it, and in what form.

TensorFlow runs a graph operation by operation, and each costs some 0.3 us
whatever it computes; XLA makes one program of a loop of steps. Measured on two
CPUs with TensorFlow 2.21: a small MLP with dropout and metrics gains a factor
of 4.5, one of 20 layers 2.7, GRUs and embeddings 2, a small transformer 1.6, a
tiny one 5.6, an LSTM 1.4; where the time goes into products of matrices (layers
of 1,024 units and batches of 256, a transformer of width 256) nothing.
Convolutions in a loop lose a factor of 16 (as on JAX: jax#12868), batch
statistics of images 1.2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from legato.backends.tensorflow import philox

# What steps that gained consist of, and what is like it. Anything else may be
# one of the many that XLA computes slowly on a CPU.
_QUICK = {
    # Arithmetic, element by element.
    "Abs", "Acos", "Acosh", "AddN", "AddV2", "Asin", "Asinh", "Atan", "Atan2",
    "Atanh", "Ceil", "ClipByValue", "Cos", "Cosh", "Div", "DivNoNan", "Elu",
    "EluGrad", "Erf", "Erfc", "Exp", "Expm1", "Floor", "FloorDiv", "FloorMod",
    "Inv", "InvGrad", "LeakyRelu", "LeakyReluGrad", "Log", "Log1p", "Maximum",
    "Minimum", "Mod", "Mul", "MulNoNan", "Neg", "Pow", "RealDiv", "Reciprocal",
    "ReciprocalGrad", "Relu", "Relu6", "Relu6Grad", "ReluGrad", "Rint",
    "Round", "Rsqrt", "RsqrtGrad", "Selu", "SeluGrad", "Sigmoid",
    "SigmoidGrad", "Sign", "Sin", "Sinh", "Softplus", "SoftplusGrad",
    "Softsign", "SoftsignGrad", "Sqrt", "SqrtGrad", "Square",
    "SquaredDifference", "Sub", "Tan", "Tanh", "TanhGrad", "TruncateDiv",
    "Xdivy", "Xlog1py", "Xlogy",
    # Comparisons and bits.
    "ApproximateEqual", "Bitcast", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
    "Cast", "Equal", "Greater", "GreaterEqual", "Invert", "IsFinite", "IsInf",
    "IsNan", "LeftShift", "Less", "LessEqual", "LogicalAnd", "LogicalNot",
    "LogicalOr", "NotEqual", "RightShift", "Select", "SelectV2",
    # Sums and products.
    "All", "Any", "ArgMax", "ArgMin", "BatchMatMulV2", "BiasAdd",
    "BiasAddGrad", "Cumsum", "Einsum", "EuclideanNorm", "L2Loss", "LogSoftmax",
    "MatMul", "Max", "Mean", "Min", "Prod", "Softmax",
    "SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits",
    "Sum",
    # Shapes.
    "BroadcastArgs", "BroadcastGradientArgs", "BroadcastTo", "ConcatOffset",
    "ConcatV2", "Const", "ExpandDims", "Fill", "Identity", "IdentityN",
    "InvertPermutation", "OnesLike", "Pack", "Pad", "PadV2", "Placeholder",
    "PreventGradient", "Range", "Rank", "Reshape", "ReverseV2", "Shape",
    "ShapeN", "Size", "Slice", "Split", "SplitV", "Squeeze", "StopGradient",
    "StridedSlice", "StridedSliceGrad", "Tile", "Transpose", "Unpack",
    "ZerosLike",
    # Indices.
    "GatherNd", "GatherV2", "InTopKV2", "OneHot", "ResourceGather",
    "UnsortedSegmentSum",
    # Variables.
    "AssignAddVariableOp", "AssignSubVariableOp", "AssignVariableOp",
    "ReadVariableOp", "VariableShape",
    # Control flow, with the lists in which loops keep what gradients need.
    "EmptyTensorList", "If", "NoOp", "PartitionedCall",
    "StatefulPartitionedCall", "StatelessIf", "StatelessWhile",
    "TensorListElementShape", "TensorListFromTensor", "TensorListGetItem",
    "TensorListLength", "TensorListPopBack", "TensorListPushBack",
    "TensorListReserve", "TensorListSetItem", "TensorListStack", "While",
    # The keys of random numbers.
    "StatelessRandomGetKeyCounter",
}  # fmt: skip


class NotCompilableError(Exception):
    """XLA cannot compile a step; the message tells why."""


def gains(traced: Any) -> bool:
    """Whether a step is one that XLA is known to make quicker.

    It depends on the step's operations and the kind of device alone.

    Args:
        traced: the step, a `ConcreteFunction`.
    """
    if tf.config.list_logical_devices("GPU"):
        return False  # not measured
    graph = traced.graph
    known = {op.name for op in graph.get_operations() if philox.can_draw(op)}
    definition = graph.as_graph_def()
    nodes = [node for node in definition.node if node.name not in known]
    for function in definition.library.function:
        nodes += function.node_def
    return all(node.op in _QUICK and not _is_half(node) for node in nodes)


def _is_half(node: Any) -> bool:
    """Whether a node computes in half precision: ten times as slow."""
    return any(
        tf.as_dtype(value.type) in (tf.float16, tf.bfloat16)
        for value in node.attr.values()
        if value.type
    )


def quick_step(traced: Any) -> Callable[..., Any]:
    """A step in the form that XLA compiles well, to be called in a graph.

    Args:
        traced: the step, a `ConcreteFunction` that returns one tensor.
    """
    on_cpu = not tf.config.list_logical_devices("GPU")
    operations = traced.graph.get_operations()
    if not on_cpu or not any(map(philox.can_draw, operations)):
        return traced
    definition = traced.graph.as_graph_def()
    functions = philox.replace_draws(traced.graph, definition)
    inputs = [tensor.op.name for tensor in traced.inputs]
    nodes = [node for node in definition.node if node.name not in inputs]
    used = {name for node in nodes for name in node.input}
    (output,) = traced.outputs
    del definition.node[:]
    definition.node.extend(nodes)

    def step(*arguments: Any) -> Any:
        graph: Any = tf.compat.v1.get_default_graph()
        for function in functions:
            function.add_to_graph(graph)
        given = zip(inputs, [*arguments, *traced.captured_inputs], strict=True)
        (row,) = tf.graph_util.import_graph_def(
            definition,
            input_map={
                name: graph.capture(tensor)
                for name, tensor in given
                if name in used
            },
            return_elements=[output.name],
        )
        return row

    return step


def compile_function(
    function: Callable[..., Any], specs: Sequence[tf.TensorSpec]
) -> Any:
    """A function that XLA compiles when it is first called.

    Args:
        function: what it computes.
        specs: of its arguments.

    Raises:
        NotCompilableError: XLA will not do it.
    """
    compiled: Any = tf.function(function, autograph=False, jit_compile=True)
    try:
        # Not yet to machine code, which takes ten times as long; but errors
        # show here, and nothing has to be undone.
        compiled.experimental_get_compiler_ir(*specs)(stage="hlo")
    except (tf.errors.OpError, TypeError, ValueError) as error:
        raise NotCompilableError(_reason(error)) from error
    return compiled.get_concrete_function(*specs)


def _reason(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    return " ".join(message.split())[:200]
