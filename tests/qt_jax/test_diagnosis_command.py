"""Check `python -m qt_jax.diagnosis` on a small graph: what it writes, what it needs, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import pytest

from qt_jax.diagnosis.__main__ import main

PICTURES = ("sensitivity", "noise", "tails", "ranges")


@pytest.fixture
def files(tmp_path):
    """Write a graph of two layers, calibration images and test images; return their paths."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 8] input) => (float[n, 4] logits) {
            hidden = MatMul(input, a)
            features = Relu(hidden)
            logits = MatMul(features, c)
        }""")
    random = np.random.default_rng(0)
    for name, shape in (("a", (8, 16)), ("c", (16, 4))):
        value = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, tmp_path / "model.onnx")
    images = random.normal(size=(64, 8)).astype(np.float32)
    np.savez(tmp_path / "c.npz", images=images)
    np.savez(tmp_path / "t.npz", images=images, labels=random.integers(0, 4, 64))
    return tmp_path / "model.onnx", tmp_path / "c.npz", tmp_path / "t.npz"


def flags(files):
    model, calibration, test = map(str, files)
    return [model, "--calibration", calibration, "--test", test]


def test_the_page_the_pictures_and_the_files_are_written(files, tmp_path, capsys):
    assert main([*flags(files), "--scheme", "int4w-pt", "--apply", "--json"]) == 0
    out = tmp_path / "model.diagnosis"
    written = {path.name for path in (out / "diagnosis").iterdir()}
    pictures = {
        f"{name}.{kind}" for name in ("sensitivity", "noise", "tails", "ranges") for kind in ("png", "svg")
    }
    assert written >= {
        *pictures,
        "mended.onnx",
        "mended.ranges.json",
        "mended.qdq.onnx",
        "measurements.jsonl",
    }
    page = (out / "diagnosis.md").read_text()
    assert page.startswith("# Diagnosis of model.onnx, int4w-pt\n")
    assert "## What to do" in page and "## Files" in page and "experiments.cifar" not in page
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["layer"] for row in rows] == ["hidden", "logits"]


def test_learned_ranges_must_be_there_if_they_are_asked_for(files, capsys):
    assert main([*flags(files), "--ranges", "learned"]) == 2
    assert "model.ranges.json is not there" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, c, t: model.unlink(), "model.onnx is not there: give the path of a float ONNX model"),
        (
            lambda model, c, t: (model.unlink(), model.mkdir()),
            "model.onnx is a folder: give the path of a float ONNX model",
        ),
        (lambda model, c, t: model.write_bytes(b"\xff" * 9), "model.onnx cannot be read as an ONNX model"),
        (lambda model, c, t: c.unlink(), "c.npz cannot be read"),
        (
            lambda model, c, t: np.savez(t, images=np.zeros((4, 8))),
            "test images is float64 (4, 8), but the model's input 'input' takes float32 (n, 8).",
        ),
        (lambda model, c, t: np.savez(c, np.zeros((4, 9), np.float32)), "calibration is float32 (4, 9), but"),
        (
            lambda model, c, t: np.savez(t, images=np.zeros((4, 8), np.float32), labels=np.zeros(3, int)),
            "one label, or one array of labels, per image: got int64 (3,) for 4 images",
        ),
        (lambda model, c, t: np.savez(c, np.full((4, 8), np.nan, np.float32)), "NaN or infinite"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, files, capsys):
    change(*files)
    assert main(flags(files)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_needs_nothing_of_the_experiments():
    program = "import sys, qt_jax.diagnosis.__main__; print([m for m in sys.modules if 'experiments' in m])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_missing_extra_is_named():
    program = "import sys; sys.modules['tyro'] = None; import qt_jax.diagnosis.__main__"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'tyro is missing: pip install "qt_jax[backends]"' in done.stderr


def test_the_extra_backends_suffices():
    program = """
import sys
for name in ("jax2onnx", "orbax", "orbax.checkpoint"):  # of the extra `export` alone
    sys.modules[name] = None
import qt_jax.diagnosis.__main__
"""
    subprocess.run([sys.executable, "-c", program], check=True)
