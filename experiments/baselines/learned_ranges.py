"""Fake-quantize in training with ranges that are parameters, as LSQ and PACT do.

A learned parameter lives in `params` beside the kernel, so gradient, optimizer and checkpoints treat it like
any other. The range that follows from it is kept in `batch_stats` under Quant-Trim's own names. Evaluation is
then `qt.quant_trim(config, 1.0, train=False)` on the same grid to the bit, and exports read the ranges there.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import qt_jax as qt
from qt_jax.grid import along_axis, fake_quant
from qt_jax.interception import COLLECTION, INPUT, KERNEL, LAYERS, Call, intercept, shadowed
from qt_jax.ranges import Range

Ends = tuple[jax.Array, jax.Array]
"""(low, high): float32, scalars or `(channels,)`."""


class LearnedRange(NamedTuple):
    """Define how the range of one kind of site is learned. All functions are pure; ranges are float32.

    Attributes:
      parameter: Name of the learned leaf beside the kernel, of the shape of the range. None where the range
        follows from the kernel itself, which is then the `value` below.
      observe: `(x, seen, spec, config) -> Range`, the statistics after one more batch. `count` 0 in `seen`
        says that this batch is the first, which initialises the range.
      ends: `(value, seen, spec) -> (low, high)`.
      value: `(low, high, spec) -> value`, the inverse, for the first batch.
      slope: `(x, low, high, spec) -> array` that broadcasts against x: d x_hat / d value.
    """

    parameter: str | None
    observe: Callable[[jax.Array, Range, qt.QuantSpec, qt.QuantConfig], Range]
    ends: Callable[[jax.Array, Range, qt.QuantSpec], Ends]
    value: Callable[[jax.Array, jax.Array, qt.QuantSpec], jax.Array] | None = None
    slope: Callable[[jax.Array, jax.Array, jax.Array, qt.QuantSpec], jax.Array] | None = None


LearnedQuantizer = Mapping[str, LearnedRange]
"""Maps each site, `KERNEL` or `INPUT`, to its range."""


def other_axes(x: jax.Array, spec: qt.QuantSpec) -> tuple[int, ...]:
    """Return the axes over which one scale is shared."""
    return tuple(i for i in range(x.ndim) if spec.axis is None or i != spec.axis % x.ndim)


def fake_quant_learned(
    learned: LearnedRange,
    x: jax.Array,
    value: jax.Array,
    seen: Range,
    spec: qt.QuantSpec,
    config: qt.QuantConfig,
    lam: jax.Array,
) -> tuple[jax.Array, Range]:
    """Return `x` blended with its image on the learned grid, and the statistics after this batch.

    The forward is `qt.fake_quant` on the range. The gradient with respect to x is lambda times the clipped
    straight-through estimator plus (1 - lambda). The gradient with respect to the value is lambda times
    `slope`. While lambda is 0 nothing is observed: the first batch with lambda > 0 initialises the range.

    Args:
      learned: How the range is learned.
      x: Tensor of any float dtype.
      value: The learned parameter, or the kernel where there is none.
      seen: Statistics so far, {"low", "high", "count"}.
      spec: Grid of the tensor.
      config: Config of the network.
      lam: Lambda, a scalar.
    """
    frozen = jax.lax.stop_gradient(x).astype(jnp.float32)
    observed = learned.observe(frozen, seen, spec, config)
    after = jax.tree.map(lambda new, old: jnp.where(lam > 0.0, new, old), observed, seen)
    ends = learned.ends(jax.lax.stop_gradient(value), after, spec)
    first = seen["count"] == 0
    low, high = (jnp.where(first, after[key], end) for key, end in zip(("low", "high"), ends, strict=True))
    y = fake_quant(x, low, high, dataclasses.replace(spec, ste="clipped"), lam)
    if learned.slope is not None:
        passing = along_axis(lam * (value - jax.lax.stop_gradient(value)), x, spec)  # 0, with a gradient
        y = y + (passing * jax.lax.stop_gradient(learned.slope(frozen, low, high, spec))).astype(x.dtype)
    return y, after


@contextlib.contextmanager
def learn_ranges(quantizer: LearnedQuantizer, config: qt.QuantConfig, lam: jax.Array) -> Iterator[None]:
    """Fake-quantize every layer that is applied inside the context, in training.

    Enter it inside the differentiated function, with `batch_stats` mutable and after a call of `attach`.

    Raises:
      InvalidInput: The variables lack the quantizer's parameters and statistics, or a transposed kernel is to
        have one scale per channel.
    """

    def quantize(call: Call, /, *args, **kwargs):
        module = call.module
        if not isinstance(module, LAYERS):
            return call(*args, **kwargs)
        sites = config.sites(call.path)
        promote = module.promote_dtype

        def promote_quantized(inputs, kernel, *rest, **options):
            kernel = _site(quantizer, module, KERNEL, kernel, sites.weights, config, lam)
            inputs = _site(quantizer, module, INPUT, inputs, sites.inputs, config, lam)
            return promote(inputs, kernel, *rest, **options)

        with shadowed(module, promote_dtype=promote_quantized):
            return call(*args, **kwargs)

    with intercept(quantize):
        yield


def _site(
    quantizer: LearnedQuantizer,
    module: nn.Module,
    name: str,
    x: jax.Array,
    spec: qt.QuantSpec | None,
    config: qt.QuantConfig,
    lam: jax.Array,
) -> jax.Array:
    if spec is None:
        return x
    learned, where = quantizer[name], "/".join((*module.path, name))
    if spec.axis is not None and getattr(module, "transpose_kernel", False):
        raise qt.InvalidInput(f"{where!r} has a transposed kernel: learn one scale for the whole of it")
    value = x if learned.parameter is None else module.get_variable("params", learned.parameter)
    seen = module.get_variable(COLLECTION, name)
    if value is None or seen is None:
        raise qt.InvalidInput(
            f"no learned range for {where!r}: call attach of experiments.baselines.learned_ranges before"
        )
    y, after = fake_quant_learned(learned, x, value, seen, spec, config, lam)
    module.put_variable(COLLECTION, name, after)
    return y


def _sites(
    quantizer: LearnedQuantizer, batch_stats: Any, config: qt.QuantConfig
) -> Iterator[tuple[tuple[str, ...], str, LearnedRange, qt.QuantSpec, Range]]:
    """Yield (path of the layer, site, its range, its spec, its statistics) of every site in `batch_stats`."""
    flat = flatten_dict(batch_stats)
    for path in flat:
        if path[-1] == "low" and path[-2] in quantizer:
            *layer, site, _ = path
            specs = config.sites("/".join(layer))
            seen = {key: flat[(*layer, site, key)] for key in ("low", "high", "count")}
            spec = specs.weights if site == KERNEL else specs.inputs
            yield tuple(layer), site, quantizer[site], spec, seen


def attach(quantizer: LearnedQuantizer, params: Any, batch_stats: Any, config: qt.QuantConfig) -> Any:
    """Return `params` with a zero for every parameter of the quantizer. The first batch sets its value.

    Args:
      quantizer: The quantizer.
      params: Parameters of the plain model.
      batch_stats: From `qt.attach_statistics` with the same config.
      config: Config of the network.
    """
    flat = flatten_dict(params)
    for layer, _, learned, _, seen in _sites(quantizer, batch_stats, config):
        if learned.parameter is not None:
            flat[(*layer, learned.parameter)] = jnp.zeros_like(seen["low"])
    return unflatten_dict(flat)


def initialize(
    quantizer: LearnedQuantizer, params: Any, before: Any, after: Any, config: qt.QuantConfig
) -> Any:
    """Return `params` with the values of the ranges that a batch has just initialised.

    Args:
      quantizer: The quantizer.
      params: Parameters with its leaves.
      before, after: `batch_stats` given to, and returned by, a forward pass inside `learn_ranges`.
      config: Config of the network.
    """
    flat, old = flatten_dict(params), flatten_dict(before)
    for layer, site, learned, spec, seen in _sites(quantizer, after, config):
        if learned.parameter is not None:
            path = (*layer, learned.parameter)
            first = (old[(*layer, site, "count")] == 0) & (seen["count"] > 0)
            flat[path] = jnp.where(first, learned.value(seen["low"], seen["high"], spec), flat[path])
    return unflatten_dict(flat)


def publish(quantizer: LearnedQuantizer, params: Any, batch_stats: Any, config: qt.QuantConfig) -> Any:
    """Return `batch_stats` with the ranges of `params`, ready for evaluation and export."""
    flat, leaves = flatten_dict(batch_stats), flatten_dict(params)
    for layer, site, learned, spec, seen in _sites(quantizer, batch_stats, config):
        value = leaves[(*layer, learned.parameter or "kernel")]
        flat[(*layer, site, "low")], flat[(*layer, site, "high")] = learned.ends(value, seen, spec)
    return unflatten_dict(flat)
