"""Prune in reverse: pull the largest weights of every kernel back to a smoothed robust quantile.

For layer l at time t, tau_{l,t} is an exponential moving average of a quantile of |w_l|, and
w_l <- clip(w_l, -tau_{l,t}, tau_{l,t}). Clipped weights stay trainable. Source: Quant-Trim, arXiv 2511.15300,
reverse pruning, with 0.95 as its quantile. How often, since when and how smoothly to prune is this package's
choice. So are the kernel as a vendor folds it (`folded`), and bounds that are spread below tau (`spread`).

`reverse_pruning` is an optax transformation. `project` corrects its updates so that they lead weights into
[-bound, bound] exactly, in the weights' own dtype.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core.meta import AxisMetadata

from qt_jax.errors import InvalidInput
from qt_jax.interception import GAIN, KERNEL
from qt_jax.ranges import observe

Path = tuple[str, ...]
"""Keys that lead to a leaf. The box around a leaf (`nn.Partitioned`, `nnx.Param`) is no part of it."""

Mask = Callable[[Path, jax.Array], bool] | Mapping[str, Any] | bool
"""`(path, leaf) -> bool`: whether reverse pruning projects this leaf. Or a tree of bools, as `optax.masked`
takes it: whether it projects the kernels in this part of the parameters."""

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
    """Clip kernels to [-tau, tau], as an optax transformation behind all that scales or adds to the updates.

    It computes the weights after the incoming updates and clips those. Any scaling after it would undo the
    projection. Only `set_to_zero` for frozen weights comes later, see below. At every due step, for each
    kernel w, updated by this step but not yet clipped:

        tau <- ema tau + (1 - ema) quantile(|w|)      (tau <- quantile(|w|) the first time)
        w   <- clip(w, -tau, tau)

    With `folded`, what is pruned is w g, the kernel that a vendor quantizes. g is the gain of the batch norm
    behind the layer; `Fusion.refresh` keeps it in `batch_stats`. The quantile is that of |w g|, and w is
    clipped to tau / |g|. Gains are found by the path of the kernel's layer.

    A step is due if start <= count < stop and count is a multiple of `every`, where count is 0 at the first
    update. On other steps updates pass unchanged and, under `jit`, no quantile is computed. After
    `optax.apply_updates` at a due step max|w| <= tau holds exactly, in the kernel's own dtype. With `folded`,
    |w| <= tau/|g| up to rounding, for the gains passed to `update`. Weights within tau (tau rounded down to
    that dtype), with `folded` those with |w g| <= tau, receive exactly their update, to the bit.

    A quantile of (nearly) zero, such as that of a kernel that is still all zeros, sets no threshold. NaN
    stays NaN.

    Many weights at exactly +-tau round badly on some vendors' grids. With one scale for each channel and the
    grid [-8, 7] of scale 2 max / 15, +max is rounded to 0.933 max, for all of them in the same direction.
    `spread` takes tau (1 - spread u_i) as the bound of weight i instead, with u_i uniform in [0, 1) and
    constant during training. With a spread of one step of the grid, 2 / 15, the errors of these weights are
    zero on average on any grid.

    Reverse pruning moves every kernel that it sees, whatever its update is: an update of zeros does not tell
    a frozen kernel from one without a gradient. So freeze weights after it, or hide them from it. With the
    trees of bools `frozen` and `trained`, one the opposite of the other, and their `labels`, each of these
    leaves frozen weights as they are, to the bit:

        chain(adam(rate), reverse_pruning(), masked(set_to_zero(), frozen))
        chain(adam(rate), masked(set_to_zero(), frozen), reverse_pruning(mask=trained))
        partition({"trained": chain(adam(rate), reverse_pruning()), "frozen": set_to_zero()}, labels)

    `set_to_zero` before a `reverse_pruning` without a mask does not.

    Under `jit` kernels may be sharded in any way. Inside `shard_map` or `pmap` they must be replicated. If a
    kernel's update has another dtype than the kernel, the update is widened to float32, or to float64 if
    either of the two is float64.

    Kernels that `nn.scan` stacks along a leading axis are one kernel here, with one tau for all layers. Their
    gains are those of each layer.

    Args:
      quantile: Quantile of |w| to pull back to, in (0, 1]. 1 is max|w|, of the whole kernel.
      every, start, stop: When to prune, counted in updates seen by this transformation. If `stop` is None,
        pruning never stops. Inside `optax.MultiSteps` the updates that it emits count, and inside
        `optax.apply_if_finite` those that are finite.
      ema: Weight of the old tau, in [0, 1]. 0 follows the quantile, 1 keeps the first one.
      axis: None for one tau per kernel, or the channel axis (-1: Flax's output features) for one per channel.
      folded: Whether to prune the folded kernel. `update` then needs `batch_stats=` beside params.
      spread: Share of tau over which the bounds of the weights are spread, in [0, 1).
      seed: Seed of the u_i.
      sample_size: Approximate number of weights sampled for the quantile. The sample is fair, see
        `qt_jax.ranges.subsample`. Smaller kernels are taken whole.
      mask: None for all kernels, the leaves whose last key is "kernel". A tree of bools like params, or like
        its upper part, for the kernels where it is True: `{"backbone": False, "head": True}`, as in
        `optax.masked`. Or `(path, leaf) -> bool`, with the path a tuple of str, for exactly the leaves that
        it selects, kernels or not. A box around a leaf (`nn.Partitioned`, `nnx.Param`) is not in its path.

    Returns:
      A transformation whose `update` needs `params` (and `batch_stats` if `folded`, which `optax.chain`
      passes on). Its state is a `ReversePruningState`.

    Raises:
      InvalidInput: Raised here if a setting is out of range or not known when tracing; by `init` if nothing
        is selected, a mask does not fit params or a leaf cannot be clipped; by `update` if params or gains
        are missing, or a gain does not fit its kernel.

    >>> params = {"kernel": jnp.array([0.1, -0.2, 0.3, -9.0]), "bias": jnp.array([9.0])}
    >>> tx = optax.chain(optax.sgd(0.1), reverse_pruning(quantile=0.5))
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> [round(float(w), 6) for w in optax.apply_updates(params, updates)["kernel"]]
    [0.1, -0.2, 0.25, -0.25]
    """
    mask = _is_kernel if mask is None else mask
    pruning = _Pruning(quantile, every, start, stop, ema, axis, folded, spread, seed, sample_size, mask)
    return optax.GradientTransformationExtraArgs(pruning.init, pruning.update)


def _is_kernel(path: Path, leaf: jax.Array) -> bool:
    return path[-1:] == ("kernel",)


class ReversePruningState(NamedTuple):
    """Keep the thresholds as a plain tree of arrays, which any checkpointer saves and restores.

    Attributes:
      count: int32 scalar, the number of updates seen so far.
      tau: Tree like params, without the boxes of `nn.Partitioned`. Its leaves are float32, scalar or
        `(channels,)`, and 0 until the first quantile was taken. `optax.MaskedNode()` stands in the place of a
        leaf that is not pruned. States of older versions, with infinity for 0, are read.
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
            value = getattr(self, name)
            if isinstance(value, jax.Array):
                raise InvalidInput(
                    f"reverse_pruning: {name} must be {wanted}, known when tracing, got an array; name it in "
                    "the static_args of optax.inject_hyperparams"
                )
            if not holds:
                raise InvalidInput(f"reverse_pruning: {name} must be {wanted}, got {value!r}")
        if callable(self.mask) and not _takes_path_and_leaf(self.mask):
            raise InvalidInput(
                "reverse_pruning: mask must be a function (path, leaf) -> bool or a tree of bools, got a "
                "function of other arguments; call it on the parameters if it makes a tree"
            )
        if self.stop is not None and self.stop <= self.start:
            raise InvalidInput(
                f"reverse_pruning: stop must be above start={self.start}, got {self.stop}: it would never act"
            )

    def init(self, params: optax.Params) -> ReversePruningState:
        """Return the state before the first update."""
        count = jnp.zeros((), jnp.int32)
        if not jax.tree.leaves(params):  # an empty group of a partition, or the question of tree_map_params
            return ReversePruningState(count, jnp.zeros((), jnp.float32))
        return ReversePruningState(count, _initial_thresholds(params, self.mask, self.axis))

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
        moved_on = state._replace(count=optax.safe_increment(state.count))
        if not jax.tree.leaves(params):
            return updates, moved_on
        due = (state.count >= self.start) & (state.count % self.every == 0)
        if self.stop is not None:
            due &= state.count < self.stop
        tree: Any
        named, tree = jax.tree.flatten_with_path(state.tau, is_leaf=_is_masked)
        thresholds = [tau for _, tau in named]
        changes, weights = tree.flatten_up_to(updates), tree.flatten_up_to(params)
        kernels = [i for i, tau in enumerate(thresholds) if not _is_masked(tau)]
        paths = [_names(named[i][0]) for i in kernels]
        old = [_unboxed(weights[i], path) for i, path in zip(kernels, paths, strict=True)]
        given = [_unboxed(changes[i], path) for i, path in zip(kernels, paths, strict=True)]
        plain = [holding(update, param) for update, param in zip(given, old, strict=True)]
        gains: list[Any] = [None] * len(kernels)
        if self.folded:
            gains = _gains(paths, old, batch_stats, [_names(path) for path, _ in named])
        clipped = jax.lax.cond(
            due,
            lambda taus: tuple(zip(*map(self._clip, old, plain, gains, taus), strict=True)),
            lambda taus: (tuple(plain), taus),
            tuple(jnp.where(jnp.isinf(thresholds[i]), 0.0, thresholds[i]) for i in kernels),
        )
        for i, change, tau in zip(kernels, *clipped, strict=True):
            changes[i], thresholds[i] = _boxed_like(changes[i], change), tau
        return tree.unflatten(changes), moved_on._replace(tau=tree.unflatten(thresholds))

    def _clip(
        self, param: jax.Array, update: jax.Array, gain: jax.Array | None, tau: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the projected update of one kernel, and its new tau."""
        new = _moved(param, update)
        deployed = new if gain is None else new * gain.astype(new.dtype)
        _, high = observe(
            deployed, quantile=self.quantile, symmetric=True, axis=self.axis, sample_size=self.sample_size
        )
        if new.dtype == jnp.float64:  # the largest weight is not above its float32
            high = jnp.nextafter(high, jnp.finfo(high.dtype).max)
        tau = _smooth(tau, high, self.ema)
        others = [] if self.axis is None else [d for d in range(param.ndim) if d != self.axis % param.ndim]
        limit = jnp.expand_dims(tau, others) + jnp.zeros_like(param, jnp.float32)  # sharded as param is
        unset = limit == 0.0
        if self.spread:
            limit *= 1.0 - np.float32(self.spread) * jax.random.uniform(
                jax.random.key(self.seed), param.shape, jnp.float32
            )
        limit = limit.astype(new.dtype)
        inside = unset | (jnp.abs(deployed) <= limit)
        if gain is not None:  # where it is 0, all weights are inside
            limit /= jnp.where(inside, 1.0, jnp.abs(gain).astype(new.dtype))
        return project(param, update, jnp.where(inside, jnp.abs(new), limit)), tau


def _is_fraction(value: object) -> bool:
    return (
        isinstance(value, float | int | np.floating | np.integer)
        and not isinstance(value, bool)
        and bool(0 <= value <= 1)
    )


def _is_int(value: object, least: float) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def _takes_path_and_leaf(mask: Callable[..., Any]) -> bool:
    try:
        inspect.signature(mask).bind((), None)
    except TypeError:
        return False
    except ValueError:  # a function written in C need not tell its arguments
        return True
    return True


def _initial_thresholds(params: optax.Params, mask: Mask, axis: int | None) -> optax.Params:
    """Return 0 for every leaf that the mask selects, and a MaskedNode for the others."""
    selects = mask if callable(mask) else _by_tree(mask, params)

    def threshold(path: tuple, node: Any) -> jax.Array | optax.MaskedNode:
        names = _names(path)
        leaf = jax.tree.leaves(node)[0] if jax.tree.leaves(node) else None
        if leaf is None or not selects(names, leaf):
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
        return jnp.zeros(() if axis is None else leaf.shape[axis], jnp.float32)

    tau = jax.tree_util.tree_map_with_path(threshold, params, is_leaf=_is_box)
    if not jax.tree.leaves(tau):
        leaves = ["/".join(_names(path)) for path, _ in jax.tree.leaves_with_path(params)]
        raise InvalidInput(
            f"reverse_pruning: no parameter is selected out of {len(leaves)}, the first being: "
            f"{', '.join(leaves[:5])}; by default, and of a tree of bools, those are the ones whose "
            "last key is 'kernel': give a function (path, leaf) -> bool as `mask` that selects yours"
        )
    return tau


def _by_tree(mask: Any, params: optax.Params) -> Callable[[Path, jax.Array], bool]:
    """Return the mask as a function of path and leaf.

    Raises:
      InvalidInput: The tree holds something else than bools, or names what is no part of params.
    """
    entries = {_names(path): value for path, value in jax.tree.leaves_with_path(mask)}
    nodes = jax.tree.leaves_with_path(params, is_leaf=_is_masked)
    for path, value in entries.items():
        where = f"at {'/'.join(path)}" if path else "as the whole tree"
        if not isinstance(value, bool | np.bool_):
            raise InvalidInput(
                f"reverse_pruning: mask must be a function or a tree of bools, got {value!r} {where}"
            )
        if not any(
            names[: len(path)] == path or (_is_masked(node) and path[: len(names)] == names)
            for names, node in ((_names(keys), node) for keys, node in nodes)
        ):
            raise InvalidInput(
                f"reverse_pruning: mask gives {value} {where}, where no parameter is; the mask must be a "
                "tree like params, or like its upper part"
            )

    def selects(path: Path, leaf: jax.Array) -> bool:
        for length in range(len(path), -1, -1):
            if path[:length] in entries:
                return bool(entries[path[:length]]) and _is_kernel(path, leaf)
        raise InvalidInput(
            f"reverse_pruning: mask says nothing about {'/'.join(path)}; give True or False for it, or for a "
            "part of the tree that holds it"
        )

    return selects


def _names(path: tuple) -> Path:
    """Return the keys as str, without that of a box around the leaf."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_box(node: object) -> bool:
    return isinstance(node, AxisMetadata)


def _unboxed(node: Any, path: Path) -> jax.Array:
    leaves = jax.tree.leaves(node)
    if len(leaves) != 1:
        raise InvalidInput(
            f"reverse_pruning: {'/'.join(path)} was one array in init and is {type(node).__name__} now; give "
            "`update` the tree that `init` was given"
        )
    return leaves[0]


def _boxed_like(node: Any, leaf: jax.Array) -> Any:
    return jax.tree.unflatten(jax.tree.structure(node), [leaf])


def _is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def _gains(
    paths: list[Path], kernels: list[jax.Array], batch_stats: Mapping[str, Any] | None, everywhere: list[Path]
) -> list[jax.Array]:
    """Return the gains in `batch_stats` of each kernel, with its rank; 1 if there are none.

    `everywhere` holds the paths of all parameters and of the subtrees that a mask hides.
    """
    statistics = {_names(path): leaf for path, leaf in jax.tree.leaves_with_path(batch_stats)}
    with_gain = {path[:-1] for path in statistics if path[-1] == GAIN}
    if not with_gain:
        raise InvalidInput(
            "reverse_pruning(folded=True) needs gains: tx.update(updates, state, params, batch_stats=...) "
            "on statistics attached for a QuantConfig(folded=True) and kept up to date by Fusion.refresh"
        )
    if paths and not any(
        path[:-1] in with_gain or any(layer[: len(path)] == path for layer in with_gain)
        for path in everywhere
    ):
        raise InvalidInput(
            f"reverse_pruning(folded=True): no kernel has a gain, {'/'.join(paths[0])} for one; params must "
            "be the tree below 'params', with the paths of batch_stats"
        )
    found = []
    for path, kernel in zip(paths, kernels, strict=True):
        gain = statistics.get((*path[:-1], GAIN), jnp.ones((), jnp.float32))
        layers = jnp.ndim(statistics.get((*path[:-1], KERNEL, "count"), 0))  # axes that nn.scan adds
        if layers and (kernel.ndim < layers + 2 or not _readings(gain, kernel.shape)):
            gain = gain[(0,) * layers]  # one kernel for all steps, whose gains are equal
        readings = _readings(gain, kernel.shape)
        if not readings:
            raise InvalidInput(
                f"reverse_pruning: the gain {list(gain.shape)} of {'/'.join(path[:-1])} does not fit its "
                f"kernel {list(kernel.shape)}, whose features are on the last axis or the last but one; "
                "attach the statistics again"
            )
        found.append(readings.get(layers, readings[min(readings)]))
    return found


def _readings(gain: jax.Array, shape: tuple[int, ...]) -> dict[int, jax.Array]:
    """Return gains with the rank of a kernel of this shape, by the number of leading axes that both have.

    Without leading axes the gain is `(channels,)`, or `(channels, 1)` for features on the last axis but one.
    `nn.scan` puts one before them for its layers. `(3, 1)` can then be read in two ways.
    """
    if gain.ndim == 0:
        return {0: gain}
    readings = {}
    for own in (1, 2):
        leading = gain.ndim - own
        if 0 <= leading <= len(shape) - own and gain.shape == (
            *shape[:leading],
            shape[-own],
            *(1,) * (own - 1),
        ):
            inner = range(leading, leading + len(shape) - gain.ndim)
            readings[leading] = jnp.expand_dims(gain, [*inner])
    return readings


def _smooth(tau: jax.Array, quantile: jax.Array, ema: float) -> jax.Array:
    """Return the moving average. A quantile that is unusable (tiny, NaN, infinite) leaves it as it was.

    Rounding may not take it out of the interval between the two: at quantile 1 a kernel that stands still
    would be clipped.
    """
    usable = jnp.isfinite(quantile) & (quantile >= SMALLEST_THRESHOLD)
    average = jnp.clip(
        ema * tau + (1.0 - ema) * quantile, jnp.minimum(tau, quantile), jnp.maximum(tau, quantile)
    )
    return jnp.where(usable, jnp.where(tau == 0.0, quantile, average), tau)


def project(param: jax.Array, update: jax.Array, tau: jax.Array) -> jax.Array:
    """Return the update u' for which fl(param + u') lies in [-tau, tau] exactly.

    Only where |fl(p + u)| > tau is u replaced, by u' = fl(b - p) with b = +-tau rounded towards zero in the
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
    new = _moved(param, update)
    target = jnp.clip(new, -bound, bound)
    moved = jax.lax.reduce_precision(target - old, kind.nexp, kind.nmant)
    beyond = jnp.abs(old + moved) > bound
    moved = moved.astype(update.dtype)
    inward = jnp.where(new > 0, kind.min, kind.max).astype(update.dtype)
    moved = jnp.where(beyond, jnp.nextafter(moved, inward), moved)
    return jnp.where(jnp.abs(new) > bound, moved, update)


def _moved(param: jax.Array, update: jax.Array) -> jax.Array:
    """Return fl(p + u), a number of the parameter's type, in float32 (float64 if either is float64)."""
    exact, kind = _wide(param.dtype, update.dtype), jnp.finfo(param.dtype)
    return jax.lax.reduce_precision(param.astype(exact) + update.astype(exact), kind.nexp, kind.nmant)


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
