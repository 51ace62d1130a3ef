"""Linen to standard ONNX, in small passes: each a pure function from ModelProto to ModelProto.

`to_onnx` converts; `verify` compares the result with the JAX forward; `save_verified` gives a file its name
only once what it holds has been verified.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import onnx
from onnx import shape_inference

from qt_jax.export.folding import (
    drop_identities,
    fold_batch_norm,
    fold_clip,
    fold_constants,
    fold_dense,
    fold_mean,
)
from qt_jax.export.layout import channels_first
from qt_jax.export.lowering import lower
from qt_jax.export.naming import name_by_path
from qt_jax.export.operators import refuse_unsupported
from qt_jax.export.verify import save, save_verified, verify
from qt_jax.export.windows import explicit_windows

__all__ = ["save", "save_verified", "to_onnx", "verify"]

PASSES = (
    fold_constants,
    drop_identities,
    fold_mean,
    channels_first,
    explicit_windows,
    fold_clip,
    fold_batch_norm,
    fold_dense,
    name_by_path,
)


def to_onnx(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Mapping[str, Any],
    input_shape: Sequence[int],
    *,
    opset: int = 17,
    dynamic_batch: bool = True,
    input_name: str = "input",
    output_name: str = "logits",
) -> onnx.ModelProto:
    """A standard FP32 ONNX graph of a convolutional classifier in Flax Linen.

    The graph takes float32 images `(batch, channels, height, width)` and holds operators of ai.onnx alone:
    batch norm is folded into the convolutions, layout changes are gone, nodes, tensors and initializers bear
    Flax paths (`stage1_block1/conv1/kernel`), and shapes are inferred anew.

    Args:
      apply_fn: `(variables, images) -> logits`, images float32 `(batch, height, width, channels)`, logits
        float32 `(batch, classes)`; the forward of inference.
      variables: Flax collections of arrays. Leaves that `apply_fn` does not read, such as Quant-Trim's
        statistics, do not appear in the graph.
      input_shape: `(height, width, channels)`.
      opset: of ai.onnx, 13 to 21.
      dynamic_batch: a symbolic dimension "batch"; otherwise the batch is fixed to 1.
      input_name: of the graph's input.
      output_name: of the graph's output.

    Returns:
      The graph, checked for its operators; `verify` compares its numbers.

    Raises:
      InvalidInput: an argument out of range, variables that `apply_fn` does not take, or a model that does
        not lower to the supported operators; the message names the node and what to change.

    >>> import flax.linen as nn, jax
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="stem")(x)
    ...         x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
    ...         return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))
    >>> images = jax.random.normal(jax.random.key(0), (7, 8, 8, 3))
    >>> variables = Net().init(jax.random.key(1), images)
    >>> model = to_onnx(Net().apply, variables, (8, 8, 3))
    >>> [(node.op_type, node.name) for node in model.graph.node]  # doctest: +NORMALIZE_WHITESPACE
    [('Conv', 'stem'), ('Relu', 'Relu'), ('GlobalAveragePool', 'GlobalAveragePool'), ('Flatten', 'Flatten'),
     ('Gemm', 'head')]
    >>> [tensor.name for tensor in model.graph.initializer]
    ['stem/kernel', 'stem/bias', 'head/kernel', 'head/bias']
    >>> verify(model, Net().apply, variables, images)["parameters"]
    162
    """
    names = {"input_name": input_name, "output_name": output_name}
    model = lower(apply_fn, variables, input_shape, opset=opset, dynamic_batch=dynamic_batch, **names)
    for improve in PASSES:
        model = improve(model)
    refuse_unsupported(model)
    return shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
