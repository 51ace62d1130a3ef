"""Write convolutions, matrix products, pools and norms as ONNX nodes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qt_jax.errors import InvalidInput
from qt_jax.export.emission import Emitter, emits
from qt_jax.export.graph import common_leaf
from qt_jax.export.movements import sliced
from qt_jax.export.program import Expression, constant, place


@emits("conv_general_dilated")
def _convolution(emitter: Emitter, value: Expression) -> str:
    """Write Conv, or ConvTranspose where the input is dilated.

    A convolution of an input with stride - 1 zeros between its elements is a transposed convolution by the
    mirrored kernel, with pads of dilation * (size - 1) minus those of the convolution.
    """
    image, kernel = value.operands
    params, numbers = value.params, value.params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise InvalidInput(f"the convolution{place(value.path)} groups the batch: group the features instead")
    x = emitter.transposed(image, numbers.lhs_spec)
    groups, pads = params["feature_group_count"], params["padding"]
    stretched = any(size != 1 for size in params["lhs_dilation"])
    width = [kernel.shape[axis] for axis in numbers.rhs_spec[2:]]
    stated = {"dilations": [*params["rhs_dilation"]], "group": groups}
    if stretched:
        if kernel.known is None or any(size != 1 for size in params["window_strides"]):
            raise InvalidInput(
                f"the convolution{place(value.path)} dilates its input, and moves in steps or has a kernel "
                "computed from the images, which ONNX does not express: use nn.Conv or nn.ConvTranspose"
            )
        plain = np.transpose(kernel.known, numbers.rhs_spec)
        spatial = tuple(range(2, plain.ndim))
        grouped = np.flip(plain, spatial).reshape(groups, -1, *plain.shape[1:]).swapaxes(1, 2)
        weight = emitter.held(kernel, np.ascontiguousarray(grouped.reshape(-1, *grouped.shape[2:])))
        reach = [d * (k - 1) for d, k in zip(params["rhs_dilation"], width, strict=True)]
        low = [r - p[0] for r, p in zip(reach, pads, strict=True)]
        high = [r - p[1] for r, p in zip(reach, pads, strict=True)]
        stated |= {"strides": [*params["lhs_dilation"]], "pads": low + high}
        made = emitter.add("ConvTranspose", [x, weight], **stated)
    else:
        weight = emitter.transposed(kernel, numbers.rhs_spec)
        low, high = ([p[end] for p in pads] for end in (0, 1))
        if min(low + high) < 0:
            x = _cropped(emitter, x, image, numbers.lhs_spec, pads)
            low, high = ([max(p, 0) for p in ends] for ends in (low, high))
        stated |= {"strides": [*params["window_strides"]], "pads": low + high}
        made = emitter.add("Conv", [x, weight], kernel_shape=width, **stated)
    return emitter.moved(made, np.argsort(numbers.out_spec))


@emits("taps")
def _depthwise(emitter: Emitter, value: Expression) -> str:
    """Write a sum of shifted products as Conv with a group for each channel."""
    terms, rank = value.params["terms"], value.ndim
    x, pads = _unpadded(value.operands[0])
    whole_shape = value.operands[0].shape
    starts = np.array([part.params["start_indices"][1:-1] for _, part, _ in terms])
    first = starts.min(0)
    offsets = starts - first
    dilations = [int(np.gcd.reduce(column)) or 1 for column in offsets.T]
    grid = offsets // dilations
    width = (grid.max(0) + 1).tolist()
    channels = value.shape[-1]
    kernel = np.zeros((*width, channels), np.float32)
    for place_, (*_, tap) in zip(grid.tolist(), terms, strict=True):
        kernel[tuple(place_)] = np.ravel(tap.known)
    steps = list((terms[0][1].params["strides"] or (1,) * rank)[1:-1])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, width, strict=True)]
    ends = [
        int(low) + step * (count - 1) + far
        for low, step, count, far in zip(first, steps, value.shape[1:-1], reach, strict=True)
    ]
    whole = [
        low == 0 and (size - far) // step + 1 == count
        for low, size, far, step, count in zip(
            first, whole_shape[1:-1], reach, steps, value.shape[1:-1], strict=True
        )
    ]
    source = emitter.name(x)
    if not all(whole):
        x, pads = value.operands[0], [(0, 0)] * rank
        spans = [(int(low), end, 1) for low, end in zip(first, ends, strict=True)]
        cut = [(0, x.shape[0], 1), *spans, (0, channels, 1)]
        source = sliced(emitter, emitter.name(x), x.shape, cut)
    order = (0, rank - 1, *range(1, rank - 1))
    origin = common_leaf(tap.origin for *_, tap in terms)
    whole_of = {id(tap.part): tap.part for *_, tap in terms}
    (leaf,) = whole_of.values() if len(whole_of) == 1 else (None,)
    moved = leaf is not None and np.array_equal(np.sort(leaf.known, axis=None), np.sort(kernel, axis=None))
    held = constant(kernel, origin, value.path, moved)
    weight = emitter.held(held, np.ascontiguousarray(np.moveaxis(kernel, -1, 0)[:, None]))
    stated = {"kernel_shape": width, "strides": steps, "dilations": dilations, "group": channels}
    stated["pads"] = [pads[axis][end] for end in (0, 1) for axis in range(1, rank - 1)]
    made = emitter.add("Conv", [emitter.moved(source, order), weight], **stated)
    return emitter.moved(made, np.argsort(order))


def _unpadded(x: Expression) -> tuple[Expression, list[tuple[int, int]]]:
    """Return what a value pads with zeros between its first and last axis, and the pads of each axis."""
    none = [(0, 0)] * x.ndim
    if x.primitive != "pad" or x.operands[1].number() != 0.0:
        return x, none
    config = x.params["padding_config"]
    pads = [(low, high) for low, high, _ in config]
    fits = all(low >= 0 and high >= 0 and not inner for low, high, inner in config)
    return (x.operands[0], pads) if fits and pads[0] == pads[-1] == (0, 0) else (x, none)


def _cropped(
    emitter: Emitter, x: str, image: Expression, spec: Sequence[int], pads: Sequence[tuple[int, int]]
) -> str:
    """Cut off what negative pads leave out."""
    starts = [max(-low, 0) for low, _ in pads]
    ends = [image.shape[axis] - max(-high, 0) for axis, (_, high) in zip(spec[2:], pads, strict=True)]
    axes = list(range(2, len(spec)))
    return emitter.add("Slice", [x, *map(emitter.constant, (starts, ends, axes, [1] * len(axes)))])


@emits("dot_general", "dense")
def _product(emitter: Emitter, value: Expression) -> str:
    """Write MatMul, or Gemm for rows and a known kernel, with the Transposes and Reshapes that it implies."""
    left, right, *bias = value.operands
    if not np.issubdtype(value.dtype, np.floating):
        raise InvalidInput(
            f"the forward multiplies matrices of whole numbers{place(value.path)}: use float32"
        )
    (contracted_left, contracted_right), (batch_left, batch_right) = value.params["dimension_numbers"]
    if right.known is not None and not batch_left:
        return _by_kernel(emitter, bias, left, right, contracted_left, contracted_right, swapped=False)
    if left.known is not None and not batch_left:
        return _by_kernel(emitter, [], right, left, contracted_right, contracted_left, swapped=True)
    sides = [
        _Side(left, tuple(batch_left), tuple(contracted_left)),
        _Side(right, tuple(batch_right), tuple(contracted_right)),
    ]
    known = next((place for place, side in enumerate(sides) if side.value.known is not None), None)
    if known is not None and sides[1 - known].free[:1] == (0,) and len(sides[1 - known].free) > 1:
        return _by_kernels(emitter, sides[1 - known], sides[known], swapped=known == 0)
    straight = _cost(sides[0].rows) + _cost(sides[1].columns)
    exchanged = _cost(sides[1].rows) + _cost(sides[0].columns) + 0.5
    batch = tuple(left.shape[axis] for axis in batch_left)
    count = len(batch)
    if exchanged < straight:
        made = _matmul(emitter, sides[1], sides[0], batch)
        kept = [len(sides[1].free), len(sides[0].free)]
        axes = list(range(count + sum(kept)))
        order = axes[:count] + axes[count + kept[0] :] + axes[count : count + kept[0]]
        shape = (*batch, *sides[1].sizes, *sides[0].sizes)
        return emitter.moved(_split(emitter, made, shape, sides), order)
    made = _matmul(emitter, sides[0], sides[1], batch)
    return _split(emitter, made, value.shape, sides)


class _Side:
    """Hold one operand of a product of batches."""

    def __init__(self, value: Expression, batch: tuple[int, ...], contracted: tuple[int, ...]):
        self.value, self.batch, self.contracted = value, batch, contracted
        self.free = tuple(axis for axis in range(value.ndim) if axis not in (*batch, *contracted))
        self.rows = (*batch, *self.free, *contracted)
        self.columns = (*batch, *contracted, *self.free)
        self.sizes = tuple(value.shape[axis] for axis in self.free)
        self.terms = math.prod(value.shape[axis] for axis in contracted)


def _cost(order: Sequence[int]) -> int:
    return int(tuple(order) != tuple(range(len(order))))


def _matmul(emitter: Emitter, left: _Side, right: _Side, batch: tuple[int, ...]) -> str:
    """Multiply (batch, rows, terms) by (batch, terms, columns)."""
    rows = emitter.transposed(left.value, left.rows)
    if len(left.free) != 1 or len(left.contracted) != 1:
        rows = emitter.reshaped(rows, (*batch, math.prod(left.sizes), left.terms))
    columns = emitter.transposed(right.value, right.columns)
    if len(right.free) != 1 or len(right.contracted) != 1:
        columns = emitter.reshaped(columns, (*batch, right.terms, math.prod(right.sizes)))
    return emitter.add("MatMul", [rows, columns])


def _split(emitter: Emitter, made: str, shape: tuple[int, ...], sides: Sequence[_Side]) -> str:
    """Split the rows and columns of a product into the axes that were merged."""
    whole = all(len(side.free) == 1 for side in sides)
    return made if whole else emitter.reshaped(made, shape)


def _by_kernel(
    emitter: Emitter,
    bias: Sequence[Expression],
    x: Expression,
    kernel: Expression,
    contracted: Sequence[int],
    terms: Sequence[int],
    swapped: bool,
) -> str:
    """Multiply by a known kernel: MatMul of (..., terms) by (terms, features), Gemm for rows.

    A bias is added before features of several axes are split. Where the kernel stood first in JAX, the
    features are moved to the front.
    """
    free = [axis for axis in range(kernel.ndim) if axis not in terms]
    sizes = [kernel.shape[axis] for axis in free]
    inner = math.prod(kernel.shape[axis] for axis in terms)
    ordered = np.transpose(kernel.known, (*terms, *free)).reshape(inner, math.prod(sizes))
    weight = emitter.held(kernel, ordered)
    rows = [axis for axis in range(x.ndim) if axis not in contracted]
    lead = [x.shape[axis] for axis in rows]
    source = emitter.transposed(x, (*rows, *contracted))
    if len(contracted) != 1:
        source = emitter.reshaped(source, (*lead, inner))
    if len(rows) == 1:
        made = emitter.add("Gemm", [source, weight])
    else:
        made = emitter.add("MatMul", [source, weight])
    for addend in bias:
        made = emitter.add("Add", [made, emitter.held(addend, np.ravel(addend.known))])
    if len(sizes) != 1:
        made = emitter.reshaped(made, (*lead, *sizes))
    if not swapped:
        return made
    count = len(lead)
    return emitter.moved(made, (*range(count, count + len(sizes)), *range(count)))


def _by_kernels(emitter: Emitter, x: _Side, kernel: _Side, swapped: bool) -> str:
    """Multiply by a known kernel of which each entry of some axes of x has its own.

    These axes stand before the last free axis of x: (..., batch, rows, terms) by (batch, terms, features).
    """
    *lead, rows = x.free
    batch, count = len(x.batch), len(lead)
    terms, features = kernel.terms, math.prod(kernel.sizes)
    sizes = [kernel.value.shape[axis] for axis in kernel.batch]
    source = emitter.transposed(x.value, (*lead, *x.batch, rows, *x.contracted))
    shape = [x.value.shape[axis] for axis in (*lead, *x.batch, rows)]
    if len(x.contracted) != 1:
        source = emitter.reshaped(source, (*shape, terms))
    ordered = np.transpose(kernel.value.known, kernel.columns).reshape(*sizes, terms, features)
    made = emitter.add("MatMul", [source, emitter.held(kernel.value, ordered)])
    if len(kernel.sizes) != 1:
        made = emitter.reshaped(made, (*shape, *kernel.sizes))
    batches = range(count, count + batch)
    free = (*range(count), count + batch)
    made_by_kernel = range(count + batch + 1, count + batch + 1 + len(kernel.sizes))
    order = (*batches, *made_by_kernel, *free) if swapped else (*batches, *free, *made_by_kernel)
    return emitter.moved(made, order)


POOLS = {"reduce_window_max": "MaxPool", "reduce_window_min": "MaxPool", "average_pool": "AveragePool"}


@emits("reduce_window_max", "reduce_window_min", "reduce_window_sum", "average_pool")
def _pool(emitter: Emitter, value: Expression) -> str:
    """Write a pool. A minimum is a maximum of what is negated, and a sum a mean times its terms."""
    x, params, rank = value.operands[0], value.params, value.ndim
    width, pads = params["window_dimensions"], params["padding"]
    moving = [
        axis
        for axis in range(rank)
        if width[axis] != 1 or params["window_strides"][axis] != 1 or tuple(pads[axis]) != (0, 0)
    ]
    still = [axis for axis in range(rank) if axis not in moving]
    dilated = any(size != 1 for size in params["base_dilation"])
    plain = all(size == 1 for size in params["window_dilation"]) or (
        value.primitive in POOLS and POOLS[value.primitive] == "MaxPool"
    )
    beyond = len(moving) > 3 or any(pad < 0 for ends in pads for pad in ends)
    if len(still) < 2 or beyond or dilated or not plain or not np.issubdtype(value.dtype, np.floating):
        raise InvalidInput(
            f"the pool{place(value.path)} with windows {tuple(width)} has no operator in ONNX: pool height "
            "and width of float32 images"
        )
    lead = (still[0], still[-1])
    spatial = [axis for axis in range(rank) if axis not in lead]
    order = (*lead, *spatial)
    name = emitter.moved(emitter.name(x), order)
    stated: dict[str, Any] = {
        "kernel_shape": [width[axis] for axis in spatial],
        "strides": [params["window_strides"][axis] for axis in spatial],
        "pads": [pads[axis][end] for end in (0, 1) for axis in spatial],
    }
    operator = POOLS.get(value.primitive, "AveragePool")
    negated = value.primitive == "reduce_window_min"
    if negated:
        name = emitter.add("Neg", [name])
    outside = any(pad >= size for pad, size in zip(stated["pads"], stated["kernel_shape"] * 2, strict=True))
    counted = params.get("counted", True)
    if outside:  # ONNX wants each pad of a pool to be smaller than its kernel
        if operator == "AveragePool" and not counted:
            raise InvalidInput(f"the pool{place(value.path)} has pads beyond its windows: pad less")
        filling = -np.inf if operator == "MaxPool" else 0.0
        widths = [0, 0, *stated["pads"][: len(spatial)], 0, 0, *stated["pads"][len(spatial) :]]
        name = emitter.add("Pad", [name, emitter.constant(widths), emitter.constant(filling, np.float32)])
        stated["pads"] = [0] * len(stated["pads"])
    if operator == "MaxPool":
        stated["dilations"] = [params["window_dilation"][axis] for axis in spatial]
    else:
        stated["count_include_pad"] = int(counted)
    made = emitter.add(operator, [name], **stated)
    if negated:
        made = emitter.add("Neg", [made])
    made = emitter.moved(made, np.argsort(order))
    if value.primitive == "reduce_window_sum":
        made = emitter.add("Mul", [made, emitter.constant(math.prod(width), np.float32)])
    return made


@emits("batch_norm")
def _batch_norm(emitter: Emitter, value: Expression) -> str:
    """Write BatchNormalization, whose features are the second axis in ONNX."""
    axis, rank = value.params["axis"], value.ndim
    order = (0, axis, *(other for other in range(1, rank) if other != axis))
    inputs = [emitter.name(x) for x in value.operands[1:]]
    x = emitter.moved(emitter.name(value.operands[0]), order)
    made = emitter.add("BatchNormalization", [x, *inputs], epsilon=float(value.params["epsilon"]))
    return emitter.moved(made, np.argsort(order))


@emits("norm")
def _norm(emitter: Emitter, value: Expression) -> str:
    """Write LayerNormalization, GroupNormalization or InstanceNormalization."""
    params, (x, *affine) = value.params, value.operands
    kind, axis, rank = params["kind"], params["axis"], value.ndim
    shape = value.shape[axis:] if kind == "layer_norm" else (value.shape[axis],)
    inputs = [emitter.name(y) for y in affine]
    if not inputs:
        inputs = [emitter.constant(np.ones(shape), np.float32)]
    epsilon = float(params["epsilon"])
    if kind == "layer_norm":
        return emitter.add(
            "LayerNormalization", [emitter.name(x), *inputs], axis=axis - rank, epsilon=epsilon
        )
    if len(inputs) == 1:
        inputs.append(emitter.constant(np.zeros(shape), np.float32))
    order = (0, axis, *(other for other in range(1, rank) if other != axis))
    source = emitter.moved(emitter.name(x), order)
    if kind == "group_norm":
        stated = {"num_groups": params["groups"], "epsilon": epsilon}
        made = emitter.add("GroupNormalization", [source, *inputs], **stated)
    else:
        made = emitter.add("InstanceNormalization", [source, *inputs], epsilon=epsilon)
    return emitter.moved(made, np.argsort(order))
