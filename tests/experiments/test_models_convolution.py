"""Compare depthwise and pointwise convolutions for CPUs with JAX's own, and check what is left to JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import convolution

CHANNELS = 6
LAYOUT = ("NHWC", "HWIO", "NHWC")


def operands(window=(3, 3), outputs=CHANNELS, groups=CHANNELS, dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = (2, 9, 8, CHANNELS), (*window, CHANNELS // groups, outputs)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def jaxpr_of(*arguments, **options):
    function = jax.make_jaxpr(lambda x, w: convolution.conv_general_dilated(x, w, *arguments, **options))
    return lambda x, w: str(function(x, w))


@pytest.mark.parametrize(
    ("window", "strides", "padding", "dilation"),
    [
        ((3, 3), (1, 1), "SAME", None),
        ((3, 3), (2, 2), "SAME", (1, 1)),
        ((5, 5), (2, 2), ((2, 2), (2, 2)), (1, 1)),
        ((3, 3), (1, 1), "VALID", (2, 3)),
        ((2, 3), (2, 3), ((0, 1), (2, 0)), (2, 1)),
        ((3, 3), (1, 2), ((-1, 1), (0, -2)), (1, 1)),
    ],
    ids=["same", "same-stride", "explicit", "dilated", "asymmetric", "cropped"],
)
def test_values_and_gradients_are_those_of_jax(window, strides, padding, dilation):
    images, kernel = operands(window)
    options = {
        "rhs_dilation": dilation,
        "dimension_numbers": LAYOUT,
        "feature_group_count": CHANNELS,
        "precision": None,
    }

    def both_directions(convolve):
        output, pull = jax.vjp(lambda x, w: convolve(x, w, strides, padding, **options), images, kernel)
        return output, *pull(jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape))

    ours, theirs = (
        jax.jit(both_directions, static_argnums=0)(convolve)
        for convolve in (convolution.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0), (0, 0))], ids=str)
def test_pointwise_values_and_gradients_are_those_of_jax(padding):
    images, kernel = operands((1, 1), outputs=5, groups=1)

    def both_directions(convolve):
        output, pull = jax.vjp(
            lambda x, w: convolve(x, w, (1, 1), padding, dimension_numbers=LAYOUT), images, kernel
        )
        return output, *pull(jnp.cos(output))

    ours, theirs = map(both_directions, (convolution.conv_general_dilated, jax.lax.conv_general_dilated))
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-4)
    product = jaxpr_of((1, 1), padding, dimension_numbers=LAYOUT)(images, kernel)
    assert "dot_general" in product and "conv_general_dilated" not in product


@pytest.mark.parametrize(
    ("strides", "padding"), [((2, 2), "VALID"), ((1, 1), ((1, 1), (1, 1)))], ids=["strided", "padded"]
)
def test_other_pointwise_convolutions_go_to_jax(strides, padding):
    images, kernel = operands((1, 1), outputs=5, groups=1)
    assert "conv_general_dilated" in jaxpr_of(strides, padding, dimension_numbers=LAYOUT)(images, kernel)


def test_no_grouped_convolution_is_left_for_xla():
    jaxpr = jaxpr_of((1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=CHANNELS)
    assert "conv_general_dilated" not in jaxpr(*operands())


@pytest.mark.parametrize(
    ("operand_options", "options"),
    [
        ({"groups": 1}, {}),
        ({"groups": 2}, {"feature_group_count": 2}),
        ({"outputs": 2 * CHANNELS}, {"feature_group_count": CHANNELS}),
        ({"dtype": jnp.bfloat16}, {"feature_group_count": CHANNELS}),
        ({}, {"feature_group_count": CHANNELS, "lhs_dilation": (2, 2)}),
        (
            {},
            {"feature_group_count": CHANNELS, "batch_group_count": 1, "preferred_element_type": jnp.float32},
        ),
    ],
    ids=["dense", "grouped", "multiplier", "bfloat16", "upsampled", "element-type"],
)
def test_everything_else_goes_to_jax(operand_options, options):
    jaxpr = jaxpr_of((1, 1), ((1, 1), (1, 1)), dimension_numbers=LAYOUT, **options)
    assert "conv_general_dilated" in jaxpr(*operands(**operand_options))


def test_channels_first_goes_to_jax():
    images, kernel = jnp.zeros((2, 8, 9, 8)), jnp.zeros((8, 1, 3, 3))
    assert "conv_general_dilated" in jaxpr_of((1, 1), "SAME", feature_group_count=8)(images, kernel)


def test_accelerators_keep_the_grouped_convolution(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jaxpr = jaxpr_of((1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=CHANNELS)
    assert "conv_general_dilated" in jaxpr(*operands())


def test_a_layer_takes_it_as_its_field():
    images, _ = operands()
    plain = nn.Conv(CHANNELS, (3, 3), feature_group_count=CHANNELS)
    fast = plain.clone(conv_general_dilated=convolution.conv_general_dilated)
    variables = {"params": {"kernel": operands()[1], "bias": jnp.arange(CHANNELS, dtype=jnp.float32)}}
    np.testing.assert_allclose(fast.apply(variables, images), plain.apply(variables, images), atol=1e-5)
