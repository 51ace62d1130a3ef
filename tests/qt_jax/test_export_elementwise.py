"""Check functions of one number that ONNX lacks against numpy in float64, over all of float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from qt_jax.export import to_onnx

SIZES = np.logspace(-37, 38, 3000)
EDGES = [0.0, -0.0, 1.0, -1.0, -1.0 + 2.0**-24, 0.5, -0.5, np.inf, -np.inf, np.nan]
NUMBERS = np.concatenate([SIZES, -SIZES, EDGES]).astype(np.float32)[:, None]


def run(function, x):
    model = to_onnx(lambda _, x: function(x), {}, x.shape[1:])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize("name", ["expm1", "log1p"])
def test_small_numbers_keep_their_digits(name):
    exact = getattr(np, name)(NUMBERS.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(run(getattr(jnp, name), NUMBERS), exact, rtol=1e-6, atol=1e-38)


SCALED = {
    "a logarithm near 1": (lambda x: jnp.log1p(x * 1e-6) * 1e6, lambda x: np.log1p(x * 1e-6) * 1e6),
    "an exponential near 1": (lambda x: jnp.expm1(x * 1e-6) * 1e6, lambda x: np.expm1(x * 1e-6) * 1e6),
    "softplus far below 0": (
        lambda x: jnp.log(nn.softplus(x - 20)),
        lambda x: np.log(np.log1p(np.exp(x - 20))),
    ),
    "elu near 0": (lambda x: jax.nn.celu(x * 1e-6, 2.0) * 1e6, lambda x: x),
}


@pytest.mark.parametrize("name", SCALED)
def test_what_a_network_makes_of_them(name):
    function, exact = SCALED[name]
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    np.testing.assert_allclose(run(function, x), exact(x.astype(np.float64)), rtol=1e-5)
