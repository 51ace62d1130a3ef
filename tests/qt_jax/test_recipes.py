"""Check recipes against the loop that their parts make, and what is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import qt_jax as qt
from qt_jax.interception import is_quant_trim_statistic

STEPS = 12


class Net(nn.Module):
    """Convolution, batch norm, head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


X, LABELS = jax.random.normal(jax.random.key(0), (16, 6, 6, 2)), jnp.arange(16) % 3
START = Net().init(jax.random.key(1), X)


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def build(make, **settings):
    """Return the recipe, its first state, and its step, which counts its traces."""
    recipe = make(Net(), START, X, steps=STEPS, **settings)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), recipe.reverse_pruning(every=3))
    traces = []

    @jax.jit
    def step(variables, opt_state):
        traces.append(None)

        def loss_fn(params):
            logits, new = recipe.apply({**variables, "params": params}, X, train=True, mutable="batch_stats")
            return loss_of(logits), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"], **new)
        return recipe.advance({"params": optax.apply_updates(variables["params"], updates), **new}), opt_state

    variables = recipe.attach(START)
    return recipe, step, (variables, tx.init(variables["params"])), traces


def by_parts(recommended):
    """Train the same network by the parts of the recipe, and return its variables."""
    lam = qt.schedules.warmup_quartic_quadratic(STEPS)
    if recommended:
        config = qt.QuantConfig(activations=qt.QuantSpec(8, symmetric=False, quantile=1.0), folded=True)
        pruning = qt.reverse_pruning(0.97, spread=0.13, folded=True, start=2, every=3)
        fusion = qt.find_fusion(Net(), START, X)
        variables = fusion.refresh(qt.attach_statistics(Net(), START, config, X))
    else:
        config, pruning = qt.QuantConfig(), qt.reverse_pruning(0.95, start=2, every=3)
        variables = qt.attach_statistics(Net(), START, config, X)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), pruning)
    opt_state = tx.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, count):
        def loss_fn(params):
            with qt.quant_trim(config, lam(count), train=True):
                logits, new = Net().apply(
                    {**variables, "params": params}, X, train=True, mutable=["batch_stats"]
                )
            return loss_of(logits), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"], **new)
        variables = {"params": optax.apply_updates(variables["params"], updates), **new}
        return fusion.refresh(variables) if recommended else variables, opt_state

    for count in range(STEPS):
        variables, opt_state = step(variables, opt_state, count)
    return variables


@pytest.mark.parametrize("name", ["published", "recommended"])
def test_a_recipe_is_the_sum_of_its_parts_and_traced_once(name):
    recipe, step, state, traces = build(getattr(qt.recipes, name))
    for _ in range(STEPS):
        state = step(*state)
    variables = state[0]
    assert len(traces) == 1 and int(recipe.step(variables)) == STEPS
    expected = by_parts(name == "recommended")
    statistics = dict(variables["batch_stats"])
    del statistics["quant_step"]
    found = {**variables, "batch_stats": statistics}
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_a_training_that_is_resumed_goes_on_with_the_same_lambda():
    _, step, state, _ = build(qt.recipes.recommended)
    whole, begun = state, state
    for _ in range(STEPS):
        whole = step(*whole)
    for _ in range(5):
        begun = step(*begun)
    recipe, step, fresh, _ = build(qt.recipes.recommended)
    begun = serialization.from_bytes(fresh, serialization.to_bytes(begun))
    again = recipe.attach(begun[0])
    jax.tree.map(np.testing.assert_array_equal, again, begun[0])
    resumed = (again, begun[1])
    for _ in range(STEPS - 5):
        resumed = step(*resumed)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_finish_measures_batch_norm_and_the_kernels_that_it_folds_into():
    recipe, step, state, _ = build(qt.recipes.recommended)
    for _ in range(STEPS):
        state = step(*state)
    before = state[0]
    after = recipe.finish(before, [X], train=True)
    plain = Net().apply(after, X, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(Net().apply(after, X), plain, rtol=1e-4, atol=1e-5)
    statistics = after["batch_stats"]
    norm = np.asarray(after["params"]["norm"]["scale"]) / np.sqrt(
        np.asarray(statistics["norm"]["var"]) + 1e-5
    )
    np.testing.assert_allclose(statistics["conv"]["quant_gain"], norm, rtol=1e-5)
    folded = np.abs(np.asarray(after["params"]["conv"]["kernel"]) * norm)
    peak = np.quantile(folded, 0.999)
    np.testing.assert_allclose(statistics["conv"]["quant_kernel"]["high"], peak, rtol=1e-5)
    unchanged = ("quant_input", "head")
    jax.tree.map(
        np.testing.assert_array_equal,
        [before["batch_stats"]["conv"][unchanged[0]], before["batch_stats"]["head"]["quant_input"]],
        [statistics["conv"][unchanged[0]], statistics["head"]["quant_input"]],
    )
    assert np.all(np.isfinite(recipe.quantized(after, X)))


def test_published_finishes_as_it_is():
    recipe, step, state, _ = build(qt.recipes.published)
    for _ in range(4):
        state = step(*state)
    finished = recipe.finish(state[0], [])
    statistics = {**finished["batch_stats"], "quant_step": state[0]["batch_stats"]["quant_step"]}
    jax.tree.map(np.testing.assert_array_equal, {**finished, "batch_stats": statistics}, state[0])
    again = recipe.attach(finished)
    assert int(recipe.step(again)) == 0 and "quant_step" not in finished["batch_stats"]


def test_steps_that_are_not_counted_are_refused():
    recipe, _, (variables, _), _ = build(qt.recipes.recommended)
    with pytest.raises(qt.InvalidInput, match=r"call recipe\.attach"):
        recipe.apply(START, X, train=True, mutable="batch_stats")
    with pytest.raises(
        qt.InvalidInput, match=r"0 steps were counted, and lambda is still 0.*recipe\.advance"
    ):
        recipe.finish(variables, [X], train=True)
    for _ in range(4):
        variables = recipe.advance(variables)
    with pytest.raises(qt.InvalidInput, match=r"no range has seen a batch: call recipe\.apply"):
        recipe.finish(variables, [X], train=True)


def test_batches_that_are_one_array_are_refused():
    recipe, step, state, _ = build(qt.recipes.recommended)
    for _ in range(4):
        state = step(*state)
    with pytest.raises(qt.InvalidInput, match=r"give \[images\]"):
        recipe.finish(state[0], X, train=True)


def test_layers_that_stay_in_float_are_not_pruned():
    rules = (qt.Rule("head", skip=True),)
    _, _, (_, opt_state), _ = build(qt.recipes.recommended, rules=rules)
    tau = opt_state[-1].tau
    assert isinstance(tau["head"]["kernel"], optax.MaskedNode) and tau["conv"]["kernel"] == 0


def test_bits_rules_and_a_recipe_without_pruning():
    rules = (qt.Rule("head", skip=True),)
    recipe, step, state, _ = build(qt.recipes.recommended, bits=4, rules=rules)
    assert recipe.config.weights.grids == "vendors" and recipe.config.weights.bits == 4
    variables, _ = step(*state)
    assert "head" not in variables["batch_stats"]
    unpruned = dataclasses.replace(recipe, pruning=None).reverse_pruning()
    updates, _ = unpruned.update(variables["params"], unpruned.init(variables["params"]), batch_stats={})
    jax.tree.map(np.testing.assert_array_equal, updates, variables["params"])


def test_the_step_is_a_statistic_of_quant_trim():
    assert is_quant_trim_statistic(("quant_step",))


def test_finish_takes_a_forward_and_needs_no_mapped_axis():
    recipe, step, state, _ = build(qt.recipes.recommended)
    for _ in range(4):
        state = step(*state)
    mapped = dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, axis_name="batch"))

    def forward(variables, batch):
        return Net().apply(variables, batch, train=True, mutable=["batch_stats"])

    expected = recipe.finish(state[0], [X], train=True)
    found = mapped.finish(state[0], [X], forward=forward)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_flattened_optimizer_is_refused_in_words():
    model, x = nn.Dense(2), jnp.ones((4, 3))
    variables = model.init(jax.random.key(0), x)
    recipe = qt.recipes.published(model, variables, x, steps=9)
    tx = optax.flatten(optax.chain(optax.sgd(0.1), recipe.reverse_pruning()))
    with pytest.raises(qt.InvalidInput, match="no parameter is selected"):
        tx.init(variables["params"])
