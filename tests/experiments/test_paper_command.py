"""Check `python -m experiments.paper`: its flags, what it runs here and through a scheduler, and a kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qt_jax as qt
from experiments.configs.study import preset
from experiments.paper import __main__ as paper
from experiments.paper import rows
from experiments.paper.rows import DESCRIPTION, expected, folder_of, study
from qt_jax import records
from qt_jax.scheduler import Scheduler

SMOKE = preset("smoke")
ROWS = study(SMOKE)
ROOT = Path(paper.__file__).parents[2]

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
"""Stand in for a row: leave records that only `rows.done` reads."""


@pytest.fixture(autouse=True)
def signals_stay():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def finishing(monkeypatch):
    """Make rows end at once, and skip rendering their records, which hold no numbers."""
    begun = []

    def command(row, runs, results, jobs):
        begun.append(str(row))
        about = {"task": row.task.name, "method": row.name, "seed": row.seed, "digest": row.digest}
        about |= {"seconds": 60.0, "jobs": jobs}
        places = [dict(zip(("backend", "scheme", "runtime"), p, strict=True)) for p in sorted(expected(row))]
        told = json.dumps([row.name, str(rows.results_of(row.preset, results)), about, places])
        return [sys.executable, "-c", FINISH, told]

    monkeypatch.setattr(paper, "command", command)
    monkeypatch.setattr(paper, "detached_command", command)
    monkeypatch.setattr(paper, "rendered", lambda *_: None)
    return begun


def launch(folder: Path, *flags: str) -> int:
    return paper.main(
        ["--preset", "smoke", "--runs", str(folder / "runs"), "--results", str(folder / "results"), *flags]
    )


def test_failed_rows_are_reported_and_tried_again_the_next_time(tmp_path, finishing, capsys):
    assert launch(tmp_path, "--jobs", "1", "--only", "main") == 1
    printed = capsys.readouterr().out
    assert printed.startswith("6 rows, 0 done; 1 at a time\n")
    assert printed.count("FAILED") == 2 and "no such recipe" in printed and "log.txt" in printed
    assert "digits float 1" in printed and not set("\r\x1b") & set(printed)
    assert finishing == [f"digits {n} {s}" for s in (0, 1) for n in ("float", "quant-trim", "recommended")]
    finishing.clear()
    assert launch(tmp_path, "--jobs", "1", "--only", "main") == 1
    assert finishing == ["digits recommended 0", "digits recommended 1"]
    assert "6 rows, 4 done" in capsys.readouterr().out
    assert launch(tmp_path, "--list") == 0
    assert "12 rows: 4 done, 2 begun, 6 pending; 0.07 hours" in capsys.readouterr().out


def test_done_rows_are_not_begun_again_unless_their_network_is_needed(tmp_path, finishing, capsys):
    assert launch(tmp_path, "--methods", "float") == 0
    finishing.clear()
    assert launch(tmp_path, "--methods", "float") == 0
    assert finishing == []
    every = {str(row): row for row in ROWS}
    kept = folder_of(every["digits float 0"], tmp_path / "runs")
    (kept / DESCRIPTION).write_text("{}")
    assert launch(tmp_path, "--methods", "fine-tuned") == 0
    assert sorted(finishing) == ["digits fine-tuned 0", "digits fine-tuned 1", "digits float 1"]


def test_beginning_anew_forgets_what_was_begun(tmp_path, finishing):
    row = ROWS[0]
    stale = folder_of(row, tmp_path / "runs") / "metrics.jsonl"
    for flags, there in (((), True), (("--no-resume",), False)):
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.write_text("{}\n")
        (tmp_path / "results" / "paper-smoke" / rows.TRAINING).unlink(missing_ok=True)
        launch(tmp_path, "--methods", "float", *flags)
        assert stale.exists() == there


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--preset", "tpu"], "choose one of cpu, converged, accelerator"),
        (["--only", "nothing"], "--only nothing is unknown here"),
        (["--jobs", "0"], "--jobs must be from 1 to"),
        (["--render"], "holds no records of finished rows"),
    ],
)
def test_wrong_input_is_refused(flags, says, tmp_path, capsys):
    assert launch(tmp_path, *flags) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_cores_are_dealt_to_pinned_rows_only():
    cores = sorted(os.sched_getaffinity(0))
    assert paper.slots_of(None, pinned=True) == cores
    assert paper.slots_of(1, pinned=True) == cores[:1]
    assert paper.slots_of(None, pinned=False) == [None]
    assert paper.slots_of(3, pinned=False) == [None] * 3
    with pytest.raises(qt.InvalidInput, match="--jobs must be"):
        paper.slots_of(len(cores) + 1, pinned=True)


def test_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert launch(tmp_path) == 143
    assert "the same command goes on from here" in capsys.readouterr().err


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
    with pytest.raises(qt.InvalidInput, match="--jobs must be"):
        paper.shares(paper.Options(jobs=0, scheduler=Scheduler("slurm")), True, 7)


def start(folder: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    flags = ("--preset", "smoke", "--methods", "quant-trim", "--jobs", "1")
    places = ("--runs", str(folder / "runs"), "--results", str(folder / "results"))
    command = [sys.executable, "-m", "experiments.paper", *flags, *places]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_killed_driver_goes_on_where_it_was(tmp_path):
    """Run `python -m pytest -m slow tests/experiments/test_paper_command.py` (three minutes on two cores).

    After one Ctrl-C and one SIGKILL, each in the middle of a row, the results are those of a run left alone.
    """
    whole = start(tmp_path / "whole")
    printed, _ = whole.communicate()
    assert whole.returncode == 0, printed
    for number in (signal.SIGINT, signal.SIGKILL):
        process = start(tmp_path / "killed")
        log = _log_that_speaks(tmp_path / "killed" / "runs")
        process.send_signal(number)
        printed, _ = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), printed
        assert "Traceback" not in printed, log
    last = start(tmp_path / "killed")
    printed, _ = last.communicate()
    assert last.returncode == 0, printed

    def numbers(folder: Path) -> list[tuple]:
        found = records.read(folder / "results" / "paper-smoke" / rows.DEPLOYMENT)
        return sorted((r["seed"], r["scheme"], r["checkpoint"], r["top1"], r["nll"]) for r in found)

    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert len(numbers(tmp_path / "whole")) == 8


def _log_that_speaks(runs: Path) -> str:
    """Wait until a row has trained an epoch, and return its log."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for path in runs.rglob("log.txt"):
            with contextlib.suppress(OSError):
                if "epoch 1/" in (text := path.read_text()):
                    return text
        time.sleep(0.1)
    raise AssertionError("no row has trained an epoch")


@pytest.mark.slow
def test_real_rows_leave_the_records_of_one_machine(tmp_path):
    """Run `python -m pytest -m slow tests/experiments/test_paper_command.py` (about three minutes more)."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = {}
    for launcher in ("here", "local"):
        results = tmp_path / launcher / "results"
        flags = ("--preset", "smoke", "--methods", "fine-tuned", "--launcher", launcher)
        places = ("--runs", str(tmp_path / launcher / "runs"), "--results", str(results))
        line = [sys.executable, "-m", "experiments.paper", *flags, *places]
        ended = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
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
