"""Measure batch-norm statistics again, for the network that is deployed.

Running averages lag behind the parameters. Under Quant-Trim they also belong to a forward pass that clips and
rounds, while the float graph that is exported does neither.
"""

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.errors import InvalidInput
from qt_jax.interception import COLLECTION, Call, intercept, is_quant_trim_statistic, shadowed

Path = tuple[str, ...]
"""Flax path of a module, key by key."""

MEAN, VARIANCE, SIZE = "mean", "var", "reestimated_size"
"""Names of the statistics of Linen's batch norm, and of the number of elements that they were taken over."""

BODY, SIGNATURE = inspect.unwrap(nn.BatchNorm.__call__), inspect.signature(nn.BatchNorm.__call__)
"""What Linen's batch norm runs, whichever class calls it, and what it takes."""


def reestimate(
    apply_fn: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
) -> dict[str, Any]:
    """Return `variables` with the statistics of every batch norm pooled over all `batches`.

    The statistics of batch k, mean m_k and variance v_k of n_k elements of a channel, give

        mean = sum n_k m_k / n        var = sum n_k (v_k + (m_k - mean)^2) / n        n = sum n_k

    This is the mean and the (biased) variance of all inputs of a layer, those under a `mask` alone if it is
    given one. Neither the module's momentum nor the order of the batches matters (precise batch norm: Wu and
    Johnson, arXiv 2105.07576, section 3). A layer that is called several times, also by a lifted loop, gets
    the statistics of all its inputs. A class derived from nn.BatchNorm gets those of what it gives to the
    `__call__` that it inherits.

    Each batch takes one forward pass in training mode. A batch norm then normalises with the statistics of
    the batch, so that a deeper layer is measured on inputs normalised as they will be, whatever the old
    statistics were. The statistics of one batch differ from the pooled ones by sampling noise: take batches
    of hundreds of examples.

    Args:
      apply_fn: `(variables, batch) -> (outputs, updated)`, the forward in training mode with `batch_stats`
        mutable. A plain forward measures the float network. One inside `qt.quant_trim(..., train=False)`
        measures the fake-quantized network. It is jitted here, and may be jitted already. The statistics
        that it is given hold one leaf more for each batch norm.
      variables: Flax collections. Parameters and all other statistics, Quant-Trim's ranges among them, come
        back as they are. Without batch norm, the result equals `variables`.
      batches: What `apply_fn` takes: arrays, or pytrees of arrays. Give a few thousand examples in all,
        prepared as for inference (no augmentation). Leaves that are no numeric arrays, such as True, 2 or
        "abc", reach `apply_fn` as they are, and it is compiled once for each distinct set of them.

    Returns:
      {"params": ..., "batch_stats": ..., ...}. The new statistics have the dtype of the old.

    Raises:
      InvalidInput: There is no batch, all batch norms use their running averages, `apply_fn` does not return
        the updated collection, statistics are not finite, or a module moves a mean and a variance of its
        own, not through nn.BatchNorm, which cannot be measured.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         return nn.BatchNorm(use_running_average=not train, name="norm")(x)
    >>> net, x = Net(), jnp.array([[0.0], [2.0], [7.0]])
    >>> variables = net.init(jax.random.key(0), x, train=False)
    >>> train_mode = lambda variables, x: net.apply(variables, x, train=True, mutable=["batch_stats"])
    >>> norm = reestimate(train_mode, variables, [x[:2], x[2:]])["batch_stats"]["norm"]
    >>> norm["mean"].tolist(), round(norm["var"].item(), 4)
    ([3.0], 8.6667)
    """
    return reestimator(apply_fn)(variables, batches)


def reestimator(
    apply_fn: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
) -> Callable[[Mapping[str, Any], Iterable[Any]], dict[str, Any]]:
    """Build `reestimate` for one forward: a function of variables and batches that keeps what it compiles.

    Take it where many networks of one architecture are measured. Build it anew for another forward, or for
    the same forward under another interceptor, such as an enclosing `quant_trim`.

    Args:
      apply_fn: As in `reestimate`.

    Returns:
      `(variables, batches) -> variables`, which raises as `reestimate` does.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         return nn.BatchNorm(use_running_average=not train, name="norm")(x)
    >>> net, x = Net(), jnp.array([[0.0], [2.0]])
    >>> pooled = reestimator(lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"]))
    >>> variables = net.init(jax.random.key(0), x, train=False)
    >>> [pooled(variables, [batch])["batch_stats"]["norm"]["mean"].item() for batch in (x, x + 1)]
    [1.0, 2.0]
    """
    classes: dict[Path, str] = {}

    def record(call: Call, /, *args: Any, **kwargs: Any) -> Any:
        classes.setdefault(call.module.path, type(call.module).__name__)
        return call(*args, **kwargs)

    @partial(jax.jit, static_argnums=2)
    def measure(variables: Any, arrays: Sequence[Any], frame: _Frame) -> dict[Path, jax.Array]:
        with intercept(record), intercept(_measured, every_method=True):
            answer = apply_fn(variables, frame.around(arrays))
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise InvalidInput(
                "apply_fn must return (outputs, updated): call the model's apply with "
                f"mutable=[{COLLECTION!r}], in training mode"
            )
        updated = flatten_dict(answer[1].get(COLLECTION, {}))
        return {path: leaf for path, leaf in updated.items() if not is_quant_trim_statistic(path)}

    def pooled_over(variables: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, Any]:
        statistics = flatten_dict(dict(variables.get(COLLECTION, {})))
        norms = [
            path[:-1] for path in statistics if path[-1] == MEAN and (*path[:-1], VARIANCE) in statistics
        ]
        empty = {(*path, SIZE): jnp.zeros(np.shape(statistics[*path, MEAN])) for path in norms}
        given = {**variables, COLLECTION: unflatten_dict({**statistics, **empty})}
        answers = [jax.device_get(measure(given, *_taken_apart(batch))) for batch in batches]
        if not answers:
            raise InvalidInput("batch norm cannot be estimated from no batches: give at least one")
        measured = [path for path in norms if any(np.any(answer.get((*path, SIZE), 0)) for answer in answers)]
        for answer in answers:
            _check_all_measured(statistics, answer, measured, classes)
        if norms and not measured:
            raise InvalidInput(
                "every batch norm uses its running averages: apply_fn must call the model in training mode "
                "(use_running_average=False), such as model.apply(variables, x, train=True, ...)"
            )
        pooled = {**statistics, **_pooled(statistics, answers, measured)}
        return {**variables, COLLECTION: unflatten_dict(pooled)} if measured else dict(variables)

    return pooled_over


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Hold all of a batch but its arrays, as a static argument of a jitted function.

    Attributes:
      tree: Structure of the batch.
      keys: For each leaf, what tells it from another: for an array None, as jit itself looks at it.
      leaves: The leaves, with None in place of each array.
    """

    tree: Any
    keys: tuple[tuple[type, Hashable] | None, ...]
    leaves: tuple[Any, ...] = dataclasses.field(compare=False)

    def around(self, arrays: Iterable[Any]) -> Any:
        """Return the batch that holds these arrays."""
        rest = iter(arrays)
        return self.tree.unflatten(
            [next(rest) if key is None else leaf for key, leaf in zip(self.keys, self.leaves, strict=True)]
        )


def _taken_apart(batch: Any) -> tuple[list[Any], _Frame]:
    """Return the arrays of a batch, and its frame.

    The class of a leaf is part of its key, as True equals 1 and 1.0. A leaf that cannot be hashed equals no
    other.

    >>> arrays, frame = _taken_apart({"n": 2, "x": jnp.ones(3)})
    >>> len(arrays), frame.around([0.5])
    (1, {'n': 2, 'x': 0.5})
    >>> [frame == _taken_apart({"n": n, "x": jnp.zeros(3)})[1] for n in (2, 2.0)]
    [True, False]
    """
    leaves, tree = jax.tree.flatten(batch)
    keys = [
        None if _is_traced(leaf) else (type(leaf), leaf if isinstance(leaf, Hashable) else object())
        for leaf in leaves
    ]
    arrays = [leaf for leaf, key in zip(leaves, keys, strict=True) if key is None]
    rest = (None if key is None else leaf for leaf, key in zip(leaves, keys, strict=True))
    return arrays, _Frame(tree, (*keys,), (*rest,))


def _is_traced(leaf: Any) -> bool:
    """Tell whether a leaf is an array of numbers. Numpy has arrays of text, dates and objects too.

    >>> [_is_traced(leaf) for leaf in (np.ones(2), np.float32(1), 1.0, "a", np.array(["a"]))]
    [True, True, False, False, False]
    """
    of_no_numbers = isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "MOSUm"
    return hasattr(leaf, "shape") and not of_no_numbers


def _measured(call: Call, /, *args: Any, **kwargs: Any) -> Any:
    """Run one method. `nn.BatchNorm.__call__` in training mode leaves the statistics of all inputs so far.

    A derived class may take other arguments, call it with several inputs, or not at all. So nothing is read
    from the call of such a class, and all from those that reach the method of nn.BatchNorm itself.

    The number of elements that it has seen lies beside its statistics, and passes with them through loops
    and other lifted transformations. How often their bodies are traced does not matter.
    """
    module: Any = call.module
    runs_body = getattr(inspect.unwrap(call.method), "func", None) is BODY  # Flax binds it by a partial
    if not (runs_body and module.has_variable(COLLECTION, SIZE)):
        return call(*args, **kwargs)
    before: dict[str, Any] = {name: module.get_variable(COLLECTION, name) for name in (MEAN, VARIANCE, SIZE)}
    with shadowed(module, momentum=0.0):
        outputs = call(*args, **kwargs)
    mean: Any = module.get_variable(COLLECTION, MEAN)
    variance: Any = module.get_variable(COLLECTION, VARIANCE)
    if mean is before[MEAN]:
        return outputs  # it used its running averages
    given = SIGNATURE.bind(module, *args, **kwargs).arguments
    x, mask = given["x"], given.get("mask")
    if mask is None:
        size = jnp.full(mean.shape, x.size // mean.size, jnp.float32)
    else:
        features = (module.axis,) if isinstance(module.axis, int) else module.axis
        others = [axis for axis in range(x.ndim) if axis not in {feature % x.ndim for feature in features}]
        counted = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
        size = jnp.sum(counted, axis=others, dtype=jnp.float32).reshape(mean.shape)
    if module.axis_name is not None:  # all devices or lanes have been measured together
        size = jax.lax.psum(size, module.axis_name)
    share = (size / (before[SIZE] + size)).astype(mean.dtype)
    step = mean - before[MEAN]
    spread = share * (1.0 - share) * step**2
    first = before[SIZE] == 0
    pooled = {
        MEAN: jnp.where(first, mean, before[MEAN] + share * step),
        VARIANCE: jnp.where(
            first, variance, before[VARIANCE] + share * (variance - before[VARIANCE]) + spread
        ),
        SIZE: before[SIZE] + size,
    }
    for name, value in pooled.items():
        module.put_variable(COLLECTION, name, value)
    return outputs


def _check_all_measured(
    before: Mapping[Path, Any],
    after: Mapping[Path, Any],
    measured: Sequence[Path],
    classes: Mapping[Path, str],
) -> None:
    """Raise InvalidInput if two statistics of one shape moved that belong to no module which is measured.

    A mean and a variance are such a pair, whatever a model calls them.
    """
    owners: dict[Path, set[str]] = {}
    for path, leaf in before.items():
        if (
            path in after
            and path[:-1] not in measured
            and not np.array_equal(leaf, after[path], equal_nan=True)
        ):
            owners.setdefault(path[:-1], set()).add(path[-1])
    for owner, moved in owners.items():
        shapes = [np.shape(before[*owner, name]) for name in moved]
        if len(set(shapes)) < len(shapes) and classes.get(owner) != "SpectralNorm":
            nearest = next(
                owner[:end] for end in range(len(owner), -1, -1) if owner[:end] in classes or not end
            )
            raise InvalidInput(
                f"{'/'.join(owner)!r} ({classes.get(nearest, 'of a class that was not called')}) moves "
                f"statistics of its own, {' and '.join(sorted(moved))}, which cannot be measured: use "
                "nn.BatchNorm, or derive the class from it and call super().__call__. To leave them as they "
                "are, let apply_fn return those that it was given."
            )


def _pooled(
    statistics: Mapping[Path, Any], answers: Sequence[Mapping[Path, Any]], measured: Sequence[Path]
) -> dict[Path, jax.Array]:
    """Return the new statistics of the batch norms at the paths `measured`, pooled over the batches."""
    found = {}
    for path in measured:
        means, variances, sizes = (
            [answer[*path, name] for answer in answers] for name in (MEAN, VARIANCE, SIZE)
        )
        reached = np.sum(sizes, axis=0) > 0  # a lifted loop may leave one layer of many out
        weights = [np.where(reached, size, 1.0) for size in sizes]
        for name, value in zip((MEAN, VARIANCE), pool(means, variances, weights), strict=True):
            if not np.all(np.isfinite(value)):
                raise InvalidInput(
                    f"the {name} of {'/'.join(path)!r} is not finite: look at the batches, and at the "
                    "statistics that are there"
                )
            old = statistics[*path, name]
            found[*path, name] = jnp.asarray(np.where(reached, value, old), old.dtype)
    return found


def pool(
    means: Iterable[np.ndarray], variances: Iterable[np.ndarray], sizes: Iterable[int | np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and biased variance of the union of samples with these means, variances and sizes.

    A size is one number, or one for each element of the mean. The arithmetic is in float64.

    >>> mean, variance = pool([np.array([1.0]), np.array([7.0])], [np.ones(1), np.zeros(1)], [2, 1])
    >>> mean.item(), round(variance.item(), 4)
    (3.0, 8.6667)
    """
    centres, spreads = (np.stack([*parts]).astype(np.float64) for parts in (means, variances))
    weights = np.stack([np.broadcast_to(size, mean.shape) for size, mean in zip(sizes, centres, strict=True)])
    mean = np.average(centres, axis=0, weights=weights)
    return mean, np.average(spreads + (centres - mean) ** 2, axis=0, weights=weights)
