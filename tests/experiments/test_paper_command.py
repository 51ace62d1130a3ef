"""`python -m experiments.paper`: what it is told, what it runs, and that a kill costs it nothing."""

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
from experiments.paper.networks import DESCRIPTION
from experiments.paper.rows import expected, folder_of, study
from qt_jax import records

SMOKE = preset("smoke")
ROWS = study(SMOKE)
ROOT = Path(paper.__file__).parents[2]

FINISH = """
import json, sys
from pathlib import Path
name, results, about, places = json.loads(sys.argv[1])
print("at work", flush=True)
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


@pytest.fixture
def finishing(monkeypatch):
    """Rows that end at once; and no rendering of their records, which hold no numbers."""
    begun = []

    def command(row, runs, results, jobs):
        begun.append(str(row))
        about = {"task": row.task.name, "method": row.name, "seed": row.seed, "digest": row.digest}
        about |= {"seconds": 60.0}
        places = [dict(zip(("backend", "scheme", "runtime"), p, strict=True)) for p in expected(row)]
        told = json.dumps([row.name, str(rows.results_of(row.preset, results)), about, places])
        return [sys.executable, "-c", FINISH, told]

    monkeypatch.setattr(paper, "command", command)
    monkeypatch.setattr(paper, "rendered", lambda *_: [])
    return begun


def launch(folder: Path, *flags: str) -> int:
    return paper.main(
        ["--preset", "smoke", "--runs", str(folder / "runs"), "--results", str(folder / "results"), *flags]
    )


def test_failed_rows_are_told_and_tried_again_the_next_time(tmp_path, finishing, capsys):
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
        (["--preset", "tpu"], "choose one of cpu, accelerator, smoke"),
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
    assert paper.places(None, pinned=True) == cores
    assert paper.places(1, pinned=True) == cores[:1]
    assert paper.places(None, pinned=False) == [None]
    assert paper.places(3, pinned=False) == [None] * 3
    with pytest.raises(qt.InvalidInput, match="--jobs must be"):
        paper.places(len(cores) + 1, pinned=True)


def test_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert launch(tmp_path) == 143
    assert "the same command goes on from here" in capsys.readouterr().err


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
    """python -m pytest -m slow tests/experiments/test_paper_command.py (about three minutes on two cores)

    Ctrl-C once and SIGKILL once, each in the middle of a row; the results are those of a run left alone.
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
    """Waits until a row has trained an epoch; returns its log."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for path in runs.rglob("log.txt"):
            with contextlib.suppress(OSError):
                if "epoch 1/" in (text := path.read_text()):
                    return text
        time.sleep(0.1)
    raise AssertionError("no row has trained an epoch")
