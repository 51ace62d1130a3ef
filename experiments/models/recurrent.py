"""Define a recurrent network that reads an image row by row, in plain Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RowReader(nn.Module):
    """Classify images with an LSTM or a GRU that takes one row of the image per step.

    The last state feeds a linear head, as in the sequential MNIST of Le et al. 2015 (arXiv 1504.00941). The
    LSTM is Hochreiter and Schmidhuber's of 1997, the GRU Cho et al.'s of 2014 (arXiv 1406.1078). Any height
    is possible; the parameters fix the width. `RowReader(features=8)` is a tiny one for tests.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
    Training and inference are the same.
    """

    cell: type[nn.RNNCellBase] = nn.LSTMCell
    features: int = 128
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        rows = x.reshape(*x.shape[:2], -1).astype(self.dtype)
        cell = self.cell(self.features, dtype=self.dtype, name="cell")
        states = nn.RNN(cell, variable_axes={"batch_stats": 0}, name="rows")(rows)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(states[:, -1]).astype(jnp.float32)
