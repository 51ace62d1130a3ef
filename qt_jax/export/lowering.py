"""From a Linen apply function to a raw ONNX graph, through jax2onnx.

The variables enter jax2onnx as named graph inputs and are then frozen into initializers, so that each keeps
its path (`params/stem/kernel`) as its name.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.errors import InvalidInput
from qt_jax.export import graph

OPSETS = range(13, 22)

_inside_jax2onnx = jax.make_user_context(default_value=False)
"""Part of every jit cache's key: a trace made under jax2onnx's patches is not reused outside them."""


def lower(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Mapping[str, Any],
    input_shape: Sequence[int],
    *,
    opset: int,
    dynamic_batch: bool,
    input_name: str,
    output_name: str,
) -> onnx.ModelProto:
    """The graph as jax2onnx writes it: NCHW input, every variable that is read an initializer.

    Arguments are those of `qt_jax.export.to_onnx`. Batch norm, layout changes and constant subgraphs are
    still there, and recorded shapes are not.

    Raises:
      InvalidInput: opset outside 13..21, variables or images that `apply_fn` does not take, an output other
        than float32 `(batch, classes)`, or an operation that jax2onnx does not lower.
    """
    if opset not in OPSETS:
        raise InvalidInput(f"opset {opset} is not supported: choose {OPSETS[0]} to {OPSETS[-1]}")
    leaves = flatten_dict(unfreeze(variables))
    _check_signature(apply_fn, variables, input_shape)

    def positional(images: jax.Array, *values: jax.Array) -> jax.Array:
        with _flax_pooling_signatures():
            return apply_fn(unflatten_dict(dict(zip(leaves, values, strict=True))), images)

    names = ["/".join(path) for path in leaves]
    specs = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves.values()]
    raw = _convert(
        positional,
        [("batch" if dynamic_batch else 1, *input_shape), *specs],
        opset=opset,
        input_names=[input_name, *names],
        output_names=[output_name],
        inputs_as_nchw=[0],
    )
    frozen = {name: np.asarray(leaf) for name, leaf in zip(names, leaves.values(), strict=True)}
    return graph.rebuild(raw, raw.graph.node, graph.constants(raw) | frozen)


def _check_signature(apply_fn: Callable, variables: Mapping[str, Any], input_shape: Sequence[int]) -> None:
    if len(input_shape) != 3:
        raise InvalidInput(f"input_shape {tuple(input_shape)} must be (height, width, channels), no batch")
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    try:
        output = jax.eval_shape(apply_fn, variables, images)
    except flax.errors.FlaxError as error:
        raise InvalidInput(
            f"apply_fn does not take these variables and images {images.shape}: {error}. "
            "Give the variables of this very model, call it with train=False, and the input_shape it was "
            "initialised with."
        ) from error
    if not isinstance(output, jax.ShapeDtypeStruct) or len(output.shape) != 2 or output.dtype != jnp.float32:
        raise InvalidInput(f"apply_fn must return one float32 array (batch, classes), it returns {output}")


def _convert(function: Callable, inputs: Sequence[Any], **options: Any) -> onnx.ModelProto:
    """jax2onnx, with its patches, its traces and its log kept to itself, and its errors made readable."""
    relaxed = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with _functions_restored(), _quiet_logging(), _inside_jax2onnx(True), relaxed[0], relaxed[1]:
        from jax2onnx import to_onnx  # importing it costs seconds: pay only when exporting

        try:
            return to_onnx(function, inputs, **options)
        except InvalidInput:
            raise
        except Exception as error:
            raise InvalidInput(
                f"jax2onnx cannot lower this model: {type(error).__name__}: {error}. "
                "Write the step it names with layers and functions of flax.linen."
            ) from error


@contextmanager
def _functions_restored() -> Iterator[None]:
    """Undo what jax2onnx replaces for good: its import leaves a `jnp.cumsum` without positional axis."""
    layers = [value for value in vars(nn).values() if isinstance(value, type)]
    before = [(owner, dict(vars(owner))) for owner in (jnp, jax.lax, jax.nn, nn, *layers)]
    try:
        yield
    finally:
        for owner, held in before:
            for name, value in held.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


@contextmanager
def _flax_pooling_signatures() -> Iterator[None]:
    """Give `nn.max_pool` and `nn.avg_pool` back the signatures that jax2onnx's replacements lack.

    Those take keywords only, and read an explicit padding as "VALID" without a word.
    """
    lowered = nn.max_pool, nn.avg_pool

    def check(padding: Any) -> None:
        if not isinstance(padding, str):
            raise InvalidInput(
                f'pooling with explicit padding {padding} does not export: use "VALID" or "SAME"'
            )

    def max_pool(inputs, window_shape, strides=None, padding="VALID"):
        check(padding)
        return lowered[0](inputs, window_shape=window_shape, strides=strides, padding=padding)

    def avg_pool(inputs, window_shape, strides=None, padding="VALID", count_include_pad=True):
        check(padding)
        options = {"strides": strides, "padding": padding, "count_include_pad": count_include_pad}
        return lowered[1](inputs, window_shape=window_shape, **options)

    nn.max_pool, nn.avg_pool = max_pool, avg_pool
    try:
        yield
    finally:
        nn.max_pool, nn.avg_pool = lowered


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Silence jax2onnx and onnx_ir below errors.

    A handler on the root logger keeps jax2onnx's `logging.info` from installing one that would stay.
    """
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    placeholder = logging.NullHandler()
    logging.getLogger().addHandler(placeholder)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        logging.getLogger().removeHandler(placeholder)
