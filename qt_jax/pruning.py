"""Reverse pruning: pull the largest weights of every kernel back to a smoothed robust quantile.

For layer l at time t, tau_{l,t} is an exponential moving average of a quantile of |w_l|, and
w_l <- clip(w_l, -tau_{l,t}, tau_{l,t}). Clipped weights stay trainable. Source: Quant-Trim, arXiv 2511.15300,
reverse pruning, with 0.95 as its quantile; how often, since when and how smoothly is this package's choice,
and so are the kernel as a vendor folds it (`folded`) and bounds that are spread below tau (`spread`).

Updates that lead weights into [-bound, bound] exactly, in the weights' own dtype.
"""

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


def _wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """float64 if it is among the types, else float32: it holds every value of each of them."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def holding(update: jax.Array, param: jax.Array) -> jax.Array:
    """The update in a type that holds the parameter's values: else no update could move it exactly."""
    return update if update.dtype == param.dtype else update.astype(_wide(update.dtype, param.dtype))


def _round_down(tau: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The largest `dtype` number <= tau, held in tau's own (wider) dtype."""
    kind = jnp.finfo(dtype)
    # not astype: XLA may keep the excess precision of a narrowing cast that is widened again
    nearest = jax.lax.reduce_precision(tau, kind.nexp, kind.nmant)
    narrow = nearest.astype(dtype)
    return jnp.where(nearest > tau, jnp.nextafter(narrow, jnp.zeros_like(narrow)).astype(tau.dtype), nearest)


def project(param: jax.Array, update: jax.Array, tau: jax.Array) -> jax.Array:
    """The update u' for which fl(param + u') lies in [-tau, tau] exactly.

    Only where |p + u| > tau is u replaced, by u' = fl(b - p) with b = +-tau rounded towards zero in the
    parameter's type. Where even so fl(p + u') is beyond b, one step of nextafter towards the inside suffices.
    Proof for b >= 0, the other side being its mirror: u' is one of the two floats next to x = b - p, so if
    p + u' > b then u' > x and its predecessor v satisfies v <= x, hence p + v <= b. Also v >= -p, because -p
    is a float and -p <= x < u'; hence p + v >= 0. Rounding is monotone and b is a float of the parameter's
    type: fl(p + v) lies in [0, b], through however many roundings the sum passes.

    The arithmetic is float32 (float64 for float64) and every rounding to a narrower type explicit, because
    XLA may skip implicit ones. `update` has a dtype that holds every value of `param`'s.
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


Mask = Callable[[tuple[str, ...], jax.Array], bool]
"""(path of keys, leaf) -> whether reverse pruning projects this leaf."""

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64)))
"""The kernels' dtypes. Not float16: `reduce_precision` flushes its subnormals, in which steps of 1e-5 lie."""

SMALLEST_THRESHOLD = 1e-30
"""A quantile below this sets no threshold: a kernel that starts at zeros would be held there, and differences
of weights this small are subnormal, which XLA flushes to zero on some devices."""


class ReversePruningState(NamedTuple):
    """A plain tree of arrays, so any checkpointer saves and restores it.

    count: int32 scalar, the updates seen so far.
    tau: like params; float32, scalar or `(channels,)`, infinite until the first quantile was taken, and
      `optax.MaskedNode()` in the place of a leaf that is left alone.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    tau: optax.Params


def _is_kernel(path: tuple[str, ...], leaf: jax.Array) -> bool:
    return path[-1:] == ("kernel",)


def _is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def _initial_thresholds(params: optax.Params, mask: Mask, axis: int | None) -> optax.Params:
    """Infinity for every leaf that the mask selects, a MaskedNode for the others."""

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


def _smooth(tau: jax.Array, quantile: jax.Array, ema: float) -> jax.Array:
    """The moving average; an unusable quantile (tiny, NaN, infinite) leaves it as it was."""
    usable = jnp.isfinite(quantile) & (quantile >= SMALLEST_THRESHOLD)
    average = jnp.where(jnp.isinf(tau), quantile, ema * tau + (1.0 - ema) * quantile)
    return jnp.where(usable, average, tau)


def _gains(params: optax.Params, batch_stats: Mapping[str, Any] | None) -> list[jax.Array]:
    """For each leaf of params, its gains in `batch_stats`, of its rank; 1 where there are none."""
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


def _is_int(value: object, least: float) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def _is_fraction(value: object) -> bool:
    return (
        isinstance(value, float | int | np.floating | np.integer)
        and not isinstance(value, bool)
        and bool(0 <= value <= 1)
    )


def _check(
    quantile: float,
    every: int,
    start: int,
    stop: int | None,
    ema: float,
    axis: int | None,
    spread: float,
    sample_size: int,
) -> None:
    settings = (
        ("quantile", quantile, "a number in (0, 1]", _is_fraction(quantile) and quantile > 0),
        ("every", every, "an int of at least 1", _is_int(every, 1)),
        ("start", start, "an int of at least 0", _is_int(start, 0)),
        ("stop", stop, "None or an int of at least 1", stop is None or _is_int(stop, 1)),
        ("ema", ema, "a number in [0, 1]", _is_fraction(ema)),
        ("axis", axis, "None or an int", axis is None or _is_int(axis, -math.inf)),
        ("spread", spread, "a number in [0, 1)", _is_fraction(spread) and spread < 1),
        ("sample_size", sample_size, "an int of at least 1", _is_int(sample_size, 1)),
    )
    for name, value, wanted, holds in settings:
        if not holds:
            raise InvalidInput(f"reverse_pruning: {name} must be {wanted}, got {value!r}")
    if stop is not None and stop <= start:
        raise InvalidInput(
            f"reverse_pruning: stop must be above start={start}, got {stop}: it would never act"
        )


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
    """Clips kernels to [-tau, tau], as an optax transformation that comes LAST in the chain.

    It projects the weights that the updates it receives would lead to, so any scaling after it would undo the
    projection. At every due step, for each kernel w (in the step's new values, before clipping):

        tau <- ema tau + (1 - ema) quantile(|w|)      (tau <- quantile(|w|) the first time)
        w   <- clip(w, -tau, tau)

    A step is due if start <= count < stop and count is a multiple of `every`, count being 0 at the first
    update. On other steps updates pass unchanged and, under `jit`, no quantile is computed. After
    `optax.apply_updates` at a due step max|w| <= tau holds exactly, in the kernel's own dtype (for `folded`:
    |w| <= tau / |g| as rounded, with the gains that were given); weights within
    tau, rounded down to that dtype, get their update bit for bit.

    A quantile of (nearly) zero, as of a kernel that is still all zeros, sets no threshold. NaN stays NaN.
    `folded` prunes the kernel that a vendor quantizes, w g with g the gain of the batch norm behind it, kept
    in `batch_stats` by `Fusion.refresh`: the quantile is of |w g|, and w is clipped to tau / |g|.

    A plateau of weights at exactly +-tau is the worst place on some vendor's grid: with one scale for each
    channel and the grid [-8, 7] of scale 2 max / 15, +max is rounded to 0.933 max, all of them in the same
    direction. `spread` takes tau (1 - spread u_i) as the bound of weight i instead, u_i uniform in [0, 1) and
    fixed for ever: with a spread of one step of the grid, 2 / 15, the errors of the plateau are
    zero on average whatever the grid.

    Under `jit` kernels may be sharded in any way; inside `shard_map` or `pmap` they must be replicated.
    A kernel's update of another dtype than the kernel is widened to float32 (float64 with float64).

    Args:
      quantile: of |w|, in (0, 1].
      every, start, stop: when, in updates seen by this transformation; `stop` None means never.
      ema: weight of the old tau, in [0, 1]; 0 follows the quantile, 1 keeps the first one.
      axis: None for one tau per kernel, or the channel axis (-1: Flax's output features) for one per channel.
      folded: prune the folded kernel; `update` then needs `batch_stats=` beside params.
      spread: share of tau over which the bounds of the weights are spread, in [0, 1).
      seed: of the u_i.
      sample_size: quantiles are taken of a fair sub-sample of about this many weights, see
        `qt_jax.ranges.subsample`; smaller kernels are taken whole.
      mask: `(path, leaf) -> bool` with the path a tuple of str, to select the leaves; by default those whose
        last key is "kernel".

    Returns:
      A transformation whose `update` needs `params` (and `batch_stats` if `folded`, which `optax.chain` hands
      on); its state is a `ReversePruningState`.

    Raises:
      InvalidInput: here, for a setting out of its range; from `init`, if nothing is selected, or a leaf that
        cannot be clipped; from `update`, if params are missing, or gains.

    >>> params = {"kernel": jnp.array([0.1, -0.2, 0.3, -9.0]), "bias": jnp.array([9.0])}
    >>> tx = optax.chain(optax.sgd(0.1), reverse_pruning(quantile=0.5))
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> [round(float(w), 6) for w in optax.apply_updates(params, updates)["kernel"]]
    [0.1, -0.2, 0.25, -0.25]
    """
    _check(quantile, every, start, stop, ema, axis, spread, sample_size)

    def init(params: optax.Params) -> ReversePruningState:
        return ReversePruningState(
            jnp.zeros((), jnp.int32), _initial_thresholds(params, _is_kernel if mask is None else mask, axis)
        )

    def clip_kernel(
        param: jax.Array, update: jax.Array, gain: jax.Array, tau: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        new = (param.astype(jnp.float32) + update.astype(jnp.float32)) * gain
        _, high = observe(new, quantile=quantile, symmetric=True, axis=axis, sample_size=sample_size)
        tau = _smooth(tau, high, ema)
        others = [] if axis is None else [d for d in range(param.ndim) if d != axis % param.ndim]
        bound = jnp.broadcast_to(jnp.expand_dims(tau, others), param.shape) / jnp.abs(gain)
        if spread:
            bound *= 1.0 - np.float32(spread) * jax.random.uniform(
                jax.random.key(seed), param.shape, jnp.float32
            )
        return project(param, update, bound), tau

    def update(
        updates: optax.Updates,
        state: ReversePruningState,
        params: optax.Params | None = None,
        *,
        batch_stats: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, ReversePruningState]:
        if params is None:
            raise InvalidInput("reverse_pruning clips the parameters: call tx.update(updates, state, params)")
        due = (state.count >= start) & (state.count % every == 0)
        if stop is not None:
            due &= state.count < stop
        tree: Any
        thresholds, tree = jax.tree.flatten(state.tau, is_leaf=_is_masked)
        changes, weights = tree.flatten_up_to(updates), tree.flatten_up_to(params)
        kernels = [i for i, tau in enumerate(thresholds) if not _is_masked(tau)]
        old = [weights[i] for i in kernels]
        plain = [holding(changes[i], weights[i]) for i in kernels]
        gains = [jnp.ones((), jnp.float32)] * len(kernels)
        if folded:
            found = _gains(params, batch_stats)
            gains = [found[i] for i in kernels]
        clipped = jax.lax.cond(
            due,
            lambda taus: tuple(zip(*map(clip_kernel, old, plain, gains, taus), strict=True)),
            lambda taus: (tuple(plain), taus),
            tuple(thresholds[i] for i in kernels),
        )
        for i, change, tau in zip(kernels, *clipped, strict=True):
            changes[i], thresholds[i] = change, tau
        moved_on = ReversePruningState(optax.safe_increment(state.count), tree.unflatten(thresholds))
        return tree.unflatten(changes), moved_on

    return optax.GradientTransformationExtraArgs(init, update)
