"""Compare outputs of a network with those of the float network: SQNR, cosine and largest error.

Each output is compared by itself, over all samples and for the worst one: SQNR = 10 log10(sum r^2 / sum (r -
x)^2) in dB, cosine = sum r x / sqrt(sum r^2 sum x^2), and the largest |r - x|, where r is the float network's
output. Outputs of integers have the share of equal elements instead of an SQNR. Everything is computed in
float64, a few samples at a time.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qt_jax.records import Record

Output = np.ndarray | Sequence[np.ndarray]
"""One output of all samples: an array `(n, ...)`, or one array per sample where their shapes differ."""

Outputs = Mapping[str, Output]
"""Outputs by name."""

CHUNK_ELEMENTS = 2**22
"""Number of an output's elements that are compared together: 32 MiB in float64, and a few times that in
all."""

LEAST_DB = -300.0
"""SQNR where the reference is zero and the output is not."""

SMALL = 1e-3
"""Ratio of mean squares below which a slice of an output is small beside the largest: 30 dB."""

APART = 1e-2
"""Ratio of mean squares by which small slices are set apart from the others: 20 dB."""

MOST_SLICES = 256
"""Number of slices along an axis up to which they are looked at one by one."""


def count_broken(output: Output) -> int:
    """Return the number of samples of which a value is not finite.

    >>> count_broken(np.array([[1.0, np.nan], [0.0, 0.0]]))
    1
    """
    if not isinstance(output, np.ndarray):
        return sum(not np.isfinite(one).all() for one in output if one.dtype.kind == "f")
    if output.dtype.kind != "f":
        return 0
    return sum(
        int(np.sum(~np.isfinite(output[part].reshape(len(output[part]), -1)).all(axis=1)))
        for part in row_slices(output)
    )


def row_slices(output: np.ndarray) -> list[slice]:
    """Slice samples so that at most `CHUNK_ELEMENTS` elements are in a slice, but one sample at least."""
    size = max(1, CHUNK_ELEMENTS // max(1, math.prod(output.shape[1:])))
    return [slice(start, start + size) for start in range(0, len(output), size)]


def fidelity(reference: Outputs, outputs: Outputs) -> list[Record]:
    """Compare outputs with those of the float network, each by itself.

    Args:
      reference: Outputs of the float network.
      outputs: Outputs of the same names, samples and shapes.

    Returns:
      One record per output: output, shape (of one sample; None if it varies), dtype, sqnr_db, cosine,
      largest_error, largest_value (of the reference), mse, equal, other_shape (the number of samples of
      another shape, which are left out), worst_image with index, sqnr_db, cosine, largest_error and equal,
      and small_part with axis, slices and the same numbers, if `small_part` finds one. An SQNR is None where
      nothing differs, and for integers.

    >>> [found] = fidelity({"y": np.array([[3.0, 4.0]])}, {"y": np.array([[3.0, 4.5]])})
    >>> round(found["sqnr_db"], 6), found["largest_error"], found["worst_image"]["index"]
    (20.0, 0.5, 0)
    """
    return [_compared(name, reference[name], outputs[name]) for name in reference]


def _compared(name: str, reference: Output, output: Output) -> Record:
    integers = _dtype(reference).kind != "f"
    sums = np.concatenate([np.zeros((0, 7)), *_sums(reference, output)])
    same = ~np.isnan(sums[:, 0])
    places = np.flatnonzero(same)
    sums = sums[same]
    if not len(sums):
        unknown = dict.fromkeys(("sqnr_db", "cosine", "largest_error", "mse", "equal"))
        about = {"output": name, "shape": None, "dtype": str(_dtype(reference)), "other_shape": len(same)}
        worst_image = dict.fromkeys(("index", "sqnr_db", "cosine", "largest_error", "equal"))
        largest = _largest(reference)
        return about | unknown | {"largest_value": largest, "worst_image": worst_image, "small_part": None}
    totals = sums.sum(axis=0)
    equal = float(totals[5] / totals[6]) if integers and totals[6] else None
    shares = sums[:, 5] / np.maximum(sums[:, 6], 1)
    ratios = np.array([_ratio(signal, noise) for signal, noise, *_ in sums])
    worst = int(np.argmin(shares if integers else ratios))
    return {
        "output": name,
        "shape": list(reference.shape[1:]) if isinstance(reference, np.ndarray) else None,
        "dtype": str(_dtype(reference)),
        **_numbers(totals, sums[:, 4].max(), integers),
        "largest_value": _largest(reference),
        "mse": float(totals[1] / totals[6]) if totals[6] else 0.0,
        "equal": equal,
        "other_shape": int(np.sum(~same)),
        "worst_image": {
            "index": int(places[worst]),
            **_numbers(sums[worst], sums[worst, 4], integers),
            "equal": float(shares[worst]) if integers else None,
        },
        "small_part": _small_ratio(reference, output),
    }


def small_part(output: Output) -> tuple[int, list[int]] | None:
    """Find the slices of an output that are far smaller than its others, such as the scores beside boxes.

    An SQNR over such an output is that of its large slices, and says nothing of the small ones. Slices along
    the second and the last axis are looked at, where there are 2 to `MOST_SLICES`. Small are those whose mean
    square is below `SMALL` times the largest. They must be neighbours, and the largest of them below `APART`
    times the smallest of the others: the quiet units of a hidden state are no part of its own.

    Args:
      output: An output of the float network. Only arrays of floats with three axes or more are looked at.

    Returns:
      The axis (of the whole array, samples first) and the slices; None if there are none.

    >>> boxes = np.full((2, 3, 5), 100.0); boxes[:, 2] = 0.1
    >>> small_part(boxes)
    (1, [2])
    """
    if not isinstance(output, np.ndarray) or output.dtype.kind != "f" or output.ndim < 3:
        return None
    for axis in dict.fromkeys((1, output.ndim - 1)):
        if not 2 <= output.shape[axis] <= MOST_SLICES:
            continue
        power = np.sum([_by_slice(output[part], axis) for part in row_slices(output)], axis=0)
        quiet = power < SMALL * np.max(power)
        small = np.flatnonzero(quiet)
        together = len(small) > 0 and small[-1] - small[0] + 1 == len(small)
        if together and 0 < power[quiet].max() < APART * power[~quiet].min():
            return axis, small.tolist()
    return None


def _by_slice(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the sum of squares of each slice along an axis."""
    others = tuple(place for place in range(values.ndim) if place != axis)
    return np.sum(np.square(values, dtype=np.float64), axis=others)


def _small_ratio(reference: Output, output: Output) -> Record | None:
    """Return axis, slices and SQNR of the small part of an output."""
    found = small_part(reference)
    if found is None or not isinstance(reference, np.ndarray) or not isinstance(output, np.ndarray):
        return None
    axis, slices = found
    pairs = (
        (np.take(reference[part], slices, axis), np.take(output[part], slices, axis))
        for part in row_slices(reference)
    )
    sums = np.concatenate([_part_sums(r, x) for r, x in pairs])
    ratios = [_ratio(signal, noise) for signal, noise, *_ in sums]
    worst = int(np.argmin(ratios))
    whole = {"axis": axis, "slices": slices, **_numbers(sums.sum(axis=0), sums[:, 4].max(), integers=False)}
    return whole | {"worst_image": {"index": worst, **_numbers(sums[worst], sums[worst, 4], integers=False)}}


def _dtype(output: Output) -> np.dtype:
    return output.dtype if isinstance(output, np.ndarray) else output[0].dtype


def _largest(output: Output) -> float:
    arrays = [output[part] for part in row_slices(output)] if isinstance(output, np.ndarray) else output
    return max((float(np.abs(one.astype(np.float64)).max()) for one in arrays if one.size), default=0.0)


def _numbers(sums: np.ndarray, largest: float, integers: bool) -> Record:
    """Return SQNR, cosine and largest error from sums of r^2, (r - x)^2, r x and x^2."""
    signal, noise, product, other = map(float, sums[:4])
    ratio = _ratio(signal, noise)
    length = math.sqrt(signal) * math.sqrt(other)
    return {
        "sqnr_db": None if integers or ratio == math.inf else max(ratio, LEAST_DB),
        "cosine": None if integers else product / length if length > 0 else None if noise else 1.0,
        "largest_error": float(largest),
    }


def _ratio(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf


def _sums(reference: Output, output: Output) -> list[np.ndarray]:
    """Return, for each sample, sums of r^2, (r - x)^2, r x, x^2, the largest |r - x|, equal and all elements.

    A sample whose shapes differ has a row of NaN.
    """
    if isinstance(reference, np.ndarray) and isinstance(output, np.ndarray):
        return [_part_sums(reference[part], output[part]) for part in row_slices(reference)]
    pairs = zip(reference, output, strict=True)
    return [_part_sums(r[None], x[None]) if r.shape == x.shape else np.full((1, 7), np.nan) for r, x in pairs]


def _part_sums(reference: np.ndarray, output: np.ndarray) -> np.ndarray:
    r, x = (array.reshape(len(array), -1).astype(np.float64) for array in (reference, output))
    error = r - x
    sums = [(r * r).sum(1), (error * error).sum(1), (r * x).sum(1), (x * x).sum(1)]
    largest = np.abs(error).max(axis=1) if r.shape[1] else np.zeros(len(r))
    return np.stack([*sums, largest, (r == x).sum(1), np.full(len(r), r.shape[1])], axis=1)
