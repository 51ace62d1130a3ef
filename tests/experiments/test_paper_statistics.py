"""Intervals against SciPy's own and a printed t table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.paper.evidence import Estimate, interval, paired, written

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@given(VALUES)
def test_interval_is_that_of_scipy(values):
    mean, half, n = interval(values)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95) if np.ptp(values) > 1e-6 else None
    assert n == len(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    if theirs is not None:
        assert (mean - half, mean + half) == pytest.approx(tuple(theirs), abs=1e-6)


def test_three_seeds_by_hand():
    """t_{2, 0.975} = 4.303 (any printed table); s of 1, 2, 3 is 1."""
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)


def test_few_values():
    assert interval([]) is None
    assert interval([0.5]) == Estimate(0.5, None, 1)


def test_pairing_takes_the_spread_of_the_seeds_away():
    ahead, behind = {0: 10.0, 1: 50.0, 2: 90.0}, {2: 89.0, 1: 49.0, 0: 9.0, 3: 1.0}
    found = paired(ahead, behind)
    assert found == Estimate(1.0, 0.0, 3) and found.positive
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert not paired({0: 2.0}, {0: 1.0}).positive


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (None, "–"),
        (Estimate(0.5, 0.01, 3), "+50.00 ± 1.00"),
        (Estimate(-0.000001, None, 1), "0.00"),
        (Estimate(-0.5, 0.0, 2), "−50.00 ± 0.00"),
    ],
)
def test_written(estimate, text):
    assert written(estimate, 100, signed=True) == text
