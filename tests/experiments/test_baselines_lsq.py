"""Compare LSQ with the paper's formulas in numpy float64 and with ONNX's own quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import qt_jax as qt
from experiments.baselines.learned_ranges import fake_quant_learned
from experiments.baselines.lsq import LSQ, step_range
from qt_jax.grid import quantization_parameters
from qt_jax.interception import INPUT, KERNEL
from qt_jax.ranges import empty_range

CONFIG = qt.QuantConfig()
WEIGHTS = qt.QuantSpec(4, narrow_range=False)
PER_CHANNEL = qt.QuantSpec(4, axis=-1, narrow_range=False)
ACTIVATIONS = qt.QuantSpec(4, symmetric=False)

CASES = {
    "weights": (KERNEL, WEIGHTS, True, (-8, 7)),
    "weights per channel": (KERNEL, PER_CHANNEL, True, (-8, 7)),
    "unsigned activations": (INPUT, ACTIVATIONS, False, (0, 15)),
    "signed activations": (INPUT, ACTIVATIONS, True, (-8, 7)),
}


def tensor(signed: bool) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32)
    return x if signed else 2 * np.abs(x)


def seen_before(step, signed, spec):
    low, high = step_range(step, signed, spec)
    return {"low": low, "high": high, "count": jnp.int32(1)}


def elements(site, spec, x) -> int:
    """Return n of the gradient scale: the weights that share a step, or the features of one example."""
    if site == INPUT:
        return x[0].size
    return x.size // x.shape[-1] if spec.axis == -1 else x.size


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lam", [1.0, 0.25])
def test_gradients_are_finite_differences_of_the_surrogate(case, lam):
    """Return s clip(v / s) plus the fixed rounding, a surrogate with the paper's derivative in s."""
    site, spec, signed, (least, largest) = CASES[case]
    x, upstream = tensor(signed), np.random.default_rng(1).normal(size=(8, 5, 3))
    step = np.float32([0.11, 0.2, 0.3] if spec.axis else 0.2)

    def loss(x, step):
        seen = seen_before(jax.lax.stop_gradient(step), signed, spec)
        y, _ = fake_quant_learned(LSQ[site], x, step, seen, spec, CONFIG, jnp.float32(lam))
        return jnp.sum(y * upstream.astype(np.float32))

    gradient_x, gradient_step = jax.grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(step))

    v, s = x.astype(np.float64), step.astype(np.float64)
    clipped = np.clip(v / s, least, largest)
    residual = np.rint(clipped) - clipped

    def surrogate(v, s):
        return (1 - lam) * v + lam * s * (np.clip(v / s, least, largest) + residual)

    delta = 1e-6
    slope = (surrogate(v, s + delta) - surrogate(v, s - delta)) / (2 * delta)
    scale = 1 / np.sqrt(elements(site, spec, x) * largest)
    axes = (0, 1) if spec.axis else None
    np.testing.assert_allclose(gradient_step, scale * np.sum(slope * upstream, axes), rtol=1e-4, atol=1e-5)
    slope = (surrogate(v + delta, s) - surrogate(v - delta, s)) / (2 * delta)
    np.testing.assert_allclose(gradient_x, slope * upstream, rtol=1e-4, atol=1e-6)
    assert ((v / s < least) | (v / s > largest)).any()


@pytest.mark.parametrize("case", CASES)
def test_first_batch_sets_the_step(case):
    site, spec, signed, (_, largest) = CASES[case]
    x = tensor(signed)
    unset = jnp.zeros(3 if spec.axis else ())
    empty = empty_range(3 if spec.axis else None)
    y, after = fake_quant_learned(LSQ[site], jnp.asarray(x), unset, empty, spec, CONFIG, jnp.float32(1.0))
    expected = 2 * np.mean(np.abs(x.astype(np.float64)), (0, 1) if spec.axis else None) / np.sqrt(largest)
    step = LSQ[site].value(after["low"], after["high"], spec)
    np.testing.assert_allclose(step, expected, rtol=1e-6)
    assert int(after["count"]) == 1
    ratio = np.asarray(y, np.float64) / expected
    np.testing.assert_allclose(ratio, np.rint(ratio), atol=1e-5)

    again, later = fake_quant_learned(LSQ[site], 9 * x, step, after, spec, CONFIG, jnp.float32(1.0))
    np.testing.assert_allclose(LSQ[site].value(later["low"], later["high"], spec), expected, rtol=1e-6)
    assert np.max(np.abs(again)) <= 1.0001 * np.max(expected) * max(largest, 8)


def test_nothing_is_observed_or_changed_at_lambda_zero():
    x, step = jnp.asarray(tensor(True)), jnp.float32(0.0)
    y, after = fake_quant_learned(LSQ[INPUT], x, step, empty_range(), ACTIVATIONS, CONFIG, jnp.float32(0.0))
    np.testing.assert_array_equal(y, x)
    assert {key: float(value) for key, value in after.items()} == {"low": 0, "high": 0, "count": 0}


def onnx_round_trip(x, scale, zero_point, kind) -> np.ndarray:
    """Apply QuantizeLinear and DequantizeLinear of onnx's reference implementation."""
    names = ["x", "s", "z"]
    nodes = [
        helper.make_node("QuantizeLinear", names, ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, (), [scale]),
        helper.make_tensor("z", kind, (), [zero_point]),
    ]
    graph = helper.make_graph(
        nodes,
        "round_trip",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("site", "spec", "signed", "kind"),
    [
        (KERNEL, qt.QuantSpec(8, narrow_range=False), True, TensorProto.INT8),
        (KERNEL, WEIGHTS, True, TensorProto.INT4),
        (INPUT, qt.QuantSpec(8, symmetric=False), False, TensorProto.UINT8),
        (INPUT, qt.QuantSpec(8, symmetric=False), True, TensorProto.UINT8),
        (INPUT, ACTIVATIONS, True, TensorProto.UINT4),
    ],
)
def test_values_are_those_of_onnx(site, spec, signed, kind):
    x, step = tensor(signed), np.float32(3.0 / 2**spec.bits)
    seen = seen_before(jnp.asarray(step), signed, spec)
    y, after = fake_quant_learned(LSQ[site], x, jnp.asarray(step), seen, spec, CONFIG, jnp.float32(1.0))
    scale, zero_point = quantization_parameters(after["low"], after["high"], spec)
    assert float(scale) == pytest.approx(float(step), rel=1e-6)
    assert float(zero_point) == (0 if spec.symmetric or not signed else 2 ** (spec.bits - 1))
    np.testing.assert_array_equal(y, onnx_round_trip(x, float(scale), int(zero_point), kind))


def test_a_step_below_zero_is_held_above_and_stays_signed():
    seen = seen_before(jnp.float32(0.1), True, ACTIVATIONS)
    low, high = LSQ[INPUT].ends(jnp.float32(-1.0), seen, ACTIVATIONS)
    assert float(low) < 0.0 < float(high)
