"""Find what is wrong with a network's tensors, and name a remedy for each finding.

A remedy maps one deployment to another. `qt_jax.diagnosis.advice` tries each remedy before it is advised.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx

from qt_jax.diagnosis.layers import Activation, InputBounds, Kernel, layers_of
from qt_jax.diagnosis.simulation import FLOAT, Precision, simulated
from qt_jax.export import graph

OUTLIER = 2.5
"""Ratio of the largest weight to the tail's threshold from which that weight spoils the scale."""

SATURATED = 0.02
"""Share of an activation beyond its grid that quantiles near 1 do not explain."""

DEAD_SHARE = 1.5
"""Ratio of a dead channel's largest weight to that of the living ones from which it spoils their scale."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Hold a float graph, the bits of its layers, and the ranges of their inputs."""

    model: onnx.ModelProto
    precisions: Mapping[str, Precision]
    bounds: InputBounds

    def simulated(self) -> onnx.ModelProto:
        """Return the graph that computes on those grids."""
        return simulated(self.model, self.precisions, self.bounds)


class Remedy(Protocol):
    """Change one layer of a deployment, and say in words what changes."""

    @property
    def layer(self) -> str: ...

    def apply(self, deployment: Deployment) -> Deployment: ...

    @property
    def text(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class ClipKernel:
    """Pull the weights beyond `threshold` back to it, as reverse pruning does in training."""

    layer: str
    threshold: float

    def apply(self, deployment: Deployment) -> Deployment:
        kernel = layers_of(deployment.model)[self.layer].kernel
        clipped = np.clip(graph.constants(deployment.model)[kernel], -self.threshold, self.threshold)
        return dataclasses.replace(deployment, model=replaced(deployment.model, {kernel: clipped}))

    @property
    def text(self) -> str:
        return f"clip its weights to ±{self.threshold:.4g}"


@dataclasses.dataclass(frozen=True)
class RemoveChannels:
    """Set the weights of output channels that never change to zero; their bias keeps their value."""

    layer: str
    channels: tuple[int, ...]
    values: tuple[float, ...]

    def apply(self, deployment: Deployment) -> Deployment:
        layer, values = layers_of(deployment.model)[self.layer], graph.constants(deployment.model)
        kernel = values[layer.kernel].copy()
        np.moveaxis(kernel, layer.axis, 0)[list(self.channels)] = 0
        new = {layer.kernel: kernel}
        if layer.bias:
            bias = values[layer.bias].copy()
            bias[list(self.channels)] = self.values
            new[layer.bias] = bias
        return dataclasses.replace(deployment, model=replaced(deployment.model, new))

    @property
    def text(self) -> str:
        listed = ", ".join(map(str, self.channels[:8])) + (" ..." if len(self.channels) > 8 else "")
        return f"set the weights of channel {listed} to zero: no output changes on these images"


@dataclasses.dataclass(frozen=True)
class SetRange:
    """Let the grid of a layer's input reach from `low` to `high`."""

    layer: str
    low: float
    high: float

    def apply(self, deployment: Deployment) -> Deployment:
        bounds = {**deployment.bounds, self.layer: (self.low, self.high)}
        return dataclasses.replace(deployment, bounds=bounds)

    @property
    def text(self) -> str:
        return f"range its input from {self.low:.4g} to {self.high:.4g}"


@dataclasses.dataclass(frozen=True)
class Use:
    """Give a layer another precision."""

    layer: str
    precision: Precision

    def apply(self, deployment: Deployment) -> Deployment:
        precisions = {**deployment.precisions, self.layer: self.precision}
        return dataclasses.replace(deployment, precisions=precisions)

    @property
    def text(self) -> str:
        if self.precision == FLOAT:
            return "leave it in floating point"
        one = "for each output channel" if self.precision.per_channel else "a tensor"
        weights, inputs, _ = dataclasses.astuple(self.precision)
        return f"weights on {weights} bits, one scale {one}; input on {inputs} bits"


def replaced(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return a copy of `model` in which the constants named in `values` have those values."""
    return graph.rebuild(model, model.graph.node, {**graph.constants(model), **values})


@dataclasses.dataclass(frozen=True)
class Finding:
    """Name what is wrong with a layer.

    Attributes:
      kind: "outlier weight", "dead channel", "saturating activation" or "sensitive layer".
      layer: Name of the layer.
      evidence: What was seen, in words.
      remedy: What can be tried.
    """

    kind: str
    layer: str
    evidence: str
    remedy: Remedy


def findings(
    kernels: Mapping[str, Kernel], activations: Mapping[str, Activation], bounds: InputBounds
) -> list[Finding]:
    """List what looks wrong, layer by layer in the order of the graph.

    Args:
      kernels: From `layers.kernels`.
      activations: From `layers.activations`, with the same bounds.
      bounds: Ends of the grids of layers' inputs.
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
    """Return the dead channels whose weights are larger than those of any living channel.

    Such a channel can be removed if a bias keeps its value, or if its value is 0. There are none in a grouped
    transposed convolution, because its kernel does not hold output channels one by one.
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
