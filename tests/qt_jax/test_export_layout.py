"""Check that no Transposes stay between two convolutions, whatever else is there, and the small passes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.backends.constant_folding import fold_constants
from qt_jax.export import graph, rewrites
from qt_jax.export.layout import TO_CHANNELS_FIRST, TO_CHANNELS_LAST, channels_first

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def channel_shuffle(x):
    split = x.reshape(*x.shape[:3], 2, 2)
    return jnp.swapaxes(split, 3, 4).reshape(x.shape)


def pixel_shuffle(x):
    batch, height, width, _ = x.shape
    return (
        x.reshape(batch, height, width, 2, 2)
        .transpose(0, 1, 3, 2, 4)
        .reshape(batch, height * 2, width * 2, 1)
    )


def gate(x):
    return x * nn.sigmoid(nn.Dense(4)(x.mean((1, 2))))[:, None, None, :]


IMAGE_STEPS = {
    "concat": lambda x: jnp.concatenate([x, nn.relu(x), -x], axis=-1),
    "concat along the width": lambda x: jnp.concatenate([x, nn.relu(x)], axis=2),
    "softmax over channels": lambda x: nn.softmax(x, axis=-1),
    "softmax over rows": lambda x: nn.log_softmax(x, axis=1),
    "split channels": lambda x: jnp.multiply(*jnp.split(x, 2, axis=-1)),
    "split columns": lambda x: jnp.multiply(*jnp.split(x, 2, axis=2)),
    "slice channels": lambda x: x[..., 1:3],
    "slice rows and columns": lambda x: x[:, 1::2, :-1],
    "flip": lambda x: x[:, ::-1],
    "pad": lambda x: nn.relu(jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 1)))),
    "resize": lambda x: jax.image.resize(x, (x.shape[0], 16, 9, 4), "linear"),
    "sum over channels": lambda x: x - x.sum(-1, keepdims=True),
    "maximum over rows": lambda x: x * x.max(1, keepdims=True),
    "mean over the image, kept": lambda x: x - x.mean((1, 2), keepdims=True),
    "minimum over all": lambda x: x - x.min((1, 2, 3), keepdims=True),
    "gate of dense layers": gate,
    "a number a channel": lambda x: x * jnp.arange(4.0)[None, None, None] + 1.0,
    "a number a pixel": lambda x: x + jnp.arange(72.0).reshape(1, 9, 8, 1) / 72.0,
    "where": lambda x: jnp.where(x > 0.1, x, 0.1 * x),
    "broadcast": lambda x: x + jnp.broadcast_to(x[:, :1], x.shape),
    "dense on channels": lambda x: nn.Dense(6)(x),
    "group norm": lambda x: nn.GroupNorm(2)(x),
}


@pytest.mark.parametrize("name", IMAGE_STEPS)
def test_no_transpose_between_convolutions(name, export_body):
    with jax.numpy_rank_promotion("allow"):
        operators = export_body(lambda x: nn.Conv(3, (1, 1))(IMAGE_STEPS[name](x)), opset=21).operators
    assert "Transpose" not in operators


OTHER_STEPS = {
    "channel shuffle": channel_shuffle,
    "pixel shuffle": pixel_shuffle,
    "layer norm": lambda x: nn.LayerNorm(epsilon=0.1)(x),
    "rows and columns exchanged": lambda x: jnp.swapaxes(x, 1, 2),
    "mixed layouts": lambda x: x + jnp.swapaxes(x, 2, 3)[:, :, :4, :4].sum((2, 3), keepdims=True),
    "three layouts": lambda x: (
        (x[:, :4, :4] + jnp.swapaxes(x[:, :4, :4], 1, 3)) * jnp.swapaxes(x[:, :4, :4], 2, 3)
    ),
    "tokens and back": lambda x: nn.Dense(4)(x.reshape(x.shape[0], -1, 4)).reshape(x.shape),
    "a sum with tokens": lambda x: x.reshape(x.shape[0], -1, 4) + x.mean((1, 2))[:, None],
    "not kept along one axis": lambda x: x.mean(1).max(1),
    "not kept channels": lambda x: x.max(-1).reshape(x.shape[0], -1),
    "argmax": lambda x: jnp.argmax(x, axis=-1).astype(jnp.float32),
}


@pytest.mark.parametrize("name", OTHER_STEPS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_steps_that_need_their_layout_keep_their_numbers(name, layout, export_body):
    def body(x):
        x = OTHER_STEPS[name](x)
        return x if x.ndim != 3 else x.mean(1)

    with jax.numpy_rank_promotion("allow"):
        export_body(body, layout=layout)


def test_a_view_is_written_once_where_it_must(build, check_equal):
    constants = {"channel": normal(4), "axes": np.array([3])}
    nodes = [
        ("Transpose", "input", "x", {"perm": TO_CHANNELS_LAST[4]}),
        ("Mul", "x channel", "y", {}),
        ("Concat", "x y", "z", {"axis": -1}),
        ("ReduceMean", "z axes", "a", {"keepdims": 1}),
        ("Sub", "z a", "b", {}),
        ("LayerNormalization", "b scale", "c", {}),
        ("Add", "c b", "d", {}),
        ("Transpose", "d", "output", {"perm": TO_CHANNELS_FIRST[4]}),
    ]
    model = build(nodes, constants | {"scale": normal(8)}, [2, 4, 5, 6], 4, opset=18)
    moved = channels_first(model)
    found = [node.op_type for node in moved.graph.node]
    assert found[:4] == ["Mul", "Concat", "ReduceMean", "Sub"] and found.count("Transpose") == 2
    check_equal(model, moved, normal(2, 4, 5, 6))


def test_flatten_permutes_the_kernel_of_the_layer_behind(export_body):
    found = export_body(lambda x: x.reshape(x.shape[0], -1))
    assert found.operators == {"Conv": 1, "Flatten": 1, "Gemm": 1}
    kernel = graph.constants(found.model)["head/kernel"].reshape(4, 9, 8, 5)
    np.testing.assert_array_equal(
        kernel.transpose(1, 2, 0, 3).reshape(-1, 5), found.variables["params"]["head"]["kernel"]
    )


def test_flatten_for_two_layers_and_for_more_than_layers(export_body):
    def two(x):
        flat = x.reshape(x.shape[0], -1)
        return nn.relu(nn.Dense(3)(flat)) + nn.Dense(3)(flat)

    assert "Transpose" not in export_body(two).operators
    export_body(lambda x: nn.relu(x.reshape(x.shape[0], -1)))
    export_body(lambda x: jnp.concatenate([x.reshape(x.shape[0], -1), x.mean((1, 2))], axis=1))


SMALL = {
    "one entry of an axis": (
        rewrites.fold_index,
        [("Slice", "input one two axis", "x", {}), ("Reshape", "x rows", "output", {})],
        ["Gather"],
    ),
    "two entries": (
        rewrites.fold_index,
        [("Slice", "input one three axis", "x", {}), ("Reshape", "x wide", "output", {})],
        ["Slice", "Reshape"],
    ),
    "an entry of a stack": (
        rewrites.fold_stack,
        [
            ("Slice", "input one two axis", "a", {}),
            ("Neg", "a", "b", {}),
            ("Concat", "a b", "x", {"axis": 1}),
            ("Gather", "x index", "output", {"axis": 1}),
        ],
        ["Slice", "Neg", "Reshape"],
    ),
    "an axis put back": (
        rewrites.plain_reshapes,
        [
            ("ReduceMax", "input one", "x", {"keepdims": 0}),
            ("Unsqueeze", "x one", "y", {}),
            ("Flatten", "y", "output", {}),
        ],
        ["ReduceMax", "Flatten"],
    ),
    "reshapes in a row": (
        rewrites.plain_reshapes,
        [
            ("Squeeze", "input none", "x", {}),
            ("Reshape", "x all", "y", {}),
            ("Reshape", "y flat", "output", {}),
        ],
        ["Reshape"],
    ),
    "an expand before an addition": (
        rewrites.drop_expands,
        [("Expand", "row full", "x", {}), ("Add", "input x", "y", {}), ("Flatten", "y", "output", {})],
        ["Add", "Flatten"],
    ),
    "an expand that widens": (
        rewrites.drop_expands,
        [
            ("Slice", "input one two axis", "s", {}),
            ("Expand", "s full", "x", {}),
            ("Add", "x s", "y", {}),
            ("Flatten", "y", "output", {}),
        ],
        ["Slice", "Expand", "Add", "Flatten"],
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_passes(name, build, check_equal):
    improve, nodes, expected = SMALL[name]
    constants = {
        **{"one": [1], "two": [2], "three": [3], "axis": [1], "rows": [2, 6], "wide": [4, 6], "all": [-1]},
        **{"flat": [6, 6], "full": [2, 3, 6]},
        "none": np.zeros(0, np.int64),
    }
    constants = {key: np.array(value, np.int64) for key, value in constants.items()}
    constants |= {"index": np.array(1), "row": normal(6)}
    model = build(nodes, constants, [2, 3, 6], opset=18)
    improved = fold_constants(improve(model))
    assert [node.op_type for node in improved.graph.node] == expected
    check_equal(model, improved, normal(2, 3, 6))
