"""Write ONNX's convolutions, pools and resizing as functions of JAX arrays.

All take images `(batch, channels, ...)` with any number of spatial axes, as ONNX does. A depthwise
convolution and a pool are sums and maxima of shifted images on CPUs: XLA's CPU backend runs the former
channel by channel, and scatters in the gradient of the latter.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qt_jax.errors import InvalidInput

Attributes = Mapping[str, Any]
"""Attributes that a node states, by name; strings are str."""

Pads = Sequence[tuple[int, int]]
"""Numbers of elements before and behind each spatial axis."""


class Window(NamedTuple):
    """Describe how a pool's window moves along one axis.

    Attributes:
      size: Elements that it sees.
      stride: Steps from one window to the next.
      dilation: Steps from one of its elements to the next.
      pad: Elements that the graph adds before and behind the axis.
      windows: Number of windows. The last ones may reach further than `pad`, by ceil_mode.
    """

    size: int
    stride: int
    dilation: int
    pad: tuple[int, int]
    windows: int


def convolution(attributes: Attributes, x: Any, kernel: Any, bias: Any = None) -> jax.Array:
    """Compute ONNX's Conv.

    Args:
      attributes: group, strides, dilations, pads, auto_pad.
      x: `(batch, channels, ...)`.
      kernel: `(outputs, channels / group, ...)`.
      bias: `(outputs,)`, or None.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    group, window = attributes.get("group", 1), kernel.shape[2:]
    strides, dilations = (_per_axis(attributes, name, len(window)) for name in ("strides", "dilations"))
    reaches = [(k - 1) * d + 1 for k, d in zip(window, dilations, strict=True)]
    pads = _pads(attributes, x.shape[2:], reaches, strides)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and 1 < group == x.shape[1] == len(kernel):
        y = _depthwise(x, kernel, strides, dilations, pads)
    elif on_cpu and group == 1 and {*window, *strides} == {1} and not any(map(any, pads)):
        y = jnp.einsum("oi,ni...->no...", kernel.reshape(kernel.shape[:2]), x)
    else:
        y = lax.conv_general_dilated(
            x, kernel, strides, pads, rhs_dilation=dilations, feature_group_count=group, precision="highest"
        )
    return y if bias is None else y + by_channel(bias, y.ndim)


def transposed_convolution(attributes: Attributes, x: Any, kernel: Any, bias: Any = None) -> jax.Array:
    """Compute ONNX's ConvTranspose: a convolution of the image with zeros between its elements.

    Args:
      attributes: group, strides, dilations, pads, auto_pad, output_padding, output_shape.
      x: `(batch, channels, ...)`.
      kernel: `(channels, outputs / group, ...)`.
      bias: `(outputs,)`, or None.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    group, window = attributes.get("group", 1), kernel.shape[2:]
    strides, dilations = (_per_axis(attributes, name, len(window)) for name in ("strides", "dilations"))
    added = attributes.get("output_padding", [0] * len(window))
    reaches = [(k - 1) * d + 1 for k, d in zip(window, dilations, strict=True)]
    pads = _transposed_pads(attributes, x.shape[2:], reaches, strides, added)
    around = [(r - 1 - b, r - 1 - e + a) for r, (b, e), a in zip(reaches, pads, added, strict=True)]
    parts = kernel.reshape(group, -1, *kernel.shape[1:]).swapaxes(1, 2)  # (group, outputs, inputs, ...)
    y = lax.conv_general_dilated(
        x,
        jnp.flip(parts.reshape(-1, *parts.shape[2:]), range(2, kernel.ndim)),
        [1] * len(window),
        around,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=group,
        precision="highest",
    )
    return y if bias is None else y + by_channel(bias, y.ndim)


def max_pool(attributes: Attributes, x: Any) -> jax.Array:
    """Compute ONNX's MaxPool, one axis after another. Indices are not computed."""
    x = jnp.asarray(x)
    lowest = -math.inf if jnp.issubdtype(x.dtype, jnp.floating) else int(jnp.iinfo(x.dtype).min)
    for axis, window in enumerate(_windows(attributes, x.shape), 2):
        x = _along(jnp.maximum, x, axis, window, lowest)
    return x


def average_pool(attributes: Attributes, x: Any) -> jax.Array:
    """Compute ONNX's AveragePool: the sum of each window, over the number of elements that count."""
    x = jnp.asarray(x)
    counts = np.ones((1,) * x.ndim)
    for axis, window in enumerate(_windows(attributes, x.shape), 2):
        before, behind = window.pad if attributes.get("count_include_pad") else (0, 0)
        starts = np.arange(window.windows) * window.stride - window.pad[0]
        places = starts[:, None] + np.arange(window.size) * window.dilation
        inside = ((places >= -before) & (places < x.shape[axis] + behind)).sum(1)
        counts = counts * inside.reshape([-1 if other == axis else 1 for other in range(x.ndim)])
        x = _along(jnp.add, x, axis, window, 0)
    return x / jnp.asarray(counts, x.dtype)


def resize(attributes: Attributes, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    """Compute ONNX's Resize, one axis after another: nearest, linear or cubic.

    Args:
      attributes: mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, exclude_outside, axes.
      x: Any rank.
      roi: Is read by one mode only, which is refused.
      scales: Factor of each axis, or None or empty where `sizes` holds the results' sizes.
      sizes: Size of each axis.

    Raises:
      InvalidInput: The node asks for antialiasing, a region of interest or a fixed aspect ratio.
    """
    asked = attributes.get("coordinate_transformation_mode", "half_pixel")
    if attributes.get("antialias"):
        raise InvalidInput("antialiasing is not among what is known")
    if attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise InvalidInput("a fixed aspect ratio is not among what is known")
    axes = [axis % x.ndim for axis in attributes.get("axes", range(x.ndim))]
    by_scale = scales is not None and len(scales)
    for place, axis in enumerate(axes):
        n = x.shape[axis]
        scale = float(scales[place]) if by_scale else int(sizes[place]) / n
        count = math.floor(n * scale) if by_scale else int(sizes[place])
        if (count, scale) != (n, 1.0):
            places = _coordinates(asked, n, count, np.float32(scale))
            x = _interpolate(attributes, jnp.asarray(x), axis, places)
    return x


def by_channel(values: Any, rank: int) -> jax.Array:
    """Return one number for each channel in a shape that broadcasts to an image of that rank."""
    return jnp.asarray(values).reshape(1, -1, *[1] * (rank - 2))


def _depthwise(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], dilations: Sequence[int], pads: Pads
) -> jax.Array:
    """Sum the shifted images, each times its element of the kernels `(channels, 1, ...)`."""
    window = kernel.shape[2:]
    padded = jnp.pad(x, ((0, 0), (0, 0), *pads))
    counts = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(padded.shape[2:], window, dilations, strides, strict=True)
    ]
    y = jnp.zeros((*x.shape[:2], *counts), x.dtype)
    for element in itertools.product(*map(range, window)):
        cuts = [
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(element, dilations, counts, strides, strict=True)
        ]
        y = y + padded[(..., *cuts)] * by_channel(kernel[(slice(None), 0, *element)], x.ndim)
    return y


def _along(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    axis: int,
    window: Window,
    fill: float,
) -> jax.Array:
    """Combine the elements of each window along one axis; what lies outside counts as `fill`."""
    last = (window.windows - 1) * window.stride + 1
    needed = last + (window.size - 1) * window.dilation - x.shape[axis] - window.pad[0]
    around = [(0, 0)] * x.ndim
    around[axis] = (window.pad[0], max(needed, 0))
    padded = jnp.pad(x, around, constant_values=fill)
    starts = [place * window.dilation for place in range(window.size)]
    parts = [lax.slice_in_dim(padded, start, start + last, window.stride, axis) for start in starts]
    combined = parts[0]
    for part in parts[1:]:
        combined = function(combined, part)
    return combined


def _windows(attributes: Attributes, shape: Sequence[int]) -> list[Window]:
    """Return how a pool's window moves along each spatial axis of images of that shape."""
    sizes, rank = attributes["kernel_shape"], len(shape) - 2
    strides, dilations = (_per_axis(attributes, name, rank) for name in ("strides", "dilations"))
    reaches = [(k - 1) * d + 1 for k, d in zip(sizes, dilations, strict=True)]
    pads = _pads(attributes, shape[2:], reaches, strides)
    found = []
    for n, size, stride, dilation, reach, pad in zip(
        shape[2:], sizes, strides, dilations, reaches, pads, strict=True
    ):
        room = n + sum(pad) - reach
        count = room // stride + 1
        if attributes.get("ceil_mode"):
            count = -(-room // stride) + 1
            count -= (count - 1) * stride >= n + pad[0]  # a window that starts behind the image
        found.append(Window(size, stride, dilation, pad, count))
    return found


def _per_axis(attributes: Attributes, name: str, rank: int) -> list[int]:
    return list(attributes.get(name) or [1] * rank)


def _pads(
    attributes: Attributes, sizes: Sequence[int], reaches: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the elements before and behind each axis, as a node states them or asks for them.

    Args:
      attributes: pads or auto_pad.
      sizes: Of the image.
      reaches: Elements that the dilated window covers along each axis.
      strides: Steps from one window to the next.
    """
    automatic = attributes.get("auto_pad", "NOTSET")
    if automatic not in ("SAME_UPPER", "SAME_LOWER"):
        none = [0] * 2 * len(sizes)
        stated = attributes.get("pads", none) if automatic == "NOTSET" else none
        return list(zip(stated[: len(sizes)], stated[len(sizes) :], strict=True))
    missing = [
        max((math.ceil(n / s) - 1) * s + r - n, 0) for n, r, s in zip(sizes, reaches, strides, strict=True)
    ]
    return [_halves(total, upper=automatic == "SAME_UPPER") for total in missing]


def _transposed_pads(
    attributes: Attributes,
    sizes: Sequence[int],
    reaches: Sequence[int],
    strides: Sequence[int],
    added: Sequence[int],
) -> list[tuple[int, int]]:
    """Return what a ConvTranspose cuts off before and behind each axis; arguments as for `_pads`."""
    automatic = attributes.get("auto_pad", "NOTSET")
    wanted = attributes.get("output_shape")
    if wanted is None:
        if automatic not in ("SAME_UPPER", "SAME_LOWER"):
            return _pads(attributes, sizes, reaches, strides)
        wanted = [n * s for n, s in zip(sizes, strides, strict=True)]
    whole = [s * (n - 1) + a + r for n, r, s, a in zip(sizes, reaches, strides, added, strict=True)]
    cuts = [max(total - size, 0) for total, size in zip(whole, wanted[-len(whole) :], strict=True)]
    return [_halves(cut, upper=automatic == "SAME_UPPER") for cut in cuts]


def _halves(total: int, *, upper: bool) -> tuple[int, int]:
    """Divide pads in two; the odd one goes behind where `upper` holds."""
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)


def _coordinates(mode: str, size: int, count: int, scale: np.float32) -> np.ndarray:
    """Return where each element of a resized axis lies on the original one, as ONNX defines the modes.

    Args:
      mode: Attribute coordinate_transformation_mode.
      size, count: Size of the axis before and after.
      scale: count / size, but for rounding.
    """
    places = np.arange(count, dtype=np.float32)
    if mode == "align_corners":
        return places * np.float32(size - 1) / np.float32(count - 1) if count > 1 else 0 * places
    if mode == "asymmetric":
        return places / scale
    if mode == "pytorch_half_pixel" and count == 1:
        return 0 * places
    shifted = (places + np.float32(0.5)) / scale - np.float32(0.5)
    if mode == "half_pixel_symmetric":
        return np.float32(size / 2 * (1 - count / (float(scale) * size))) + shifted
    if mode not in ("half_pixel", "pytorch_half_pixel"):
        raise InvalidInput(f"coordinates {mode} are not among what is known")
    return shifted


def _interpolate(attributes: Attributes, x: jax.Array, axis: int, places: np.ndarray) -> jax.Array:
    """Read an axis at the places of its new elements."""
    size, mode = x.shape[axis], attributes.get("mode", "nearest")
    if mode == "nearest":
        rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "round_prefer_floor": lambda at: np.ceil(at - np.float32(0.5)),
            "round_prefer_ceil": lambda at: np.floor(at + np.float32(0.5)),
            "floor": np.floor,
            "ceil": np.ceil,
        }
        chosen = rounding[attributes.get("nearest_mode", "round_prefer_floor")](places)
        return jnp.take(x, np.clip(chosen, 0, size - 1).astype(np.int32), axis, mode="clip")
    matrix = np.zeros((len(places), size))
    if mode == "linear":
        places = np.clip(places, 0, size - 1)
    floors = np.floor(places).astype(int)
    for step in (0, 1) if mode == "linear" else (-1, 0, 1, 2):
        weights = _weight(mode, places - floors - step, attributes.get("cubic_coeff_a", -0.75))
        index = floors + step
        if attributes.get("exclude_outside"):
            weights = np.where((index >= 0) & (index < size), weights, 0)
        np.add.at(matrix, (np.arange(len(places)), np.clip(index, 0, size - 1)), weights)
    matrix /= matrix.sum(1, keepdims=True)
    resized = jnp.tensordot(x, jnp.asarray(matrix, x.dtype), (axis, 1), precision="highest")
    return jnp.moveaxis(resized, -1, axis)


def _weight(mode: str, distance: np.ndarray, a: float) -> np.ndarray:
    """Return the weight of an element at a distance: linear, or Keys' cubic with the coefficient `a`."""
    t = np.abs(distance.astype(np.float64))
    if mode == "linear":
        return 1 - t
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    return np.where(t <= 1, near, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a)
