"""Check the benchmark over sizes: its points, its step, how it resumes, and what it shows."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmarks import scaling, timing
from experiments.benchmarks.variants import QUANT_TRIM, QuantTrimmed, compiled_step, random_split
from experiments.configs.training import Config, float_twin, lambda_schedule, quant_config
from experiments.models.resnet import ResNet
from qt_jax import records

CONFIG = Config(model="tiny", batch_size=4, reverse_pruning=None, sched="linear", warmup=0.0)


MADE_UP = {scaling.FP32: (4, 100), scaling.UNFUSED: (2, 90), QUANT_TRIM: (3, 110)}
"""Milliseconds and peak bytes of each step."""


@pytest.fixture
def measured(monkeypatch):
    """Return the points for which steps were built. Times are made up."""
    built = []
    monkeypatch.setattr(scaling, "AXES", {"width": (8, 16), "sample_size": (1024, 4096)})

    def variants(point, steps):
        built.append(point)
        return {
            name: timing.Variant(None, milliseconds, compiled={"peak_bytes": peak, "compile_seconds": 1.0})
            for name, (milliseconds, peak) in MADE_UP.items()
        }

    def measure(variants, rounds, progress, warm_up):
        return {name: [variant.state * k for k in (1.0, 2.0)] for name, variant in variants.items()}

    monkeypatch.setattr(scaling, "variants", variants)
    monkeypatch.setattr(timing, "measure", measure)
    return built


def test_the_base_is_a_point_of_every_axis_and_measured_once():
    found = scaling.points()
    assert len(found) == len(set(found)) == sum(map(len, scaling.AXES.values())) - 4
    assert all(getattr(scaling.BASE, axis) in values for axis, values in scaling.AXES.items())
    assert all(sum(a != b for a, b in zip(point, scaling.BASE, strict=True)) <= 1 for point in found)


def test_its_step_is_the_trainers():
    """Get the same parameters and ranges with the default sample size and lambda counted in the model."""
    split, model = random_split(CONFIG, (8, 8, 3)), ResNet((1,), 4)
    inside = QuantTrimmed(model, quant_config(CONFIG), lambda_schedule(CONFIG, 3))
    own = compiled_step(CONFIG, model, split, steps=3)
    wrapped = compiled_step(float_twin(CONFIG), inside, split, steps=3)
    a, b = own.state, wrapped.state
    b = b.replace(
        params=jax.tree.map(np.array, {"model": a.params}),
        batch_stats={**b.batch_stats, "model": jax.tree.map(np.array, a.batch_stats)},
    )
    for _ in range(3):
        a, b = own.advance(a), wrapped.advance(b)
    assert int(b.batch_stats["step"]) == 3
    for ours, theirs in ((a.params, b.params), (a.batch_stats, b.batch_stats)):
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs["model"]), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_the_sample_size_reaches_the_statistics(monkeypatch):
    """Check that the point's sample size reaches the config of the compiled model, as the other sizes do."""
    seen = {}

    def step(config, model, split, steps):
        seen[type(model).__name__] = (config, model, split)

    monkeypatch.setattr(scaling, "compiled_step", step)
    scaling.variants(scaling.Point(8, 14, 4, 16, 256), steps=3)
    config, model, split = seen["QuantTrimmed"]
    assert model.specs == dataclasses.replace(quant_config(Config()), sample_size=256)
    assert (model.model.width, model.model.stage_sizes) == (8, (2, 2, 2))
    assert config.batch_size == 4 and split.images.shape[1:] == (16, 16, 3)
    assert {config.sched for config, *_ in seen.values()} == {"none"}


def test_records_in_closed_form_and_no_point_is_measured_twice(measured, tmp_path, capsys):
    arguments = ["--rounds", "2", "--out", str(tmp_path)]
    assert scaling.main(arguments) == 0
    rows = records.read(tmp_path / "records.jsonl")
    assert measured == [scaling.Point(8), scaling.BASE, scaling.Point(sample_size=1024)]
    for row, point in zip(rows, measured, strict=True):
        assert tuple(row[field] for field in scaling.Point._fields) == point
        assert row["ratio_to_faster"] == row["ratio_to_faster_paired"] == pytest.approx(1.5)
        assert row["ratio"] == pytest.approx(0.75) and row["peak_ratio"] == pytest.approx(1.1)
        assert row["step_ms_p50"] == pytest.approx(4.5) and row["rounds"] == 2
        assert row["versions"]["jax"] == jax.__version__
    shown = capsys.readouterr().out
    assert "sample size 1024" in shown and "1.500 (1.50-1.50)" in shown
    assert (tmp_path / "scaling.png").stat().st_size > 10_000

    assert scaling.main(arguments) == 0
    assert len(measured) == 3
    assert scaling.main([*arguments, "--fresh"]) == 0
    assert len(measured) == 6 and len(records.read(tmp_path / "records.jsonl")) == 6
    assert scaling.main(["--rounds", "3", "--out", str(tmp_path)]) == 0
    assert len(measured) == 9


def test_wrong_input_is_told(capsys):
    assert scaling.main(["--rounds", "0"]) == 2
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
