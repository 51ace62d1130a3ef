"""Check PyTorch's side of the benchmark of a training step."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import qt_jax as qt
from experiments import models
from experiments.benchmarks import variants
from experiments.configs.training import Config

torch = pytest.importorskip("torch")
from experiments.benchmarks import torch_step  # noqa: E402

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
LABELS = np.arange(4, dtype=np.int32)
TWIN = torch_step.twin


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fake_quantization_on_weight_and_input_of_every_layer(monkeypatch, dtype):
    """Check that ranges move in a step, the loss has a gradient, and parameters stay in float32."""
    networks = []
    monkeypatch.setattr(torch_step, "twin", lambda *given: networks.append(TWIN(*given)) or networks[-1])
    config = Config(model="tiny", batch_size=4, dtype=dtype)
    advance, state = torch_step.torch_step(models.create("tiny", 10), IMAGES, LABELS, config, quantized=True)
    before = {name: value.clone() for name, value in networks[0].named_parameters()}
    advance(state)
    layers = [module for module in networks[0].modules() if isinstance(module, torch_step.LAYERS)]
    assert len(layers) == 4
    for layer in layers:
        weight = layer.parametrizations.weight[0]
        assert (weight.quant_min, weight.quant_max, weight.zero_point.item()) == (-128, 127, 0)
        assert (layer.input_fake_quant.quant_min, layer.input_fake_quant.quant_max) == (0, 255)
        assert torch.isfinite(layer.input_fake_quant.activation_post_process.max_val)
        assert len(torch.unique(layer.weight)) <= 256
    for name, value in networks[0].named_parameters():
        assert value.dtype == torch.float32 and not torch.equal(value, before[name]), name


def test_a_network_without_a_twin_is_a_reason():
    with pytest.raises(qt.InvalidInput, match="there is no PyTorch network for Dense"):
        torch_step.torch_step(linen.Dense(10), IMAGES, LABELS, Config(batch_size=4))


def test_torch_without_the_gpu_that_jax_has_is_refused(monkeypatch):
    monkeypatch.setattr(torch_step.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(qt.InvalidInput, match="JAX is on a GPU, and torch"):
        torch_step.torch_device()


def test_the_variant_has_taken_a_step():
    split = variants.Split(jnp.asarray(IMAGES), jnp.asarray(LABELS))
    model, config = models.create("tiny", 10), Config(model="tiny", batch_size=4)
    variant = variants._in_torch(model, split, config, quantized=False)
    assert variant.advance(variant.state) is None and not variant.compiled
