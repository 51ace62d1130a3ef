"""Check rows as processes and as jobs of a scheduler: order, failures, cores, held folders, interruption.

The rows here are one-line programs.
"""

import os
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from experiments.configs.study import preset
from experiments.paper import rows
from experiments.paper.launch import Progress, command, detached_command, run_rows, submit_rows
from experiments.paper.rows import StudyRow, held, study
from qt_jax.scheduler import Scheduler, open_queue

SMOKE = preset("smoke")
ROWS = {str(row): row for row in study(SMOKE)}
FLOAT, QUANT_TRIM, FINE_TUNED, CLIPS = (
    ROWS[f"digits {name} 0"] for name in ("float", "quant-trim", "fine-tuned", "clips")
)


@pytest.fixture(autouse=True)
def signals_stay():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(chosen, programs: dict[StudyRow, str], folder: Path, slots=(None,), watch=lambda progress: None):
    """Run a program for each row. It finds the folder in `sys.argv[1]`."""
    return run_rows(
        chosen,
        lambda row: [sys.executable, "-c", programs.get(row, "pass"), str(folder)],
        lambda row: folder / f"{row}.log",
        slots=slots,
        environment=os.environ,
        watch=watch,
        interval=0.02,
    )


def test_a_failing_row_stops_no_other_and_is_reported(tmp_path):
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


def submit(launcher: str, chosen: list[StudyRow], programs: dict[StudyRow, str], folder: Path, **changes):
    """Submit a program for each row. It finds the folder in `sys.argv[1]`."""
    with open_queue(Scheduler(launcher), folder / "jobs") as queue:
        arguments = {
            "slots": (None, None),
            "environment": os.environ,
            "done": lambda row: False,
            "watch": lambda progress: None,
            "say": lambda line: None,
        }
        return submit_rows(
            queue,
            chosen,
            lambda row: [sys.executable, "-c", programs.get(row, "pass"), str(folder)],
            lambda row: folder / str(row) / "log.txt",
            **arguments | changes,
        )


@pytest.mark.parametrize("launcher", ["local", "debug"])
def test_the_last_lines_of_a_failing_row_are_reported_and_what_needs_it_is_not_submitted(launcher, tmp_path):
    programs = {FLOAT: "print('one', flush=True); raise SystemExit('out of luck')"}
    progress = submit(launcher, [FLOAT, FINE_TUNED, QUANT_TRIM], programs, tmp_path)
    assert list(progress.finished) == [QUANT_TRIM]
    assert progress.failed[FLOAT] == "exit status 1\none\nout of luck"
    assert progress.failed[FINE_TUNED] == "needs digits float 0, which has failed"
    assert not (tmp_path / str(FINE_TUNED)).exists()


def test_a_job_waits_for_its_source_and_gets_core_and_variables(tmp_path):
    core = max(os.sched_getaffinity(0))
    program = "import os, sys; open(sys.argv[1] + '/order', 'a').write({!r} + os.environ['WORD'])"
    programs = {FLOAT: program.format("float"), FINE_TUNED: program.format("fine-tuned")}
    programs[FINE_TUNED] += "; print(os.sched_getaffinity(0))"
    environment = {**os.environ, "WORD": "! "}
    submit("local", [FINE_TUNED, FLOAT], programs, tmp_path, environment=environment, slots=(core, None))
    assert (tmp_path / "order").read_text() == "float! fine-tuned! "
    assert (tmp_path / str(FINE_TUNED) / "log.txt").read_text().strip() == f"{{{core}}}"


def test_a_job_that_does_not_get_as_far_as_the_row_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)
    with open_queue(Scheduler("local"), tmp_path / "jobs") as queue:
        progress = submit_rows(
            queue,
            [FLOAT],
            lambda row: ["/no/such/program"],
            lambda row: tmp_path / "log.txt",
            slots=(None,),
            environment=os.environ,
            done=lambda row: False,
            watch=lambda progress: None,
            say=print,
        )
    assert "No such file or directory: '/no/such/program'" in progress.failed[FLOAT]


@contextmanager
def held_for(folder: Path, seconds: float):
    """Hold the lock of a folder for so many seconds, as another launch would."""
    folder.mkdir(parents=True)
    lock = ExitStack()
    lock.enter_context(rows.locked(folder))
    release = threading.Timer(seconds, lock.close)
    release.start()
    yield
    release.join()


@pytest.mark.parametrize("complete", [True, False])
def test_a_row_that_another_process_works_on_is_submitted_only_if_it_is_not_done_then(complete, tmp_path):
    said, marks = [], tmp_path / "marks"
    programs = {FLOAT: "import sys; open(sys.argv[1] + '/marks', 'a').write('x')"}
    with held_for(tmp_path / str(FLOAT), 1.5):
        watched = []

        def watch(progress):
            watched.append((held(tmp_path / str(FLOAT)), marks.exists()))

        progress = submit(
            "local", [FLOAT], programs, tmp_path, done=lambda row: complete, say=said.append, watch=watch
        )
    assert list(progress.finished) == [FLOAT]
    assert marks.exists() == (not complete)
    assert (True, True) not in watched and (True, False) in watched
    assert said == [
        "digits float 0: another process works on it; submitted only if it is not done after that"
    ]


def test_the_command_of_a_job_watches_no_parent():
    plain = command(FLOAT, rows.RESULTS, rows.RESULTS, 1)
    assert detached_command(FLOAT, rows.RESULTS, rows.RESULTS, 1) == plain[: plain.index("--parent")]


def test_an_interruption_cancels_the_rows_jobs(tmp_path):
    seen: list[psutil.Process] = []

    def interrupt(progress) -> None:
        for running in progress.running:
            family = psutil.Process(int(running.process.job.handle.job_id)).children(recursive=True)
            if len(family) >= 2 and (tmp_path / str(FLOAT) / "log.txt").read_text():
                seen.extend(family)
                raise KeyboardInterrupt

    program = {FLOAT: "import time; print('up', flush=True); time.sleep(60)"}
    with pytest.raises(KeyboardInterrupt):
        submit("local", [FLOAT], program, tmp_path, watch=interrupt)
    _, alive = psutil.wait_procs(seen, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
