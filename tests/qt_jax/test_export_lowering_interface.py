"""Check several inputs and outputs, integers, channels-last boundaries, names, and jax2onnx's corrections."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx
from qt_jax.export.jax2onnx_patches import MAX_UNROLLED, jax2onnx_corrected
from qt_jax.export.lowering import lower

TOKENS = jax.ShapeDtypeStruct((5,), jnp.int32)


def boundary(entries):
    return [
        (entry.name, *(size.dim_param or size.dim_value for size in entry.type.tensor_type.shape.dim))
        for entry in entries
    ]


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, image, numbers):
        features = nn.Conv(4, (3, 3), name="conv")(image)
        joined = jnp.concatenate([features.mean((1, 2)), nn.relu(numbers)], axis=1)
        return {"logits": nn.Dense(3, name="head")(joined), "features": features}


@pytest.mark.parametrize(
    ("layout", "image", "features"), [("nchw", (3, 6, 5), (4, 6, 5)), ("nhwc", (6, 5, 3), (6, 5, 4))]
)
def test_two_inputs_and_outputs(layout, image, features, export):
    model = export(TwoInputs(), (6, 5, 3), (2,), layout=layout).model
    assert boundary(model.graph.input) == [("input_0", "batch", *image), ("input_1", "batch", 2)]
    assert boundary(model.graph.output) == [("output_0", "batch", *features), ("output_1", "batch", 3)]


def test_names_of_one_s_own(export):
    names = {"input_names": ["image", "numbers"], "output_names": ["map", "scores"]}
    graph = export(TwoInputs(), (6, 5, 3), (2,), **names).model.graph
    assert [entry.name for entry in (*graph.input, *graph.output)] == ["image", "numbers", "map", "scores"]


@pytest.mark.parametrize("opset", [13, 21])
def test_embedded_tokens(opset, export):
    class Reader(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3, name="head")(nn.Embed(8, 4, name="embed")(tokens).mean(1))

    found = export(Reader(), TOKENS, opset=opset)
    assert found.model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32
    assert [node.name for node in found.model.graph.node if node.op_type == "Gather"] == ["embed"]
    assert {t.name for t in found.model.graph.initializer} >= {"embed/embedding", "head/kernel"}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_an_image_and_a_class_beside_the_logits(layout, export):
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            logits = nn.Dense(3)(x.mean((1, 2)))
            return 2.0 * x, logits, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    export(Both(), (4, 5, 3), layout=layout)


@pytest.mark.parametrize("specs", [(6,), (7, 6), (4, 5, 6), (3, 4, 5, 6)])
def test_inputs_of_any_rank(specs, export):
    export(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), specs)


def test_joined_kernels_of_a_recurrent_cell_bear_the_cell_s_name(export):
    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.OptimizedLSTMCell(4, name="cell"), name="rows")(x)[:, -1]

    names = {tensor.name for tensor in export(Reader(), (3, 5)).model.graph.initializer}
    assert {"cell/kernel", "cell/bias"} <= names


def test_scans_are_unrolled():
    def body(carry, x):
        return carry * 0.5 + x, jnp.tanh(carry + x)

    def forward(_, x):
        last, states = jax.lax.scan(body, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1), reverse=True)
        return jnp.concatenate([last[:, None], jnp.swapaxes(states, 0, 1)], axis=1)

    model = to_onnx(forward, {}, (4, 3))
    assert not {"Loop", "Scan"} & {node.op_type for node in model.graph.node}
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    (found,) = onnx.reference.ReferenceEvaluator(model).run(None, {"input": x})
    np.testing.assert_allclose(found, forward(None, x), rtol=1e-5, atol=1e-6)


def test_too_long_a_scan_is_refused():
    def forward(_, x):
        return jax.lax.scan(lambda c, _: (c * 0.5, None), x, length=MAX_UNROLLED + 1)[0]

    with pytest.raises(InvalidInput, match=r"257 steps.*shorten the sequence"):
        to_onnx(forward, {}, (4,))


def test_functions_come_back_whatever_happens_inside():
    held = {
        (owner.__name__, name): getattr(owner, name)
        for owner, names in (
            (nn, ("max_pool", "avg_pool", "relu", "gelu")),
            (jnp, ("shape", "cumsum", "einsum", "concatenate")),
            (jax.lax, ("scan", "fori_loop")),
            (jax.image, ("resize",)),
            (jax.random, ("split",)),
            (nn.Dense, ("__call__",)),
            (nn.linear, ("canonicalize_padding",)),
        )
        for name in names
    }
    owners = {
        owner.__name__: owner for owner in (nn, jnp, jax.lax, jax.image, jax.random, nn.Dense, nn.linear)
    }
    with pytest.raises(KeyError), jax2onnx_corrected():
        raise KeyError
    with pytest.raises(InvalidInput):
        to_onnx(lambda _, x: jnp.linalg.qr(x)[0], {}, (4, 4))
    assert not [name for name, value in held.items() if getattr(owners[name[0]], name[1]) is not value]


def test_variables_keep_their_paths_through_the_lowering():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(True, name="norm")(nn.Dense(3, name="dense")(x))

    variables = Net().init(jax.random.key(0), jnp.zeros((1, 4)))
    options = {"batch": None, "channels_first": True, "input_names": None, "output_names": None}
    names = {tensor.name for tensor in lower(Net().apply, variables, (4,), **options).graph.initializer}
    leaves = {f"params/dense/{leaf}" for leaf in ("kernel", "bias")}
    leaves |= {f"params/norm/{leaf}" for leaf in ("scale", "bias")}
    assert names >= leaves | {f"batch_stats/norm/{leaf}" for leaf in ("mean", "var")}
