"""Check that `experiments.diagnose` finds and mends planted faults in the committed network.

Accuracy is that of QDQ graphs on onnxruntime's integer kernels, not that of the simulation that chose the
advice. Budgets are kept, and runs and files that cannot be diagnosed are refused.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import qt_jax as qt
from experiments import diagnose
from experiments.configs.training import PRESETS, parse, quant_config
from experiments.data import load
from experiments.run_summary import write_report
from experiments.runs import model_input
from qt_jax import records
from qt_jax.diagnosis import __main__ as diagnosis_command
from qt_jax.diagnosis import deployed
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.remedies import Deployment, replaced
from qt_jax.diagnosis.running import logits_of
from qt_jax.diagnosis.simulation import SIMULATED_SCHEMES, everywhere
from qt_jax.export import graph
from qt_jax.export.encodings import read_ranges, write_ranges
from qt_jax.export.storage import model_sha256

RUN = "experiments/results/cifar10-resnet8"
SAMPLES = f"{RUN}/samples.npz"


@pytest.fixture(scope="module")
def network():
    return onnx.load(f"{RUN}/model.onnx"), read_ranges(f"{RUN}/model.ranges.json")


@pytest.fixture(scope="module")
def cifar10():
    try:
        return load("cifar10")
    except qt.InvalidInput as error:
        pytest.skip(f"CIFAR-10 is not here and cannot be fetched: {error}")


def outlier_weight(model, ranges):
    """Make one weight of a layer 30 times as large as the others."""
    layer = layers_of(model)["stage2_block1/conv2"]
    kernel = graph.constants(model)[layer.kernel].copy()
    kernel[np.unravel_index(5000, kernel.shape)] = 30 * np.abs(kernel).max()
    return layer.name, replaced(model, {layer.kernel: kernel}), ranges


def dead_channel(model, ranges):
    """Silence a channel, and let its weights set the scale of all others.

    The network does not need this channel: without it top-1 is the same.
    """
    layer, channel = layers_of(model)["stage3_block1/conv1"], 61
    values = graph.constants(model)
    kernel, bias = values[layer.kernel].copy(), values[layer.bias].copy()
    kernel[channel] *= 300
    bias[channel] = -1e5
    return layer.name, replaced(model, {layer.kernel: kernel, layer.bias: bias}), ranges


def saturating_activation(model, ranges):
    """Cut a learned range to an eighth."""
    name = "stage3_block1/conv1"
    grid = ranges.inputs[name]
    narrow = dataclasses.replace(grid, high=tuple(high / 8 for high in grid.high))
    return name, model, dataclasses.replace(ranges, inputs={**ranges.inputs, name: narrow})


FAULTS = {
    "outlier weight": outlier_weight,
    "dead channel": dead_channel,
    "saturating activation": saturating_activation,
}


def accuracy(model, images, labels):
    return np.mean(np.argmax(logits_of(model, images), axis=1) == labels)


def integers(model, ranges):
    """Return the QDQ graph at 8 bits, with one scale per tensor."""
    bounds = {name: (min(grid.low), max(grid.high)) for name, grid in ranges.inputs.items()}
    precisions = everywhere(layers_of(model), SIMULATED_SCHEMES["int8-pt"])
    return deployed.qdq_graph(Deployment(model, precisions, bounds))


@pytest.mark.parametrize("n", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_named_and_mended(fault, n, network, cifar10, tmp_path, capsys):
    images, labels = model_input(cifar10, cifar10.test_images[:n]), cifar10.test_labels[:n]
    np.savez(tmp_path / "t.npz", images=images, labels=labels)
    np.savez(tmp_path / "c.npz", images=model_input(cifar10, cifar10.train_images[:256]))
    layer, model, ranges = FAULTS[fault](*network)
    ranges = dataclasses.replace(ranges, model_sha256=model_sha256(model))
    onnx.save(model, tmp_path / "model.onnx")
    write_ranges(ranges, tmp_path / "model.ranges.json")

    files = ["--calibration", str(tmp_path / "c.npz"), "--test", str(tmp_path / "t.npz")]
    assert diagnose.main([str(tmp_path / "model.onnx"), *files, "--apply", "--json"]) == 0

    out = tmp_path / "model.diagnosis"
    rows = {row["layer"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows[layer]["advice"]
    page = (out / "diagnosis.md").read_text(encoding="utf-8")
    first = re.search(r"^1\. \*\*(.*?)\*\*, (.*?):", page, re.MULTILINE)
    assert (first[1].replace("\\", ""), first[2]) == (layer, fault)

    clean = accuracy(integers(*network), images, labels)
    broken = accuracy(integers(model, ranges), images, labels)
    mended = accuracy(onnx.load(out / "diagnosis" / "mended.qdq.onnx"), images, labels)
    print(f"{fault}, {layer}: {100 * clean:.2f} -> {100 * broken:.2f} -> {100 * mended:.2f}")
    assert clean - broken > 0.05
    assert mended - broken >= 0.9 * (clean - broken)


@pytest.fixture(scope="module")
def found(cifar10, tmp_path_factory):
    """Return the folder of a diagnosis of the committed run on four bits, with a budget."""
    out = tmp_path_factory.mktemp("found")
    flags = ["--scheme", "int4w-pt", "--limit", "1000", "--max-drop", "1", "--apply"]
    assert diagnose.main([RUN, *flags, "--out", str(out)]) == 0
    return out


def ruff_formats(source):
    """Tell whether ruff would leave the source as it is."""
    command = [sys.executable, "-m", "ruff", "format", "--line-length", "110", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True).stdout == source


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_page_says_what_to_paste_and_it_runs(found):
    text = (found / "diagnosis.md").read_text(encoding="utf-8")
    layers = layers_of(onnx.load(f"{RUN}/model.onnx"))
    found_rules = []
    for block in python_blocks(text):
        if block.startswith("config"):
            scope = {"qt": qt}
            exec(block.split("optimizer =")[0], scope)
            found_rules += scope["config"].rules
            assert ruff_formats(block)
    assert {rule.path for rule in found_rules} >= {"stem"}
    for rule in found_rules:
        assert rule.path in layers and (rule.skip or rule.weights.bits in (4, 8))
    if names := re.search(r"nodes_to_exclude = (\[.*?\])", text):
        assert set(json.loads(names[1])) <= set(layers)
    if given := re.search(r"^(--bits .*)", text, re.MULTILINE):
        parsed = quant_config(parse(given[1].split(), PRESETS, "experiments.cifar"))
        assert {rule.path for rule in parsed.rules} <= set(layers)


def test_a_budget_that_cannot_be_kept_leaves_the_page(found, tmp_path, capsys):
    flags = ["--scheme", "int8-pt", "--limit", "50", "--max-bytes", "3", "--out", str(tmp_path)]
    assert diagnose.main([RUN, *flags]) == 2
    assert "more than the budget of 3" in " ".join(capsys.readouterr().err.split())
    assert "## What to do" in (tmp_path / "diagnosis.md").read_text(encoding="utf-8")


def test_the_budget_is_kept(found, cifar10):
    images = model_input(cifar10, cifar10.validation_images[:1000])
    labels = cifar10.validation_labels[:1000]
    own = accuracy(onnx.load(f"{RUN}/model.onnx"), images, labels)
    mixed = onnx.load(found / "diagnosis" / "mended.qdq.onnx")
    assert accuracy(mixed, images, labels) >= own - 0.015  # half a point for other kernels' rounding
    kernels = [tensor for tensor in mixed.graph.initializer if tensor.name.endswith("kernel/quantized")]
    assert {onnx.TensorProto.DataType.Name(kernel.data_type) for kernel in kernels} == {"INT4", "INT8"}


def test_what_is_measured_is_not_measured_again(found, monkeypatch):
    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("qt_jax.diagnosis.meter.Meter._measured", fail)
    before = (found / "diagnosis.md").read_text(encoding="utf-8")
    flags = ["--scheme", "int4w-pt", "--limit", "1000", "--max-drop", "1", "--apply"]
    assert diagnose.main([RUN, *flags, "--out", str(found)]) == 0
    assert (found / "diagnosis.md").read_text(encoding="utf-8") == before


def test_the_report_of_a_run_holds_its_diagnosis(found, tmp_path):
    for name in ("config.json", "metrics.jsonl", "records.jsonl"):
        (found / name).write_bytes(Path(RUN, name).read_bytes())
    page = write_report(found, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What to do" in page and page.count('aria-label="Noise behind each layer"') == 1


@pytest.fixture
def digits_run(tmp_path):
    """Return the folder of a finished run of a linear network on the digits."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 1, 8, 8] input) => (float[batch, 10] logits) {
            flat = Flatten<axis = 1>(input)
            hidden = MatMul(flat, first)
            logits = MatMul(hidden, second)
        }""")
    random = np.random.default_rng(0)
    for name, shape in (("first", (64, 16)), ("second", (16, 10))):
        value = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for node in model.graph.node:
        node.name = node.input[-1]
    config = {"dataset": "digits", "model": "linear", "seed": 3, "calibration_size": 64}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    onnx.save(model, folder / "model.onnx")
    return folder


def test_each_layer_is_rounded_alone_on_the_validation_split(digits_run, capsys):
    assert diagnose.main([str(digits_run), "--scheme", "int4w-pt"]) == 0
    assert "all but it" in capsys.readouterr().out
    kept = records.read(digits_run / "diagnosis" / "measurements.jsonl")
    found = {row["what"]: row for row in kept}
    assert len(found) == len(kept)  # nothing is measured twice
    # of two layers, all but the first is the second alone, which is measured once
    choices = {what for what in found if what in ("float", "all") or what.endswith(" alone")}
    choices |= {what for what in found if what.startswith("all but ")}
    assert choices == {"float", "all", "first alone", "all but first"}
    assert {len(row["correct"]) for row in kept} == {2 * 144 // 8}
    digits = load("digits", None, seed=0)
    assert len(digits.validation_images) == 144
    assert 144 not in (len(digits.train_images), len(digits.test_images))
    session = onnxruntime.InferenceSession(digits_run / "model.onnx")
    (logits,) = session.run(None, {"input": model_input(digits, digits.validation_images)})
    assert found["float"]["top1"] == pytest.approx(np.mean(logits.argmax(-1) == digits.validation_labels))
    assert found["float"]["sqnr_db"] is None
    assert found["all"]["sqnr_db"] < found["first alone"]["sqnr_db"]
    page = (digits_run / "diagnosis.md").read_text(encoding="utf-8")
    assert page.startswith("# Diagnosis of run, quant-trim, int4w-pt\n") and "on 144 images" in page

    assert diagnose.main([str(digits_run), "--scheme", "int4w-pt", "--json"]) == 0
    read = capsys.readouterr()
    rows = [json.loads(line) for line in read.out.splitlines()]
    assert [row["layer"] for row in rows] == ["first", "second"]
    first, second = rows
    assert first["top1_alone"] == second["top1_all_but"] == found["first alone"]["top1"]
    assert second["top1_alone"] == first["top1_all_but"] == found["all but first"]["top1"]
    assert "all but it" in read.err and "\x1b" not in read.err
    assert records.read(digits_run / "diagnosis" / "measurements.jsonl") == kept


def test_a_file_is_diagnosed_alike_by_the_command_of_the_package(digits_run, tmp_path):
    images = np.random.default_rng(0).normal(size=(32, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "c.npz", images=images)
    np.savez(tmp_path / "t.npz", images=images, labels=np.zeros(32, np.int64))
    model = digits_run / "model.onnx"
    files = [str(model), "--calibration", str(tmp_path / "c.npz"), "--test", str(tmp_path / "t.npz")]
    pages = []
    for command in (diagnose.main, diagnosis_command.main):
        assert command([*files, "--max-drop", "100", "--apply"]) == 0
        page = (digits_run / "model.diagnosis" / "diagnosis.md").read_text(encoding="utf-8")
        pages.append(re.sub(r"```text\n.*?```", "", page, flags=re.DOTALL))
        shutil.rmtree(digits_run / "model.diagnosis")
    assert pages[0] == pages[1] and "## Mixed precision" in pages[0] and "## Files" in pages[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "experiments.cifar"),
        ({"dataset": "digits"}, "experiments.cifar"),
        ({"dataset": "digits", "model": "linear", "seed": 3}, "finish the run"),
    ],
)
def test_a_folder_without_a_finished_run_is_refused(config, message, tmp_path, capsys):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert diagnose.main([str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_toolchain_tells_the_noise_behind_each_layer(tmp_path, cifar10, capsys):
    flags = ["--scheme", "int4w-pt", "--limit", "64", "--backends", "onnxruntime", "--out", str(tmp_path)]
    assert diagnose.main([RUN, *flags]) == 0
    text = (tmp_path / "diagnosis.md").read_text(encoding="utf-8")
    assert "onnxruntime int4w-pt-minmax" in text
    assert re.search(r"most noise comes in:\n\n- onnxruntime int4w-pt-minmax: stem", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        ([f"{RUN}/model.onnx"], "--calibration c.npz"),
        ([RUN, "--method", "lsq"], "no network 'lsq'"),
        ([RUN, "--max-bytes", "9", "--max-drop", "1"], "two budgets"),
        ([RUN, "--limit", "0"], "--limit 0"),
        ([RUN, "--backends", "abacus"], "Unknown backends ['abacus']"),
        ([f"{RUN}/model.json", "--calibration", "c.npz", "--test", "t.npz"], "t.npz cannot be read"),
        ([f"{RUN}/model.onnx", "--calibration", SAMPLES, "--test", SAMPLES], "lacks the arrays ['input"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:  # as a shell sees it, whether tyro or the command says it
        raise SystemExit(diagnose.main(arguments))
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
