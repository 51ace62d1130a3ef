"""Run the command line from end to end, on scikit-learn's digits and a very small network."""

import contextlib
import hashlib
import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
from rich.console import Console

from experiments import cifar, models, pipeline, runs
from experiments.configs.training import FREE_TO_CHANGE, parse
from experiments.models.resnet import ResNet
from experiments.pipeline import RUN_SCHEMES
from experiments.training import loop
from qt_jax import records
from qt_jax.backends import steps
from qt_jax.export import __main__ as cli

FLAGS = (
    *("--preset", "smoke", "--dataset", "digits", "--model", "tiny", "--train-limit", "256"),
    *("--batch-size", "64", "--epochs", "2", "--reverse-pruning-every", "2"),
    *("--calibration-size", "16", "--test-limit", "100"),
)
METHODS = (runs.QUANT_TRIM, runs.FLOAT)
SCHEMES = list(RUN_SCHEMES)
PRODUCTS = {
    *("config.json", "metrics.jsonl", "records.jsonl", "checkpoints", "tensorboard"),
    *("model.onnx", "model.json", "model.ranges.json", "twin.onnx", "twin.json", "samples.npz"),
    *("summary.md", "summary.png", "report.html"),
}
ADDED = ("model.json", "twin.json", "samples.npz", "model.ranges.json")
LATE = ("model.onnx", *ADDED)


class Finished(NamedTuple):
    """Hold a run that has ended: its folder, what it printed, and the variables it trained, by method."""

    folder: Path
    printed: str
    trained: dict[str, dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", partial(ResNet, (1,), 4))
        patch.setitem(models.MODELS, "wide", partial(ResNet, (1,), 8))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_networks) -> Finished:
    folder = tmp_path_factory.mktemp("a folder with a name that is longer than eighty columns " + "x" * 40)
    trained, printed, train = {}, io.StringIO(), pipeline.train

    def remember(config, model, dataset, directory, method):
        trained[method] = train(config, model, dataset, directory, method)
        return trained[method]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train", remember)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            assert cifar.main([*FLAGS, "--out", str(folder)]) == 0
    return Finished(folder, printed.getvalue(), trained)


@pytest.fixture
def copy(finished, tmp_path, monkeypatch) -> Path:
    """Copy the finished run, and skip its training."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    monkeypatch.setattr(
        pipeline, "train", lambda config, model, dataset, directory, method: finished.trained[method]
    )
    return folder


def launch(folder: Path, *flags: str) -> int:
    return cifar.main([*FLAGS, "--out", str(folder), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_folder_holds_every_product_and_nothing_else(finished):
    assert {path.name for path in finished.folder.iterdir()} == PRODUCTS
    assert {path.name for path in (finished.folder / "checkpoints").iterdir()} == set(METHODS)
    config = json.loads((finished.folder / "config.json").read_text())
    assert (config["model"], config["sched"], config["epochs"]) == ("tiny", "quartic", 2)
    for name in runs.ONNX_NAMES.values():
        onnx.checker.check_model(onnx.load(finished.folder / name), full_check=True)
    assert (finished.folder / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_float_run_whose_graph_is_rescaled_has_one_network(tmp_path):
    flags = ("--sched", "none", "--reverse-pruning", "None", "--equalize", "ranges", "--epochs", "1")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        assert launch(tmp_path / "run", *flags) == 0
    assert {row["method"] for row in records.read(tmp_path / "run" / "records.jsonl")} == {runs.FLOAT}
    graphs = sorted(path.name for path in (tmp_path / "run").glob("*.onnx"))
    assert graphs == [runs.ONNX_NAMES[runs.FLOAT]]
    assert "factors rescale the channels" in printed.getvalue() and "any more" not in printed.getvalue()


def test_a_network_without_free_channels_is_refused_before_it_is_trained(tmp_path, capsys):
    assert launch(tmp_path / "run", "--model", "lstm", "--equalize", "ranges") == 2
    assert "--equalize ranges does not suit --model lstm. No channel" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_rows_of_both_networks(finished):
    rows = records.read(finished.folder / "metrics.jsonl")
    assert [(row["method"], row["epoch"]) for row in rows] == [(m, e) for m in METHODS for e in (1, 2)]
    assert all(row["compilations"] == 1 for row in rows)
    assert ["validation_fake_quant" in row for row in rows] == [True, True, False, False]
    assert [row["lambda"] for row in rows][1:] == [1.0, 0.0, 0.0]


def test_one_record_a_network_and_scheme(finished):
    rows = records.read(finished.folder / "records.jsonl")
    assert [(row["method"], row["scheme"]) for row in rows] == [(m, s) for m in METHODS for s in SCHEMES]
    for row in rows:
        assert (row["status"], row["n"], row["task"], row["seed"]) == ("ok", 100, "digits", 0), row["reason"]
        assert row["checkpoint"] == sha256(finished.folder / runs.ONNX_NAMES[row["method"]])
        assert row["calibration"] is None or row["calibration"]["n"] == 16
        order = ["run", "task", "model", "method", "seed", "checkpoint", "sched", "training"]
        assert [key for key in row if key in order] == order
    assert {row["sched"] for row in rows} == {"quartic", "none"}


def test_summary_has_the_table_the_drift_and_the_provenance(finished):
    text = (finished.folder / "summary.md").read_text()
    assert text.startswith("# digits, tiny, --sched quartic, seed 0")
    for scheme in SCHEMES:
        assert f"| {scheme} |" in text
    assert "quant-trim: 2 epochs" in text and "float: 2 epochs" in text and "fake-quantized" in text
    assert "onnxruntime" in text and "commit" in text


def test_log_without_a_terminal_is_plain_lines(finished):
    lines = finished.printed.splitlines()
    assert not set("\r\x1b") & set(finished.printed)
    assert lines[0].endswith(f"run folder {finished.folder}")
    epochs = [line for line in lines if " epoch " in line]
    assert [line.split("  ")[0] for line in epochs] == [f"{m} epoch {e}/2" for m in METHODS for e in (1, 2)]
    assert all("loss" in line and "lambda" in line and "images/s" in line for line in epochs)
    assert "img/s" not in finished.printed
    assert sum(line.startswith(("model.onnx: ", "twin.onnx: ")) for line in lines) == 2
    assert f"{finished.folder}/summary.md" in lines[-1]


def test_relaunch_does_nothing_again(finished, monkeypatch, capsys):
    def stamps():
        drawn = ("summary.md", "summary.png", "report.html")  # from the records, every time
        kept = [p for p in finished.folder.rglob("*") if p.is_file() and p.name not in drawn]
        return {path: path.stat().st_mtime_ns for path in kept}

    for module, stage in ((loop, "_run_epoch"), (pipeline, "deploy"), (pipeline.qt, "evaluate")):
        monkeypatch.setattr(module, stage, None)
    before = stamps()
    assert launch(finished.folder) == 0
    assert stamps() == before
    assert "int4w-pt-minmax" in capsys.readouterr().out


def test_evaluation_and_export_resume_where_something_is_missing(finished, copy, capsys):
    """Remove two records and the graph, and cut a third record short. What is written again is the same."""
    path = copy / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:1], *lines[2:18]]) + lines[18][:40])
    for name in LATE:
        (copy / name).unlink()
    with pytest.warns(UserWarning, match="was cut short"):
        assert launch(copy) == 0
    rows = records.read(path)
    assert sorted((row["method"], row["scheme"]) for row in rows) == sorted(
        (m, s) for m in METHODS for s in SCHEMES
    )
    assert path.read_text().startswith("".join([*lines[:1], *lines[2:18]]))
    expected = {(row["method"], row["scheme"]): row for row in map(json.loads, lines)}
    for row in rows:
        for key in ("checkpoint", "top1", "nll", "sqnr_db"):
            assert row[key] == expected[row["method"], row["scheme"]][key], (row["scheme"], key)
    for name in LATE:
        assert (copy / name).read_bytes() == (finished.folder / name).read_bytes()


def test_older_run_gets_what_it_lacks(finished, copy, capsys):
    """Keep a graph that is there, and add its description, samples and ranges."""
    for name in ADDED:
        (copy / name).unlink()
    assert cli.main([str(copy), "--out", str(copy.parent / "m.onnx")]) == 2
    assert "repeat the command that trained it" in capsys.readouterr().err
    stamp = (copy / "model.onnx").stat().st_mtime_ns
    assert launch(copy) == 0
    assert (copy / "model.onnx").stat().st_mtime_ns == stamp
    for name in ADDED:
        assert (copy / name).read_bytes() == (finished.folder / name).read_bytes()


def test_run_exports_itself_again(finished, tmp_path, capsys):
    """Export from the folder alone: the same FP32 graph, and one on integers."""
    out = tmp_path / "m.onnx"
    assert cli.main([str(finished.folder), "--out", str(out)]) == 0
    for name in ("model.onnx", "model.ranges.json"):
        again = out if name == "model.onnx" else tmp_path / "m.ranges.json"
        assert again.read_bytes() == (finished.folder / name).read_bytes()
    assert cli.main([str(finished.folder), "--out", str(out), "--qdq", "int8"]) == 0
    assert "against JAX at lambda = 1 on 144 real inputs" in capsys.readouterr().out
    assert cli.main([str(finished.folder / "twin.json"), "--out", str(out), "--qdq", "int8"]) == 2
    assert "needs learned ranges" in capsys.readouterr().err


def refused(folder: Path, capsys, *flags: str) -> str:
    """Launch what must be refused, check that nothing was harmed, and return the message."""
    before = contents(folder)
    assert launch(folder, *flags) == 2
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("error") == 1 and "Traceback" not in message
    return message


def test_another_config_is_refused(copy, capsys):
    message = refused(copy, capsys, "--bits", "4", "--seed", "1")
    assert "seed 0 -> 1, bits 8 -> 4" in message and message.count("\n") == 1


def test_malformed_metrics_and_records_are_named(copy, capsys):
    for name in ("metrics.jsonl", "records.jsonl"):
        path = copy / name
        whole = path.read_bytes()
        path.write_bytes(whole[1:])
        assert f"{name}, line 1 is not a record" in refused(copy, capsys)
        path.write_bytes(whole)


def test_lost_metrics_are_named(copy, capsys):
    (copy / "metrics.jsonl").unlink()
    assert "metrics.jsonl has no epoch of float and quant-trim" in refused(copy, capsys)


def test_truncated_graph_is_named(copy, capsys):
    graph = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(graph[: len(graph) // 2])
    (copy / "records.jsonl").unlink()
    assert "model.onnx" in refused(copy, capsys)


def test_checkpoint_of_another_model_is_refused(finished, tmp_path, capsys):
    folder = tmp_path / "wide"
    shutil.copytree(finished.folder / "checkpoints", folder / "checkpoints")
    config = json.loads((finished.folder / "config.json").read_text()) | {"model": "wide"}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder, capsys, "--model", "wide")
    assert "checkpoints/quant-trim/8 is of another model or config" in message


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--preset", "tpu"], "choose auto or one of cpu, gpu, smoke"),
        (["--batch-size", "300"], "--batch-size 300 is larger than the training split (256)"),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "no CIFAR-10 in data_dir nowhere"),
    ],
)
def test_refusal_leaves_a_folder_that_can_still_be_used(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    assert says in refused(folder, capsys, *flags)
    runs.claim(folder, parse([*FLAGS, "--out", str(folder)]), FREE_TO_CHANGE)


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert launch(tmp_path / "run") == 2
    assert "run cannot be the folder of a run" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "methods"),
    [
        (["--sched", "none", "--reverse-pruning", "None"], [runs.FLOAT]),
        (["--no-compare"], [runs.QUANT_TRIM]),
        ([], [runs.QUANT_TRIM, runs.FLOAT]),
    ],
)
def test_networks_that_a_command_trains(flags, methods, tmp_path, monkeypatch):
    seen = []

    def stop(config, model, dataset, directory, method):
        seen.append((method, config.sched, config.reverse_pruning))
        return {"params": {}}

    for stage in ("export", "evaluate", "write_summary", "write_report"):
        monkeypatch.setattr(pipeline, stage, lambda *args: None)
    monkeypatch.setattr(pipeline, "train", stop)
    pipeline.run(parse([*FLAGS, "--out", str(tmp_path / "run"), *flags]), Console(file=io.StringIO()))
    assert [method for method, *_ in seen] == methods
    assert all((sched, pruning) == ("none", None) for method, sched, pruning in seen if method == runs.FLOAT)


def test_failed_scheme_is_shown_without_an_accuracy(copy, monkeypatch, capsys):
    """Turn a vendor's crash into a record and a dash, and go on with the run."""
    (copy / "records.jsonl").write_text("")
    worker = copy.parent / "worker.py"
    worker.write_text(
        "import json, runpy, sys\n"
        "if json.load(open(sys.argv[1]))['scheme'] == 'int8-dynamic':\n"
        "    sys.exit('out of luck')\n"
        f"runpy.run_path({str(steps.WORKER)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(steps, "WORKER", worker)
    assert launch(copy) == 0
    assert "quant-trim int8-dynamic: -" in capsys.readouterr().out
    assert "out of luck" in (copy / "summary.md").read_text()
