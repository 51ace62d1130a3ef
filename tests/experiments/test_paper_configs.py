"""Methods and presets of the study: every file is a row, and every row can be built."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import qt_jax as qt
from experiments import paper
from experiments.configs import methods
from experiments.configs.methods import METHODS, ORDER, Method, config_of
from experiments.configs.study import NAMES, preset
from experiments.configs.training import Config
from experiments.paper.rows import folder_of, study, trials
from qt_jax.backends.evaluation import offered

MODULES = [
    *("experiments.configs.method", "experiments.configs.preset", "experiments.configs.presets"),
    *(info.name for info in pkgutil.iter_modules(paper.__path__, "experiments.paper.")),
]
FILES = sorted(Path(methods.__file__).parent.glob("[a-z]*.py"))


def test_every_file_is_a_method_and_has_its_place():
    assert sorted(METHODS) == sorted(file.stem.replace("_", "-") for file in FILES)
    assert [name for name in METHODS if name in ORDER] == list(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docstring_says_command_and_expectation(file):
    text = ast.get_docstring(ast.parse(file.read_text()))
    name = file.stem.replace("_", "-")
    assert f"python -m experiments.paper --methods {name}" in text
    assert "Expected" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_a_preset_can_be_built(name):
    chosen = preset(name)
    rows = study(chosen)
    once = sum(len(task.methods) for task in chosen.tasks)
    again = sum(len(task.replicated) for task in chosen.tasks)
    assert len(rows) == len(chosen.seeds) * once + len(chosen.more_seeds) * again
    assert len({folder_of(row, Path()) for row in rows}) == len({str(row) for row in rows}) == len(rows)
    assert all(row.source in rows for row in rows if row.source)
    assert {row.seed for row in trials(chosen)} == {chosen.search_seed}
    assert chosen.search_seed not in (*chosen.seeds, *chosen.more_seeds)


@pytest.mark.parametrize("name", NAMES)
def test_backends_offer_what_presets_ask_for(name):
    for target in {t for task in preset(name).tasks for t in (*task.main, *task.ablation)}:
        found = offered(target.backend, target.schemes, [target.runtime])
        assert {(s.name, r.name) for _, s, r in found[1:]} == {(s, target.runtime) for s in target.schemes}


def test_methods_change_what_they_say():
    base = Config(epochs=5)
    configs = {name: config_of(method, base, 7) for name, method in METHODS.items()}
    assert {config.seed for config in configs.values()} == {7}
    assert (configs["float"].sched, configs["float"].reverse_pruning) == ("none", None)
    assert (configs["qat"].sched, configs["qat"].reverse_pruning) == ("constant", None)
    assert configs["quant-trim"] == config_of(Method("none"), base, 7)
    assert (configs["fine-tuned"].epochs, configs["fine-tuned"].learning_rate) == (2, pytest.approx(0.02))
    assert configs["w4a4"].bits == configs["w4a4"].activation_bits == 4
    assert config_of(METHODS["float"], base, 7, factor=0.5).learning_rate == pytest.approx(0.1)


def test_unknown_field_and_preset_are_refused():
    with pytest.raises(qt.InvalidInput, match="changes bitts, which Config has not"):
        config_of(Method("typo", changes={"bitts": 4}), Config(), 0)
    with pytest.raises(qt.InvalidInput, match="choose one of cpu, accelerator, smoke"):
        preset("tpu")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
