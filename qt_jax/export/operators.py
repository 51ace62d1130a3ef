"""What an exported graph may hold, and what to change in the model where it holds something else."""

from collections import Counter

import onnx

from qt_jax.errors import InvalidInput

ARITHMETIC = frozenset({"Add", "Clip", "Concat", "Div", "Max", "Min", "Mul", "Relu", "Sigmoid", "Sub"})
POOLING = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
SUPPORTED = frozenset({"Conv", "Flatten", "Gemm", "Transpose"}) | ARITHMETIC | POOLING
MAX_TRANSPOSES = 1

FLATTEN = "reduce height and width with jnp.mean(x, axis=(1, 2)) in place of a reshape"
REMEDIES = {
    "BatchNormalization": "apply nn.BatchNorm directly to a convolution's output that nothing else reads",
    "Cast": "build the module with dtype=jnp.float32 for export",
    "CastLike": "build the module with dtype=jnp.float32 for export",
    "Gather": FLATTEN,
    "Reshape": FLATTEN,
    "Shape": FLATTEN,
    "Squeeze": FLATTEN,
    "Unsqueeze": FLATTEN,
    "ReduceMean": "take means over height and width of (batch, height, width, channels) only: axis=(1, 2)",
    "Slice": 'pad with numbers or "SAME" in place of "CIRCULAR", and do not index into images',
    "MatMul": "multiply by a kernel held in the variables, as nn.Dense does",
    "Transpose": "keep images channels-last between layers and use layers of flax.linen",
}
ANY_REMEDY = "write this step with convolution, dense, pooling, ReLU and addition layers of flax.linen"


def refuse_unsupported(model: onnx.ModelProto) -> None:
    """Raise where `model` holds what compilers for convolutional networks cannot be relied on to take.

    Raises:
      InvalidInput: an operator outside `SUPPORTED` or a second Transpose; names the node and the remedy.
    """
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED:
            raise InvalidInput(_message(node, "which is outside the supported operators"))
    transposes = [node for node in model.graph.node if node.op_type == "Transpose"]
    if len(transposes) > MAX_TRANSPOSES:
        raise InvalidInput(_message(transposes[-1], f"one of {len(transposes)} (at most {MAX_TRANSPOSES})"))


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def _message(node: onnx.NodeProto, complaint: str) -> str:
    remedy = REMEDIES.get(node.op_type, ANY_REMEDY)
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f'node "{node.name}" reading {list(node.input)} is a {operator}, {complaint}: {remedy}'
