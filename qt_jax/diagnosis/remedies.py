"""What can be done to a network before it is quantized: each remedy maps one deployment to another."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx

from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.simulation import FLOAT, Bounds, Precision, simulated
from qt_jax.export import graph


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A float graph, the bits of its layers, and the ranges of their inputs."""

    model: onnx.ModelProto
    precisions: Mapping[str, Precision]
    bounds: Bounds

    def simulated(self) -> onnx.ModelProto:
        """The graph as it computes on those grids."""
        return simulated(self.model, self.precisions, self.bounds)


class Remedy(Protocol):
    """One change of a layer, and what to call it."""

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
    """Set the weights of output channels that never change to zero; their bias keeps what they hand on."""

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
    """A copy of `model` in which the constants named in `values` have those."""
    return graph.rebuild(model, model.graph.node, {**graph.constants(model), **values})
