"""Check reverse pruning in random optimizers on random trees, against numpy and the optimizer without it.

`python -m pytest -m slow tests/qt_jax/test_pruning_random.py` runs many more. A failure names its seed, and
`describe(seed)` returns what is drawn from it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.interception import GAIN
from qt_jax.pruning import reverse_pruning

STEPS = 7
SHAPES = ((), (7,), (5, 6), (4, 3, 6), (3, 2, 4, 5), (2, 3, 2, 3, 4))
GROUPS = ("backbone", "neck", "head")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a seed says.

    Attributes:
      params: Parameters by path, as numpy arrays.
      container: Puts the nested dict of them into what the optimizer sees.
      settings: Arguments of `reverse_pruning`.
      structure: Name of a function in `STRUCTURES`.
      rest: The transformations that make the updates.
      frozen: Groups of parameters that stay as they are.
      selected: Paths of the kernels that are pruned.
      gains: Shape of each layer's gain, and the shape with the kernel's rank.
      bad: Steps whose gradients are not finite.
    """

    params: dict
    container: str
    settings: dict[str, Any]
    structure: str
    rest: list[tuple[str, float]]
    frozen: frozenset
    selected: frozenset
    gains: dict
    bad: frozenset


def describe(seed: int) -> Drawn:
    """Return the tree, the optimizer and the settings of a seed."""
    rng = np.random.default_rng(seed)
    axis = [None, None, -1, 0][rng.integers(4)]
    params, gains = {}, {}
    for group in GROUPS:
        if rng.random() < 0.2 and params:
            continue
        layer = (group, "block", "layer") if rng.random() < 0.3 else (group, "layer")
        dtype = np.float32 if rng.random() < 0.7 else ml_dtypes.bfloat16
        shape = SHAPES[rng.integers(0 if axis is None else 1, len(SHAPES))]
        scale = 10.0 ** rng.integers(-3, 2)
        params[*layer, "kernel"] = (scale * rng.standard_normal(shape)).astype(dtype)
        if shape:
            params[*layer, "bias"] = (scale * rng.standard_normal(shape[-1])).astype(dtype)
            gains[layer] = _gain_shape(rng, shape)
    params["head", "norm", "scale"] = rng.standard_normal(5).astype(np.float32)
    params["temperature",] = np.float32(rng.standard_normal())
    structure = list(STRUCTURES)[seed % len(STRUCTURES)]
    frozen = frozenset(group for group in GROUPS[:2] if FREEZES[structure] and rng.random() < 0.6)
    mask, chosen = _mask(rng, params)
    if FREEZES[structure] == "before":
        mask, chosen = (lambda path, leaf: path[-1] == "kernel" and path[0] not in frozen), None
    selected = {path for path in params if path[-1] == "kernel"} if chosen is None else chosen
    selected = {path for path in selected if path[0] not in frozen}
    if not selected:
        return describe(seed + 1_000_000)
    start = int(rng.integers(0, 3))
    settings = {
        "quantile": [0.3, 0.7, 0.95, 1.0][rng.integers(4)],
        "every": int(rng.integers(1, 4)),
        "start": start,
        "stop": None if rng.random() < 0.6 else start + int(rng.integers(1, 5)),
        "ema": [0.0, 0.5, 0.9, 1.0][rng.integers(4)],
        "axis": axis,
        "folded": bool(rng.random() < 0.4) and bool(gains),
        "spread": float(rng.choice([0.0, 0.0, 0.0, 0.13])),
        "seed": int(rng.integers(3)),
        "mask": mask,
    }
    rest = [
        [("clip", 0.5), ("decay", 0.1), ("none", 0.0)][rng.integers(3)],
        [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.1)][rng.integers(4)],
    ]
    bad = frozenset(
        np.flatnonzero(rng.random(STEPS) < 0.3).tolist() if structure == "apply_if_finite" else ()
    )
    container = ["dict", "FrozenDict", "boxes"][rng.integers(3)]
    return Drawn(params, container, settings, structure, rest, frozen, frozenset(selected), gains, bad)


def _gain_shape(rng, shape):
    """Return the shape of the gain of a plain, transposed or stacked layer, and the same with its rank."""
    kinds = {"plain": ((shape[-1],), (*(1,) * (len(shape) - 1), shape[-1]))}
    if len(shape) > 1:
        kinds["transposed"] = ((shape[-2], 1), (*(1,) * (len(shape) - 2), shape[-2], 1))
    if len(shape) > 2:
        ones = (1,) * (len(shape) - 2)
        kinds["stacked"] = ((shape[0], shape[-1]), (shape[0], *ones, shape[-1]))
        kinds["both"] = ((shape[0], shape[-2], 1), (shape[0], *ones[1:], shape[-2], 1))
    return kinds[rng.choice([*kinds])]


def _mask(rng, params):
    """Return a mask, and the paths that it selects; None and None for the default."""
    kind = rng.choice(["default", "default", "function", "leaves", "groups"])
    if kind == "default":
        return None, None
    if kind == "groups":
        tops = dict.fromkeys(path[0] for path in params if path[0] != "temperature")
        chosen = {top: bool(rng.random() < 0.7) for top in tops}
        kernels = {path for path in params if path[-1] == "kernel" and chosen[path[0]]}
        return chosen | {"temperature": False}, kernels
    selected = {path for path in params if rng.random() < 0.6 and path[-1] in ("kernel", "scale")}
    selected = {path for path in selected if path[-1] == "kernel" or params[path].ndim}
    if kind == "function":
        return (lambda path, leaf: path in selected), selected
    kernels = {path for path in selected if path[-1] == "kernel"}
    return unflatten_dict({path: path in selected for path in params}), kernels


def in_container(tree: dict, container: str) -> Any:
    """Return parameters by path as the optimizer sees them."""
    nested = unflatten_dict({path: jnp.asarray(leaf) for path, leaf in tree.items()})
    if container == "boxes":
        return jax.tree.map(lambda p: nn.Partitioned(p, ("axis", *(None,) * 9)[: p.ndim]), nested)
    return FrozenDict(nested) if container == "FrozenDict" else nested


def by_path(tree: Any) -> dict:
    """Return the leaves of any of these containers by path."""
    plain = nn.unbox(tree)
    return flatten_dict(flax.serialization.to_state_dict(plain))


# How pruning (or nothing) and the rest of an optimizer are put together
def _chain(make, pruning, drawn):
    return optax.chain(make(), pruning)


def _nested(make, pruning, drawn):
    return optax.chain(optax.identity(), optax.chain(make(), optax.chain(pruning)))


def _masked(make, pruning, drawn):
    return optax.chain(make(), optax.masked(pruning, lambda tree: _by_group(tree, lambda group: True)))


def _frozen_after(make, pruning, drawn):
    def frozen(tree):
        return _by_group(tree, lambda group: group in drawn.frozen)

    return optax.chain(make(), pruning, optax.masked(optax.set_to_zero(), frozen))


def _frozen_before(make, pruning, drawn):
    return optax.chain(optax.partition({"on": make(), "off": optax.set_to_zero()}, _labels(drawn)), pruning)


def _partition(make, pruning, drawn):
    groups = {"on": optax.chain(make(), pruning), "off": optax.set_to_zero()}
    return optax.partition(groups, _labels(drawn))


def _multi_transform(make, pruning, drawn):
    hidden = optax.masked(pruning, lambda tree: _by_group(tree, lambda group: group not in drawn.frozen))
    groups = {"on": make(), "off": optax.set_to_zero()}
    return optax.chain(optax.multi_transform(groups, _labels(drawn)), hidden)


def _multi_steps(make, pruning, drawn):
    return optax.MultiSteps(optax.chain(make(), pruning), 2).gradient_transformation()


def _inject(make, pruning, drawn):
    def factory(learning_rate):
        return optax.chain(make(learning_rate), pruning)

    return optax.inject_hyperparams(factory)(learning_rate=0.1)


def _apply_if_finite(make, pruning, drawn):
    return optax.apply_if_finite(optax.chain(make(), pruning), 100)


STRUCTURES = {
    f.__name__[1:]: f
    for f in (
        _chain,
        _nested,
        _masked,
        _frozen_after,
        _frozen_before,
        _partition,
        _multi_transform,
        _multi_steps,
        _inject,
        _apply_if_finite,
    )
}
FREEZES = dict.fromkeys(STRUCTURES, "") | {
    "frozen_after": "after",
    "frozen_before": "before",
    "partition": "hidden",
    "multi_transform": "hidden",
}


def _by_group(tree, chosen):
    """Return a mask over the first level of the tree."""
    return type(tree)({top: chosen(top) for top in tree})


def _labels(drawn):
    return lambda tree: _by_group(tree, lambda group: "off" if group in drawn.frozen else "on")


def optimizer(drawn: Drawn, pruning: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer of a seed with this transformation as its reverse pruning."""

    def make(rate: Any = 0.1) -> optax.GradientTransformation:
        (first, amount), (second, extra) = drawn.rest
        firsts: dict[str, Callable] = {
            "clip": optax.clip_by_global_norm,
            "decay": optax.add_decayed_weights,
            "none": lambda _: optax.identity(),
        }
        seconds: dict[str, Callable] = {
            "sgd": lambda: optax.sgd(rate, momentum=extra),
            "adam": lambda: optax.adam(rate),
            "adamw": lambda: optax.adamw(rate, weight_decay=extra),
        }
        return optax.chain(firsts[first](amount), seconds[second]())

    return STRUCTURES[drawn.structure](make, pruning, drawn)


def is_due(settings: dict[str, Any], count: int) -> bool:
    stop = np.inf if settings["stop"] is None else settings["stop"]
    return settings["start"] <= count < stop and count % settings["every"] == 0


def counted(drawn: Drawn) -> list[int | None]:
    """Return for each step the number of updates that pruning has seen before, None where it sees none."""
    if drawn.structure == "multi_steps":
        return [step // 2 if step % 2 else None for step in range(STEPS)]
    counts, seen = [], 0
    for step in range(STEPS):
        counts.append(None if step in drawn.bad else seen)
        seen += step not in drawn.bad
    return counts


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def bits(x: Any) -> bytes:
    """Return the bits, with those of +0 for -0: XLA may multiply by 0 or take 0 instead."""
    return (np.asarray(x) + np.zeros((), np.asarray(x).dtype)).tobytes()


class Reference:
    """Follow tau in numpy, and check the weights against it."""

    def __init__(self, drawn: Drawn):
        self.settings, self.drawn = drawn.settings, drawn
        self.taus: dict = {}

    def check(self, path, old, plain, pruned, tau, gain):
        """Check one kernel at a due step, whose updates are `plain` without pruning and `pruned` with it."""
        axis, settings = self.settings["axis"], self.settings
        new = (np.asarray(old, np.float32) + np.asarray(plain, np.float32)).astype(old.dtype)
        gain = np.ones(()) if gain is None else wide(gain).reshape(self.drawn.gains[path[:-1]][1])
        deployed = np.abs(wide(new) * gain)
        others = None if axis is None else tuple(d for d in range(new.ndim) if d != axis % new.ndim)
        quantile = np.quantile(deployed, settings["quantile"], axis=others)
        before, ema = self.taus.get(path), settings["ema"]
        average = quantile if before is None else ema * before + (1 - ema) * quantile
        first = np.zeros_like(quantile) if before is None else before
        average = np.where(first == 0.0, quantile, average)
        self.taus[path] = np.where(quantile >= 1e-30, average, first)
        np.testing.assert_allclose(tau, self.taus[path], rtol=2e-5, atol=1e-37)
        limit = wide(tau) if axis is None else np.expand_dims(wide(tau), others)
        limit = np.where(limit == 0.0, np.inf, limit)
        highest = np.broadcast_to(limit, new.shape)
        if settings["spread"]:
            share = jax.random.uniform(jax.random.key(settings["seed"]), new.shape, jnp.float32)
            limit = limit * (1 - settings["spread"] * wide(share))
        rough = 3e-6 if settings["spread"] or settings["folded"] else 0.0
        after = wide((np.asarray(old, np.float32) + np.asarray(pruned, np.float32)).astype(old.dtype))
        assert (np.abs(after) * np.abs(gain) <= highest * (1 + 3e-7 * settings["folded"])).all(), "beyond tau"
        assert (np.abs(after) * np.abs(gain) <= limit * (1 + rough)).all(), "beyond the bound"
        assert pruned.dtype == plain.dtype
        inside, outside = deployed <= limit * (1 - rough), deployed > limit * (1 + rough)
        assert bits(pruned[inside]) == bits(plain[inside]), "a weight within the bound was moved"
        bound = np.where(outside, limit / np.where(outside, np.abs(gain), 1.0), 0.0)
        spacing = float(jnp.finfo(old.dtype).eps) * np.maximum(np.abs(wide(old)), bound)
        error = np.abs(np.abs(after) - bound) / np.maximum(spacing, 1e-37)
        assert (error[outside] <= 4 + 4 * bool(rough) * 1e-6 / 1e-7).all(), "not at the bound"
        if settings["quantile"] == 1.0 and before is None and not settings["spread"]:
            assert bits(pruned) == bits(plain), "quantile 1 clipped a weight"


def run(seed: int) -> None:
    """Train with pruning and without from the same weights at each step, and compare."""
    drawn = describe(seed)
    rng = np.random.default_rng([seed, 1])
    pruned = optimizer(drawn, reverse_pruning(**drawn.settings))
    plain = optimizer(drawn, optax.identity())
    traces = []

    @jax.jit
    def step(gradients, state, params, statistics):
        traces.append(seed)
        return pruned.update(gradients, state, params, batch_stats=statistics)

    @jax.jit
    def free_step(gradients, state, params):
        return plain.update(gradients, state, params)

    params = in_container(drawn.params, drawn.container)
    state, free_state = pruned.init(params), plain.init(params)
    reference, counts, resumed = Reference(drawn), counted(drawn), None
    for number in range(STEPS):
        gradients, statistics = draw_step(rng, drawn, number)
        free, free_state = free_step(gradients, free_state, params)
        before = by_path(thresholds(state))
        updates, state = step(gradients, state, params, unflatten_dict(statistics))
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        taus, mine, theirs, old = (by_path(t) for t in (thresholds(state), updates, free, params))
        taus = {p: tau for p, tau in taus.items() if p in drawn.params and p[0] not in drawn.frozen}
        assert {*taus} == drawn.selected
        due = counts[number] is not None and is_due(drawn.settings, counts[number])
        for path in drawn.params:
            where = f"seed {seed}, step {number}, {'/'.join(path)}"
            if due and path in drawn.selected:
                gain = statistics.get((*path[:-1], GAIN)) if drawn.settings["folded"] else None
                arrays = (np.asarray(x) for x in (old[path], theirs[path], mine[path], taus[path]))
                try:
                    reference.check(path, *arrays, gain)
                except AssertionError as error:
                    raise AssertionError(where) from error
                continue
            assert bits(mine[path]) == bits(theirs[path]), where
            if path in taus:
                assert bits(taus[path]) == bits(before[path]), where
        if resumed is not None:
            their_updates, resumed = step(gradients, resumed, params, unflatten_dict(statistics))
            for a, b in zip(
                jax.tree.leaves((updates, state)), jax.tree.leaves((their_updates, resumed)), strict=True
            ):
                assert bits(a) == bits(b), f"seed {seed}, step {number}, resumed"
        if number == 2:
            empty = jax.tree.map(jnp.zeros_like, state)
            resumed = flax.serialization.from_bytes(empty, flax.serialization.to_bytes(state))
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1, f"seed {seed}: {len(traces)} traces"
    for path, leaf in by_path(params).items():
        if path[0] in drawn.frozen:
            assert bits(leaf) == bits(drawn.params[path]), f"seed {seed}, {'/'.join(path)} is frozen"


def draw_step(rng, drawn, number):
    """Return the gradients and the statistics of one step."""
    gradients = {}
    for path, leaf in drawn.params.items():
        size = float(np.abs(wide(leaf)).max() or 1.0)
        gradients[path] = (size * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        if number in drawn.bad:
            gradients[path] = np.full_like(gradients[path], np.nan)
    statistics = {}
    for layer, (shape, _) in drawn.gains.items():
        gain = np.exp(rng.standard_normal(shape)) * rng.choice([1.0, 1.0, -1.0, 0.0], shape)
        statistics[*layer, GAIN] = jnp.asarray(gain, jnp.float32)
    return in_container(gradients, drawn.container), statistics


def thresholds(state):
    [(_, tau)] = optax.tree_utils.tree_get_all_with_path(state, "tau")
    return tau


def check(seed):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax wants them
        run(seed)


@pytest.mark.parametrize("seed", range(12))
def test_random_optimizers(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(12, 372, 20))
def test_many_random_optimizers(first):
    for seed in range(first, first + 20):
        check(seed)
