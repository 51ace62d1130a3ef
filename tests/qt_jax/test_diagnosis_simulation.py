"""Check the layers of a graph, and the float graph that computes what a low-bit one would."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.running import logits_of
from qt_jax.diagnosis.simulation import (
    SIMULATED_SCHEMES,
    Precision,
    everywhere,
    rounded_kernel,
    simulated,
)
from qt_jax.export import graph
from qt_jax.export.encodings import kernel_rows
from qt_jax.export.sessions import named_inputs, run_tensors

MODEL = Path(__file__).parents[2] / "experiments" / "results" / "cifar10-resnet8" / "model.onnx"


@pytest.fixture(scope="module")
def model():
    return onnx.load(MODEL)


def test_layers_of_the_committed_network(model):
    layers = layers_of(model)
    assert next(iter(layers)) == "stem" and "head" in layers and len(layers) == 10
    values = graph.constants(model)
    assert kernel_rows(values[layers["stem"].kernel], layers["stem"].axis).shape == (16, 27)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_kernel_is_within_half_a_step(bits, per_channel):
    kernel = np.random.default_rng(bits).normal(size=(5, 3, 3, 3)).astype(np.float32)
    rounded = rounded_kernel(kernel, Precision(bits, None, per_channel), 0)
    largest = np.abs(kernel).max(axis=(1, 2, 3) if per_channel else None, keepdims=True)
    step = largest.astype(np.float64) / (2 ** (bits - 1) - 1)
    assert np.all(np.abs(rounded - kernel) <= 0.5 * step + 1e-6)
    np.testing.assert_allclose(rounded / step, np.rint(rounded / step), atol=1e-4)


def test_simulation_rounds_what_it_is_told_to(model):
    images = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)
    layers = layers_of(model)
    bounds = dict.fromkeys(layers, (-4.0, 4.0))
    reference = logits_of(model, images)
    np.testing.assert_array_equal(logits_of(simulated(model, {}, bounds), images), reference)

    only = simulated(model, {"stem": Precision(8, 8)}, bounds)
    name = "stem/input on 8 bits/rounded"
    [found] = run_tensors(only, [name], named_inputs(only, images))
    step = 8.0 / 255
    expected = (np.clip(np.rint(images / step) + 128, 0, 255) - 128) * step
    same = np.isclose(found[name], expected, atol=1e-5)  # but for ties, which float32 may tip
    assert np.mean(same) > 0.999 and np.abs(found[name] - expected).max() < 1.01 * step

    errors = []
    for scheme in ("int8-pc", "int4w-pc"):
        rounded = simulated(model, everywhere(layers, SIMULATED_SCHEMES[scheme]), {})
        errors.append(np.mean((logits_of(rounded, images) - reference) ** 2))
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize("name", ["stem", "head"])
def test_only_the_named_kernel_is_rounded_and_to_the_stated_grid(model, name):
    """Expect 4 bits on [-7, 7] with s = max|w| / 7, one scale per tensor."""
    only = simulated(model, {name: Precision(4, None)}, {})
    before, after, layers = graph.constants(model), graph.constants(only), layers_of(only)
    for other, layer in layers_of(model).items():
        if other != name:
            np.testing.assert_array_equal(after[layers[other].kernel], before[layer.kernel])
    kernel = before[layers_of(model)[name].kernel]
    scale = np.abs(kernel).max() / 7
    expected = np.clip(np.round(kernel / scale), -7, 7) * scale
    np.testing.assert_allclose(after[layers[name].kernel], expected, rtol=1e-5, atol=1e-6)
