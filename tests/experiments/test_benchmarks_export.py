"""Check the benchmark of exports: twins equal Linen, and what is counted, timed and recorded."""

import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import numpy as np
import onnx
import pytest
from onnx import helper
from rich.console import Console

import qt_jax as qt
from experiments.benchmarks import export, exporters
from experiments.benchmarks.exporters import JAX2ONNX, OURS, TORCH, Network
from experiments.benchmarks.public_models import DiffusionUNet, PoolFormer, PublicViT
from experiments.models.convnext import ConvNeXt
from experiments.models.mobilenet import Block, MobileNetV2, MobileNetV3, Stage
from experiments.models.recurrent import RowReader
from experiments.models.resnet import FastResNet, ResNet, ResNet50
from experiments.models.segmenters import ASPP, UNet
from experiments.models.speed_net import SpeedNet
from experiments.models.transformers import Mixer, ViT
from qt_jax import records

BLOCKS = (Block(3, 4, 4, True, nn.relu, 2), Block(5, 8, 4, True, nn.hard_swish, 1))
TINY = {
    "resnet": ResNet((1, 1), 4),
    "fast": FastResNet(4),
    "resnet50": ResNet50((1, 1), width=4, num_classes=5),
    "mobilenetv2": MobileNetV2(4, (Stage(1, 4, 1, 1), Stage(2, 8, 2, 2)), 16),
    "mobilenetv3": MobileNetV3(4, BLOCKS, 8, 8),
    "convnext": ConvNeXt((4, 8), (1, 1)),
    "speed": SpeedNet((8, 16)),
    "vit": ViT(dim=8, depth=2, heads=2),
    "mixer": Mixer(dim=8, depth=1, token_hidden=8, channel_hidden=8),
    "lstm": RowReader(nn.LSTMCell, 8),
    "gru": RowReader(nn.GRUCell, 8),
    "unet": UNet(width=4, depth=2),
    "unet-nearest": UNet("nearest", width=4, depth=1),
    "unet-bilinear": UNet("bilinear", width=4, depth=1),
    "aspp": ASPP(4, 4),
    "vit-b16": PublicViT(8, 8, 2, 2, 16, num_classes=5),
    "vit-s16-mean": PublicViT(8, 8, 2, 2, 16, "mean", num_classes=5),
    "poolformer": PoolFormer((1, 1), (4, 8), num_classes=5),
    "diffusion-unet": DiffusionUNet(8, (1, 2), 1, 4),
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

    network = Network(TINY[name], 16, takes_times=name == "diffusion-unet")
    variables, inputs = exporters.random_variables(network), exporters.random_inputs(network, 2)
    model = twin(network.module, 16)
    load_variables(model, variables)
    with torch.no_grad():
        found = model(*map(torch.from_numpy, exporters.channels_first(inputs))).numpy()
    expected = np.asarray(
        jax.jit(network.module.apply, compiler_options=QUICK_TO_COMPILE)(variables, *inputs)
    )
    assert np.std(expected) > 1e-2
    np.testing.assert_allclose(np.moveaxis(found, 1, -1), expected, atol=1e-4)


def test_a_twin_with_a_tensor_unfilled_is_refused(torch):
    from experiments.benchmarks.torch_models import load_variables, twin

    variables = exporters.random_variables(NET)
    del variables["params"]["head"]["bias"]
    with pytest.raises(KeyError, match=r"no Flax leaf for head\.bias"):
        load_variables(twin(NET.module, 8), variables)


def test_a_leaf_without_a_tensor_is_refused(torch):
    from experiments.benchmarks.torch_models import load_variables, twin

    variables = exporters.random_variables(NET)
    variables["params"]["head"]["gain"] = np.ones(10, np.float32)
    with pytest.raises(KeyError, match=r"no tensor for head\.gain"):
        load_variables(twin(NET.module, 8), variables)


PUBLISHED = {"resnet50": 25_557_032, "vit-b16": 86_567_656, "poolformer-s12": 11_915_176}
"""Parameters: of torchvision's ResNet-50 and ViT-B/16, and of PoolFormer-S12, stated as 11.9 million."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_size(name):
    network = export.NETWORKS[name]
    images = jax.ShapeDtypeStruct((1, *network.shapes()[0]), np.float32)
    params = jax.eval_shape(network.module.init, jax.random.key(0), images)["params"]
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PUBLISHED[name]


def test_random_variables_leave_no_batch_norm_the_identity():
    variables = exporters.random_variables(NET)
    for collection, leaf in (("params", "scale"), ("params", "bias"), ("batch_stats", "var")):
        assert np.std(variables[collection]["stem_norm"][leaf]) > 0.01
    assert np.min(variables["batch_stats"]["stem_norm"]["var"]) > 0.0


@pytest.mark.parametrize("network", [NET, Network(TINY["vit"], 8)], ids=["resnet", "vit"])
def test_graphs_of_both_exporters_agree(torch, network):
    rows = export.graphs(network, 18)
    assert list(rows) == [OURS, TORCH, JAX2ONNX]
    assert [rows[name]["status"] for name in (OURS, TORCH)] == ["ok"] * 2
    assert [rows[name]["opset"] for name in (OURS, TORCH)] == [18, 18]
    if network is NET:  # under pytest, JAX refuses promotions that jax2onnx's layers make
        assert "max_difference" not in rows[JAX2ONNX] and rows[JAX2ONNX]["nodes"] > rows[OURS]["nodes"]
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
    assert export.graphs(NET, 18) == {name: refused for name in (OURS, TORCH, JAX2ONNX)}


def test_an_export_that_fails_is_a_row_with_the_error(monkeypatch):
    def exporter(*_):
        def fail(path):
            raise TypeError("takes 1 argument\nand more of it")

        return fail

    monkeypatch.setattr(export, "exporter", exporter)
    failed = {"status": "failed", "reason": "TypeError: takes 1 argument"}
    assert export.graphs(NET, 18) == {name: failed for name in (OURS, TORCH, JAX2ONNX)}


def test_nodes_and_transposes_are_counted():
    nodes = [helper.make_node(kind, ["x"], ["y"]) for kind in ("Relu", "Transpose", "Relu")]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", [], []), opset_imports=[helper.make_opsetid("", 13)]
    )
    expected = {"opset": 13, "nodes": 3, "operators": {"Relu": 2, "Transpose": 1}, "transposes": 1}
    assert export.describe(model) == expected


def test_nodes_inside_a_loop_count():
    inner = helper.make_graph([helper.make_node("Transpose", ["x"], ["y"])], "body", [], [])
    loop = helper.make_node("Loop", ["n", "c"], ["z"], body=inner)
    model = helper.make_model(helper.make_graph([loop], "graph", [], []))
    described = export.describe(model)
    assert described["nodes"] == 2 and described["transposes"] == 1


@pytest.fixture
def scripted(monkeypatch):
    """Return an exporter that takes the given seconds of a clock and allocates 32 MB."""
    now, laps = [0.0], iter((9.0, 6.0, 3.0, 1.0, 2.0))

    def export_once(path):
        np.ones(2**22)
        now[0] += next(laps)

    monkeypatch.setattr(exporters.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(exporters.time, "process_time", lambda: 2 * now[0])
    monkeypatch.setattr(exporters, "exporter", lambda *_: export_once)


def test_the_first_export_is_cold_and_the_median_of_the_others_warm(scripted):
    expected = {"start_s": 9.0, "cold_s": 6.0, "cold_cpu_s": 12.0, "warm_s": 2.0, "warm_cpu_s": 4.0}
    assert exporters.seconds(OURS, NET, 18, 3) == expected | {"repeats": 3}


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
    options = export.Options(networks=("small", "large"), out=tmp_path / "records.jsonl")
    export.run(options, console)
    kept = records.read(tmp_path / "records.jsonl")
    assert [(r["model"], r["variant"]) for r in kept] == [
        (m, v) for m in ("small", "large") for v in (OURS, TORCH) * 2
    ]
    assert [r.get("cold_s") for r in kept] == [None] * 4 + [2.5] + [None] * 3  # at the first opset only
    assert [r["opset"] for r in kept if r["variant"] == TORCH] == [18, 21] * 2
    assert all(r["versions"]["jax2onnx"] and "commit" in r and r["command"] for r in kept)
    shown = console.file.getvalue()
    assert "5 (4.0x)" in shown and "1 Conv, 1 Gemm" in shown and "no such operator" in shown


@pytest.mark.slow
def test_the_command_line_measures_in_fresh_processes(torch, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "NETWORKS", {"resnet50": NET})
    flags = ["--networks", "resnet50", "--opsets", "18", "--repeats", "1"]
    assert export.main([*flags, "--out", str(tmp_path / "records.jsonl")]) == 0
    for record in records.read(tmp_path / "records.jsonl"):
        assert record["status"] == "ok"
        assert record["variant"] == JAX2ONNX or (record["cold_s"] > 0.0 and record["start_s"] > 0.0)


def test_ours_is_the_default_conversion_with_its_check(monkeypatch, tmp_path):
    checked = []
    convert = exporters.to_onnx
    monkeypatch.setattr(exporters, "to_onnx", lambda *a, **k: checked.append(k) or convert(*a, **k))
    exporters.exporter(OURS, NET, exporters.random_variables(NET), 18)(tmp_path / "model.onnx")
    assert checked == [{"opset": 18}]
    onnx.checker.check_model(tmp_path / "model.onnx")


def test_an_unknown_network_is_told(monkeypatch, capsys):
    monkeypatch.setattr(export, "require_torch", lambda: None)
    assert export.main(["--networks", "resnet2"]) == 2
    assert "there is no 'resnet2'" in capsys.readouterr().err
