"""Check that one graph serves every batch.

Wherever a model holds its batch, sizes 1, 3 and 7 give the numbers of the JAX forward, or the error names the
node.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx
from qt_jax.export.batch import MARKS, unused_batch_size

SHAPE = (5, 6)


class Body(nn.Module):
    body: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.body(self, x))


def token(module, x):
    first = module.param("token", nn.initializers.normal(), (1, 1, x.shape[-1]))
    return jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[-1])), x], axis=1)


def tiled_token(module, x):
    first = module.param("token", nn.initializers.normal(), (1, 1, x.shape[-1]))
    return jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], axis=1)


def repeated_query(module, x):
    query = module.param("query", nn.initializers.normal(), (1, 2, x.shape[-1]))
    return nn.MultiHeadDotProductAttention(2)(jnp.repeat(query, x.shape[0], axis=0), x, x)


BODIES = {
    "class token": token,
    "tiled token": tiled_token,
    "repeated query": repeated_query,
    "zeros beside": lambda _, x: jnp.concatenate([jnp.zeros((x.shape[0], 2, x.shape[2])), x], axis=1),
    "ones to add": lambda _, x: x + jnp.ones_like(x),
    "zeros to compare": lambda _, x: jnp.where(x > jnp.zeros(x.shape), x, 0.1 * x),
    "positions": lambda _, x: x + jnp.broadcast_to(jnp.arange(5.0)[None, :, None], x.shape),
    "LSTM": lambda _, x: nn.RNN(nn.OptimizedLSTMCell(4))(x),
    "GRU, last state": lambda _, x: nn.RNN(nn.GRUCell(4))(x)[:, -1],
    "backwards": lambda _, x: nn.RNN(nn.GRUCell(4), reverse=True, keep_order=True)(x),
    "both directions": lambda _, x: nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4)))(x),
    "batch merged and split": lambda _, x: nn.relu(x.reshape(-1, 6)).reshape(-1, 5, 6),
    "batch times groups": lambda _, x: (x.reshape(x.shape[0] * 5, 2, 3) * 2.0).reshape(x.shape),
    "batch at the end": lambda _, x: jnp.transpose(nn.softmax(jnp.transpose(x, (1, 2, 0)), 1), (2, 0, 1)),
    "zeros stacked beside": lambda _, x: jnp.stack([jnp.zeros((x.shape[0], 5)), x[..., 0]], axis=1),
    "time first": lambda _, x: jnp.swapaxes(jnp.swapaxes(x, 0, 1) + jnp.ones((5, x.shape[0], 6)), 0, 1),
    "sums of a scan": lambda _, x: (
        jax.lax.scan(
            lambda carry, row: (carry + row, carry.sum(-1)), jnp.zeros((x.shape[0], 6)), jnp.swapaxes(x, 0, 1)
        )[1].T
    ),
    "every axis named": lambda _, x: x.reshape(x.shape[0], 30)[:, :10],
}


@pytest.mark.parametrize("name", BODIES)
def test_any_batch(name, export):
    model = export(Body(BODIES[name]), SHAPE, batch_sizes=(1, 3, 7)).model
    for entry in (*model.graph.input, *model.graph.output):
        assert entry.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("name", BODIES)
def test_a_fixed_batch(name, export):
    model = export(Body(BODIES[name]), SHAPE, batch_sizes=(1,), dynamic_batch=False).model
    for entry in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        assert all(size.HasField("dim_value") for size in entry.type.tensor_type.shape.dim)
    assert not {"Shape", "Range"} & {node.op_type for node in model.graph.node}


def test_a_token_costs_the_batch_s_size_once(export):
    found = export(Body(token), SHAPE)
    assert found.operators == {"Shape": 1, "Concat": 2, "Expand": 1, "MatMul": 1, "Add": 1}


HELD = {
    "a factor": (lambda x: x / x.shape[0], "Div"),
    "an inverse": (lambda x: x * (1.0 / x.shape[0]), "Mul"),
    "numbered images": (lambda x: x + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None, None], "Add"),
    "twice as many rows": (
        lambda x: jnp.concatenate(
            [jnp.broadcast_to(jnp.arange(3.0), (2 * x.shape[0], 3)), x[:, :2, :3].reshape(-1, 3)], 1
        ).reshape(x.shape[0], -1),
        "Concat",
    ),
    "two batches in one": (lambda x: (x[:, None] - x[None]).reshape(x.shape[0], -1), "Reshape|splits"),
}


@pytest.mark.parametrize("name", HELD)
def test_a_batch_that_numbers_depend_on_is_refused(name):
    body, operator = HELD[name]
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.raises(
            InvalidInput, match=f"batch .*{operator}|{operator} the batch|computes with the batch size"
        ),
    ):
        to_onnx(lambda _, x: body(x), {}, SHAPE)


@pytest.mark.parametrize("name", HELD)
def test_a_fixed_batch_may_be_a_number(name, export):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        export(Body(lambda _, x: HELD[name][0](x)), SHAPE, batch_sizes=(1,), dynamic_batch=False)


def test_a_mean_over_the_batch_counts_the_images_there_are(export):
    """The mean is over the batch as the model says, so the numbers agree batch by batch only."""
    body = Body(lambda _, x: x - x.mean(axis=0, keepdims=True))
    with jax.numpy_rank_promotion("allow"):
        export(body, SHAPE, batch_sizes=(4,))


def test_the_mark_divides_no_size():
    assert unused_batch_size([1, 3, 224]) == MARKS[0]
    assert unused_batch_size([2 * MARKS[0], MARKS[1]]) == MARKS[2]


def test_a_size_that_looks_like_the_batch(export):
    """A model with as many classes as the usual batch to lower with is lowered with another."""
    export(nn.Sequential([nn.Dense(4), nn.Dense(MARKS[0])]), (3,))
