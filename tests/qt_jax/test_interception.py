"""Check the one interceptor that all others are made of: what it calls the handler for, and when."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from qt_jax.interception import Call, intercept, shadowed


class Outer(nn.Module):
    """Call one layer twice, and offer a second method."""

    def setup(self):
        self.layer = nn.Dense(3)

    def __call__(self, x):
        return self.layer(self.layer(x))

    def encode(self, x):
        return self.layer(x)


class Doubled(nn.Dense):
    """Call the layer that it inherits from."""

    @nn.compact
    def __call__(self, inputs):
        return 2.0 * super().__call__(inputs)


class DoubledNorm(nn.BatchNorm):
    """Call the batch norm that it inherits from."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2.0 * super().__call__(x, use_running_average)


X = jnp.arange(6.0).reshape(2, 3)


def paths(model, *, every_method=False, **options):
    """Return the paths that a handler is run for in one forward pass."""
    variables, seen = model.init(jax.random.key(0), X), []

    def note(call: Call, /, *args, **kwargs):
        seen.append(call.path)
        return call(*args, **kwargs)

    with intercept(note, every_method=every_method):
        model.apply(variables, X, **options)
    return seen


def test_each_call_of_each_module_is_handled():
    assert paths(Outer()) == ["", "layer", "layer"]


def test_other_methods_are_handled_only_on_request():
    assert paths(Outer(), method="encode") == ["layer"]
    assert set(paths(Outer(), method="encode", every_method=True)) == {"", "layer"}
    assert len(paths(Outer(), method="encode", every_method=True)) > 2  # setup and encode


def test_an_inherited_call_is_handled_once():
    assert paths(Doubled(3)) == [""]
    assert paths(Doubled(3), every_method=True).count("") > 1


def test_the_handler_decides_about_arguments_and_outputs():
    layer = nn.Dense(3)
    variables = layer.init(jax.random.key(0), X)

    def halve(call: Call, /, *args, **kwargs):
        return 5.0 + call(args[0] / 2, *args[1:], **kwargs)

    with intercept(halve):
        changed = layer.apply(variables, X)
    np.testing.assert_array_equal(changed, 5.0 + layer.apply(variables, X / 2))
    np.testing.assert_array_equal(layer.apply(variables, X), nn.Dense(3).apply(variables, X))


def test_the_inner_context_is_closest_to_the_module():
    order = []

    def noting(name):
        def note(call: Call, /, *args, **kwargs):
            order.append(name)
            return call(*args, **kwargs)

        return note

    with intercept(noting("outer")), intercept(noting("inner")):
        nn.Dense(3).init(jax.random.key(0), X)
    assert order == ["outer", "inner"]


def test_a_handler_that_fails_leaves_the_next_call_intact():
    seen = []

    def fail_once(call: Call, /, *args, **kwargs):
        seen.append(call.path)
        if len(seen) == 1:
            raise RuntimeError("first")
        return call(*args, **kwargs)

    layer = nn.Dense(3)
    with intercept(fail_once):
        with pytest.raises(RuntimeError, match="first"):
            layer.init(jax.random.key(0), X)
        layer.init(jax.random.key(0), X)
    assert seen == ["", ""]


def test_fields_are_restored_also_after_an_error():
    layer = nn.Dense(2)
    with pytest.raises(RuntimeError, match="inside"), shadowed(layer, features=5, use_bias=False):
        assert (layer.features, layer.use_bias) == (5, False)
        raise RuntimeError("inside")
    assert (layer.features, layer.use_bias) == (2, True)


class Folded(nn.Module):
    """Put a batch norm behind a layer; both call what they inherit."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Doubled(4, use_bias=False, name="layer")(x)
        return DoubledNorm(use_running_average=not train, name="norm")(x)


def test_subclasses_are_measured_and_folded_as_their_parents_are():
    """An inherited call that was handled again hid the gain and spoiled the batch norm's statistics."""
    model, x = Folded(), jax.random.normal(jax.random.key(1), (50, 3))
    variables = model.init(jax.random.key(0), x)
    fusion = qt.find_fusion(model, variables, x)
    assert (fusion.layers, fusion.outputs) == (("layer",), ())
    found = qt.reestimate_batch_norm(
        lambda variables, x: model.apply(variables, x, True, mutable=["batch_stats"]), variables, [x]
    )["batch_stats"]["norm"]
    inputs = 2.0 * x @ variables["params"]["layer"]["kernel"]
    np.testing.assert_allclose(found["mean"], inputs.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["var"], inputs.var(0), rtol=1e-4)
