"""Check re-estimated statistics against float64 numpy over all batches, and that the rest is unchanged."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from qt_jax.batch_norm import pool, reestimator
from qt_jax.errors import InvalidInput

X = np.random.default_rng(0).normal(3.0, 2.0, (40, 6)).astype(np.float32)
BATCHES = [X[:16], X[16:32], X[32:]]
"""Two of 16 and one of 8."""


class Deep(nn.Module):
    """Hold two layers with batch norms whose momenta must not matter."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for name, momentum in (("first", 0.99), ("second", 0.5)):
            x = nn.Dense(4, dtype=self.dtype, name=name)(x)
            x = nn.BatchNorm(not train, momentum=momentum, dtype=self.dtype, name=f"{name}_norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x))


def training(model):
    return partial(model.apply, train=True, mutable=["batch_stats"])


@pytest.fixture(scope="module")
def variables():
    """Return variables with Quant-Trim's ranges, and statistics that training on other data left."""

    @jax.jit
    def make():
        found = qt.attach_statistics(Deep(), Deep().init(jax.random.key(0), X), qt.QuantConfig(), X)
        with qt.quant_trim(qt.QuantConfig(), 0.0, train=True):
            _, seen = training(Deep())(found, 5.0 * X)
        return {**found, **seen}

    return make()


def reference(variables, batches):
    """Compute in float64 mean and variance of each norm's inputs, normalised by their batch's statistics."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    found, xs = {}, [batch.astype(np.float64) for batch in batches]
    for name in ("first", "second"):
        xs = [x @ params[name]["kernel"] + params[name]["bias"] for x in xs]
        union = np.concatenate(xs)
        found[f"{name}_norm"] = {"mean": union.mean(axis=0), "var": union.var(axis=0)}
        norm = params[f"{name}_norm"]
        xs = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * norm["scale"] + norm["bias"] for x in xs]
    return found


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[::-1], [X]])
def test_statistics_are_those_of_the_union(variables, batches):
    found = qt.reestimate_batch_norm(training(Deep()), variables, batches)["batch_stats"]
    for norm, expected in reference(variables, batches).items():
        for name, value in expected.items():
            np.testing.assert_allclose(found[norm][name], value, rtol=1e-4, atol=1e-5)


def test_old_statistics_have_no_say(variables):
    stale = {**variables, "batch_stats": jax.tree.map(lambda leaf: 7 * leaf, variables["batch_stats"])}
    ours, theirs = (
        qt.reestimate_batch_norm(training(Deep()), given, BATCHES)["batch_stats"]
        for given in (variables, stale)
    )
    for norm in ("first_norm", "second_norm"):
        jax.tree.map(np.testing.assert_array_equal, ours[norm], theirs[norm])


def test_everything_else_is_untouched(variables):
    before = jax.tree.map(np.array, variables)
    found = qt.reestimate_batch_norm(training(Deep()), variables, BATCHES)
    assert found["params"] is variables["params"]
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.structure(found) == jax.tree.structure(dict(variables))
    for layer in ("first", "second", "head"):
        jax.tree.map(np.testing.assert_array_equal, found["batch_stats"][layer], before["batch_stats"][layer])
    ours, theirs = (given["batch_stats"]["first_norm"]["mean"] for given in (found, before))
    assert not np.allclose(ours, theirs)


def test_fake_quantized_forward_is_measured_without_moving_its_ranges(variables):
    def quantized(variables, x):
        with qt.quant_trim(qt.QuantConfig(activations=qt.QuantSpec(2)), 1.0, train=True):
            return training(Deep())(variables, x)

    plain = qt.reestimate_batch_norm(training(Deep()), variables, BATCHES)["batch_stats"]
    found = qt.reestimate_batch_norm(quantized, variables, BATCHES)["batch_stats"]
    assert not np.allclose(found["first_norm"]["var"], plain["first_norm"]["var"], rtol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, found["first"], variables["batch_stats"]["first"])


def test_bfloat16_network_keeps_float32_statistics(variables):
    with jax.numpy_dtype_promotion("standard"):  # Flax mixes float32 statistics with bfloat16 inputs
        found = qt.reestimate_batch_norm(training(Deep(jnp.bfloat16)), variables, BATCHES)["batch_stats"]
    assert {leaf.dtype for leaf in jax.tree.leaves(found["second_norm"])} == {jnp.dtype(jnp.float32)}
    for name, value in reference(variables, BATCHES)["second_norm"].items():
        np.testing.assert_allclose(found["second_norm"][name], value, rtol=0.1, atol=0.1)


class Shared(nn.Module):
    """Apply one batch norm to inputs of two sizes, and keep another on its running averages."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(name="norm")
        halves = norm(x[:, :1], not train), norm(x[:, 1:], use_running_average=not train)
        return nn.BatchNorm(True, name="frozen")(jnp.concatenate(halves, axis=1))


def test_a_norm_called_twice_has_both_inputs_and_a_frozen_one_stays():
    x = X[:, :, None]
    variables = Shared().init(jax.random.key(0), x)
    variables["batch_stats"]["frozen"]["mean"] = jnp.array([0.1], jnp.float32)
    found = qt.reestimate_batch_norm(training(Shared()), variables, [x[:16], x[16:]])["batch_stats"]
    union = x.astype(np.float64)
    np.testing.assert_allclose(found["norm"]["mean"], [union.mean()], rtol=1e-5)
    np.testing.assert_allclose(found["norm"]["var"], [union.var()], rtol=1e-5)
    assert found["frozen"] == variables["batch_stats"]["frozen"]


def test_a_model_without_batch_norm_comes_back_as_it_is():
    model = nn.Dense(2)
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), X), qt.QuantConfig(), X)
    found = qt.reestimate_batch_norm(partial(model.apply, mutable=["batch_stats"]), variables, BATCHES)
    assert found == variables


def test_pooling_is_exact_where_float32_sums_are_not():
    random = np.random.default_rng(1)
    parts = [random.normal(1e4, 0.1, (size, 3)) for size in (3, 50, 500)]
    mean, variance = pool([p.mean(0) for p in parts], [p.var(0) for p in parts], map(len, parts))
    union = np.concatenate(parts)
    np.testing.assert_allclose(mean, union.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, union.var(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("apply_fn", "batches", "message"),
    [
        (training(Deep()), [], "from no batches"),
        (partial(Deep().apply, mutable=["batch_stats"]), BATCHES, "every batch norm uses its running"),
        (Deep().apply, BATCHES, r"must return \(outputs, updated\)"),
        (training(Deep()), [X, np.full_like(X, np.nan)], "'first_norm' is not finite"),
    ],
)
def test_wrong_input_is_refused(apply_fn, batches, message, variables):
    with pytest.raises(InvalidInput, match=message):
        qt.reestimate_batch_norm(apply_fn, variables, batches)


class Block(nn.Module):
    """Add a layer and its batch norm to what comes in, as a carry of `nn.scan`."""

    own: bool = False

    @nn.compact
    def __call__(self, x, train):
        norm = OwnNorm if self.own else nn.BatchNorm
        y = norm(use_running_average=not train, momentum=0.9, name="norm")(nn.Dense(6, name="dense")(x))
        return x + y, None


class Stack(nn.Module):
    """Apply three blocks by a lifted loop, or two blocks by another lifted transformation."""

    lift: str

    @nn.compact
    def __call__(self, x, train=False):
        if self.lift == "scan":
            axes = {"params": 0, "batch_stats": 0}
            scanned = nn.scan(Block, axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=3)
            return scanned(name="blocks")(x, train)[0]
        if self.lift == "vmap":
            axes = {"params": 0, "batch_stats": 0}
            mapped = nn.vmap(Block, axes, split_rngs={"params": True}, in_axes=(1, None), out_axes=1)
            return mapped(name="blocks")(x, train)[0]
        block = {"jit": nn.jit, "remat": nn.remat}[self.lift](Block, static_argnums=(2,))
        return block(name="first")(block(name="second")(x, train)[0], train)[0]


def block_reference(params, x, axis=0):
    """Compute in float64 mean and variance of the norm's inputs in one block, and what the block returns."""
    y = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    mean, variance = y.mean(axis), y.var(axis)
    z = (y - mean) / np.sqrt(variance + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    return {"mean": mean, "var": variance}, x + z


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def stack_reference(lift, params, x):
    if lift == "scan":
        found = []
        for layer in range(3):
            statistics, x = block_reference(jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"]), x)
            found.append(statistics)
        return {"blocks": {"norm": jax.tree.map(lambda *rows: np.stack(rows), *found)}}
    if lift == "vmap":
        members = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(x.shape[1])]
        found = [block_reference(member, x[:, i])[0] for i, member in enumerate(members)]
        return {"blocks": {"norm": jax.tree.map(lambda *rows: np.stack(rows), *found)}}
    second, x = block_reference(params["second"], x)
    return {"first": {"norm": block_reference(params["first"], x)[0]}, "second": {"norm": second}}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lift", ["scan", "vmap", "jit", "remat"])
def test_lifted_norms_are_measured_as_plain_ones(lift, compiled):
    x = np.stack([X, 2 * X + 1], axis=1) if lift == "vmap" else X
    model = Stack(lift)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    apply_fn = training(model)
    if compiled:
        apply_fn = jax.jit(apply_fn)
        apply_fn(variables, x)  # a trace without the interceptor is kept
    found = qt.reestimate_batch_norm(apply_fn, variables, [x])["batch_stats"]
    expected = stack_reference(lift, float64(variables["params"]), x.astype(np.float64))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


class Recurrent(nn.Module):
    """Apply one batch norm at every step, its statistics carried or shared by the loop over time."""

    @nn.compact
    def __call__(self, x, train=False):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, total, x):
                y = nn.BatchNorm(use_running_average=not train, name="norm")(x)
                return total + y, None

        step = nn.scan(
            Step,
            variable_broadcast="params",
            variable_carry="batch_stats",
            split_rngs={"params": False},
            in_axes=1,
        )
        return step(name="step")(jnp.zeros_like(x[:, 0]), x)[0]


def test_a_norm_that_a_loop_calls_at_every_step_has_all_inputs():
    x = np.random.default_rng(2).normal(1.0, np.arange(1, 6)[None, :, None], (20, 5, 3)).astype(np.float32)
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    statistics = {"mean": jnp.full(3, 9.0), "var": jnp.full(3, 9.0)}
    variables = {"params": {"step": {"norm": params}}, "batch_stats": {"step": {"norm": statistics}}}
    found = qt.reestimate_batch_norm(training(Recurrent()), variables, [x[:4], x[4:]])["batch_stats"]
    union = x.astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(found["step"]["norm"]["mean"], union.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["step"]["norm"]["var"], union.var(0), rtol=1e-5)


def test_a_jitted_norm_that_is_called_twice_has_both_inputs():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            norm = nn.jit(nn.BatchNorm)(use_running_average=not train, name="norm")
            return norm(x[:8]), norm(x[8:] * 3)

    variables = Twice().init(jax.random.key(0), X)
    found = qt.reestimate_batch_norm(training(Twice()), variables, [X])["batch_stats"]["norm"]
    union = np.concatenate([X[:8], X[8:] * 3]).astype(np.float64)
    np.testing.assert_allclose(found["mean"], union.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], union.var(0), rtol=1e-5)


def test_masked_inputs_and_inputs_by_keyword():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, batch, train=False):
            x, mask = batch
            return nn.BatchNorm(use_running_average=not train, name="norm")(x=x, mask=mask)

    mask = np.arange(40)[:, None] % 3 != np.zeros((40, 1))
    batches = [(X[:10], mask[:10]), (X[10:], mask[10:])]
    variables = Masked().init(jax.random.key(0), batches[0])
    found = qt.reestimate_batch_norm(training(Masked()), variables, batches)["batch_stats"]["norm"]
    union = X[mask[:, 0]].astype(np.float64)
    np.testing.assert_allclose(found["mean"], union.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], union.var(0), rtol=1e-5)


class OwnNorm(nn.Module):
    """Normalise as `nn.BatchNorm` does, without being one: models bring such classes."""

    use_running_average: bool
    momentum: float = 0.9
    names: tuple[str, str] = ("mean", "var")

    @nn.compact
    def __call__(self, x):
        shape = (1, x.shape[-1])
        scale, bias = (
            self.param(n, init, shape)
            for n, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )
        old = [
            self.variable("batch_stats", name, start, shape)
            for name, start in zip(self.names, (jnp.zeros, jnp.ones), strict=True)
        ]
        if self.use_running_average:
            mean, variance = (statistic.value for statistic in old)
        else:
            mean, variance = x.mean(0, keepdims=True), x.var(0, keepdims=True)
            if not self.is_initializing():
                for statistic, new in zip(old, (mean, variance), strict=True):
                    statistic.value = self.momentum * statistic.value + (1 - self.momentum) * new
        return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


class Foreign(nn.Module):
    """Put a batch norm of the model's own beside one of Linen's, and one that this forward never calls."""

    frozen: bool = False
    names: tuple[str, str] = ("mean", "var")

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="dense")(x))
        own = OwnNorm(self.frozen or not train, names=self.names, name="own")
        unused = nn.BatchNorm(use_running_average=False, name="unused")
        return unused(own(x)) if self.is_initializing() else own(x)


@pytest.mark.parametrize("names", [("mean", "var"), ("running_mean", "running_variance")])
def test_a_batch_norm_of_the_models_own_is_not_left_out_in_silence(names):
    model = Foreign(names=names)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(
        InvalidInput, match=rf"'own' \(OwnNorm\) moves .*, {' and '.join(names)}, .*nn.BatchNorm"
    ):
        qt.reestimate_batch_norm(training(model), variables, [X])

    def kept(variables, x):
        outputs, updated = training(model)(variables, x)
        statistics = {**updated["batch_stats"], "own": variables["batch_stats"]["own"]}
        return outputs, {"batch_stats": statistics}

    found = qt.reestimate_batch_norm(kept, variables, [X])["batch_stats"]
    assert np.allclose(found["own"][names[0]], 0) and not np.allclose(found["norm"]["mean"], 0)


def test_norms_that_are_frozen_or_not_called_are_left_without_a_word():
    variables = Foreign().init(jax.random.key(0), X)
    found = qt.reestimate_batch_norm(training(Foreign(frozen=True)), variables, [X])["batch_stats"]
    for name in ("own", "unused"):
        jax.tree.map(np.testing.assert_array_equal, found[name], variables["batch_stats"][name])
    inputs = X.astype(np.float64) @ np.asarray(variables["params"]["dense"]["kernel"], np.float64)
    np.testing.assert_allclose(found["norm"]["mean"], inputs.mean(0), rtol=1e-4, atol=1e-5)


def test_scanned_norms_of_the_models_own_are_refused_too():
    scanned = nn.scan(
        Block, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3
    )(own=True)
    variables = scanned.init(jax.random.key(0), X, False)
    apply_fn = lambda v, x: scanned.apply(v, x, True, mutable=["batch_stats"])  # noqa: E731
    with pytest.raises(InvalidInput, match=r"'norm' \(OwnNorm\) moves statistics"):
        qt.reestimate_batch_norm(apply_fn, variables, [X])


def test_batches_count_by_the_elements_that_a_layer_sees():
    sequences = [X[:10].reshape(2, 5, 6), X[10:].reshape(2, 15, 6)]  # of the same number, of other lengths
    model = nn.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), sequences[0])
    found = qt.reestimate_batch_norm(partial(model.apply, mutable=["batch_stats"]), variables, sequences)
    np.testing.assert_allclose(found["batch_stats"]["mean"], X.astype(np.float64).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["batch_stats"]["var"], X.astype(np.float64).var(0), rtol=1e-5)


def test_a_forward_is_compiled_once_for_each_set_of_leaves_that_are_no_arrays():
    seen = []

    def apply_fn(variables, batch):
        x, factor = batch
        seen.append(factor)
        return training(Deep())(variables, x * jnp.asarray(factor, jnp.float32))

    variables = Deep().init(jax.random.key(0), X)
    pooled = reestimator(apply_fn)
    for factors in ([1, 1], [True, 1], [1.0, 2.0]):
        inputs = [(X[20 * i : 20 * i + 20], factor) for i, factor in enumerate(factors)]
        found = pooled(variables, inputs)["batch_stats"]
        expected = reference(variables, [x * float(factor) for x, factor in inputs])
        np.testing.assert_allclose(found["first_norm"]["var"], expected["first_norm"]["var"], rtol=1e-4)
    assert [*map(repr, seen)] == ["1", "True", "1.0", "2.0"]
