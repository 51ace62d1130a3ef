"""Check one training run: compiled once, resumed to the bit, with intact statistics and checkpoints."""

import dataclasses
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from rich.console import Console

import qt_jax as qt
from experiments import devices, models
from experiments.configs.training import PRESETS, Config, lambda_schedule
from experiments.data import load
from experiments.models.resnet import ResNet
from experiments.pipeline import describe, export
from experiments.training import checkpoints, loop, program
from experiments.training.logs import TrainingLog
from experiments.training.state import create_state, learning_rate_schedule, optimizer
from qt_jax import records
from qt_jax.export.encodings import ranges_path

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
TIMES = ("seconds", "images_per_second")
DIGITS = load("digits")
TINY = ResNet((1,), width=4)


def run(config: Config, folder: Path, model: nn.Module = TINY) -> dict[str, Any]:
    return loop.train(config, model, DIGITS, folder, METHOD)


def final_state(config: Config, folder: Path):
    """Return the newest checkpoint in the folder."""
    tx = optimizer(config, config.epochs * STEPS_PER_EPOCH)
    template = create_state(config, TINY, tx, (8, 8, 1))
    with checkpoints.open_checkpoints(folder / "checkpoints" / METHOD) as manager:
        found = checkpoints.restore_latest(manager, template, devices.data_mesh())
    return found and found[0]


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what a clock measured."""
    rows = records.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


class Whole(NamedTuple):
    """Run without interruption, and return the folder with what was seen."""

    folder: Path
    variables: dict[str, Any]
    traces: int
    validations: list[bool]
    """Of each validation, whether the variables came out of it as they went in."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    folder, traces, validations = tmp_path_factory.mktemp("whole"), [], []

    def counted_schedule(config, total):
        schedule = lambda_schedule(config, total)

        def count_traces(step):
            traces.append(isinstance(step, jax.core.Tracer))
            return schedule(step)

        return count_traces

    def watched_predict(*args, **kwargs):
        predict = make_predict(*args, **kwargs)

        def watch(variables, images):
            before = jax.tree.map(np.array, variables)
            logits = predict(variables, images)
            equal = jax.tree.map(np.array_equal, before, variables)
            validations.append(jax.tree.all(equal))
            return logits

        return watch

    make_predict = program.make_predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "lambda_schedule", counted_schedule)
        patch.setattr(program, "make_predict", watched_predict)
        variables = run(CONFIG, folder)
    return Whole(folder, variables, sum(traces), validations)


def test_one_trace_over_a_moving_lambda(whole):
    rows = timeless(whole.folder)
    assert whole.traces == 1
    assert [row["compilations"] for row in rows] == [1] * EPOCHS
    assert len({row["lambda"] for row in rows}) == EPOCHS


def test_rows_follow_the_schedules(whole):
    rows = timeless(whole.folder)
    total = EPOCHS * STEPS_PER_EPOCH
    lam, rate = lambda_schedule(CONFIG, total), learning_rate_schedule(CONFIG, total)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 4), (2, 8), (3, 12)]
    for row in rows:
        assert row["method"] == METHOD
        assert row["lambda"] == float(lam(row["step"]))
        assert row["learning_rate"] == float(rate(row["step"]))
        assert all(0 <= row[key] <= 1 for key in ("accuracy", "validation_fp32", "validation_fake_quant"))
    assert rows[-1]["lambda"] == 1.0
    assert list((whole.folder / "tensorboard" / METHOD).iterdir())


def test_validation_leaves_the_statistics_alone(whole):
    assert whole.validations == [True] * 2 * EPOCHS


def test_checkpoint_holds_what_training_returned(whole):
    state = final_state(CONFIG, whole.folder)
    assert int(state.step) == EPOCHS * STEPS_PER_EPOCH
    assert_same_bits(jax.tree.map(np.asarray, state.deployed), whole.variables)


def test_finished_training_is_not_redone(whole, monkeypatch):
    monkeypatch.setattr(loop, "_run_epoch", None)
    before = (whole.folder / "metrics.jsonl").read_bytes()
    assert_same_bits(run(CONFIG, whole.folder), whole.variables)
    assert (whole.folder / "metrics.jsonl").read_bytes() == before


def test_interrupted_run_resumes_to_the_bit(whole, tmp_path, monkeypatch):
    """Kill the run between the second epoch's row and its checkpoint, then in the middle of a row."""
    save = checkpoints.save

    def save_once(manager, state, totals):
        if int(state.step) > STEPS_PER_EPOCH:
            raise KeyboardInterrupt
        save(manager, state, totals)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_once)
        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, tmp_path)
    assert [row["epoch"] for row in timeless(tmp_path)] == [1, 2]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"method": "quant-tr')

    with pytest.warns(UserWarning, match="was cut short"):
        variables = run(CONFIG, tmp_path)
    assert_same_bits(variables, whole.variables)
    assert_same_bits(final_state(CONFIG, tmp_path), final_state(CONFIG, whole.folder))
    assert timeless(tmp_path) == timeless(whole.folder)


def test_many_steps_in_one_dispatch_give_the_same_network(whole, tmp_path):
    variables = run(dataclasses.replace(CONFIG, steps_per_dispatch=3), tmp_path)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), variables, whole.variables)
    rows, expected = timeless(tmp_path), timeless(whole.folder)
    assert [row["compilations"] for row in rows] == [1] * EPOCHS
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=1e-5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_averaged_parameters_are_exported_and_a_terminal_sees_the_bar(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, ema=0.5)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    variables = run(config, tmp_path)

    state = final_state(config, tmp_path)
    assert_same_bits(variables["params"], jax.tree.map(np.asarray, state.average))
    assert not np.array_equal(state.average["head"]["kernel"], state.params["head"]["kernel"])

    path = tmp_path / "model.onnx"
    monkeypatch.setitem(models.MODELS, config.model, partial(ResNet, (1,), 4))
    describe(config, DIGITS, f"checkpoints/{METHOD}", path.with_suffix(".json"))
    export(config, path, DIGITS, Console(file=io.StringIO()))
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer}
    kernel = variables["params"]["head"]["kernel"]
    assert any(np.array_equal(weights["head/kernel"], k) for k in (kernel, kernel.T))

    neutral = tmp_path / "neutral.onnx"
    describe(config, DIGITS, f"checkpoints/{METHOD}", neutral.with_suffix(".json"))
    console = Console(file=io.StringIO(), soft_wrap=True)
    rescaled = dataclasses.replace(config, equalize="ranges")
    export(rescaled, neutral, DIGITS, console)
    assert "factors rescale the channels" in console.file.getvalue()
    assert ranges_path(path).exists() and not ranges_path(neutral).exists()
    export(rescaled, neutral, DIGITS, console)  # verifies what is there against the checkpoint
    moved = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(neutral).graph.initializer}
    assert not np.allclose(moved["head/kernel"], weights["head/kernel"])

    bar = terminal.getvalue()
    assert "epoch=3/3, loss=" in bar and "accuracy=" in bar and "lambda=1.000" in bar and "img/s" in bar


def test_divergence_keeps_the_checkpoints(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    kept = folder / "checkpoints" / METHOD
    shutil.rmtree(kept / "12")
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    with pytest.raises(qt.InvalidInput, match=r"diverged at step 9 \(epoch 3\): .* --learning-rate"):
        run(dataclasses.replace(CONFIG, learning_rate=1e30), folder)
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    assert [row["epoch"] for row in timeless(folder)] == [1, 2]
    assert int(final_state(CONFIG, folder).step) == 8


@pytest.mark.parametrize(
    ("model", "change"), [(ResNet((1,), 8), {}), (ResNet((2,), 4), {}), (TINY, {"sched": "none"})]
)
def test_checkpoint_of_another_network_is_refused_and_left(whole, model, change):
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    with pytest.raises(
        qt.InvalidInput,
        match=r"quant-trim/12 is of another model or config: .* there and",
    ):
        run(dataclasses.replace(CONFIG, **change), whole.folder, model)
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


def test_batch_larger_than_the_split_is_refused_before_anything_is_written(tmp_path):
    config = dataclasses.replace(CONFIG, batch_size=257)
    with pytest.raises(qt.InvalidInput, match=r"--batch-size 257 .*\(256\)"):
        run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_log_drops_the_rows_that_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"method": method, "step": step} for step in (4, 8) for method in ("float", METHOD)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    TrainingLog(tmp_path, METHOD, 4).close()
    assert records.read(path) == [row for row in rows if (row["method"], row["step"]) != (METHOD, 8)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_damaged_metrics_are_named_and_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"method": "float", "st\n{"method": "float", "step": 4}\n')
    before = path.read_bytes()
    with pytest.raises(qt.InvalidInput, match=r"metrics\.jsonl, line 1"):
        TrainingLog(tmp_path, METHOD, 4)
    assert path.read_bytes() == before
