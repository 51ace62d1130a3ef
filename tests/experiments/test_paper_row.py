"""Check one row after another in this process: trained, exported, deployed, collected, and not done twice."""

import contextlib
import dataclasses
import io
import os
import signal
import sys

import numpy as np
import onnx
import pytest
from flax.traverse_util import flatten_dict
from rich.console import Console

import qt_jax as qt
from experiments.configs.study import Target, preset
from experiments.configs.training import lambda_schedule
from experiments.paper import collect, networks, rows
from experiments.paper import row as row_module
from experiments.paper.launch import command
from experiments.paper.networks import perform
from experiments.paper.progress import durations, listing, state
from experiments.paper.row import Options, find, main
from experiments.paper.rows import GRAPH, folder_of, row_of
from experiments.paper.structure import BINS, kernel_tails
from qt_jax import records
from qt_jax.export import graph as graph_module
from qt_jax.export.network import load
from qt_jax.export.sessions import named_inputs, run_tensors

SMOKE = preset("smoke")
FEW = (Target("onnxruntime", "reference", ("int4w-pt-minmax",)),)
NONE = (Target("onnxruntime", "reference", ()),)
TASK = dataclasses.replace(SMOKE.tasks[0], main=FEW, ablation=NONE)
"""Task with as few deployments as will do."""
DONE = ("float", "quant-trim", "fine-tuned", "clips", "batch-norm")
KINDS = {name: row_of(SMOKE, TASK, name, 0) for name in DONE}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return the folder of a study of which one seed is done."""
    base = tmp_path_factory.mktemp("study")
    for row in KINDS.values():
        perform(row, base / "runs", base / "results", Console(file=io.StringIO()))
    return base


def results(study, name: str) -> list[dict]:
    return records.read(study / "results" / "paper-smoke" / name)


def test_records_are_complete(study):
    every = list(KINDS.values())
    assert rows.done(every, study / "results" / "paper-smoke") == set(every)
    deployment = results(study, rows.DEPLOYMENT)
    assert len(deployment) == 2 * 2 + 3
    assert {(r["status"], r["n"], r["seed"], r["task"]) for r in deployment} == {("ok", 100, 0, "digits")}
    assert not {"predictions", "operators", "limits", "cpu"} & set().union(*deployment)
    assert all(sum(count for count, *_ in r["reliability"]) == r["n"] for r in deployment)
    assert [path.name for path in (folder_of(every[0], study / "runs") / "evaluation").iterdir()] == [
        "records.jsonl"
    ]


def test_training_says_what_was_changed_and_what_it_took(study):
    found = {r["method"]: r for r in results(study, rows.TRAINING)}
    assert found["float"]["changes"] == {"reverse_pruning": None, "sched": "none"}
    assert found["quant-trim"]["changes"] == {} and found["quant-trim"]["rate_from"] is None
    assert (found["fine-tuned"]["start"], len(found["fine-tuned"]["epochs"])) == ("float", 1)
    assert (found["clips"]["network"], found["clips"]["export"]) == ("quant-trim", "clips")
    assert found["clips"]["epochs"] == found["quant-trim"]["epochs"]
    for record in found.values():
        assert record["seconds"] > 0 and record["versions"]["jax"] and record["cpu"]["cores"]
        assert record["validation_fp32"] == record["epochs"][-1]["validation_fp32"]


def test_structure_is_that_of_the_network(study):
    found = {r["method"]: r for r in results(study, rows.STRUCTURE)}
    row = KINDS["quant-trim"]
    network = load(folder_of(row, study / "runs"))
    head = np.abs(np.asarray(network.variables["params"]["head"]["kernel"], np.float64))
    [layer] = [entry for entry in found["quant-trim"]["layers"] if entry["layer"] == "head"]
    assert layer["raw"]["largest"] == pytest.approx(head.max(), rel=1e-5)
    assert layer["raw"]["tails"][-1] == pytest.approx(head.max() / np.sqrt((head**2).mean()), rel=1e-5)
    range_ = network.variables["batch_stats"]["head"]["quant_input"]
    assert layer["learned"] == pytest.approx([float(range_["low"]), float(range_["high"])])
    assert layer["input"] == sorted(layer["input"])
    for entry in found["quant-trim"]["layers"]:
        assert entry["sqnr_db"]["int4w-pt-minmax"] < entry["sqnr_db"]["int8-pt-minmax"] < 60
    weights = sum(leaf.size for path, leaf in _kernels(network))
    assert sum(found["quant-trim"]["histograms"]["raw"]) == weights
    assert len(found["quant-trim"]["histograms"]["folded"]) == len(BINS)
    assert all(entry["learned"] is None for entry in found["float"]["layers"])

    steps = found["quant-trim"]["lambda"]
    assert (steps["epoch"][0], steps["epoch"][-1], steps["lambda"][-1]) == (0.0, 2.0, 1.0)
    assert steps["lambda"][30] == pytest.approx(float(lambda_schedule(row.config, 8)(4)), rel=1e-5)
    assert [epoch["epoch"] for epoch in found["quant-trim"]["tau"]] == [1, 2]
    last = found["quant-trim"]["tau"][-1]["tau"]
    assert last.keys() == {"head", "stem", "stage1_block1/conv1", "stage1_block1/conv2"}
    assert head.max() <= last["head"] * 1.2 and not found["float"]["tau"]


def _kernels(network):
    leaves = flatten_dict(network.variables["params"])
    return [(path, leaf) for path, leaf in leaves.items() if path[-1] == "kernel"]


def test_tails_by_hand():
    found = kernel_tails(np.array([[1.0, -2.0], [1.0, 2.0]]))
    assert found["largest"] == 2.0
    assert found["tails"][-1] == pytest.approx(2 / np.sqrt(2.5), rel=1e-5)
    assert (found["channels"][0], found["channels"][-1]) == (0.75, 1.0)


def test_variants_deploy_the_same_network_in_another_way(study):
    """Check that parameters are those of Quant-Trim; only Clip nodes or statistics differ."""
    plain, clips, norm = (
        load(folder_of(KINDS[name], study / "runs")) for name in ("quant-trim", "clips", "batch-norm")
    )
    kernel = plain.variables["params"]["stem"]["kernel"]
    for other in (clips, norm):
        np.testing.assert_array_equal(kernel, other.variables["params"]["stem"]["kernel"])
    operators = {
        name: [node.op_type for node in onnx.load(folder_of(KINDS[name], study / "runs") / GRAPH).graph.node]
        for name in ("quant-trim", "clips", "batch-norm")
    }
    assert "Clip" in operators["clips"] and "Clip" not in operators["quant-trim"]
    assert operators["batch-norm"] == operators["quant-trim"]
    statistics = [n.variables["batch_stats"]["stem_norm"]["mean"] for n in (plain, clips, norm)]
    np.testing.assert_array_equal(statistics[0], statistics[1])
    assert np.abs(statistics[0] - statistics[2]).max() > 0


def test_fine_tuning_starts_from_the_float_network(study):
    start, tuned = (
        load(folder_of(KINDS[name], study / "runs")).variables["params"]["stem"]["kernel"]
        for name in ("float", "fine-tuned")
    )
    scratch = load(folder_of(KINDS["quant-trim"], study / "runs")).variables["params"]["stem"]["kernel"]
    assert 0 < np.median(np.abs(tuned - start)) < np.median(np.abs(tuned - scratch))


def test_relaunch_trains_and_deploys_nothing_again(study, monkeypatch):
    row = KINDS["quant-trim"]
    before = {r["method"]: r for r in results(study, rows.TRAINING)}["quant-trim"]
    count = {name: len(results(study, name)) for name in (rows.TRAINING, rows.STRUCTURE, rows.DEPLOYMENT)}
    monkeypatch.setattr(networks, "deploy_float", None)
    console = Console(file=io.StringIO())
    perform(row, study / "runs", study / "results", console)
    assert "onnxruntime" not in console.file.getvalue()
    after = {r["method"]: r for r in results(study, rows.TRAINING)}["quant-trim"]
    assert after["epochs"] == before["epochs"] and after["seconds"] > before["seconds"]
    assert {name: len(results(study, name)) for name in count} == count


def test_failure_is_noted_and_shown(study, monkeypatch):
    row = row_of(SMOKE, TASK, "float", 1)
    monkeypatch.setattr(networks, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perform(row, study / "runs", study / "results", Console(file=io.StringIO()))
    assert state(row, study / "runs") == "failed"
    assert state(row_of(SMOKE, TASK, "quant-trim", 1), study / "runs") == "pending"


def test_listing_shows_states_and_hours(study):
    every = rows.study(dataclasses.replace(SMOKE, tasks=(TASK,)))
    console = Console(file=io.StringIO(), width=100)
    console.print(listing(every, study / "runs", study / "results" / "paper-smoke"))
    text = console.file.getvalue()
    assert "5 done" in text and "pending" in text and "hours" in text
    assert sum(durations(every, study / "results" / "paper-smoke").values()) > 0


def test_trial_of_the_search_is_judged_on_the_validation_split(study):
    options = Options("smoke", "digits", "float", SMOKE.search_seed, factor=0.5)
    row = find(options)
    assert row.searching and row.config.learning_rate == pytest.approx(0.1)
    perform(row, study / "runs", study / "results", Console(file=io.StringIO()))
    [trial] = results(study, rows.SEARCH)
    assert (trial["factor"], trial["seed"], trial["images"]) == (0.5, SMOKE.search_seed, 100)
    shown = [trial[name] for name in ("fp32", "int4w-pt-minmax", "int4w-pc-minmax")]
    assert trial["criterion"] == pytest.approx(np.mean(shown))
    assert {r["seed"] for r in results(study, rows.DEPLOYMENT)} == {0}
    chosen = row_of(SMOKE, TASK, "float", 0, results(study, rows.SEARCH))
    assert (chosen.factor, chosen.chosen) == (1.0, None)  # the other factors are still to come


def test_a_trial_is_as_good_as_its_worst_deployment():
    judged = dataclasses.replace(SMOKE, criterion="worst", judges=FEW)
    row = row_of(judged, TASK, "float", SMOKE.search_seed, trial=0.5)
    found = [{"scheme": "fp32", "top1": 0.9, "n": 100}, {"scheme": "int4w-pt-minmax", "top1": 0.4, "n": 100}]
    trial = collect.trial(row, found, 1.0)
    assert (trial["criterion"], trial["criterion_of"]) == (0.4, "int4w-pt-minmax")
    with pytest.raises(qt.InvalidInput, match="int4w-pt-minmax gave no accuracy"):
        collect.trial(row, [found[0], found[1] | {"top1": None}], 1.0)


def test_fine_tuned_rows_and_rescaled_graphs(study):
    base = dataclasses.replace(TASK.base, epochs=1)
    tuned = dataclasses.replace(TASK, name="tuned", base=base, start="digits", ablation=FEW)
    both = dataclasses.replace(SMOKE, tasks=(TASK, tuned))
    names = ("float", "start", "start-ranges", "averaged", "kure", "range-restriction", "sam")
    every = {name: row_of(both, tuned, name, 0) for name in names}
    for row in every.values():
        perform(row, study / "runs", study / "results", Console(file=io.StringIO()))
    assert rows.done(list(every.values()), study / "results" / "paper-smoke") == set(every.values())
    folders = {name: folder_of(row, study / "runs") for name, row in every.items()}
    graphs = {name: onnx.load(folder / GRAPH) for name, folder in folders.items()}
    digits = load(folders["start"]).samples.parity.transpose(0, 3, 1, 2)
    logits = {
        name: run_tensors(graph, ["logits"], named_inputs(graph, digits)) for name, graph in graphs.items()
    }
    shown = {name: np.concatenate([batch["logits"] for batch in found]) for name, found in logits.items()}
    kernels = {name: graph_module.constants(graph)["head/kernel"] for name, graph in graphs.items()}
    np.testing.assert_allclose(shown["start-ranges"], shown["start"], rtol=1e-4, atol=1e-4)
    assert not np.allclose(kernels["start-ranges"], kernels["start"])
    assert len({kernels[name].tobytes() for name in names}) == len(names)


def test_command_line_finds_the_same_row():
    row = row_of(SMOKE, SMOKE.tasks[0], "clips", 0)
    arguments = command(row, rows.RESULTS, rows.RESULTS, 1)
    assert arguments[:3] == [sys.executable, "-m", "experiments.paper.row"]
    flags = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    assert flags["--parent"] == str(os.getpid())
    assert find(Options(flags["--preset"], flags["--task"], flags["--method"], int(flags["--seed"]))) == row


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--task", "nothing", "--method", "float"),
            "--task 'nothing' is unknown here; choose one of digits",
        ),
        (("--task", "digits", "--method", "lsq"), "--method 'lsq' is unknown here; choose one of float"),
    ],
)
def test_unknown_row_is_refused(arguments, says, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        assert main(["--preset", "smoke", "--seed", "0", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_row_ends_itself_without_its_parent(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
    row_module._end_without(os.getppid() + 1)
    assert sent == [(os.getpid(), signal.SIGTERM)]
