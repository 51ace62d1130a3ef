"""Check Qwix around our models: bits and rules of the config, parameters of the plain model."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from experiments.baselines.qwix_qat import qwix_model

pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")

X = np.random.default_rng(0).uniform(size=(4, 6, 6, 3)).astype(np.float32)


class Net(nn.Module):
    """Apply a convolution, a transposed convolution and a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x))
        x = nn.ConvTranspose(4, (2, 2), (2, 2), name="up")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def absmax(x: np.ndarray, bits: int, axes: tuple[int, ...]) -> np.ndarray:
    """Round `x` to Qwix's symmetric grid. The largest magnitude is half a step above the last integer."""
    largest = 2 ** (bits - 1) - 1
    step = np.abs(x.astype(np.float64)).max(axis=axes, keepdims=True) / (largest + 0.5)
    return np.clip(np.rint(x / step), -largest - 1, largest) * step


def _peaking_upward(kernel: jax.Array) -> jax.Array:
    """Flip `kernel` to positive largest magnitudes. Negative ones would lie between two integers."""
    return kernel * jnp.where(kernel.max((0, 1, 2)) > -kernel.min((0, 1, 2)), 1.0, -1.0)


@pytest.fixture(scope="module", autouse=True)
def implicit_promotion():
    """Allow implicit promotion, on which Qwix relies."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pytest.importorskip("qwix")
        yield


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_convolution_computes_on_the_grid(bits, axis):
    conv = nn.Conv(4, (3, 3), use_bias=False, name="conv")
    variables = jax.tree.map(_peaking_upward, conv.init(jax.random.key(0), X))
    quantized = qwix_model(conv, qt.QuantConfig(weights=qt.QuantSpec(bits, axis=axis)))
    kernel = np.asarray(variables["params"]["kernel"])
    images = absmax(X, 8, (0, 1, 2, 3) if axis is None else (1, 2, 3)).astype(np.float32)
    rounded = absmax(kernel, bits, (0, 1, 2, 3) if axis is None else (0, 1, 2)).astype(np.float32)
    expected = conv.apply({"params": {"kernel": jnp.asarray(rounded)}}, images)
    np.testing.assert_allclose(quantized.apply(variables, X), expected, atol=1e-5)

    def gradient(model, x, variables):
        return jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, x))))(variables)["params"]["kernel"]

    got = gradient(quantized, X, variables)
    straight = gradient(conv, images, {"params": {"kernel": jnp.asarray(rounded)}})
    np.testing.assert_allclose(got, straight, rtol=0.02, atol=0.05)  # the input's rounding may count twice


def test_rules_and_plain_parameters():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    rules = (qt.Rule("head", skip=True), qt.Rule("conv", weights=qt.QuantSpec(8)))
    config = qt.QuantConfig(weights=qt.QuantSpec(4), rules=rules)
    mine = qwix_model(model, config).init(jax.random.key(0), X)
    assert jax.tree.structure(mine) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, mine, variables)

    def output(variables, config):
        return np.asarray(qwix_model(model, config).apply(variables, X))

    plain = np.asarray(model.apply(variables, X))
    skipped = qt.QuantConfig(rules=(qt.Rule(".*", skip=True),))
    np.testing.assert_array_equal(output(variables, skipped), plain)
    assert not np.array_equal(output(variables, config), plain)
    finer = dataclasses.replace(config, rules=(qt.Rule(".*", weights=qt.QuantSpec(8)),))
    np.testing.assert_array_equal(
        output(variables, finer), output(variables, qt.QuantConfig(weights=qt.QuantSpec(8)))
    )


@pytest.mark.parametrize(
    "config",
    [
        qt.QuantConfig(weights=qt.QuantSpec(9)),
        qt.QuantConfig(activations=qt.QuantSpec(4)),
        qt.QuantConfig(weights=None),
        qt.QuantConfig(rules=(qt.Rule("head", inputs=None),)),
    ],
)
def test_what_qwix_cannot_do_is_refused(config):
    with pytest.raises(qt.InvalidInput, match="Qwix puts the kernel of"):
        qwix_model(Net(), config)
