"""Batch-norm statistics measured anew: those of the network that is deployed, not of the one in training.

Running averages lag behind the parameters, and under Quant-Trim they belong to a forward pass that clips and
rounds. The float graph that is exported does neither.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.errors import InvalidInput
from qt_jax.interception import COLLECTION

Path = tuple[str, ...]
MEAN, VARIANCE = "mean", "var"


def reestimate(
    apply_fn: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
) -> dict[str, Any]:
    """`variables` with the statistics of every batch norm pooled over `batches`, all alike.

    The statistics of batch k, mean m_k and variance v_k of n_k examples, give

        mean = sum n_k m_k / n        var = sum n_k (v_k + (m_k - mean)^2) / n        n = sum n_k

    which is the mean and the (biased) variance of all of a layer's inputs: the module's momentum has no say
    and the order of the batches none (precise batch norm: Wu and Johnson, arXiv 2105.07576, section 3).

    There is one forward a batch, in training mode: a batch norm normalises with the batch's own statistics,
    so that a deeper layer is measured on inputs normalised as they will be, whatever the old statistics
    were. The batch's own and the pooled ones differ by sampling: take batches of hundreds of examples.

    Args:
      apply_fn: `(variables, batch) -> (outputs, updated)`, the forward in training mode with `batch_stats`
        mutable. Plain, it measures the float network; inside `qt.quant_trim(..., train=False)` the
        fake-quantized one. Jitted here.
      variables: Flax collections. Parameters and all other statistics, Quant-Trim's ranges among them, come
        back as they are, as does everything where the model has no batch norm.
      batches: what `apply_fn` takes, arrays or pytrees of arrays with the examples along the first axis: a
        few thousand in all, prepared as for inference (no augmentation).

    Returns:
      {"params": ..., "batch_stats": ..., ...}; the new statistics have the dtype of the old.

    Raises:
      InvalidInput: no batch; batch norms that all use their running averages; an `apply_fn` that does not
        return the updated collection; statistics that are not finite.

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
    modes: dict[Path, bool] = {}

    @jax.jit
    def measure(variables: Any, batch: Any) -> dict[Path, tuple[jax.Array, jax.Array]]:
        with nn.intercept_methods(_recording(modes)):
            answer = apply_fn(variables, batch)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise InvalidInput(
                "apply_fn must return (outputs, updated): call the model's apply with "
                f"mutable=[{COLLECTION!r}], in training mode"
            )
        updated = flatten_dict(answer[1].get(COLLECTION, {}))
        training = [path for path, running in modes.items() if not running]
        return {path: (updated[*path, MEAN], updated[*path, VARIANCE]) for path in training}

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
    return {**variables, COLLECTION: unflatten_dict(pooled)} if modes else dict(variables)


def _recording(modes: dict[Path, bool]) -> Callable[..., Any]:
    """An interceptor for one trace that leaves each batch norm with the statistics of what it was given.

    Called twice, a module has those of both calls pooled. `modes` is filled: path -> whether it uses its
    running averages.
    """
    seen: dict[Path, int] = {}

    def intercept(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        path, given = module.path, args[1] if len(args) > 1 else kwargs.get("use_running_average")
        running = nn.merge_param("use_running_average", module.use_running_average, given)
        modes[path] = running and modes.get(path, True)
        if running:
            return call(*args, **kwargs)
        before: dict[str, Any] = {name: module.get_variable(COLLECTION, name) for name in (MEAN, VARIANCE)}
        momentum = module.momentum
        object.__setattr__(module, "momentum", 0.0)
        try:
            outputs = call(*args, **kwargs)
        finally:
            object.__setattr__(module, "momentum", momentum)
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

    return intercept


def pool(
    means: Iterable[np.ndarray], variances: Iterable[np.ndarray], sizes: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of the union of samples of these sizes, means and variances; in float64.

    >>> mean, variance = pool([np.array([1.0]), np.array([7.0])], [np.ones(1), np.zeros(1)], [2, 1])
    >>> mean.item(), round(variance.item(), 4)
    (3.0, 8.6667)
    """
    centres, spreads = (np.stack([*parts]).astype(np.float64) for parts in (means, variances))
    weights = np.asarray([*sizes], np.float64)
    mean = np.average(centres, axis=0, weights=weights)
    return mean, np.average(spreads + (centres - mean) ** 2, axis=0, weights=weights)
