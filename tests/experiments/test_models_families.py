"""Check the families beside the residual networks: shapes, parameter paths, one step of training each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import models
from experiments.models.convnext import ConvNeXt
from experiments.models.mobilenet import Block, MobileNetV2, MobileNetV3, SqueezeExcite, Stage
from experiments.models.recurrent import RowReader
from experiments.models.segmenters import ASPP, UNet
from experiments.models.transformers import Mixer, ViT

CLASSES = 5
TINY_BLOCKS = (Block(3, 4, 4, True, nn.relu, 2), Block(5, 8, 4, True, nn.hard_swish, 1))
ATTENTION = [f"block1/attention/{name}" for name in ("query", "key", "value", "out")]

TINY = {
    "mobilenetv2": (
        MobileNetV2(4, (Stage(1, 4, 1, 1), Stage(2, 8, 2, 2)), 16, CLASSES),
        ["stem", "stage1_block1/depthwise", "stage1_block1/project"]
        + [f"stage2_block{b}/{layer}" for b in (1, 2) for layer in ("expand", "depthwise", "project")]
        + ["last", "head"],
    ),
    "mobilenetv3": (
        MobileNetV3(4, TINY_BLOCKS, 8, 8, CLASSES),
        ["stem", "block1/depthwise", "block1/project", "block2/expand", "block2/depthwise", "block2/project"]
        + [f"block{b}/squeeze_excite/{layer}" for b in (1, 2) for layer in ("squeeze", "excite")]
        + ["last", "hidden", "head"],
    ),
    "convnext": (
        ConvNeXt((4, 8), (1, 1), num_classes=CLASSES),
        ["stem", "stage2_down", "head"]
        + [f"stage{s}_block1/{layer}" for s in (1, 2) for layer in ("depthwise", "mlp_in", "mlp_out")],
    ),
    "vit": (
        ViT(dim=8, depth=1, heads=2, num_classes=CLASSES),
        ["patches", *ATTENTION, "block1/mlp_in", "block1/mlp_out", "head"],
    ),
    "mixer": (
        Mixer(dim=8, depth=1, token_hidden=8, channel_hidden=8, num_classes=CLASSES),
        [f"block1/{mlp}_mlp/{end}" for mlp in ("token", "channel") for end in ("in", "out")]
        + ["patches", "head"],
    ),
    "lstm": (
        RowReader(nn.LSTMCell, 8, CLASSES),
        [f"cell/{source}{gate}" for source in "ih" for gate in "ifgo"] + ["head"],
    ),
    "gru": (
        RowReader(nn.GRUCell, 8, CLASSES),
        [f"cell/{source}{gate}" for source in "ih" for gate in "rzn"] + ["head"],
    ),
    "aspp": (
        ASPP(width=4, features=4, num_classes=CLASSES),
        ["stem", *(f"block{b}/conv{c}" for b in (1, 2, 3) for c in (1, 2))]
        + ["block2/shortcut", "block3/shortcut"]
        + [f"pyramid/{layer}" for layer in ("point", "dilated2", "dilated4", "dilated6", "pooled", "project")]
        + ["head"],
    ),
} | {
    f"unet-{up}": (
        UNet(up, width=4, depth=1, num_classes=CLASSES),
        [f"{block}/conv{c}" for block in ("down1", "bottom", "up1") for c in (1, 2)] + ["up1_resize", "head"],
    )
    for up in ("transposed", "nearest", "bilinear")
}
"""A tiny model of each family, and the paths of its layers with a kernel."""

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EACH = pytest.mark.parametrize("name", TINY)


def images(height: int, width: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, height, width, 3)), jnp.float32)


@EACH
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_logits_are_float32_one_a_class_or_one_a_class_and_pixel(name, size):
    model, _ = TINY[name]
    variables = jax.eval_shape(model.init, jax.random.key(1), images(*size))
    logits = jax.eval_shape(model.apply, variables, images(*size))
    per_pixel = size if isinstance(model, UNet | ASPP) else ()
    assert (logits.shape, logits.dtype) == ((2, *per_pixel, CLASSES), jnp.float32)


@EACH
def test_layers_are_named_for_what_they_do(name):
    model, paths = TINY[name]
    params = flatten_dict(jax.eval_shape(model.init, jax.random.key(1), images(16, 16))["params"])
    assert {"/".join(path[:-1]) for path in params if path[-1] == "kernel"} == set(paths)


def random_variables(model: nn.Module, batch: jax.Array) -> dict:
    """Draw variables of the right shapes without compiling `init`. Variances are positive."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(1), batch)
    return jax.tree.map(lambda leaf: random.uniform(0.05, 0.6, leaf.shape).astype(np.float32), shapes)


@EACH
def test_a_gradient_reaches_every_parameter(name):
    """Accept a zero gradient only for a bias that batch norm or softmax cancels."""
    model, _ = TINY[name]
    batch = images(8, 16)
    variables = random_variables(model, batch)

    def loss(params):
        logits, updated = model.apply(
            {**variables, "params": params}, batch, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0]), updated

    step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_TO_COMPILE)
    for path, gradient in flatten_dict(step(variables["params"])[0]).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0.0 or path[-1] == "bias", path


@pytest.mark.parametrize("name", models.SEGMENTERS)
def test_a_segmenter_is_created_by_its_name(name):
    model = models.create(name, 7)
    variables = jax.eval_shape(model.init, jax.random.key(1), images(32, 32))
    assert jax.eval_shape(model.apply, variables, images(32, 32)).shape == (2, 32, 32, 7)


@pytest.mark.parametrize(
    ("name", "thousands"), [("mobilenetv2", 343), ("vit", 311), ("mobilenetv3", 297), ("mixer", 329)]
)
def test_sizes_that_the_documentation_states(name, thousands):
    model = models.create(name, 10)
    params = jax.eval_shape(model.init, jax.random.key(1), images(32, 32))["params"]
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) // 1000 == thousands


def test_mobilenet_uses_a_grouped_convolution_with_one_filter_a_channel():
    params = flatten_dict(
        jax.eval_shape(models.create("mobilenetv2", 10).init, jax.random.key(1), images(32, 32))["params"]
    )
    depthwise = {path[0]: leaf.shape for path, leaf in params.items() if path[1] == "depthwise"}
    assert len(depthwise) == 10
    assert all(shape[:3] == (3, 3, 1) for shape in depthwise.values())


def test_squeeze_and_excitation_scales_whole_channels():
    batch = images(4, 4) + 2.0
    module = SqueezeExcite()
    variables = random_variables(module, batch)
    gates = module.apply(variables, batch) / batch
    np.testing.assert_allclose(gates, jnp.broadcast_to(gates[:, :1, :1], gates.shape), rtol=1e-5)
    assert np.all((np.asarray(gates) >= 0.0) & (np.asarray(gates) <= 1.0 + 1e-6))


def test_a_row_reader_reads_the_last_row_last():
    """Check against the cell alone that the state after the first rows leads to the state after all rows."""
    model, _ = TINY["gru"]
    batch = images(4, 8)
    variables = random_variables(model, batch)
    cell = nn.GRUCell(8)
    state = jnp.zeros((2, 8))
    for row in range(4):
        state, _ = cell.apply({"params": variables["params"]["cell"]}, state, batch[:, row].reshape(2, -1))
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        model.apply(variables, batch), state @ head["kernel"] + head["bias"][None], atol=1e-5
    )
