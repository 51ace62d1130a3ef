"""Write what moves and repeats elements as ONNX nodes: reshapes, slices, pads and joins."""

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


@emits("unstack")
def _unstack(emitter: Emitter, value: Expression) -> list[str]:
    """Cut each entry of an axis out, as `q, k, v = x` does from JAX 0.11 on."""
    source, axis = value.operands[0], value.params["axis"]
    name, parts = emitter.name(source), []
    for number in range(source.shape[axis]):
        ends = [(number, number + 1, 1) if at == axis else (0, n, 1) for at, n in enumerate(source.shape)]
        parts.append(emitter.reshaped(sliced(emitter, name, source.shape, ends), value.shape))
    return parts


def _spread(emitter: Emitter, source: Expression, inner: Sequence[int], filling: str) -> str:
    """Put numbers between the elements along each axis: they are padded on an axis of their own."""
    name = emitter.name(source)
    if not any(inner):
        return name
    name = emitter.reshaped(name, [size for n in source.shape for size in (n, 1)])
    pads = [*[0] * (2 * source.ndim), *[size for count in inner for size in (0, count)]]
    name = emitter.add("Pad", [name, emitter.constant(pads), filling])
    joined = [n * (1 + count) for n, count in zip(source.shape, inner, strict=True)]
    ends = [(0, max(0, n - count), 1) for n, count in zip(joined, inner, strict=True)]
    return sliced(emitter, emitter.reshaped(name, joined), joined, ends)


@emits("pad")
def _pad(emitter: Emitter, value: Expression) -> str:
    source, filling = value.operands
    config, number = value.params["padding_config"], filling.number()
    if number is None:
        raise InvalidInput(
            f"the forward pads with a number that it computes{place(value.path)}: pad with a fixed number"
        )
    name = _spread(emitter, source, [inner for _, _, inner in config], emitter.constant(number, value.dtype))
    spread = [max(0, n + (n - 1) * inner) for n, (_, _, inner) in zip(source.shape, config, strict=True)]
    cut = [
        (max(-low, 0), size - max(-high, 0), 1) for (low, high, _), size in zip(config, spread, strict=True)
    ]
    name = sliced(emitter, name, spread, cut)
    pads = [max(low, 0) for low, _, _ in config] + [max(high, 0) for _, high, _ in config]
    if not any(pads):
        return name
    return emitter.add("Pad", [name, emitter.constant(pads), emitter.constant(number, value.dtype)])


@emits("resize")
def _resize(emitter: Emitter, value: Expression) -> str:
    sizes = emitter.constant(list(value.shape))
    inputs = [emitter.name(value.operands[0]), "", "", sizes]
    return emitter.add("Resize", inputs, mode=value.params["mode"])
