"""Tensors known as transposes of others, while a pass walks through a graph."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from qt_jax.export import graph

TO_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
TO_CHANNELS_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}


def as_graph(array: Any, layout: str) -> np.ndarray:
    """An array as JAX has it, as a graph of that layout has it: rank 4 channels-first, if "nchw"."""
    array = np.asarray(array)
    moved = layout == "nchw" and array.ndim == 4
    return np.ascontiguousarray(array.transpose(TO_CHANNELS_FIRST[4])) if moved else array


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor equal to Transpose(source, permutation): its axis `i` is the source's `permutation[i]`."""

    source: str
    permutation: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation that leads from the view to its source."""
        return tuple(int(axis) for axis in np.argsort(self.permutation))


@dataclasses.dataclass
class Views:
    """What is known at one point of the walk.

    Attributes:
      values: constants by name; new ones are added.
      shapes: of the tensors of the graph, with a concrete batch.
      views: tensors that nothing wrote yet.
      renamed: tensors that are others under a second name.
      written: views that were written out after all.
    """

    values: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    views: dict[str, View] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    written: set[str] = dataclasses.field(default_factory=set)

    def constant(self, base: str, value: Sequence[int] | np.ndarray) -> str:
        """The name of a new constant."""
        name = graph.derived(base, f"layout{len(self.values)}")
        self.values[name] = np.asarray(value)
        return name

    def trivial(self, view: View) -> bool:
        """Whether the view moves axes of size 1 only, so that a Reshape does what its Transpose would."""
        shape = self.shapes.get(view.source)
        if shape is None:
            return False
        moved = [axis for axis in view.permutation if shape[axis] != 1]
        return moved == sorted(moved)

    def written_out(self, name: str) -> list[NodeProto]:
        """The node that writes the tensor `name`, if it is a view that was not written before."""
        view = self.views.get(name)
        if view is None or name in self.written:
            return []
        self.written.add(name)
        if self.trivial(view):
            shape = [self.shapes[view.source][axis] for axis in view.permutation]
            target = self.constant("shape", np.array(shape, np.int64))
            return [helper.make_node("Reshape", [view.source, target], [name])]
        return [helper.make_node("Transpose", [view.source], [name], perm=view.permutation)]

    def constant_for_source(self, name: str, view: View) -> str:
        """The constant `name`, which broadcasts against the view, for its source."""
        return name if self.values[name].size == 1 else self.transposed(name, view)

    def transposed(self, name: str, view: View) -> str:
        """The constant `name`, in the layout of the view, in that of its source."""
        value = self.values[name]
        full = (1,) * (len(view.permutation) - value.ndim) + value.shape
        return self.constant(name, value.reshape(full).transpose(view.inverse))
