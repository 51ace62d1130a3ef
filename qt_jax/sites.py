"""One quantization point: its range in `batch_stats`, what it observes, its tensor on the grid.

All points of a forward pass share the pass: quantiles are taken together when it ends, and a tensor that
enters several layers, as the queries, keys and values of an attention do, is put on its grid once.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.tracers import current_trace

from qt_jax.errors import InvalidInput
from qt_jax.fake_quant import QuantSpec, fake_quant
from qt_jax.quantiles import Sample, draw, empty_range, ranges, update_range
from qt_jax.rules import QuantConfig
from qt_jax.vendor_grids import fake_quant_on_drawn_grid, grid_key

COLLECTION = "batch_stats"
KERNEL, INPUT, OUTPUT = "quant_kernel", "quant_input", "quant_output"
"""Names of the ranges beside a layer's other statistics, each {"low", "high", "count"}."""
GAIN = "quant_gain"
"""Name of the gains with which folding will multiply a layer's kernel: float32 `(channels,)`, or
`(channels, 1)` where the features are the kernel's last axis but one."""


@dataclasses.dataclass
class _Input:
    """A layer's input on its grid, for the other layers that it enters."""

    plain: jax.Array
    image: jax.Array
    sample: Sample | None
    trace: Any


@dataclasses.dataclass
class ForwardPass:
    """The points of one forward pass, while it is traced.

    Attributes:
      lam: blend coefficient, float32 scalar.
      train: whether ranges move where `batch_stats` is mutable.
      trace: JAX's trace in which the pass began. A point inside a lifted transformation (nn.scan, nn.vmap,
        nn.remat) lives in another one, whose values cannot leave it: its range moves at once.
      observed: the samples, and the ranges that they move at the end.
      inputs: by identity and spec.
    """

    config: QuantConfig
    lam: jax.Array
    train: bool
    trace: Any = dataclasses.field(default_factory=current_trace)
    observed: list[tuple[nn.Variable, Sample]] = dataclasses.field(default_factory=list)
    inputs: dict[tuple[int, QuantSpec], _Input] = dataclasses.field(default_factory=dict)

    def quantized(
        self, module: nn.Module, name: str, x: jax.Array, spec: QuantSpec, gain: jax.Array | None = None
    ) -> jax.Array:
        """`x` blended with its image on the grid of its range; observes it if training.

        With a gain g the grid is laid over g x, and what returns is x + (fake_quant(g x) - g x) / g: `x` to
        the bit at lambda = 0, with the gradient of `fake_quant`.

        Raises:
          InvalidInput: the module has no statistics for it, or of another shape.
        """
        statistics = _statistics(module, name, x, spec)
        moves = self.train and module.is_mutable_collection(COLLECTION) and not module.is_initializing()
        known = self.inputs.get((id(x), spec)) if name == INPUT else None
        if known is not None and known.trace == current_trace():
            if moves:
                self._observe(statistics, known.sample)
            return known.image
        deployed = x if gain is None else x * gain
        seen, sample = statistics.value, None
        if moves:
            whole = name == KERNEL and spec.quantile == 1.0
            sample = draw(
                deployed,
                quantile=spec.quantile,
                symmetric=spec.symmetric,
                axis=spec.axis,
                sample_size=x.size if whole else self.config.sample_size,
            )
            self._observe(statistics, sample)
        lam = jnp.where(seen["count"] > 0, self.lam, jnp.zeros_like(self.lam))
        if spec.grids == "vendors" and moves:
            key = grid_key(self.config.seed, "/".join((*module.path, name)), seen["count"])
            image = fake_quant_on_drawn_grid(deployed, seen["low"], seen["high"], spec, lam, key)
        else:
            image = fake_quant(deployed, seen["low"], seen["high"], spec, lam)
        if gain is not None:
            return x + (image - deployed) / jnp.where(gain == 0.0, 1.0, gain)
        if name == INPUT:
            self.inputs[id(x), spec] = _Input(x, image, sample, current_trace())
        return image

    def _observe(self, statistics: nn.Variable, sample: Sample) -> None:
        if current_trace() == self.trace:
            self.observed.append((statistics, sample))
        else:
            self._move([(statistics, sample)])

    def _move(self, observed: list[tuple[nn.Variable, Sample]]) -> None:
        samples = {id(sample): sample for _, sample in observed}
        found = dict(zip(samples, ranges(list(samples.values()), self.config.axis_name), strict=True))
        for statistics, sample in observed:
            low, high = found[id(sample)]
            statistics.value = update_range(statistics.value, low, high, self.config.momentum)

    def end(self) -> None:
        """Moves the ranges."""
        self._move(self.observed)


def _statistics(module: nn.Module, name: str, x: jax.Array, spec: QuantSpec) -> nn.Variable:
    """The range of one point, empty if it is new."""
    where = "/".join((*module.path, name))
    if not module.is_mutable_collection(COLLECTION) and not module.has_variable(COLLECTION, name):
        raise InvalidInput(
            f"no statistics for {where!r} in {COLLECTION!r}. Attach them to a plain checkpoint with "
            "qt.attach_statistics(model, variables, config, input), or pass the collection to apply. Under a "
            "transformation that does not lift the collection (nn.WeightNorm, nn.map_variables) the layer "
            "cannot be reached: leave it out with qt.Rule(path, skip=True)."
        )
    channels = None if spec.axis is None else x.shape[spec.axis]
    statistics = module.variable(COLLECTION, name, empty_range, channels)
    expected = () if channels is None else (channels,)
    if statistics.value["low"].shape != expected:
        raise InvalidInput(
            f"the statistics of {where!r} have shape {statistics.value['low'].shape}, the config wants "
            f"{expected}: they were made with another axis. Drop them and attach them anew."
        )
    return statistics
