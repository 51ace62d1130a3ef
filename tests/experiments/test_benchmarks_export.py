"""Check the benchmark of exports: twins equal Linen, and what is counted, timed and recorded."""

import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import onnx
import pytest
from onnx import helper
from rich.console import Console

import qt_jax as qt
from experiments.benchmarks import export, exporters
from experiments.benchmarks.exporters import OURS, TORCH, Network
from experiments.models.mobilenet import MobileNetV2, Stage
from experiments.models.resnet import ResNet, ResNet50
from experiments.models.segmenters import UNet
from experiments.models.transformers import ViT
from qt_jax import records

TINY = {
    "resnet": ResNet((1, 1), 4),
    "resnet50": ResNet50((1, 1), width=4, num_classes=5),
    "mobilenetv2": MobileNetV2(4, (Stage(1, 4, 1, 1), Stage(2, 8, 2, 2)), 16),
    "vit": ViT(dim=8, depth=2, heads=2),
    "unet": UNet(width=4, depth=2),
}
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NET = Network(TINY["resnet"], 8)


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    module.set_num_threads(2)
    return module


@pytest.mark.parametrize("name", TINY)
def test_the_twin_computes_the_same(torch, name):
    from experiments.benchmarks.torch_models import load_variables, twin

    network = Network(TINY[name], 16)
    variables, images = exporters.random_variables(network), exporters.random_images(network, 2)
    model = twin(network.module, 16)
    load_variables(model, variables)
    with torch.no_grad():
        found = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    expected = np.asarray(jax.jit(network.module.apply, compiler_options=QUICK_TO_COMPILE)(variables, images))
    assert np.std(expected) > 1e-2
    np.testing.assert_allclose(np.moveaxis(found, 1, -1), expected, atol=1e-4)


def test_a_twin_with_a_tensor_unfilled_is_refused(torch):
    from experiments.benchmarks.torch_models import load_variables, twin

    variables = exporters.random_variables(NET)
    del variables["params"]["head"]["bias"]
    with pytest.raises(KeyError, match=r"no Flax leaf for head\.bias"):
        load_variables(twin(NET.module, 8), variables)


def test_resnet50_has_the_published_size():
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    params = jax.eval_shape(ResNet50().init, jax.random.key(0), images)["params"]
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 25_557_032


def test_random_variables_leave_no_batch_norm_the_identity():
    variables = exporters.random_variables(NET)
    for collection, leaf in (("params", "scale"), ("params", "bias"), ("batch_stats", "var")):
        assert np.std(variables[collection]["stem_norm"][leaf]) > 0.01
    assert np.min(variables["batch_stats"]["stem_norm"]["var"]) > 0.0


@pytest.mark.parametrize("network", [NET, Network(TINY["vit"], 8)], ids=["resnet", "vit"])
def test_graphs_of_both_exporters_agree(torch, network):
    rows = export.graphs(network, 18)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert [row["opset"] for row in rows.values()] == [18, 18]
    assert 0.0 <= rows[OURS]["max_difference"] == rows[TORCH]["max_difference"] < 1e-4
    assert rows[OURS]["max_output"] > 0.05
    assert rows[OURS]["nodes"] <= rows[TORCH]["nodes"]
    assert rows[OURS]["nodes"] == sum(rows[OURS]["operators"].values())


def test_an_export_that_is_refused_is_a_row_with_its_reason(monkeypatch):
    def exporter(*_):
        def refuse(path):
            raise qt.InvalidInput("no such operator")

        return refuse

    monkeypatch.setattr(export, "exporter", exporter)
    refused = {"status": "refused", "reason": "no such operator"}
    assert export.graphs(NET, 18) == {OURS: refused, TORCH: refused}


def test_nodes_and_transposes_are_counted():
    nodes = [helper.make_node(kind, ["x"], ["y"]) for kind in ("Relu", "Transpose", "Relu")]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", [], []), opset_imports=[helper.make_opsetid("", 13)]
    )
    expected = {"opset": 13, "nodes": 3, "operators": {"Relu": 2, "Transpose": 1}, "transposes": 1}
    assert export.describe(model) == expected


@pytest.fixture
def scripted(monkeypatch):
    """Return an exporter that takes the given seconds and allocates 32 MB."""
    laps = iter([{"convert_s": 9.0}] + [{"convert_s": s, "verify_s": 1.0} for s in (5.0, 3.0, 1.0, 2.0)])

    def export_once(path):
        np.ones(2**22)
        return next(laps)

    monkeypatch.setattr(exporters, "exporter", lambda *_: export_once)


def test_the_first_export_is_cold_and_the_median_of_the_others_warm(scripted):
    measured = exporters.seconds(OURS, NET, 18, 3)
    assert measured.pop("start_s") > 0.0
    assert measured == {
        "cold_s": 6.0,
        "cold_verify_s": 1.0,
        "warm_s": 3.0,
        "warm_verify_s": 1.0,
        "repeats": 3,
    }


def test_the_peak_is_of_the_export_alone(scripted):
    measured = exporters.memory(OURS, NET, 18)
    leaves = jax.tree.leaves(exporters.random_variables(NET)["params"])
    assert measured["parameter_bytes"] == 4 * sum(leaf.size for leaf in leaves)
    if measured["peak_bytes"] is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 32e6 < measured["peak_bytes"] < 48e6
    assert measured["peak_ratio"] == measured["peak_bytes"] / measured["parameter_bytes"]


def test_without_linux_the_peak_is_not_known(scripted, monkeypatch):
    monkeypatch.setattr(exporters.Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError))
    measured = exporters.memory(OURS, NET, 18)
    assert measured["peak_bytes"] is None and measured["peak_ratio"] is None


def test_time_and_memory_have_a_process_each(monkeypatch):
    processes = []

    def fresh(workers, context):
        processes.append((workers, context.get_start_method()))
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(exporters, "ProcessPoolExecutor", fresh)
    monkeypatch.setattr(exporters, "seconds", lambda *arguments: {"seconds": arguments})
    monkeypatch.setattr(exporters, "memory", lambda *arguments: {"memory": arguments})
    measured = exporters.cost(TORCH, NET, 18, 3)
    assert measured == {"seconds": (TORCH, NET, 18, 3), "memory": (TORCH, NET, 18)}
    assert processes == [(1, "spawn")] * 2


def test_without_pytorch_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main([]) == 2
    assert "experiments/benchmarks/requirements.txt" in " ".join(capsys.readouterr().err.split())


def test_a_count_below_one_is_told(capsys):
    assert export.main(["--repeats", "0"]) == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err


def test_a_record_for_each_network_and_exporter(monkeypatch, tmp_path):
    row = {
        **{"status": "ok", "opset": 18, "nodes": 2, "operators": {"Conv": 1, "Gemm": 1}, "transposes": 0},
        **{"max_difference": 1e-6, "max_output": 3.0},
    }
    refused = {"status": "refused", "reason": "no such operator"}
    costs = {"cold_s": 2.5, "warm_s": 1.5, "peak_bytes": 5_000_000, "peak_ratio": 4.0}
    monkeypatch.setattr(export, "NETWORKS", {"small": NET, "large": NET})
    monkeypatch.setattr(export, "TIMED", ("large",))
    monkeypatch.setattr(export, "graphs", lambda *_: {OURS: dict(row), TORCH: dict(refused)})
    monkeypatch.setattr(export, "cost", lambda *_: costs)
    monkeypatch.setattr(export, "require_torch", lambda: None)
    console = Console(file=io.StringIO(), width=120)
    export.run(export.Options(out=tmp_path / "records.jsonl"), console)
    kept = records.read(tmp_path / "records.jsonl")
    assert [(r["model"], r["variant"]) for r in kept] == [
        (m, v) for m in ("small", "large") for v in (OURS, TORCH)
    ]
    assert [r.get("cold_s") for r in kept] == [None, None, 2.5, None]
    assert all(r["versions"]["jax2onnx"] and "commit" in r and r["command"] for r in kept)
    shown = console.file.getvalue()
    assert "5 (4.0x)" in shown and "1 Conv, 1 Gemm" in shown and "no such operator" in shown


@pytest.mark.slow
def test_the_command_line_measures_in_fresh_processes(torch, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "NETWORKS", {"resnet50": NET})
    assert export.main(["--repeats", "1", "--out", str(tmp_path / "records.jsonl")]) == 0
    for record in records.read(tmp_path / "records.jsonl"):
        assert record["status"] == "ok" and record["cold_s"] > 0.0 and record["start_s"] > 0.0


def test_the_file_of_ours_is_verified_and_timed_apart(tmp_path):
    laps = exporters.exporter(OURS, NET, exporters.random_variables(NET), 18)(tmp_path / "model.onnx")
    assert set(laps) == {"convert_s", "verify_s"} and min(laps.values()) > 0.0
    onnx.checker.check_model(tmp_path / "model.onnx")
