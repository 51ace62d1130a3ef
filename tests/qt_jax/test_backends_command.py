"""Test `python -m qt_jax.backends`: list, doctor, install, run."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from qt_jax import comparison, records
from qt_jax.backends import BACKENDS, environments
from qt_jax.backends.__main__ import main
from qt_jax.backends.protocol import Environment

MODEL = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 6] input) => (float[batch, 4] logits) {
        first = Constant<value_ints = [0, 1, 2, 3]>()
        logits = Gather<axis = 1>(input, first)
    }""")
TOY = Environment("toy", "3.11", ("six==1.17.0",), 1, "MIT", remove=("six.p*",), variables={"TOY": "{bin}"})


@pytest.fixture
def fake(monkeypatch):
    """Register the fake vendor."""
    spec = importlib.util.spec_from_file_location("fake_vendor", Path(__file__).with_name("fake_vendor.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_vendor", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(BACKENDS, "fake", module.BACKEND)
    return module.BACKEND


@pytest.fixture
def files(tmp_path):
    images = np.random.default_rng(0).normal(0, 1, (30, 6)).astype(np.float32)
    onnx.save(MODEL, tmp_path / "toy-net.onnx")
    np.savez(tmp_path / "c.npz", whatever=images[:10])
    np.savez(tmp_path / "t.npz", images=images, labels=np.arange(30) % 4)
    return tmp_path


def run(files, *more):
    return run_of(files, ["toy-net.onnx"], *more)


def run_of(files, models, *more):
    paths = (*(files / name for name in models), "--calibration", files / "c.npz", "--test", files / "t.npz")
    return main(["run", *map(str, paths), "--out", str(files / "out"), *more])


def test_list_names_every_backend_and_its_schemes(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for backend in BACKENDS.values():
        assert backend.name in printed and backend.vendor in printed
    assert "int8-pc-minmax" in printed and "optimized" in printed


def test_doctor_says_what_is_missing_and_what_mends_it(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QT_JAX_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setattr(type(fake), "environment", TOY)
    assert main(["doctor"]) == 1
    read = capsys.readouterr()
    printed = " ".join(read.out.split())
    assert "'toy' is not installed: python -m qt_jax.backends install toy" in printed
    assert "ready" in printed  # onnxruntime
    assert "failed: " in read.err and "fake" in read.err
    assert main(["doctor", "onnxruntime"]) == 0
    assert "toy" not in "".join(capsys.readouterr())
    assert main(["doctor", "no-such"]) == 2


def test_json_lines_for_machines(fake, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QT_JAX_ENVIRONMENTS", str(tmp_path))
    assert main(["list", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["backend"] for row in listed] == list(BACKENDS)
    assert listed[0]["schemes"][0]["weight_bits"] == 32
    assert main(["doctor", "fake", "litert", "--json"]) == 1
    fine, lacking = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert fine == {"backend": "fake", "environments": [], "megabytes": 0, "ready": True, "lacks": []}
    assert not lacking["ready"] and "install litert" in lacking["lacks"][0]
    assert run(files, "--backends", "fake", "--schemes", "exact", "--json") == 0
    read = capsys.readouterr()
    rows = [json.loads(line) for line in read.out.splitlines()]
    assert rows == records.read(files / "out" / "records.jsonl")
    assert "2 of 2 rows are new" in read.err and "\x1b" not in read.err


def test_it_is_a_failure_if_no_row_ended_well(fake, files, capsys):
    assert run(files, "--backends", "fake", "--schemes", "refused") == 1
    assert "failed: no row ended well" in capsys.readouterr().err


def test_install_shows_size_and_licence_first_and_does_nothing_twice(fake, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QT_JAX_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setattr(type(fake), "environment", TOY)
    assert main(["install", "fake", "--yes"]) == 0
    printed = capfd.readouterr().out
    assert "toy: 1 MB, Python 3.11" in printed and "licences: MIT" in printed and "[1/1]" in printed
    assert environments.missing(TOY) is None
    site = tmp_path / "toy" / "lib" / "python3.11" / "site-packages"
    assert list(site.glob("six-*")) and not (site / "six.py").exists()  # removed, as asked
    assert environments.variables(TOY)["TOY"] == str(tmp_path / "toy" / "bin")
    assert main(["install", "toy", "fake"]) == 0
    assert "Nothing to do" in capfd.readouterr().out


def test_install_says_what_cannot_be_done(fake, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QT_JAX_ENVIRONMENTS", str(tmp_path))
    assert main(["install", "no-such", "-y"]) == 2
    assert "no backend or environment 'no-such'" in capfd.readouterr().err
    monkeypatch.setattr(type(fake), "environment", dataclasses.replace(TOY, megabytes=10**9))
    assert main(["install", "toy", "-y"]) == 2
    assert "make room" in capfd.readouterr().err
    unknown = dataclasses.replace(TOY, requirements=("six==999",))
    monkeypatch.setattr(type(fake), "environment", unknown)
    assert main(["install", "toy", "-y"]) == 2
    assert "run the same command again" in capfd.readouterr().err
    assert "half installed" in environments.missing(unknown)


def test_run_writes_records_and_a_report_and_nothing_the_second_time(fake, files, capsys):
    schemes = ("--backends", "fake", "--schemes", "exact", "refused", "--jobs", "2")
    assert run(files, *schemes) == 0
    printed = capsys.readouterr().out
    assert "fake refused simulator: refused: compile: operator Foo" in printed
    assert "3 of 3 rows are new" in printed
    rows = records.read(files / "out" / "records.jsonl")
    assert [row["scheme"] for row in rows] == ["fp32", "refused", "exact"]
    assert {row["method"] for row in rows} == {"toy-net"} and rows[0]["checkpoint"]
    written = (files / "out" / "report.html").stat().st_mtime_ns
    assert (files / "out" / "summary.md").exists()
    assert run(files, *schemes) == 0
    assert "0 of 3 rows are new" in capsys.readouterr().out
    assert (files / "out" / "report.html").stat().st_mtime_ns == written


def test_several_models_are_compared_and_earlier_ones_stay(fake, files):
    """Add a network with a second command, then change it with a third: its old rows leave the report."""
    schemes = ("--backends", "fake", "--schemes", "exact")
    assert run(files, *schemes) == 0
    other = onnx.ModelProto()
    other.CopyFrom(MODEL)
    other.producer_name = "another"
    onnx.save(other, files / "float.onnx")
    onnx.save(other, files / "third.onnx")
    assert run(files, *schemes) == run_of(files, ["float.onnx", "third.onnx"], *schemes) == 0
    summary = (files / "out" / "summary.md").read_text()
    assert all(name in summary for name in ("toy-net", "float.onnx", "third"))
    other.producer_name = "changed"
    onnx.save(other, files / "third.onnx")
    assert run_of(files, ["third.onnx"], *schemes) == 0
    kept = records.read(files / "out" / "records.jsonl")
    latest = [row for row in kept if row["model"] == "third"][-2:]
    assert {row["checkpoint"] for row in comparison._comparable(kept, latest) if row["model"] == "third"} == {
        latest[0]["checkpoint"]
    }
    assert run_of(files, ["toy-net.onnx", "toy-net.onnx"], *schemes) == 2


def test_an_interruption_is_reported_in_one_line(fake, files, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "evaluate", interrupt)
    assert run(files, "--backends", "fake") == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_calibration_size_and_limits(fake, files):
    assert (
        run(
            files,
            "--backends",
            "fake",
            "--schemes",
            "exact",
            "--calibration-size",
            "4",
            "--limit",
            "20",
            "--simulated-limit",
            "5",
        )
        == 0
    )
    reference, exact = records.read(files / "out" / "records.jsonl")
    assert (reference["n"], exact["n"], exact["calibration"]["n"]) == (20, 5, 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: (files / "toy-net.onnx").unlink(), "toy-net.onnx is not there"),
        (lambda files: (files / "c.npz").write_bytes(b"nothing"), "c.npz cannot be read"),
        (lambda files: (files / "c.npz").unlink(), "c.npz cannot be read"),
        (lambda files: np.savez(files / "t.npz", images=np.zeros(3)), "takes float32 (n, 6)"),
        (
            lambda files: np.savez(files / "c.npz", a=np.zeros(3), b=np.zeros(3)),
            "lacks the arrays ['input'] (or \"images\"), it holds ['a', 'b']",
        ),
    ],
)
def test_wrong_input(damage, message, files, capsys):
    damage(files)
    assert run(files, "--backends", "onnxruntime", "--schemes", "fp32") == 2
    assert message in capsys.readouterr().err
