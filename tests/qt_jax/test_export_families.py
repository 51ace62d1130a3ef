"""Check every family at every opset: valid, standard, without Transposes of images, and equal to JAX."""

from functools import partial

import flax.linen as nn
import jax
import pytest

from experiments.models import MODELS, SEGMENTERS
from experiments.models.convnext import ConvNeXt
from experiments.models.mobilenet import Block, MobileNetV2, MobileNetV3, Stage
from experiments.models.recurrent import RowReader
from experiments.models.resnet import FastResNet, ResNet, ResNet50
from experiments.models.segmenters import ASPP, UNet
from experiments.models.speed_net import SpeedNet
from experiments.models.transformers import Mixer, ViT

SHAPE = (8, 8, 3)
OPSETS = (13, 15, 17, 19, 21)
V3_BLOCKS = (Block(3, 8, 4, True, nn.relu, 2), Block(5, 8, 4, True, nn.hard_swish, 1))

POOLED = {"GlobalAveragePool", "Flatten", "Gemm"}
RESIDUAL = POOLED | {"Conv", "Relu", "Add"}
ENCODER = {"Add", "LayerNormalization", "Gelu", "Gemm", "Conv", "MatMul", "Reshape", "Transpose"}
U_SHAPED = {"Conv", "Relu", "MaxPool", "Concat"}
FAMILIES = {
    "resnet": (ResNet((1, 1), width=4), RESIDUAL),
    "resnet50": (ResNet50((1,), width=4, num_classes=5), RESIDUAL | {"MaxPool"}),
    "fast resnet": (FastResNet(width=4), RESIDUAL),
    "speed net": (
        SpeedNet((4, 8)),
        {"Conv", "Relu", "MaxPool", "GlobalMaxPool", "Flatten", "Gemm"},
    ),
    "mobilenet v2": (
        MobileNetV2(4, (Stage(1, 4, 1, 1), Stage(2, 8, 2, 2)), last=16),
        POOLED | {"Conv", "Clip", "Add"},
    ),
    "mobilenet v3": (
        MobileNetV3(4, V3_BLOCKS, last=8, hidden=8),
        RESIDUAL | {"HardSwish", "HardSigmoid", "Mul"},
    ),
    "convnext": (
        ConvNeXt((4, 8), (1, 1)),
        POOLED | {"Conv", "MatMul", "Add", "Gelu", "LayerNormalization", "Transpose"},
    ),
    "vit": (
        ViT(dim=8, depth=1, heads=2),
        ENCODER | {"Softmax", "Pad", "Gather"},
    ),
    "mixer": (Mixer(dim=8, depth=1, token_hidden=8, channel_hidden=8), ENCODER | {"ReduceMean"}),
    "lstm": (
        RowReader(nn.LSTMCell, 4),
        {"Transpose", "Reshape", "Gather", "Gemm", "Sigmoid", "Tanh", "Mul", "Add"},
    ),
    "gru": (
        RowReader(nn.GRUCell, 4),
        {"Transpose", "Reshape", "Gather", "Gemm", "Sigmoid", "Tanh", "Mul", "Add", "Sub"},
    ),
    "unet, transposed": (UNet("transposed", width=4, depth=1), U_SHAPED | {"ConvTranspose"}),
    "unet, nearest": (UNet("nearest", width=4, depth=1), U_SHAPED | {"Resize"}),
    "unet, bilinear": (UNet("bilinear", width=4, depth=1), U_SHAPED | {"Resize"}),
    "aspp": (
        ASPP(width=4, features=4),
        {"Conv", "Relu", "Add", "Concat", "Resize", "GlobalAveragePool", "Expand"},
    ),
}
"""Maps a family to a tiny network, and the operators that it has at opset 21."""

WITHOUT_TRANSPOSE = [name for name in FAMILIES if name not in ("convnext", "vit", "mixer", "lstm", "gru")]
SINCE = {"LayerNormalization": 17, "Gelu": 20, "HardSwish": 14, "GroupNormalization": 21}


def test_every_registered_network_is_of_a_family_here():
    here = {type(model) for model, _ in FAMILIES.values()}
    for create in (MODELS | SEGMENTERS).values():
        assert (create.func if isinstance(create, partial) else create) in here


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_at_every_opset(name, export):
    model, expected = FAMILIES[name]
    for opset in OPSETS:
        with jax.numpy_dtype_promotion("standard"):
            exported = export(model, SHAPE, batch_sizes=(1, 3), opset=opset)
        found = set(exported.operators)
        assert exported.summary["opset"] == opset
        if name in WITHOUT_TRANSPOSE:
            assert "Transpose" not in found
        assert "BatchNormalization" not in found
        assert not [operator for operator in found if SINCE.get(operator, 13) > opset]
    assert found == expected
