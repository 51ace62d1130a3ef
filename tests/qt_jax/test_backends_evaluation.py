"""Test the harness with a fake vendor that fails in every way a vendor can: records, cache and limits."""

import dataclasses
import importlib.util
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from qt_jax import records
from qt_jax.backends import BACKENDS, evaluate, steps
from qt_jax.backends.evaluation import select_rows
from qt_jax.backends.protocol import KINDS
from qt_jax.backends.registry import select
from qt_jax.backends.steps import Limits
from qt_jax.errors import InvalidInput
from qt_jax.records import FIELDS, STATUSES

MODEL = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 6] input) => (float[batch, 4] logits) <float[1] axes_unused = {0}> {
        ones = Constant<value = float[6, 1] {1, 1, 1, 1, 1, 1}>()
        factors = Constant<value = float[1, 4] {0, 1, 2, 3}>()
        sum = MatMul(input, ones)
        logits = MatMul(sum, factors)
    }""")
del MODEL.graph.initializer[:]
RNG = np.random.default_rng(0)
CALIBRATION, IMAGES = (RNG.normal(0.3, 1, (n, 6)).astype(np.float32) for n in (9, 40))
LABELS = np.where(IMAGES.sum(axis=1) > 0, 3, 0)


@pytest.fixture(scope="module")
def fake():
    """Register the fake vendor as a user would register one."""
    path = Path(__file__).with_name("fake_vendor.py")
    spec = importlib.util.spec_from_file_location("fake_vendor", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_vendor"] = module
    spec.loader.exec_module(module)
    BACKENDS["fake"] = module.BACKEND
    yield module
    del BACKENDS["fake"], sys.modules["fake_vendor"]


def run(folder, **changes):
    arguments = {"model": MODEL, "calibration": CALIBRATION, "test_set": (IMAGES, LABELS)} | changes
    return evaluate(**arguments, folder=folder)


@pytest.fixture(scope="module")
def faults(fake, tmp_path_factory):
    """Evaluate every fault except the endless loop, two rows at a time."""
    folder = tmp_path_factory.mktemp("faults")
    schemes = [scheme.name for scheme in fake.BACKEND.schemes if scheme.name != "hang"]
    rows = run(folder, backends="fake", schemes=schemes, jobs=2, simulated_limit=30, identity={"seed": 3})
    return folder, {row["scheme"]: row for row in rows}


def test_each_fault_gives_one_row_and_the_others_are_complete(fake, faults):
    _, rows = faults
    assert list(rows) == ["fp32", *(s for s in fake.COMPILE_FAULTS + fake.RUN_FAULTS if s != "hang")]
    expected = {
        "refused": ("refused", "compile: operator Foo is unknown to this tool"),
        "exit": (
            "crashed",
            "compile ended with exit status 3 and no answer; its last words: licence expired",
        ),
        "segfault": ("crashed", "killed by SIGSEGV"),
        "allocation": ("crashed", "out of memory at its limit of"),
        "silent": ("crashed", "compile ended with exit status 0 and no answer"),
        "reply": ("crashed", "compile ended with exit status 0 and no answer"),
        "not-a-number": ("crashed", "Out of range float values are not JSON compliant"),
        "nan": ("invalid", "logits of 5 of 30 images are not finite"),
        "shape": ("invalid", "logits have shape (30, 2), expected (30, 4)"),
        "garbage": ("crashed", "run: ValueError: could not convert string to float"),
        "run-crash": ("crashed", "run: RuntimeError: device lost"),
    }
    for scheme, (status, reason) in expected.items():
        assert rows[scheme]["status"] == status, scheme
        assert reason in rows[scheme]["reason"], scheme
        assert rows[scheme]["top1"] is None


def log_of(faults, scheme):
    folder, rows = faults
    return (folder / rows[scheme]["log"]).read_text()


def test_logs_are_kept_and_working_directories_are_not(faults):
    assert "compiling exit with 9 images" in log_of(faults, "exit")
    assert "device lost" in log_of(faults, "run-crash")
    assert "operator Foo" in log_of(faults, "refused")
    folder, _ = faults
    assert not list(folder.glob("work/*/work")) and not list(folder.glob("work/*.partial"))


def test_a_good_row_is_complete(faults):
    _, rows = faults
    for row in rows.values():
        assert set(FIELDS) <= set(row) and row["status"] in STATUSES and row["kind"] in KINDS
        assert row["seed"] == 3 and row["data"] == rows["fp32"]["data"]
    exact, reference = rows["exact"], rows["fp32"]
    assert (reference["n"], exact["n"], exact["simulated"]) == (40, 30, True)
    assert exact["agreement"] == 1.0 and exact["logit_mse"] < 1e-10 and exact["cycles"] == 42
    assert exact["top1"] == exact["reference_top1"] == 1.0
    assert exact["operators"] == {"Conv": {"integer": 2, "float": 0}}
    assert exact["model_bytes"] == 4 and exact["calibration"] == {"n": 9, "method": "minmax"}
    assert exact["latency_ms_p50"] is None and "not timed" in exact["reason"]
    assert "Horowitz" in exact["energy_source"] and exact["energy_mj"] > 0
    assert sum(n for n, *_ in exact["reliability"]) == 30
    assert exact["versions"]["numpy"] == np.__version__


def test_a_second_run_does_nothing(faults, monkeypatch):
    folder, rows = faults
    content = (folder / "records.jsonl").read_bytes()
    monkeypatch.setattr(steps, "perform", lambda *_, **__: pytest.fail("a step was performed again"))
    schemes = list(rows)[1:]
    again = run(folder, backends="fake", schemes=schemes, simulated_limit=30, identity={"seed": 3})
    assert {row["scheme"]: row for row in again} == rows
    assert (folder / "records.jsonl").read_bytes() == content


def test_retry_repeats_only_what_failed(fake, tmp_path):
    choice = {"backends": "fake", "schemes": ["refused", "exact"]}
    first = run(tmp_path, **choice)
    seen = []
    second = run(tmp_path, **choice, retry=True, on_record=seen.append)
    assert [row["scheme"] for row in seen] == ["refused"]
    assert second[2] == first[2] and len(records.read(tmp_path / "records.jsonl")) == 4


def test_retry_tries_a_step_that_rows_share_once(fake, tmp_path, monkeypatch):
    both = (fake.BACKEND.runtimes[0], dataclasses.replace(fake.BACKEND.runtimes[0], name="second"))
    monkeypatch.setattr(type(fake.BACKEND), "runtimes", both)
    choice = {"backends": "fake", "schemes": ["refused"]}
    run(tmp_path, **choice)
    started = []
    monkeypatch.setattr(steps, "_execute", lambda *arguments: started.append(arguments) or 1)
    run(tmp_path, **choice, retry=True)
    assert len(started) == 1


def test_a_step_is_tried_again_with_more_time_or_memory(fake, tmp_path):
    choice = {"backends": "fake", "schemes": ["allocation"], "folder": tmp_path}
    first = run(**choice, limits=Limits(60, 2))[1]
    assert "out of memory at its limit of 2 GiB" in first["reason"]
    assert run(**choice, limits=Limits(50, 2))[1] == first
    assert "its limit of 3 GiB" in run(**choice, limits=Limits(50, 3))[1]["reason"]


def test_endless_loop_is_stopped_with_its_children(fake, tmp_path):
    started = time.monotonic()
    row = run(tmp_path, backends="fake", schemes=["hang"], limits=Limits(seconds=4))[1]
    assert (row["status"], row["reason"]) == ("timeout", "compile was stopped after 4 s (--timeout)")
    assert time.monotonic() - started < 60
    child = int((tmp_path / row["log"]).read_text().split()[-1])
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


def test_half_written_cache_is_made_again(fake, tmp_path):
    choice = {"backends": "fake", "schemes": ["exact"]}
    good = run(tmp_path, **choice)[1]
    for damage in (truncate_answers, truncate_logits, leave_half_a_step, cut_last_record):
        damage(tmp_path)
        if damage is not cut_last_record:
            (tmp_path / "records.jsonl").unlink()
            row = run(tmp_path, **choice)[1]
        else:
            with pytest.warns(UserWarning, match="cut short"):
                row = run(tmp_path, **choice)[1]
        same = ("status", "top1", "predictions", "key", "operators")
        assert {name: row[name] for name in same} == {name: good[name] for name in same}, damage


def truncate_answers(folder):
    for path in folder.glob("work/*/answer.json"):
        path.write_bytes(path.read_bytes()[:20])


def truncate_logits(folder):
    for path in folder.glob("work/*/outputs/0.npy"):
        path.write_bytes(path.read_bytes()[:150])


def leave_half_a_step(folder):
    for path in list(folder.glob("work/*-compile-*")):
        os.rename(path, path.with_name(f"{path.name}.partial"))


def cut_last_record(folder):
    path = folder / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-50])


def test_another_model_data_or_calibration_is_another_row(fake, tmp_path):
    choice = {"backends": "fake", "schemes": ["exact"]}
    keys = [run(tmp_path, **choice)[1]["key"]]
    other = onnx.ModelProto.FromString(MODEL.SerializeToString())
    other.producer_name = "somebody else"
    for change in (
        {"model": other},
        {"calibration": CALIBRATION[:5]},
        {"test_set": (IMAGES[:39], LABELS[:39])},
        {"identity": {"seed": 1}},
    ):
        keys.append(run(tmp_path, **choice, **change)[1]["key"])
    assert len(set(keys)) == len(keys)


def test_missing_toolchain_is_a_row_until_it_is_there(fake, tmp_path, monkeypatch):
    choice = {"backends": "fake", "schemes": ["exact"]}
    monkeypatch.setattr(type(fake.BACKEND), "available", lambda _: "fake-sdk is not installed: install it")
    rows = [run(tmp_path, **choice)[1] for _ in range(2)]
    assert (rows[0]["status"], rows[0]["reason"]) == ("unavailable", "fake-sdk is not installed: install it")
    assert rows[0] == rows[1]
    monkeypatch.undo()
    assert run(tmp_path, **choice)[1]["status"] == "ok"


def test_interruption_ends_the_workers(fake, tmp_path):
    def interrupt(record):
        if record["scheme"] == "refused":
            raise KeyboardInterrupt

    choice = {"backends": "fake", "schemes": ["refused", "hang"], "jobs": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **choice, on_record=interrupt)
    assert not steps._RUNNING and not list(tmp_path.glob("work/*hang*/answer.json"))
    assert not list(tmp_path.glob("work/*.partial"))
    row = run(tmp_path, **choice, limits=Limits(4))[2]
    assert row["status"] == "timeout"  # it ran anew: nothing of the interrupted one was kept


def test_two_processes_share_one_folder(fake, tmp_path):
    """Ask for the same step twice within one process. The second waits for the first."""
    from concurrent.futures import ThreadPoolExecutor

    choice = {"backends": "fake", "schemes": ["exact", "refused"]}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run(tmp_path, **choice), range(2))
    assert [row["status"] for row in first] == [row["status"] for row in second] == ["ok", "refused", "ok"]
    assert len(list(tmp_path.glob("work/fake-exact-*/answer.json"))) == 2


def test_records_of_another_command_are_left_alone(tmp_path):
    records.append(tmp_path / "records.jsonl", {"scheme": "fp32"})
    with pytest.raises(InvalidInput, match="another command"):
        run(tmp_path, backends="onnxruntime", schemes=[])


def test_only_the_chosen_rows_run_after_the_reference():
    assert select("all") == list(BACKENDS.values())
    rows = select_rows(["onnxruntime"], ["int8-dynamic"], ["optimized"])
    assert [(s.name, r.name) for _, s, r in rows] == [("fp32", "reference"), ("int8-dynamic", "optimized")]


def broken_file(folder):
    path = folder / "half.onnx"
    path.write_bytes(MODEL.SerializeToString()[:100])
    return path


def changed(change):
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    change(model.graph)
    return model


def two_inputs(graph):
    graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


def unrunnable(graph):
    graph.node[2].op_type = "NoSuchOperator"


def nan_weights(graph):
    graph.node[1].attribute[0].t.CopyFrom(
        helper.make_tensor("value", TensorProto.FLOAT, [1, 4], [float("nan")] * 4)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backends": ["no-such"]}, "Unknown backends"),
        ({"schemes": ["int3"]}, "No chosen backend offers the schemes"),
        ({"jobs": 0}, "jobs must be above 0"),
        ({"simulated_limit": -1}, "simulated_limit must be above 0"),
        ({"limits": Limits(0)}, "the time limit must be above 0"),
        ({"price_per_hour": -1.0}, "price of an hour"),
        ({"calibration": np.full_like(CALIBRATION, np.nan)}, "calibration has values that are not finite"),
        ({"runtimes": ["abacus"]}, "No chosen backend offers the runtimes"),
        ({"model": "absent.onnx"}, "absent.onnx cannot be read"),
        ({"model": broken_file}, "half.onnx cannot be read"),
        ({"model": changed(two_inputs)}, r"lacks the arrays \['mask'\]"),
        ({"model": changed(unrunnable)}, "cannot run the float model"),
        ({"model": changed(nan_weights)}, "cannot serve as a reference: logits of 40 of 40"),
        ({"test_set": (IMAGES[:, :5], LABELS)}, r"takes float32 \(n, 6\)"),
        ({"test_set": (IMAGES.astype(np.float64), LABELS)}, "float64"),
        ({"calibration": CALIBRATION[0]}, "calibration is float32"),
        ({"test_set": (IMAGES, LABELS[:5])}, "one label, or one array of labels, per image"),
        ({"test_set": (IMAGES[:0], LABELS[:0])}, "at least one sample"),
        ({"test_set": (IMAGES, LABELS + 50)}, "label"),
    ],
)
def test_wrong_input(change, message, tmp_path):
    if callable(change.get("model")):
        change = {"model": change["model"](tmp_path)}
    with pytest.raises(InvalidInput, match=message):
        run(tmp_path, **{"backends": "onnxruntime", "schemes": [], **change})
