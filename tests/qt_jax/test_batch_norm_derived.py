"""Check that norms of classes derived from Linen's are measured by what they give to it, or refused."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from qt_jax.errors import InvalidInput

X = np.random.default_rng(0).normal(3.0, 2.0, (40, 6)).astype(np.float32)
BATCHES = [X[:16], X[16:32], X[32:]]


def training(model):
    return partial(model.apply, train=True, mutable=["batch_stats"])


class Renamed(nn.BatchNorm):
    """Decide by an argument of another name whether to train."""

    @nn.compact
    def __call__(self, x, training):
        return super().__call__(x, use_running_average=not training)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_derived_norm_may_rename_its_arguments(by_name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            norm = Renamed(name="norm")
            return norm(x, training=train) if by_name else norm(x, train)

    variables = Net().init(jax.random.key(0), X)
    found = qt.reestimate_batch_norm(training(Net()), variables, BATCHES)["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"], X.astype(np.float64).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], X.astype(np.float64).var(0), rtol=1e-4)


class ByCount(nn.BatchNorm):
    """Take the number of rows that count, and make the mask that Linen's batch norm takes."""

    @nn.compact
    def __call__(self, x, n, use_running_average=None):
        return super().__call__(x, use_running_average, mask=(jnp.arange(x.shape[0]) < n)[:, None])


class ByMask(nn.BatchNorm):
    """Take the mask by its position."""

    @nn.compact
    def __call__(self, x, mask, use_running_average=None):
        return super().__call__(x=x, mask=mask, use_running_average=use_running_average)


class ModeFirst(nn.BatchNorm):
    """Take the input last."""

    @nn.compact
    def __call__(self, train, x):
        return super().__call__(x, not train)


class Halves(nn.BatchNorm):
    """Normalise each half of the batch by its own statistics (ghost batch norm)."""

    @nn.compact
    def __call__(self, x):
        half = len(x) // 2
        return jnp.concatenate([super(Halves, self).__call__(part) for part in (x[:half], x[half:])])


class Channels(nn.BatchNorm):
    """Normalise with the channels first, after it has moved them there."""

    axis: int = 1

    @nn.compact
    def __call__(self, x):
        return super().__call__(jnp.moveaxis(x, -1, 1))


class Indirect(Halves):
    """Derive once more, with a method of another name that calls the inherited one."""

    def normalise(self, x):
        return super().__call__(2 * x)


class Alone(nn.Module):
    """Hold one derived norm, as it is or lifted."""

    norm: type
    method: str = "__call__"

    @nn.compact
    def __call__(self, *inputs, train=False):
        if self.norm is ModeFirst:
            return ModeFirst(name="norm")(train, *inputs)
        return getattr(self.norm(use_running_average=not train, name="norm"), self.method)(*inputs)


def assert_pooled(found, inputs):
    """Compare with the statistics of all inputs, whose last axis holds the channels."""
    union = np.asarray(inputs, np.float64).reshape(-1, inputs.shape[-1])
    np.testing.assert_allclose(found["mean"], union.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], union.var(0), rtol=1e-4)


COUNTS = np.arange(16)[:, None] < 2


@pytest.mark.parametrize(
    ("model", "batches", "inputs"),
    [
        (Alone(ByCount), [(X[:16], 16), (X[16:32] + 5, 2)], [X[:16], X[16:18] + 5]),
        (Alone(ByCount), [(X[:16], jnp.array(16)), (X[16:32] + 5, jnp.array(2))], [X[:16], X[16:18] + 5]),
        (Alone(nn.jit(ByCount)), [(X[:16], 16), (X[16:32] + 5, 2)], [X[:16], X[16:18] + 5]),
        (Alone(ByMask), [(X[:16], ~COUNTS), (X[16:32] + 5, COUNTS)], [X[2:16], X[16:18] + 5]),
        (Alone(ModeFirst), [(X[:16],), (X[16:] * 3,)], [X[:16], X[16:] * 3]),
        (Alone(Halves), [(X[:10],), (X[10:] * 3,)], [X[:10], X[10:] * 3]),
        (Alone(nn.jit(Halves)), [(X[:10],), (X[10:] * 3,)], [X[:10], X[10:] * 3]),
        (Alone(nn.remat(Halves)), [(X[:10],), (X[10:] * 3,)], [X[:10], X[10:] * 3]),
        (Alone(Channels), [(X[:16].reshape(2, 8, 6),), (X[16:].reshape(3, 8, 6),)], [X]),
        (Alone(Indirect, "normalise"), [(X[:10],), (X[10:] * 3,)], [2 * X[:10], 6 * X[10:]]),
    ],
)
def test_a_derived_norm_has_the_statistics_of_what_it_gives_to_linens(model, batches, inputs):
    variables = model.init(jax.random.key(0), *batches[0])
    found = qt.reestimate_batch_norm(lambda v, b: training(model)(v, *b), variables, batches)
    assert_pooled(found["batch_stats"]["norm"], np.concatenate(inputs))


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_a_derived_norm_in_a_lifted_loop_has_one_row_for_each_layer(lift):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, n, train):
            ByCount(name="norm")(x, n, not train)
            return 2 * x + 1, None

    axes = {"params": 0, "batch_stats": 0}
    options = {"in_axes": nn.broadcast, "length": 3} if lift == "scan" else {"in_axes": (1, None, None)}
    layers = getattr(nn, lift)(Layer, axes, split_rngs={"params": True}, **options)()
    batches = [(X[:16], 10), (X[16:32] * 3, 4)]
    inputs = [np.concatenate([X[:10], X[16:20] * 3])]
    if lift == "scan":
        inputs += [2 * inputs[0] + 1, 4 * inputs[0] + 3]
    else:
        batches = [(np.stack([x, x + 1], axis=1), n) for x, n in batches]
        inputs += [inputs[0] + 1]
    variables = layers.init(jax.random.key(0), *batches[0], False)
    found = qt.reestimate_batch_norm(
        lambda v, b: layers.apply(v, *b, True, mutable=["batch_stats"]), variables, batches
    )["batch_stats"]["norm"]
    for row, expected in enumerate(inputs):
        assert_pooled(jax.tree.map(lambda leaf, i=row: leaf[i], found), expected)


class Apart(nn.BatchNorm):
    """Move the statistics without the method of nn.BatchNorm."""

    @nn.compact
    def __call__(self, x):
        old = [
            self.variable("batch_stats", name, start, x.shape[-1:])
            for name, start in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        if not (self.use_running_average or self.is_initializing()):
            for statistic, new in zip(old, (x.mean(0), x.var(0)), strict=True):
                statistic.value = 0.9 * statistic.value + 0.1 * new
        return x


def test_a_derived_norm_that_never_calls_linens_is_refused():
    model = Alone(Apart)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(InvalidInput, match=r"'norm' \(Apart\) moves .*, mean and var, .*super\(\).__call__"):
        qt.reestimate_batch_norm(training(model), variables, [X])


@pytest.mark.parametrize("train", [True, False])
def test_leaves_that_are_no_arrays_reach_the_forward_as_they_are(train):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, batch, train=False):
            assert (batch["s"], batch["none"], type(batch["n"])) == ("abc", None, int)
            assert isinstance(batch["names"], np.ndarray) and batch["tags"] == {"a"}
            x = batch["x"][: batch["n"]]
            return nn.BatchNorm(not (train and batch["train"]), name="norm")(x)

    def batch(x, n, train):
        names = np.array(["a", "b"])
        return {"x": x, "n": n, "s": "abc", "none": None, "train": train, "names": names, "tags": {"a"}}

    batches = [batch(X, 7, True), batch(X + 5, 2, train)]
    variables = Net().init(jax.random.key(0), batches[0])
    found = qt.reestimate_batch_norm(training(Net()), variables, batches)["batch_stats"]["norm"]
    assert_pooled(found, np.concatenate([X[:7], X[:2] + 5]) if train else X[:7])


def test_a_recipe_is_finished_with_inputs_that_are_no_arrays():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, doubled, train=False):
            x = nn.Dense(4, use_bias=False, name="dense")(2 * x if doubled else x)
            return ByCount(name="norm")(x, 8, not train)

    variables = Net().init(jax.random.key(0), X, True)
    recipe = qt.recipes.recommended(Net(), variables, X, True, steps=3)
    variables = recipe.attach(variables)
    for _ in range(3):
        _, seen = recipe.apply(variables, X, True, train=True, mutable="batch_stats")
        variables = recipe.advance({**variables, **seen})
    found = recipe.finish(variables, [(X, True), (X + 5, False)], train=True)
    kernel = np.asarray(variables["params"]["dense"]["kernel"], np.float64)
    assert_pooled(found["batch_stats"]["norm"], np.concatenate([2 * X[:8], X[:8] + 5]) @ kernel)
