"""Write gathers, which take entries of an array by indices, as Gather, GatherElements or GatherND.

A gather of JAX takes entries along some axes of its data, one column of the indices for each. It goes
through other axes in step with axes of the indices, as `jnp.take_along_axis` and `jax.vmap` do, and
`x[jnp.arange(n), i]` in effect. The rest of the data is kept. Numbers beyond the end are clamped where JAX
clamps them. Where JAX fills up, or is promised that there are none, they are an error of the graph's runtime,
as in an embedding.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto

from qt_jax.errors import InvalidInput
from qt_jax.export.emission import Emitter, emits
from qt_jax.export.movements import sliced
from qt_jax.export.program import Expression, constant, place

WRAPPERS = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"})
"""Primitives that move indices and keep their numbers."""

Label = tuple[str, int]
"""What an axis of a result is: ("data", axis of the data) or ("index", axis of the indices)."""


@dataclasses.dataclass(frozen=True)
class _Column:
    """Hold the indices along one axis of the data.

    Attributes:
      index: The indices, of shape `lead` or (*lead, 1).
      lead: Shape of the indices without the axis of their columns.
      size: Size of the data's axis.
      width: Number of neighbours that are taken from each index on.
      mode: What JAX does with indices beyond the end.
    """

    index: Expression
    lead: tuple[int, ...]
    size: int
    width: int
    mode: str

    @property
    def clips(self) -> bool:
        """Tell whether JAX moves indices beyond the end inside."""
        return self.mode.endswith("CLIP")

    def known(self) -> np.ndarray | None:
        """Return known indices, moved inside; None for those that depend on an input."""
        if self.index.known is None:
            return None
        return np.clip(np.asarray(self.index.known, np.int64).reshape(self.lead), 0, self.size - self.width)

    def number(self) -> int | None:
        """Return the one number that known indices repeat."""
        known = self.known()
        return None if known is None or np.any(known != known.flat[0]) else int(known.flat[0])

    def in_step(self) -> int | None:
        """Return the axis of the indices that counts the data's, as `jnp.arange` does; None without one."""
        known = self.known()
        if known is None or self.width != 1:
            return None
        for axis, size in enumerate(self.lead):
            along = np.arange(size).reshape([-1 if other == axis else 1 for other in range(len(self.lead))])
            if size == self.size and np.array_equal(known, np.broadcast_to(along, self.lead)):
                return axis
        return None

    def inside(self) -> bool:
        """Tell whether nothing lies outside that JAX would fill up, save what is an error."""
        if not self.mode.endswith("FILL_OR_DROP"):
            return True
        if self.index.known is not None:
            return bool(np.all((self.index.known >= 0) & (self.index.known <= self.size - self.width)))
        return _before_counting(self.index, self.size) is not None

    def name(self, emitter: Emitter) -> str:
        """Return the name of the indices in the shape `lead`, or (*lead, width) if the width is not 1.

        Negative ones count from the end where JAX counts them so, as in ONNX.
        """
        known = self.known()
        if known is not None:
            return emitter.constant(known if self.width == 1 else known[..., None] + np.arange(self.width))
        index = self.index
        if index.primitive in ("broadcast_in_dim", "reshape") and index.operands[0].shape == self.lead:
            index = index.operands[0]
        if index.primitive == "select_n" and self.width == 1 and not self.clips:
            index = _before_counting(index, self.size) or index
        name, dtype = emitter.name(index), np.dtype(index.dtype)
        if dtype not in (np.int32, np.int64):  # ONNX takes no other
            name, dtype = emitter.add("Cast", [name], to=TensorProto.INT64), np.dtype(np.int64)
        if index.shape != self.lead:
            name = emitter.reshaped(name, self.lead)
        if self.clips:
            low, high = (emitter.constant(bound, dtype) for bound in (0, self.size - self.width))
            name = emitter.add("Min", [emitter.add("Max", [name, low]), high])
        if self.width == 1:
            return name
        steps = emitter.constant(np.arange(self.width), dtype)
        return emitter.add("Add", [emitter.reshaped(name, (*self.lead, 1)), steps])


def _before_counting(index: Expression, size: int) -> Expression | None:
    """Return the indices of which JAX counts negative ones from the end, None where it does not.

    They may have another shape than `index`.
    """
    while index.primitive in WRAPPERS:
        index = index.operands[0]
    if index.primitive != "select_n":
        return None
    test, plain, wrapped = index.operands
    below = test.primitive == "lt" and test.operands[0] is plain and test.operands[1].number() == 0
    from_end = wrapped.primitive == "add" and wrapped.operands[0] is plain
    return plain if below and from_end and wrapped.operands[1].number() == size else None


@emits("gather")
def _gather(emitter: Emitter, value: Expression) -> str:
    """Cut what has a fixed place, take entries along the other axes, and bring the axes in order."""
    columns = _columns(emitter, value)
    if not all(column.inside() for column in columns.values()):
        raise InvalidInput(
            f"the forward takes entries by indices that may lie outside{place(value.path)}, and fills these "
            "up, which Gather does not: clip the indices, and choose with jnp.where"
        )
    data, widths = value.operands[0], value.params["slice_sizes"]
    steps, starts = _planned(value, columns)
    cut = [
        (0, size, 1) if axis in columns or axis in steps else (start, start + int(width), 1)
        for axis, (size, start, width) in enumerate(zip(data.shape, starts, widths, strict=True))
    ]
    source = sliced(emitter, emitter.name(data), data.shape, cut)
    taken = _taken_flat if _is_flat(columns, steps) else _taken_in_step
    found, made = taken(emitter, source, [end - start for start, end, _ in cut], columns, steps)
    wanted = _wanted(value)
    order = sorted(range(len(made)), key=lambda at: wanted.index(made[at]) if made[at] in wanted else -1)
    found = emitter.moved(found, order)
    return found if [made[at] for at in order] == wanted else emitter.reshaped(found, value.shape)


def _columns(emitter: Emitter, value: Expression) -> dict[int, _Column]:
    """Return the indices along each indexed axis of the data."""
    data, indices = value.operands
    found = []
    for part in indices.operands if indices.primitive == "concatenate" else (indices,):
        if part.shape[-1] == 1:
            found.append(part)
        elif part.known is not None:
            found += [constant(part.known[..., at]) for at in range(part.shape[-1])]
        else:
            raise InvalidInput(
                f"the forward takes entries by an array that holds the places along several axes"
                f"{place(value.path)}: index with one array for each axis, x[:, rows, columns]"
            )
    axes = [int(axis) for axis in value.params["dimension_numbers"].start_index_map]
    widths, mode = value.params["slice_sizes"], str(value.params["mode"])
    return {
        axis: _Column(index, indices.shape[:-1], data.shape[axis], int(widths[axis]), mode)
        for axis, index in zip(axes, found, strict=True)
    }


def _planned(value: Expression, columns: dict[int, _Column]) -> tuple[dict[int, int], list[int]]:
    """Take out of the columns those that need no indices.

    Returns:
      The axes of the data that are gone through in step, each with its axis of the indices, and the place at
      which each other axis is cut.
    """
    data, numbers = value.operands[0], value.params["dimension_numbers"]
    steps = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    starts = [0] * data.ndim
    lead = value.operands[1].shape[:-1]
    for axis, column in [*columns.items()]:
        free = [size for t, size in enumerate(lead) if t not in steps.values()]
        if column.number() is not None and (len(columns) > 1 or all(size == 1 for size in free)):
            starts[axis] = columns.pop(axis).number() or 0
    batched = 0 in columns and columns[0].in_step() == 0
    if steps or batched or len(columns) < 2 or any(column.known() is None for column in columns.values()):
        for axis, column in [*columns.items()]:
            t = column.in_step()
            if t is not None and t not in steps.values():
                steps[axis] = t
                del columns[axis]
    return steps, starts


def _wanted(value: Expression) -> list[Label]:
    """Return what each axis of a gather's result is."""
    numbers, lead = value.params["dimension_numbers"], value.operands[1].ndim - 1
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offsets = iter([("data", axis) for axis in range(value.operands[0].ndim) if axis not in dropped])
    places = iter([("index", axis) for axis in range(lead)])
    return [next(offsets if axis in numbers.offset_dims else places) for axis in range(value.ndim)]


def _is_flat(columns: Mapping[int, _Column], steps: Mapping[int, int]) -> bool:
    """Tell whether Gather does it: along one axis, or at known places of neighbouring axes, joined to one."""
    axes = sorted(columns)
    known = all(column.index.known is not None and column.width == 1 for column in columns.values())
    joined = known and bool(axes) and axes == [*range(axes[0], axes[-1] + 1)]
    return not steps and (len(axes) == 1 or joined)


def _taken_flat(
    emitter: Emitter, source: str, shape: list[int], columns: Mapping[int, _Column], _: Mapping[int, int]
) -> tuple[str, list[Label]]:
    """Take entries of a tensor of shape `shape` with Gather; return the result, and what its axes are."""
    first, last = min(columns), max(columns)
    column = columns[first]
    if first == last:
        index = column.name(emitter)
    else:
        places = [np.asarray(columns[axis].known()) for axis in range(first, last + 1)]
        index = emitter.constant(np.ravel_multi_index(places, shape[first : last + 1]))
        joined = math.prod(shape[first : last + 1])
        source = emitter.reshaped(source, [*shape[:first], joined, *shape[last + 1 :]])
    made = [("data", axis) for axis in range(first)]
    made += [("index", axis) for axis in range(len(column.lead))]
    made += [("data", first)] if column.width > 1 else []
    made += [("data", axis) for axis in range(last + 1, len(shape))]
    return emitter.add("Gather", [source, index], axis=first), made


def _taken_in_step(
    emitter: Emitter,
    source: str,
    shape: list[int],
    columns: Mapping[int, _Column],
    steps: Mapping[int, int],
) -> tuple[str, list[Label]]:
    """Take entries, as `_taken_flat` does, where axes of the tensor go in step with axes of the indices."""
    if not columns:
        return source, [("index", steps[at]) if at in steps else ("data", at) for at in range(len(shape))]
    kept = [axis for axis in range(len(shape)) if axis not in columns and axis not in steps]
    axis, column = next(iter(columns.items()))
    free: list[Label] = [("index", t) for t in range(len(column.lead)) if t not in steps.values()]
    free += [("data", axis)] if column.width > 1 else []
    if kept or len(columns) > 1 or len(free) > 1:
        return _by_tuples(emitter, source, columns, steps, free, kept)
    # what GatherElements takes has the axes of the data, of which one is free
    made = [
        ("index", steps[at]) if at in steps else (free or [("data", axis)])[0] for at in range(len(shape))
    ]
    index = emitter.moved(
        column.name(emitter), _places(made if free else made[:axis] + made[axis + 1 :], column)
    )
    if not free:
        index = emitter.reshaped(index, [1 if at == axis else size for at, size in enumerate(shape)])
    return emitter.add("GatherElements", [source, index], axis=axis), made


def _by_tuples(
    emitter: Emitter,
    source: str,
    columns: Mapping[int, _Column],
    steps: Mapping[int, int],
    free: list[Label],
    kept: list[int],
) -> tuple[str, list[Label]]:
    """Take parts of a tensor with GatherND; return the result, and what its axes are.

    Args:
      emitter: Collects the nodes.
      source: Name of the tensor.
      columns: Indices along each indexed axis.
      steps: Axes that are gone through in step, each with its axis of the indices.
      free: What the other axes of the indices are.
      kept: Axes of which everything is taken.
    """
    if len(columns) > 1 and any(column.width > 1 for column in columns.values()):
        raise InvalidInput(
            "the forward cuts out a block whose place depends on its inputs along several axes: cut along "
            "one axis after the other"
        )
    batch = sorted(steps)
    made: list[Label] = [*(("index", steps[axis]) for axis in batch), *free]
    tuples = []
    for axis in sorted(columns):
        column = columns[axis]
        index = emitter.moved(column.name(emitter), _places(made, column))
        if column.known() is None:
            index = emitter.add("Cast", [index], to=TensorProto.INT64)
        sizes = [column.lead[at] if kind == "index" else column.width for kind, at in made]
        tuples.append(emitter.reshaped(index, [*sizes, 1]))
    indices = emitter.add("Concat", tuples, axis=len(made)) if len(tuples) > 1 else tuples[0]
    source = emitter.moved(source, [*batch, *sorted(columns), *kept])
    found = emitter.add("GatherND", [source, indices], batch_dims=len(batch))
    return found, [*made, *(("data", axis) for axis in kept)]


def _places(made: Sequence[Label], column: _Column) -> list[int]:
    """Return the axis of a column's indices for each axis of a result; that of its neighbours is the last."""
    return [at if kind == "index" else len(column.lead) for kind, at in made]
