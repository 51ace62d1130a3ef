"""Check forwards that JAX writes with rare primitives, some of which only one of its versions has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.export import to_onnx, verify

SHAPE = (5, 4)


def wave(x):
    return jnp.tanh(x) * jnp.sin(x)


def recurrence(x):
    """Compute h = sigmoid(x) h + x along the rows, as linear recurrent networks do."""

    def joined(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(joined, (jax.nn.sigmoid(x), x), axis=1)[1]


def halves(x):
    first, second = x.reshape(x.shape[0], 2, 10).swapaxes(0, 1)
    return first * 2.0 - second


FORWARDS = {
    "entries of an axis": halves,
    "entries of a constant": lambda x: x * [*jnp.arange(3.0)][2],
    "log2": lambda x: jnp.log2(jnp.abs(x) + 0.1),
    "logaddexp2": lambda x: jnp.logaddexp2(x, 2.0 * x),
    "gradient": jax.grad(lambda x: wave(x).sum()),
    "gradient of arcsin": jax.grad(lambda x: jnp.arcsin(0.9 * jnp.tanh(x)).sum()),
    "gradient through remat": jax.grad(lambda x: jax.checkpoint(wave)(x).sum()),
    "linearized": lambda x: jax.linearize(wave, x)[1](2.0 * x),
    "pulled back": lambda x: jax.vjp(wave, x)[1](x)[0],
    "sums by a tree": lambda x: jax.lax.associative_scan(jnp.add, x, axis=1),
    "linear recurrence": recurrence,
    "padded between": lambda x: jax.lax.pad(x, 0.5, ((0, 0, 0), (1, 2, 2), (0, 1, 1))),
    "padded between and cut": lambda x: jax.lax.pad(x, 0.5, ((0, 0, 0), (-1, 2, 2), (0, -1, 1))),
}


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_a_rare_primitive(forward, opset):
    def apply(variables, x):
        return forward(x)

    x = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    verify(to_onnx(apply, {}, SHAPE, opset=opset), apply, {}, x, batch_sizes=(1, 3))
