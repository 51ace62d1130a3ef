"""Quant-Trim inside a model, for quantization configs that the trainer has no flag for."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

import qt_jax as qt


class QuantTrimmed(nn.Module):
    """`model` that enters `qt.quant_trim` by itself, so that a trainer who knows nothing of it trains it so.

    The step, on which lambda depends, is counted beside the ranges in `batch_stats`.
    """

    model: nn.Module
    specs: qt.QuantConfig
    lam: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        with qt.quant_trim(self.specs, self.lam(step.value), train=train):
            logits = self.model(images, train=train)
        if train and not self.is_initializing():
            step.value += 1
        return logits
