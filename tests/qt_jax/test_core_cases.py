"""Check faults that were seen in the training core: each has the right value, or is refused in a sentence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import qt_jax as qt
from tests.qt_jax.core_training import CONFIG, X, learned


def test_complex_layers_are_refused_unless_a_rule_leaves_them_out():
    model, z = nn.Dense(3, dtype=jnp.complex64, param_dtype=jnp.complex64), jax.lax.complex(X, X)
    variables = model.init(jax.random.key(0), z)
    with pytest.raises(qt.InvalidInput, match="complex64 numbers"):
        qt.attach_statistics(model, variables, CONFIG, z)
    config = qt.QuantConfig(rules=(qt.Rule("", skip=True),))
    y, _, _ = learned(model, variables, z, config=config, passes=1)
    np.testing.assert_array_equal(y, model.apply(variables, z))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_whole_numbers_are_rounded_as_floats_are(dtype):
    whole = jax.random.randint(jax.random.key(0), (64, 10), 0, 6).astype(dtype)
    model, found = nn.Dense(3), []
    variables = model.init(jax.random.key(1), jnp.zeros((1, 10)))
    with jax.numpy_dtype_promotion("standard"):
        for x in (whole, whole.astype(jnp.float32)):
            found.append(learned(model, variables, x)[0])
        np.testing.assert_array_equal(*found)
        np.testing.assert_array_equal(learned(model, variables, whole, 0.0)[0], model.apply(variables, whole))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_folded_kernels_keep_their_type(dtype):
    model, x = nn.Dense(3, dtype=dtype, param_dtype=dtype), X.astype(dtype)
    variables = model.init(jax.random.key(0), x)
    config = qt.QuantConfig(folded=True)
    y, state, _ = learned(model, variables, x, 0.0, config)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, model.apply(variables, x))
    with qt.quant_trim(config, 1.0, train=False):
        assert model.apply(state, x).dtype == dtype


def test_float64_is_rounded_in_float64_and_plain_at_lambda_zero():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 10)))
        model = nn.Dense(3, param_dtype=jnp.float64)
        variables = model.init(jax.random.key(0), x)
        y, state, _ = learned(model, variables, x, 0.0)
        np.testing.assert_array_equal(y, model.apply(variables, x))
        with qt.quant_trim(CONFIG, 1.0, train=False):
            y = np.asarray(model.apply(state, x))
        seen = state["batch_stats"]["quant_kernel"]
        scale = np.float64(np.float32(seen["high"]) / np.float32(127))
        kernel = np.clip(np.round(np.asarray(variables["params"]["kernel"]) / scale), -127, 127) * scale
        low, high = (np.float32(state["batch_stats"]["quant_input"][end]) for end in ("low", "high"))
        step = (high - low) / np.float32(255)
        zero = np.round(-low / step).astype(np.float64)
        image = (np.clip(np.round(np.asarray(x) / step) + zero, 0, 255) - zero) * np.float64(step)
        np.testing.assert_allclose(y, image @ kernel, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_passes_at_lambda_zero(value):
    model = nn.Dense(3)
    _, variables, _ = learned(model, model.init(jax.random.key(0), X), X)
    x = X.at[0, 0].set(value)
    with qt.quant_trim(CONFIG, 0.0, train=False):
        np.testing.assert_array_equal(model.apply(variables, x), nn.Dense(3).apply(variables, x))


class ConvBN(nn.Module):
    """Hold layers made in `setup`."""

    def setup(self):
        self.conv, self.norm = nn.Conv(4, (3, 3), use_bias=False), nn.BatchNorm()

    def __call__(self, x, train=False):
        return self.norm(self.conv(x), use_running_average=not train)


class Arranged(nn.Module):
    """Hold modules made in `setup`, one of them an operand of a sum."""

    def setup(self):
        self.block, self.head = ConvBN(), nn.Dense(2)

    def __call__(self, x, train=False):
        return self.head(nn.relu(x + self.block(x, train)).mean((1, 2)))


def test_outputs_of_modules_made_in_setup_have_ranges():
    images = jax.random.normal(jax.random.key(0), (16, 6, 6, 4))
    variables = Arranged().init(jax.random.key(0), images)
    outputs = qt.find_fusion(Arranged(), variables, images).outputs
    assert "block" in outputs or "block/norm" in outputs
    _, state, _ = learned(Arranged(), variables, images, config=qt.QuantConfig(fused_outputs=outputs))
    [owner] = {"block", "block/norm"} & set(outputs)
    found = state["batch_stats"]["block"]
    found = found if owner == "block" else found["norm"]
    assert int(found["quant_output"]["count"]) == 2


class Pair(nn.Module):
    """Return two tensors."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x), x


def test_an_output_that_is_no_array_cannot_be_fused():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Pair(name="pair")(x)[0]

    variables = Model().init(jax.random.key(0), X)
    with pytest.raises(qt.InvalidInput, match="names 'pair', which returns a tuple"):
        qt.attach_statistics(Model(), variables, qt.QuantConfig(fused_outputs=("pair",)), X)


@pytest.mark.parametrize("axis", [None, -1, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantile_one_is_the_extreme_of_the_whole_tensor(symmetric, axis):
    x = np.array(jax.random.normal(jax.random.key(0), (64, 32, 32, 4)))
    x[3, 3, 3, 3] = 100.0
    others = None if axis is None else tuple(d for d in range(4) if d != axis % 4)
    low, high = qt.observe(jnp.asarray(x), quantile=1.0, symmetric=symmetric, axis=axis)
    peak = np.abs(x).max(others)
    expected = (-peak, peak) if symmetric else (x.min(others), x.max(others))
    np.testing.assert_array_equal(low, expected[0])
    np.testing.assert_array_equal(high, expected[1])


class Tied(nn.Module):
    """Apply a head with the transposed kernel of another layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="embed")(x)
        kernel = self.variables["params"]["embed"]["kernel"].T
        return nn.Dense(10, use_bias=False, parent=None).apply({"params": {"kernel": kernel}}, x)


class Decoder(nn.Module):
    """Hold a tied head inside."""

    @nn.compact
    def __call__(self, x):
        return Tied(name="decoder")(x)


def test_a_layer_with_variables_of_its_own_is_said_and_can_be_left_out():
    variables = Decoder().init(jax.random.key(0), X)
    with pytest.raises(
        qt.InvalidInput, match=r"'decoder' \(Tied\) applies this layer with variables of its own"
    ):
        qt.attach_statistics(Decoder(), variables, CONFIG, X)
    config = qt.QuantConfig(rules=(qt.Rule("", skip=True),))
    attached = qt.attach_statistics(Decoder(), variables, config, X)
    assert set(attached["batch_stats"]["decoder"]) == {"embed"}
    quiet = Console(quiet=True)
    rows = {row.path: row for row in qt.coverage(Decoder(), variables, X, config=config, console=quiet)}
    assert rows["decoder/embed"].weights != "-" and "qt.Rule('', skip=True)" in rows["decoder"].reason


def test_whole_numbers_take_the_type_in_which_the_layer_computes():
    model = nn.Dense(3, dtype=jnp.float32, param_dtype=jnp.bfloat16)
    x = jax.random.randint(jax.random.key(0), (64, 10), -3000, 3000)
    variables = model.init(jax.random.key(1), jnp.zeros((1, 10)))
    with jax.numpy_dtype_promotion("standard"):
        y, _, _ = learned(model, variables, x, 0.0)
        np.testing.assert_array_equal(y, model.apply(variables, x))


def test_what_is_no_real_number_has_no_grid_at_outputs_either():
    model = nn.Dense(3, dtype=jnp.complex64, param_dtype=jnp.complex64)
    config = qt.QuantConfig(weights=None, activations=None, outputs=qt.QuantSpec(8, symmetric=False))
    x = jax.lax.complex(X, X)
    with pytest.raises(qt.InvalidInput, match="'quant_output' holds complex64 numbers"):
        qt.attach_statistics(model, model.init(jax.random.key(0), x), config, x)


def test_ranges_of_nothing_and_of_axes_that_are_not_there_are_refused():
    for quantile in (0.999, 1.0):
        with pytest.raises(qt.InvalidInput, match="axis 5 is out of range"):
            qt.observe(X, quantile=quantile, symmetric=True, axis=5)
        with pytest.raises(qt.InvalidInput, match="no elements"):
            qt.observe(X[:0], quantile=quantile, symmetric=True)


class OwnProduct(nn.Dense):
    """Multiply in code of its own, although it is a Dense."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return x @ (kernel - kernel.mean(0, keepdims=True))


def test_a_layer_that_multiplies_in_its_own_code_is_not_called_quantized():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.relu(OwnProduct(4, name="stem")(x)))

    variables = Network().init(jax.random.key(0), X)
    rows = {row.path: row for row in qt.coverage(Network(), variables, X, console=Console(quiet=True))}
    assert rows["stem"].weights == "-" and "multiplied in the module's own code" in rows["stem"].reason
    outputs = qt.QuantConfig(outputs=qt.QuantSpec(8))
    _, state, visit = learned(Network(), variables, X, 1.0, outputs)
    assert list(visit.layers) == list(state["batch_stats"]) == ["head"]
    with pytest.raises(qt.InvalidInput, match="'stem' matches no layer"):
        qt.attach_statistics(Network(), variables, qt.QuantConfig(rules=(qt.Rule("stem", skip=True),)), X)
    with pytest.raises(qt.InvalidInput, match="saw no layer"):
        qt.attach_statistics(OwnProduct(4), OwnProduct(4).init(jax.random.key(0), X), CONFIG, X)


class Doubled(nn.Dense):
    """Call the compact method of its base from a plain one: Flax then gives the model another root scope."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Encoder(nn.Module):
    @nn.compact
    def encode(self, x):
        return nn.Dense(4, name="layer")(x)

    def __call__(self, x):
        return nn.relu(self.encode(x))


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Doubled(3), qt.QuantConfig(outputs=qt.QuantSpec(8, quantile=1.0))),
        (Encoder(), qt.QuantConfig(qt.QuantSpec(8), qt.QuantSpec(8, quantile=1.0), fused_outputs=("",))),
    ],
)
def test_a_model_that_calls_a_compact_method_has_its_output_on_a_grid(model, config):
    variables = model.init(jax.random.key(0), X)
    plain = model.apply(variables, X)
    y, state, _ = learned(model, variables, X, 0.0, config)
    np.testing.assert_array_equal(y, plain)
    assert float(state["batch_stats"]["quant_output"]["high"]) == float(jnp.abs(plain).max())
    assert qt.coverage(model, variables, X, console=Console(quiet=True))[0].weights != "-"


@pytest.mark.parametrize(
    "lam", [np.float32(1.5), jnp.float32(-0.5), jnp.float32(np.nan), 2, np.ones(1), [0.5]]
)
def test_lambda_is_one_number_in_its_range(lam):
    with (
        pytest.raises(qt.InvalidInput, match="lambda must"),
        qt.quant_trim(CONFIG, np.asarray(lam) if isinstance(lam, list) else lam, train=False),
    ):
        raise AssertionError("entered")


def test_a_traced_lambda_is_clipped():
    model = nn.Dense(3)
    _, state, _ = learned(model, model.init(jax.random.key(0), X), X)

    @jax.jit
    def run(lam):
        with qt.quant_trim(CONFIG, lam, train=False):
            return model.apply(state, X)

    for far, near in ((1.5, 1.0), (-3.0, 0.0)):
        np.testing.assert_array_equal(run(far), run(near))


def test_a_submodule_that_is_applied_to_another_tensor_by_hand_is_refused_in_training():
    class ByHand(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(10, name="layer")
            y = layer(x)
            module, variables = layer.unbind()
            return y + module.apply(variables, 50 * y)

    variables = ByHand().init(jax.random.key(0), X)
    state = qt.attach_statistics(ByHand(), variables, CONFIG, X)
    with (
        pytest.raises(qt.InvalidInput, match=r"does not carry 'batch_stats', or does not let it change"),
        qt.quant_trim(CONFIG, 1.0, train=True),
    ):
        ByHand().apply(state, X, mutable=["batch_stats"])


@pytest.mark.parametrize("x", [np.asarray(X, np.float64), np.asarray(X)], ids=["float64", "float32"])
def test_arrays_of_numpy_are_rounded_as_those_of_jax(x):
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), X)
    y, state, _ = learned(model, variables, x)
    expected, wanted, _ = learned(model, variables, X)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], wanted["batch_stats"])
