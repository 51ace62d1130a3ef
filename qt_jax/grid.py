"""Put tensors on an integer grid, and blend them with their image by lambda.

The uniform affine grid (Quant-Trim, arXiv 2511.15300): with b bits, scale s > 0 and zero-point z

    Q(x) = clip(round(x / s) + z, q_min, q_max)        x_hat = s * (Q(x) - z)
    x_tilde = x + lambda * stop_gradient(x_hat - x)

Rounding is half to even, as in ONNX QuantizeLinear. `fake_quant` does all of it, and `blend` the last line.

Vendors lay different grids over one kernel. `fake_quant_on_drawn_grid` draws one of them at random at every
step, so that training does not adapt to a single grid. Compilers differ in two ways. They take one scale for
the kernel, or one for each output channel. With h = 2^(b-1) and a the largest magnitude, they also take the
full symmetric range [-h, h - 1] with s = a / (h - 1/2) (onnxruntime), or the narrow one [1 - h, h - 1] with
s = a / (h - 1) (NNCF, tpu-mlir, TFLite). Some take s = a / h on the full range, which moves +a to
(1 - 1 / h) a, or round a / (h - 1) to a power of two, up or to the nearest. A kernel trained on one grid fits
that one. Weights that meet all of them have to lie where the rounding of each does little harm. This is not
in the paper: it is this package's choice, off by default.
"""

import dataclasses
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qt_jax.errors import InvalidInput

SCALE_FLOOR = 1e-8
"""Smallest scale. A dead or constant tensor gets this scale instead of 0, and so never becomes NaN."""


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Describe how one tensor is put on the integer grid.

    Attributes:
      bits: Width of the integers, 2..16.
      symmetric: True for zero-point 0 and a range [-a, a], with a the quantile of |x|. False for a range
        that spans the lower and upper quantile of x, widened to hold zero.
      axis: Channel axis for one scale per channel (usually -1, the features of a Linen kernel), or None for
        one scale per tensor. If a kernel has several feature axes (DenseGeneral with a tuple of features, the
        query of an attention), the others share the scales of the last one.
      narrow_range: True to leave the lowest integer unused. The symmetric 8-bit grid is then [-127, 127]
        with s = a / 127, as in the paper; the full one is [-128, 127] with s = 2 a / 255, as in onnxruntime.
        None (the default) means narrow when symmetric, full when not.
      ste: Gradient of the rounding. "identity" is the straight-through estimator; "clipped" is zero outside
        the representable range.
      quantile: Upper level of the robust range, in (0.5, 1]. The lower level is 1 - quantile; 1 is min-max.
      grids: "own" for the grid described here. For kernels, "vendors" draws one of four grids at each step of
        training: full or narrow, per tensor or per channel. "conventions" draws from ten, with a / h and the
        powers of two (see `qt_jax.grid`). Both need a symmetric spec with an axis and the gradient
        "identity".

    Raises:
      InvalidInput: A field is out of its range.

    >>> QuantSpec(bits=4).integer_range
    (-7, 7)
    >>> QuantSpec(bits=8, symmetric=False).integer_range
    (0, 255)
    """

    bits: int = 8
    symmetric: bool = True
    axis: int | None = None
    narrow_range: bool | None = None
    ste: Literal["identity", "clipped"] = "identity"
    quantile: float = 0.999
    grids: Literal["own", "vendors", "conventions"] = "own"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise InvalidInput(f"QuantSpec.bits must be a whole number from 2 to 16, got {self.bits!r}")
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int)):
            raise InvalidInput(f"QuantSpec.axis must be a whole number or None, got {self.axis!r}")
        if self.narrow_range not in (None, True, False):
            raise InvalidInput(f"QuantSpec.narrow_range must be a bool or None, got {self.narrow_range!r}")
        if self.ste not in ("identity", "clipped"):
            raise InvalidInput(f'QuantSpec.ste must be "identity" or "clipped", got {self.ste!r}')
        if not 0.5 < self.quantile <= 1.0:
            raise InvalidInput(f"QuantSpec.quantile must lie in (0.5, 1], got {self.quantile!r}")
        if self.grids not in ("own", "vendors", "conventions"):
            raise InvalidInput(
                f'QuantSpec.grids must be "own", "vendors" or "conventions", got {self.grids!r}'
            )
        if self.grids != "own" and not (self.symmetric and self.axis is not None and self.ste == "identity"):
            raise InvalidInput(
                f'QuantSpec.grids="{self.grids}" goes with symmetric=True, an axis and ste="identity": it '
                "draws between one scale per tensor and one per channel of a kernel"
            )

    @property
    def integer_range(self) -> tuple[int, int]:
        """Return (q_min, q_max)."""
        narrow = self.symmetric if self.narrow_range is None else self.narrow_range
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        return low + int(narrow), low + 2**self.bits - 1


def fake_quant(
    x: jax.Array,
    low: jax.Array,
    high: jax.Array,
    spec: QuantSpec,
    lam: jax.Array | float = 1.0,
) -> jax.Array:
    """Return `x` blended with its image on the grid of the range [low, high].

    Args:
      x: Array of any shape and float dtype. The arithmetic is in float32, or in float64 if that is the dtype
        of `x`. The result has the dtype of `x`.
      low, high: float32 range: scalars, or `(channels,)` when `spec.axis` is set.
      spec: The grid.
      lam: Blend coefficient in [0, 1], a scalar that may be traced.

    Returns:
      x_tilde, with shape and dtype of `x`.

    >>> fake_quant(jnp.array([0.0, 0.3, 5.0]), jnp.float32(-7.0), jnp.float32(7.0), QuantSpec(4)).tolist()
    [0.0, 0.0, 5.0]
    """
    value = wide(x)
    scale, zero_point = (
        along_axis(parameter, value, spec).astype(value.dtype)
        for parameter in quantization_parameters(low, high, spec)
    )
    x_hat = (_grid(value, scale, zero_point, spec) - zero_point) * scale
    inside = None
    if spec.ste == "clipped":
        q_min, q_max = spec.integer_range
        inside = (value >= (q_min - zero_point) * scale) & (value <= (q_max - zero_point) * scale)
    return blend(value, x_hat, jnp.asarray(lam, value.dtype), inside).astype(x.dtype)


def wide(x: jax.Array) -> jax.Array:
    """Return `x` in the type of all arithmetic on grids: float64 if it is that, else float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def quantization_parameters(low: ArrayLike, high: ArrayLike, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Return scale and zero-point of a range: s = (high - low) / (q_max - q_min), z = round(q_min - low / s).

    The range is first widened to hold zero, so that zero is always exactly representable. A symmetric range
    is widened to [-a, a] with a = max(-low, high), and has z = 0.

    Args:
      low, high: float32, scalars or `(channels,)`.
      spec: The grid.

    Returns:
      (scale, zero_point): float32 of the same shape. The zero-point holds a whole number in [q_min, q_max].

    >>> s, z = quantization_parameters(jnp.float32(-1.0), jnp.float32(3.0), QuantSpec(4, symmetric=False))
    >>> round(float(s), 4), float(z)
    (0.2667, 4.0)
    """
    q_min, q_max = spec.integer_range
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if spec.symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    scale = jnp.maximum((high - low) / np.float32(q_max - q_min), np.float32(SCALE_FLOOR))
    if spec.symmetric:
        return scale, jnp.zeros_like(scale)
    return scale, jnp.clip(jnp.round(q_min - low / scale), q_min, q_max)


def blend(x: jax.Array, x_hat: jax.Array, lam: jax.Array, inside: jax.Array | None = None) -> jax.Array:
    """Return x_tilde = x + lambda * stop_gradient(x_hat - x): plain at lambda = 0, fully quantized at 1.

    It is computed as (1 - lambda) x + lambda x_hat, which is `x` to the bit at 0, infinities included, and
    `x_hat` to the bit at 1. The gradient with respect to `x` is the identity. Where the boolean mask `inside`
    is false, it is 1 - lambda instead (the clipped straight-through estimator).

    >>> blend(jnp.array([1.0]), jnp.array([2.0]), jnp.float32(0.25)).tolist()
    [1.25]
    """
    plain, rounded, lam = (jax.lax.stop_gradient(value) for value in (x, x_hat, lam))
    mixed = (1.0 - lam) * plain + lam * rounded  # NaN of an infinity at either end
    value = jnp.where(lam == 0.0, plain, jnp.where(lam == 1.0, rounded, mixed))
    slope = jnp.ones((), x.dtype) if inside is None else jnp.where(inside, 1.0, 1.0 - lam).astype(x.dtype)
    return _straight_through(x, value, slope)


@jax.custom_jvp
def _straight_through(x: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """Return `value`, with the gradient `slope` with respect to `x` and none with respect to the others."""
    return value


@_straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    _, value, slope = primals
    return value, slope * tangents[0]


def quantize(x: jax.Array, scale: jax.Array, zero_point: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return Q(x) = clip(round(x / s) + z, q_min, q_max), as int32.

    Args:
      x: float32 array of any shape.
      scale, zero_point: From `quantization_parameters`: scalars, or `(channels,)` when `spec.axis` is set.
      spec: The grid.

    >>> quantize(jnp.array([-1.0, 0.24, 9.0]), jnp.float32(0.5), jnp.float32(0.0), QuantSpec(4)).tolist()
    [-2, 0, 7]
    """
    scale, zero_point = along_axis(scale, x, spec), along_axis(zero_point, x, spec)
    return _grid(x, scale, zero_point, spec).astype(jnp.int32)


def dequantize(q: jax.Array, scale: jax.Array, zero_point: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return x_hat = s * (q - z), float32. The arguments are as for `quantize`.

    >>> dequantize(jnp.array([-2, 0, 7]), jnp.float32(0.5), jnp.float32(0.0), QuantSpec(4)).tolist()
    [-1.0, 0.0, 3.5]
    """
    scale, zero_point = along_axis(scale, q, spec), along_axis(zero_point, q, spec)
    return (q.astype(jnp.float32) - zero_point) * scale


def _grid(x: jax.Array, scale: jax.Array, zero_point: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return Q(x), still as floating point."""
    q_min, q_max = spec.integer_range
    return jnp.clip(jnp.round(x / scale) + zero_point, q_min, q_max)


def along_axis(parameter: jax.Array, x: jax.Array, spec: QuantSpec) -> jax.Array:
    """Reshape per-channel parameters so that they broadcast against `x`."""
    if spec.axis is None:
        return parameter
    shape = [1] * x.ndim
    shape[spec.axis] = -1
    return parameter.reshape(shape)


def fake_quant_on_drawn_grid(
    x: jax.Array, low: jax.Array, high: jax.Array, spec: QuantSpec, lam: jax.Array, key: jax.Array
) -> jax.Array:
    """Return `x` blended with its image on one of the grids of `spec.grids`, all with the same probability.

    Args:
      x: Kernel of any float dtype. The arithmetic is as for `fake_quant`.
      low, high: float32 `(channels,)`, along `spec.axis`; taken as symmetric, with a = max(-low, high).
      spec: Gives bits, axis and `grids`, "vendors" or "conventions". Its gradient is the identity.
      lam: Blend coefficient in [0, 1].
      key: Key of the draw, from `grid_key`.

    Returns:
      x_tilde, with shape and dtype of `x`.

    >>> w, a = jnp.array([[0.9, 0.1]]), jnp.array([0.9, 0.1])
    >>> spec, one = QuantSpec(4, axis=-1, grids="vendors"), jnp.float32(1)
    >>> draws = [fake_quant_on_drawn_grid(w, -a, a, spec, one, jax.random.key(i)) for i in range(20)]
    >>> sorted({round(float(draw[0, 0]), 2) for draw in draws})
    [0.84, 0.9]
    """
    half = 2 ** (spec.bits - 1)
    if spec.grids == "vendors":
        per_tensor, full = jax.random.bernoulli(key, 0.5, (2,))
        step, border = jnp.where(full, 1 / (half - 0.5), 1 / (half - 1)), jnp.float32(0)
        lowest = jnp.where(full, -half, 1 - half)
    else:
        of_tensor, of_convention = jax.random.split(key)
        per_tensor = jax.random.bernoulli(of_tensor, 0.5)
        drawn = jax.random.randint(of_convention, (), 0, 5)  # narrow, full, wide, powers of two: up, nearest
        steps = np.array([half - 1, half - 0.5, half, half - 1, half - 1])
        step, border = jnp.float32(1 / steps)[drawn], jnp.float32([0, 0, 0, 0.5, 0.5**0.5])[drawn]
        lowest = jnp.where(drawn == 0, 1 - half, -half)
    magnitude = jnp.maximum(-low, high)
    magnitude = jnp.where(per_tensor, jnp.max(magnitude), magnitude)
    scale = power_of_two(jnp.maximum(magnitude * step, SCALE_FLOOR), border)
    value = wide(x)
    scale = along_axis(scale, value, spec).astype(value.dtype)
    x_hat = jnp.clip(jnp.round(value / scale), lowest, half - 1) * scale
    return blend(value, x_hat, lam.astype(value.dtype)).astype(x.dtype)


def power_of_two(scale: jax.Array, border: ArrayLike) -> jax.Array:
    """Return positive scales rounded to powers of two, or as they are where `border` is 0.

    Args:
      scale: float32, any shape.
      border: The largest fraction in [1/2, 1) that is rounded down: 1/2 rounds up to the next power of two,
        the square root of 1/2 to the nearest exponent.

    >>> power_of_two(jnp.float32([0.7, 0.75, 1.0]), 0.5**0.5).tolist()
    [0.5, 1.0, 1.0]
    >>> power_of_two(jnp.float32([0.7, 0.75, 1.0]), 0.5).tolist()
    [1.0, 1.0, 1.0]
    """
    fraction, exponent = jnp.frexp(scale)
    power = jnp.ldexp(jnp.ones_like(scale), exponent - (fraction <= border).astype(exponent.dtype))
    return jnp.where(jnp.asarray(border) > 0, power, scale)


def grid_key(seed: int, path: str, count: jax.Array) -> jax.Array:
    """Return the key of the draw for the kernel at `path` after `count` observations (int32 scalar).

    All calls of a layer in one pass share the key.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())), count)
