"""Convert Linen models to standard ONNX in small passes, each a pure function from ModelProto to ModelProto.

`to_onnx` converts. `verify` compares the result with the JAX forward. `save_verified` gives a file its name
only once what it holds has been verified.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qt_jax.errors import InvalidInput, extra

with extra("export"):
    import onnx

    from qt_jax.export.activations import fold_activations
    from qt_jax.export.folding import (
        drop_absent_bias,
        fold_affine,
        fold_constants,
        fold_flatten,
        fold_shift,
        known_shapes,
        written_axes,
    )
    from qt_jax.export.folding import fold_batch_norm as fold_batch_norms
    from qt_jax.export.graph import save, weights_by_reference, with_shapes, with_weights
    from qt_jax.export.layout import channels_first
    from qt_jax.export.lowering import lower, symbolic_batch
    from qt_jax.export.naming import name_by_path
    from qt_jax.export.operators import refuse_unsupported
    from qt_jax.export.opsets import OPSETS, at_opset
    from qt_jax.export.padding import explicit_padding, fold_pad, resize_by_scale
    from qt_jax.export.rewrites import (
        drop_expands,
        drop_identities,
        einsum_to_matmul,
        fold_index,
        fold_mean,
        fold_stack,
        plain_reshapes,
        short_slices,
        unflatten_dense,
    )
    from qt_jax.export.verification import save_verified, verify

__all__ = ["save", "save_verified", "to_onnx", "verify"]

PASSES = (
    known_shapes,
    written_axes,
    fold_constants,
    drop_identities,
    drop_expands,
    plain_reshapes,
    fold_mean,
    drop_absent_bias,
    einsum_to_matmul,
    unflatten_dense,
    plain_reshapes,
    drop_identities,
    channels_first,
    drop_identities,
    fold_flatten,
    plain_reshapes,
    fold_index,
    fold_stack,
    plain_reshapes,
    short_slices,
    drop_identities,
    fold_activations,
    fold_shift,
    explicit_padding,
    fold_pad,
    resize_by_scale,
)
"""Passes between lowering and the folding of batch norm, in order."""


def to_onnx(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    input_shape: Any,
    *,
    opset: int = 17,
    dynamic_batch: bool = True,
    layout: Literal["nchw", "nhwc"] = "nchw",
    fold_batch_norm: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Convert a Flax Linen model to a standard FP32 ONNX graph.

    The graph holds only operators of ai.onnx. Batch norm is folded into the layer before it, and layout
    Transposes are removed. Nodes, tensors and initializers bear Flax paths (`stage1_block1/conv1/kernel`),
    and shapes are inferred again. Inside the graph images are always channels-first, as ONNX's
    convolutions are.

    Args:
      apply_fn: `(variables, *inputs) -> array or a pytree of arrays`, the forward of inference. The first
        axis of every array is the batch. Images are `(batch, height, width, channels)`.
      variables: Flax collections of arrays. Leaves that `apply_fn` does not read, such as Quant-Trim's
        statistics, do not appear in the graph.
      input_shape: Shape of the input without batch, `(height, width, channels)` for images; for several
        inputs a sequence of shapes. Pass a `jax.ShapeDtypeStruct` for a dtype other than float32.
      opset: Opset of ai.onnx, 13 to 21. Operators that came later are decomposed.
      dynamic_batch: Whether the batch is the symbolic dimension "batch"; otherwise it is fixed to 1.
      layout: Layout of inputs and outputs of rank 4: "nchw" for channels-first, "nhwc" as in Flax.
      fold_batch_norm: Whether batch norm disappears in the layer before it. One that has no layer before it
        stays a BatchNormalization: for example one after a concat, or one of a pre-activation network that
        follows an addition.
      input_names: Names of the graph's inputs; by default "input", or "input_0", "input_1" and so on.
      output_names: Names of the graph's outputs; by default "logits", or "output_0", "output_1" and so on.

    Returns:
      The graph, whose operators have been checked. `verify` compares its numbers.

    Raises:
      InvalidInput: An argument is out of range, `apply_fn` does not take the variables, or the model does not
        lower to the supported operators. The message names the node and what to change.

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
    if not isinstance(opset, int) or opset not in OPSETS:
        raise InvalidInput(f"opset {opset!r} is not supported: choose {OPSETS[0]} to {OPSETS[-1]}")
    if layout not in ("nchw", "nhwc"):
        raise InvalidInput(f'layout {layout!r} is not supported: choose "nchw" or "nhwc"')
    with weights_by_reference():
        model = lower(
            apply_fn,
            variables,
            input_shape,
            batch=None if dynamic_batch else 1,
            channels_first=layout == "nchw",
            input_names=input_names,
            output_names=output_names,
        )
        for apply_pass in PASSES:
            model = apply_pass(model)
        if fold_batch_norm:
            model = fold_affine(fold_batch_norms(model))
        if dynamic_batch:
            model = symbolic_batch(model)
        model = name_by_path(at_opset(drop_identities(model), opset))
        refuse_unsupported(model)
        return with_weights(with_shapes(model))
