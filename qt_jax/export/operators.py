"""What an exported graph may hold, and what to change in the model where it holds something else."""

from collections import Counter

import onnx

from qt_jax.errors import InvalidInput

ACTIVATIONS = frozenset(
    {"Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu"}
    | {"Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"}
)
UNARY = ACTIVATIONS | frozenset(
    {"Abs", "Cast", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "Log", "Neg", "Not", "Reciprocal"}
    | {"Round", "Sign", "Sin", "Sqrt"}
)
BINARY = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul"}
    | {"Or", "PRelu", "Pow", "Sub", "Where"}
)
POOLING = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
NORMALIZING = frozenset(
    {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
)
REDUCING = frozenset(
    {
        "ArgMax",
        "LogSoftmax",
        "LpNormalization",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Softmax",
    }
)
SHAPING = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Pad", "Reshape", "Resize", "Shape", "Slice", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)
SUPPORTED = UNARY | BINARY | POOLING | WEIGHTED | NORMALIZING | REDUCING | SHAPING

REMEDIES = {
    "CastLike": "build the module with dtype=jnp.float32 for export",
    "Einsum": "write it with jnp.matmul and reshape, or with nn.Dense or nn.DenseGeneral",
    "ReduceProd": "write the product of a few terms out",
    "CumSum": "no low-bit compiler takes it: precompute it, or move it out of the model",
    "NonZero": "its result has no fixed shape: move it out of the model",
    "Range": 'pad with numbers, "SAME" or "CIRCULAR" in place of "REFLECT"; make positions a constant',
    "TopK": "move the selection out of the model",
}
ANY_REMEDY = "write this step with layers and functions of flax.linen, or move it out of the model"


def refuse_unsupported(model: onnx.ModelProto) -> None:
    """Raise where `model` holds what low-bit compilers cannot be relied on to take.

    Raises:
      InvalidInput: an operator outside `SUPPORTED`; names the node, what feeds it and the remedy.
    """
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            remedy = REMEDIES.get(node.op_type, ANY_REMEDY)
            raise InvalidInput(
                f'node "{node.name}" reading {list(node.input)} is a {operator}, which is outside the '
                f"operators that vendors' compilers share: {remedy}"
            )


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())
