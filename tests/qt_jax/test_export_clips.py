"""Check where Clip nodes stand, that they compute what training's clips do, and that vendors fuse them."""

import dataclasses
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax.traverse_util import flatten_dict
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import qt_jax as qt
from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify
from qt_jax.export.clips import clipped_forward, insert_clips, learned_clips
from qt_jax.export.deploy import deploy
from qt_jax.export.encodings import read_ranges
from qt_jax.export.network import Deployable, Samples
from qt_jax.export.sessions import open_session

IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
CONFIG = qt.QuantConfig()


class Net(nn.Module):
    """Apply a Relu with a shortcut, a Relu without, a sum, a ReLU6 with a pool behind it, and a mean."""

    @nn.compact
    def __call__(self, x):
        def conv(name, x):
            x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name=name)(x)
            return nn.BatchNorm(use_running_average=True, name=f"{name}_norm")(x)

        x = nn.relu(conv("stem", x))
        x = x + conv("second", nn.relu(conv("first", x)))
        x = nn.max_pool(nn.relu6(conv("after", x)), (2, 2), (2, 2))
        x = nn.relu(conv("pooled", x))
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


def learned(model, inputs):
    """Return variables as training leaves them, with ranges so narrow that the clips change numbers."""
    random = np.random.default_rng(4)
    shapes = jax.eval_shape(model.init, jax.random.key(1), inputs)

    def draw(leaf):
        kernel = random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return np.float32(kernel if leaf.ndim > 1 else random.uniform(0.2, 1.5, leaf.shape))

    variables = qt.attach_statistics(model, jax.tree.map(draw, shapes), CONFIG, inputs)
    variables = jax.tree.map(np.array, variables)
    limits = {"low": (-0.6, -0.2), "high": (0.3, 0.9), "count": (1, 1)}
    for path, leaf in flatten_dict(variables["batch_stats"]).items():
        if path[-1] in limits:
            leaf[...] = random.uniform(*limits[path[-1]])
    return variables


@pytest.fixture(scope="module")
def variables():
    return learned(Net(), IMAGES)


@pytest.fixture(scope="module")
def plain(variables):
    return to_onnx(Net().apply, variables, IMAGES.shape[1:])


@pytest.fixture(scope="module")
def clips(plain, variables):
    return learned_clips(plain, variables, CONFIG)


@pytest.fixture(scope="module")
def clipped(plain, clips):
    return insert_clips(plain, clips)


def bounds(variables, layer):
    seen = variables["batch_stats"][layer]["quant_input"]
    return min(float(seen["low"]), 0.0), max(float(seen["high"]), 0.0)


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def values(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def maker(model, tensor):
    return next((node.op_type for node in model.graph.node if tensor in node.output), None)


def test_only_what_layers_alone_read_is_clipped_to_their_ranges(clips, variables):
    layers = {"Relu_1": "second", "Add": "after", "MaxPool": "pooled", "Flatten": "head"}
    assert clips == {name: bounds(variables, layer) for name, layer in layers.items()}


def test_a_relu_becomes_a_clip_a_clip_is_narrowed_others_get_one(plain, clipped, variables):
    assert operators(clipped) == operators(plain) - Counter(Relu=1) + Counter(Clip=3)
    held = values(clipped)
    nodes = [node for node in clipped.graph.node if node.op_type == "Clip"]
    found = {node.name: tuple(held[name].item() for name in node.input[1:]) for node in nodes}
    assert found == {
        "Clip_1": (0.0, bounds(variables, "second")[1]),
        "Add/Clip": bounds(variables, "after"),
        "Clip": (0.0, bounds(variables, "pooled")[1]),  # narrowed where it was, before the pooling
        "GlobalAveragePool/Clip": bounds(variables, "head"),
    }
    before = {node.name: maker(clipped, node.input[0]) for node in nodes}
    assert (before["Clip_1"], before["Clip"], before["Add/Clip"]) == ("Conv", "Conv", "Add")
    assert all(list(node.output) == [node.name] for node in nodes)
    assert all(value.dtype == np.float32 for value in held.values())


@pytest.mark.parametrize("opset", [13, 21])
def test_standard_graph_that_computes_what_jax_does_with_the_same_clips(opset, variables, clips):
    def intercept(call, args, kwargs, context):  # not that of the package
        layer = context.module.name
        if not isinstance(context.module, nn.Conv | nn.Dense) or layer in ("stem", "first"):
            return call(*args, **kwargs)
        low, high = bounds(variables, layer)
        return call(jnp.minimum(jnp.maximum(args[0], low), high), **kwargs)

    def forward(variables, images):
        with nn.intercept_methods(intercept):
            return Net().apply(variables, images)

    model = insert_clips(to_onnx(Net().apply, variables, IMAGES.shape[1:], opset=opset), clips)
    summary = verify(model, forward, variables, IMAGES)
    assert (summary["opset"], {node.domain for node in model.graph.node}) == (opset, {""})
    difference = np.abs(forward(variables, IMAGES) - Net().apply(variables, IMAGES)).max()
    assert difference > 100 * max(summary["max_difference"].values())  # the clips bite


def test_forward_with_clips_is_that_of_the_graph(plain, clipped, clips, variables):
    verify(clipped, clipped_forward(Net().apply, plain, clips), variables, IMAGES)
    with pytest.raises(InvalidInput, match="differ from the JAX forward"):
        verify(clipped, Net().apply, variables, IMAGES)


class Twice(nn.Module):
    """Call `shared` twice: beside `wide` on the output of `first`, and alone on its own output."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(3, name="first")(x))
        shared = nn.Dense(3, name="shared")
        return shared(shared(x)) + nn.Dense(3, name="wide")(x)


def test_readers_of_one_tensor_get_the_widest_of_their_ranges():
    x = IMAGES[:, 0, 0]
    variables = learned(Twice(), x)
    variables["batch_stats"]["wide"]["quant_input"] |= {"low": np.float32(-9), "high": np.float32(0.01)}
    model = to_onnx(Twice().apply, variables, (3,))
    found = learned_clips(model, variables, CONFIG)
    own = bounds(variables, "shared")
    calls = [node for node in model.graph.node if node.input[1:2] == ["shared/kernel"]]
    assert found == {"Relu": (-9.0, own[1]), calls[0].output[0]: own} and len(calls) == 2
    verify(insert_clips(model, found), clipped_forward(Twice().apply, model, found), variables, x)


def test_layers_in_floating_point_and_outputs_are_not_clipped(plain, variables):
    config = qt.QuantConfig(rules=(qt.Rule("after|head", inputs=None), qt.Rule("stem", skip=True)))
    assert set(learned_clips(plain, variables, config)) == {"Relu_1", "MaxPool"}
    model = to_onnx(Net().apply, variables, IMAGES.shape[1:])
    model.graph.output.add(name="Add")
    assert "Add" not in learned_clips(model, variables, CONFIG)


@pytest.mark.parametrize(
    ("given", "bound", "expected"),
    [
        ("source source/min source/max", (-1.0, 9.0), (0.5, 6.0)),
        ("source  source/max", (-1.0, 3.0), (-1.0, 3.0)),
    ],
)
def test_a_clip_that_is_there_is_only_narrowed(given, bound, expected, build):
    nodes = [("Relu", "input", "source", {}), ("Clip", given, "kept", {}), ("Neg", "kept", "output", {})]
    constants = {"source/min": np.float32(0.5), "source/max": np.float32(6.0)}
    model = insert_clips(build(nodes, constants, ["batch", 3]), {"kept": bound})
    node = model.graph.node[1]
    assert tuple(values(model)[name].item() for name in node.input[1:]) == expected
    assert operators(model) == Counter(Relu=1, Clip=1, Neg=1)


def test_bounds_that_are_computed_are_left_alone(build):
    nodes = [("Relu", "input", "low", {}), ("Clip", "input low", "kept", {}), ("Neg", "kept", "output", {})]
    model = insert_clips(build(nodes, {}, [], output_rank=0), {"kept": (0.0, 1.0)})
    assert [node.name for node in model.graph.node][2:3] == ["kept/Clip"]


def test_without_clips_the_graph_is_the_same(plain):
    assert insert_clips(plain, {}) == plain


def test_onnxruntime_computes_clips_inside_the_convolutions(clipped, tmp_path):
    open_session(clipped, optimize=True, save_optimized=tmp_path / "optimized.onnx")
    left = operators(onnx.load(tmp_path / "optimized.onnx"))
    assert (left["FusedConv"], left["Relu"]) == (4, 0)
    assert left["Clip"] == 2  # behind the sum, behind the mean


class Calibration(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"input": np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))}])

    def get_next(self):
        return next(self.batches, None)


def test_quantizer_takes_the_clips_into_its_grids(clipped, variables, tmp_path):
    onnx.save(clipped, tmp_path / "float.onnx")
    quant_pre_process(tmp_path / "float.onnx", tmp_path / "prepared.onnx", skip_symbolic_shape=True)
    quantize_static(tmp_path / "prepared.onnx", tmp_path / "qdq.onnx", Calibration())
    quantized = onnx.load(tmp_path / "qdq.onnx")
    assert operators(quantized)["Clip"] == 0
    scale = values(quantized)["Clip_1_scale"].item()
    assert scale == pytest.approx(bounds(variables, "second")[1] / 255, rel=1e-6)


@pytest.fixture
def network(variables):
    samples = Samples(IMAGES, IMAGES)
    return Deployable(Net().apply, variables, IMAGES.shape[1:], CONFIG, samples)


def test_deploy_writes_and_verifies_the_clipped_graph(network, clipped, clips, tmp_path):
    summary = deploy(network, tmp_path / "model.onnx", clips=True)
    assert onnx.load(tmp_path / "model.onnx") == clipped
    assert summary["clips"] == {name: list(ends) for name, ends in clips.items()}
    ranges = read_ranges(tmp_path / "model.ranges.json")
    assert ranges.tensors["Clip_1"].high == ranges.inputs["second"].high == (clips["Relu_1"][1],)


def test_deploy_refuses_clips_that_mean_nothing(network, tmp_path):
    with pytest.raises(InvalidInput, match="clips at the ends of its integers"):
        deploy(network, tmp_path / "model.onnx", qdq="int8", clips=True)
    float_network = dataclasses.replace(network, config=None)
    with pytest.raises(InvalidInput, match="Clip nodes need learned ranges"):
        deploy(float_network, tmp_path / "model.onnx", clips=True)
    assert not any(tmp_path.iterdir())
