"""Test the learned factors against the backend of emulated grids, and their rounding against closed forms."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qt_jax.backends import grids
from qt_jax.equalization import learned
from qt_jax.equalization.channels import find_freedom
from qt_jax.equalization.learned import GRIDS, grid, learned_factors, rounded_activation, rounded_kernel
from qt_jax.equalization.rescaling import rescale, tensors_of, with_own_constants
from qt_jax.errors import InvalidInput
from qt_jax.export.sessions import open_unoptimized

SCHEMES = {scheme.name: scheme for scheme in grids.BACKEND.schemes}
RNG = np.random.default_rng(0)


def network(batch="n", spread=0.0):
    """Build a small network with every product; channels of its layers are spread by exp(spread * normal)."""
    shapes = {
        "stem": (4, 2, 3, 3),
        "depthwise": (4, 1, 3, 3),
        "up": (4, 3, 2, 2),
        "head": (6, 5),
    }
    generator = np.random.default_rng(1)
    tensors = {name: generator.standard_normal(shape) / 3 for name, shape in shapes.items()}
    gains = np.exp(spread * generator.standard_normal(4))
    tensors["stem"] *= gains[:, None, None, None]
    tensors["depthwise"] /= gains[:, None, None, None]
    tensors |= {
        "stem_bias": gains * generator.standard_normal(4) / 9,
        "bias": generator.standard_normal(5) / 9,
    }
    nodes = [
        helper.make_node("Conv", ["x", "stem", "stem_bias"], ["a"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node(
            "Conv", ["b", "depthwise"], ["c"], name="c", group=4, strides=[2, 2], pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("ConvTranspose", ["d", "up"], ["e"], name="e", group=2, strides=[2, 2]),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["g"]),
        helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("Gemm", ["h", "head", "bias"], ["y"], name="y"),
    ]
    held = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return with_own_constants(model)


def images(n):
    return np.random.default_rng(2).standard_normal((n, 2, 6, 6)).astype(np.float32)


def free(model):
    return find_freedom(model, tensors_of(model, {"x": images(4)}))


@pytest.mark.parametrize("name", GRIDS)
def test_a_kernel_is_rounded_as_in_the_backend(name):
    """Float32 quotients may fall on the other side of a half where float64's come within 1e-5 of it."""
    convention = grids.CONVENTIONS[name.rpartition("-")[0]]
    kernel = RNG.standard_normal((6, 50)).astype(np.float32) * np.float32([[1], [3], [0.2], [7], [0], [1e-3]])
    largest = np.abs(kernel).max(axis=1, keepdims=True)
    expected = grids.rounded_kernel(kernel, largest.astype(np.float64), convention)
    quotients = kernel / grids.scale_of(largest.astype(np.float64), convention)
    clear = (np.abs(quotients % 1 - 0.5) > 1e-5) | (np.abs(kernel) == largest)
    assert clear.mean() > 0.95 and (kernel == -largest).any()
    found = rounded_kernel(jnp.asarray(kernel), jnp.asarray(largest), grid(name))
    np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-6)


@pytest.mark.parametrize("name", ["int4w-full-pt", "int4w-po2-up-pt", "int8-po2-near-pc"])
@pytest.mark.parametrize("shift", [-20.0, 0.0, 0.5, 20.0])
def test_what_a_product_reads_is_rounded_as_in_the_backend(name, shift):
    x = RNG.standard_normal((3, 200)).astype(np.float32) + np.float32(shift)
    ends = float(x.min()), float(x.max())
    scale, low, high = grids.activation_grid(*ends, grids.CONVENTIONS[name.rpartition("-")[0]])
    round_groups = jax.vmap(lambda group: rounded_activation(group, grid(name)), axis_name=learned.GROUP)
    found = np.asarray(round_groups(jnp.asarray(x)))
    expected = np.clip(np.rint(x.astype(np.float64) / scale) * scale, low, high)
    clear = np.abs(x.astype(np.float64) / scale % 1 - 0.5) > 1e-3
    np.testing.assert_allclose(found[clear], expected[clear], rtol=0, atol=scale / 100)
    assert np.abs(found - expected).max() < 1.01 * scale


def test_rounding_has_the_gradient_of_the_identity_and_of_its_scale():
    """With s = a / 7, w' = s r, r = round(w / s): dw'/dw = 1, and a moves the others by (r - w / s) / 7."""
    kernel = np.float32([7.0, 2.2, -3.4])

    def total(kernel):
        largest = jnp.max(jnp.abs(kernel), keepdims=True)
        return jnp.sum(rounded_kernel(kernel, largest, grid("int4w-narrow-pt")))

    slope = jax.grad(total)(kernel)
    errors = np.round(kernel) - kernel
    np.testing.assert_allclose(slope, [1 + errors.sum() / 7, 1, 1], rtol=1e-5)


def test_a_power_of_two_has_the_gradient_of_the_scale_in_its_logarithm():
    """With s = 2^k near a / 7, ds/da = s / a: weights move by s / a (r - w / s), clipped ones by 7 s / a."""
    kernel = np.float32([9.0, 2.2, -3.4])  # 9 / 7 is nearest to 1, so that 9 is clipped to 7

    def total(kernel):
        largest = jnp.max(jnp.abs(kernel), keepdims=True)
        return jnp.sum(rounded_kernel(kernel, largest, grid("int4w-po2-near-pt")))

    assert total(kernel) == 7 + 2 - 3
    slope = jax.grad(total)(kernel)
    np.testing.assert_allclose(slope, [(7 + (2 - 2.2) + (-3 + 3.4)) / 9, 1, 1], rtol=1e-5)


def emulated_errors(model, samples, folder, monkeypatch):
    """Return the log of the relative error of the outputs on every grid, as the backend computes them."""
    monkeypatch.chdir(folder)  # compiling leaves files in the working directory
    onnx.save(model, folder / "source.onnx")
    [expected] = open_unoptimized(model).run(None, {"x": samples})
    errors = {}
    for name in GRIDS:
        (folder / name).mkdir()
        grids.BACKEND.compile(folder / "source.onnx", samples, SCHEMES[name], folder / name)
        found = grids.BACKEND.load(folder / name, SCHEMES[name], grids.RUNTIME)(samples)
        errors[name] = math.log(np.sum((found - expected) ** 2) / np.sum(expected**2) + learned.FLOOR)
    return errors


def test_the_objective_is_the_error_that_the_backend_of_grids_makes(tmp_path, monkeypatch):
    """The backend takes the ranges of activations from the float graph, which accounts for the difference."""
    model, samples = network(), images(3)  # too few to keep some apart
    found = learned_factors(model, free(model), samples, steps=0)
    expected = emulated_errors(model, samples, tmp_path, monkeypatch)
    assert found.before == pytest.approx(expected, abs=0.3) and found.after == found.before


def test_learned_factors_lower_the_errors_that_the_backend_makes(tmp_path, monkeypatch):
    """Channels of very unlike sizes are what per tensor grids cannot hold."""
    model, samples, lines = network(spread=1.5), images(16), []
    freedom = free(model)
    found = learned_factors(model, freedom, samples, steps=60, learning_rate=0.1, progress=lines.append)
    assert found.factors.shape == (freedom.count + 1,) and found.factors[0] == 1
    assert found.factors.dtype == np.float64 and (found.factors > 0).all()
    assert len(lines) == 60 and lines[0].startswith("step 1 of 60: error -")
    assert found.best_step in (50, 60) and found.steps == 60
    neutral, fresh = rescale(model, freedom, found.factors), images(64)[16:]
    [before], [after] = (open_unoptimized(it).run(None, {"x": fresh}) for it in (model, neutral))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    gains = []
    for name, it in (("before", model), ("after", neutral)):
        (tmp_path / name).mkdir()
        gains.append(learned.objective(emulated_errors(it, samples, tmp_path / name, monkeypatch)))
    assert gains[1] < gains[0] - 1  # 4.3 dB


def test_a_seed_determines_the_factors():
    model, samples = network(spread=1.0), images(16)
    first, second = (learned_factors(model, free(model), samples, steps=3).factors for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_factors_are_never_worse_than_the_start():
    model, samples = network(), images(16)
    freedom = free(model)
    awful = np.exp(3 * np.random.default_rng(0).standard_normal(freedom.count + 1))
    found = learned_factors(model, freedom, samples, start=awful, steps=2, learning_rate=30.0)
    np.testing.assert_array_equal(found.factors, 1)
    assert found.best_step == 0 and found.after == found.before


def test_a_better_start_is_where_the_descent_begins():
    model, samples = network(spread=1.5), images(16)
    freedom = free(model)
    good = learned_factors(model, freedom, samples, steps=50, learning_rate=0.2)
    again = learned_factors(model, freedom, samples, start=good.factors, steps=0)
    np.testing.assert_allclose(again.factors, good.factors, rtol=1e-6)
    assert again.after == pytest.approx(good.after, abs=1e-3)


def test_a_graph_with_a_fixed_batch_is_judged_as_one_with_an_open_batch():
    samples = images(3)
    open_batch, single = (
        learned_factors(model, free(model), samples, steps=0).before
        for model in (network(), network(batch=1))
    )
    assert single == pytest.approx(open_batch, abs=1e-3)


def alone(*nodes):
    """Build a graph from x to y without layers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 6, 6])
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            alone(helper.make_node("Det", ["x"], ["y"], name="it")),
            'node "it" is a Det, .*; use the closed form',
        ),
        (
            alone(helper.make_node("Shape", ["x"], ["y"])),
            "none of its outputs is float32; use the closed form",
        ),
    ],
)
def test_a_graph_that_jax_cannot_run_is_refused_in_one_sentence(model, message):
    with pytest.raises(InvalidInput, match=f"^the learned way cannot run this graph: {message}$"):
        learned_factors(model, find_freedom(model, {}), images(4))


def test_outputs_that_differ_from_onnxruntime_are_refused(monkeypatch):
    monkeypatch.setattr(learned, "AGREEMENT", -1.0)
    model = network()
    with pytest.raises(
        InvalidInput, match=r"its output y differs by .* from onnxruntime's; use the closed form"
    ):
        learned_factors(model, free(model), images(4))


@pytest.mark.slow
def test_a_float_resnet_gains_on_int4():
    """The committed twin, on the 32 calibration images that its run keeps: fewer than the way is made for."""
    results = Path(__file__).parents[2] / "experiments" / "results" / "cifar10-resnet8"
    model = with_own_constants(onnx.load(results / "twin.onnx"))
    samples = np.load(results / "samples.npz")["calibration"].transpose(0, 3, 1, 2)
    freedom = find_freedom(model, tensors_of(model, {"input": samples}))
    found = learned_factors(model, freedom, samples, steps=60)
    assert np.mean(list(found.after.values())) < np.mean(list(found.before.values())) - 0.3
