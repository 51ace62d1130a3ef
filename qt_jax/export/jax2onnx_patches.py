"""Correct jax2onnx where it falls short, and keep it from leaving traces in the process.

Without these corrections jax2onnx

- replaces functions of JAX and Flax for good,
- takes pooling arguments by keyword only, and reads a pool's explicit padding as "VALID",
- refuses `jax.image.resize` with its default antialiasing even where that changes nothing,
- turns scans into loops,
- spends most of its time on an optimizer whose work our own passes do again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import flax.linen as nn
import flax.linen.pooling as linen_pooling
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from flax.linen.linear import canonicalize_padding

from qt_jax.errors import InvalidInput

MAX_UNROLLED = 256
"""Number of steps of the longest scan that is unrolled. Each step writes its nodes once more."""

_inside_jax2onnx = jax.make_user_context(default_value=False)
"""Part of the key of every jit cache. A trace made under jax2onnx's patches is not reused outside them."""


@contextmanager
def jax2onnx_corrected() -> Iterator[Callable[..., onnx.ModelProto]]:
    """Yield `jax2onnx.to_onnx`, whose patches, traces and log end with the context."""
    with ExitStack() as stack:
        stack.enter_context(_functions_restored())
        stack.enter_context(_quiet_logging())
        stack.enter_context(_inside_jax2onnx(True))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))

        import jax2onnx  # costs seconds: pay only when exporting
        from jax2onnx.converter import conversion_api

        stack.enter_context(_replaced(conversion_api, "optimize_graph", lambda model: None))

        def to_onnx(function: Callable, inputs: Sequence[Any], **options: Any) -> onnx.ModelProto:
            def corrected(*arguments: Any) -> Any:
                with ExitStack() as corrections:
                    for correction in (_pooling(), _resize(), *_concrete()):
                        corrections.enter_context(correction)
                    return function(*arguments)

            return jax2onnx.to_onnx(corrected, inputs, **options)

        yield to_onnx


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute inside the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _functions_restored() -> Iterator[None]:
    """Undo what jax2onnx replaces for good.

    Merely importing it leaves a `jnp.cumsum` that does not take the axis by position.
    """
    layers = [value for value in vars(nn).values() if isinstance(value, type)]
    before = [(owner, dict(vars(owner))) for owner in (jnp, jax.lax, jax.nn, jax.image, nn, *layers)]
    try:
        yield
    finally:
        for owner, held in before:
            for name, value in held.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


@contextmanager
def _pooling() -> Iterator[None]:
    """Give `nn.max_pool` and `nn.avg_pool` their own signatures, and explicit padding.

    A maximum is padded with -inf first, and a mean, whose pads count, with zeros. `padding.fold_pad` folds
    the padding into the pool.
    """
    lowered = nn.max_pool, nn.avg_pool, linen_pooling.pool

    def padded(inputs: jax.Array, padding: Any, value: float) -> tuple[jax.Array, str]:
        if isinstance(padding, str):
            return inputs, padding
        widths = [(0, 0), *((side, side) if isinstance(side, int) else side for side in padding), (0, 0)]
        return jnp.pad(inputs, widths, constant_values=value), "VALID"

    def max_pool(
        inputs: jax.Array, window_shape: Any, strides: Any = None, padding: Any = "VALID"
    ) -> jax.Array:
        inputs, padding = padded(inputs, padding, -jnp.inf)
        return lowered[0](inputs, window_shape=window_shape, strides=strides, padding=padding)

    def avg_pool(
        inputs: jax.Array,
        window_shape: Any,
        strides: Any = None,
        padding: Any = "VALID",
        count_include_pad: bool = True,
    ) -> jax.Array:
        if not (isinstance(padding, str) or count_include_pad):
            raise InvalidInput(
                "nn.avg_pool with explicit padding and count_include_pad=False does not export: "
                'use padding="SAME" or count the pads'
            )
        inputs, padding = padded(inputs, padding, 0.0)
        options = {"strides": strides, "padding": padding, "count_include_pad": count_include_pad}
        return lowered[1](inputs, window_shape=window_shape, **options)

    def pool(
        inputs: jax.Array, init: Any, reduce_fn: Any, window_shape: Any, strides: Any, padding: Any
    ) -> jax.Array:
        inputs, padding = padded(inputs, padding, init)
        return lowered[2](inputs, init, reduce_fn, window_shape, strides, padding)

    with ExitStack() as stack:
        for name, function in (("max_pool", max_pool), ("avg_pool", avg_pool)):
            stack.enter_context(_replaced(nn, name, function))
        stack.enter_context(_replaced(linen_pooling, "pool", pool))  # what a kept nn.max_pool calls
        yield


@contextmanager
def _resize() -> Iterator[None]:
    """Let `jax.image.resize` enlarge with antialiasing, which acts on reductions only."""
    lowered = jax.image.resize

    def resize(
        image: jax.Array, shape: Any, method: Any, antialias: bool = True, precision: Any = None
    ) -> jax.Array:
        name = str(getattr(method, "name", method)).lower()
        shrinks = any(new < old for new, old in zip(shape, image.shape, strict=True))
        if shrinks and antialias and "nearest" not in name:
            raise InvalidInput(
                f"jax.image.resize from {image.shape[1:]} to {tuple(shape)[1:]} reduces with antialiasing, "
                "which ONNX's Resize does not share: pass antialias=False, or pool with nn.avg_pool"
            )
        return lowered(image, shape, method, antialias=False)

    with _replaced(jax.image, "resize", resize):
        yield


def _concrete() -> list[AbstractContextManager[None]]:
    """Keep four functions from tracing what is known before.

    - Scans are unrolled.
    - `jnp.shape` is a tuple of numbers, where jax2onnx makes it a traced array.
    - Padding is a tuple of tuples, where jax2onnx passes Flax's list on.
    - Random keys are not split. A recurrent cell "draws" with them the zeros that it starts from.
    """
    return [
        _replaced(jax.lax, "scan", _unrolled_scan),
        _replaced(jnp, "shape", np.shape),
        _replaced(nn.linear, "canonicalize_padding", _hashable_padding),
        _replaced(jax.random, "split", lambda key, num=2: [key] * num),
    ]


def _hashable_padding(padding: Any, rank: int) -> Any:
    """Return Flax's canonical padding as a tuple of tuples."""
    found = canonicalize_padding(padding, rank)
    return found if isinstance(found, str) else tuple(map(tuple, found))


def _unrolled_scan(
    f: Callable[..., Any],
    init: Any,
    xs: Any = None,
    length: Any = None,
    reverse: bool = False,
    unroll: Any = 1,
    **_: Any,
) -> tuple[Any, Any]:
    """Run `jax.lax.scan` as a Python loop, for a graph without loops."""
    leaves = jax.tree.leaves(xs)
    steps = leaves[0].shape[0] if leaves else length
    if steps > MAX_UNROLLED:
        raise InvalidInput(
            f"a scan of {steps} steps would be unrolled into as many copies (at most {MAX_UNROLLED}): "
            "shorten the sequence for export"
        )
    carry, results = init, [None] * steps
    for step in reversed(range(steps)) if reverse else range(steps):
        carry, results[step] = f(carry, jax.tree.map(lambda x, step=step: x[step], xs))
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *results)


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
