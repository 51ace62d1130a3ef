"""Measure batch-norm statistics again, for the network that is deployed.

Running averages lag behind the parameters. Under Quant-Trim they also belong to a forward pass that clips and
rounds, while the float graph that is exported does neither.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.errors import InvalidInput
from qt_jax.interception import COLLECTION, Call, Handler, intercept, shadowed

Path = tuple[str, ...]
"""Flax path of a module, key by key."""

MEAN, VARIANCE = "mean", "var"
"""Names of the statistics of Linen's batch norm."""


def reestimate(
    apply_fn: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
) -> dict[str, Any]:
    """Return `variables` with the statistics of every batch norm pooled over all `batches`.

    The statistics of batch k, mean m_k and variance v_k of n_k examples, give

        mean = sum n_k m_k / n        var = sum n_k (v_k + (m_k - mean)^2) / n        n = sum n_k

    This is the mean and the (biased) variance of all inputs of a layer. Neither the module's momentum nor
    the order of the batches matters (precise batch norm: Wu and Johnson, arXiv 2105.07576, section 3).

    Each batch takes one forward pass in training mode. A batch norm then normalises with the statistics of
    the batch, so that a deeper layer is measured on inputs normalised as they will be, whatever the old
    statistics were. The statistics of one batch differ from the pooled ones by sampling noise: take batches
    of hundreds of examples.

    Args:
      apply_fn: `(variables, batch) -> (outputs, updated)`, the forward in training mode with `batch_stats`
        mutable. A plain forward measures the float network. One inside `qt.quant_trim(..., train=False)`
        measures the fake-quantized network. It is jitted here.
      variables: Flax collections. Parameters and all other statistics, Quant-Trim's ranges among them, come
        back as they are. Without batch norm, the result equals `variables`.
      batches: What `apply_fn` takes: arrays, or pytrees of arrays, with the examples along the first axis.
        Give a few thousand examples in all, prepared as for inference (no augmentation).

    Returns:
      {"params": ..., "batch_stats": ..., ...}. The new statistics have the dtype of the old.

    Raises:
      InvalidInput: There is no batch, all batch norms use their running averages, `apply_fn` does not return
        the updated collection, or statistics are not finite.

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
    """Build `reestimate` for one forward: a function of variables and batches, compiled once for all of them.

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
    modes: dict[Path, bool] = {}

    @jax.jit
    def measure(variables: Any, batch: Any) -> dict[Path, tuple[jax.Array, jax.Array]]:
        with intercept(_recorder(modes)):
            answer = apply_fn(variables, batch)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise InvalidInput(
                "apply_fn must return (outputs, updated): call the model's apply with "
                f"mutable=[{COLLECTION!r}], in training mode"
            )
        updated = flatten_dict(answer[1].get(COLLECTION, {}))
        training = [path for path, running in modes.items() if not running]
        return {path: (updated[*path, MEAN], updated[*path, VARIANCE]) for path in training}

    def pooled_over(variables: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, Any]:
        sizes, measured = [], []
        for batch in batches:
            sizes.append(len(jax.tree.leaves(batch)[0]))
            measured.append(jax.device_get(measure(variables, batch)))
        if not measured:
            raise InvalidInput("batch norm cannot be estimated from no batches: give at least one")
        if modes and not measured[0]:
            raise InvalidInput(
                "every batch norm uses its running averages: apply_fn must call the model in training mode "
                "(use_running_average=False), such as model.apply(variables, x, train=True, ...)"
            )
        return _with_pooled(variables, measured, sizes) if modes else dict(variables)

    return pooled_over


def _with_pooled(
    variables: Mapping[str, Any], measured: Sequence[dict[Path, tuple[Any, Any]]], sizes: Sequence[int]
) -> dict[str, Any]:
    """Return the variables with the statistics of batches of these sizes pooled."""
    pooled = dict(flatten_dict(dict(variables.get(COLLECTION, {}))))
    for path in measured[0]:
        means, variances = zip(*(answer[path] for answer in measured), strict=True)
        for name, value in zip((MEAN, VARIANCE), pool(means, variances, sizes), strict=True):
            if not np.all(np.isfinite(value)):
                raise InvalidInput(
                    f"the {name} of {'/'.join(path)!r} is not finite: look at the batches, and at the "
                    "statistics that are there"
                )
            pooled[*path, name] = jnp.asarray(value, pooled[*path, name].dtype)
    return {**variables, COLLECTION: unflatten_dict(pooled)}


def _recorder(modes: dict[Path, bool]) -> Handler:
    """Return a handler for one trace that leaves each batch norm with the statistics of its inputs.

    A module that is called twice gets the pooled statistics of both calls. The handler fills `modes`, which
    maps the path of each batch norm to whether it uses its running averages.
    """
    seen: dict[Path, int] = {}

    def record(call: Call, /, *args: Any, **kwargs: Any) -> Any:
        module = call.module
        if not isinstance(module, nn.BatchNorm):
            return call(*args, **kwargs)
        path, given = module.path, args[1] if len(args) > 1 else kwargs.get("use_running_average")
        running = nn.merge_param("use_running_average", module.use_running_average, given)
        modes[path] = running and modes.get(path, True)
        if running:
            return call(*args, **kwargs)
        before: dict[str, Any] = {name: module.get_variable(COLLECTION, name) for name in (MEAN, VARIANCE)}
        with shadowed(module, momentum=0.0):
            outputs = call(*args, **kwargs)
        if path in seen:
            share = args[0].size / (args[0].size + seen[path])
            mean: Any = module.get_variable(COLLECTION, MEAN)
            variance: Any = module.get_variable(COLLECTION, VARIANCE)
            step = mean - before[MEAN]
            spread = share * (1.0 - share) * step**2
            pooled = before[VARIANCE] + share * (variance - before[VARIANCE]) + spread
            module.put_variable(COLLECTION, MEAN, before[MEAN] + share * step)
            module.put_variable(COLLECTION, VARIANCE, pooled)
        seen[path] = seen.get(path, 0) + args[0].size
        return outputs

    return record


def pool(
    means: Iterable[np.ndarray], variances: Iterable[np.ndarray], sizes: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and biased variance of the union of samples with these means, variances and sizes.

    The arithmetic is in float64.

    >>> mean, variance = pool([np.array([1.0]), np.array([7.0])], [np.ones(1), np.zeros(1)], [2, 1])
    >>> mean.item(), round(variance.item(), 4)
    (3.0, 8.6667)
    """
    centres, spreads = (np.stack([*parts]).astype(np.float64) for parts in (means, variances))
    weights = np.asarray([*sizes], np.float64)
    mean = np.average(centres, axis=0, weights=weights)
    return mean, np.average(spreads + (centres - mean) ** 2, axis=0, weights=weights)
