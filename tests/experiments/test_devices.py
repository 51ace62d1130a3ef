"""Train on one device, on eight, in two processes of four, and moved from eight to two to one.

On another number of devices, and in another number of processes, the sums of a batch are taken in another
order and differ in their last bits. Fake quantization rounds: in float32 a weight that lies between two steps
of its grid goes to the other one about once in such a run, and moves a running mean by up to 1e-3. In float64
the last bits are too small for that, so that the runs agree unless devices disagree on what the batch is.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import devices
from experiments.data import load
from experiments.models.resnet import ResNet
from experiments.training import program
from experiments.training.step import Totals
from qt_jax import records

SCRIPT = Path(__file__).with_name("parallel_run.py")
SPEC = importlib.util.spec_from_file_location("parallel_run", SCRIPT)
parallel_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parallel_run)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
COMPILED_FAST = "--xla_backend_optimization_level=0"
"""Programs that run for fifty steps are not worth the compiler's time."""
ORDER_OF_SUMS = 1e-9
"""Of the largest entry of each array, after fifty steps with the sums in another order."""


def start(devices_each: int, *arguments: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each} {COMPILED_FAST}",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(*processes: subprocess.Popen) -> str:
    """Wait for processes, all of which must end well, and return what they have printed."""
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)
    return "\n".join(printed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """Carry out the runs, and return the last state of each, by path."""
    root = tmp_path_factory.mktemp("parallel")
    for name, count in (("one", "1"), ("eight", "8")):
        finished(start(8, str(root / name), name, count))
    for count, stop in (("8", "17"), ("2", "34"), ("1", "")):
        printed = finished(start(8, str(root / "moved"), "moved", count, "alone", stop))
        assert not stop or f"interrupted at step {stop}, which is saved" in printed
    for name, processes in (("two", 2), ("four", 4)):
        where = f"127.0.0.1:{free_port()},{processes}"
        together = [
            start(8 // processes, str(root / name), name, "8", f"{where},{index}")
            for index in range(processes)
        ]
        printed = finished(*together)
        assert printed.count("epoch 5/5") == 1  # only one process speaks
    found = {
        name: dict(np.load(root / name / f"{name}.npz")) for name in ("one", "eight", "moved", "two", "four")
    }
    rows = {name: records.read(root / name / "metrics.jsonl") for name in found}
    for name, mine in rows.items():
        assert [row["epoch"] for row in mine] == [1, 2, 3, 4, 5], name
    losses = {name: [row["loss"] for row in mine] for name, mine in rows.items()}
    for name in found:
        np.testing.assert_allclose(losses[name], losses["one"], rtol=1e-6, err_msg=name)
    return found


def assert_alike(mine: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert mine.keys() == other.keys()
    for path in mine:
        if not path.startswith("opt_state") or "tau" in path:
            atol = ORDER_OF_SUMS * max(np.abs(other[path]).max(), 1e-3)
            np.testing.assert_allclose(mine[path], other[path], atol=atol, rtol=0, err_msg=path)


def test_eight_devices_are_one(runs):
    """Compare parameters, their average, batch norm, ranges and tau."""
    assert_alike(runs["eight"], runs["one"])


@pytest.mark.parametrize("name", ["two", "four"])
def test_processes_are_devices(runs, name):
    assert_alike(runs[name], runs["eight"])


def test_a_run_moves_from_eight_devices_to_two_to_one(runs):
    assert_alike(runs["moved"], runs["one"])


def test_tau_is_the_same_everywhere(runs):
    paths = [path for path in runs["one"] if "/tau/" in path]
    assert len(paths) == 4
    for path in paths:
        mine = [state[path] for state in runs.values()]
        np.testing.assert_allclose(mine, runs["one"][path], rtol=ORDER_OF_SUMS)


def test_devices_exchange_a_batch_not_the_data_set():
    """Check that the split stays in place: the compiled step sends no array with a row per image of it."""
    mesh = devices.data_mesh()
    assert mesh.size == 4
    built = program.build(parallel_run.CONFIG, ResNet((1,), width=4), load("digits"), mesh)
    totals = devices.replicate(Totals.zero(), mesh)
    text = (
        built.run.lower(built.first(), totals, built.split, built.order(0), np.int32(1)).compile().as_text()
    )
    sent = [
        line.split("=", 1)[1].split("(")[0]
        for line in text.splitlines()
        if any(
            f" {name}(" in line for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        )
    ]
    assert sent
    shapes = [shape for line in sent for shape in line.split() if shape.startswith(("u8[", "f32[", "s32["))]
    rows = parallel_run.CONFIG.train_limit
    assert not [shape for shape in shapes if f"[{rows}," in shape or f"[{rows // 4}," in shape], shapes


def test_split_rows_pads_to_the_devices():
    mesh = devices.data_mesh()
    rows = devices.split_rows(np.arange(10, dtype=np.int32).reshape(5, 2), mesh)
    assert rows.shape == (8, 2) and rows.sharding == devices.split_along(mesh)
    np.testing.assert_array_equal(np.asarray(rows)[:5], np.arange(10).reshape(5, 2))
    assert not np.asarray(rows)[5:].any()
    assert [shard.data.shape for shard in rows.addressable_shards] == [(2, 2)] * 4


@pytest.mark.parametrize("where", ["here", "10.0.0.1,4,0", "10.0.0.1:1,2", "10.0.0.1:1,2,2", "auto"])
def test_processes_that_cannot_be_found_are_refused(where, monkeypatch):
    def initialize(*arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(devices.InvalidInput, match=r"--distributed .*ADDRESS:PORT,COUNT,INDEX"):
        devices.connect(where)
