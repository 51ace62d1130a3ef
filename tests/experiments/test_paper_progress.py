"""Check the estimate of the time that is left. test_paper_row checks the table of `--list` with real rows."""

import time

import pytest

from experiments.configs.study import preset
from experiments.paper.launch import Progress, Running
from experiments.paper.progress import time_left
from experiments.paper.rows import study

ROWS = {str(row): row for row in study(preset("smoke"))}
FLOAT, QUANT_TRIM, FINE_TUNED, CLIPS = (
    ROWS[f"digits {name} 0"] for name in ("float", "quant-trim", "fine-tuned", "clips")
)


def test_time_left_is_that_of_rows_of_the_same_task():
    now = time.monotonic()
    nothing = Progress([FLOAT, QUANT_TRIM])
    assert time_left(nothing, {}, 1, now) is None
    assert time_left(nothing, {CLIPS: 10.0, FINE_TUNED: 20.0}, 1, now) == pytest.approx(30.0)
    assert time_left(nothing, {CLIPS: 10.0, FINE_TUNED: 20.0}, 2, now) == pytest.approx(15.0)
    halfway = Progress([], [Running(FLOAT, None, now - 4.0, 0)], {CLIPS: 10.0})
    assert time_left(halfway, {}, 2, now) == pytest.approx(6.0)
