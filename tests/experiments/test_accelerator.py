"""Check the quarter of an hour on a GPU, at reduced size: its order, its networks, its records, its cuts.

The random cuts are drawn from a seed that is printed.
"""

import dataclasses
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from experiments import models
from experiments.accelerator import measurements, plan
from experiments.accelerator.program import Trained, build, place, train
from experiments.configs.methods import METHODS, config_of
from experiments.configs.study import FIRST_METHODS, preset
from experiments.data import load
from experiments.paper.rows import METRICS, NETWORK, TRAINED, folder_of, home_of, study
from experiments.training.checkpoints import read_variables
from experiments.training.loop import train as train_with_checkpoints
from experiments.training.step import Totals
from qt_jax import records
from qt_jax.command_line import parse

command = importlib.import_module("experiments.accelerator.__main__")

ROOT = Path(__file__).parents[2]
FULL, REDUCED = preset("quarter-hour"), preset("quarter-hour-reduced")
SCRATCH, TUNED, DEEP = REDUCED.tasks
SHORT = {"epochs": 1, "train_limit": 256, "dtype": "float32", "average_every": 2, "reverse_pruning_every": 1}


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def short(method, task=SCRATCH, **changes):
    """Return the config of a method with few steps, as the preset has it otherwise."""
    return dataclasses.replace(config_of(METHODS[method], task.base, 0), **SHORT | changes)


def launch(*flags):
    """Start the command in a process of its own."""
    # A compiled program counts as the same one in the copy of a folder.
    keys = {"JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
    environment = {**os.environ, **keys, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "experiments.accelerator", "--preset", REDUCED.name, "--no-measure", *flags]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# The plan.


def test_the_networks_of_94_percent_come_first_and_of_them_the_first_methods():
    first, others, deep = plan.parts(FULL)
    assert {row.task.name for row in first} == {"cifar10-94", "cifar10-94-fine-tuned"}
    assert [row.name for row in first[:7]] == list(FIRST_METHODS)
    assert len(first) == 10 * 2 * 7 and {row.seed for row in first} == set(range(10))
    assert {row.name for row in others} >= {"qat-delayed", "pact-w4", "qwix-w4", "recommended-w4"}
    assert [(row.name, row.seed) for row in deep[:3]] == [
        (n, 0) for n in ("float", "quant-trim", "recommended")
    ]
    assert len(first) + len(others) + len(deep) == len(study(FULL))
    order = {row: index for index, row in enumerate(first + others + deep)}
    assert all(order[row.source] < order[row] for row in order if row.source is not None)


def test_a_fine_tuned_row_starts_from_the_float_network_of_its_seed():
    for row in study(FULL):
        source = row.source and (row.source.task.name, row.source.name, row.source.seed)
        tuned = row.task.name == "cifar10-94-fine-tuned"
        assert source == (("cifar10-94", "float", row.seed) if tuned else None)
    assert len({row.digest for row in study(FULL)}) == len(study(FULL))


def test_both_presets_have_the_same_rows_but_for_names_and_seeds():
    def shape(chosen):
        return [(task.methods, task.replicated == task.methods, bool(task.start)) for task in chosen.tasks]

    assert shape(FULL) == shape(REDUCED)


def test_batches_hold_seeds_of_one_program():
    rows = [row for row in study(REDUCED) if row.task is SCRATCH and row.name in ("float", "qat")]
    names = [[(row.name, row.seed) for row in batch] for batch in plan.batches(rows, 2)]
    assert names == [[("float", 0), ("float", 1)], [("qat", 0), ("qat", 1)]]
    assert [len(batch) for batch in plan.batches(rows, 1)] == [1, 1, 1, 1]


def test_seconds_come_from_the_throughput_and_then_from_rows_of_the_kind():
    row = plan.parts(FULL)[0][0]
    images = 16 * (45_000 // 1024) * 1024
    assert plan.expected_seconds(row, {}) == pytest.approx(images / 333_500 + 0.5)
    assert plan.expected_seconds(row, {plan.kind(row): [2.0, 4.0]}) == 3.0
    assert plan.expected_seconds(plan.parts(REDUCED)[0][0], {}) == 0.0


def test_only_what_can_be_compiled_and_trained_in_time_is_begun():
    row = plan.parts(FULL)[0][0]
    seconds = plan.expected_seconds(row, {})
    batches = [[row] for row in plan.parts(FULL)[0][:7]]  # seven programs

    def count(left, jobs):
        return len(plan.affordable(batches, left, {}, jobs))

    assert count(22 + 7 * seconds + 1, jobs=16) == 7
    assert count(22 + 7 * seconds - 1, jobs=16) == 6
    assert count(44 + 2 * seconds + 1, jobs=1) == 2
    assert count(22, jobs=16) == 0


@pytest.mark.parametrize("task", [FULL.tasks[0], FULL.tasks[2]], ids=lambda task: task.name)
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # Qwix
@jax.numpy_dtype_promotion("standard")  # Linen's batch norm mixes bfloat16 with float32
def test_every_program_of_the_full_preset_traces_at_full_width(task):
    base = task.base
    shape = jax.ShapeDtypeStruct((45_000, 32, 32, 3), jnp.uint8)
    data = load("digits")  # the shapes of its images are replaced
    colour = np.zeros((2048, 32, 32, 3), np.uint8)
    fields = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    fields |= {f"{part}_images": colour for part in ("train", "validation", "test")}
    fields |= {f"{part}_labels": np.zeros(2048, np.int32) for part in ("train", "validation", "test")}
    dataset = dataclasses.replace(data, **fields)
    for method in task.methods:
        program = build(config_of(METHODS[method], base, 0), dataset, place(dataset, None))
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        split = program.split._replace(images=shape, labels=jax.ShapeDtypeStruct((45_000,), jnp.int32))
        state = jax.eval_shape(program.create, seed)
        order = jax.ShapeDtypeStruct((45_000 // base.batch_size * base.batch_size,), jnp.int32)
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        after, _ = jax.eval_shape(program.run, state, jax.eval_shape(Totals.zero), split, order, steps, seed)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        ), method


# The networks.


@pytest.mark.parametrize(("method", "seed"), [("recommended", 0), ("quant-trim", 3)])
def test_a_network_equals_that_of_the_ordinary_trainer(method, seed, digits, tmp_path):
    config = short(method)
    (result,) = train(build(config, digits, place(digits, config.train_limit)), [seed])
    model = models.create(config.model, digits.num_classes)
    ordinary = dataclasses.replace(config, seed=seed)
    expected = train_with_checkpoints(ordinary, model, digits, tmp_path, "m", on=jax.devices()[:1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 2e-4), result.network, expected)
    (row,) = records.read(tmp_path / "metrics.jsonl")
    assert result.curve[0]["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert row["tau"] and result.curve[0]["tau"] == pytest.approx(row["tau"], rel=1e-3)
    assert result.accuracies["validation_fp32"] == pytest.approx(row["validation_fp32"], abs=0.01)


@jax.numpy_dtype_promotion("standard")
def test_colour_images_take_the_path_of_the_full_preset(digits):
    """Loops of several steps, bfloat16, alternating flips and six views, on noise."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (96, 12, 12, 3), np.uint8), random.integers(0, 10, 96, np.int32)
    fields = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    fields |= {f"{part}_images": images for part in ("train", "validation", "test")}
    fields |= {f"{part}_labels": labels for part in ("train", "validation", "test")}
    changes = {
        "model": "speed-tiny",
        "epochs": 3,
        "batch_size": 32,
        "steps_per_dispatch": 2,
        "average_every": 2,
    }
    config = dataclasses.replace(config_of(METHODS["quant-trim"], FULL.tasks[0].base, 0), **changes)
    dataset = dataclasses.replace(digits, **fields)
    (result,) = train(build(config, dataset, place(dataset, None)), [0])
    assert result.is_finite and [row["step"] for row in result.curve] == [3, 6, 9]
    assert all(value is not None and 0 <= value <= 1 for value in result.accuracies.values())


def test_seeds_differ_and_are_the_same_one_by_one_and_at_once(digits):
    config = short("quant-trim", reverse_pruning=None)
    data = place(digits, config.train_limit)
    alone = [train(build(config, digits, data), [seed])[0] for seed in (3, 4)]
    together = train(build(config, digits, data, at_once=2), [3, 4])
    for one, other in zip(alone, together, strict=True):
        assert one.curve[0]["loss"] == pytest.approx(other.curve[0]["loss"], rel=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-2, 2e-3), one.network, other.network)
    kernels = [result.network["params"]["head"]["kernel"] for result in alone]
    assert not np.allclose(*kernels)


def test_the_whitening_stays_as_the_images_made_it(digits):
    config = short("quant-trim")
    (result,) = train(build(config, digits, place(digits, config.train_limit)), [0])
    positive, negative = np.split(result.network["params"]["whitening"]["kernel"], 2, axis=-1)
    np.testing.assert_array_equal(positive, -negative)
    assert np.ptp(positive) > 0 and np.any(result.network["params"]["whitening"]["bias"] != 0)


def test_fine_tuning_starts_from_the_given_network(digits):
    data = place(digits, 256)
    (base,) = train(build(short("float"), digits, data), [0])
    program = build(short("quant-trim", TUNED, learning_rate=0.0, average_every=0), digits, data)
    (tuned,) = train(program, [0], [(base.network, Path("base.npz"))])
    kernels = [result.network["params"]["block2_conv1"]["kernel"] for result in (base, tuned)]
    bound = np.abs(kernels[1]).max()  # reverse pruning alone has moved it
    np.testing.assert_allclose(kernels[1], np.clip(kernels[0], -bound, bound), atol=1e-6)
    other = {**base.network, "params": {"head": {"kernel": np.zeros((2, 2))}}}
    with pytest.raises(qt.InvalidInput, match="another network"):
        train(program, [0], [(other, Path("base.npz"))])


def test_a_network_that_is_not_finite_is_told(digits):
    config = short("float", learning_rate=1e20)
    (result,) = train(build(config, digits, place(digits, config.train_limit)), [0])
    assert not result.is_finite


# The command.


@pytest.fixture
def quick(monkeypatch):
    """Replace programs and trainings by ones that take no time, and return the rows that were trained."""
    seen = []

    class Fake:
        config, steps_per_epoch = SCRATCH.base, 1

        def __init__(self, config):
            self.config = config

    def fake_train(program, seeds, start=()):
        seen.append(
            (program.config.model, program.config.sched, program.config.epochs, tuple(seeds), len(start))
        )
        values = {"validation_fp32": 0.9, "validation_fake_quant": None, "top1": 0.8 + seeds[0] / 100}
        values |= {"top1_fake_quant": None, "top1_six_views": None}
        curve = [
            {
                "epoch": 1,
                "step": 1,
                "loss": 1.0,
                "accuracy": 0.5,
                "lambda": 0.0,
                "learning_rate": 0.1,
                "tau": {},
            }
        ]
        network = {"params": {"head": {"kernel": np.ones((2, 2), np.float32)}}, "batch_stats": {}}
        return [Trained(network, curve, values, 0.1) for _ in seeds]

    monkeypatch.setattr(command, "build", lambda config, dataset, data, at_once: Fake(config))
    monkeypatch.setattr(command, "rehearsed", lambda program: program)
    monkeypatch.setattr(command, "train", fake_train)
    monkeypatch.setattr(command, "set_up", lambda cache: None)
    return seen


def run(tmp_path, *flags):
    """Run the command without measurements, and return its exit status."""
    return command.main(["--preset", REDUCED.name, "--runs", str(tmp_path), "--no-measure", *flags])


def kept(tmp_path):
    """Return the records in the folder."""
    return records.read(tmp_path / f"paper-{REDUCED.name}" / TRAINED)


def test_each_row_is_trained_once_and_kept_whole(quick, tmp_path, capsys):
    assert run(tmp_path) == 0
    rows = study(REDUCED)
    found = kept(tmp_path)
    assert len(found) == len(rows) == len({(r["task"], r["method"], r["seed"]) for r in found})
    assert len(quick) == len(rows)
    for row in rows:
        folder = folder_of(row, tmp_path)
        assert read_variables(folder / NETWORK)["params"]["head"]["kernel"].tolist() == [[1, 1], [1, 1]]
        (last,) = records.read(folder / METRICS)
        assert (last["method"], last["validation_fp32"]) == (row.name, 0.9)
    assert "all rows are trained" in capsys.readouterr().out
    assert run(tmp_path) == 0 and len(quick) == len(rows) and kept(tmp_path) == found


def test_only_chosen_rows_and_those_that_they_start_from_are_trained(quick, tmp_path):
    assert run(tmp_path, "--tasks", TUNED.name, "--methods", "qat", "--seeds-at-once", "2") == 0
    assert [(r["task"], r["method"], r["seed"]) for r in kept(tmp_path)] == [
        (SCRATCH.name, "float", 0),
        (SCRATCH.name, "float", 1),
        (TUNED.name, "qat", 0),
        (TUNED.name, "qat", 1),
    ]
    assert [(seeds, starts) for *_, seeds, starts in quick] == [((0, 1), 0), ((0, 1), 2)]
    assert {r["seeds_at_once"] for r in kept(tmp_path)} == {2}


def test_what_fails_costs_its_own_rows_and_is_tried_again(quick, tmp_path, monkeypatch, capsys):
    build_fake, train_fake = command.build, command.train

    def build_or_fail(config, dataset, data, at_once):
        if config.quantizer == "qwix":
            raise ImportError("no module named qwix")
        return build_fake(config, dataset, data, at_once)

    def train_or_fail(program, seeds, start=()):
        if program.config.quantizer == "pact":
            raise RuntimeError("out of memory")
        return train_fake(program, seeds, start)

    monkeypatch.setattr(command, "build", build_or_fail)
    monkeypatch.setattr(command, "train", train_or_fail)
    methods = ("--tasks", SCRATCH.name, "--methods", "float", "qwix-w4", "pact-w4", "qat")
    assert run(tmp_path, *methods) == 1
    status = {(r["method"], r["seed"]): r["status"] for r in kept(tmp_path)}
    assert {status[name, 1] for name in ("float", "qat")} == {"ok"}
    assert (status["qwix-w4", 0], status["pact-w4", 1]) == ("unavailable", "crashed")
    assert "4 have failed" in capsys.readouterr().err
    monkeypatch.setattr(command, "build", build_fake)
    monkeypatch.setattr(command, "train", train_fake)
    before = len(quick)
    assert run(tmp_path, *methods) == 0 and len(quick) == before + 4
    assert {r["status"] for r in kept(tmp_path)} == {"ok"} and len(kept(tmp_path)) == 8


def test_a_diverged_network_is_recorded_and_not_trained_again(quick, tmp_path, monkeypatch):
    train_fake = command.train

    def diverge(program, seeds, start=()):
        results = train_fake(program, seeds, start)
        return [result._replace(curve=[{**result.curve[0], "loss": float("nan")}]) for result in results]

    monkeypatch.setattr(command, "train", diverge)
    flags = ("--tasks", TUNED.name, "--methods", "float")
    assert run(tmp_path, *flags) == 0
    assert {(r["task"], r["status"], r["top1"]) for r in kept(tmp_path)} == {(SCRATCH.name, "invalid", None)}
    assert run(tmp_path, *flags) == 0 and len(quick) == 2  # what would start from them is left


def test_a_diverged_network_holds_up_no_other_seed(quick, tmp_path, monkeypatch, capsys):
    train_fake = command.train

    def diverge(program, seeds, start=()):
        results = train_fake(program, seeds, start)
        bad = [{**results[0].curve[0], "loss": float("inf")}]
        return [
            one._replace(curve=bad) if seed == 1 else one for seed, one in zip(seeds, results, strict=True)
        ]

    monkeypatch.setattr(command, "train", diverge)
    flags = ("--tasks", TUNED.name, "--methods", "float", "--seeds-at-once", "2")
    assert run(tmp_path, *flags) == 0 and "The same command goes on" in capsys.readouterr().out
    assert run(tmp_path, *flags) == 0
    assert [seeds for *_, seeds, _ in quick] == [(0, 1), (0,)]
    assert "1 of them cannot be trained" in capsys.readouterr().out


def test_a_lost_network_is_trained_again_only_where_a_row_starts_from_it(quick, tmp_path):
    assert run(tmp_path, "--tasks", SCRATCH.name, "--methods", "float", "qat") == 0
    for row in study(REDUCED):
        if row.task is SCRATCH and row.seed == 0:
            (folder_of(row, tmp_path) / NETWORK).unlink(missing_ok=True)
    assert run(tmp_path, "--tasks", SCRATCH.name, "--methods", "float", "qat") == 0 and len(quick) == 4
    assert run(tmp_path, "--tasks", TUNED.name, "--methods", "qat") == 0
    assert [(seeds, starts) for *_, seeds, starts in quick[4:]] == [((0,), 0), ((0,), 1), ((1,), 1)]


def test_no_row_begins_that_would_not_end_in_time(quick, tmp_path, capsys):
    assert run(tmp_path, "--minutes", "1e-6") == 0
    assert (
        not quick and f"left: {len(study(REDUCED))} of {len(study(REDUCED))} rows" in capsys.readouterr().out
    )
    assert run(tmp_path, "--list") == 0 and "recommended-w4" in capsys.readouterr().out


def test_wrong_launches_are_refused(quick, tmp_path, capsys):
    assert command.main(["--runs", str(tmp_path)]) == 2
    assert "finds no GPU or TPU here" in capsys.readouterr().err
    assert run(tmp_path, "--methods", "nothing") == 2
    folder = home_of(REDUCED, tmp_path) / "accelerator"
    folder.mkdir(parents=True, exist_ok=True)
    with command.locked(folder):
        assert run(tmp_path) == 2
    assert "another process trains in" in capsys.readouterr().err
    for wrong in ("--seeds-at-once", "--minutes", "--compile-jobs"):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, wrong, "0")


def test_measurements_are_taken_once_each_in_a_process_of_its_own(tmp_path, monkeypatch):
    good = measurements.OpenMeasurement("good", ("platform",), 1)
    bad = measurements.OpenMeasurement("bad", ("no_such_module",), 1)
    slow = measurements.OpenMeasurement("slow", ("timeit", "-n", "1", "import time; time.sleep(9)"), 1)
    monkeypatch.setattr(measurements, "measurements", lambda preset: [good, bad, slow])
    found = [measurements.take(one, tmp_path, 2.0) for one in measurements.pending(REDUCED, tmp_path)]
    assert [record["status"] for record in found] == ["ok", "crashed", "timeout"]
    assert "no_such_module" in (tmp_path / "bad.log").read_text()
    assert measurements.pending(REDUCED, tmp_path) == [bad, slow]


def test_commands_of_measurements_have_flags_that_exist(tmp_path):
    for chosen in (FULL, REDUCED):
        for measurement in measurements.measurements(chosen):
            module, *flags = measurement.command_line(tmp_path)[2:]
            name = "experiments.accelerator.__main__" if module == "experiments.accelerator" else module
            options = importlib.import_module(name).Options
            assert isinstance(parse(options, flags, module), options)


# The whole, with cuts.


def cut(moments, *flags):
    """Launch the command and kill it at a random moment, half of the time while rows are trained."""
    process = launch(*flags)
    if moments.random() < 0.5:
        time.sleep(moments.uniform(2.0, 12.0))
    else:
        next((line for line in process.stdout if "compiled in" in line), None)
        time.sleep(moments.uniform(0.0, 2.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()


def by_row(rows):
    """Return records by task, method and seed."""
    return {(r["task"], r["method"], r["seed"]): r for r in rows}


def test_three_cuts_at_random_moments_lose_nothing_and_repeat_nothing(tmp_path):
    """Kill the training three times, let the fourth launch end, deploy its networks and render the tables."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the cuts: {seed}")
    moments, flags = random.Random(seed), ("--tasks", TUNED.name, "--methods", "quant-trim")
    runs, whole, results = tmp_path / "runs", tmp_path / "whole", tmp_path / "results"
    survived: dict[tuple, dict] = {}
    for _ in range(3):
        cut(moments, *flags, "--runs", str(runs))
        now = by_row(kept(runs))
        assert {row: now[row] for row in survived} == survived
        survived = now
    for folder in (runs, whole):
        if folder == whole:  # the same programs need not be compiled again
            shutil.copytree(home_of(REDUCED, runs) / "jax-cache", home_of(REDUCED, whole) / "jax-cache")
        process = launch(*flags, "--runs", str(folder))
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    found = by_row(kept(runs))
    assert len(kept(runs)) == len(found) == 4 and survived.items() <= found.items()
    for row, uncut in by_row(kept(whole)).items():
        for key in ("digest", "top1", "validation_fp32"):
            assert found[row][key] == uncut[key]

    study_command = importlib.import_module("experiments.paper.__main__")
    chosen = ("--preset", REDUCED.name, *flags, "--runs", str(runs), "--results", str(results))
    assert study_command.main([*chosen]) == 0
    folder = results / f"paper-{REDUCED.name}"
    summary = (folder / "summary.md").read_text()
    assert f"## {TUNED.name}" in summary and "Quant-Trim (published)" in summary
    assert "[trained](trained.md)" in summary
    deployed = records.read(folder / "deployment.jsonl")
    assert len(deployed) == 4 * 4 and {r["status"] for r in deployed} == {"ok"}
    references = by_row(r for r in deployed if r["scheme"] == "fp32")
    for row, record in found.items():
        assert references[row]["top1"] == pytest.approx(record["top1"], abs=0.006)  # but for two images
