"""One quantization point: its range in `batch_stats`, what it observes, its tensor on the grid.

All points of a forward pass share the pass: quantiles are taken together when it ends, and in training a
tensor that enters several layers, as that of an attention's queries, keys and values does, is put on one grid
once, as a vendor's compiler puts it.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

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


class _Shared(NamedTuple):
    """A layer's input on its grid, for the other layers that it enters."""

    tensor: jax.Array
    image: jax.Array
    leader: nn.Variable


@dataclasses.dataclass
class ForwardPass:
    """The points of one forward pass, while it is traced: the calls within one root scope of Flax.

    A lifted transformation (nn.scan, nn.vmap, nn.remat, nn.map_variables) opens a root of its own, whose
    values and variables end with it, and an `apply` inside a module does: each is a pass of its own.

    Attributes:
      config: specs are the caller's; this gives momentum, sizes, seed.
      lam: blend coefficient, float32 scalar.
      train: whether ranges move where `batch_stats` is mutable.
      observed: the ranges that move at the end, each with what its point has seen.
      shared: inputs on their grids, by identity and spec; each is kept, so that no other gets its identity.
      leaders: by path of an input's point the range that it moves: its own, or that of the point whose image
        it has taken.
      followers: the ranges of points of the second kind, each with the one that it becomes at the end.
      held: path of a range that was to move in a collection that is not mutable; None if there is none.
    """

    config: QuantConfig
    lam: jax.Array
    train: bool
    observed: list[tuple[nn.Variable, Sample]] = dataclasses.field(default_factory=list)
    shared: dict[tuple[int, QuantSpec], _Shared] = dataclasses.field(default_factory=dict)
    leaders: dict[str, nn.Variable] = dataclasses.field(default_factory=dict)
    followers: list[tuple[nn.Variable, nn.Variable]] = dataclasses.field(default_factory=list)
    held: str | None = None

    def quantized(
        self, module: nn.Module, name: str, x: jax.Array, spec: QuantSpec, gain: jax.Array | None = None
    ) -> jax.Array:
        """`x` blended with its image on the grid of its range; observes it if training.

        In training the first layer that an input enters leads: others of the same spec, unless they have had
        an input of their own, take its image and from then on hold its range. Frozen, each rounds with its
        own range, which after a step of training is the same.

        With a gain g the grid is laid over g x, and what returns is x + (fake_quant(g x) - g x) / g: `x` to
        the bit at lambda = 0, with the gradient of `fake_quant`.

        Raises:
          InvalidInput: the module has no statistics for it, or of another shape.
        """
        where = "/".join((*module.path, name))
        statistics = _statistics(module, name, where, x, spec)
        trains = self.train and not module.is_initializing()
        moves = trains and module.is_mutable_collection(COLLECTION)
        if trains and not moves:
            self.held = where
        if moves and name == INPUT:
            found = self.shared.get((id(x), spec))
            if found is not None and where not in self.leaders:
                self.leaders[where] = found.leader
                self.followers.append((statistics, found.leader))
                return found.image
            statistics = self.leaders.setdefault(where, statistics)
        seen = statistics.value
        deployed = x if gain is None else x * gain
        if moves:
            whole = name == KERNEL and spec.quantile == 1.0
            sample = draw(
                deployed,
                quantile=spec.quantile,
                symmetric=spec.symmetric,
                axis=spec.axis,
                sample_size=x.size if whole else self.config.sample_size,
            )
            self.observed.append((statistics, sample))
        effective = jnp.where(seen["count"] > 0, self.lam, jnp.zeros_like(self.lam))
        if spec.grids == "vendors" and moves:
            key = grid_key(self.config.seed, where, seen["count"])
            image = fake_quant_on_drawn_grid(deployed, seen["low"], seen["high"], spec, effective, key)
        else:
            image = fake_quant(deployed, seen["low"], seen["high"], spec, effective)
        if gain is not None:
            return x + (image - deployed) / jnp.where(gain == 0.0, 1.0, gain)
        if moves and name == INPUT:
            self.shared.setdefault((id(x), spec), _Shared(x, image, statistics))
        return image

    def end(self) -> None:
        """Moves the ranges."""
        found = ranges([sample for _, sample in self.observed], self.config.axis_name)
        for (statistics, _), (low, high) in zip(self.observed, found, strict=True):
            statistics.value = update_range(statistics.value, low, high, self.config.momentum)
        for statistics, leader in self.followers:
            statistics.value = leader.value


def _statistics(module: nn.Module, name: str, where: str, x: jax.Array, spec: QuantSpec) -> nn.Variable:
    """The range of one point, empty if it is new."""
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
