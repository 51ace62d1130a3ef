"""Check `to_onnx` on whole networks: the form of the graph, its names, and its logits."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from experiments.models.resnet import FastResNet, ResNet
from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify

SHAPE = (9, 8, 3)
SMALL_RESNET = partial(ResNet, (1, 1, 1), width=8, num_classes=5)


def norm(**options: Any) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, **options)


@pytest.fixture(scope="module")
def small_resnet(export):
    return export(SMALL_RESNET(), SHAPE)


def test_resnet_holds_six_operators_and_agrees(small_resnet):
    _, variables, summary, _ = small_resnet
    assert summary["operators"] == {
        "Conv": 9,
        "Relu": 7,
        "Add": 3,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }
    assert summary["max_difference"].keys() == {1, 7}
    assert max(summary["max_difference"].values()) <= 1e-4
    kernels = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1)
    biases = (8 * 3 + 16 * 3 + 32 * 3) + 5  # one folded batch norm a convolution, and the head
    assert summary["parameters"] == kernels + biases


def test_multiply_accumulates_in_closed_form(small_resnet):
    stem = 9 * 3 * 8 * 9 * 8
    stage1 = 2 * 9 * 8 * 8 * 9 * 8
    stage2 = (9 * 8 + 9 * 16 + 8) * 16 * 5 * 4
    stage3 = (9 * 16 + 9 * 32 + 16) * 32 * 3 * 2
    assert small_resnet.summary["macs"] == stem + stage1 + stage2 + stage3 + 32 * 5


def test_names_are_flax_paths(small_resnet):
    model, variables, *_ = small_resnet
    nodes = {node.name: node.op_type for node in model.graph.node}
    assert nodes["stage2_block1/shortcut"] == "Conv"
    assert nodes["stage2_block1/Add"] == "Add"
    assert nodes["stage2_block1/Relu_1"] == "Relu"
    assert nodes["head"] == "Gemm"
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert initializers["stage1_block1/conv1/kernel"].shape == (8, 8, 3, 3)
    np.testing.assert_array_equal(initializers["head/kernel"], variables["params"]["head"]["kernel"])
    for node in model.graph.node:
        assert node.output[0] == (node.name if node.name != "head" else "logits")
        assert all(name in initializers for name in node.input[1:] if node.op_type in ("Conv", "Gemm"))


def test_every_shape_is_recorded_and_the_batch_symbolic(small_resnet):
    graph = small_resnet.model.graph
    shapes = {
        entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
        for entry in (*graph.input, *graph.value_info, *graph.output)
    }
    assert shapes["input"] == ["batch", 3, 9, 8]
    assert shapes["stage3_block1/conv2"] == ["batch", 32, 3, 2]
    assert shapes["logits"] == ["batch", 5]
    assert shapes.keys() == {"input"} | {name for node in graph.node for name in node.output}


def test_fast_resnet(export):
    operators = export(FastResNet(width=4, num_classes=5), SHAPE).operators
    assert operators.keys() == {"Conv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


def test_unknown_statistics_do_not_appear(small_resnet):
    plain, variables, *_ = small_resnet
    statistics = {"input_low": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    extra = variables | {"batch_stats": variables["batch_stats"] | {"stem": statistics}}
    model = to_onnx(SMALL_RESNET().apply, extra, SHAPE)
    assert model == plain


@pytest.mark.parametrize(("opset", "ir_version"), [(13, 7), (17, 8), (21, 10)])
def test_opsets_against_the_reference_evaluator(opset, ir_version, export):
    net = nn.Sequential(
        [
            nn.Conv(4, (3, 3), 2, padding=1, use_bias=False),
            norm(),
            nn.relu6,
            partial(jnp.mean, axis=(1, 2)),
            nn.Dense(5),
        ]
    )
    model, variables, summary, (images,) = export(net, SHAPE, opset=opset)
    assert (summary["opset"], model.ir_version) == (opset, ir_version)
    (logits,) = ReferenceEvaluator(model).run(None, {"input": images.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(logits, net.apply(variables, images), rtol=0, atol=1e-5)


ONE = {"Conv": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
BODIES = {
    "bias before batch norm": (lambda x: norm()(nn.Conv(6, (3, 3), padding=1)(x)), {"Conv": 2}),
    "batch norm without scale and bias": (
        lambda x: norm(use_scale=False, use_bias=False)(nn.Conv(6, (1, 1))(x)),
        {"Conv": 2},
    ),
    "grouped": (
        lambda x: norm()(nn.Conv(6, (3, 3), padding=1, feature_group_count=2, use_bias=False)(x)),
        {"Conv": 2},
    ),
    "depthwise": (
        lambda x: norm()(nn.Conv(4, (3, 3), padding=1, feature_group_count=4, use_bias=False)(x)),
        {"Conv": 2},
    ),
    "dilated": (lambda x: nn.Conv(4, (3, 3), padding=2, kernel_dilation=2)(x), {"Conv": 2}),
    "SAME with stride 2": (lambda x: nn.Conv(4, (3, 3), strides=2)(x), {"Conv": 2}),
    "relu6": (nn.relu6, {"Clip": 1}),
    "max pool": (lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)), {"MaxPool": 1}),
    "max pool SAME": (lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"), {"MaxPool": 1}),
    "average pool": (lambda x: nn.avg_pool(x, (2, 2), strides=(2, 2)), {"AveragePool": 1}),
    "average pool SAME": (lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME"), {"AveragePool": 1}),
    "average pool without pads": (
        lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False),
        {"AveragePool": 1},
    ),
    "maximum over height and width": (
        lambda x: jnp.max(x, axis=(1, 2)),
        {"GlobalMaxPool": 1, "GlobalAveragePool": 0},
    ),
    "mean as a method": (lambda x: x.mean(axis=(1, 2)), {}),
    "kept dimensions": (
        lambda x: jnp.mean(x, axis=(1, 2), keepdims=True) * x,
        {"GlobalAveragePool": 2, "Mul": 1},
    ),
    "constants a channel": (
        lambda x: nn.relu(x) * jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4) - 1.0,
        {"Relu": 1, "Mul": 1, "Sub": 1},
    ),
    "constants a channel, behind a layer": (
        lambda x: x * jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4) - 1.0,
        {},
    ),
    "concatenation": (lambda x: jnp.concatenate([x, nn.relu(x)], axis=-1), {"Concat": 1, "Relu": 1}),
    "dropout": (nn.Dropout(0.5, deterministic=True), {}),
}


@pytest.mark.parametrize("name", BODIES)
def test_layers(name, export_body):
    body, operators = BODIES[name]
    with jax.numpy_dtype_promotion("standard"):  # nn.avg_pool divides by an integer
        found = export_body(body, SHAPE).operators
    assert found == {key: count for key, count in (ONE | operators).items() if count}


def test_one_convolution_under_two_batch_norms(export_body):
    def body(x):
        shared = nn.Conv(4, (3, 3), padding=1, name="shared")
        return norm(name="second")(shared(nn.relu(norm(name="first")(shared(x)))))

    names = [tensor.name for tensor in export_body(body).model.graph.initializer]
    assert {"shared/kernel", "shared/bias", "shared/kernel_1", "shared/bias_1"} <= set(names)


def test_one_batch_norm_on_two_convolutions(export_body):
    def body(x):
        shared = norm(name="shared")
        return shared(nn.Conv(4, (1, 1), name="b")(shared(nn.Conv(4, (1, 1), name="a")(x))))

    assert export_body(body).operators == ONE | {"Conv": 3}


def test_one_kernel_used_twice_is_stored_once(export_body):
    def body(x):
        shared = nn.Conv(4, (3, 3), padding=1, name="shared")
        return shared(nn.relu(shared(x)))

    graph = export_body(body).model.graph
    assert [node.name for node in graph.node if node.op_type == "Conv"] == ["stem", "shared", "shared_1"]
    names = [tensor.name for tensor in graph.initializer]
    assert names.count("shared/kernel") == 1 and "shared/kernel_1" not in names


def test_tied_weights_are_stored_once(export):
    """An autoencoder's decoder may be the encoder's kernel transposed, or the kernel as it is."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (6, 6))
            return nn.relu(nn.relu(x @ kernel) @ kernel) @ kernel.T

    model = export(Tied(), (6,)).model
    assert [node.op_type for node in model.graph.node] == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    assert [tensor.name for tensor in model.graph.initializer] == ["kernel", "kernel_1"]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda x: norm()(nn.relu(x)), 1),
        (lambda x: norm()(jnp.concatenate([x, nn.relu(x)], axis=-1)), 1),
        (lambda x: norm()(x) + x, 1),
        (lambda x: norm(use_scale=False)(nn.max_pool(x, (2, 2))), 0),
        (lambda x: norm()(nn.max_pool(x, (2, 2))), 0),
        (lambda x: norm()(nn.ConvTranspose(6, (2, 2), (2, 2))(x)), 0),
        (lambda x: norm()(nn.Dense(6)(x)), 0),
        (lambda x: norm()(nn.Dense(6)(x.mean((1, 2)))), 0),
        (lambda x: norm()(nn.Dense(6, use_bias=False)(x.mean((1, 2)))), 0),
    ],
)
def test_batch_norm_folds_into_a_layer_or_stays(body, kept, export_body):
    operators = export_body(body).operators
    assert operators.get("BatchNormalization", 0) == kept and "Transpose" not in operators
    assert export_body(body, fold_batch_norm=False).operators["BatchNormalization"] == 1


def test_interface_names_and_fixed_batch():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (1, 1), name="images")(x)
            x = nn.Dense(5, name="scores")(jnp.mean(x, axis=(1, 2)))
            return nn.Dropout(0.5, deterministic=True)(x)

    images = np.random.default_rng(0).normal(size=(7, *SHAPE)).astype(np.float32)
    variables = Net().init(jax.random.key(0), images)
    options = {"dynamic_batch": False, "input_names": ["images"], "output_names": ["scores"]}
    model = to_onnx(Net().apply, variables, SHAPE, **options)
    assert [node.name for node in model.graph.node] == ["images_1", "GlobalAveragePool", "Flatten", "scores"]
    assert model.graph.input[0].name == "images" and model.graph.output[0].name == "scores"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    verify(model, Net().apply, variables, images, batch_sizes=(1,))
    with pytest.raises(InvalidInput, match="onnxruntime: batch size 7"):
        verify(model, Net().apply, variables, images)
