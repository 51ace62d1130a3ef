"""Check models on which an earlier version differed from JAX, or failed with an unreadable error."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify


def param(module, shape):
    return module.param("p", nn.initializers.normal(1.0), shape)


def conv(features, x):
    return nn.Conv(features, (3, 3), name="conv")(x)


class Body(nn.Module):
    body: object

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


RIGHT = {
    "a constant beside an image": (
        lambda m, x: jnp.concatenate(
            [conv(4, x), jnp.broadcast_to(param(m, (8, 8, 8)), (len(x), 8, 8, 8))], -1
        ),
        (8, 8, 3),
    ),
    "a token beside a sequence": (
        lambda m, x: jnp.concatenate(
            [jnp.tile(param(m, (1, 4, 4)), (len(x), 1, 1)), nn.Conv(4, (3,), name="conv")(x)], 1
        ),
        (8, 4),
    ),
    "zeros for channels": (
        lambda m, x: (lambda y: jnp.concatenate([y, jnp.zeros_like(y)], -1))(conv(4, x)),
        (4, 4, 3),
    ),
    "a mean with the batch second": (
        lambda m, x: nn.Dense(4, name="dense")(x).swapaxes(0, 1).mean(-1).swapaxes(0, 1),
        (5, 3),
    ),
    "softplus up to a bound": (
        lambda m, x: (lambda h: jnp.where(h > 15, jnp.full_like(h, 15.0), nn.softplus(h)))(30 * x),
        (5,),
    ),
    "an image flattened into the output": (lambda m, x: conv(4, x).reshape(len(x), -1), (4, 4, 3)),
    "clipped integers": (
        lambda m, x: nn.Embed(10, 3, name="embed")(jnp.minimum(jnp.maximum(x.astype(jnp.int32), 0) + 1, 9)),
        (4,),
    ),
    "the largest of each image": (lambda m, x: x / jnp.max(x, axis=(1, 2, 3), keepdims=True), (4, 4, 3)),
    "a standard deviation": (lambda m, x: jnp.std(x, axis=1), (5, 4)),
    "ordinal thresholds": (
        lambda m, x: nn.Dense(1, use_bias=False, name="dense")(x) + param(m, (5,)),
        (4,),
    ),
    "a label summed away": (lambda m, x: jnp.einsum("bij,jk->bk", x[:, None], param(m, (4, 3))), (4,)),
    "a drawn matrix that every input shares": (
        lambda m, x: x @ jax.random.normal(jax.random.key(0), (4, 3)),
        (4,),
    ),
    "mish": (lambda m, x: jax.nn.mish(x), (5,)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_at_every_opset(name, request):
    body, shape = RIGHT[name]
    net = Body(body)
    x = np.random.default_rng(0).normal(size=(7, *shape)).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = net.init(jax.random.key(0), x)
        for opset in (13, 21):
            verify(to_onnx(net.apply, variables, shape, opset=opset), net.apply, variables, x)


REFUSED = {
    "random numbers": (
        lambda m, x: x + jax.random.normal(jax.random.key(0), x.shape),
        "draws random numbers in Body: call it with train=False",
    ),
    "random bits": (
        lambda m, x: nn.Dropout(0.5, deterministic=False, rng_collection="params")(x, rng=jax.random.key(0)),
        "draws random numbers in Body/Dropout_0",
    ),
    "the batch as a factor": (lambda m, x: nn.Dense(3)(x) * jnp.float32(len(x)), "computes with the batch"),
    "its root": (lambda m, x: x / jnp.float32(np.sqrt(len(x))), "computes with the batch size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    body, says = REFUSED[name]
    net = Body(body)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = net.init(jax.random.key(0), jnp.ones((2, 4)))
        with pytest.raises(InvalidInput, match=says):
            to_onnx(net.apply, variables, (4,))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"opset": "17"}, "opset '17'"),
        ({"opset": 17.5}, "opset 17.5"),
        ({"input_names": ["x"], "output_names": ["x"]}, "'x' is given to an input and to an output"),
        ({"output_names": 3}, "give each its own name"),
        ({"input_shape": 3}, "tuple of sizes"),
    ],
)
def test_wrong_arguments_are_named(options, says):
    given = {"input_shape": (4,)} | options
    with pytest.raises(InvalidInput, match=says):
        to_onnx(lambda _, x: x * 2, {}, **given)


def test_nan_in_a_later_output_is_found():
    nan = numpy_helper.from_array(np.float32(np.nan).reshape(()), "nan")
    two = numpy_helper.from_array(np.float32(2.0).reshape(()), "two")
    x, y, z = (helper.make_tensor_value_info(name, 1, ["batch", 3]) for name in "xyz")
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["y"], "y"),
        helper.make_node("Mul", ["x", "nan"], ["z"], "z"),
    ]
    body = helper.make_graph(nodes, "g", [x], [y, z], [nan, two])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    with pytest.raises(InvalidInput, match="differ from the JAX forward by nan"):
        verify(model, lambda _, x: (x * 2, x * 2), {}, np.ones((7, 3), np.float32))
