"""Provoke what can go wrong in the middle of a run: nothing is lost, and messages say what to do."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from experiments import cifar, pipeline
from experiments.configs.training import PRESETS, Config
from experiments.data import Dataset, load
from experiments.models.resnet import ResNet
from experiments.training import checkpoints, loop, program
from experiments.training.logs import drift
from qt_jax import records
from qt_jax.export.network import restore

METHOD = "quant-trim"
STEPS_PER_EPOCH, EPOCHS = 4, 3
CONFIG = dataclasses.replace(
    PRESETS["smoke"],
    dataset="digits",
    train_limit=256,
    batch_size=64,
    epochs=EPOCHS,
    reverse_pruning_every=2,
)
DIGITS = load("digits")
TINY = ResNet((1,), width=4)
TIMES = ("seconds", "images_per_second")


def run(folder: Path, config: Config = CONFIG, model: nn.Module = TINY, data: Dataset = DIGITS) -> Any:
    return loop.train(config, model, data, folder, METHOD)


def of(folder: Path) -> Path:
    return folder / "checkpoints" / METHOD


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without what a clock measured."""
    read = records.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read]


def assert_same_end(folder: Path, whole: Path) -> None:
    """Check that the newest checkpoints hold the same bits and the rows say the same."""
    one, other = restore(of(folder)), restore(of(whole))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert rows(folder) == rows(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Carry out an undisturbed run, and return its folder."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """Copy that folder."""
    folder = tmp_path / "begun"
    shutil.copytree(whole, folder)
    return folder


def disturbed(monkeypatch, call: int, disturb) -> None:
    """Call `disturb()` before the given call of the train step."""
    make, calls = program.make_train_step, []

    def watched(*args, **kwargs):
        step = make(*args, **kwargs)

        def with_disturbance(*arguments):
            calls.append(None)
            if len(calls) == call:
                disturb()
            return step(*arguments)

        with_disturbance._cache_size = step._cache_size
        return with_disturbance

    monkeypatch.setattr(program, "make_train_step", watched)


@pytest.mark.parametrize(("name", "call"), [("SIGTERM", 6), ("SIGINT", 4), ("SIGTERM", 12)])
def test_a_signal_saves_the_step_it_came_in(whole, tmp_path, monkeypatch, name, call):
    """Send it in the middle of an epoch, in the last step of one, and in the last step of all."""
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        disturbed(patch, call, lambda: os.kill(os.getpid(), number))
        if call == EPOCHS * STEPS_PER_EPOCH:
            run(tmp_path)
        else:
            with pytest.raises(loop.Interrupted, match=f"at step {call}, which is saved") as caught:
                run(tmp_path)
            assert caught.value.status == 128 + number
    assert signal.getsignal(number) is before
    assert max(int(entry.name) for entry in of(tmp_path).iterdir()) == call
    run(tmp_path)
    assert_same_end(tmp_path, whole)


def test_the_command_ends_with_the_signals_status(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise loop.Interrupted(7, signal.SIGTERM)

    monkeypatch.setattr(pipeline, "train", interrupted)
    flags = ["--preset", "smoke", "--dataset", "digits", "--out", str(tmp_path / "run")]
    assert cifar.main(flags) == 143
    assert "step 7, which is saved; the same command goes on" in capsys.readouterr().err


def small_disk(folder: Path, size: str) -> None:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here: not root")


def fill(disk: Path) -> Path:
    """Write a file that takes all the space that is left."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for block in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\0" * block) == block:
                    pass
            except OSError:
                continue
    return filler


@pytest.mark.parametrize("call", [2, 6])
def test_a_full_disk_stops_the_run_and_loses_nothing(whole, tmp_path, monkeypatch, call):
    """Fill the disk in the first epoch, and when there is a checkpoint; then free half a megabyte."""
    disk = tmp_path / "disk"
    small_disk(disk, "8m")
    try:
        with monkeypatch.context() as patch:
            disturbed(patch, call, lambda: fill(disk))
            with pytest.raises(qt.InvalidInput, match=r"cannot be written .*No space left on device"):
                run(disk)
        kept = [] if call == 2 else [STEPS_PER_EPOCH]
        assert sorted(int(entry.name) for entry in of(disk).iterdir() if entry.name.isdigit()) == kept
        (disk / "filler").unlink()
        run(disk)
        assert_same_end(disk, whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_under_the_checkpoint_alone(whole, tmp_path, monkeypatch):
    """Fill the disk after the row of the epoch is written, before its checkpoint is."""
    disk = tmp_path / "disk"
    small_disk(disk, "8m")
    save, saved = checkpoints.save, []

    def full_the_second_time(manager, state, totals):
        saved.append(int(state.step))
        if len(saved) == 2:
            fill(disk)
        save(manager, state, totals)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save", full_the_second_time)
            with pytest.raises(qt.InvalidInput, match=r"step 8 cannot be written .* step 4 is whole"):
                run(disk)
        (disk / "filler").unlink()
        run(disk)
        assert_same_end(disk, whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def flip(path: Path) -> None:
    """Flip bits in the middle of a file."""
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 3, len(data) // 3 + 64):
        data[i % len(data)] ^= 0x5A
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "flipped bytes": lambda step: flip(largest(step)),
    "a file cut short": lambda step: os.truncate(largest(step), 100),
    "a file gone": lambda step: largest(step).unlink(),
    "metadata cut short": lambda step: os.truncate(step / "default" / "_METADATA", 100),
    "integrity gone": lambda step: shutil.rmtree(step / "integrity"),
    "nothing in it": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(begun, whole, damage, capsys):
    DAMAGES[damage](of(begun) / "12")
    run(begun)
    said = capsys.readouterr().err
    assert "the checkpoint of step 12 is damaged" in said and "step 8 is taken" in said
    assert [entry.name for entry in of(begun).with_name(f"{METHOD}-damaged").iterdir()] == ["12-0"]
    assert_same_end(begun, whole)


def test_other_numbers_in_a_readable_checkpoint_are_noticed(begun, whole, capsys):
    """Read back numbers that are not those that were written, although nothing looks broken."""
    with checkpoints.open_checkpoints(of(begun)) as manager:
        abstract = program.build(CONFIG, TINY, DIGITS, loop.devices.data_mesh())
        state, totals = checkpoints.restore_latest(manager, abstract.template, abstract.mesh)
    other = state.replace(params=jax.tree.map(lambda leaf: leaf + 1e-6, state.params))
    integrity = of(begun) / "12" / "integrity"
    kept = {path: path.read_bytes() for path in integrity.iterdir()}
    shutil.rmtree(of(begun) / "12")
    with checkpoints.open_checkpoints(of(begun)) as manager:
        checkpoints.save(manager, other, totals)
    for path, content in kept.items():
        path.write_bytes(content)
    run(begun)
    assert "is not what was written" in capsys.readouterr().err
    assert_same_end(begun, whole)


def test_checkpoints_that_are_all_damaged_are_named_and_left(begun):
    for step in ("8", "12"):
        flip(largest(of(begun) / step))
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(qt.InvalidInput, match=r"every .* damaged .*/12: .*/8: .*Nothing was changed"):
        run(begun)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_half_a_checkpoint_of_a_killed_writer_is_cleared_away(begun, whole):
    shutil.move(of(begun) / "12", of(begun) / "12.orbax-checkpoint-tmp")
    run(begun)
    assert_same_end(begun, whole)
    assert not list(of(begun).glob("*tmp*"))


def test_other_versions_are_told(begun, monkeypatch, capsys):
    shutil.rmtree(of(begun) / "12")
    versions = checkpoints.provenance.versions

    def newer(packages):
        return versions(packages) | {"jax": "99.0"}

    monkeypatch.setattr(checkpoints.provenance, "versions", newer)
    run(begun)
    said = capsys.readouterr().err
    assert "step 8 was written with other versions (jax " in said and "-> 99.0)" in said


class Contrast(nn.Module):
    """Divide every image by its own standard deviation, which is zero for a blank image."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = Scaled(name="scaled")(x)
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x / jnp.std(x, axis=(1, 2, 3), keepdims=True)


@pytest.fixture(scope="module")
def poisoned() -> tuple[Dataset, int]:
    """Return the digits with one black image, and the step (of 12) whose batch is the first to hold it."""
    images = DIGITS.train_images.copy()
    images[77] = 0
    data = dataclasses.replace(DIGITS, train_images=images, mean=(0.0,))
    return data, int(np.flatnonzero(np.asarray(loop_order(0)) == 77)[0]) // CONFIG.batch_size


def loop_order(epoch: int) -> jax.Array:
    return program.epoch_order(CONFIG, 256, epoch)


def test_a_poisoned_batch_is_found_to_the_step_and_the_layer(tmp_path, poisoned):
    data, step = poisoned
    config = dataclasses.replace(CONFIG, sched="constant", reverse_pruning=None)
    with pytest.raises(
        qt.InvalidInput, match=rf"diverged at step {step} \(epoch 1\).*no checkpoint yet"
    ) as caught:
        run(tmp_path, config, Contrast(), data)
    message = str(caught.value)
    assert "lambda 1.000" in message and "Look at layer scaled, the first with outputs" in message
    report = json.loads((tmp_path / "divergence.json").read_text())
    assert (report["step"], report["layer"], report["loss"]) == (step, "scaled", None)
    assert report["outputs"]["stem"]["broken"] == 0 < report["outputs"]["scaled"]["broken"] < 1
    assert report["parameters"] == [] and "head/kernel" in report["gradients"]
    assert set(report["ranges"]) >= {"head/quant_input/low", "stem/quant_kernel/high"}


class Linear(nn.Module):
    """Apply one layer without batch norm, which would hold divergence back."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


def test_retries_go_back_and_halve_the_rate(tmp_path, capsys):
    """Start at a rate at which this network diverges, and halve it until it does not."""
    config = dataclasses.replace(CONFIG, learning_rate=1e3, retries=6)
    run(tmp_path, config, Linear())
    said = capsys.readouterr().err
    back = said.count("Going back")
    assert 1 <= back <= 4 and f"on at {0.5**back:g} of the learning rate" in said
    assert "its scales: quant_kernel " in said or "its scales: none" in said
    scale = restore(of(tmp_path))["rate_scale"]
    assert float(scale) == 0.5**back
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3]


def test_retries_end(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, learning_rate=1e12, retries=1)
    with pytest.raises(qt.InvalidInput, match=r"learning rate .*e\+.*let --retries"):
        run(tmp_path, config, Linear())
    assert capsys.readouterr().err.count("Going back") == 1


@pytest.mark.parametrize(
    ("plain", "quantized", "lam", "said"),
    [
        (0.6, 0.9, 0.2, "FP32 network, which is exported, has collapsed"),
        (0.9, 0.8, 1.0, "fake-quantized network is behind the FP32 one"),
        (0.6, 0.9, 0.0, None),
        (0.9, 0.1, 0.5, None),
        (0.88, 0.9, 1.0, None),
    ],
)
def test_drift_is_told(plain, quantized, lam, said):
    row = {"epoch": 3, "validation_fp32": plain, "validation_fake_quant": quantized, "lambda": lam}
    message = drift(row)
    assert message is None if said is None else said in message


def test_drift_is_reported_while_training(tmp_path, capsys, monkeypatch):
    def drifting(_):
        return lambda state: {"validation_fp32": 0.2, "validation_fake_quant": 0.9}

    monkeypatch.setattr(loop, "validation", drifting)
    run(tmp_path, dataclasses.replace(CONFIG, epochs=1))
    assert (
        "warning: after epoch 1 the FP32 network, which is exported, has collapsed" in capsys.readouterr().err
    )


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"remat": True}])
def test_memory_for_time_leaves_the_network_what_it_is(whole, tmp_path, change):
    """Compare with the whole run: remat changes rounding only, accumulate keeps the losses close."""
    run(tmp_path, dataclasses.replace(CONFIG, **change))
    mine, other = restore(of(tmp_path))["params"], restore(of(whole))["params"]
    if "remat" in change:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), mine, other)
    losses = [[row["loss"] for row in rows(folder)] for folder in (tmp_path, whole)]
    np.testing.assert_allclose(*losses, rtol=0.05)
    assert [row["compilations"] for row in rows(tmp_path)] == [1] * EPOCHS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 66}, r"--batch-size 66 cannot be divided among 4 devices: choose a multiple of 4"),
        ({"batch_size": 64, "accumulate": 32}, r"in 32 parts \(--accumulate\) cannot be .* multiple of 128"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, change, message):
    with pytest.raises(qt.InvalidInput, match=message):
        run(tmp_path, dataclasses.replace(CONFIG, **change))
    assert not list(tmp_path.iterdir())
