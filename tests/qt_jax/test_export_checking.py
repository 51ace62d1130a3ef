"""Check the comparison of a graph with its forward where the outputs tell little, and sessions that share."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import qt_jax as qt
from qt_jax.export import checking
from qt_jax.export.sessions import open_session, open_unoptimized

SHAPE = (6,)


class ZeroHead(nn.Module):
    """Apply a head that begins at zero, as many networks have it, after a hidden layer."""

    @nn.compact
    def __call__(self, x, gain=1.0):
        hidden = nn.relu(nn.Dense(8, name="hidden")(x)) * gain
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name="head")(hidden)


def compare(graph_of, forward, variables=None, shape=SHAPE, **options):
    """Compare the graph of one function with another function."""
    variables = variables or {}

    def convert(variables):
        return qt.to_onnx(graph_of, variables, shape, check=False, **options)

    checking.check_numbers(
        convert(variables),
        forward,
        variables,
        shape,
        layout="nchw",
        dynamic_batch=options.get("dynamic_batch", True),
        output_names=None,
        passes=(),
        convert=convert,
    )


@pytest.fixture
def fresh():
    net = ZeroHead()
    return net, net.init(jax.random.key(0), jnp.ones((1, *SHAPE)))


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_a_head_of_zeros_hides_no_fault_before_it(fresh, dynamic_batch):
    net, variables = fresh

    def wrong(variables, x):
        return net.apply(variables, x, gain=2.0)

    with pytest.raises(qt.InvalidInput, match="'logits' differs from the JAX forward"):
        compare(wrong, net.apply, variables, dynamic_batch=dynamic_batch)
    compare(net.apply, net.apply, variables, dynamic_batch=dynamic_batch)


def test_the_graph_of_a_head_of_zeros_keeps_them(fresh):
    net, variables = fresh
    model = qt.to_onnx(net.apply, variables, SHAPE)
    kernel = next(t for t in model.graph.initializer if t.name == "head/kernel")
    assert not onnx.numpy_helper.to_array(kernel).any()


SILENT_AT_FIRST = {
    "large inputs only": (lambda _, x: nn.relu(x - 5.0), lambda _, x: nn.relu(x - 5.0) * 1.01),
    "positive inputs only": (
        lambda _, x: jnp.log(x.min(-1, keepdims=True) - x.max(-1, keepdims=True) + 0.9),
        lambda _, x: jnp.log(x.min(-1, keepdims=True) - x.max(-1, keepdims=True) + 0.9) * 1.01,
    ),
    "whole numbers of NaN": (
        lambda _, x: (1e3 * jnp.sqrt(x)).astype(jnp.int32),
        lambda _, x: (1e3 * jnp.sqrt(x) + 1.0).astype(jnp.int32),
    ),
}


@pytest.mark.parametrize("name", SILENT_AT_FIRST)
def test_other_inputs_are_drawn_where_the_first_tell_nothing(name):
    right, wrong = SILENT_AT_FIRST[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(right, right)
    with pytest.raises(qt.InvalidInput, match="differs from the JAX forward"):
        compare(wrong, right)


@pytest.mark.parametrize(
    "forward",
    [
        lambda _, x: jnp.sign(x * x + 1.0),
        lambda _, x: jnp.sqrt(-1.0 - x * x),
        lambda _, x: jnp.sqrt(-1.0 - x * x).astype(jnp.int32),
    ],
    ids=["constant", "NaN", "whole number of NaN"],
)
def test_an_output_that_never_tells_is_named_in_a_warning(forward):
    with pytest.warns(
        UserWarning, match="output 'logits' is the same, or NaN, .* call verify on real inputs"
    ):
        qt.to_onnx(forward, {}, SHAPE)


def test_a_whole_number_that_is_wrong_without_nan_is_refused():
    with pytest.raises(qt.InvalidInput, match="differs from the JAX forward"):
        compare(lambda _, x: (10 * x).astype(jnp.int32) + 1, lambda _, x: (10 * x).astype(jnp.int32))


def test_a_session_that_shares_weights_computes_the_same(fresh):
    net = nn.Dense(64)
    variables = net.init(jax.random.key(1), jnp.ones((1, 128)))
    model = qt.to_onnx(net.apply, variables, (128,))
    x = np.random.default_rng(2).normal(size=(4, 128)).astype(np.float32)
    kernel, bias = (np.asarray(variables["params"][name], np.float64) for name in ("kernel", "bias"))
    before = model.SerializeToString()
    for session in (open_unoptimized(model), open_session(model, optimize=False)):
        np.testing.assert_allclose(session.run(None, {"input": x})[0], x @ kernel + bias, atol=1e-5)
    assert model.SerializeToString() == before


def test_shared_weights_outlive_the_model():
    net = nn.Dense(64, use_bias=False)
    variables = net.init(jax.random.key(1), jnp.ones((1, 128)))
    session = open_unoptimized(qt.to_onnx(net.apply, variables, (128,)))
    churn = [np.full(64 * 128, i, np.float32) for i in range(64)]
    x = np.eye(128, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"input": x})[0], variables["params"]["kernel"])
    assert len(churn) == 64


class Scaled(nn.Module):
    """Multiply by a number that begins at zero, before a head that does."""

    @nn.compact
    def __call__(self, x):
        hidden = x + self.param("alpha", nn.initializers.zeros, ()) * nn.Dense(6)(x)
        return nn.Dense(3, kernel_init=nn.initializers.zeros)(hidden)


class Overflowing(nn.Module):
    """Overflow unless a parameter is zero, before a head that begins at zero."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(4, kernel_init=nn.initializers.zeros)(x)
        return hidden * jnp.exp(500.0 * self.param("log_scale", nn.initializers.zeros, (1, 4)))


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_a_parameter_without_axes_may_be_zero(dynamic_batch):
    variables = Scaled().init(jax.random.key(0), jnp.ones((1, *SHAPE)))
    qt.to_onnx(Scaled().apply, variables, SHAPE, dynamic_batch=dynamic_batch)


def test_parameters_with_which_the_forward_overflows_are_no_reason_to_refuse():
    variables = Overflowing().init(jax.random.key(0), jnp.ones((1, *SHAPE)))
    with pytest.warns(UserWarning, match="says little"):
        qt.to_onnx(Overflowing().apply, variables, SHAPE)


def test_a_fixed_batch_of_one_number_is_compared_without_a_warning():
    net = nn.Dense(1)
    variables = net.init(jax.random.key(0), jnp.ones((1, *SHAPE)))
    qt.to_onnx(net.apply, variables, SHAPE, dynamic_batch=False)
    qt.to_onnx(lambda _, x: x.sum(-1), {}, SHAPE, dynamic_batch=False)


def test_bytes_may_be_tokens():
    net = nn.Embed(50, 8)
    tokens = jnp.arange(6, dtype=jnp.uint8)[None]
    variables = net.init(jax.random.key(0), tokens)
    model = qt.to_onnx(net.apply, variables, jax.ShapeDtypeStruct(SHAPE, jnp.uint8))
    qt.export.verify(model, net.apply, variables, np.asarray(tokens).repeat(3, 0), batch_sizes=(1, 3))
