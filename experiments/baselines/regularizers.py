"""Penalise kernels that round badly, and minimise sharpness: baselines that train in floating point.

KURE
    The mean over kernels of (Kurt(W) - 1.8)^2, where Kurt(W) = mean(((W - mean) / std)^4). Weights of
    kurtosis 1.8 are spread evenly, and their error depends least on the step of a grid. Source: Shkolnik et
    al. 2020, "Robust quantization: one model to rule them all", arXiv 2002.07686.

Range regularisation (R2)
    The sum over kernels of max|W|, the L-infinity form. Source: Kundu et al. 2023, "R2 loss: range
    restriction loss for model compression and quantization", arXiv 2303.08253.

Sharpness-aware minimisation (SAM)
    The gradient is taken at W + rho g / |g|, where g is the gradient at W. Source: Foret et al. 2021,
    arXiv 2010.01412.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

UNIFORM_KURTOSIS = 1.8
"""Kurtosis of the uniform distribution."""

SMALLEST = 1e-12
"""Least variance and least norm that are divided by."""


def kurtosis(x: jax.Array) -> jax.Array:
    """Return the fourth standardised moment of all entries, a float32 scalar.

    >>> kurtosis(jnp.float32([-1, -1, 1, 1])).item()
    1.0
    """
    centred = x - jnp.mean(x)
    variance = jnp.maximum(jnp.mean(centred**2), SMALLEST)
    return jnp.mean(centred**4) / variance**2


def kure(params: Any) -> jax.Array:
    """Return the mean over kernels of the squared distance of their kurtosis from 1.8, a float32 scalar."""
    return jnp.mean(jnp.stack([(kurtosis(kernel) - UNIFORM_KURTOSIS) ** 2 for kernel in kernels(params)]))


def largest_weights(params: Any) -> jax.Array:
    """Return the sum over kernels of their largest magnitude, a float32 scalar.

    >>> largest_weights({"a": {"kernel": jnp.float32([1, -3])}, "b": {"kernel": jnp.float32([2])}}).item()
    5.0
    """
    return jnp.sum(jnp.stack([jnp.max(jnp.abs(kernel)) for kernel in kernels(params)]))


def kernels(params: Any) -> list[jax.Array]:
    """Return the kernels of a network, the leaves called "kernel"."""
    return [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]


REGULARIZERS: dict[str, Callable[[Any], jax.Array]] = {"kure": kure, "range": largest_weights}
"""Maps each value of `--regularizer` but none to the penalty that it adds to the loss."""


def sharpest(params: Any, gradients: Any, radius: float) -> Any:
    """Return params + radius * gradients / |gradients|: where the loss rises most within this radius.

    >>> sharpest({"w": jnp.zeros(2)}, {"w": jnp.float32([3, 4])}, 0.5)["w"].tolist()
    [0.30000001192092896, 0.4000000059604645]
    """
    length = jnp.maximum(optax.tree.norm(gradients), SMALLEST)
    return jax.tree.map(lambda weight, gradient: weight + radius / length * gradient, params, gradients)
