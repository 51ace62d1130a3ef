"""An image read row by row by a recurrent network, in plain Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RowReader(nn.Module):
    """A recurrent classifier: each row of the image is one step of an LSTM (Hochreiter and Schmidhuber 1997)
    or a GRU (Cho et al. 2014, arXiv 1406.1078), the last state feeds a linear head, in the manner of the
    sequential MNIST of Le et al. 2015 (arXiv 1504.00941).

    `RowReader(features=8)` is a tiny one for tests. Any height will do; the width is fixed by the parameters.

    Takes images `(batch, height, width, channels)`, returns float32 logits `(batch, num_classes)`;
    training and inference are the same.
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
