"""Check that the conversion leaves nothing behind in the process, and what it refuses."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify

SHAPE = (6, 6, 3)
IMAGES = jax.random.normal(jax.random.key(0), (1, *SHAPE))


class Net(nn.Module):
    """Use layers, pooling, activations, and a compiled function."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = jax.jit(lambda y: jnp.mean(nn.max_pool(y, (2, 2), strides=(2, 2)), axis=(1, 2)))(x)
        return nn.Dense(3, name="head")(x)


VARIABLES = Net().init(jax.random.key(1), IMAGES)


def held_by_jax_and_flax():
    """Return every attribute of the modules and classes that a converter might replace."""
    modules = (nn, nn.pooling, nn.linear, nn.normalization, jax.nn, jnp, jax.lax, jax.image, jax.random)
    owners = (*modules, nn.Conv, nn.ConvTranspose, nn.BatchNorm, nn.Dense)
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}


@pytest.fixture
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize("compiled_before", [False, True])
def test_nothing_is_replaced_and_nothing_stays(compiled_before):
    apply_fn = jax.jit(Net().apply)
    expected = Net().apply(VARIABLES, IMAGES)
    if compiled_before:
        apply_fn(VARIABLES, IMAGES)
    before, handlers = held_by_jax_and_flax(), list(logging.getLogger().handlers)
    during = []

    def watched(variables, x):
        during.append(held_by_jax_and_flax())
        return apply_fn(variables, x)

    model = to_onnx(watched, VARIABLES, SHAPE, dynamic_batch=False)
    assert during
    for held in during:
        assert not [name for name, value in before.items() if held[name] is not value]
    after = held_by_jax_and_flax()
    assert not [name for name, value in before.items() if after[name] is not value]
    assert logging.getLogger().handlers == handlers
    assert {"Conv", "MaxPool", "Clip"} <= {node.op_type for node in model.graph.node}
    np.testing.assert_array_equal(Net().apply(VARIABLES, IMAGES), expected)
    np.testing.assert_array_equal(apply_fn(VARIABLES, IMAGES), jax.jit(Net().apply)(VARIABLES, IMAGES))
    assert "linen" not in str(jax.make_jaxpr(apply_fn)(VARIABLES, IMAGES))
    verify(model, apply_fn, VARIABLES, IMAGES, batch_sizes=(1,))


def test_a_failing_export_leaves_nothing_either():
    before, handlers = held_by_jax_and_flax(), list(logging.getLogger().handlers)
    with pytest.raises(InvalidInput):
        to_onnx(lambda v, x: jnp.linalg.qr(Net().apply(v, x)[:, :, None])[0][..., 0], VARIABLES, SHAPE)
    after = held_by_jax_and_flax()
    assert not [name for name, value in before.items() if after[name] is not value]
    assert logging.getLogger().handlers == handlers


def test_log_stays_silent(caplog):
    to_onnx(Net().apply, VARIABLES, SHAPE)
    assert not caplog.records


CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


class Body(nn.Module):
    body: object

    @nn.compact
    def __call__(self, x):
        x = self.body(nn.Conv(4, (3, 3), padding=1, name="conv")(x))
        return nn.Dense(3, name="head", dtype=x.dtype)(x)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            lambda x: nn.Conv(4, (1, 1), dtype=jnp.bfloat16)(x).mean((1, 2)),
            "returns bfloat16.*dtype=jnp.float32",
        ),
        (
            lambda x: nn.Conv(4, (1, 1), dtype=jnp.bfloat16)(x).mean((1, 2)).astype(jnp.float32),
            "computes in bfloat16 in Body/Conv_0: build the module with dtype=jnp.float32",
        ),
        (
            lambda x: jnp.sort(x, axis=-1).mean((1, 2)),
            "'sort' in Body, which no operator that vendors' compilers share expresses",
        ),
        (lambda x: jnp.cumsum(x, 1).mean((1, 2)), "CumSum.*no low-bit compiler takes it"),
        (lambda x: jnp.prod(x, 1).mean(1), "ReduceProd.*write the product of a few terms out"),
        (
            lambda x: jnp.linalg.qr(x.mean((1, 2))[:, :, None])[0][..., 0],
            "computes 'qr' in Body, which no operator",
        ),
        (
            lambda x: jax.lax.scan(lambda c, _: (c * 0.5, None), x.mean((1, 2)), length=257)[0],
            "a scan of 257 steps in Body would be unrolled",
        ),
        (
            lambda x: jax.lax.conv_general_dilated(
                x, jnp.stack([x.mean(0)[:3, :3]] * 2, -1), (1, 1), "SAME", dimension_numbers=CHANNELS_LAST
            ).mean((1, 2)),
            "computed from the images: it must be a constant",
        ),
    ],
)
def test_refusals_name_the_remedy(body, message):
    net = Body(body)
    with jax.numpy_dtype_promotion("standard"):
        variables = net.init(jax.random.key(0), IMAGES)
        with pytest.raises(InvalidInput, match=message):
            to_onnx(net.apply, variables, SHAPE)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False).mean((1, 2)),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y + i, x.mean((1, 2))),
        lambda x: jax.image.resize(x, (x.shape[0], 3, 3, 4), "bilinear").mean((1, 2)),
        lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x).mean(2),
    ],
)
def test_what_was_refused_once_is_right(body):
    net = Body(body)
    with jax.numpy_dtype_promotion("standard"):
        variables = net.init(jax.random.key(0), IMAGES)
        images = jax.random.normal(jax.random.key(2), (7, *SHAPE))
        verify(to_onnx(net.apply, variables, SHAPE), net.apply, variables, images)


def test_arguments_out_of_range():
    with pytest.raises(InvalidInput, match="opset 12"):
        to_onnx(Net().apply, VARIABLES, SHAPE, opset=12)
    with pytest.raises(InvalidInput, match="sizes must be positive whole numbers, no batch"):
        to_onnx(Net().apply, VARIABLES, (0, *SHAPE))
    with pytest.raises(InvalidInput, match="variables of this very model"):
        to_onnx(Net().apply, VARIABLES, (6, 6, 4))
    with pytest.raises(InvalidInput, match="layout 'NCHW'"):
        to_onnx(Net().apply, VARIABLES, SHAPE, layout="NCHW")
    with pytest.raises(InvalidInput, match="must lead with the batch"):
        to_onnx(lambda v, x: Net().apply(v, x).mean(), VARIABLES, SHAPE)
    with pytest.raises(InvalidInput, match="returns bool: return it as int32"):
        to_onnx(lambda v, x: Net().apply(v, x) > 0, VARIABLES, SHAPE)


@pytest.mark.parametrize("names", [("a", "b"), (), "input"])
def test_each_input_and_output_has_one_name(names):
    with pytest.raises(InvalidInput, match=r"the model has 1 input"):
        to_onnx(Net().apply, VARIABLES, SHAPE, input_names=names)
    with pytest.raises(InvalidInput, match=r"the model has 1 output"):
        to_onnx(Net().apply, VARIABLES, SHAPE, output_names=names)
    twice = ("same", "same")
    with pytest.raises(InvalidInput, match="the model has 2 outputs, give each its own name"):
        to_onnx(lambda v, x: (Net().apply(v, x),) * 2, VARIABLES, SHAPE, output_names=twice)
