"""Fake quantization in training whose ranges are parameters: what LSQ and PACT share.

A learned parameter lives in `params` beside the kernel, so gradient, optimizer and checkpoints treat it as
any other. What it amounts to, a range, is kept in `batch_stats` under Quant-Trim's own names; evaluation is
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
from qt_jax.interception import COLLECTION, INPUT, KERNEL, LAYERS
from qt_jax.ranges import Range

Ends = tuple[jax.Array, jax.Array]
"""(low, high): float32, scalars or `(channels,)`."""


class LearnedRange(NamedTuple):
    """How the range of one kind of site comes about. All functions are pure; ranges are float32.

    Attributes:
      parameter: name of the learned leaf beside the kernel, of the shape of the range; None where the range
        follows from the kernel itself, which is then the `value` below.
      observe: `(x, seen, spec, config) -> Range`, the statistics after one more batch; `count` 0 in `seen`
        says that this is the first, which initialises the range.
      ends: `(value, seen, spec) -> (low, high)`.
      value: `(low, high, spec) -> value`, the inverse, for the first batch.
      slope: `(x, low, high, spec) -> array` that broadcasts against x: d x_hat / d value.
    """

    parameter: str | None
    observe: Callable[[jax.Array, Range, qt.QuantSpec, qt.QuantConfig], Range]
    ends: Callable[[jax.Array, Range, qt.QuantSpec], Ends]
    value: Callable[[jax.Array, jax.Array, qt.QuantSpec], jax.Array] | None = None
    slope: Callable[[jax.Array, jax.Array, jax.Array, qt.QuantSpec], jax.Array] | None = None


Quantizer = Mapping[str, LearnedRange]
"""Site, `KERNEL` or `INPUT` -> its range."""


def other_axes(x: jax.Array, spec: qt.QuantSpec) -> tuple[int, ...]:
    """The axes over which one scale is shared."""
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
    """`x` blended with its image on the learned grid, and the statistics after this batch.

    The forward is `qt.fake_quant` on the range. The gradient with respect to x is lambda times the clipped
    straight-through estimator plus (1 - lambda), that with respect to the value lambda times `slope`. While
    lambda is 0 nothing is observed: the first batch with lambda > 0 initialises the range.

    Args:
      x: the tensor, any float dtype.
      value: the learned parameter; the kernel where there is none.
      seen: {"low", "high", "count"}.
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
def learned_ranges(quantizer: Quantizer, config: qt.QuantConfig, lam: jax.Array) -> Iterator[None]:
    """Fake-quantizes every layer that is applied inside the context, in training.

    Enter it inside the differentiated function, with `batch_stats` mutable and `attach` called before.

    Raises:
      InvalidInput: variables without the quantizer's parameters and statistics; one scale per channel on a
        transposed kernel.
    """
    running = set()

    def intercept(call, args, kwargs, context):
        module = context.module
        inherited = id(module) in running  # a subclass that calls its parent's __call__
        if inherited or not isinstance(module, LAYERS) or context.method_name != "__call__":
            return call(*args, **kwargs)
        sites = config.sites("/".join(module.path))
        promote = module.promote_dtype

        def promote_quantized(inputs, kernel, *rest, **options):
            kernel = _site(quantizer, module, KERNEL, kernel, sites.weights, config, lam)
            inputs = _site(quantizer, module, INPUT, inputs, sites.inputs, config, lam)
            return promote(inputs, kernel, *rest, **options)

        object.__setattr__(module, "promote_dtype", promote_quantized)
        running.add(id(module))
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(module, "promote_dtype", promote)
            running.discard(id(module))

    with nn.intercept_methods(intercept):
        yield


def _site(
    quantizer: Quantizer,
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
        raise qt.InvalidInput(f"no learned range for {where!r}: call experiments.baselines' attach before")
    y, after = fake_quant_learned(learned, x, value, seen, spec, config, lam)
    module.put_variable(COLLECTION, name, after)
    return y


def _sites(
    quantizer: Quantizer, batch_stats: Any, config: qt.QuantConfig
) -> Iterator[tuple[tuple[str, ...], str, LearnedRange, qt.QuantSpec, Range]]:
    """(path of the layer, site, its range, its spec, its statistics) of every site in `batch_stats`."""
    flat = flatten_dict(batch_stats)
    for path in flat:
        if path[-1] == "low" and path[-2] in quantizer:
            *layer, site, _ = path
            specs = config.sites("/".join(layer))
            seen = {key: flat[(*layer, site, key)] for key in ("low", "high", "count")}
            spec = specs.weights if site == KERNEL else specs.inputs
            yield tuple(layer), site, quantizer[site], spec, seen


def attach(quantizer: Quantizer, params: Any, batch_stats: Any, config: qt.QuantConfig) -> Any:
    """`params` with a zero for every parameter of the quantizer; the first batch sets its value.

    Args:
      batch_stats: from `qt.attach_statistics` with the same config.
    """
    flat = flatten_dict(params)
    for layer, _, learned, _, seen in _sites(quantizer, batch_stats, config):
        if learned.parameter is not None:
            flat[(*layer, learned.parameter)] = jnp.zeros_like(seen["low"])
    return unflatten_dict(flat)


def started(quantizer: Quantizer, params: Any, before: Any, after: Any, config: qt.QuantConfig) -> Any:
    """`params` in which ranges that a batch has just initialised have their values.

    Args:
      before, after: `batch_stats` given to, and got from, a forward pass inside `learned_ranges`.
    """
    flat, old = flatten_dict(params), flatten_dict(before)
    for layer, site, learned, spec, seen in _sites(quantizer, after, config):
        if learned.parameter is not None:
            path = (*layer, learned.parameter)
            first = (old[(*layer, site, "count")] == 0) & (seen["count"] > 0)
            flat[path] = jnp.where(first, learned.value(seen["low"], seen["high"], spec), flat[path])
    return unflatten_dict(flat)


def published(quantizer: Quantizer, params: Any, batch_stats: Any, config: qt.QuantConfig) -> Any:
    """`batch_stats` whose ranges are those of `params`: the variables can be evaluated and exported."""
    flat, leaves = flatten_dict(batch_stats), flatten_dict(params)
    for layer, site, learned, spec, seen in _sites(quantizer, batch_stats, config):
        value = leaves[(*layer, learned.parameter or "kernel")]
        flat[(*layer, site, "low")], flat[(*layer, site, "high")] = learned.ends(value, seen, spec)
    return unflatten_dict(flat)
