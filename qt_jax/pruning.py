"""Prune in reverse: pull the largest weights of every kernel back to a smoothed robust quantile.

For layer l at time t, tau_{l,t} is an exponential moving average of a quantile of |w_l|, and
w_l <- clip(w_l, -tau_{l,t}, tau_{l,t}). Clipped weights stay trainable. Source: Quant-Trim, arXiv 2511.15300,
reverse pruning, with 0.95 as its quantile. How often, since when and how smoothly to prune is this package's
choice. So are the kernel as a vendor folds it (`folded`), and bounds that are spread below tau (`spread`).

`reverse_pruning` is an optax transformation. `project` corrects its updates so that they lead weights into
[-bound, bound] exactly, in the weights' own dtype.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from qt_jax.errors import InvalidInput
from qt_jax.interception import GAIN
from qt_jax.ranges import observe

Mask = Callable[[tuple[str, ...], jax.Array], bool]
"""`(path of keys, leaf) -> bool`: whether reverse pruning projects this leaf."""

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64)))
"""Dtypes of kernels that can be pruned. float16 cannot: `reduce_precision` flushes its subnormals, and steps
of 1e-5 are subnormal."""

SMALLEST_THRESHOLD = 1e-30
"""Smallest quantile that sets a threshold. A kernel that starts at zeros would be held there by a smaller
one, and differences of weights this small are subnormal, which XLA flushes to zero on some devices."""


def reverse_pruning(
    quantile: float = 0.95,
    *,
    every: int = 50,
    start: int = 0,
    stop: int | None = None,
    ema: float = 0.9,
    axis: int | None = None,
    folded: bool = False,
    spread: float = 0.0,
    seed: int = 0,
    sample_size: int = 65536,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip kernels to [-tau, tau], as an optax transformation that comes LAST in the chain.

    It computes the weights after the incoming updates and clips those. Any scaling after it would undo the
    projection. At every due step, for each kernel w, updated by this step but not yet clipped:

        tau <- ema tau + (1 - ema) quantile(|w|)      (tau <- quantile(|w|) the first time)
        w   <- clip(w, -tau, tau)

    With `folded`, what is pruned is w g, the kernel that a vendor quantizes. g is the gain of the batch norm
    behind the layer; `Fusion.refresh` keeps it in `batch_stats`. The quantile is that of |w g|, and w is
    clipped to tau / |g|.

    A step is due if start <= count < stop and count is a multiple of `every`, where count is 0 at the first
    update. On other steps updates pass unchanged and, under `jit`, no quantile is computed. After
    `optax.apply_updates` at a due step max|w| <= tau holds exactly, in the kernel's own dtype. With `folded`,
    |w| <= tau/|g| up to rounding, for the gains passed to `update`. Weights within tau (tau rounded down to
    that dtype) receive exactly their update, to the bit.

    A quantile of (nearly) zero, such as that of a kernel that is still all zeros, sets no threshold. NaN
    stays NaN.

    Many weights at exactly +-tau round badly on some vendors' grids. With one scale for each channel and the
    grid [-8, 7] of scale 2 max / 15, +max is rounded to 0.933 max, for all of them in the same direction.
    `spread` takes tau (1 - spread u_i) as the bound of weight i instead, with u_i uniform in [0, 1) and
    constant during training. With a spread of one step of the grid, 2 / 15, the errors of these weights are
    zero on average on any grid.

    Under `jit` kernels may be sharded in any way. Inside `shard_map` or `pmap` they must be replicated. If a
    kernel's update has another dtype than the kernel, the update is widened to float32, or to float64 if
    either of the two is float64.

    Args:
      quantile: Quantile of |w| to pull back to, in (0, 1].
      every, start, stop: When to prune, counted in updates seen by this transformation. If `stop` is None,
        pruning never stops.
      ema: Weight of the old tau, in [0, 1]. 0 follows the quantile, 1 keeps the first one.
      axis: None for one tau per kernel, or the channel axis (-1: Flax's output features) for one per channel.
      folded: Whether to prune the folded kernel. `update` then needs `batch_stats=` beside params.
      spread: Share of tau over which the bounds of the weights are spread, in [0, 1).
      seed: Seed of the u_i.
      sample_size: Approximate number of weights sampled for the quantile. The sample is fair, see
        `qt_jax.ranges.subsample`. Smaller kernels are taken whole.
      mask: `(path, leaf) -> bool`, with the path a tuple of str, to select the leaves. By default those are
        selected whose last key is "kernel".

    Returns:
      A transformation whose `update` needs `params` (and `batch_stats` if `folded`, which `optax.chain`
      passes on). Its state is a `ReversePruningState`.

    Raises:
      InvalidInput: Raised here if a setting is out of range; by `init` if nothing is selected or a leaf
        cannot be clipped; by `update` if params or gains are missing.

    >>> params = {"kernel": jnp.array([0.1, -0.2, 0.3, -9.0]), "bias": jnp.array([9.0])}
    >>> tx = optax.chain(optax.sgd(0.1), reverse_pruning(quantile=0.5))
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> [round(float(w), 6) for w in optax.apply_updates(params, updates)["kernel"]]
    [0.1, -0.2, 0.25, -0.25]
    """
    mask = _is_kernel if mask is None else mask
    pruning = _Pruning(quantile, every, start, stop, ema, axis, folded, spread, seed, sample_size, mask)
    return optax.GradientTransformationExtraArgs(pruning.init, pruning.update)


def _is_kernel(path: tuple[str, ...], leaf: jax.Array) -> bool:
    return path[-1:] == ("kernel",)


class ReversePruningState(NamedTuple):
    """Keep the thresholds as a plain tree of arrays, which any checkpointer saves and restores.

    Attributes:
      count: int32 scalar, the number of updates seen so far.
      tau: Tree like params. Its leaves are float32, scalar or `(channels,)`, and infinite until the first
        quantile was taken. `optax.MaskedNode()` stands in the place of a leaf that is not pruned.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    tau: optax.Params


@dataclasses.dataclass(frozen=True)
class _Pruning:
    """Hold the settings of `reverse_pruning`, and its two functions.

    Raises:
      InvalidInput: A setting is out of its range.
    """

    quantile: float
    every: int
    start: int
    stop: int | None
    ema: float
    axis: int | None
    folded: bool
    spread: float
    seed: int
    sample_size: int
    mask: Mask

    def __post_init__(self) -> None:
        checks = (
            ("quantile", "a number in (0, 1]", _is_fraction(self.quantile) and self.quantile > 0),
            ("every", "an int of at least 1", _is_int(self.every, 1)),
            ("start", "an int of at least 0", _is_int(self.start, 0)),
            ("stop", "None or an int of at least 1", self.stop is None or _is_int(self.stop, 1)),
            ("ema", "a number in [0, 1]", _is_fraction(self.ema)),
            ("axis", "None or an int", self.axis is None or _is_int(self.axis, -math.inf)),
            ("spread", "a number in [0, 1)", _is_fraction(self.spread) and self.spread < 1),
            ("sample_size", "an int of at least 1", _is_int(self.sample_size, 1)),
        )
        for name, wanted, holds in checks:
            if not holds:
                raise InvalidInput(f"reverse_pruning: {name} must be {wanted}, got {getattr(self, name)!r}")
        if self.stop is not None and self.stop <= self.start:
            raise InvalidInput(
                f"reverse_pruning: stop must be above start={self.start}, got {self.stop}: it would never act"
            )

    def init(self, params: optax.Params) -> ReversePruningState:
        """Return the state before the first update."""
        return ReversePruningState(
            jnp.zeros((), jnp.int32), _initial_thresholds(params, self.mask, self.axis)
        )

    def update(
        self,
        updates: optax.Updates,
        state: ReversePruningState,
        params: optax.Params | None = None,
        *,
        batch_stats: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, ReversePruningState]:
        """Return the updates, projected if the step is due, and the next state."""
        if params is None:
            raise InvalidInput("reverse_pruning clips the parameters: call tx.update(updates, state, params)")
        due = (state.count >= self.start) & (state.count % self.every == 0)
        if self.stop is not None:
            due &= state.count < self.stop
        tree: Any
        thresholds, tree = jax.tree.flatten(state.tau, is_leaf=_is_masked)
        changes, weights = tree.flatten_up_to(updates), tree.flatten_up_to(params)
        kernels = [i for i, tau in enumerate(thresholds) if not _is_masked(tau)]
        old = [weights[i] for i in kernels]
        plain = [holding(changes[i], weights[i]) for i in kernels]
        gains = [jnp.ones((), jnp.float32)] * len(kernels)
        if self.folded:
            found = _gains(params, batch_stats)
            gains = [found[i] for i in kernels]
        clipped = jax.lax.cond(
            due,
            lambda taus: tuple(zip(*map(self._clip, old, plain, gains, taus), strict=True)),
            lambda taus: (tuple(plain), taus),
            tuple(thresholds[i] for i in kernels),
        )
        for i, change, tau in zip(kernels, *clipped, strict=True):
            changes[i], thresholds[i] = change, tau
        moved_on = ReversePruningState(optax.safe_increment(state.count), tree.unflatten(thresholds))
        return tree.unflatten(changes), moved_on

    def _clip(
        self, param: jax.Array, update: jax.Array, gain: jax.Array, tau: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the projected update of one kernel, and its new tau."""
        new = (param.astype(jnp.float32) + update.astype(jnp.float32)) * gain
        _, high = observe(
            new, quantile=self.quantile, symmetric=True, axis=self.axis, sample_size=self.sample_size
        )
        tau = _smooth(tau, high, self.ema)
        others = [] if self.axis is None else [d for d in range(param.ndim) if d != self.axis % param.ndim]
        bound = jnp.broadcast_to(jnp.expand_dims(tau, others), param.shape) / jnp.abs(gain)
        if self.spread:
            bound *= 1.0 - np.float32(self.spread) * jax.random.uniform(
                jax.random.key(self.seed), param.shape, jnp.float32
            )
        return project(param, update, bound), tau


def _is_fraction(value: object) -> bool:
    return (
        isinstance(value, float | int | np.floating | np.integer)
        and not isinstance(value, bool)
        and bool(0 <= value <= 1)
    )


def _is_int(value: object, least: float) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def _initial_thresholds(params: optax.Params, mask: Mask, axis: int | None) -> optax.Params:
    """Return infinity for every leaf that the mask selects, and a MaskedNode for the others."""

    def threshold(path: tuple, leaf: jax.Array) -> jax.Array | optax.MaskedNode:
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        if not mask(names, leaf):
            return optax.MaskedNode()
        described = f"{'/'.join(names)} ({leaf.dtype}{list(leaf.shape)})"
        if leaf.dtype not in DTYPES or leaf.size == 0:
            raise InvalidInput(
                f"reverse_pruning: cannot clip {described}, it is not a non-empty array of "
                f"{', '.join(map(str, DTYPES))}; cast it, or give a `mask` that leaves it out"
            )
        if axis is not None and not -leaf.ndim <= axis < leaf.ndim:
            raise InvalidInput(
                f"reverse_pruning: axis={axis} is out of range for {described}; give another axis, or a "
                "`mask` that leaves it out"
            )
        return jnp.full(() if axis is None else leaf.shape[axis], jnp.inf, jnp.float32)

    tau = jax.tree_util.tree_map_with_path(threshold, params)
    if not jax.tree.leaves(tau):
        leaves = jax.tree.leaves_with_path(params)
        first = ", ".join(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves[:5])
        raise InvalidInput(
            f"reverse_pruning: no parameter is selected out of {len(leaves)}, the first being: {first}; the "
            "default selects those whose last key is 'kernel': give a `mask` that selects yours"
        )
    return tau


def _is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def _gains(params: optax.Params, batch_stats: Mapping[str, Any] | None) -> list[jax.Array]:
    """Return for each leaf of params its gains in `batch_stats`, with its rank; 1 if there are none."""
    statistics = flatten_dict(dict(batch_stats or {}))
    if not any(path[-1] == GAIN for path in statistics):
        raise InvalidInput(
            "reverse_pruning(folded=True) needs gains: tx.update(updates, state, params, batch_stats=...) "
            "on statistics attached for a QuantConfig(folded=True) and kept up to date by Fusion.refresh"
        )
    found = []
    for path, leaf in jax.tree.leaves_with_path(params):
        layer = tuple(jax.tree_util.keystr((key,), simple=True) for key in path[:-1])
        gain = statistics.get((*layer, GAIN), jnp.ones((), jnp.float32))
        found.append(jnp.expand_dims(gain, range(leaf.ndim - gain.ndim)))
    return found


def _smooth(tau: jax.Array, quantile: jax.Array, ema: float) -> jax.Array:
    """Return the moving average. A quantile that is unusable (tiny, NaN, infinite) leaves it as it was."""
    usable = jnp.isfinite(quantile) & (quantile >= SMALLEST_THRESHOLD)
    average = jnp.where(jnp.isinf(tau), quantile, ema * tau + (1.0 - ema) * quantile)
    return jnp.where(usable, average, tau)


def project(param: jax.Array, update: jax.Array, tau: jax.Array) -> jax.Array:
    """Return the update u' for which fl(param + u') lies in [-tau, tau] exactly.

    Only where |p + u| > tau is u replaced, by u' = fl(b - p) with b = +-tau rounded towards zero in the
    parameter's type. If even so fl(p + u') is beyond b, one step of nextafter towards the inside suffices.
    Proof for b >= 0, of which the other side is the mirror image: u' is one of the two floats next to
    x = b - p. If p + u' > b, then u' > x and its predecessor v satisfies v <= x, hence p + v <= b. Also
    v >= -p, because -p is a float and -p <= x < u'; hence p + v >= 0. Rounding is monotone and b is a float
    of the parameter's type. So fl(p + v) lies in [0, b], through however many roundings the sum passes.

    The arithmetic is in float32 (float64 for float64). Every rounding to a narrower type is explicit, because
    XLA may skip implicit ones.

    Args:
      param: The parameter p, in one of `DTYPES`.
      update: The update u, in a dtype that holds every value of `param`'s.
      tau: Bound of |p + u'|, of the shape of `param` or a scalar.
    """
    exact = _wide(update.dtype)
    kind = jnp.finfo(update.dtype)
    bound = _round_down(tau.astype(exact), param.dtype)
    old = param.astype(exact)
    new = old + update.astype(exact)
    target = jnp.clip(new, -bound, bound)
    moved = jax.lax.reduce_precision(target - old, kind.nexp, kind.nmant)
    beyond = jnp.abs(old + moved) > bound
    moved = moved.astype(update.dtype)
    inward = jnp.where(new > 0, -jnp.inf, jnp.inf).astype(update.dtype)
    moved = jnp.where(beyond, jnp.nextafter(moved, inward), moved)
    return jnp.where(jnp.abs(new) > bound, moved, update)


def _round_down(tau: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the largest `dtype` number <= tau, in tau's own (wider) dtype."""
    kind = jnp.finfo(dtype)
    # Not astype: XLA may keep the excess precision of a narrowing cast that is widened again.
    nearest = jax.lax.reduce_precision(tau, kind.nexp, kind.nmant)
    narrow = nearest.astype(dtype)
    return jnp.where(nearest > tau, jnp.nextafter(narrow, jnp.zeros_like(narrow)).astype(tau.dtype), nearest)


def holding(update: jax.Array, param: jax.Array) -> jax.Array:
    """Return the update in a type that holds the parameter's values, so that it can move them exactly."""
    return update if update.dtype == param.dtype else update.astype(_wide(update.dtype, param.dtype))


def _wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """Return float64 if it is among the types, else float32. It holds every value of each of them."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)
