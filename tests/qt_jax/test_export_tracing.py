"""Check forwards that turn arrays into Python numbers: right where no input reaches them, else refused."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify

X = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


class Rates(nn.Module):
    """Compute the rates of drop path as many networks do, around a scan and a dropout."""

    @nn.compact
    def __call__(self, x):
        for rate in [rate.item() for rate in jnp.linspace(0.1, 0.3, 3)]:
            x = nn.Dropout(rate, deterministic=True)(nn.tanh(nn.Dense(4)(x)) * (1 - rate))
        steps = jnp.arange(4.0)[None]
        return jax.lax.scan(lambda y, _: (y * 0.5 + steps, None), x, length=3)[0]


@pytest.mark.parametrize("opset", [13, 21])
def test_constants_may_become_python_numbers(opset):
    net = Rates()
    variables = net.init(jax.random.key(0), X)
    model = to_onnx(net.apply, variables, (4,), opset=opset)
    verify(model, net.apply, variables, X, batch_sizes=(1, 3))


def test_a_constant_that_holds_the_batch_is_refused():
    def apply(_, x):
        return x * float(jnp.asarray(x.shape[0]) * 2) + jnp.asarray([[x.shape[0], 2.0, 3.0, 4.0]])

    with pytest.raises(InvalidInput, match="batch size"):
        to_onnx(apply, {}, (4,))


def test_another_thread_traces_as_usual():
    seen = []

    def look():
        seen.append(str(jax.make_jaxpr(lambda y: y + jnp.ones(3).sum())(1.0)).count("reduce_sum"))

    def apply(_, x):
        half = jnp.linspace(0, 1, 3)[1].item()
        other = threading.Thread(target=look)
        other.start()
        other.join()
        return x * half

    to_onnx(apply, {}, (4,))
    look()
    assert set(seen) == {1}


@pytest.mark.parametrize("of", ["an input", "a parameter"])
def test_the_line_that_needs_a_number_is_named(of):
    class Needy(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, ())
            return x * float(x.mean() if of == "an input" else scale)

    net = Needy()
    with pytest.raises(InvalidInput, match=r"test_export_tracing\.py, line \d+: `return x \* float\(x.mean"):
        to_onnx(net.apply, net.init(jax.random.key(0), X), (4,))


def test_a_parameter_that_holds_the_batch_is_named_so():
    class Positions(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("positions", nn.initializers.ones, x.shape)

    net = Positions()
    variables = net.init(jax.random.key(0), X[:1])
    with pytest.raises(InvalidInput, match=r"tied to the batch size.*dynamic_batch=False") as caught:
        to_onnx(net.apply, variables, (4,))
    assert "1009" not in str(caught.value)
    model = to_onnx(net.apply, variables, (4,), dynamic_batch=False)
    verify(model, net.apply, variables, X, batch_sizes=(1,))
