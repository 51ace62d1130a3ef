"""Means over seeds and their 95 % intervals, of single methods and of paired differences."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over `n` seeds; `half` is half the width of its interval, None for a single seed."""

    mean: float
    half: float | None
    n: int

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.half is not None and self.mean > self.half


def interval(values: Iterable[float], level: float = LEVEL) -> Estimate | None:
    """The mean of independent values and its t-interval: mean ± t_{n-1, (1 + level) / 2} s / √n.

    None where there are no values.

    >>> found = interval([1.0, 3.0])
    >>> found.mean, round(found.half, 3)
    (2.0, 12.706)
    """
    array = np.asarray(list(values), np.float64)
    n = len(array)
    if n == 0:
        return None
    if n == 1:
        return Estimate(float(array[0]), None, 1)
    half = stats.t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / np.sqrt(n)
    return Estimate(float(array.mean()), float(half), n)


def paired(ahead: Mapping[int, float], behind: Mapping[int, float], level: float = LEVEL) -> Estimate | None:
    """The interval of the mean difference over the seeds that both have.

    >>> paired({0: 5.0, 1: 7.0, 2: 9.0}, {0: 4.0, 1: 6.0})
    Estimate(mean=1.0, half=0.0, n=2)
    """
    return interval((ahead[seed] - behind[seed] for seed in ahead if seed in behind), level)


def written(estimate: Estimate | None, scale: float = 1.0, digits: int = 2, signed: bool = False) -> str:
    """`mean ± half` as text, or the mean alone for a single seed, or a dash.

    >>> written(Estimate(0.8512, 0.0034, 3), 100), written(Estimate(-0.01, None, 1), 100, signed=True)
    ('85.12 ± 0.34', '−1.00')
    """
    if estimate is None:
        return "–"
    mean = round(scale * estimate.mean, digits) + 0.0  # no negative zero
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}".replace("-", "−")
    return text if estimate.half is None else f"{text} ± {scale * estimate.half:.{digits}f}"
