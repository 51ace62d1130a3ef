"""Check the presets of the study: every row can be built, and backends offer every deployment."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import qt_jax as qt
from experiments import paper
from experiments.configs.study import STUDIES, preset
from experiments.paper.rows import folder_of, study, trials
from qt_jax.backends.evaluation import select_rows

MODULES = [
    *("experiments.configs.methods", "experiments.configs.study"),
    *(info.name for info in pkgutil.iter_modules(paper.__path__, "experiments.paper.")),
]


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_of_a_preset_can_be_built(name):
    chosen = preset(name)
    assert chosen.name == name
    rows = study(chosen)
    once = sum(len(task.methods) for task in chosen.tasks)
    again = sum(len(task.replicated) for task in chosen.tasks)
    assert len(rows) == len(chosen.seeds) * once + len(chosen.more_seeds) * again
    assert len({folder_of(row, Path()) for row in rows}) == len({str(row) for row in rows}) == len(rows)
    assert all(row.source in rows for row in rows if row.source)
    assert {row.seed for row in trials(chosen)} == {chosen.search_seed}
    assert chosen.search_seed not in (*chosen.seeds, *chosen.more_seeds)


@pytest.mark.parametrize("name", STUDIES)
def test_backends_offer_what_presets_ask_for(name):
    for target in {t for task in preset(name).tasks for t in (*task.main, *task.ablation)}:
        found = select_rows(target.backend, target.schemes, [target.runtime])
        assert {(s.name, r.name) for _, s, r in found[1:]} == {(s, target.runtime) for s in target.schemes}


def test_unknown_preset_is_refused():
    others = ("accelerator", "smoke", "accelerator-reduced", "quarter-hour", "quarter-hour-reduced")
    assert list(STUDIES) == ["cpu", "converged", *others]
    with pytest.raises(qt.InvalidInput, match="choose one of cpu, converged, accelerator"):
        preset("tpu")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
