"""Run the harness on networks that are no plain classifiers, and where the machine fails it."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from qt_jax import records
from qt_jax.backends import BACKENDS, evaluate, steps
from qt_jax.backends.__main__ import main
from qt_jax.backends.evaluation import named_layers
from qt_jax.backends.rows import read_outputs
from qt_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(24, 3, 8, 8)).astype(np.float32)
QUICK = {
    "backends": "onnxruntime",
    "schemes": ["int8-pt-minmax", "int4w-pc-minmax"],
    "runtimes": ["reference"],
}


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def build(nodes, inputs, outputs, weights):
    infos = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
        for values in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", *infos, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


BODY = [
    helper.make_node("Conv", ["x", "W"], ["c"], name="stem", pads=[1] * 4),
    helper.make_node("Relu", ["c"], ["r"], name="relu"),
    helper.make_node("GlobalAveragePool", ["r"], ["g"], name="pool"),
    helper.make_node("Flatten", ["g"], ["f"], name="flat"),
]
KERNEL = {"W": normal(8, 3, 3, 3)}
BOXES_AND_SCORES = build(
    [
        *BODY,
        helper.make_node("MatMul", ["f", "A"], ["boxes"], name="boxes"),
        helper.make_node("MatMul", ["f", "B"], ["scores"], name="scores"),
    ],
    {"x": ["N", 3, 8, 8]},
    {"boxes": ["N", 4], "scores": ["N", 2]},
    KERNEL | {"A": normal(8, 4), "B": normal(8, 2)},
)
GRU = build(
    [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("GRU", ["t", "W", "R"], ["", "h"], hidden_size=4),
        helper.make_node("Squeeze", ["h", "axes"], ["logits"]),
    ],
    {"x": ["N", 7, 5]},
    {"logits": ["N", 4]},
    {"W": normal(1, 12, 5), "R": normal(1, 12, 4), "axes": np.array([0])},
)
FOUND = build(  # as many rows as values above 1: a detector with its selection inside
    [
        helper.make_node("Conv", ["x", "W"], ["c"], name="conv"),
        helper.make_node("Reshape", ["c", "shape"], ["flat"]),
        helper.make_node("Greater", ["flat", "one"], ["mask"]),
        helper.make_node("Compress", ["flat", "mask"], ["found"], axis=0),
    ],
    {"x": [1, 3, 8, 8]},
    {"found": ["k"]},
    {"W": normal(1, 3, 1, 1), "shape": np.array([-1]), "one": np.float32(1)},
)


def test_without_labels_every_output_is_judged(tmp_path):
    fp32, int8, int4 = evaluate(BOXES_AND_SCORES, IMAGES[:8], IMAGES, folder=tmp_path, **QUICK)
    assert fp32["fidelity"] is None
    for row in (int8, int4):
        assert row["status"] == "ok" and row["judged"] == ["boxes", "scores"] and row["metric"] is None
        assert row["top1"] is None and row["n"] == 24
        assert [it["output"] for it in row["fidelity"]] == ["boxes", "scores"]
        assert row["sqnr_db"] == min(it["sqnr_db"] for it in row["fidelity"])
        assert row["worst_sqnr_db"] <= row["sqnr_db"]
    assert int8["sqnr_db"] > int4["sqnr_db"] and int8["products"] == {"quantized": 3, "total": 3}


def test_the_output_that_is_chosen_is_judged_by_the_labels(tmp_path):
    labels = RNG.integers(0, 2, 24)
    row = evaluate(
        BOXES_AND_SCORES, IMAGES[:8], (IMAGES, labels), outputs=["scores"], folder=tmp_path, **QUICK
    )[1]
    assert (row["metric"], row["judged"], row["not_judged"]) == ("top1", ["scores"], ["boxes"])
    assert row["top1"] == row["value"] and row["reference_top1"] == row["reference_value"]


def test_a_row_that_is_all_float_is_no_low_bit_row(tmp_path):
    x = normal(24, 7, 5)
    fp32, *others = evaluate(GRU, x, (x, np.arange(24) % 4), folder=tmp_path, **QUICK)
    assert fp32["status"] == "ok"
    for row in others:
        assert row["status"] == "invalid" and row["products"] == {"quantized": 0, "total": 1}
        assert row["reason"].startswith("nothing was quantized") and "GRU" in row["reason"]
        assert row["top1"] is None


def test_layers_left_in_float(tmp_path):
    rows = evaluate(BOXES_AND_SCORES, IMAGES[:8], IMAGES, folder=tmp_path, float_layers="stem|boxes", **QUICK)
    for row in rows[1:]:
        assert row["products"] == {"quantized": 1, "total": 3} and row["float_layers"] == ["stem", "boxes"]
    [path] = (tmp_path / "work").glob("*int8-pt*compile*/compiled/model.onnx")
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    assert nodes["stem"].input[1] == "W"  # the float kernel itself
    for pattern, message in (
        ("ste", "part of stem: try"),
        ("z.*", "the graph's nodes are"),
        ("(", "no regular"),
    ):
        with pytest.raises(InvalidInput, match=message):
            evaluate(BOXES_AND_SCORES, IMAGES[:8], IMAGES, float_layers=pattern, **QUICK)


def test_a_toolchain_that_cannot_leave_layers_says_so(fake, tmp_path):
    rows = evaluate(
        BOXES_AND_SCORES,
        IMAGES,
        IMAGES,
        backends="fake",
        schemes=["exact"],
        float_layers="stem",
        folder=tmp_path,
    )
    assert rows[1]["status"] == "refused" and "no way to leave layers in floating point" in rows[1]["reason"]


def test_outputs_of_a_varying_shape(tmp_path):
    fp32, int8, _ = evaluate(FOUND, IMAGES[:8], IMAGES, folder=tmp_path, **QUICK)
    assert fp32["status"] == "ok" and int8["status"] == "ok"
    [found] = int8["fidelity"]
    assert found["shape"] is None and 0 <= found["other_shape"] < 24
    [folder] = (path for path in (tmp_path / "work").glob("onnxruntime-fp32-*-run-*") if path.is_dir())
    kept = read_outputs(folder / "outputs", {"found": False})["found"]
    kernel = numpy_helper.to_array(FOUND.graph.initializer[0])[:, :, 0, 0]
    maps = np.einsum("oc,nchw->nohw", kernel, IMAGES)
    for own, image in zip(kept, maps, strict=True):
        np.testing.assert_allclose(own, image.ravel()[image.ravel() > 1], rtol=1e-4)


def test_a_metric_of_ones_own_and_data_in_files(tmp_path, monkeypatch):
    source = "def spread(outputs, labels):\n    return float(outputs['boxes'].std() + labels.sum())\n"
    (tmp_path / "spread_metric.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    np.save("c.npy", IMAGES[:8])
    Path("t").mkdir()
    np.save("t/images.npy", IMAGES)
    np.save("t/labels.npy", np.ones(24))
    onnx.save(BOXES_AND_SCORES, "net.onnx")
    flags = ["--backends", "onnxruntime", "--schemes", "int8-pt-minmax", "--runtimes", "reference"]
    flags += ["--out", "o", "--metric", "spread_metric:spread"]
    assert main(["run", "net.onnx", "--calibration", "c.npy", "--test", "t", *flags]) == 0
    _, row = records.read("o/records.jsonl")
    assert row["metric"] == "spread_metric:spread" and row["reference_value"] > 24
    assert not list(Path("o", "data").glob("images-*"))  # read in place


def test_all_models_are_checked_before_the_first_one_runs(tmp_path, capsys):
    onnx.save(BOXES_AND_SCORES, tmp_path / "good.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"")
    np.savez(tmp_path / "c.npz", images=IMAGES)
    flags = ["--calibration", str(tmp_path / "c.npz"), "--test", str(tmp_path / "c.npz")]
    out = tmp_path / "o"
    models = [str(tmp_path / name) for name in ("good.onnx", "bad.onnx")]
    assert main(["run", *models, *flags, "--backends", "onnxruntime", "--out", str(out)]) == 2
    assert "bad.onnx holds no ONNX graph" in capsys.readouterr().err
    assert not (out / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibration-size", "-5"], "--calibration-size must be above 0"),
        (["--output", "nothing"], "good.onnx: The model has no output 'nothing': choose among boxes, scores"),
        (["--float-layers", "nothing"], "matches the whole name of no node"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys):
    onnx.save(BOXES_AND_SCORES, tmp_path / "good.onnx")
    np.savez(tmp_path / "c.npz", images=IMAGES)
    data = ["--calibration", str(tmp_path / "c.npz"), "--test", str(tmp_path / "c.npz")]
    found = main(["run", str(tmp_path / "good.onnx"), *data, "--out", str(tmp_path / "o"), *flags])
    assert found == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_limit_is_a_whole_number():
    with pytest.raises(InvalidInput, match=r"limit must be a whole number, got 2\.5"):
        evaluate(BOXES_AND_SCORES, IMAGES, IMAGES, limit=2.5, **QUICK)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    "place", ["qt_jax.backends.evaluation.save", "qt_jax.records.append", "qt_jax.backends.steps.os.replace"]
)
def test_a_disk_that_takes_nothing_more_is_told_in_a_sentence(place, code, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code), str(tmp_path / "file"))

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(InvalidInput, match=f"cannot be written: {os.strerror(code)}"):
            evaluate(BOXES_AND_SCORES, IMAGES, IMAGES, folder=tmp_path, **QUICK)
    rows = evaluate(BOXES_AND_SCORES, IMAGES, IMAGES, folder=tmp_path, **QUICK)  # and nothing is lost
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert len(records.read(tmp_path / "records.jsonl")) == 3


def started(folder):
    """Start a process that evaluates in `folder`."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_backends_any_network import *\n"
        f"rows = evaluate(BOXES_AND_SCORES, IMAGES[:8], IMAGES, folder={str(folder)!r}, **QUICK)\n"
        "print(json.dumps([row['status'] for row in rows]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_in_one_folder_make_each_row_once(tmp_path):
    both = [started(tmp_path / "o") for _ in range(2)]
    for process in both:
        assert json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) == ["ok"] * 3
    kept = records.read(tmp_path / "o" / "records.jsonl")
    assert len({row["key"] for row in kept}) == len(kept) == 3
    assert not list((tmp_path / "o").rglob("*.partial*"))


@pytest.fixture
def fake(monkeypatch):
    spec = importlib.util.spec_from_file_location("fake_vendor", Path(__file__).with_name("fake_vendor.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_vendor", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(BACKENDS, "fake", module.BACKEND)
    return module.BACKEND


def test_a_worker_that_is_killed_takes_down_only_its_own_row(fake, tmp_path):
    """Send SIGKILL to the worker that compiles `hang`, as the kernel does when memory runs out."""
    killed = []

    def watch():
        for _ in range(600):
            time.sleep(0.1)
            for process in list(steps._RUNNING):
                words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                if b"hang" in words:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    rows = evaluate(IDENTITY, FLAT, FLAT, backends="fake", schemes=["hang", "exact"], folder=tmp_path)
    watcher.join()
    assert killed
    by_scheme = {row["scheme"]: row for row in rows}
    assert by_scheme["hang"]["status"] == "crashed" and "SIGKILL" in by_scheme["hang"]["reason"]
    assert by_scheme["exact"]["status"] == "ok"


FLAT = normal(12, 6)
IDENTITY = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 6] input) => (float[batch, 4] logits) {
        ones = Constant<value = float[6, 1] {1, 1, 1, 1, 1, 1}>()
        factors = Constant<value = float[1, 4] {0, 1, 2, 3}>()
        sum = MatMul(input, ones)
        logits = MatMul(sum, factors)
    }""")


LOOP = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 6] input, bool[1] c) => (float[b, 6] y) <float[6, 6] w = {0}> {
        d = Squeeze(c)
        y = If(d) <
            then_branch = a () => (float[b, 6] p) { p = MatMul(input, w) },
            else_branch = b () => (float[b, 6] q) { q = Relu(input) }
        >
    }""")
LOOP.graph.initializer[0].CopyFrom(numpy_helper.from_array(normal(6, 6), "w"))
EINSUM = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 6] input) => (float[b, 6] y) <float[6, 6] w = {0}, float[6, 6] v = {0}> {
        m = MatMul(input, w)
        y = Einsum<equation = "bi,ij->bj">(m, v)
    }""")
for place, name in enumerate(("w", "v")):
    EINSUM.graph.initializer[place].CopyFrom(numpy_helper.from_array(normal(6, 6), name))


def test_products_in_branches_and_einsums_count(tmp_path):
    both = {"input": FLAT, "c": np.arange(12) % 2 == 0}
    row = evaluate(LOOP, both, both, folder=tmp_path / "loop", **QUICK)[1]
    assert row["status"] == "invalid" and row["products"] == {"quantized": 0, "total": 1}
    row = evaluate(EINSUM, FLAT, FLAT, folder=tmp_path / "einsum", **QUICK)[1]
    assert row["status"] == "ok" and row["products"] == {"quantized": 1, "total": 2}


@pytest.mark.parametrize(
    ("test_set", "limit", "message"),
    [
        ((IMAGES, np.arange(12) % 2), 10, "one label, or one array of labels, per image"),
        ((IMAGES, np.array(["a"] * 24)), None, "test labels must be an array of numbers"),
        (np.float32(3), None, "takes float32"),
    ],
)
def test_labels_and_samples_that_do_not_fit(test_set, limit, message):
    with pytest.raises(InvalidInput, match=message):
        evaluate(BOXES_AND_SCORES, IMAGES, test_set, limit=limit, **QUICK)


def test_nodes_that_toolchains_fold_are_no_layers():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[b, 6] x) => (float[b, 6] y) <float[6] w = {1, 2, 3, 4, 5, 6}> {
            [double] v = Add(w, w)
            [sizes] s = Shape(x)
            [scale] m = Mul(x, v)
            [reshape] y = Reshape(m, s)
        }""")
    assert named_layers(model, ".*") == ("scale", "reshape")


def test_of_a_file_read_in_place_only_the_first_samples_calibrate(fake, tmp_path):
    """The file holds more: its later rows would widen every range."""
    np.save(tmp_path / "c.npy", np.concatenate([FLAT, 100 * FLAT]))
    mapped = np.load(tmp_path / "c.npy", mmap_mode="r")
    for place, few in enumerate((mapped[:12], FLAT)):
        folder = tmp_path / str(place)
        row = evaluate(IDENTITY, few, FLAT, folder=folder, **QUICK)[1]
        assert row["calibration"]["n"] == 12 and row["sqnr_db"] > 25
        evaluate(IDENTITY, few, FLAT, backends="fake", schemes=["exact"], folder=folder)
        [log] = folder.glob("work/fake-exact-compile-*/log.txt")
        assert "with 12 images" in log.read_text()
