"""Check which rows there are, in which order, at which rate, and which of them are done."""

import dataclasses

import pytest

import qt_jax as qt
from experiments.configs.study import preset
from experiments.configs.training import Config
from experiments.paper import rows
from experiments.paper.__main__ import unfinished
from experiments.paper.collect import replace
from experiments.paper.rows import (
    METRICS,
    NETWORK,
    changed,
    done,
    expected,
    folder_of,
    forget,
    has_network,
    row_of,
    select,
    study,
    trials,
)
from qt_jax import records

SMOKE = preset("smoke")
TASK = SMOKE.tasks[0]


def names(found) -> list[str]:
    return [str(row) for row in found]


def searched(method: str, *criteria: float) -> list[dict]:
    """Return search records of a method, at the factors of the preset."""
    return [
        {
            "task": "digits",
            "method": method,
            "seed": 1000,
            "digest": row_of(SMOKE, TASK, method, SMOKE.search_seed, trial=factor).digest,
            "factor": factor,
            "criterion": criterion,
        }
        for factor, criterion in zip(SMOKE.factors, criteria, strict=False)
    ]


def test_seeds_are_outermost():
    assert [row.seed for row in study(SMOKE)] == sorted([0, 1] * len(TASK.methods))
    assert names(study(SMOKE))[:2] == ["digits float 0", "digits quant-trim 0"]


def test_rates_come_from_the_search_and_say_so():
    found = searched("float", 0.6, 0.5) + searched("quant-trim", 0.6, 0.7)
    by_name = {row.name: row for row in study(SMOKE, found) if row.seed == 0}
    assert by_name["float"].config.learning_rate == pytest.approx(0.5 * TASK.base.learning_rate)
    assert by_name["float"].chosen == "float seed 1000 factor 0.5"
    assert by_name["clips"].chosen == "quant-trim seed 1000 factor 1"
    assert by_name["recommended"].chosen is None and by_name["recommended"].factor == 1.0
    assert by_name["fine-tuned"].source == by_name["float"]


def test_ties_go_to_the_smaller_rate():
    found = searched("float", 0.5, 0.5)
    assert rows.best(SMOKE, TASK, "float", found[::-1])["factor"] == 0.5


def test_a_search_that_is_unfinished_or_of_another_recipe_chooses_nothing():
    assert rows.best(SMOKE, TASK, "float", searched("float", 0.6)) is None
    stale = [found | {"digest": "another"} for found in searched("float", 0.6, 0.5)]
    assert rows.best(SMOKE, TASK, "float", stale) is None


def test_digest_follows_config_and_source_only():
    row = row_of(SMOKE, TASK, "fine-tuned", 0)
    assert row.digest == row_of(SMOKE, TASK, "fine-tuned", 0).digest
    faster = row_of(SMOKE, TASK, "fine-tuned", 0, searched("float", 0.6, 0.5))
    assert faster.config == row.config and faster.digest != row.digest
    assert row_of(SMOKE, TASK, "clips", 0).digest != row_of(SMOKE, TASK, "batch-norm", 0).digest
    other = dataclasses.replace(TASK, main=(), ablation=())
    assert row_of(SMOKE, other, "float", 0).digest == row_of(SMOKE, TASK, "float", 0).digest


def test_fine_tuning_starts_from_the_float_network_of_its_task():
    chosen = preset("converged")
    task = chosen.task("cifar10-speed-tuned")
    base = row_of(chosen, chosen.task("cifar10-speed"), "float", 3)
    tuned, start = (row_of(chosen, task, name, 3) for name in ("float", "start"))
    assert tuned.source == start.source == base and start.config == base.config
    assert (tuned.config.epochs, tuned.config.learning_rate) == (task.base.epochs, task.base.learning_rate)
    rescaled = row_of(chosen, task, "float-learned", 3)
    assert rescaled.source == tuned and rescaled.digest not in (tuned.digest, start.digest)
    assert not {"start", "start-learned", "float-learned"} & {row.name for row in trials(chosen)}
    assert {row.name for row in trials(chosen)} >= {"float", "kure", "sam", "neutral", "lsq-w4"}


def test_rows_bring_the_sources_of_their_sources(tmp_path):
    chosen = preset("converged")
    every = study(chosen)
    for name, needed in (("float-learned", "float"), ("neutral-unscaled", "neutral")):
        mine = [row for row in select(every, methods=[name]) if row.seed == 0]
        tuned = "cifar10-speed-tuned"
        assert names(mine) == ["cifar10-speed float 0", f"{tuned} {needed} 0", f"{tuned} {name} 0"]
        assert unfinished(mine, {*mine[:2]}, tmp_path) == mine  # their networks are not on this disk
        place = folder_of(mine[1], tmp_path)
        place.mkdir(parents=True)
        (place / rows.DESCRIPTION).touch()
        assert unfinished(mine, {*mine[:2]}, tmp_path) == mine[2:]


def test_a_task_that_starts_from_nothing_has_no_network_to_start_from():
    with pytest.raises(qt.InvalidInput, match="do not start from another"):
        row_of(SMOKE, TASK, "start", 0)


def test_the_committed_study_is_complete():
    chosen, folder = preset("cpu"), rows.RESULTS / "paper-cpu"
    every = study(chosen, records.read(folder / rows.SEARCH))
    assert [str(row) for row in every if row not in done(every, folder)] == []


def test_only_what_differs_from_the_defaults_counts():
    assert changed(Config()) == {}
    assert changed(Config(rules=("head=8",), reverse_pruning=None)) == {
        "rules": ["head=8"],
        "reverse_pruning": None,
    }


def test_selection_brings_what_is_needed():
    every = study(SMOKE)
    assert names(select(every, methods=["fine-tuned"])) == [
        *("digits float 0", "digits fine-tuned 0"),
        *("digits float 1", "digits fine-tuned 1"),
    ]
    assert {row.name for row in select(every, tables=["export"])} == {
        *("quant-trim", "recommended", "clips", "batch-norm")
    }
    assert select(every) == every
    with pytest.raises(qt.InvalidInput, match=r"--only spedule is unknown here; choose among .*main"):
        select(every, tables=["spedule"])
    with pytest.raises(qt.InvalidInput, match="--methods lsq is unknown here"):
        select(every, methods=["lsq"])
    with pytest.raises(qt.InvalidInput, match="no row is of all these"):
        select(every, tables=["export"], methods=["float"])


def test_folders_are_apart():
    every = [*study(SMOKE), *trials(SMOKE)]
    assert len({folder_of(row, rows.RESULTS) for row in every}) == len(every)


def test_done_needs_every_record_of_the_present_config(tmp_path):
    row, other = study(SMOKE)[:2]
    about = {"task": "digits", "method": row.name, "seed": row.seed}
    assert done([row], tmp_path) == set()
    replace(tmp_path / rows.TRAINING, [about | {"digest": row.digest}], ("method",))
    places = [dict(zip(("backend", "scheme", "runtime"), place, strict=True)) for place in expected(row)]
    assert len(places) == 4
    replace(tmp_path / rows.DEPLOYMENT, [about | place for place in places[1:]], ("method",))
    assert done([row], tmp_path) == set()
    replace(tmp_path / rows.DEPLOYMENT, [about | place for place in places], ("method",))
    assert done([row, other], tmp_path) == {row}
    replace(tmp_path / rows.TRAINING, [about | {"digest": "of another config"}], ("method",))
    assert done([row], tmp_path) == set()


def test_a_trial_is_done_by_its_own_record(tmp_path):
    first, *others = trials(SMOKE)
    record = {"task": "digits", "method": first.name, "seed": first.seed, "factor": first.factor}
    replace(tmp_path / rows.SEARCH, [record | {"digest": first.digest}], ("factor",))
    assert done([first, *others], tmp_path) == {first}


def test_what_the_accelerator_has_trained_is_never_forgotten(tmp_path):
    first, tuned = (study(preset("quarter-hour"))[index] for index in (0, 12))
    assert tuned.source == first and not has_network(first, tmp_path)
    for row in (first, tuned, study(SMOKE)[0]):
        folder = folder_of(row, tmp_path)
        (folder / "evaluation").mkdir(parents=True)
        for name in (NETWORK, METRICS, "model.onnx"):
            (folder / name).touch()
        assert has_network(row, tmp_path)
        forget(row, tmp_path)
        left = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert left == ({NETWORK, METRICS} if row.preset.accelerated else set())


def test_what_is_trained_already_waits_for_no_source():
    tuned = next(row for row in study(preset("quarter-hour")) if row.source)
    fine_tuned = next(row for row in study(SMOKE) if row.name == "fine-tuned")
    assert tuned.waits_for is None and fine_tuned.waits_for == fine_tuned.source
