"""What is wrong with a network's tensors, and what could be done: to be tried, not to be believed."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from qt_jax.diagnosis.remedies import ClipKernel, Remedy, RemoveChannels, SetRange
from qt_jax.diagnosis.simulation import Bounds
from qt_jax.diagnosis.tensors import Activation, Kernel

OUTLIER = 2.5
"""A largest weight so many times the tail's threshold sets a scale that the others do not need."""
SATURATED = 0.02
"""Share of an activation beyond its grid that quantiles near 1 do not explain."""
DEAD_SHARE = 1.5
"""A dead channel whose largest weight is so many times that of the living ones sets their scale."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """`kind` is "outlier weight", "dead channel", "saturating activation" or "sensitive layer"; `evidence` is
    what was seen."""

    kind: str
    layer: str
    evidence: str
    remedy: Remedy


def findings(
    kernels: Mapping[str, Kernel], activations: Mapping[str, Activation], bounds: Bounds
) -> list[Finding]:
    """What looks wrong, layer by layer in the order of the graph.

    Args:
      kernels: from `tensors.kernels`.
      activations: from `tensors.activations`, with the same bounds.
      bounds: of the grids of layers' inputs.
    """
    found = []
    for name, kernel in kernels.items():
        activation = activations[name]
        loud = _loud(kernel, activation)
        if len(loud):
            found.append(_dead(name, kernel, activation, loud))
        elif kernel.tail > 0 and kernel.largest > OUTLIER * kernel.tail:
            evidence = f"its largest weight is {kernel.largest / kernel.tail:.1f} times the 99.5 % quantile"
            found.append(Finding("outlier weight", name, evidence, ClipKernel(name, kernel.tail)))
        if activation.saturated is not None and activation.saturated > SATURATED:
            low, high = bounds[name]
            evidence = (
                f"{100 * activation.saturated:.1f} % of its input lies beyond [{low:.4g}, {high:.4g}]; it "
                f"goes from {activation.low:.4g} to {activation.high:.4g}"
            )
            remedy = SetRange(name, activation.low, activation.high)
            found.append(Finding("saturating activation", name, evidence, remedy))
    return found


def _loud(kernel: Kernel, activation: Activation) -> np.ndarray:
    """Those of the dead channels whose weights are larger than a living channel needs.

    They can be removed: a bias keeps what they hand on, or that is 0. None in a grouped transposed
    convolution, whose kernel does not hold them one by one.
    """
    dead = activation.constant
    if len(kernel.channel_largest) != len(activation.output_low):
        return dead[:0]
    if not kernel.biased:
        dead = dead[activation.output_low[dead] == 0]
    alive = np.delete(kernel.channel_largest, activation.constant)
    if not len(dead) or not len(alive):
        return dead[:0]
    return dead[kernel.channel_largest[dead] > DEAD_SHARE * alive.max()]


def _dead(name: str, kernel: Kernel, activation: Activation, loud: np.ndarray) -> Finding:
    alive = np.delete(kernel.channel_largest, activation.constant).max()
    most = kernel.channel_largest[loud].max()
    evidence = (
        f"channel {', '.join(map(str, loud[:8]))} never changes, yet has weights up to {most:.4g}; those of "
        f"channels that do end at {alive:.4g}"
    )
    values = tuple(float(value) for value in activation.output_low[loud])
    return Finding("dead channel", name, evidence, RemoveChannels(name, tuple(map(int, loud)), values))
