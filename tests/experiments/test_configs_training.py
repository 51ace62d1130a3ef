"""Check the flags, presets and ranges of the command line."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import flax
import jax
import numpy as np
import pytest

import qt_jax as qt
from experiments.configs import training
from experiments.configs.training import (
    FREE_TO_CHANGE,
    PRESETS,
    RANGES,
    RECIPES,
    Config,
    lambda_schedule,
    parse,
    quant_config,
)
from experiments.data import load
from experiments.training.step import FLIPPABLE

FIELDS = [field.name for field in dataclasses.fields(Config)]


def help_of(arguments: list[str], capsys) -> str:
    """Return what `--help` prints, as one line."""
    with pytest.raises(SystemExit) as exit:
        parse([*arguments, "--help"])
    assert exit.value.code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def test_help_lists_every_field_with_its_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text = help_of([], capsys)
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in text, name
    assert text.count("(default:") == len(FIELDS)
    assert "python -m experiments.cifar" in text
    for name in training.MODELS:
        assert name in text


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_the_defaults_of_the_preset(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text = help_of(["--preset", preset], capsys)
    for name in ("model", "epochs", "batch_size", "dtype", "train_limit"):
        flag, value = f"--{name.replace('_', '-')} ", getattr(PRESETS[preset], name)
        assert re.search(rf"{flag}[^()]*\(default: {value}\)", text), name


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_auto_looks_for_an_accelerator(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert parse([]) == PRESETS[backend]
    chosen = parse(["--preset", "auto"])
    assert dataclasses.replace(chosen, preset=backend) == PRESETS[backend]


@pytest.mark.parametrize("preset", [["--preset", "smoke"], ["--preset=smoke"]])
def test_flags_override_the_preset_wherever_they_stand(preset):
    flags = ["--epochs", "7", "--bits=4", "--no-compare", "--reverse-pruning", "None"]
    wanted = dataclasses.replace(PRESETS["smoke"], epochs=7, bits=4, compare=False, reverse_pruning=None)
    assert parse([*preset, *flags]) == parse([*flags, *preset]) == wanted


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_the_defaults_of_its_flags(recipe):
    config = parse(["--preset", "cpu", "--recipe", recipe])
    assert config == dataclasses.replace(PRESETS["cpu"], recipe=recipe, **RECIPES[recipe])
    changed = parse(["--recipe", recipe, "--preset", "cpu", "--reverse-pruning", "0.9"])
    assert changed == dataclasses.replace(config, reverse_pruning=0.9)


def test_the_recipes_are_those_of_the_package():
    """Check that both spellings of a recipe, in Python and on the command line, say the same."""
    x = jax.numpy.ones((1, 4))
    model = flax.linen.Dense(2)
    variables = model.init(jax.random.key(0), x)
    for name, bits in (("published", 8), ("recommended", 8), ("recommended-w4", 4)):
        config = parse(["--preset", "cpu", "--recipe", name])
        make = getattr(qt.recipes, name.removesuffix("-w4"))
        recipe = make(model, variables, x, steps=3000, bits=bits)
        assert recipe.config == quant_config(config)
        names = {"quantile": "reverse_pruning", "folded": "reverse_pruning_folded"}
        fields = {"spread": "reverse_pruning_spread", "every": "reverse_pruning_every", **names}
        defaults = {"folded": False, "spread": 0.0}
        assert {key: {**defaults, **recipe.pruning}[key] for key in fields} == {
            key: getattr(config, field) for key, field in fields.items()
        }
        assert recipe.pruning["start"] == round(config.reverse_pruning_start * 3000)
        assert recipe.reestimates == bool(config.reestimate)
        steps = np.arange(0, 3000, 100)
        np.testing.assert_allclose(recipe.lam(steps), lambda_schedule(config, 3000)(steps), atol=1e-6)


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(qt.InvalidInput, match="published, recommended"):
        parse(["--recipe", "best"])


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(qt.InvalidInput, match="'tpu' is unknown; choose auto or one of cpu, gpu, smoke"):
        parse(["--preset", "tpu"])


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--sched", "cubic", "quartic-only"),
        ("--model", "vgg", "resnet20"),
        ("--bits", "1", "from 2 to 16, got 1"),
        ("--bits", "17", "from 2 to 16, got 17"),
        ("--activation-bits", "1", "from 2 to 16, got 1"),
        ("--epochs", "-1", "at least 1, got -1"),
        ("--batch-size", "0", "at least 1, got 0"),
        ("--train-limit", "-5", "at least 1, got -5"),
        ("--test-limit", "0", "at least 1, got 0"),
        ("--learning-rate", "nan", "at least 0, got nan"),
        ("--learning-rate", "-0.1", "at least 0, got -0.1"),
        ("--ema", "1.5", "from 0 to 0.999999, got 1.5"),
        ("--seed", "-1", "from 0 to 4294967295"),
        ("--reverse-pruning", "0", "(0, 1]"),
        ("--reverse-pruning-start", "2", "from 0 to 1"),
        ("--weight-quantile", "0.4", "from 0.5 to 1"),
        ("--range-momentum", "-1", "from 0 to 1"),
        ("--bits", "eight", "eight"),
        ("--epoch", "3", "--epochs"),
    ],
)
def test_wrong_values_end_with_status_2_and_one_message(flag, value, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        parse([flag, value, "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert flag in printed.err and says in printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_ranges_hold_for_every_preset_and_name_fields():
    assert set(RANGES) <= set(FIELDS)
    assert set(FIELDS) >= FREE_TO_CHANGE


SCHEDULES = {
    "quartic": qt.schedules.warmup_quartic_quadratic,
    "quartic-only": qt.schedules.quartic,
    "linear": qt.schedules.linear,
    "cosine": qt.schedules.cosine,
    "step": qt.schedules.step,
    "constant": lambda total: lambda count: 1.0,
    "none": lambda total: lambda count: 0.0,
}


def test_every_schedule_has_an_expectation():
    assert SCHEDULES.keys() == set(get_args(training.Schedule))


@pytest.mark.parametrize("name", get_args(training.Schedule))
def test_schedules_by_name(name):
    mine, expected = training.lambda_schedule(Config(sched=name), 100), SCHEDULES[name](100)
    for count in (0, 33, 60, 77, 100):
        assert float(mine(count)) == float(expected(count))


@pytest.mark.parametrize("name", get_args(training.Schedule))
def test_the_help_of_sched_explains_every_schedule(name, capsys):
    explained = help_of([], capsys).partition("--sched ")[2].partition("--quantizer ")[0]
    assert re.search(rf"(?<![\w-]){name}(, [\w-]+)*:", explained)


def test_quantization_follows_the_flags():
    config = training.quant_config(
        Config(bits=4, activation_bits=6, per_channel=True, weight_quantile=0.99, range_momentum=0.9)
    )
    assert (config.weights.bits, config.weights.axis, config.weights.quantile) == (4, -1, 0.99)
    assert (config.activations.bits, config.activations.symmetric) == (6, False)
    assert config.momentum == 0.9


def test_float_twin_differs_in_the_method_alone():
    config = Config(seed=3, epochs=5)
    twin = training.float_twin(config)
    assert (twin.sched, twin.reverse_pruning) == ("none", None)
    assert dataclasses.replace(twin, sched=config.sched, reverse_pruning=config.reverse_pruning) == config
    assert training.float_twin(twin) == twin


def test_default_folder_names_the_run():
    assert Config(seed=4).directory == Path("runs/cifar10-fast-quartic-4")
    assert Config(out=Path("here")).directory == Path("here")
    assert Config(preset="smoke").directory == Path("runs/cifar10-fast-quartic-0-smoke")


def test_rules_are_spelt_path_equals_bits_or_skip():
    config = parse(["--rules", "head=4", "stage1/.*=skip", "--per-channel"])
    rules = training.quant_config(config).rules
    assert rules[0] == qt.Rule("head", weights=qt.QuantSpec(4, axis=-1))
    assert rules[1] == qt.Rule("stage1/.*", skip=True)


@pytest.mark.parametrize("text", ["head", "head=", "=8", "head=eight", "head=99", "he(ad=8"])
def test_rules_that_make_no_sense_are_refused(text, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--rules", text])
    assert exit.value.code == 2
    assert "Error parsing" in capsys.readouterr().err


def test_schedule_fractions_reach_the_schedule():
    for sched in ("quartic", "quartic-only", "linear", "cosine", "step"):
        lam = training.lambda_schedule(Config(sched=sched, warmup=0.5, ramp_end=0.9), 100)
        assert float(lam(49)) == 0.0 and float(lam(91)) == 1.0
    assert float(training.lambda_schedule(Config(sched="constant"), 100)(0)) == 1.0
    assert float(training.lambda_schedule(Config(sched="none"), 100)(100)) == 0.0


def test_smoke_takes_every_digit_through_every_phase():
    """Check that smoke sees all images unflipped, that lambda takes every phase, and that pulls happen."""
    smoke, digits = parse(["--preset", "smoke"]), load("digits")
    assert smoke.dataset == "digits" and smoke.dataset not in FLIPPABLE
    assert smoke.train_limit >= len(digits.train_labels) and smoke.test_limit >= len(digits.test_labels)
    total = smoke.epochs * (len(digits.train_labels) // smoke.batch_size)
    lam = np.asarray(training.lambda_schedule(smoke, total)(np.arange(total)))
    assert (lam == 0).sum() > 100 and ((lam > 0) & (lam < 1)).sum() > 300 and (lam == 1).sum() > 100
    assert total * (1 - smoke.reverse_pruning_start) / smoke.reverse_pruning_every > 20


def test_smoke_stays_small_on_another_set():
    smoke = parse(["--preset", "smoke", "--dataset", "cifar10"])
    assert (smoke.train_limit, smoke.test_limit) == (1300, 500)
    assert smoke.directory == Path("runs/cifar10-resnet8-quartic-0-smoke")


DEPLOYED = {"folded": True, "grids": "vendors", "reverse_pruning_folded": True, "fused_outputs": True}


def test_deployment_aware_points_reach_quant_trim_and_the_float_twin_drops_them():
    config = training.Config(**DEPLOYED, bits=4)
    weights = training.quant_config(config).weights
    assert (weights.bits, weights.axis, weights.quantile, weights.grids) == (4, -1, 1.0, "vendors")
    assert training.quant_config(config).folded
    twin = training.float_twin(config)
    assert all(getattr(twin, name) in (False, "own") for name in DEPLOYED)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"folded": True, "sched": "none"}, r"--folded need .* other than none"),
        (
            {"grids": "conventions", "quantizer": "lsq", "sched": "constant", "reverse_pruning": None},
            "--grids need",
        ),
        ({"reverse_pruning_folded": True}, "give both"),
        ({"reestimate": 100}, "at least 500"),
        ({"reverse_pruning_spread": 1.0}, "from 0 to 0.99"),
    ],
)
def test_points_without_what_they_need_are_refused(settings, complaint):
    with pytest.raises(qt.InvalidInput, match=complaint):
        training.Config(**settings)
