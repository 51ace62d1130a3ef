"""Check faults that were seen in the training core: each has the right value, or is refused in a sentence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import qt_jax as qt

CONFIG = qt.QuantConfig()
X = jax.random.normal(jax.random.key(0), (16, 10))
JittedDense = nn.jit(nn.Dense)


def learned(model, variables, x, lam=1.0, config=CONFIG, passes=2, **options):
    """Attach statistics and take training passes; return the last outputs, the variables, and the visit."""
    variables = qt.attach_statistics(model, variables, config, x, **options)
    for _ in range(passes):
        with qt.quant_trim(config, lam, train=True) as visit:
            y, new = model.apply(variables, x, mutable=["batch_stats"], **options)
        variables = {**variables, **new}
    return y, variables, visit


class Nested(nn.Module):
    """Put a layer under nn.jit, or not."""

    jit: bool

    @nn.compact
    def __call__(self, x):
        first = JittedDense if self.jit else nn.Dense
        return nn.Dense(3, name="second")(nn.relu(first(8, name="first")(x)))


def test_a_submodule_under_jit_is_traced_anew_in_every_context():
    variables = Nested(True).init(jax.random.key(0), X)
    found = {}
    for jit in (True, False):
        _, state, _ = learned(Nested(jit), variables, X, 0.0)
        found[jit], _, visit = learned(Nested(jit), state, X, 1.0, passes=1)
        assert set(visit.layers) == {"first", "second"}
    np.testing.assert_allclose(found[True], found[False], rtol=1e-6, atol=1e-6)

    state = qt.attach_statistics(Nested(True), variables, CONFIG, X)
    for lam in (0.0, 1.0):  # two jitted steps in one process

        @jax.jit
        def step(state, lam=lam):
            with qt.quant_trim(CONFIG, lam, train=True):
                return Nested(True).apply(state, X, mutable=["batch_stats"])[1]

        state = {**state, **step(state)}
    assert int(state["batch_stats"]["first"]["quant_input"]["count"]) == 2


@pytest.mark.parametrize("inside_first", [True, False])
def test_a_jitted_function_is_quantized_inside_a_context_and_nowhere_else(inside_first):
    model = nn.Dense(4)
    _, variables, _ = learned(model, model.init(jax.random.key(0), X), X)
    plain = model.apply(variables, X)
    with qt.quant_trim(CONFIG, 1.0, train=False):
        quantized = model.apply(variables, X)
    forward = jax.jit(lambda variables: model.apply(variables, X))

    def inside():
        with qt.quant_trim(CONFIG, 1.0, train=False):
            return forward(variables)

    order = (inside, lambda: forward(variables)) if inside_first else (lambda: forward(variables), inside)
    found = {True: order[0](), False: order[1]()}
    np.testing.assert_allclose(found[inside_first], quantized, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[not inside_first], plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(inside(), inside())
    assert not np.allclose(quantized, plain, rtol=1e-4)


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


class Recurrent(nn.Module):
    """Run a cell over time."""

    options: dict

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.RNN(nn.LSTMCell(4, name="cell"), **self.options)(x)[:, -1])


def test_a_recurrent_cell_needs_its_collection_carried():
    x = X.reshape(16, 2, 5)
    variables = Recurrent({}).init(jax.random.key(0), x)
    with pytest.raises(
        qt.InvalidInput, match=r'cannot be kept.*nn\.RNN\(cell, variable_axes=\{"batch_stats": 0'
    ):
        qt.attach_statistics(Recurrent({}), variables, CONFIG, x)
    _, state, visit = learned(Recurrent({"variable_axes": {"batch_stats": 0}}), variables, x)
    assert {path.split("/")[-1] for path in visit.layers} >= {"hi", "ii", "head"}
    assert state["batch_stats"]["cell"]["hi"]["quant_input"]["high"].shape == (2,)


class Stacked(nn.Module):
    """Scan over layers, with the axis of `batch_stats` that is given."""

    axis: int | None

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0} if self.axis is None else {"params": 0, "batch_stats": self.axis}
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None), variable_axes=axes, split_rngs={"params": True}, length=3
        )
        return nn.Dense(2, name="head")(scan(nn.Dense(10, name="layer"), x, None)[0])


@pytest.mark.parametrize(
    ("axis", "message"),
    [(None, r"'layer/quant_kernel' cannot be kept.*skip=True"), (1, r'variable_axes=\{"batch_stats": 0\}')],
)
def test_a_scan_that_cannot_carry_the_ranges_is_named(axis, message):
    variables = Stacked(axis).init(jax.random.key(0), X)
    with pytest.raises(qt.InvalidInput, match=message):
        qt.attach_statistics(Stacked(axis), variables, CONFIG, X)
    config = qt.QuantConfig(rules=(qt.Rule("layer", skip=True),))
    assert set(qt.attach_statistics(Stacked(axis), variables, config, X)["batch_stats"]) == {"head"}


class Shared(nn.Module):
    """Map one layer over an axis, with one range for all."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        layer = nn.vmap(
            nn.Dense,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
            axis_name=self.axis_name,
        )
        return layer(3, name="layer")(x)


@pytest.mark.parametrize("axis_name", [None, "tokens"])
def test_a_layer_that_is_mapped_with_one_range_holds_the_ranges_of_all(axis_name):
    x, model = X.reshape(16, 2, 5) * jnp.array([1.0, 9.0])[None, :, None], Shared(axis_name)
    _, state, _ = learned(model, model.init(jax.random.key(0), x), x)
    seen = state["batch_stats"]["layer"]["quant_input"]
    ends = [qt.observe(x[:, i], quantile=0.999, symmetric=False) for i in range(2)]
    np.testing.assert_allclose(seen["low"], min(float(low) for low, _ in ends), rtol=1e-6)
    np.testing.assert_allclose(seen["high"], max(float(high) for _, high in ends), rtol=1e-6)


def test_an_axis_name_that_is_not_mapped_is_named():
    config, model = qt.QuantConfig(axis_name="batch"), nn.Dense(2)
    with pytest.raises(qt.InvalidInput, match="axis_name='batch' is not a mapped axis"):
        learned(model, model.init(jax.random.key(0), X), X, config=config)


class Switched(nn.Module):
    """Choose one of two layers by Flax's own switch."""

    def setup(self):
        self.first, self.second = nn.Dense(4), nn.Dense(4)

    def __call__(self, x, index):
        if self.is_initializing():
            self.first(x), self.second(x)
        return nn.switch(index, [lambda model, x: model.first(x), lambda model, x: model.second(x)], self, x)


class Closed(nn.Module):
    """Choose one of two layers that the branches close over."""

    @nn.compact
    def __call__(self, x, index):
        first, second = nn.Dense(4, name="first"), nn.Dense(4, name="second")
        if self.is_initializing():
            first(x), second(x)
        return nn.cond(index > 0, lambda _, x: first(x), lambda _, x: second(x), self, x)


def test_the_branch_that_is_taken_moves_its_ranges():
    variables = Switched().init(jax.random.key(0), X, 0)
    variables = qt.attach_statistics(Switched(), variables, CONFIG, X, 0)
    for index in (0, 1, 1):
        with qt.quant_trim(CONFIG, 1.0, train=True):
            _, new = Switched().apply(variables, X, jnp.int32(index), mutable=["batch_stats"])
        variables = {**variables, **new}
    counts = [int(variables["batch_stats"][name]["quant_input"]["count"]) for name in ("first", "second")]
    assert counts == [1, 2]


def test_layers_inside_jax_s_own_transformations_cannot_move():
    variables = Closed().init(jax.random.key(0), X, 0)
    variables = qt.attach_statistics(Closed(), variables, CONFIG, X, 0)
    with pytest.raises(qt.InvalidInput, match=r"cannot move: its layer is called inside one of JAX's own"):
        learned(Closed(), variables, X, index=jnp.int32(1))


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


@pytest.mark.parametrize("quantile", [0.999, 1.0])
def test_shard_map_infers_that_ranges_are_replicated(quantile):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = qt.QuantSpec(8, symmetric=False, quantile=quantile)
    config, model = qt.QuantConfig(axis_name="batch", activations=spec), nn.Dense(2)
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), X), config, X)

    def forward(variables, x):
        with qt.quant_trim(config, 1.0, train=True):
            return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["quant_input"]

    split = jax.sharding.PartitionSpec("batch")
    whole = jax.sharding.PartitionSpec()
    found = jax.shard_map(forward, mesh=mesh, in_specs=(whole, split), out_specs=whole)(variables, X)
    low, high = qt.observe(X, quantile=quantile, symmetric=False)
    np.testing.assert_allclose([found["low"], found["high"]], [low, high], rtol=1e-6)


@pytest.mark.parametrize("attach", [True, False])
def test_a_context_inside_a_context_is_refused(attach):
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), X)
    refused = pytest.raises(qt.InvalidInput, match="inside quant_trim")
    with refused, qt.quant_trim(CONFIG, 1.0, train=False):
        if attach:
            qt.attach_statistics(model, variables, CONFIG, X)
        with qt.quant_trim(CONFIG, 1.0, train=False):
            model.apply(variables, X)
    _, variables, _ = learned(model, variables, X)  # the context that failed is left


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


@pytest.mark.parametrize("axis", [None, -1])
def test_ranges_of_kernels_do_not_depend_on_the_number_of_devices(axis):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    config = qt.QuantConfig(weights=qt.QuantSpec(8, axis=axis), axis_name="batch", sample_size=10**6)
    model, whole = nn.Dense(5), jax.sharding.PartitionSpec()
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), X), config, X)

    def forward(variables, x):
        with qt.quant_trim(config, 1.0, train=True):
            return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["quant_kernel"]

    split = jax.sharding.PartitionSpec("batch")
    found = jax.shard_map(forward, mesh=mesh, in_specs=(whole, split), out_specs=whole)(variables, X)
    kernel = np.abs(np.asarray(variables["params"]["kernel"]))
    expected = np.quantile(kernel, 0.999, axis=None if axis is None else 0)
    np.testing.assert_allclose(found["high"], expected, rtol=1e-6)


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


class Twice(nn.Module):
    """Apply a layer to two tensors, through a lifted class."""

    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        layer = self.layer(10, name="layer")
        return layer(x) + layer(10.0 * x)


class InAndOut(nn.Module):
    """Apply a layer inside a lifted body and outside."""

    inside_first: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(10, name="layer")
        body = nn.remat(lambda layer, x: layer(x))
        if self.inside_first:
            return body(layer, 10.0 * x) + layer(x)
        return layer(x) + body(layer, 10.0 * x)


BODIES = [
    Twice(nn.Dense),
    Twice(nn.remat(nn.Dense)),
    Twice(nn.jit(nn.Dense)),
    InAndOut(True),
    InAndOut(False),
]


@pytest.mark.parametrize("model", BODIES, ids=["plain", "remat", "jit", "inside first", "outside first"])
def test_a_range_moves_once_however_many_bodies_see_its_layer(model):
    """Check the ranges after three passes, and that each rounds with those that it began with."""
    state = qt.attach_statistics(model, model.init(jax.random.key(1), X), CONFIG, X)

    @jax.jit
    def step(state, x):
        with qt.quant_trim(CONFIG, 1.0, train=True):
            y, new = model.apply(state, x, mutable=["batch_stats"])
        return y, {**state, **new}

    @jax.jit
    def evaluated(state, x):
        with qt.quant_trim(CONFIG, 1.0, train=False):
            return model.apply(state, x)

    structure, average = jax.tree.structure(state), None
    for factor in (1.0, 2.0, 0.5):
        x = factor * X
        before = evaluated(state, x)
        y, state = step(state, x)
        np.testing.assert_allclose(y, before, rtol=1e-5, atol=1e-5)
        low, high = (10.0 * np.asarray(end) for end in qt.observe(x, quantile=0.999, symmetric=False))
        seen = np.array([low, high])
        average = seen if average is None else 0.99 * average + 0.01 * seen
    assert jax.tree.structure(state) == structure
    found = state["batch_stats"]["layer"]["quant_input"]
    np.testing.assert_allclose([found["low"], found["high"]], average, rtol=1e-5)
    assert int(found["count"]) == int(state["batch_stats"]["layer"]["quant_kernel"]["count"]) == 3


@pytest.mark.parametrize("layer", [nn.Dense, nn.remat(nn.Dense)])
def test_lanes_of_an_outer_vmap_are_not_mixed(layer):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(3, name="layer")(x)

    state = qt.attach_statistics(Model(), Model().init(jax.random.key(1), X), CONFIG, X)

    def seen(state, x):
        with qt.quant_trim(CONFIG, 1.0, train=True):
            return Model().apply(state, x, mutable=["batch_stats"])[1]["batch_stats"]["layer"]["quant_input"]

    lanes = jnp.stack([X, 10.0 * X, 100.0 * X])
    found = jax.vmap(seen, (None, 0))(state, lanes)
    high = qt.observe(X, quantile=0.999, symmetric=False)[1]
    np.testing.assert_allclose(found["high"], [high, 10 * high, 100 * high], rtol=1e-6)


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


@pytest.mark.parametrize(
    "options", [{"variable_carry": "batch_stats"}, {"variable_broadcast": ["params", "batch_stats"]}]
)
def test_a_loop_that_takes_the_collection_in_another_way_is_refused(options):
    model, x = Recurrent(options), X.reshape(16, 2, 5)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(qt.InvalidInput, match="cannot carry the ranges"):
        learned(model, variables, x)


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("quantile", [0.9, 1.0])
def test_kernels_on_explicit_meshes_are_observed_and_pruned(quantile, axis):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    kernel = jax.random.normal(jax.random.key(0), (16, 8))
    spec = jax.sharding.PartitionSpec(None, "model")
    tx = qt.reverse_pruning(quantile, every=1, axis=axis)
    plain = {"kernel": kernel}
    expected, _ = tx.update(jax.tree.map(jnp.zeros_like, plain), tx.init(plain), plain)
    bounds = qt.observe(kernel, quantile=quantile, symmetric=True, axis=axis)
    with jax.set_mesh(mesh):
        split = {"kernel": jax.device_put(kernel, jax.sharding.NamedSharding(mesh, spec))}
        found, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, split), tx.init(split), split)
        seen = qt.observe(split["kernel"], quantile=quantile, symmetric=True, axis=axis)
    np.testing.assert_array_equal(found["kernel"], expected["kernel"])
    np.testing.assert_allclose(seen, bounds, rtol=1e-6)


def test_ranges_of_nothing_and_of_axes_that_are_not_there_are_refused():
    for quantile in (0.999, 1.0):
        with pytest.raises(qt.InvalidInput, match="axis 5 is out of range"):
            qt.observe(X, quantile=quantile, symmetric=True, axis=5)
        with pytest.raises(qt.InvalidInput, match="no elements"):
            qt.observe(X[:0], quantile=quantile, symmetric=True)


class Iterated(nn.Module):
    """Apply a layer in a loop whose number of steps is not known when tracing."""

    carry: str | bool

    def setup(self):
        self.layer = nn.Dense(10)

    def __call__(self, x):
        if self.is_initializing():
            return self.layer(x)

        def go_on(module, carry):
            return carry[0] < 3

        def step(module, carry):
            return carry[0] + 1, 3 * module.layer(carry[1])

        return nn.while_loop(go_on, step, self, (0, x), carry_variables=self.carry)[1]


def test_a_layer_in_a_while_loop_has_one_range_of_all_it_sees():
    config = qt.QuantConfig(
        weights=qt.QuantSpec(8, quantile=1.0), activations=qt.QuantSpec(8, symmetric=False, quantile=1.0)
    )
    variables = Iterated("batch_stats").init(jax.random.key(1), X)
    _, state, _ = learned(Iterated("batch_stats"), variables, X, 0.0, config, passes=1)
    kernel, seen = np.asarray(variables["params"]["layer"]["kernel"]), [np.asarray(X)]
    for _ in range(2):
        seen.append(3 * (seen[-1] @ kernel))
    found = state["batch_stats"]["layer"]["quant_input"]
    assert int(found["count"]) == 1
    np.testing.assert_allclose(found["high"], max(x.max() for x in seen), rtol=1e-5)
    np.testing.assert_allclose(found["low"], min(x.min() for x in seen), rtol=1e-5)
    with pytest.raises(qt.InvalidInput, match=r"carry_variables of its nn\.while_loop"):
        qt.attach_statistics(Iterated(False), variables, config, X)
    rows = qt.coverage(Iterated(False), variables, X, config=config, console=Console(quiet=True))
    assert "carry_variables of its nn.while_loop" in rows[0].reason


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
