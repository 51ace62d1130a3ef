"""Check the table of what a config reaches, and of what it does not and why."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import qt_jax as qt


class Mixed(nn.Module):
    """Put layers that are reached beside some that are not."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="embed")(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(4, name="lstm"))(x)
        x = nn.Dense(4, name="hidden")(x)
        if tokens.shape[0] > 100:
            x = nn.Dense(4, name="rare")(x)
        return nn.Dense(2, name="head")(x)


def test_coverage_says_what_is_reached_and_why_the_rest_is_not():
    tokens = jnp.zeros((2, 3), jnp.int32)
    variables = Mixed().init(jax.random.key(0), tokens)
    variables["params"]["rare"] = {"kernel": jnp.ones((4, 4))}
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    config = qt.QuantConfig(weights=qt.QuantSpec(4, axis=-1), rules=(qt.Rule("head", skip=True),))
    with console.file:
        rows = {
            row.path: row for row in qt.coverage(Mixed(), variables, tokens, config=config, console=console)
        }
        text = console.export_text()
    assert rows["hidden"].weights == "int4 symmetric per-channel"
    assert rows["hidden"].inputs == "uint8 asymmetric per-tensor" and rows["hidden"].reason == ""
    assert rows["head"].weights == "-" and "rule 'head'" in rows["head"].reason
    assert "look-up" in rows["embed"].reason
    assert "never called" in rows["rare"].reason
    unreached = [row for path, row in rows.items() if "lstm" in path]
    assert unreached and all("nn.LSTMCell is the same" in row.reason for row in unreached)
    assert "Quant-Trim coverage" in text and "quantized" in text


def cover(model, *inputs, config=qt.QuantConfig(), variables=None, **options):  # noqa: B008 - frozen
    """Return the rows of a model by path, after plain Flax has run it."""
    if variables is None:
        variables = model.init(jax.random.key(0), *inputs, **options)
    model.apply(variables, *inputs, **options)
    rows = qt.coverage(model, variables, *inputs, config=config, console=Console(quiet=True), **options)
    return {row.path: row for row in rows}


class Lifted(nn.Module):
    """Hand a block to a lifted transformation, beside a plain layer."""

    lift: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(self.lift(name="block")(x))


class Block(nn.Module):
    """Hold one layer, and return what `nn.scan` needs if it is to carry."""

    carry: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm(name="norm")(nn.Dense(4, name="dense")(x)))
        return (x, None) if self.carry else x


class Carried(nn.Module):
    """Scan over three blocks."""

    axes: Any

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, dict(self.axes), split_rngs={"params": True}, length=3)
        return scanned(carry=True, name="layers")(x)[0]


PARAMS, BOTH = (("params", 0),), (("params", 0), ("batch_stats", 0))
X = jnp.ones((2, 3, 4))


def test_a_scan_that_does_not_carry_the_ranges_is_named_with_the_argument():
    rows = cover(Lifted(partial(Carried, PARAMS)), X)
    assert rows["head"].weights != "-" and rows["head"].reason == ""
    dense = rows["block/layers/dense"]
    assert (dense.layer, dense.weights, dense.parameters) == ("Dense", "-", 3 * (4 * 4 + 4))
    assert (
        "'block' (Carried) calls it" in dense.reason
        and '"batch_stats": 0 among the variable_axes' in dense.reason
    )
    scale = rows["block/layers/norm"]
    assert scale.reason == "bias: added, no product; scale: scales by elements, no product"
    rows = cover(Lifted(partial(Carried, BOTH)), X)
    assert rows["block/layers/dense"].weights != "-" and rows["block/layers/dense"].reason == ""


@pytest.mark.parametrize("carried", [True, False])
def test_recurrent_cells_say_which_argument_reaches_them(carried):
    cell = partial(nn.GRUCell, 4, name="cell")
    axes = {"variable_axes": {"batch_stats": 0}} if carried else {}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(cell(), **axes, name="rnn")(x)

    rows = cover(Net(), X)
    assert len(rows) == 6 and {row.layer for row in rows.values()} == {"Dense"}
    for row in rows.values():
        assert (row.weights != "-") == carried
        assert ('nn.RNN(cell, variable_axes={"batch_stats": 0})' in row.reason) != carried
    if carried:  # the argument does what the reason says
        variables = Net().init(jax.random.key(0), X)
        qt.attach_statistics(Net(), variables, qt.QuantConfig(), X)


def test_the_optimized_cell_is_named_with_the_one_that_is_reached():
    class Net(nn.Module):
        cell: Any

        @nn.compact
        def __call__(self, x):
            return nn.RNN(self.cell(4, name="cell"), variable_axes={"batch_stats": 0}, name="rnn")(x)

    rows = cover(Net(nn.OptimizedLSTMCell), X)
    assert {row.layer for row in rows.values()} == {"OptimizedLSTMCell"}
    assert all(row.weights == "-" and "nn.LSTMCell is the same cell" in row.reason for row in rows.values())
    variables = Net(nn.OptimizedLSTMCell).init(jax.random.key(0), X)
    same = cover(Net(nn.LSTMCell), X, variables=variables)
    assert all(row.weights != "-" for row in same.values())
    ours, theirs = (Net(cell).apply(variables, X) for cell in (nn.LSTMCell, nn.OptimizedLSTMCell))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, None])
def test_mapped_checkpointed_and_jitted_layers_are_reached(axis):
    axes = {"params": axis, "batch_stats": axis}
    mapped = nn.vmap(Block, axes, split_rngs={"params": axis == 0}, in_axes=1, out_axes=1)
    for lift in (mapped, nn.remat(Block), nn.jit(Block), nn.remat(nn.jit(Block))):
        row = cover(Lifted(lift), X)["block/dense"]
        assert row.layer == "Dense" and row.weights != "-" and row.reason == ""
    row = cover(Lifted(nn.vmap(Block, {"params": 0}, split_rngs={"params": True})), X)["block/dense"]
    assert '"batch_stats": 0 among the variable_axes' in row.reason
    row = cover(Lifted(partial(nn.remat(nn.Dense), 4)), X)["block"]
    assert row.layer == "Dense" and row.weights != "-"


class Odd(nn.Module):
    """Use layers in ways that plain Flax allows."""

    way: str

    @nn.compact
    def __call__(self, x):
        if self.way == "switch":
            branch = lambda name: lambda module, x: nn.Dense(4, name=name)(x)  # noqa: E731
            branches = [branch("left"), branch("right")]
            if self.is_initializing():
                return branches[0](self, x) + branches[1](self, x)
            return nn.switch(0, branches, self, x)
        if self.way == "cond by closure":
            dense = nn.Dense(4, name="dense")
            dense(x)
            return jax.lax.cond(x.sum() > 0, lambda x: dense(x), lambda x: x, x)
        if self.way == "apply":
            kernel = self.param("kernel", nn.initializers.ones, (4, 4))
            return nn.Dense(4, use_bias=False, parent=None).apply({"params": {"kernel": kernel}}, x)
        if self.way == "complex":
            return nn.Dense(4, dtype=jnp.complex64, param_dtype=jnp.complex64, name="dense")(x)
        if self.way == "weight norm":
            return nn.WeightNorm(nn.Dense(4, name="dense"))(x)
        return nn.Dense(4, name="dense")(x).dot(nn.Embed(5, 4, name="embed").embedding.T)


@pytest.mark.parametrize(
    ("way", "path", "reason"),
    [
        ("cond by closure", "dense", "JAX's own transformations, which Flax does not know of: use nn.cond"),
        (
            "apply",
            "",
            "applies a layer with variables of its own making, such as a tied head: call it as a submodule",
        ),
        ("complex", "dense", "complex numbers: leave it out, qt.Rule('dense', skip=True)"),
        ("weight norm", "dense", "WeightNorm computes its kernel, and carries no 'batch_stats'"),
        ("attend", "embed", "multiplied in the module's own code"),
    ],
)
def test_coverage_lists_what_training_refuses(way, path, reason):
    row = cover(Odd(way), X)[path]
    assert reason in row.reason and row.weights == row.inputs == "-"


def test_the_layers_of_a_switch_are_reached():
    rows = cover(Odd("switch"), X)
    assert all(rows[name].weights != "-" and rows[name].reason == "" for name in ("left", "right"))


class Own(nn.Module):
    """Use parameters of its own, of rank two, in every way."""

    @nn.compact
    def __call__(self, x):
        own = lambda name, *shape: self.param(name, nn.initializers.normal(), shape)  # noqa: E731
        x = x + own("position", 1, 3, 4)
        token = jnp.broadcast_to(own("token", 1, 1, 4), (2, 1, 4))
        x = jnp.concatenate([token, x], axis=1)
        x = x * own("scale", 1, 1, 4)
        x = x + own("table", 9, 4)[jnp.arange(4)][None]  # a relative bias: looked up, then added
        x = x @ (own("left", 4, 2) @ own("right", 2, 4))
        own("unused", 3, 3)
        rows = jnp.take(own("words", 5, 4), jnp.asarray(x[0, :, 0], jnp.int32), axis=0)
        return nn.Dense(2, name="head")(x) + rows.sum()


def test_parameters_of_a_modules_own_are_named_with_what_happens_to_them():
    rows = cover(Own(), X)
    assert rows["head"].reason == ""
    product = "multiplied in the module's own code (nn.Dense or nn.Einsum would be reached)"
    assert dict(part.split(": ", 1) for part in rows[""].reason.split("; ")) == {
        "position": "added, no product",
        "token": "joined to the activations, no product",
        "scale": "scales by elements, no product",
        "table": "added, no product",
        "left": product,
        "right": product,
        "unused": "not used in this forward pass",
        "words": "a table look-up, no product",
    }


def test_boxed_parameters_have_their_own_paths_and_sizes():
    kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    rows = cover(nn.Dense(4, kernel_init=kernel_init), X)
    assert list(rows) == [""] and rows[""].parameters == 16 and rows[""].weights != "-"


def test_what_cannot_be_covered_is_refused():
    class Wrapper:
        module = nn.Dense(2)

    variables = nn.Dense(2).init(jax.random.key(0), X)
    for model, given, config, message in (
        (Wrapper(), variables, qt.QuantConfig(), r"Wrapper is not a Linen module.*`module`"),
        (nn.Dense(2), {"batch_stats": {}}, qt.QuantConfig(), "hold no 'params'"),
        (nn.Dense(2), variables, qt.QuantConfig(rules=(qt.Rule("haed"),)), "matches no layer"),
    ):
        with pytest.raises(qt.InvalidInput, match=message):
            qt.coverage(model, given, X, config=config, console=Console(quiet=True))


def test_other_collections_may_be_mutable_and_inputs_go_by_keyword():
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x, scale=1.0):
            self.sow("intermediates", "x", x)
            return nn.Dense(2, name="head")(x * scale)

    variables = Sows().init(jax.random.key(0), X)
    rows = cover(Sows(), variables={"params": variables["params"]}, x=X, scale=2.0, mutable=["intermediates"])
    assert rows["head"].weights != "-"


def test_lists_of_parameters_and_sown_tuples_are_told_apart():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                self.sow("losses", "l2", (x**2).mean(0))
            queries = self.param("queries", lambda _: [jnp.ones((10, 10)), jnp.ones((10, 10))])
            offset = self.param("offset", nn.initializers.zeros, (1, 10))
            return nn.Dense(3, name="head")(x @ queries[1] + offset)

    x = jnp.ones((2, 10))
    rows = qt.coverage(Model(), Model().init(jax.random.key(0), x), x, console=Console(quiet=True))
    why = {row.path: row.reason for row in rows}
    assert why["head"] == ""
    assert "offset: added, no product" in why[""]
    assert (
        why["queries"].startswith("0: not used")
        and "1: multiplied in the module's own code" in why["queries"]
    )
