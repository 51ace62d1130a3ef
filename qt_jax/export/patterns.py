"""Recognize in a program what ONNX says with one operator: norms, softmax, means, pools and resizes.

`simplify` is called with every value of a program as soon as its operands are there. It returns a value of a
primitive of its own (`mean`, `softmax`, `log_softmax`, `batch_norm`, `norm`, `average_pool`, `resize`,
`dense`, `taps`) that says the same, or the value it was given. What a value is computed from decides, not the
name of a layer or a function, so that a norm written by hand is recognized too, and one with parameters of
its own kind is what it computes.
"""

import math
from collections.abc import Callable

import numpy as np

from qt_jax.export.normalizations import by_root, kept, normalized, scaled, shifted, unexpanded
from qt_jax.export.program import Expression, derived


def simplify(value: Expression) -> Expression:
    """Return a value that says the same as `value` in fewer operators, or `value` itself."""
    for recognized in RULES.get(value.primitive, ()):
        found = recognized(value)
        if found is not None:
            return found
    return value


def _chosen(value: Expression) -> Expression | None:
    """Recognize a choice whose condition is known and the same everywhere."""
    index = value.operands[0].number()
    if index is None:
        return None
    case = value.operands[1 + int(index)]
    if case.shape == value.shape:
        return case
    return None


def _dense(value: Expression) -> Expression | None:
    """Recognize the bias behind a product by a known kernel whose features take several axes."""
    for side in (0, 1):
        product, bias = value.operands[side], value.operands[1 - side]
        if product.primitive != "dot_general" or bias.known is None or product.shape != value.shape:
            continue
        x, kernel = product.operands
        (contracted, _), (batch, _) = product.params["dimension_numbers"]
        lead = x.ndim - len(contracted)
        features = value.shape[lead:]
        full = (1,) * (value.ndim - bias.ndim) + bias.shape
        by_kernel = x.known is None and kernel.known is not None and not batch and len(features) > 1
        if by_kernel and bias.dtype == np.float32 and full == (*(1,) * lead, *features):
            return derived("dense", [x, kernel, bias], value, value.path, **product.params)
    return None


def _tap(value: Expression) -> tuple[Expression, Expression, Expression] | None:
    """Return x, its slice and the kernel of slice(x) * kernel, where that has one number for each feature."""
    if value.primitive != "mul":
        return None
    for side in (0, 1):
        part, kernel = value.operands[side], value.operands[1 - side]
        if part.primitive != "slice" or kernel.known is None or part.shape != value.shape or part.ndim < 3:
            continue
        features = part.shape[-1]
        full = (1,) * (part.ndim - kernel.ndim) + kernel.shape
        if full == (*(1,) * (part.ndim - 1), features) and kernel.dtype == np.float32:
            return part.operands[0], part, kernel
    return None


def _shifted_products(value: Expression) -> Expression | None:
    """Recognize a depthwise convolution that is written as a sum of shifted products.

    It is the sum over (p, q) of x[:, p::s, q::s] * kernel[p, q], of equally many positions each.
    """
    terms: list[tuple[Expression, Expression, Expression]] = []
    for operand in value.operands:
        if operand.primitive == "taps":
            terms += operand.params["terms"]
        elif (found := _tap(operand)) is not None:
            terms.append(found)
        else:
            return None
    x, first, _ = terms[0]
    steps = first.params["strides"] or (1,) * x.ndim
    for source, part, _ in terms:
        same = (
            source is x and part.shape == value.shape and (part.params["strides"] or (1,) * x.ndim) == steps
        )
        outside = (
            part.params["start_indices"][axis] or part.shape[axis] != x.shape[axis] for axis in (0, -1)
        )
        if not same or any(outside) or steps[0] != 1 or steps[-1] != 1:
            return None
    starts = {tuple(part.params["start_indices"][1:-1]) for _, part, _ in terms}
    if len(starts) < len(terms):
        return None
    return derived("taps", [x, *(kernel for *_, kernel in terms)], value, value.path, terms=terms)


def _nothing(value: Expression) -> Expression | None:
    """Recognize x + 0, x - 0, x * 1, x / 1 and max(x, -inf)."""
    neutral, sides = {
        "add": (0.0, (0, 1)),
        "sub": (0.0, (1,)),
        "mul": (1.0, (0, 1)),
        "div": (1.0, (1,)),
        "max": (-math.inf, (0, 1)),
    }[value.primitive]
    for side in sides:
        other = value.operands[1 - side]
        if value.operands[side].number() == neutral and other.shape == value.shape:
            return other
    return None


def _same(value: Expression) -> Expression | None:
    """Recognize a conversion to the dtype, or a movement to the shape, that is there already."""
    source = value.operands[0]
    moved = value.primitive == "transpose" and tuple(value.params["permutation"]) != tuple(range(value.ndim))
    return source if source.shape == value.shape and source.dtype == value.dtype and not moved else None


def _mean(value: Expression) -> Expression | None:
    """Recognize a sum that is divided by the number of its terms."""
    total, by = value.operands
    number = by.number()
    if number is None or total.known is not None:
        return None
    kept = total.primitive != "reduce_sum"
    source = total
    if kept:
        found = unexpanded(total)
        if found is None:
            return None
        source, places = found
    if source.primitive != "reduce_sum":
        return None
    of, axes = source.operands[0], tuple(source.params["axes"])
    terms = math.prod(of.shape[axis] for axis in axes)
    wanted = terms if value.primitive == "div" else np.float32(1.0 / terms) if terms else 0
    if number != wanted or not terms or not np.issubdtype(value.dtype, np.floating):
        return None
    if kept and places != tuple(axis for axis in range(of.ndim) if axis not in axes):
        return None
    if kept and total.shape != tuple(1 if axis in axes else size for axis, size in enumerate(of.shape)):
        return None
    return derived("mean", [of], value, value.path, axes=axes, keepdims=kept)


def _reshaped_mean(value: Expression) -> Expression | None:
    """Recognize a mean or an extreme whose axes are put back."""
    source = value.operands[0]
    if source.primitive != "mean" or source.params["keepdims"]:
        return None
    of, axes = source.operands[0], source.params["axes"]
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(of.shape))
    found = unexpanded(value)
    left = tuple(axis for axis in range(of.ndim) if axis not in axes)
    if value.shape != kept or found is None:
        return None
    sizes = [of.shape[axis] for axis in left]
    if value.primitive == "broadcast_in_dim" and found[1] != left:
        return None
    if value.primitive == "reshape" and list(source.shape) != sizes:
        return None
    return derived("mean", [of], value, value.path, axes=axes, keepdims=True)


def _softmax(value: Expression) -> Expression | None:
    """Recognize exp(x - max(x)) / sum(exp(x - max(x))) along one axis."""
    numerator, total = value.operands
    if numerator.primitive != "exp":
        return None
    shifted = _shifted(numerator.operands[0])
    if shifted is None:
        return None
    x, axis = shifted
    summed = kept(total, "reduce_sum", (axis,), numerator)
    return None if summed is None else derived("softmax", [x], value, value.path, axis=axis)


def _log_softmax(value: Expression) -> Expression | None:
    """Recognize x - max(x) - log(sum(exp(x - max(x)))) along one axis."""
    left, right = value.operands
    shifted = _shifted(left)
    if shifted is None or right.primitive not in ("log", "broadcast_in_dim", "reshape"):
        return None
    x, axis = shifted
    if right.primitive == "log":
        total = right.operands[0]
        exponential = _summed(total)
        found = exponential is not None and kept(total, "reduce_sum", (axis,), exponential) is not None
    else:
        expanded = unexpanded(right)
        if expanded is None or expanded[0].primitive != "log":
            return None
        total = expanded[0].operands[0]
        exponential = total.operands[0] if total.primitive == "reduce_sum" else None
        left_axes = tuple(other for other in range(x.ndim) if other != axis)
        found = exponential is not None and total.params["axes"] == (axis,) and expanded[1] == left_axes
    if not found or exponential is None or exponential.primitive != "exp":
        return None
    if exponential.operands[0] is not left:
        return None
    return derived("log_softmax", [x], value, value.path, axis=axis)


def _summed(total: Expression) -> Expression | None:
    """Return what a sum, perhaps with its axes put back, adds up."""
    source = total
    if total.primitive != "reduce_sum":
        found = unexpanded(total)
        if found is None:
            return None
        source = found[0]
    return source.operands[0] if source.primitive == "reduce_sum" else None


def _shifted(value: Expression) -> tuple[Expression, int] | None:
    """Return x and the axis of x - max(x)."""
    if value.primitive != "sub":
        return None
    x, largest = value.operands
    found = unexpanded(largest)
    if found is None or found[0].primitive != "reduce_max" or len(found[0].params["axes"]) != 1:
        return None
    (axis,) = found[0].params["axes"]
    return (x, axis) if kept(largest, "reduce_max", (axis,), x) is not None else None


def _average_pool(value: Expression) -> Expression | None:
    """Recognize a sum over windows that is divided by the number of its terms, with or without the pads."""
    total, by = value.operands
    if total.primitive != "reduce_window_sum" or by.known is None or total.known is not None:
        return None
    params, number = total.params, by.number()
    if any(size != 1 for size in (*params["base_dilation"], *params["window_dilation"])):
        return None
    if number == math.prod(params["window_dimensions"]):
        counted = True
    elif np.array_equal(np.broadcast_to(by.known, value.shape), _terms(total)):
        counted = False
    else:
        return None
    return derived("average_pool", total.operands, value, value.path, **params, counted=counted)


def _terms(total: Expression) -> np.ndarray:
    """Count the terms of each window of a sum that are no pads."""
    x, params = total.operands[0], total.params
    counts = np.ones((1,) * x.ndim, np.float32)
    for axis, (width, stride, (low, high)) in enumerate(
        zip(params["window_dimensions"], params["window_strides"], params["padding"], strict=True)
    ):
        inside = np.zeros(low + x.shape[axis] + high, np.float32)
        inside[low : low + x.shape[axis]] = 1.0
        starts = range(0, len(inside) - width + 1, stride)
        along = np.array([inside[start : start + width].sum() for start in starts], np.float32)
        counts = counts * along.reshape([-1 if other == axis else 1 for other in range(x.ndim)])
    return np.broadcast_to(counts, total.shape)


def _resize(value: Expression) -> Expression | None:
    """Recognize the resize of an image by the weights with which it joins pixels."""
    computed, image = value.operands
    matrices: list[np.ndarray] = []
    step = computed
    while step is not image:
        if step.primitive not in ("dot_general", "gather", "transpose", "convert_element_type", "reshape"):
            return computed
        matrices += [x.known for x in step.operands if x.known is not None]
        step = next((x for x in step.operands if x.known is None), image)
    changed = [(a, b) for a, b in zip(image.shape, value.shape, strict=True) if a != b]
    for mode, weights in MODES.items():
        wanted = [weights(*sizes) for sizes in changed]
        alike = all(any(_alike(matrix, one) for matrix in matrices) for one in wanted)
        if changed and alike and len(matrices) == len(wanted):
            return derived("resize", [image], value, value.path, mode=mode)
    return computed


def _alike(matrix: np.ndarray, wanted: np.ndarray) -> bool:
    """Tell whether a matrix, perhaps transposed, or a column of indices is the one wanted."""
    squeezed = matrix.reshape(-1) if wanted.ndim == 1 else matrix
    if squeezed.ndim != wanted.ndim:
        return False
    return any(
        each.shape == wanted.shape and np.allclose(each, wanted, rtol=0, atol=1e-5)
        for each in (squeezed, squeezed.T)
    )


def _weights(kernel: Callable[[np.ndarray], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    """Return the function `(size, new size) -> weights (size, new size)` of a kernel without antialiasing."""

    def weights(size: int, new: int) -> np.ndarray:
        centres = (np.arange(new) + 0.5) * size / new - 0.5
        found = kernel(np.abs(centres[None] - np.arange(size)[:, None]))
        return found / found.sum(0)

    return weights


def _keys(x: np.ndarray) -> np.ndarray:
    """Evaluate the cubic kernel of Keys (1981) with a = -1/2, at x >= 0."""
    near = ((1.5 * x - 2.5) * x) * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x >= 2.0, 0.0, np.where(x >= 1.0, far, near))


MODES: dict[str, Callable[[int, int], np.ndarray]] = {
    "nearest": lambda size, new: np.floor((np.arange(new) + 0.5) * size / new),
    "linear": _weights(lambda x: np.maximum(0.0, 1.0 - x)),
    "cubic": _weights(_keys),
}
"""Maps a mode of ONNX's Resize to its weights along one axis, and the nearest pixels for "nearest"."""

RULES: dict[str, tuple[Callable[[Expression], Expression | None], ...]] = {
    "add": (_nothing, shifted, _dense, _shifted_products),
    "add_any": (shifted,),
    "broadcast_in_dim": (_same, _reshaped_mean),
    "convert_element_type": (_same,),
    "div": (_average_pool, _softmax, _mean, _nothing, normalized),
    "max": (_nothing,),
    "mul": (_nothing, _mean, normalized, scaled, by_root),
    "reshape": (_same, _reshaped_mean),
    "resized": (_resize,),
    "select_n": (_chosen,),
    "sub": (_nothing, _log_softmax),
    "transpose": (_same,),
}
"""Maps a primitive to the functions that may recognize what it is the last step of."""
