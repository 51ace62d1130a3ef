"""Write what moves, repeats and selects elements as ONNX nodes: reshapes, slices, pads, joins and gathers."""

import math
from collections.abc import Sequence

import numpy as np

from qt_jax.errors import InvalidInput
from qt_jax.export.emission import Emitter, emits
from qt_jax.export.program import Expression, place


@emits("reshape", "squeeze", "expand_dims")
def _reshape(emitter: Emitter, value: Expression) -> str:
    return emitter.reshaped(emitter.name(value.operands[0]), value.shape)


@emits("broadcast_in_dim")
def _broadcast(emitter: Emitter, value: Expression) -> str:
    source = value.operands[0]
    shape = [1] * value.ndim
    for axis, size in zip(value.params["broadcast_dimensions"], source.shape, strict=True):
        shape[axis] = size
    name = emitter.name(source)
    if tuple(shape) != source.shape:
        name = emitter.reshaped(name, shape)
    if tuple(shape) == value.shape:
        return name
    return emitter.add("Expand", [name, emitter.constant(list(value.shape))])


@emits("tile")
def _tile(emitter: Emitter, value: Expression) -> str:
    """Repeat a tensor along new axes, which are then joined with the old ones."""
    source, reps = value.operands[0], value.params["reps"]
    pairs = [(rep, size) for rep, size in zip(reps, source.shape, strict=True)]
    split = [size for rep, size in pairs for size in ((1, size) if rep > 1 and size > 1 else (size,))]
    whole = [
        size
        for rep, size in pairs
        for size in ((rep, size) if rep > 1 and size > 1 else (rep * size if size == 1 else size,))
    ]
    name = emitter.name(source)
    if tuple(split) != source.shape:
        name = emitter.reshaped(name, split)
    name = emitter.add("Expand", [name, emitter.constant(whole)])
    return name if tuple(whole) == value.shape else emitter.reshaped(name, value.shape)


@emits("transpose")
def _transpose(emitter: Emitter, value: Expression) -> str:
    return emitter.add(
        "Transpose", [emitter.name(value.operands[0])], perm=[int(x) for x in value.params["permutation"]]
    )


@emits("concatenate")
def _concatenate(emitter: Emitter, value: Expression) -> str:
    parts = [x for x in value.operands if math.prod(x.shape)]
    if len(parts) == 1:
        return emitter.name(parts[0])
    return emitter.add("Concat", [emitter.name(x) for x in parts], axis=value.params["dimension"])


@emits("stack")
def _stack(emitter: Emitter, value: Expression) -> str:
    axis = value.params["axis"]
    parts = []
    for x in value.operands:
        shape = (*x.shape[:axis], 1, *x.shape[axis:])
        if x.known is None:
            parts.append(emitter.reshaped(emitter.name(x), shape))
        else:
            parts.append(emitter.held(x, x.known.reshape(shape)))
    return emitter.add("Concat", parts, axis=axis)


def sliced(emitter: Emitter, source: str, shape: Sequence[int], ends: Sequence[tuple[int, int, int]]) -> str:
    """Add a Slice of the axes that (start, end, step) cuts."""
    cut = [
        axis for axis, (size, end) in enumerate(zip(shape, ends, strict=True)) if tuple(end) != (0, size, 1)
    ]
    if not cut:
        return source
    columns = [[ends[axis][index] for axis in cut] for index in range(3)]
    inputs = [emitter.constant(column) for column in (columns[0], columns[1], cut, columns[2])]
    return emitter.add("Slice", [source, *inputs])


@emits("slice")
def _slice(emitter: Emitter, value: Expression) -> str:
    source, params = value.operands[0], value.params
    steps = params["strides"] or (1,) * source.ndim
    ends = list(zip(params["start_indices"], params["limit_indices"], steps, strict=True))
    return sliced(emitter, emitter.name(source), source.shape, ends)


@emits("dynamic_slice")
def _dynamic_slice(emitter: Emitter, value: Expression) -> str:
    source, *starts = value.operands
    if any(x.known is None for x in starts):
        raise InvalidInput(
            f"the forward cuts out a part whose place depends on its inputs{place(value.path)} "
            "(lax.dynamic_slice): cut at a fixed place, or take entries with jnp.take"
        )
    found = [
        int(np.clip(x.known, 0, n - m)) for x, n, m in zip(starts, source.shape, value.shape, strict=True)
    ]
    ends = [(start, start + size, 1) for start, size in zip(found, value.shape, strict=True)]
    return sliced(emitter, emitter.name(source), source.shape, ends)


@emits("rev")
def _rev(emitter: Emitter, value: Expression) -> str:
    axes = value.params["dimensions"]
    ends = [(-1, -size - 1, -1) if axis in axes else (0, size, 1) for axis, size in enumerate(value.shape)]
    return sliced(emitter, emitter.name(value.operands[0]), value.shape, ends)


@emits("split")
def _split(emitter: Emitter, value: Expression) -> list[str]:
    sizes, axis = value.params["sizes"], value.params["axis"]
    inputs = [emitter.name(value.operands[0]), emitter.constant(list(sizes))]
    made = emitter.add("Split", inputs, outputs=len(sizes), axis=axis)
    return [made] if isinstance(made, str) else made


@emits("pad")
def _pad(emitter: Emitter, value: Expression) -> str:
    source, filling = value.operands
    config, number = value.params["padding_config"], filling.number()
    if number is None or any(inner for _, _, inner in config):
        raise InvalidInput(
            f"the forward pads between elements, or with a number that it computes{place(value.path)}: pad "
            "the ends, with a number"
        )
    cut = [
        (max(-low, 0), size - max(-high, 0), 1)
        for (low, high, _), size in zip(config, source.shape, strict=True)
    ]
    name = sliced(emitter, emitter.name(source), source.shape, cut)
    pads = [max(low, 0) for low, _, _ in config] + [max(high, 0) for _, high, _ in config]
    if not any(pads):
        return name
    return emitter.add("Pad", [name, emitter.constant(pads), emitter.constant(number, value.dtype)])


@emits("resize")
def _resize(emitter: Emitter, value: Expression) -> str:
    sizes = emitter.constant(list(value.shape))
    inputs = [emitter.name(value.operands[0]), "", "", sizes]
    return emitter.add("Resize", inputs, mode=value.params["mode"])


@emits("gather")
def _gather(emitter: Emitter, value: Expression) -> str:
    """Take entries along one axis; the others are kept whole."""
    data, indices = value.operands
    numbers, sizes = value.params["dimension_numbers"], value.params["slice_sizes"]
    collapsed = tuple(numbers.collapsed_slice_dims)
    whole = all(
        size == full
        for axis, (size, full) in enumerate(zip(sizes, data.shape, strict=True))
        if axis not in collapsed
    )
    if (
        len(collapsed) != 1
        or tuple(numbers.start_index_map) != collapsed
        or not whole
        or numbers.operand_batching_dims
    ):
        raise InvalidInput(
            f"the forward takes entries along several axes at once{place(value.path)} (a gather), which "
            "vendors' compilers do not take: index one axis at a time, with jnp.take or x[:, index]"
        )
    (axis,) = collapsed
    mode, size = str(value.params["mode"]), data.shape[axis]
    counted = _counted(indices, size)
    if mode.endswith("FILL_OR_DROP") and counted is None:
        raise InvalidInput(
            f"the forward takes entries by indices that may lie outside{place(value.path)}, and fills these "
            "up, which Gather does not: clip the indices, and choose with jnp.where"
        )
    if counted is None or mode.endswith("CLIP"):
        counted = indices
    name = _index(emitter, counted, indices, size, mode)
    shape = indices.shape[:-1]
    found = emitter.add("Gather", [emitter.name(data), name], axis=axis)
    made = [*(other for other in range(data.ndim) if other < axis)]
    order = [other for other in range(value.ndim) if other not in numbers.offset_dims]
    offsets = list(numbers.offset_dims)
    now = [*offsets[: len(made)], *order, *offsets[len(made) :]]  # axis of the result at each axis of `found`
    assert len(shape) == len(order)
    return emitter.moved(found, np.argsort(now))


def _index(emitter: Emitter, index: Expression, indices: Expression, size: int, mode: str) -> str:
    """Return the name of the indices of a Gather, without their last axis of size 1.

    Args:
      emitter: Collects the nodes.
      index: The indices, of which negative ones count from the end where JAX counts them so.
      indices: The indices of JAX's gather.
      size: Size of the axis.
      mode: What JAX does with indices beyond the end.
    """
    if index.known is not None:
        return emitter.constant(np.clip(np.asarray(index.known).reshape(indices.shape[:-1]), 0, size - 1))
    name = emitter.name(index)
    if index.shape != indices.shape[:-1]:
        name = emitter.reshaped(name, indices.shape[:-1])
    if mode.endswith("CLIP"):
        bounds = [emitter.constant(bound, index.dtype) for bound in (0, size - 1)]
        name = emitter.add("Min", [emitter.add("Max", [name, bounds[0]]), bounds[1]])
    return name


def _counted(indices: Expression, size: int) -> Expression | None:
    """Return the indices before negative ones were counted from the end, as Gather counts them too.

    None where that was not done, and they are not known to lie inside.
    """
    if indices.known is not None:
        inside = np.all((indices.known >= 0) & (indices.known < size))
        return indices if inside else None
    chosen = indices
    if chosen.primitive in ("broadcast_in_dim", "reshape") and chosen.shape[:-1] == chosen.operands[0].shape:
        chosen = chosen.operands[0]
    if chosen.primitive != "select_n":
        return None
    test, plain, wrapped = chosen.operands
    below = test.primitive == "lt" and test.operands[0] is plain and test.operands[1].number() == 0
    from_end = wrapped.primitive == "add" and wrapped.operands[0] is plain
    return plain if below and from_end and wrapped.operands[1].number() == size else None
