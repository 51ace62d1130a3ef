"""Rows as processes: order, failures, cores, interruption. The rows here are one-line programs."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from experiments.configs.study import preset
from experiments.paper.rows import StudyRow, study
from experiments.paper.schedule import Progress, Running, run_rows, time_left

SMOKE = preset("smoke")
ROWS = {str(row): row for row in study(SMOKE)}
FLOAT, QUANT_TRIM, FINE_TUNED, CLIPS = (
    ROWS[f"digits {name} 0"] for name in ("float", "quant-trim", "fine-tuned", "clips")
)


def run(rows, programs: dict[StudyRow, str], folder: Path, slots=(None,), watch=lambda progress: None):
    """Runs a program for each row, which finds the folder in `sys.argv[1]`."""
    return run_rows(
        rows,
        lambda row: [sys.executable, "-c", programs.get(row, "pass"), str(folder)],
        lambda row: folder / f"{row}.log",
        slots=slots,
        environment=os.environ,
        watch=watch,
        interval=0.02,
    )


def test_a_failing_row_stops_no_other_and_is_told(tmp_path):
    programs = {FLOAT: "print('one'); print('two'); raise SystemExit('out of luck')"}
    progress = run([FLOAT, QUANT_TRIM], programs, tmp_path)
    assert list(progress.finished) == [QUANT_TRIM]
    assert progress.failed[FLOAT].startswith("exit status 1")
    assert set(progress.failed[FLOAT].splitlines()) >= {"one", "two", "out of luck"}


def test_what_needs_a_failed_row_is_not_begun(tmp_path):
    progress = run([FLOAT, FINE_TUNED, CLIPS], {FLOAT: "raise SystemExit(3)"}, tmp_path)
    assert progress.failed[FINE_TUNED] == "needs digits float 0, which has failed"
    assert list(progress.finished) == [CLIPS]
    assert not (tmp_path / f"{FINE_TUNED}.log").exists()


def test_a_row_waits_for_its_source_while_others_overtake(tmp_path):
    program = "import pathlib, sys, time; {}; open(sys.argv[1] + '/order', 'a').write({!r})"
    programs = {
        FLOAT: program.format("time.sleep(0.6)", "float "),
        FINE_TUNED: program.format("pass", "fine-tuned "),
        QUANT_TRIM: program.format("pass", "quant-trim "),
    }
    run([FLOAT, FINE_TUNED, QUANT_TRIM], programs, tmp_path, slots=(None, None))
    assert (tmp_path / "order").read_text().split() == ["quant-trim", "float", "fine-tuned"]


def test_rows_are_bound_to_the_cores_of_their_slots(tmp_path):
    core = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    run([FLOAT], {FLOAT: "import os; print(os.sched_getaffinity(0))"}, tmp_path, slots=(core,))
    assert (tmp_path / f"{FLOAT}.log").read_text().strip() == f"{{{core}}}"
    assert os.sched_getaffinity(0) == before


def test_interruption_ends_children_and_grandchildren(tmp_path):
    sleeper = f"{sys.executable} -c 'import time; time.sleep(60)'"
    programs = {FLOAT: f"import subprocess; print('up', flush=True); subprocess.run({sleeper!r}, shell=True)"}
    seen: list[psutil.Process] = []

    def interrupt(progress: Progress) -> None:
        for running in progress.running:
            family = psutil.Process(running.process.pid).children(recursive=True)
            if family:
                seen.extend([psutil.Process(running.process.pid), *family])
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([FLOAT, QUANT_TRIM], programs, tmp_path, watch=interrupt)
    assert len(seen) >= 2
    _, alive = psutil.wait_procs(seen, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_time_left_is_that_of_rows_of_the_same_task():
    now = time.monotonic()
    nothing = Progress([FLOAT, QUANT_TRIM])
    assert time_left(nothing, {}, 1, now) is None
    assert time_left(nothing, {CLIPS: 10.0, FINE_TUNED: 20.0}, 1, now) == pytest.approx(30.0)
    assert time_left(nothing, {CLIPS: 10.0, FINE_TUNED: 20.0}, 2, now) == pytest.approx(15.0)
    halfway = Progress([], [Running(FLOAT, None, now - 4.0, 0)], {CLIPS: 10.0})
    assert time_left(halfway, {}, 2, now) == pytest.approx(6.0)
