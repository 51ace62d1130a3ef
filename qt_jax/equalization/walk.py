"""Walk through a float graph, label what its nodes write, and collect what absorbs the factors."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from qt_jax.equalization.labels import Ties, full, widened
from qt_jax.export import graph

Values = Mapping[str, np.ndarray]
"""Maps a tensor to its value for one sample."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Describe a constant that absorbs factors: it becomes `old * f[up] / f[down]`.

    Attributes:
      initializer: Name of the constant, float32.
      up, down: Numbers of factors, int32, of the constant's rank and broadcastable to its shape. 0 stands for
        the factor 1.
    """

    initializer: str
    up: np.ndarray
    down: np.ndarray


@dataclasses.dataclass(frozen=True)
class Freedom:
    """Hold the factors of a graph that can be chosen.

    Attributes:
      count: Number of factors. They are numbered from 1; factor 0 is 1.
      scaled: The constants that absorb them.
      channels: Tensor -> the numbers of the factors along its channels, for each output of a convolution,
        matrix product or normalization.
      pinned: Tensor -> why its channels keep their values, in words.
    """

    count: int
    scaled: tuple[Scaled, ...]
    channels: Mapping[str, np.ndarray]
    pinned: Mapping[str, str]


class Walk:
    """Visit the nodes of a graph in order, and label what they write."""

    def __init__(self, model: onnx.ModelProto, values: Values) -> None:
        self.ties = Ties()
        self.opsets = model.opset_import
        self.constants = graph.constants(model)
        self.values = {**values, **self.constants}
        self.known = set(self.constants)
        self.uses = Counter(name for node in model.graph.node for name in graph.names_read(node))
        self.uses.update(entry.name for entry in model.graph.output)
        self.labels: dict[str, np.ndarray] = {}
        self.absorbed: list[tuple[str, np.ndarray, np.ndarray]] = []
        self.channels: dict[str, np.ndarray] = {}
        self.pinned: dict[str, str] = {}

    def visit(self, node: NodeProto, rule: "Rule | None", steered: bool) -> None:
        """Label the outputs of a node, and demand of its inputs what it needs.

        Args:
          node: A node whose inputs have been labelled.
          rule: The rule of its operator; None if there is none.
          steered: Whether its inputs after the first tell what to do with it. They must not depend on data.
        """
        names = [name for name in (*node.input, *node.output) if name]
        standard = node.domain in ("", "ai.onnx") and all(name in self.values for name in names)
        static = not steered or self.known.issuperset(filter(None, node.input[1:]))
        before = len(self.absorbed)
        found = rule(self, node, graph.attributes(node)) if rule and standard and static else None
        if found is None:
            for name in graph.names_read(node):
                self.pin(name, f"{node.op_type} {node.name!r} reads it")
            for _, up, down in self.absorbed[before:]:
                self.ties.pin(up)
                self.ties.pin(down)
            found = {}
        for name in node.output:
            self.labels[name] = found.get(name, self.zeros(name))
        if node.op_type in ("Shape", "Size") or self.known.issuperset(graph.names_read(node)):
            self.known.update(node.output)

    def shape(self, name: str) -> tuple[int, ...]:
        return np.shape(self.values[name]) if name in self.values else ()

    def zeros(self, name: str) -> np.ndarray:
        return np.zeros([1] * len(self.shape(name)), np.int32)

    def is_constant(self, name: str) -> bool:
        """Tell whether a tensor is a constant of float32, which can absorb factors."""
        return name in self.constants and self.constants[name].dtype == np.float32

    def of(self, name: str) -> np.ndarray:
        """Return the labels of what a node reads. A constant gets labels of its own, which it absorbs."""
        if name in self.labels:
            return self.labels[name]
        if not self.is_constant(name):
            return self.zeros(name)
        fresh = self.ties.fresh(self.shape(name))
        self.absorb(name, fresh)
        return fresh

    def along(self, name: str, axes: Sequence[int]) -> np.ndarray:
        """Return the labels of what a node reads, with size 1 along `axes`, where they have to be equal."""
        if not self.is_constant(name) or name in self.labels:
            return self.ties.along(self.of(name), axes)
        sizes = [1 if axis in axes else size for axis, size in enumerate(self.shape(name))]
        fresh = self.ties.fresh(sizes)
        self.absorb(name, fresh)
        return fresh

    def pin(self, name: str, reason: str) -> None:
        """Demand that a tensor keeps its values."""
        labels = self.labels.get(name)
        if labels is not None and labels.any():
            self.ties.pin(labels)
            self.pinned.setdefault(name, reason)

    def absorb(self, name: str, up: np.ndarray, down: np.ndarray | None = None) -> None:
        """Let a constant take factors. One that other nodes read, too, cannot: their labels are pinned."""
        down = np.zeros([1] * up.ndim, np.int32) if down is None else down
        if self.uses[name] > 1:
            self.ties.pin(up)
            self.ties.pin(down)
        else:
            self.absorbed.append((name, up, down))

    def follow(self, name: str, labels: np.ndarray) -> bool:
        """Let an operand that is added to `labels` have the same; a constant absorbs them in its shape."""
        if self.is_constant(name) and name not in self.labels:
            shape = self.shape(name)
            rank = max(labels.ndim, len(shape))
            labels = widened(labels, rank)
            sizes = (1,) * (rank - len(shape)) + shape
            if self.constants[name].any():
                wide = [axis for axis in range(rank) if sizes[axis] == 1]
                labels = self.ties.along(labels, wide)
                self.absorb(name, labels.reshape(labels.shape[rank - len(shape) :]))
            return True
        if name in self.constants:
            return False
        self.ties.tie(self.labels.get(name, self.zeros(name)), labels)
        return True

    def write(self, name: str, channels: np.ndarray, axis: int) -> dict[str, np.ndarray]:
        """Label a layer's output by channels `(c,)` along `axis`."""
        self.channels[name] = channels
        sizes = [1] * len(self.shape(name))
        sizes[axis] = -1
        return {name: channels.reshape(sizes)}

    def read(self, name: str, axis: int) -> np.ndarray:
        """Return the labels `(c,)` of a tensor's channels, and demand that all other axes have the same."""
        labels = self.of(name)
        others = [other for other in range(labels.ndim) if other != axis % labels.ndim]
        channels = self.ties.along(labels, others).ravel()
        return full(channels, (self.shape(name)[axis],))

    def result(self) -> Freedom:
        number = self.ties.resolve()
        scaled = [Scaled(name, number[up], number[down]) for name, up, down in self.absorbed]
        used = {label for entry in scaled for label in np.unique([*entry.up.flat, *entry.down.flat])} - {0}
        renumbered = np.zeros(number.max(initial=0) + 1, np.int32)
        renumbered[sorted(used)] = np.arange(1, len(used) + 1)
        return Freedom(
            count=len(used),
            scaled=tuple(
                Scaled(entry.initializer, renumbered[entry.up], renumbered[entry.down])
                for entry in scaled
                if entry.up.any() or entry.down.any()
            ),
            channels={name: renumbered[number[labels]] for name, labels in self.channels.items()},
            pinned=dict(self.pinned),
        )


Rule = Callable[[Walk, NodeProto, dict[str, Any]], dict[str, np.ndarray] | None]
"""Labels the outputs of a node. None stands for: all that it reads and writes keeps its values."""
