"""Check that random small Linen networks export and agree with JAX.

The seed in a test's name draws the network. Each step is drawn while the network is traced, from a generator
that starts at the seed anew for every trace, so a step knows the shape it works on.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

Draw = np.random.Generator
Apply = Callable[[Draw, jax.Array], jax.Array]

FAST, SLOW = 16, 420
MOST_PIXELS, MOST_CHANNELS = 400, 24
EPSILON = 0.1
"""Epsilon of norms over one image. Near the usual 1e-6 two equal channels make a step of any forward."""

ACTIVATIONS = (
    nn.relu,
    nn.relu6,
    nn.hard_swish,
    nn.swish,
    nn.gelu,
    lambda x: nn.gelu(x, approximate=False),
    nn.leaky_relu,
    nn.elu,
    nn.sigmoid,
    nn.hard_sigmoid,
    nn.tanh,
    nn.softplus,
    nn.celu,
    nn.selu,
    nn.soft_sign,
    nn.hard_tanh,
    nn.log_sigmoid,
    lambda x: nn.PReLU()(x),
    lambda x: jnp.clip(x, -1.0, 2.0),
    lambda x: jnp.square(nn.relu(x)),
    jnp.abs,
)


def pick(rng: Draw, *choices):
    return choices[rng.integers(len(choices))]


def divisor(rng: Draw, number: int) -> int:
    return pick(rng, *(d for d in range(1, number + 1) if number % d == 0))


def window(rng: Draw, x: jax.Array, widest: int = 4) -> tuple[int, int]:
    return tuple(int(rng.integers(1, min(widest, size) + 1)) for size in x.shape[1:3])


def strides(rng: Draw) -> tuple[int, int]:
    return pick(rng, (1, 1), (1, 1), (2, 2), (2, 1), (1, 3))


def ends(rng: Draw, most: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(int(end) for end in rng.integers(0, size + 1, 2)) for size in most)


def conv(rng: Draw, x: jax.Array, stride: tuple[int, int] | None = None, **options) -> jax.Array:
    kernel = window(rng, x)
    dilation = pick(rng, (1, 1), (1, 1), (2, 2), (1, 2))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    paddings = ["SAME", "SAME", ends(rng, (2, 2)), int(rng.integers(0, 3)), "CIRCULAR"]
    fits = all(r <= size for r, size in zip(reach, x.shape[1:3], strict=True))
    padding = pick(rng, *paddings, "VALID") if fits else "SAME"
    groups = divisor(rng, x.shape[-1])
    given = {
        "features": groups * int(rng.integers(1, max(2, MOST_CHANNELS // groups // 2))),
        "kernel_size": kernel,
        "strides": stride or strides(rng),
        "padding": options.pop("padding", padding if fits else "SAME"),
        "kernel_dilation": dilation,
        "feature_group_count": groups,
        "use_bias": bool(rng.integers(2)),
    } | options
    if given["features"] % given["feature_group_count"]:
        given["feature_group_count"] = 1
    return nn.Conv(**given)(x)


def depthwise(rng: Draw, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    return conv(rng, x, features=channels, feature_group_count=channels)


def transposed(rng: Draw, x: jax.Array) -> jax.Array:
    kernel, padding = window(rng, x, 3), pick(rng, "SAME", "VALID", ends(rng, (2, 2)))
    features, bias = int(rng.integers(1, 8)), bool(rng.integers(2))
    if not isinstance(padding, str):  # of the dilated input, the kernel's reach and no more
        padding = tuple(
            (k - 1 - min(low, k // 2), k - 1) for (low, _), k in zip(padding, kernel, strict=True)
        )
    return nn.ConvTranspose(features, kernel, strides(rng), padding, use_bias=bias)(x)


def dense(rng: Draw, x: jax.Array) -> jax.Array:
    return nn.Dense(int(rng.integers(1, 12)), use_bias=bool(rng.integers(2)))(x)


def norm(rng: Draw, x: jax.Array) -> jax.Array:
    affine = {"use_scale": bool(rng.integers(4)), "use_bias": bool(rng.integers(4))}
    smooth = affine | {"epsilon": EPSILON}
    kind = pick(rng, "batch", "batch", "batch", "layer", "group", "instance", "rms")
    if kind == "batch":
        return nn.BatchNorm(use_running_average=True, epsilon=pick(rng, 1e-5, 1e-3), **affine)(x)
    if kind == "group":
        return nn.GroupNorm(divisor(rng, x.shape[-1]), **smooth)(x)
    if kind == "rms":
        return nn.RMSNorm(epsilon=EPSILON)(x)
    return {"layer": nn.LayerNorm, "instance": nn.InstanceNorm}[kind](**smooth)(x)


def activation(rng: Draw, x: jax.Array) -> jax.Array:
    return pick(rng, *ACTIVATIONS)(x)


def conv_norm(rng: Draw, x: jax.Array) -> jax.Array:
    x = nn.BatchNorm(use_running_average=True)(conv(rng, x))
    return activation(rng, x) if rng.integers(2) else x


def pool(rng: Draw, x: jax.Array) -> jax.Array:
    kernel = window(rng, x, 3)
    explicit = ends(rng, tuple(k // 2 for k in kernel))
    padding = pick(rng, "SAME", "VALID", explicit)
    if rng.integers(2):
        return nn.max_pool(x, kernel, strides(rng), padding)
    counted = not isinstance(padding, str) or bool(rng.integers(2))
    return nn.avg_pool(x, kernel, strides=strides(rng), padding=padding, count_include_pad=counted)


def branch(rng: Draw, x: jax.Array, **options) -> jax.Array:
    """Apply steps that keep the height and width of `x`."""
    y = activation(rng, conv(rng, x, (1, 1), padding="SAME"))
    return nn.BatchNorm(use_running_average=True)(conv(rng, y, (1, 1), padding="SAME", **options))


def residual(rng: Draw, x: jax.Array) -> jax.Array:
    return activation(rng, x + branch(rng, x, features=x.shape[-1]))


def strided_residual(rng: Draw, x: jax.Array) -> jax.Array:
    norms = [nn.BatchNorm(use_running_average=True) for _ in range(2)]
    features, stride = int(rng.integers(2, 12)), strides(rng)
    sides = [conv(rng, x, stride, padding="SAME", features=features, feature_group_count=1) for _ in norms]
    return nn.relu(norms[0](sides[0]) + norms[1](sides[1]))


def concat(rng: Draw, x: jax.Array) -> jax.Array:
    parts = [x, *(branch(rng, x) for _ in range(rng.integers(1, 3)))]
    return jnp.concatenate(parts if rng.integers(2) else parts[::-1], axis=-1)


def gate(rng: Draw, x: jax.Array) -> jax.Array:
    """Apply squeeze and excitation, by convolutions or dense layers, with axes kept or put back."""
    kept, dense, channels = bool(rng.integers(2)), bool(rng.integers(2)), x.shape[-1]
    gates = jnp.mean(x, axis=(1, 2), keepdims=kept)
    for features, act in ((max(1, channels // 2), nn.relu), (channels, nn.sigmoid)):
        layer = nn.Dense(features) if dense or not kept else nn.Conv(features, (1, 1))
        gates = act(layer(gates))
    return x * (gates if kept else gates[:, None, None, :])


def upsample(rng: Draw, x: jax.Array) -> jax.Array:
    sizes = [size + int(rng.integers(0, size + 3)) for size in x.shape[1:3]]
    method, antialias = pick(rng, "nearest", "bilinear", "bicubic"), bool(rng.integers(2))
    return jax.image.resize(x, (x.shape[0], *sizes, x.shape[3]), method, antialias=antialias)


def shuffle(rng: Draw, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    groups = divisor(rng, channels)
    split = x.reshape(batch, height, width, groups, channels // groups)
    return jnp.swapaxes(split, -1, -2).reshape(x.shape)


def crop(rng: Draw, x: jax.Array) -> jax.Array:
    (top, bottom), (left, right) = ends(rng, tuple(min(1, (size - 1) // 2) for size in x.shape[1:3]))
    x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
    return jnp.pad(x, ((0, 0), *ends(rng, (1, 1)), (0, 0))) if rng.integers(2) else x[:, :: pick(rng, 1, 2)]


def split(rng: Draw, x: jax.Array) -> jax.Array:
    if x.shape[-1] % 2:
        return -x
    left, right = jnp.split(x, 2, axis=-1)
    return left * nn.sigmoid(right) if rng.integers(2) else jnp.concatenate([right, nn.relu(left)], axis=-1)


def reduced(rng: Draw, x: jax.Array) -> jax.Array:
    """Combine what is kept along one axis with the whole."""
    axis, reduce = pick(rng, 1, 2, 3, (1, 2)), pick(rng, jnp.mean, jnp.max, jnp.min, jnp.sum)
    return x - 0.1 * reduce(x, axis=axis, keepdims=True)


def softmax(rng: Draw, x: jax.Array) -> jax.Array:
    return x * nn.softmax(x, axis=pick(rng, -1, 1, 2))


def attention(rng: Draw, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    heads = int(rng.integers(1, 4))
    tokens = nn.LayerNorm(epsilon=EPSILON)(x.reshape(batch, height * width, channels))
    attended = nn.MultiHeadDotProductAttention(heads, qkv_features=4 * heads)(tokens)
    return x + attended.reshape(x.shape)


class Standardised(nn.Conv):
    """Standardise its kernel whenever it is read, as BiT does."""

    def param(self, name, *arguments, **options):
        leaf = super().param(name, *arguments, **options)
        return (leaf - leaf.mean((0, 1, 2))) / (leaf.std((0, 1, 2)) + 0.1) if name == "kernel" else leaf


class Shifted(nn.Dense):
    """Add 1 to each of its parameters whenever they are read."""

    def param(self, name, *arguments, **options):
        return super().param(name, *arguments, **options) + 1.0


def transformed(rng: Draw, x: jax.Array) -> jax.Array:
    """Apply a layer that transforms its parameters, or one with an operator of its own."""
    kind = pick(rng, "conv", "dense", "weight norm", "dot_general", "convolution")
    features = int(rng.integers(1, 8))
    if kind == "conv":
        return Standardised(features, window(rng, x), use_bias=bool(rng.integers(2)))(x)
    if kind == "dense":
        return Shifted(features)(x)
    if kind == "weight norm":
        return nn.WeightNorm(nn.Dense(features))(x)
    if kind == "dot_general":

        def product(x, kernel, *rest, **options):
            return 0.5 * jax.lax.dot_general(jnp.abs(x), kernel, *rest, **options)

        return nn.Dense(features, dot_general=product)(x)

    def convolution(x, kernel, *rest, **options):
        return jax.lax.conv_general_dilated(x, jnp.tanh(kernel), *rest, **options)

    return nn.Conv(features, window(rng, x), conv_general_dilated=convolution)(x)


def joined(rng: Draw, x: jax.Array) -> jax.Array:
    """Merge axes with -1, work on what they make, and split them again."""
    batch, height, width, channels = x.shape
    if rng.integers(2):
        rows = jnp.reshape(x, (batch, -1, channels))
        return jnp.reshape(nn.relu(nn.Dense(channels)(rows)), (batch, height, width, -1))
    return jnp.reshape(jnp.tanh(jnp.reshape(x, (-1, width * channels))), (batch, height, -1, channels))


def mixed(rng: Draw, x: jax.Array) -> jax.Array:
    """Compute with whole numbers and truth values between floating ones."""
    kind = pick(rng, "steps", "class", "mask", "bounds")
    if kind == "steps":
        return x + 0.1 * jnp.floor(3.0 * jnp.tanh(x)).astype(jnp.int32)
    if kind == "class":
        best = jnp.argmax(x, axis=-1)
        return x * (best[..., None] == jnp.arange(x.shape[-1]))
    if kind == "mask":
        inside = (x > -0.3) & ~(x > 1.2) | (x == 0)
        return jnp.where(inside, x, jnp.where(x > 0, 1, -2))
    return jnp.minimum(jnp.maximum(x, -1), 6)


class Residue(nn.Module):
    """Apply a layer and a norm that `setup` makes."""

    features: int

    def setup(self):
        self.layers = [nn.Dense(self.features), nn.LayerNorm(epsilon=EPSILON)]

    def __call__(self, x, _=None):
        return x + nn.tanh(self.layers[1](self.layers[0](x))), None


def stacked(rng: Draw, x: jax.Array) -> jax.Array:
    """Apply a stack of layers by nn.scan, some by nn.remat, or a recurrent layer along the rows."""
    kind = pick(rng, "scan", "remat", "rows", "ensemble")
    if kind == "rows":
        states = nn.RNN(nn.SimpleCell(int(rng.integers(2, 6))))(x.mean(2))
        return x * nn.Dense(x.shape[-1])(states)[:, :, None]
    if kind == "ensemble":
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        return nn.vmap(nn.Dense, out_axes=-1, axis_size=3, **axes)(x.shape[-1])(x).mean(-1)
    layer = nn.remat(Residue) if kind == "remat" else Residue
    if kind == "remat":
        return layer(x.shape[-1])(x)[0]
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.scan(layer, length=int(rng.integers(1, 4)), **axes)(x.shape[-1])(x, None)[0]


STEPS: tuple[Apply, ...] = (
    *(conv, conv, conv_norm, conv_norm, conv_norm, depthwise, transposed, dense, norm, norm, activation),
    *(pool, pool, residual, residual, strided_residual, concat, gate, upsample, shuffle, crop, split),
    *(reduced, softmax, attention, transformed, transformed, joined, mixed, stacked),
)


def head(rng: Draw, x: jax.Array) -> jax.Array:
    kind = pick(rng, "mean", "mean", "max", "flat", "pixels", "tokens")
    if kind == "pixels":
        return nn.Conv(3, (1, 1))(x)
    if kind == "tokens":
        return nn.Dense(3)(x.reshape(x.shape[0], -1, x.shape[-1]))
    reduced = {"mean": jnp.mean, "max": jnp.max, "flat": lambda y, axis: y.reshape(y.shape[0], -1)}[kind]
    return nn.Dense(3)(reduced(x, axis=(1, 2)))


class Network(nn.Module):
    """Apply up to `steps` random steps and a head.

    A pool follows a step that makes the image too large, and a dense layer one that makes too many channels.
    """

    seed: int
    steps: int = 6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rng = np.random.default_rng(self.seed)
        for _ in range(rng.integers(1, self.steps + 1)):
            x = pick(rng, *STEPS)(rng, x)
            if x.shape[1] * x.shape[2] > MOST_PIXELS:
                x = nn.avg_pool(x, (3, 3), strides=(3, 3))
            if x.shape[-1] > MOST_CHANNELS:
                x = dense(rng, x)
        return head(rng, x)


SEEDS = [*range(FAST), *(pytest.param(s, marks=pytest.mark.slow) for s in range(FAST, SLOW))]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_agrees(seed, export):
    rng = np.random.default_rng([seed, 1])
    shape = (*(int(size) for size in rng.integers(5, 12, 2)), int(rng.integers(1, 5)))
    options = {
        "opset": int(rng.integers(13, 22)),
        "layout": pick(rng, "nchw", "nhwc"),
        "fold_batch_norm": bool(rng.integers(4)),
    }
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exported = export(Network(seed), shape, batch_sizes=(1, 3), **options)
    assert exported.summary["opset"] == options["opset"]
