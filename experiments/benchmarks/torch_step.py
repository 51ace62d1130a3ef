"""Build PyTorch's training step of the same network, for `experiments.benchmarks.step`."""

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import default_fused_act_fake_quant, default_fused_wt_fake_quant
from torch.nn.utils import parametrize

import qt_jax as qt
from experiments.benchmarks.torch_models import twin
from experiments.configs.training import Config

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def torch_step(
    model: linen.Module, images: np.ndarray, labels: np.ndarray, config: Config, *, quantized: bool = False
) -> tuple[Callable[[Any], Any], Any]:
    """Return `advance` and its first state: forward, backward and SGD with Nesterov momentum, eagerly.

    It runs on CUDA where JAX's default backend is a GPU, else on the CPU, and in bfloat16 under
    `torch.autocast`. Images are normalised, channels last and on the device beforehand. Augmentation, less
    than one percent of JAX's step, is left out, and so are the running sums of the loss.

    Args:
      model: Linen module, whose PyTorch twin is trained.
      images: uint8 `(n, height, width, channels)`, of which the first batch is taken every time.
      labels: int32 `(n,)`, or for segmentation uint8 `(n, height, width)`.
      config: Gives the batch size, the optimizer and the compute type.
      quantized: Apply `fake_quantized`.

    Raises:
      InvalidInput: JAX is on a GPU and this PyTorch is not, or there is no PyTorch network for `model`.
    """
    device = torch_device()
    network = twin(model, images.shape[1]).train().to(device, memory_format=torch.channels_last)
    if quantized:
        fake_quantized(network)
    batch = torch.from_numpy(images[: config.batch_size].astype(np.float32) / 255).permute(0, 3, 1, 2)
    batch = batch.to(device, memory_format=torch.channels_last)
    targets = torch.from_numpy(labels[: config.batch_size].astype(np.int64)).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        weight_decay=config.weight_decay,
    )

    def advance(state: Any) -> Any:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = network(batch)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return state

    return advance, None


def torch_device() -> str:
    """Return the device on which JAX computes, "cuda" or "cpu".

    On CUDA, convolutions are tuned and in TF32, as in JAX.

    Raises:
      InvalidInput: JAX is on a GPU and this PyTorch is not.
    """
    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise qt.InvalidInput(f"JAX is on a GPU, and torch {torch.__version__} finds none")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32
    return "cuda"


def fake_quantized(network: nn.Module) -> None:
    """Put PyTorch's own fake quantization, W8A8, on the weight and the input of every layer, in place.

    These are the fused defaults of `torch.ao.quantization`: moving averages of minimum and maximum over the
    whole tensor, symmetric for weights and affine for inputs, updated in every step, with the
    straight-through estimator. They are where Quant-Trim's are. `prepare_qat` would place those of the inputs
    at the outputs of the previous layers, including batch norm and ReLU. Under autocast they compute in
    float32, because they support nothing else.
    """
    for layer in [module for module in network.modules() if isinstance(module, LAYERS)]:
        device = layer.weight.device
        layer.register_module("input_fake_quant", default_fused_act_fake_quant().to(device))
        layer.register_forward_pre_hook(lambda layer, inputs: layer.input_fake_quant(inputs[0].float()))
        parametrize.register_parametrization(layer, "weight", default_fused_wt_fake_quant().to(device))
