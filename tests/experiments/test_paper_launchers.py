"""Rows as jobs of a scheduler: order, failures, held folders, and the same records as on one machine.

As in test_paper_schedule and test_paper_command, the rows are one-line programs.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from experiments.configs.study import preset
from experiments.paper import __main__ as paper
from experiments.paper import collect, rows
from experiments.paper.collect import held
from experiments.paper.rows import StudyRow, expected, study
from experiments.paper.schedule import command, detached_command, hand_over
from qt_jax import records
from qt_jax.errors import InvalidInput
from qt_jax.scheduler import Scheduler, open_queue

SMOKE = preset("smoke")
ROWS = {str(row): row for row in study(SMOKE)}
FLOAT, QUANT_TRIM, FINE_TUNED = (ROWS[f"digits {name} 0"] for name in ("float", "quant-trim", "fine-tuned"))
FINISH = """
import json, os, sys
from pathlib import Path
name, results, about, places = json.loads(sys.argv[1])
print("at work on", len(os.sched_getaffinity(0)), flush=True)
if name == "recommended":
    sys.exit("no such recipe")
folder = Path(results)
folder.mkdir(parents=True, exist_ok=True)
for file, lines in (("training.jsonl", [about]), ("deployment.jsonl", [about | place for place in places])):
    with open(folder / file, "a") as out:
        out.write("".join(json.dumps(line) + "\\n" for line in lines))
"""
"""Stands for a row: it leaves records that only `rows.done` reads."""


@pytest.fixture(autouse=True)
def signals_stay():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def hand(launcher: str, chosen: list[StudyRow], programs: dict[StudyRow, str], folder: Path, **changes):
    """Runs a program for each row, which finds the folder in `sys.argv[1]`; what was said goes in `said`."""
    with open_queue(Scheduler(launcher), folder / "jobs") as queue:
        arguments = {
            "slots": (None, None),
            "environment": os.environ,
            "done": lambda row: False,
            "watch": lambda progress: None,
            "say": lambda line: None,
        }
        return hand_over(
            queue,
            chosen,
            lambda row: [sys.executable, "-c", programs.get(row, "pass"), str(folder)],
            lambda row: folder / str(row) / "log.txt",
            **arguments | changes,
        )


@pytest.mark.parametrize("launcher", ["local", "debug"])
def test_a_failing_row_tells_its_last_lines_and_what_needs_it_is_not_submitted(launcher, tmp_path):
    programs = {FLOAT: "print('one', flush=True); raise SystemExit('out of luck')"}
    progress = hand(launcher, [FLOAT, FINE_TUNED, QUANT_TRIM], programs, tmp_path)
    assert list(progress.finished) == [QUANT_TRIM]
    assert progress.failed[FLOAT] == "exit status 1\none\nout of luck"
    assert progress.failed[FINE_TUNED] == "needs digits float 0, which has failed"
    assert not (tmp_path / str(FINE_TUNED)).exists()


def test_a_row_waits_for_its_source_and_gets_core_and_variables(tmp_path):
    core = max(os.sched_getaffinity(0))
    program = "import os, sys; open(sys.argv[1] + '/order', 'a').write({!r} + os.environ['WORD'])"
    programs = {FLOAT: program.format("float"), FINE_TUNED: program.format("fine-tuned")}
    programs[FINE_TUNED] += "; print(os.sched_getaffinity(0))"
    environment = {**os.environ, "WORD": "! "}
    hand("local", [FINE_TUNED, FLOAT], programs, tmp_path, environment=environment, slots=(core, None))
    assert (tmp_path / "order").read_text() == "float! fine-tuned! "
    assert (tmp_path / str(FINE_TUNED) / "log.txt").read_text().strip() == f"{{{core}}}"


def test_a_job_that_does_not_get_as_far_as_the_row_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)
    with open_queue(Scheduler("local"), tmp_path / "jobs") as queue:
        progress = hand_over(
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
    """Another launch works in the folder for so long."""
    folder.mkdir(parents=True)
    held = ExitStack()
    held.enter_context(collect.locked(folder))
    release = threading.Timer(seconds, held.close)
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

        progress = hand(
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


@pytest.fixture
def finishing(monkeypatch):
    """Rows that end at once; and no rendering of their records, which hold no numbers."""

    def made(row, runs, results, jobs):
        about = {"task": row.task.name, "method": row.name, "seed": row.seed, "digest": row.digest}
        about |= {"seconds": 60.0, "jobs": jobs}
        places = [dict(zip(("backend", "scheme", "runtime"), p, strict=True)) for p in sorted(expected(row))]
        told = json.dumps([row.name, str(rows.results_of(row.preset, results)), about, places])
        return [sys.executable, "-c", FINISH, told]

    monkeypatch.setattr(paper, "command", made)
    monkeypatch.setattr(paper, "detached_command", made)
    monkeypatch.setattr(paper, "rendered", lambda *_: [])


def launch(folder: Path, *flags: str) -> int:
    places = ("--runs", str(folder / "runs"), "--results", str(folder / "results"))
    return paper.main(["--preset", "smoke", *places, *flags])


def test_rows_that_stand_in_leave_the_records_of_one_machine(tmp_path, finishing, capsys):
    assert launch(tmp_path / "here", "--only", "main") == 1
    assert launch(tmp_path / "jobs", "--only", "main", "--launcher", "local") == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 4 and printed.count("no such recipe") == 4
    here, jobs = (
        {
            name: sorted(records.read(tmp_path / where / "results" / "paper-smoke" / name), key=str)
            for name in (rows.TRAINING, rows.DEPLOYMENT)
        }
        for where in ("here", "jobs")
    )
    assert here == jobs and len(here[rows.TRAINING]) == 4
    logs = sorted((tmp_path / "jobs" / "runs").rglob("log.txt"))
    assert len(logs) == 6 and all("at work on 1" in log.read_text() for log in logs)


def test_slurm_without_its_tools_is_refused_before_anything_is_forgotten(tmp_path, monkeypatch, capsys):
    stale = rows.folder_of(study(SMOKE)[0], tmp_path / "runs") / "metrics.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(tmp_path, "--launcher", "slurm", "--no-resume") == 2
    assert "no sbatch on PATH" in capsys.readouterr().err
    assert stale.exists()


def test_slurm_gets_all_rows_at_once_with_a_core_each_where_rows_are_bound():
    slurm = paper.Options(scheduler=Scheduler("slurm"))
    assert paper.shares(slurm, True, 7) == ([None] * 7, 1)
    wide = paper.Options(jobs=2, scheduler=Scheduler("slurm", job_cpus=4))
    assert paper.shares(wide, False, 7) == ([None] * 2, 4)
    with pytest.raises(InvalidInput, match="--jobs must be"):
        paper.shares(paper.Options(jobs=0, scheduler=Scheduler("slurm")), True, 7)


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
        hand("local", [FLOAT], program, tmp_path, watch=interrupt)
    _, alive = psutil.wait_procs(seen, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_real_rows_leave_the_records_of_one_machine(tmp_path):
    """python -m pytest -m slow tests/experiments/test_paper_launchers.py (about three minutes)"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = {}
    for launcher in ("here", "local"):
        results = tmp_path / launcher / "results"
        flags = ("--preset", "smoke", "--methods", "fine-tuned", "--launcher", launcher)
        places = ("--runs", str(tmp_path / launcher / "runs"), "--results", str(results))
        line = [sys.executable, "-m", "experiments.paper", *flags, *places]
        ended = subprocess.run(
            line, cwd=Path(paper.__file__).parents[2], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ended.stderr == ""
        deployed = records.read(results / "paper-smoke" / rows.DEPLOYMENT)
        timing = (
            "seconds",
            "date",
            "latency_ms_p50",
            "latency_ms_p99",
            "throughput_ips",
            "cost",
            "energy_mj",
        )
        kept = ({n: v for n, v in record.items() if n not in timing} for record in deployed)
        found[launcher] = sorted(kept, key=str)
    assert found["here"] == found["local"]
    assert {record["method"] for record in found["here"]} == {"float", "fine-tuned"}
