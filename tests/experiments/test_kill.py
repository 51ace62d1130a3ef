"""What a kill leaves behind is enough: the relaunched command ends where the undisturbed one does."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import cifar
from experiments.training import checkpoints
from qt_jax.reporting import records


def command(folder: Path) -> subprocess.Popen:
    """The command line in a process of its own, with the user's settings of JAX instead of the tests'."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    flags = ("--preset", "smoke", "--dataset", "digits", "--epochs", "30", "--seed", "3", "--no-compare")
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cifar", *flags, "--test-limit", "50", "--out", str(folder)],
        env=environment,
        cwd=Path(cifar.__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_kill_9_at_three_random_points(tmp_path):
    """python -m pytest -m slow tests/experiments/test_kill.py (about four minutes on two cores)

    A run that is killed with SIGKILL three times, and relaunched with the same command, ends with the
    checkpoint, graph and records of a run that was left alone. The times are drawn anew on every call, from
    the part of a run in which it starts, compiles and trains; a message tells them where the test fails.
    """
    started = time.perf_counter()
    whole = command(tmp_path / "whole")
    printed, _ = whole.communicate()
    assert whole.returncode == 0, printed
    span = time.perf_counter() - started

    seed = random.SystemRandom().randrange(2**32)
    kills = [random.Random(f"{seed} {i}").uniform(0.2, 0.5) * span for i in range(3)]
    story = f"seed {seed}, killed after {kills} of {span:.1f} s"
    for seconds in kills:
        process = command(tmp_path / "killed")
        time.sleep(seconds)
        process.kill()
        printed, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{story}\n{printed}"
    last = command(tmp_path / "killed")
    printed, _ = last.communicate()
    assert last.returncode == 0, f"{story}\n{printed}"

    def final(name):
        with checkpoints.open_checkpoints(tmp_path / name / "checkpoints" / cifar.QUANT_TRIM) as manager:
            return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())

    one, other = final("whole"), final("killed")
    assert jax.tree.structure(one) == jax.tree.structure(other), story
    jax.tree.map(partial(np.testing.assert_array_equal, err_msg=story), one, other)
    graphs = [(tmp_path / name / "model.onnx").read_bytes() for name in ("whole", "killed")]
    assert graphs[0] == graphs[1], story
    for file, keys in (
        ("metrics.jsonl", ("epoch", "loss", "compilations")),
        ("records.jsonl", ("scheme", "top1")),
    ):
        rows = [
            [[row[key] for key in keys] for row in records.read(tmp_path / name / file)]
            for name in ("whole", "killed")
        ]
        assert rows[0] == rows[1], story
