"""Make the PyTorch twin of a Linen network, and copy its variables.

The networks are in `torch_classifiers`, `torch_sequences`, `torch_segmenters` and `torch_public`. Submodules
have the names of the Linen ones, so `load_variables` copies by path; `in`, a word of Python, becomes `in_`.
Images are NCHW.
"""

import keyword
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn

import qt_jax as qt
from experiments.benchmarks import public_models as public
from experiments.benchmarks import torch_classifiers as classifiers
from experiments.benchmarks import torch_public, torch_segmenters, torch_sequences
from experiments.models.convnext import ConvNeXt
from experiments.models.mobilenet import MobileNetV2, MobileNetV3
from experiments.models.recurrent import RowReader
from experiments.models.resnet import FastResNet, ResNet, ResNet50
from experiments.models.segmenters import ASPP, UNet
from experiments.models.speed_net import SpeedNet
from experiments.models.transformers import Mixer, ViT

MAKERS: dict[type, Callable[[Any], nn.Module]] = {
    ResNet: classifiers.residual_network,
    ResNet50: classifiers.residual_network,
    FastResNet: classifiers.ShortResNet,
    MobileNetV2: classifiers.mobilenet_v2,
    MobileNetV3: classifiers.mobilenet_v3,
    ConvNeXt: classifiers.convnext,
    SpeedNet: classifiers.SpeedBlocks,
    UNet: torch_segmenters.SkipUNet,
    ASPP: torch_segmenters.DeepLab,
    public.PoolFormer: torch_public.PoolFormerNet,
    public.DiffusionUNet: torch_public.DenoisingUNet,
}
"""Twins that do not depend on the image's size."""

SIZED: dict[type, Callable[[Any, int], nn.Module]] = {
    ViT: torch_sequences.VisionTransformer,
    Mixer: torch_sequences.MLPMixer,
    RowReader: torch_sequences.RowClassifier,
    public.PublicViT: torch_public.PublicVisionTransformer,
}
"""Twins whose parameters depend on it."""


def twin(linen: Any, image_size: int) -> nn.Module:
    """Return the PyTorch network of a Linen module's architecture, in evaluation mode, with fresh weights.

    Args:
      linen: A network of `experiments.models` or of `experiments.benchmarks.public_models`.
      image_size: Height and width in pixels.

    Raises:
      InvalidInput: The module is of another class.
    """
    kind = type(linen)
    if kind in SIZED:
        return SIZED[kind](linen, image_size).eval()
    if kind not in MAKERS:
        raise qt.InvalidInput(f"there is no PyTorch network for {kind.__name__}")
    return MAKERS[kind](linen).eval()


def load_variables(model: nn.Module, variables: Mapping[str, Any]) -> None:
    """Copy Flax variables into the twin, in place, so that both compute the same function.

    Args:
      model: From `twin`.
      variables: {"params": ..., "batch_stats": ...} of the Linen module.

    Raises:
      KeyError: The twin has no tensor for a leaf, or has one that no leaf fills.
    """
    leaves = flatten_dict(variables["params"]) | flatten_dict(variables.get("batch_stats", {}))
    packed = {name: PACKED[type(module)] for name, module in model.named_modules() if type(module) in PACKED}
    state = {}
    for name, pack in packed.items():
        start = tuple(name.split("."))
        below = {path[len(start) :]: leaf for path, leaf in leaves.items() if path[: len(start)] == start}
        leaves = {path: leaf for path, leaf in leaves.items() if path[: len(start)] != start}
        tensors = pack({path: np.asarray(leaf) for path, leaf in below.items()})
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
    for path, leaf in leaves.items():
        module = ".".join(f"{name}_" if keyword.iskeyword(name) else name for name in path[:-1])
        name, value = _in_torch(model.get_submodule(module), path[-1], np.asarray(leaf))
        state[f"{module}.{name}" if module else name] = value
    fixed = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    missing = model.state_dict().keys() - state.keys() - fixed
    missing = {name for name in missing if not name.endswith("batches_tracked")}
    if missing:
        raise KeyError(f"no Flax leaf for {', '.join(sorted(missing))}")
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    if surplus := model.load_state_dict(tensors, strict=False).unexpected_keys:
        raise KeyError(f"no tensor for {', '.join(surplus)}")


def _in_torch(layer: nn.Module, leaf: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Return one Flax leaf of a layer under PyTorch's name and in its layout."""
    if leaf == "kernel" and isinstance(layer, nn.Linear):  # attention's kernels have heads apart
        return "weight", value.reshape(layer.in_features, layer.out_features).T
    if leaf == "kernel" and isinstance(layer, nn.ConvTranspose2d):  # PyTorch's is a gradient: it flips
        return "weight", value[::-1, ::-1].transpose(2, 3, 0, 1)
    if leaf == "kernel":
        return "weight", value.transpose(3, 2, 0, 1)
    if leaf == "bias":
        return "bias", value.reshape(-1)
    if leaf == "layer_scale":
        return leaf, value.reshape(-1, 1, 1)
    return {"scale": "weight", "mean": "running_mean", "var": "running_var"}.get(leaf, leaf), value


Leaves = Mapping[tuple[str, ...], np.ndarray]


def _attention(leaves: Leaves) -> dict[str, np.ndarray]:
    """Join queries, keys and values, as one layer computes them."""
    dim = leaves["out", "bias"].size
    names = ("query", "key", "value")
    return {
        "in_weight": np.concatenate([leaves[name, "kernel"].reshape(dim, dim).T for name in names]),
        "in_bias": np.concatenate([leaves[name, "bias"].reshape(dim) for name in names]),
        "out_weight": leaves["out", "kernel"].reshape(dim, dim).T,
        "out_bias": leaves["out", "bias"],
    }


def _renamed(**names: str) -> Callable[[Leaves], dict[str, np.ndarray]]:
    return lambda leaves: {names[key]: value for key, value in _attention(leaves).items()}


def _recurrent(gates: str) -> Callable[[Leaves], dict[str, np.ndarray]]:
    """Join the gates of a cell. A bias that Flax does not have is zero."""

    def pack(leaves: Leaves) -> dict[str, np.ndarray]:
        packed = {}
        for side, end in (("i", "ih"), ("h", "hh")):
            kernels = [leaves[side + gate, "kernel"] for gate in gates]
            zeros = np.zeros(kernels[0].shape[1], np.float32)
            packed[f"weight_{end}_l0"] = np.concatenate([kernel.T for kernel in kernels])
            packed[f"bias_{end}_l0"] = np.concatenate(
                [leaves.get((side + gate, "bias"), zeros) for gate in gates]
            )
        return packed

    return pack


PACKED: dict[type, Callable[[Leaves], dict[str, np.ndarray]]] = {
    nn.MultiheadAttention: _renamed(
        in_weight="in_proj_weight",
        in_bias="in_proj_bias",
        out_weight="out_proj.weight",
        out_bias="out_proj.bias",
    ),
    torch_public.FusedAttention: _renamed(
        in_weight="qkv.weight", in_bias="qkv.bias", out_weight="proj.weight", out_bias="proj.bias"
    ),
    nn.LSTM: _recurrent("ifgo"),
    nn.GRU: _recurrent("rzn"),
}
"""Layers of PyTorch that hold the parameters of several layers of Flax in one tensor."""
