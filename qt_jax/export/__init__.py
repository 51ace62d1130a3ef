"""Convert Linen models to standard ONNX in small passes, each a pure function from ModelProto to ModelProto.

`to_onnx` converts, and `to_qdq` puts a network that was trained with Quant-Trim on integers. `verify`
compares the result with the JAX forward. `save_verified` gives a file its name only once what it holds has
been verified.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qt_jax.config import QuantConfig
from qt_jax.errors import InvalidInput, extra

with extra("export"):
    import onnx
    from flax.traverse_util import flatten_dict

    from qt_jax.export.activations import fold_activations
    from qt_jax.export.batch import symbolic_batch
    from qt_jax.export.checking import check_numbers
    from qt_jax.export.commuting import activate_before_pools, fold_into_next, move_to_layers
    from qt_jax.export.folding import (
        fold_affine,
        fold_flatten,
        fold_shift,
    )
    from qt_jax.export.folding import fold_batch_norm as fold_batch_norms
    from qt_jax.export.graph import weights_by_reference, with_shapes, with_weights
    from qt_jax.export.integers import opset_for, quantize
    from qt_jax.export.layout import channels_first
    from qt_jax.export.lowering import lower
    from qt_jax.export.merging import keep_axes
    from qt_jax.export.naming import name_by_path
    from qt_jax.export.operators import refuse_unsupported
    from qt_jax.export.opsets import OPSETS, at_opset
    from qt_jax.export.padding import explicit_padding, fold_pad, resize_by_scale
    from qt_jax.export.placement import place_transposes
    from qt_jax.export.rewrites import (
        drop_expands,
        drop_identities,
        fold_index,
        fold_stack,
        pad_tokens,
        plain_reshapes,
        unflatten_dense,
    )
    from qt_jax.export.sharing import merge_equal, share_transposes
    from qt_jax.export.storage import save
    from qt_jax.export.verification import save_verified, verify
    from qt_jax.interception import COLLECTION, is_quant_trim_statistic

__all__ = ["save", "save_verified", "to_onnx", "to_qdq", "verify"]

PASSES = (
    drop_identities,
    merge_equal,
    drop_expands,
    plain_reshapes,
    unflatten_dense,
    plain_reshapes,
    drop_identities,
    keep_axes,
    channels_first,
    drop_identities,
    fold_flatten,
    plain_reshapes,
    fold_index,
    fold_stack,
    plain_reshapes,
    drop_identities,
    share_transposes,
    merge_equal,
    place_transposes,
    pad_tokens,
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
    output_names: Sequence[str] | Mapping[str, str] | None = None,
    check: bool = True,
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
      fold_batch_norm: Whether batch norm disappears in the layer before it, from which pools, reshapes and
        transposes may part it. One that has no such layer disappears in a layer without padding behind it,
        unless the variables hold Quant-Trim's statistics, which describe the input of that layer as it is.
        Any other stays a BatchNormalization: for example one between a concat and an activation, or one
        behind a max pool with a negative scale.
      input_names: Names of the graph's inputs; by default "input", or "input_0", "input_1" and so on.
      output_names: Names of the graph's outputs, in their order; by default "logits" for one, else the keys
        of the dict that `apply_fn` returns, or "output_0", "output_1" and so on. The entries of a dict are
        named by its keys, in the order that you want. A mapping of keys gives them other names.
      check: Whether to compare the graph in onnxruntime with the forward, on two inputs that are drawn at
        random. That compiles the forward and runs it twice.

    Returns:
      The graph, whose operators and numbers have been checked. `verify` checks it on real inputs.

    Raises:
      InvalidInput: An argument is out of range, `apply_fn` does not take the variables, or the model does not
        lower to the supported operators. The message names the step and what to change. Or the graph's
        numbers are not those of the forward, and the message names the module.

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
        for each in PASSES:
            model = each(model)
        if fold_batch_norm:
            model = activate_before_pools(fold_affine(fold_batch_norms(move_to_layers(model))))
            if not any(map(is_quant_trim_statistic, flatten_dict(dict(variables.get(COLLECTION, {}))))):
                model = fold_flatten(fold_into_next(model))
        if dynamic_batch:
            model = symbolic_batch(model)
        model = name_by_path(at_opset(drop_identities(model), opset))
        refuse_unsupported(model)
        model = with_weights(with_shapes(model))
    if check:
        check_numbers(
            model,
            apply_fn,
            variables,
            input_shape,
            layout=layout,
            dynamic_batch=dynamic_batch,
            output_names=output_names,
            passes=PASSES,
            convert=lambda others: to_onnx(
                apply_fn,
                others,
                input_shape,
                opset=opset,
                dynamic_batch=dynamic_batch,
                layout=layout,
                fold_batch_norm=fold_batch_norm,
                input_names=input_names,
                output_names=output_names,
                check=False,
            ),
        )
    return model


def to_qdq(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    input_shape: Any,
    config: QuantConfig,
    calibration: Any,
    *,
    integers: Literal["int8", "int4", "int16-act"] = "int8",
    per_channel: bool = True,
    signed: bool = False,
    opset: int | None = None,
    layout: Literal["nchw", "nhwc"] = "nchw",
    **options: Any,
) -> onnx.ModelProto:
    """Convert a network that was trained with Quant-Trim to an ONNX graph on integers.

    The graph holds standard QuantizeLinear and DequantizeLinear pairs, as `qt_jax.export.qdq.insert_qdq`
    writes them. The learned ranges set the grids of kernels and of their inputs, and `calibration` those of
    the other activations. The numbers are those of the JAX forward at lambda = 1, but for the pairs that
    integer kernels need between layers. `qt_jax.export.verification.parity` measures how close they are.

    Args:
      apply_fn, input_shape: As `to_onnx` takes them.
      variables: Variables with Quant-Trim's statistics in `batch_stats`.
      config: Config of training.
      calibration: Real inputs as `apply_fn` takes them, a few hundred: one array, or one for each input.
      integers: "int8"; "int4" for weights on 4 bits; "int16-act" for activations on 16 bits.
      per_channel: Whether each output channel of a kernel has its own scale.
      signed: Whether activations are signed integers. Compilers accept one kind, the other, or both.
      opset: Opset of ai.onnx; None for 17, or for 21 where the integers need it.
      layout: As `to_onnx` takes it.
      **options: Other options of `to_onnx`.

    Returns:
      The graph, with inputs and outputs in float32.

    Raises:
      InvalidInput: As for `to_onnx`; or the variables hold no learned ranges, or some that QDQ cannot
        express; or the opset lacks the integers.

    >>> import flax.linen as nn, jax
    >>> import qt_jax as qt
    >>> net, x = nn.Dense(2), jax.random.normal(jax.random.key(0), (32, 3))
    >>> config = qt.QuantConfig()
    >>> variables = qt.attach_statistics(net, net.init(jax.random.key(1), x), config, x)
    >>> with qt.quant_trim(config, 0.0, train=True):
    ...     _, seen = net.apply(variables, x, mutable=["batch_stats"])
    >>> model = qt.to_qdq(net.apply, variables | seen, (3,), config, x)
    >>> [node.op_type for node in model.graph.node]  # doctest: +NORMALIZE_WHITESPACE
    ['QuantizeLinear', 'DequantizeLinear', 'DequantizeLinear', 'DequantizeLinear', 'Gemm']
    """
    opset = opset_for(integers, opset)
    model = to_onnx(apply_fn, variables, input_shape, opset=opset, layout=layout, **options)
    return quantize(
        model,
        variables,
        config,
        calibration,
        integers,
        layout=layout,
        per_channel=per_channel,
        signed=signed,
    )[0]
