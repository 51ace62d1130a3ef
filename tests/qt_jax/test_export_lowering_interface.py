"""Check several inputs and outputs, integers, channels-last boundaries, names, and loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx
from qt_jax.export.graph import ORIGIN
from qt_jax.export.lowering import lower
from qt_jax.export.program import MAX_UNROLLED

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
    assert boundary(model.graph.output) == [("features", "batch", *features), ("logits", "batch", 3)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["logits", "features"], ["logits", "features"]),
        (["features", "logits"], ["features", "logits"]),
        ({"logits": "scores", "features": "map"}, ["map", "scores"]),
    ],
)
def test_the_entries_of_a_dict_are_named_by_their_keys(given, expected, export):
    found = export(TwoInputs(), (6, 5, 3), (2,), input_names=["image", "numbers"], output_names=given)
    assert [entry.name for entry in found.model.graph.input] == ["image", "numbers"]
    assert [entry.name for entry in found.model.graph.output] == expected
    session = onnxruntime.InferenceSession(found.model.SerializeToString())
    made = session.run(None, {"image": found.inputs[0].transpose(0, 3, 1, 2), "numbers": found.inputs[1]})
    wanted = TwoInputs().apply(found.variables, *found.inputs)
    keys = [key for name in expected for key in wanted if name in (key, {"logits": "scores"}.get(key, "map"))]
    for array, key in zip(made, keys, strict=True):
        right = np.asarray(wanted[key])
        right = right.transpose(0, 3, 1, 2) if right.ndim == 4 else right
        np.testing.assert_allclose(array, right, atol=1e-4)


@pytest.mark.parametrize("given", [["map", "scores"], {"logits": "a"}, ["features", "b"]])
def test_a_list_of_other_names_for_a_dict_is_refused(given, export):
    with pytest.raises(InvalidInput, match=r"output_names .*\['features', 'logits'\]"):
        export(TwoInputs(), (6, 5, 3), (2,), output_names=given)


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


def test_loops_of_a_known_length_are_unrolled():
    def forward(_, x):
        y = jax.lax.fori_loop(0, 3, lambda i, y: y * 0.5 + i, x)
        _, z = jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, y))
        return jax.lax.cond(True, lambda z: z, lambda z: -z, z)

    with jax.numpy_dtype_promotion("standard"):
        model = to_onnx(forward, {}, (4,))
        x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
        (found,) = onnx.reference.ReferenceEvaluator(model).run(None, {"input": x})
        np.testing.assert_allclose(found, forward(None, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: -y, x), "lax.cond.*jnp.where"),
        (
            lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x),
            "lax.while_loop.*jnp.where",
        ),
    ],
)
def test_branches_on_data_are_refused(forward, says):
    with pytest.raises(InvalidInput, match=f"control flow that depends on its inputs .{says}"):
        to_onnx(lambda _, x: forward(x), {}, (4,))


def test_variables_keep_their_paths_through_the_lowering():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(True, name="norm")(nn.Dense(3, name="dense")(x))

    variables = Net().init(jax.random.key(0), jnp.zeros((1, 4)))
    options = {"batch": None, "channels_first": True, "input_names": None, "output_names": None}
    lowered = lower(Net().apply, variables, (4,), **options).graph.initializer
    names = {entry.value for tensor in lowered for entry in tensor.metadata_props if entry.key == ORIGIN}
    leaves = {f"params/dense/{leaf}" for leaf in ("kernel", "bias")}
    leaves |= {f"params/norm/{leaf}" for leaf in ("scale", "bias")}
    assert names >= leaves | {f"batch_stats/norm/{leaf}" for leaf in ("mean", "var")}
