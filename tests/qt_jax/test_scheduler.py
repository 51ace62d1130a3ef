"""Test jobs through submitit: on this machine, in this process, and in an imitation of Slurm."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from submitit.core.core import Job as SubmititJob

from qt_jax import InvalidInput, processes
from qt_jax.scheduler import JobFailed, Scheduler, open_queue, wait

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
TOOLS = {
    "sbatch": """
        id=$$
        cp "$1" "$FAKE/$id.sh"
        SLURM_JOB_ID=$id setsid sh "$FAKE/$id.sh" > /dev/null 2>&1 &
        echo $! > "$FAKE/$id.pid"
        echo "Submitted batch job $id"
    """,
    "srun": """
        out=$(echo "$3" | sed "s/%j/$SLURM_JOB_ID/;s/%t/0/")
        shift 3
        exec "$@" >> "$out" 2>&1
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        for file in "$FAKE"/*.pid; do
            state=FAILED
            kill -0 -- -$(cat "$file") 2> /dev/null && state=RUNNING
            echo "$(basename "$file" .pid)|$state|host"
        done
    """,
    "scancel": 'kill -TERM -- "-$(cat "$FAKE/$1.pid")"',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put Slurm's tools on PATH, as far as submitit uses them. Jobs start at once, on this machine."""
    fake = tmp_path / "slurm"
    fake.mkdir()
    for name, script in TOOLS.items():
        (fake / name).write_text(f"#!/bin/bash\n{script}")
        (fake / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}{os.pathsep}{os.environ['PATH']}")
    return fake


@pytest.fixture(params=["local", "slurm", "debug"])
def launcher(request, slurm):
    return request.param


@pytest.fixture(autouse=True)
def no_long_wait(monkeypatch):
    """Shorten the 15 s that submitit waits for the result of a dead job, in case the file system is slow."""
    monkeypatch.setattr(SubmititJob, "_results_timeout_s", 1)


def test_a_command_gives_status_and_log_under_every_launcher(launcher, tmp_path):
    program = "import os; print(os.environ['WORD'], len(os.sched_getaffinity(0))); raise SystemExit(3)"
    with open_queue(Scheduler(launcher), tmp_path / "jobs") as queue:
        queue.interval = 0.1
        core = max(os.sched_getaffinity(0))
        job = queue.submit(
            processes.run, [sys.executable, "-c", program], tmp_path / "log", {"WORD": "hello"}, core
        )
        assert wait(queue, job) == 3
    assert (tmp_path / "log").read_text() == "hello 1\n"
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_local_job_sees_the_gpus_that_this_process_sees(tmp_path, monkeypatch):
    program = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    with open_queue(Scheduler("local"), tmp_path) as queue:
        for number, visible in enumerate((None, "0,1")):
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if visible is not None:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            wait(queue, queue.submit(processes.run, program, tmp_path / f"{number}.txt", {}))
            assert (tmp_path / f"{number}.txt").read_text().strip() == str(visible)


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_job_without_a_result_quotes_its_last_lines_and_keeps_its_log(launcher, slurm, tmp_path):
    with open_queue(Scheduler(launcher), tmp_path / "jobs") as queue:
        queue.interval = 0.1
        raised = queue.submit(int, "seven")
        killed = queue.submit(exec, "import os; print('nearly there', flush=True); os.kill(os.getpid(), 9)")
        with pytest.raises(JobFailed, match=rf"{launcher} job \d+ ended without .*(?s:.)*literal.*'seven'"):
            wait(queue, raised)
        with pytest.raises(JobFailed, match=r"(?s)nearly there"):
            wait(queue, killed)
    [kept] = (tmp_path / "jobs").iterdir()
    assert len(list(kept.glob("*_log.out"))) == 2


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_an_interruption_ends_jobs_and_what_they_have_started(launcher, slurm, tmp_path):
    family: list[psutil.Process] = []
    sleep = [*SLEEP, str(tmp_path)]

    def interrupted() -> None:
        with open_queue(Scheduler(launcher), tmp_path / "jobs") as queue:
            queue.submit(processes.run, sleep, tmp_path / "log", {})
            deadline = time.monotonic() + 20
            while not family and time.monotonic() < deadline:
                family.extend(p for p in psutil.process_iter() if _command_line(p) == sleep)
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(family) == 1
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_the_terminals_interrupt_does_not_reach_a_local_job(tmp_path):
    with open_queue(Scheduler("local"), tmp_path) as queue:
        job = queue.submit(exec, "import signal; signal.raise_signal(signal.SIGINT)")
        os.kill(int(job.handle.job_id), signal.SIGINT)
        wait(queue, job)


def test_waiting_ends_when_the_event_is_set(tmp_path):
    stopping = threading.Event()
    with open_queue(Scheduler("local"), tmp_path) as queue:
        job = queue.submit(processes.run, SLEEP, tmp_path / "log", {})
        threading.Timer(0.5, stopping.set).start()
        assert wait(queue, job, stopping) is None
        assert job.done()


def test_slurm_gets_the_settings_of_the_user(slurm, tmp_path):
    asked = Scheduler("slurm", "fast", job_minutes=7, job_cpus=2, job_gpus=1, job_memory=1.5)
    with open_queue(asked, tmp_path / "jobs") as queue:
        queue.interval = 0.1
        wait(queue, queue.submit(int, "7"))
    [script] = (path.read_text() for path in slurm.glob("*.sh"))
    for line in ("partition=fast", "time=7", "cpus-per-task=2", "gpus-per-node=1", "mem=1536MB"):
        assert f"#SBATCH --{line}\n" in script


def test_a_job_that_sbatch_refuses_is_reported(slurm, tmp_path):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: fast' >&2\nexit 1\n")
    with (
        pytest.raises(InvalidInput, match=r"sbatch refused a job: .*invalid partition specified: fast"),
        open_queue(Scheduler("slurm", "fast"), tmp_path) as queue,
    ):
        queue.submit(int, "7")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"launcher": "slurm"}, "no sbatch on PATH: --launcher slurm works on a host from which"),
        ({"launcher": "local", "job_gpus": 1}, "--launcher local does not take --job-gpus: leave out"),
        ({"job_minutes": 3, "partition": "a"}, "--launcher here does not take --job-minutes, --partition"),
        ({"launcher": "local", "job_minutes": 0}, "--job-minutes must be above 0, got 0"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, says, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidInput, match=says), open_queue(Scheduler(**settings), tmp_path / "jobs"):
        pass
    assert not (tmp_path / "jobs").exists()


def test_submitit_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    says = "--launcher local needs submitit: pip install submitit"
    with pytest.raises(InvalidInput, match=says), open_queue(Scheduler("local"), tmp_path):
        pass


def test_a_job_starts_without_loading_jax(tmp_path):
    """Submit from a new process, where nothing has been loaded before."""
    program = """
import sys
from pathlib import Path
from qt_jax import processes
from qt_jax.scheduler import Scheduler, open_queue, wait

def main():
    with open_queue(Scheduler("local"), Path(sys.argv[1])) as queue:
        told = {"function": processes.run}
        wait(queue, queue.submit(exec, "import sys; assert function and 'jax' not in sys.modules", told))

main()
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
