"""Write ONNX's normalizations as functions of JAX arrays.

All but LayerNormalization and RMSNormalization take images `(batch, channels, ...)`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qt_jax.equalization.windows import Attributes, by_channel
from qt_jax.errors import InvalidInput


def batch_norm(attributes: Attributes, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> jax.Array:
    """Compute ONNX's BatchNormalization of inference: one scale and one shift for each channel."""
    if attributes.get("training_mode"):
        raise InvalidInput("it normalizes as in training: export the graph for inference")
    gain = jnp.asarray(scale) * jax.lax.rsqrt(jnp.asarray(variance) + attributes.get("epsilon", 1e-5))
    shift = jnp.asarray(bias) - jnp.asarray(mean) * gain
    return jnp.asarray(x) * by_channel(gain, x.ndim) + by_channel(shift, x.ndim)


def layer_norm(attributes: Attributes, x: Any, scale: Any, bias: Any = None) -> tuple[jax.Array, ...]:
    """Compute ONNX's LayerNormalization, and the mean and the inverse deviation that it may put out too."""
    axes = range(attributes.get("axis", -1) % x.ndim, x.ndim)
    y, mean, inverse = _standardized(jnp.asarray(x), axes, attributes.get("epsilon", 1e-5))
    y = y * _leading(scale, y.ndim)
    return (y if bias is None else y + _leading(bias, y.ndim)), mean, inverse


def instance_norm(attributes: Attributes, x: Any, scale: Any, bias: Any) -> jax.Array:
    """Compute ONNX's InstanceNormalization: each channel of each image has its own statistics."""
    y, _, _ = _standardized(jnp.asarray(x), range(2, x.ndim), attributes.get("epsilon", 1e-5))
    return y * by_channel(scale, x.ndim) + by_channel(bias, x.ndim)


def group_norm(attributes: Attributes, x: Any, scale: Any, bias: Any) -> jax.Array:
    """Compute ONNX's GroupNormalization.

    Scale and bias hold one number for each group before opset 21, and one for each channel from then on.
    """
    groups = attributes["num_groups"]
    parts = jnp.asarray(x).reshape(len(x), groups, -1)
    y = _standardized(parts, (2,), attributes.get("epsilon", 1e-5))[0].reshape(x.shape)
    scale, bias = (jnp.repeat(jnp.asarray(it), x.shape[1] // len(it)) for it in (scale, bias))
    return y * by_channel(scale, x.ndim) + by_channel(bias, x.ndim)


def rms_norm(attributes: Attributes, x: Any, scale: Any) -> jax.Array:
    """Compute ONNX's RMSNormalization: divide by the root of the mean square."""
    x = jnp.asarray(x)
    axes = range(attributes.get("axis", -1) % x.ndim, x.ndim)
    inverse = jax.lax.rsqrt((x * x).mean(axes, keepdims=True) + attributes.get("epsilon", 1e-5))
    return x * inverse * _leading(scale, x.ndim)


def lp_norm(attributes: Attributes, x: Any) -> jax.Array:
    """Compute ONNX's LpNormalization: divide by the sum of magnitudes or the root of squares."""
    x, axis = jnp.asarray(x), attributes.get("axis", -1)
    total = jnp.sum(jnp.abs(x) if attributes.get("p", 2) == 1 else x * x, axis, keepdims=True)
    return x / (total if attributes.get("p", 2) == 1 else jnp.sqrt(total))


def local_response_norm(attributes: Attributes, x: Any) -> jax.Array:
    """Compute ONNX's LRN: divide by a power of the squares of neighbouring channels."""
    x, size = jnp.asarray(x), attributes["size"]
    around = [(0, 0)] * x.ndim
    around[1] = ((size - 1) // 2, size // 2)
    squares = jnp.pad(x * x, around)
    total = sum(squares[:, step : step + x.shape[1]] for step in range(size))
    alpha, beta = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75)
    return x / (attributes.get("bias", 1.0) + alpha / size * total) ** beta


def _leading(values: Any, rank: int) -> jax.Array:
    """Return an array with ones before its shape, so that it has that rank."""
    return jnp.asarray(values).reshape((1,) * (rank - values.ndim) + values.shape)


def _standardized(
    x: jax.Array, axes: Sequence[int], epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (x - mean) / deviation, the mean and 1 / deviation."""
    mean = x.mean(axes, keepdims=True)
    inverse = jax.lax.rsqrt(((x - mean) ** 2).mean(axes, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse
