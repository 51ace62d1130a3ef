"""Test steps in worker processes and in the jobs of a scheduler, which give the same records."""

import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx.parser
import psutil
import pytest
from submitit.core.core import Job as SubmititJob

from qt_jax import records
from qt_jax.backends import BACKENDS, environments, evaluate, steps
from qt_jax.backends.steps import Limits
from qt_jax.errors import InvalidInput
from qt_jax.scheduler import Scheduler, open_queue

MODEL = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 6] input) => (float[batch, 4] logits) {
        first = Constant<value_ints = [0, 1, 2, 3]>()
        logits = Gather<axis = 1>(input, first)
    }""")
IMAGES = np.random.default_rng(0).normal(0, 1, (30, 6)).astype(np.float32)
CLOCK = ("seconds", "date", "latency_ms_p50", "latency_ms_p99", "throughput_ips", "cost")
"""Keys of a record that differ from run to run."""


@pytest.fixture
def fake(monkeypatch):
    spec = importlib.util.spec_from_file_location("fake_vendor", Path(__file__).with_name("fake_vendor.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_vendor", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(BACKENDS, "fake", module.BACKEND)
    return module.BACKEND


def run(folder: Path, **changes) -> list[records.Record]:
    test_set = (IMAGES, np.arange(30) % 4)
    return evaluate(MODEL, IMAGES[:9], test_set, folder=folder, identity={"seed": 0}, **changes)


def settled(rows: list[records.Record]) -> list[records.Record]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def test_two_workers_at_a_time_do_not_wait_for_each_other(tmp_path):
    """Run `hang` twice. The limit stops both at about the same time."""
    path = Path(__file__).with_name("fake_vendor.py")
    job = {
        "step": "compile",
        "backend_file": str(path),
        "scheme": "hang",
        "source": "x",
        "calibration": {"input": str(tmp_path / "c.npy")},
        "calibration_size": 9,
        "compiled": "./compiled",
        "float_layers": [],
    }
    np.save(tmp_path / "c.npy", IMAGES[:9])
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda n: steps.perform(tmp_path / n, None, job, Limits(5)), ("a", "b")))
    assert [answer.status for answer in answers] == ["timeout"] * 2
    assert time.monotonic() - started < 9.5


def test_an_interpreter_that_does_not_start_is_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "interpreter", lambda _: Path("no-such-python"))
    answer = steps.perform(tmp_path / "step", None, {"step": "run"}, Limits())
    assert answer.status == "crashed" and "could not start" in answer.reason


@pytest.mark.parametrize(
    ("launcher", "timed"), [("local", {}), ("debug", {"int8-pt-minmax": "optimized"})], ids=("local", "debug")
)
def test_records_are_those_of_a_run_without_a_scheduler(launcher, timed, fake, tmp_path):
    chosen = {"backends": ["onnxruntime", "fake"], "schemes": ["exact", "refused", *timed]}
    chosen |= {"runtimes": ["simulator", *timed.values()]}
    plain = run(tmp_path / "plain", jobs=2, **chosen)
    through = run(
        tmp_path / "through", jobs=2 if launcher == "local" else 1, **chosen, scheduler=Scheduler(launcher)
    )
    assert settled(through) == settled(plain)
    assert {row["status"] for row in plain} == {"ok", "refused"} | ({"invalid"} if timed else set())
    written = records.read(tmp_path / "through" / "records.jsonl")
    assert len({row["key"] for row in written}) == len(written) == len(plain)
    assert list((tmp_path / "through" / "work" / "jobs").iterdir()) == []


def test_timed_steps_are_not_submitted_and_nothing_runs_twice(fake, tmp_path, monkeypatch):
    given = []

    def note(queue, folder, environment, job, *more):
        given.append((Path(job["backend_file"]).stem, job["step"], job.get("runtime")))
        return steps.perform(folder, environment, job, *more)

    monkeypatch.setattr(steps, "submit", note)
    chosen = {"backends": ["onnxruntime", "fake"], "schemes": ["exact", "int8-pt-minmax"]}
    run(tmp_path, runtimes=["optimized", "simulator"], scheduler=Scheduler("local"), **chosen)
    runs = {entry for entry in given if entry[1] != "compile"}
    assert (
        {("fake_vendor", "run", "simulator")}
        <= runs
        <= {
            ("fake_vendor", "run", "simulator"),
            ("ort", "run", "reference"),
        }
    )
    assert ("ort", "compile", None) in given


def test_a_finished_step_needs_no_job(fake, tmp_path, monkeypatch):
    chosen = {"backends": "fake", "schemes": ["exact"]}
    run(tmp_path, **chosen)
    (tmp_path / "records.jsonl").unlink()
    monkeypatch.setattr("qt_jax.scheduler.Queue.submit", None)
    assert [row["status"] for row in run(tmp_path, **chosen, scheduler=Scheduler("local"))] == ["ok", "ok"]


def test_a_job_that_dies_is_a_crashed_step_which_is_retried_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(SubmititJob, "_results_timeout_s", 1)
    folder, limits = tmp_path / "work" / "step", Limits(10.0, 1.0)
    with open_queue(Scheduler("local"), tmp_path / "jobs") as queue:
        answer = steps.submit(queue, folder, None, {"step": "compile", "odd": object}, limits)
        assert answer.status == "crashed"
        assert "compile: local job" in answer.reason and "not JSON serializable" in answer.reason
        assert answer.reason in (folder / steps.LOG).read_text()
        jobs = len(queue.jobs)
        assert steps.submit(queue, folder, None, {"step": "compile"}, limits) == answer
        assert len(queue.jobs) == jobs
        steps.submit(queue, folder, None, {"step": "compile", "odd": object}, limits, retry=True)
        assert len(queue.jobs) == jobs + 1


def test_stopping_cancels_the_job(fake, tmp_path):
    folder = tmp_path / "work" / "step"
    steps.stop_all()
    try:
        with open_queue(Scheduler("local"), tmp_path / "jobs") as queue:
            with pytest.raises(steps.Stopped):
                steps.submit(queue, folder, None, {"step": "compile"}, Limits(10.0, 1.0))
            assert all(job.done() for job in queue.jobs)
    finally:
        steps.STOPPING.clear()


def test_an_interruption_ends_the_workers_of_all_jobs(fake, tmp_path):
    sleepers: list[psutil.Process] = []

    def interrupt(record: records.Record) -> None:
        if record["scheme"] == "refused":
            while not sleepers:
                family = psutil.Process().children(recursive=True)
                sleepers.extend(p for p in family if p.name() == "sleep")
                time.sleep(0.05)
            raise KeyboardInterrupt

    run(tmp_path, backends="fake", schemes=["exact"])  # the reference is then there
    chosen = {"backends": "fake", "schemes": ["refused", "hang"], "jobs": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **chosen, scheduler=Scheduler("local"), limits=Limits(60.0), on_record=interrupt)
    _, alive = psutil.wait_procs(sleepers, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert not list(tmp_path.glob("work/*hang*/answer.json"))


def test_slurm_needs_a_folder_that_all_hosts_share():
    with pytest.raises(InvalidInput, match="Slurm's jobs need a folder that all hosts share"):
        run(None, scheduler=Scheduler("slurm"))
