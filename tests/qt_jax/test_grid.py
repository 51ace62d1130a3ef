"""Check the affine grid against numpy in float64 and ONNX's reference evaluator."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import qt_jax as qt

SPECS = st.builds(
    qt.QuantSpec,
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    narrow_range=st.sampled_from([None, True, False]),
)
RANGES = st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(0, 1e4, width=32)).map(
    lambda r: (np.float32(r[0]), np.float32(r[0] + r[1]))
)


@hypothesis.given(SPECS, RANGES, st.integers(0, 2**31))
def test_grid_against_float64(spec, bounds, seed):
    low, high = bounds
    scale, zero_point = qt.quantization_parameters(jnp.float32(low), jnp.float32(high), spec)
    scale, zero_point = float(scale), float(zero_point)
    q_min, q_max = spec.integer_range
    assert scale > 0 and np.isfinite(scale)
    assert zero_point == int(zero_point) and q_min <= zero_point <= q_max

    x = np.random.default_rng(seed).uniform(-2e4, 2e4, 64).astype(np.float32)
    q = np.asarray(qt.quantize(x, jnp.float32(scale), jnp.float32(zero_point), spec))
    assert q.min() >= q_min and q.max() <= q_max
    exact = np.clip(np.round(x.astype(np.float64) / scale) + zero_point, q_min, q_max)
    ties = np.abs(np.abs(x.astype(np.float64) / scale) % 1 - 0.5) < 1e-3 * (1 + np.abs(x) / scale * 1e-4)
    assert np.all((q == exact) | ties)

    x_hat = np.asarray(qt.dequantize(q, jnp.float32(scale), jnp.float32(zero_point), spec))
    np.testing.assert_allclose(x_hat, (q - zero_point) * scale, rtol=1e-6)
    again = np.asarray(qt.quantize(x_hat, jnp.float32(scale), jnp.float32(zero_point), spec))
    np.testing.assert_array_equal(again, q)


@hypothesis.given(SPECS, RANGES)
def test_zero_is_exact_and_fake_quant_agrees(spec, bounds):
    low, high = jnp.float32(bounds[0]), jnp.float32(bounds[1])
    x = jnp.concatenate([jnp.zeros(1), jnp.linspace(-2e4, 2e4, 31)])
    scale, zero_point = qt.quantization_parameters(low, high, spec)
    two_steps = qt.dequantize(qt.quantize(x, scale, zero_point, spec), scale, zero_point, spec)
    one_step = qt.fake_quant(x, low, high, spec)
    assert one_step[0] == 0.0
    np.testing.assert_allclose(one_step, two_steps, rtol=1e-6, atol=1e-6 * float(scale))


@pytest.mark.parametrize(("spec", "dtype"), [(qt.QuantSpec(8, narrow_range=False), "int8"),
                                             (qt.QuantSpec(8, symmetric=False), "uint8"),
                                             (qt.QuantSpec(16, symmetric=False), "uint16"),
                                             (qt.QuantSpec(4, narrow_range=False), "int4")])  # fmt: skip
def test_integers_are_those_of_onnx_quantize_linear(spec, dtype):
    x = np.random.default_rng(0).normal(0, 2, 500).astype(np.float32)
    scale, zero_point = qt.quantization_parameters(jnp.float32(-3.1), jnp.float32(4.2), spec)
    element = getattr(onnx.TensorProto, dtype.upper())
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    graph = onnx.helper.make_graph(
        [node],
        "grid",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [500])],
        [onnx.helper.make_tensor_value_info("q", element, [500])],
        [
            onnx.numpy_helper.from_array(np.asarray(scale), "s"),
            onnx.helper.make_tensor("z", element, [], [int(zero_point)]),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (reference,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(qt.quantize(x, scale, zero_point, spec), reference.astype(np.int32))


def test_integer_ranges_and_scales_in_closed_form():
    assert qt.QuantSpec(8).integer_range == (-127, 127)
    assert qt.QuantSpec(4, narrow_range=False).integer_range == (-8, 7)
    assert qt.QuantSpec(8, symmetric=False, narrow_range=True).integer_range == (1, 255)
    cases = [(qt.QuantSpec(4), 7.0), (qt.QuantSpec(4, narrow_range=False), 7.5)]
    for spec, steps in cases:
        scale, zero_point = qt.quantization_parameters(jnp.float32(-2.0), jnp.float32(1.0), spec)
        np.testing.assert_allclose(scale, 2.0 / steps, rtol=1e-6)
        assert zero_point == 0


@pytest.mark.parametrize("spec", [qt.QuantSpec(8), qt.QuantSpec(8, symmetric=False)])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_dead_and_constant_tensors_never_give_nan(spec, value):
    x = jnp.full((5,), value)
    y = qt.fake_quant(x, jnp.min(x), jnp.max(x), spec)
    assert np.all(np.isfinite(y))
    np.testing.assert_allclose(y, x, rtol=1e-2)


def test_per_channel_equals_each_channel_alone():
    x = jax.random.normal(jax.random.key(0), (3, 3, 5, 4)) * jnp.array([0.1, 1.0, 10.0, 100.0]).reshape(
        1, 1, 1, 4
    )
    high = jnp.max(jnp.abs(x), (0, 1, 2))
    for axis in (-1, 3):
        y = qt.fake_quant(x, -high, high, qt.QuantSpec(4, axis=axis))
        for channel in range(4):
            alone = qt.fake_quant(x[..., channel], -high[channel], high[channel], qt.QuantSpec(4))
            np.testing.assert_allclose(y[..., channel], alone, rtol=1e-6)


def test_blend_is_linear_in_lambda_and_exact_at_both_ends():
    x = jax.random.normal(jax.random.key(0), (100,)) * 1e3
    low, high = jnp.float32(-1.0), jnp.float32(1.0)
    spec = qt.QuantSpec(3)
    np.testing.assert_array_equal(
        qt.fake_quant(x, low, high, spec, 1.0),
        qt.dequantize(qt.quantize(x, *(p := qt.quantization_parameters(low, high, spec)), spec), *p, spec),
    )
    plain, full = qt.fake_quant(x, low, high, spec, 0.0), qt.fake_quant(x, low, high, spec, 1.0)
    np.testing.assert_array_equal(plain, x)
    np.testing.assert_allclose(qt.fake_quant(x, low, high, spec, 0.25), 0.75 * plain + 0.25 * full, rtol=1e-5)


def test_straight_through_gradients():
    x = jnp.array([-2.0, -0.5, 0.3, 0.999, 1.001, 5.0])
    low, high, lam = jnp.float32(-1.0), jnp.float32(1.0), 0.75

    def gradient(ste):
        return jax.grad(lambda x: jnp.sum(qt.fake_quant(x, low, high, qt.QuantSpec(8, ste=ste), lam)))(x)

    np.testing.assert_array_equal(gradient("identity"), np.ones(6))
    np.testing.assert_allclose(gradient("clipped"), [0.25, 1.0, 1.0, 1.0, 0.25, 0.25])
    clipped, identity = (
        qt.fake_quant(x, low, high, qt.QuantSpec(8, ste=s), lam) for s in ("clipped", "identity")
    )
    np.testing.assert_array_equal(clipped, identity)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 1}, "bits"), ({"bits": 17}, "bits"), ({"bits": 8.0}, "bits"), ({"ste": "soft"}, "ste"),
     ({"quantile": 0.5}, "quantile"), ({"quantile": 1.1}, "quantile"),
     ({"axis": 1.5}, "axis"), ({"narrow_range": "yes"}, "narrow_range")],
)  # fmt: skip
def test_bad_specs_are_refused(options, message):
    with pytest.raises(qt.InvalidInput, match=f"QuantSpec.{message}"):
        qt.QuantSpec(**options)
