"""Check the kinds of networks that an earlier converter got wrong without a word, refused, or crashed on.

`to_onnx` compares its numbers itself, so that a wrong graph is an error here; `verify` does it again on other
batches.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify
from qt_jax.export.emission import EMIT

OPSETS = (13, 17, 21)


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def draw(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 8, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def trained(variables):
    """Draw variables without zeros and ones."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.uniform(0.2, 1.2, np.shape(leaf)).astype(leaf.dtype), variables)


def right(net, shape, dtype=np.float32, opsets=OPSETS, variables=None, **options):
    """Export at every opset; return the last graph."""
    x = draw((7, *shape), dtype)
    variables = trained(net.init(jax.random.key(0), x)) if variables is None else variables
    spec = jax.ShapeDtypeStruct(shape, dtype)
    for opset in opsets:
        model = to_onnx(net.apply, variables, spec, opset=opset, **options)
        verify(model, net.apply, variables, x)
    return model


def transforming(kind, transform):
    """Make a class of a layer that transforms its parameters when they are read."""

    class Transforming(kind):
        def param(self, name, *arguments, **options):
            return transform(name, super().param(name, *arguments, **options))

    return Transforming


def standardised(name, leaf):
    if name != "kernel":
        return leaf
    axes = tuple(range(leaf.ndim - 1))
    return (leaf - leaf.mean(axes)) / (leaf.std(axes) + 1e-5)


def doubled(name, leaf):
    return 2.0 * leaf + 1.0


LAYERS = {
    "weight standardisation": (transforming(nn.Conv, standardised)(6, (3, 3), use_bias=False), (6, 5, 3)),
    "kernel of a dense layer": (transforming(nn.Dense, standardised)(4), (3,)),
    "bias of a dense layer": (transforming(nn.Dense, doubled)(4), (3,)),
    "DenseGeneral": (transforming(nn.DenseGeneral, doubled)((2, 4), axis=(-2, -1)), (5, 3)),
    "Einsum": (transforming(nn.Einsum, doubled)((3, 2, 4), "btd,dhk->bthk"), (5, 3)),
    "ConvTranspose": (transforming(nn.ConvTranspose, doubled)(4, (3, 3), (2, 2)), (4, 5, 2)),
    "layer norm": (transforming(nn.LayerNorm, doubled)(), (5, 6)),
    "RMS norm": (transforming(nn.RMSNorm, doubled)(), (5, 6)),
    "group norm": (transforming(nn.GroupNorm, doubled)(2), (4, 5, 6)),
    "batch norm": (transforming(nn.BatchNorm, doubled)(use_running_average=True), (4, 5, 6)),
    "embedding": (transforming(nn.Embed, doubled)(8, 4), (5,), np.int32),
    "a dot_general of one's own": (
        nn.Dense(4, dot_general=lambda x, k, *rest, **options: 2.0 * jax.lax.dot_general(x, k, *rest)),
        (3,),
    ),
    "a convolution of one's own": (
        nn.Conv(
            4,
            (3, 3),
            conv_general_dilated=lambda x, k, *rest, **options: jax.lax.conv_general_dilated(
                x, jnp.tanh(k), *rest, **options
            ),
        ),
        (5, 4, 3),
    ),
    "weight norm": (nn.WeightNorm(nn.Dense(4)), (3,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_transform_their_parameters(name):
    net, shape, *dtype = LAYERS[name]
    right(net, shape, *dtype)


class Body(nn.Module):
    body: object

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        return nn.vmap(nn.Dense, out_axes=1, axis_size=3, **axes)(4)(x)


class Sentiment(nn.Module):
    """Read a sequence in both directions, up to a length, as the public example of Flax does."""

    @nn.compact
    def __call__(self, x):
        lengths = jnp.clip(jnp.sum(x[..., 0] > 0, axis=1).astype(jnp.int32), 1, x.shape[1])
        mask = (jnp.arange(x.shape[1])[None] < lengths[:, None]).astype(x.dtype)[..., None]
        backward = nn.RNN(nn.OptimizedLSTMCell(4), reverse=True, keep_order=True)
        both = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(4)), backward)(x * mask)
        return nn.Dense(2)(both.mean(1))


class Sampled(nn.Module):
    """Draw a code as a variational autoencoder does, with a key that is a constant of the model."""

    @nn.compact
    def __call__(self, x):
        noise = jax.random.normal(jax.random.key(7), (4,))
        return nn.Dense(3)(nn.Dense(4)(x) + 0.1 * noise)


class Stack(nn.Module):
    """Apply a stack of equal layers with nn.scan."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.tanh(nn.Dense(6, name="dense")(nn.LayerNorm(name="norm")(x))), None

        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="layers")(x, None)[0]


PLAIN = {
    "reshape to (batch, -1)": (lambda m, x: nn.Dense(3)(jnp.reshape(x, (x.shape[0], -1))), (4, 5, 3)),
    "reshape to (batch, -1) as output": (lambda m, x: jnp.reshape(x, (x.shape[0], -1)), (4, 5, 3)),
    "reshape to (batch, -1, channels)": (
        lambda m, x: jnp.reshape(nn.Conv(4, (3, 3))(x), (x.shape[0], -1, 4)),
        (4, 5, 3),
    ),
    "reshape back": (
        lambda m, x: nn.Conv(2, (1, 1))(jnp.reshape(jnp.reshape(x, (x.shape[0], -1, 3)) * 2, x.shape)),
        (4, 5, 3),
    ),
    "bounds of whole numbers": (lambda m, x: jnp.minimum(jnp.maximum(x, 0), 6), (5,)),
    "an einsum of an int and a float": (
        lambda m, x: x + jnp.sin(jnp.einsum("m,d->md", jnp.arange(4), 1.0 / jnp.arange(1, 7))),
        (4, 6),
    ),
    "edge padding": (
        lambda m, x: nn.Conv(2, (3, 3), padding="VALID")(
            jnp.pad(x, ((0, 0), (1, 1), (2, 1), (0, 0)), mode="edge")
        ),
        (4, 5, 3),
    ),
    "reflected padding": (
        lambda m, x: jnp.pad(x, ((0, 0), (1, 1), (2, 1), (0, 0)), mode="reflect"),
        (4, 5, 3),
    ),
    "circular padding": (lambda m, x: nn.Conv(2, (3, 3), padding="CIRCULAR")(x), (4, 5, 3)),
    "wrapped padding": (lambda m, x: jnp.pad(x, ((0, 0), (1, 2)), mode="wrap"), (5,)),
    "a transposed kernel": (
        lambda m, x: nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True)(x),
        (4, 5, 3),
    ),
    "batch norm over the second axis": (lambda m, x: nn.BatchNorm(True, axis=1)(x), (4, 5)),
    "tile": (lambda m, x: jnp.tile(nn.Dense(4)(x), (1, 2, 3)), (5, 3)),
    "tile of channels": (lambda m, x: nn.Conv(4, (3, 3))(jnp.tile(x, (1, 1, 1, 2))), (4, 5, 3)),
    "repeat": (lambda m, x: jnp.repeat(nn.Dense(4)(x), 2, axis=1), (5, 3)),
    "minimum pooling": (
        lambda m, x: nn.Conv(2, (1, 1))(nn.pool(x, jnp.inf, jax.lax.min, (2, 2), (2, 2), "VALID")),
        (4, 6, 3),
    ),
    "a pool of odd windows": (lambda m, x: nn.max_pool(x, (3, 2), (2, 1), ((1, 1), (0, 1))), (5, 6, 3)),
    "a mean that leaves the pads out": (
        lambda m, x: nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False),
        (6, 5, 3),
    ),
    "vmap over the images": (
        lambda m, x: jax.vmap(lambda image: jnp.tanh(image).mean((0, 1)))(nn.Conv(4, (3, 3))(x)),
        (4, 5, 3),
    ),
    "a choice by a mask": (
        lambda m, x: nn.softmax(jnp.where(jnp.tril(jnp.ones((5, 5), bool)), nn.Dense(5)(x), -1e9)),
        (5, 3),
    ),
    "normalised rows": (lambda m, x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), (4, 6)),
    "a hand-written norm": (
        lambda m, x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3),
        (4, 6),
    ),
    "log of a softmax": (lambda m, x: jnp.log(nn.softmax(x)), (6,)),
    "rolled": (lambda m, x: jnp.roll(x, (1, 2), (1, 2)), (4, 5, 3)),
    "flipped": (lambda m, x: x[:, ::-1, :, ::-1], (4, 5, 3)),
    "entries of a list": (lambda m, x: x[:, jnp.array([2, 0, 2])], (4, 5)),
    "the last entry": (lambda m, x: nn.Dense(2)(x[:, -1]), (4, 5)),
    "a matrix on the left": (lambda m, x: jnp.einsum("nm,bmc->bnc", jnp.ones((3, 4)) * 0.5, x), (4, 5)),
    "a bilinear form": (lambda m, x: jnp.einsum("bi,bj->bij", x, 2 * x), (4,)),
    "two contracted axes": (lambda m, x: jnp.einsum("bhwc,bhwd->bcd", x, x[..., :2]), (3, 4, 5)),
    "bicubic": (lambda m, x: jax.image.resize(x, (x.shape[0], 7, 6, 3), "bicubic"), (4, 3, 3)),
    "bilinear, smaller": (lambda m, x: jax.image.resize(x, (x.shape[0], 3, 2, 3), "bilinear"), (8, 6, 3)),
    "lanczos": (lambda m, x: jax.image.resize(x, (x.shape[0], 8, 6, 3), "lanczos3"), (4, 3, 3)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks(name):
    body, shape = PLAIN[name]
    right(Body(body), shape)


MODULES = {
    "ensemble": (Ensemble(), (5,)),
    "both directions": (Sentiment(), (5, 3)),
    "a key as a constant": (Sampled(), (5,)),
    "a stack by scan": (Stack(), (4, 6)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    right(*MODULES[name])


def test_vmap_of_apply():
    net = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(2, (1, 1))])
    x = draw((3, 5, 4, 3))
    variables = net.init(jax.random.key(0), x[0])

    def apply(variables, x):
        return jax.vmap(partial(net.apply, variables))(x)

    verify(to_onnx(apply, variables, (5, 4, 3)), apply, variables, x, batch_sizes=(1, 3))


@pytest.mark.parametrize("features", [(6,), (6, 5), (4, 5, 6)])
def test_batch_norm_by_the_statistics_of_the_batch(features):
    """The graph computes what the model does: with the batch's own statistics, in inference too."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, use_fast_variance=False)(x)

    net, x = Net(), draw((7, *features))
    variables = trained(net.init(jax.random.key(0), x))

    def apply(variables, x):
        return net.apply(variables, x, mutable=["batch_stats"])[0]

    model = to_onnx(apply, variables, features)
    found = onnxruntime.InferenceSession(model.SerializeToString())
    fed = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    (made,) = found.run(None, {"input": fed})
    wanted = apply(variables, x)
    np.testing.assert_allclose(made.transpose(0, 2, 3, 1) if x.ndim == 4 else made, wanted, atol=1e-4)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16])
def test_parameters_of_fewer_bits(stored):
    net = nn.Sequential(
        [nn.Conv(4, (3, 3), param_dtype=stored), nn.relu, nn.Conv(2, (1, 1), param_dtype=stored)]
    )
    x = draw((7, 5, 4, 3))
    right(net, (5, 4, 3), variables=net.init(jax.random.key(0), x))


def test_boxed_parameters():
    make = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    net = nn.Sequential([nn.Dense(4, kernel_init=make), nn.relu, nn.Dense(2, kernel_init=make)])
    variables = net.init(jax.random.key(0), draw((1, 3)))
    assert isinstance(variables["params"]["layers_0"]["kernel"], nn.Partitioned)
    model = to_onnx(net.apply, variables, (3,))
    assert {tensor.name for tensor in model.graph.initializer} >= {"layers_0/kernel", "layers_2/bias"}


def test_a_wrong_graph_is_refused_and_the_module_named(monkeypatch):
    """An operator that computes something else is found at the first module that uses it."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(4, name="dense")(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(Inner(name="inner")(nn.Dense(3, name="first")(x)))

    net = Net()
    variables = net.init(jax.random.key(0), draw((1, 5)))
    monkeypatch.setitem(
        EMIT, "tanh", lambda emitter, value: emitter.add("Sin", [emitter.name(value.operands[0])])
    )
    with pytest.raises(
        InvalidInput, match=r"output 'logits' differs .*first module .* is 'inner', by .*check=False"
    ):
        to_onnx(net.apply, variables, (5,))
    to_onnx(net.apply, variables, (5,), check=False)


def test_a_network_that_amplifies_rounding_is_not_refused():
    """Two images in float32 that nothing but rounding tells apart may differ in what such a network says."""
    net = Body(lambda m, x: jnp.sin(1e4 * nn.Dense(3)(x)))
    variables = net.init(jax.random.key(0), draw((1, 5)))
    to_onnx(net.apply, variables, (5,))


TABLE = draw((10, 4))
TOKENS = jax.ShapeDtypeStruct((5,), np.int32)
REFUSED = {
    "entries beyond the end": (lambda x: jnp.take(x, jnp.array([0, 99]), axis=1), (5,), "may lie outside"),
    "filled entries": (
        lambda i: jnp.asarray(TABLE).at[i].get(mode="fill", fill_value=0.0, wrap_negative_indices=False),
        TOKENS,
        "may lie outside",
    ),
    "the first two of the batch": (lambda x: x - x[:2].mean(0), (5,), "takes a part of the batch"),
    "the first of the batch": (lambda x: x - x[:1], (5,), "takes a part of the batch"),
    "the last of the batch": (lambda x: x - x[-1:], (5,), "takes a part of the batch|batch size"),
    "whole numbers and the batch": (lambda i: i + 2 * i.shape[0], TOKENS, "computes with the batch size"),
    "one or several": (lambda x: x if x.shape[0] == 1 else x - 1, (5,), "computes with the batch size"),
    "the batch beside a mask": (
        lambda x: jnp.where(x > 0, x + 2 * jnp.ones(x.shape[0]).sum(), -1e9),
        (5,),
        "batch|differs from the JAX forward",
    ),
    "powers of whole numbers": (lambda i: i**5, TOKENS, "power 5 of whole numbers"),
    "negative pads of a pool": (
        lambda x: nn.max_pool(x, (2, 2), (1, 1), ((-1, 0), (0, 0))),
        (6, 6, 2),
        "has no operator in ONNX",
    ),
    "tokens that 0 and 1 are not": (lambda i: jnp.asarray(TABLE)[i + 9], TOKENS, "pass check=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_for_other_inputs_is_refused(name):
    body, shape, says = REFUSED[name]
    with pytest.raises(InvalidInput, match=says):
        to_onnx(lambda _, x: body(x), {}, shape)


VARIANCE = jnp.arange(1.0, 4.0)
FUNCTIONS = {
    "an offset by hand": (lambda i: jnp.asarray(TABLE)[jnp.where(i < 0, i + 3, i)], TOKENS),
    "clipped entries": (lambda i: jnp.take(jnp.asarray(TABLE), 16 * i - 1, axis=0, mode="clip"), TOKENS),
    "int64 tokens": (lambda i: jnp.asarray(TABLE)[i], jax.ShapeDtypeStruct((5,), np.int64)),
    "statistics of the second axis": (
        lambda x: (x - 0.5) * jax.lax.rsqrt(VARIANCE + 1e-5).reshape(1, 3, 1, 1),
        (3, 5, 5),
    ),
    "a gain of the middle axis": (
        lambda x: (x - 0.5) * (jax.lax.rsqrt(VARIANCE + 1e-5) * VARIANCE).reshape(1, 3, 1),
        (3, 3),
    ),
    "sizes that look like the batch": (lambda x: x[:, 1009:], (3000,)),
    "entries that look like the batch": (lambda x: x[:, jnp.array([5, 1009, 7])], (3000,)),
    "a mask of -1e9": (lambda x: jnp.where(x > 0, x, -1e9), (5,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_without_modules(name):
    body, shape = FUNCTIONS[name]
    to_onnx(lambda _, x: body(x), {}, shape)


def test_keys_may_change_their_names():
    def apply(_, x):
        return {"a": x + 1, "b": x * 2}

    model = to_onnx(apply, {}, (5,), output_names={"a": "b", "b": "a"})
    x = draw((2, 5))
    named = dict(zip([entry.name for entry in model.graph.output], (x + 1, x * 2), strict=True))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for name, wanted in named.items():
        np.testing.assert_allclose(session.run([name], {"input": x})[0], wanted, rtol=1e-6)


def test_where_jax_is_the_inexact_side_the_graph_is_right():
    """The variance E[x^2] - E[x]^2 cancels far from zero, and LayerNormalization does not."""
    net = nn.LayerNorm()
    variables = net.init(jax.random.key(0), draw((1, 64)))
    to_onnx(lambda v, x: net.apply(v, 0.1 * x + 10), variables, (64,))


@pytest.mark.parametrize(
    ("given", "name"),
    [({"output_names": ["Mul#0/0"]}, "Mul#0/0"), ({"input_names": ["batch_size"]}, "batch_size")],
)
def test_names_that_the_graph_uses_inside_are_refused(given, name):
    with pytest.raises(InvalidInput, match=f"{name}.*uses inside"):
        to_onnx(lambda _, x: 2 * x, {}, (5,), **given)
