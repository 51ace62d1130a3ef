"""Check that `python -m qt_jax.export` makes a verified file of a run or a checkpoint, or says why not."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import orbax.checkpoint as ocp
import pytest

import qt_jax as qt
from qt_jax.export.__main__ import main
from qt_jax.export.deploy import deploy
from qt_jax.export.encodings import read_ranges
from qt_jax.export.network import (
    Description,
    Samples,
    load,
    read_description,
    write_description,
    write_samples,
)

MODULE = "nets_of_the_export_test"
SOURCE = """
import flax.linen as nn


class Net(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Conv(self.width, (3, 3), padding=1, name="inner")(x))
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


def attend(features):
    return Attend(features)


class Attend(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        q, k = (nn.Dense(self.features, name=name)(x) for name in ("q", "k"))
        return q @ k.swapaxes(1, 2)


def not_a_module():
    return 3
"""
SHAPE = (8, 8, 3)
CONFIG = qt.QuantConfig(rules=(qt.Rule("inner", skip=True),))
IMAGES = np.random.default_rng(0).normal(size=(40, *SHAPE)).astype(np.float32)
SAMPLES = Samples(IMAGES[:32], IMAGES[32:])


def trained(model, config, images) -> dict:
    """Return variables with the ranges of one batch."""
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), images), config, images)
    with qt.quant_trim(config, 0.0, train=True):
        _, seen = jax.jit(partial(model.apply, mutable=["batch_stats"]))(variables, images)
    return jax.tree.map(np.array, {**variables, **seen})


def save_tree(path: Path, tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


@pytest.fixture(scope="module")
def variables(nets) -> dict:
    return trained(nets.Net(), CONFIG, IMAGES)


@pytest.fixture(scope="module")
def project(nets, variables) -> Path:
    """Write a user's project: a run with two steps of a whole training state, whose average is deployed."""
    run = Path(nets.__file__).parent / "run"
    state = {
        "step": jnp.int32(7),
        "params": jax.tree.map(np.zeros_like, variables["params"]),
        "batch_stats": variables["batch_stats"],
        "opt_state": [{"count": jnp.int32(7)}, None],
        "average": variables["params"],
    }
    with ocp.CheckpointManager(run / "steps") as manager:
        for step in (7, 10):
            manager.save(step, args=ocp.args.StandardSave(state))
    write_samples(SAMPLES, run / "samples.npz")
    write_description(
        Description(
            model=f"{MODULE}:Net",
            arguments={"width": 6},
            call={"train": False},
            input_shape=SHAPE,
            checkpoint="steps",
            collections={"params": "average", "batch_stats": "batch_stats"},
            quantization=CONFIG,
            samples="samples.npz",
        ),
        run / "model.json",
    )
    save_tree(run.parent / "bare", variables)
    return run.parent


@pytest.fixture
def run(project, tmp_path) -> Path:
    """Copy the run, so that a test may damage it."""
    return Path(shutil.copytree(project / "run", tmp_path / "run"))


def rewrite(run: Path, **changes) -> None:
    """Put other values into model.json without any check."""
    path = run / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def export(capsys, *arguments) -> dict:
    """Run a command that succeeds and prints nothing but the summary; return the summary."""
    assert main([*map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr()
    assert not printed.err and printed.out.count("\n") == 1
    return json.loads(printed.out)


def refused(capsys, *arguments) -> str:
    """Run a command that is refused; return its one line."""
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def graph_logits(path: Path, images=SAMPLES.parity) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images})[0]


NCHW = SAMPLES.parity.transpose(0, 3, 1, 2)


def test_float_graph_of_a_run_is_that_of_its_average(nets, variables, project, tmp_path, capsys):
    out = tmp_path / "new" / "model.onnx"
    summary = export(capsys, project / "run", "--out", out)
    expected = nets.Net().apply(variables, SAMPLES.parity)
    np.testing.assert_allclose(graph_logits(out, NCHW), expected, atol=1e-5)
    assert (summary["qdq"], summary["opset"], summary["inputs"]) == (None, 17, "real")
    assert summary["max_difference"].keys() == {"1", "7"} and max(summary["max_difference"].values()) < 1e-5
    assert summary["parameters"] == 3 * 9 * 6 + 6 + 6 * 9 * 6 + 6 + 6 * 5 + 5
    assert summary["macs"] == 64 * 9 * 6 * (3 + 6) + 6 * 5
    assert summary["bytes"] == out.stat().st_size
    ranges = read_ranges(summary["ranges"])
    assert summary["ranges"] == str(tmp_path / "new" / "model.ranges.json")
    assert ranges.model_sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    rows = {row["layer"]: row for row in summary["layers"]}
    assert rows["stem"]["weights"] == "int8 symmetric per-channel" and rows["stem"]["reason"] is None
    assert rows["inner"]["weights"] is None and rows["inner"]["reason"] == (
        "weights in floating point by rule 'inner'"
    )


@pytest.mark.parametrize(
    ("mode", "opset", "kernel", "integer"),
    [("int8", 17, "INT8", True), ("int4", 21, "INT4", False), ("int16-act", 21, "INT8", False)],
)
def test_modes_of_qdq(mode, opset, kernel, integer, project, tmp_path, capsys):
    out = tmp_path / "q.onnx"
    ranges = tmp_path / "q.ranges.json"
    ranges.write_text("of the graph that was here before")
    summary = export(capsys, project / "run", "--out", out, "--qdq", mode)
    assert (summary["qdq"], summary["opset"], summary["ranges"]) == (mode, opset, None)
    assert not ranges.exists()
    graph = onnx.load(out)
    onnx.checker.check_model(graph, full_check=True)
    types = {
        tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.graph.initializer
    }
    assert types["stem/kernel/quantized"] == kernel and types["inner/kernel"] == "FLOAT"
    found = summary["parity"]["logits"]
    assert found["n"] == len(SAMPLES.parity) and 0 <= found["equal_integers"] <= 1
    assert found["top1_agreement"] >= 0.75 and found["sqnr_db"] > 20
    rows = {row["layer"]: row for row in summary["layers"]}
    assert rows.keys() == {"stem", "inner", "head"}
    assert rows["head"]["integer_kernel"] is integer and rows["inner"]["weights"] is None
    assert rows["stem"]["integer_kernel"] is False  # the skipped layer reads its output as it is
    if rows["inner"]["integer_kernel"]:  # onnxruntime's own doing, and said so
        assert rows["inner"]["reason"].endswith("'inner'; onnxruntime rounds them to INT8 by itself")
    if not integer:
        assert rows["stem"]["reason"].startswith("no integer kernel for INT")
    assert summary["parameters"] == 533


def test_graph_follows_the_options(project, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    flags = (
        "--layout",
        "nhwc",
        "--no-dynamic-batch",
        "--no-fold-batch-norm",
        "--opset",
        "13",
        "--per-tensor",
    )
    summary = export(capsys, project / "run", "--out", out, *flags)
    assert summary["opset"] == 13 and "BatchNormalization" in summary["operators"]
    assert summary["max_difference"].keys() == {"1"}
    assert {row["weights"] for row in summary["layers"]} == {"int8 symmetric per-tensor", None}
    assert graph_logits(out, SAMPLES.parity[:1]).shape == (1, 5)
    with pytest.raises(Exception, match="invalid dimensions"):
        graph_logits(out)


def test_learned_ranges_as_clips(project, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    assert main([str(project / "run"), "--out", str(out), "--clips"]) == 0
    assert "1 activations clipped to their learned ranges" in " ".join(capsys.readouterr().out.split())
    clips = [node.name for node in onnx.load(out).graph.node if node.op_type == "Clip"]
    assert clips == ["GlobalAveragePool/Clip"]  # the layer "inner" is in floating point
    assert main([str(project / "run"), "--out", str(out), "--clips", "--qdq", "int8"]) == 2
    assert "Clip nodes are for FP32 graphs" in capsys.readouterr().err


def test_printed_tables_are_plain_when_piped(project, tmp_path, capsys):
    assert main([str(project / "run"), "--out", str(tmp_path / "m.onnx")]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "2 of 3 ranged" in text and "largest difference to JAX" in text
    assert main([str(project / "run"), "--out", str(tmp_path / "q.onnx"), "--qdq", "int8"]) == 0
    text = capsys.readouterr().out
    assert (
        "top-1 agrees on" in text
        and "2 of 3 layers quantized" in text
        and "against JAX at lambda = 1" in text
    )


def test_command_in_a_process_of_its_own(project, tmp_path):
    """Find the module in the current directory, and print nothing but the summary."""
    command = [sys.executable, "-m", "qt_jax.export", "run", "--out", str(tmp_path / "m.onnx"), "--json"]
    root = str(Path(qt.__file__).parents[1])
    environment = {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["file"] == str(tmp_path / "m.onnx")


def test_bare_checkpoint_without_samples(nets, variables, project, tmp_path, capsys):
    """Export what either checkpointer of orbax saved, without ranges, with parity on random inputs."""
    plain = nets.Net().init(jax.random.key(3), IMAGES[:1])
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", plain)
    shape = ("--input-shape", *SHAPE, "--model", f"{MODULE}:Net", "--call", '{"train": false}')
    summary = export(capsys, tmp_path / "plain", *shape, "--out", tmp_path / "m.onnx")
    assert summary["inputs"] == "random normal, seed 0" and summary["layers"] == []
    assert "not trained with Quant-Trim" in summary["ranges_reason"]
    np.testing.assert_allclose(
        graph_logits(tmp_path / "m.onnx", NCHW), nets.Net().apply(plain, SAMPLES.parity), atol=1e-5
    )
    assert "needs learned ranges" in refused(
        capsys, tmp_path / "plain", *shape, "--out", tmp_path / "q.onnx", "--qdq", "int8"
    )
    summary = export(capsys, project / "bare", *shape, "--out", tmp_path / "m.onnx")
    assert summary["ranges"] is None and "no samples" in summary["ranges_reason"]
    assert "needs real inputs" in refused(
        capsys, project / "bare", *shape, "--out", tmp_path / "q.onnx", "--qdq", "int8"
    )
    assert not (tmp_path / "q.onnx").exists()


def test_bare_checkpoint_with_ranges_and_samples(project, tmp_path, capsys):
    """Export one step of the run without its average: the zeros that it holds as params."""
    given = (
        "--model",
        f"{MODULE}:Net",
        "--input-shape",
        *SHAPE,
        "--samples",
        project / "run" / "samples.npz",
    )
    config = json.dumps({"rules": [{"path": "inner", "skip": True}]})
    given = (*given, "--quantization", config)
    summary = export(capsys, project / "bare", *given, "--out", tmp_path / "q.onnx", "--qdq", "int8")
    assert summary["parity"]["logits"]["sqnr_db"] > 20
    step = (project / "run" / "steps" / "7", *given, "--variables", "params")
    export(capsys, *step, "--out", tmp_path / "m.onnx")
    assert not np.any(graph_logits(tmp_path / "m.onnx", NCHW))


def test_attention_is_named_as_a_product_of_activations(nets, tmp_path):
    images = IMAGES[:, 0]
    save_tree(tmp_path / "bare", trained(nets.attend(4), qt.QuantConfig(), images))
    write_samples(Samples(images[:32], images[32:]), tmp_path / "samples.npz")
    description = Description(
        f"{MODULE}:attend",
        (8, 3),
        "bare",
        {"features": 4},
        quantization=qt.QuantConfig(),
        samples="samples.npz",
    )
    write_description(description, tmp_path / "attend.json")
    summary = deploy(load(tmp_path / "attend.json"), tmp_path / "q.onnx", qdq="int8")
    reasons = {row["layer"]: row["reason"] for row in summary["layers"]}
    assert len(reasons) == 3 and reasons.pop("q") is None and reasons.pop("k") is None
    assert list(reasons.values()) == ["a product of two activations, of which Quant-Trim learns no range"]


def test_ranges_that_cannot_be_expressed_do_not_stop_the_float_graph(run, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, activations=qt.QuantSpec(6, symmetric=False))
    rewrite(run, quantization=dataclasses.asdict(config))
    summary = export(capsys, run, "--out", tmp_path / "m.onnx")
    assert summary["ranges"] is None and "activations on 6 bits" in summary["ranges_reason"]
    summary = export(capsys, run, "--out", tmp_path / "q.onnx", "--qdq", "int8")
    assert summary["parity"]["logits"]["top1_agreement"] is not None


def test_layers_out_of_reach_of_the_config_are_explained(run, tmp_path, capsys):
    """Give a config that wants less than was trained, or a checkpoint without statistics."""
    rewrite(run, quantization={"activations": None})
    reasons = {
        row["layer"]: row["reason"] for row in export(capsys, run, "--out", tmp_path / "m.onnx")["layers"]
    }
    assert reasons["stem"] == "input in floating point by the config's default"
    assert reasons["inner"] == "no statistics: quant_trim does not reach it"


def test_description_keeps_every_field(tmp_path):
    config = qt.QuantConfig(
        weights=qt.QuantSpec(4, axis=-1, quantile=0.99),
        activations=None,
        rules=(
            qt.Rule("a", weights=None),
            qt.Rule("b", inputs=qt.QuantSpec(16, ste="clipped"), outputs=None),
        ),
        momentum=0.5,
    )
    wanted = Description(
        "a.b:c", (4, 4, 1), "x/y", {"k": [1, "z"]}, {"train": False}, {"params": "p"}, config
    )
    write_description(wanted, tmp_path / "model.json")
    assert read_description(tmp_path / "model.json") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "its version is 2, this qt_jax reads 1"),
        ({"colour": "red"}, "colour"),
        ({"input_shape": [8, 8, 0]}, "input_shape must hold whole numbers above 0"),
        ({"arguments": 3}, "arguments must be an object"),
        ({"quantization": {"bits": 8}}, "this is not a quantization config"),
        ({"quantization": {"weights": {"bits": 99}}}, "QuantSpec.bits"),
        ({"model": "no_such_package.nets:Net"}, "'no_such_package.nets' of the model"),
        ({"model": f"{MODULE}:Nett"}, f"module {MODULE} has no 'Nett'"),
        ({"model": MODULE}, "is not of the form package.module:factory"),
        ({"model": f"{MODULE}:not_a_module", "arguments": {}}, "makes a int, not a flax.linen.Module"),
        ({"arguments": {"depth": 3}}, "cannot be called with {'depth': 3}"),
        ({"arguments": {"width": 7}}, "stem"),
        (
            {"checkpoint": "nowhere"},
            "nowhere is not a checkpoint of orbax and holds none (there is no such folder)",
        ),
        ({"checkpoint": "."}, "run is not a checkpoint of orbax and holds none: name"),
        ({"checkpoint": "model.json"}, "model.json is a file, and not one of flax.serialization.to_bytes"),
        ({"collections": {"params": "ema"}}, "has no parameters under 'ema'; it holds "),
        ({"samples": "gone.npz"}, "gone.npz holds no samples (FileNotFoundError"),
        ({"samples": "model.json"}, "model.json holds no samples"),
        ({"input_shape": [8, 8, 1]}, "samples.npz has shape (32, 8, 8, 3)"),
    ],
)
def test_wrong_descriptions_are_refused(changes, says, run, tmp_path, capsys):
    rewrite(run, **changes)
    assert says in refused(capsys, run, "--out", tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_missing_and_damaged_files_are_refused(run, variables, tmp_path, capsys):
    out = ("--out", tmp_path / "m.onnx")
    leaf = max((run / "steps" / "10").rglob("d/*"), key=lambda path: path.stat().st_size)
    leaf.write_bytes(leaf.read_bytes()[:20])
    assert "steps/10/default is damaged" in refused(capsys, run, *out)
    (run / "steps" / "10" / "default" / "_METADATA").write_text("{")
    assert "steps/10/default is damaged" in refused(capsys, run, *out)
    (run / "model.json").write_text("{")
    assert "model.json does not describe a network (JSONDecodeError" in refused(capsys, run, *out)
    (run / "model.json").unlink()
    assert "repeat the command that trained it" in refused(capsys, run, *out)
    assert "nowhere is not there: name the folder" in refused(capsys, tmp_path / "nowhere", *out)
    bare = ("--model", f"{MODULE}:Net", "--input-shape", *SHAPE)
    for name in ("one", "two"):
        save_tree(tmp_path / "several" / name, variables)
    assert "several trees that fit the params of the model: one/params, two/params" in refused(
        capsys, tmp_path / "several", *bare, *out
    )
    save_tree(tmp_path / "list", [np.ones(3)])
    assert "the checkpoint holds 0. Is --model" in refused(capsys, tmp_path / "list", *bare, *out)


def test_wrong_options_are_refused_and_leave_the_file_alone(run, tmp_path, capsys):
    out = tmp_path / "m.onnx"
    out.write_text("mine")
    cases = {
        (
            "--qdq",
            "int4",
            "--opset",
            "17",
        ): "QDQ mode int4 needs integers that ONNX has from opset 21, not 17",
        ("--qdq", "int16-act", "--opset", "20"): "from opset 21, not 20",
        ("--opset", "12"): "opset 12 is not supported",
        ("--samples", "x.npz"): "--samples is for a bare checkpoint",
        ("--model", "a:b"): "--model needs --input-shape",
        ("--model", "a:b", "--input-shape", "8", "--arguments", "{"): "--arguments '{' is not JSON",
        ("--model", "a:b", "--input-shape", "8", "--call", "3"): "--call '3' is not a JSON object",
        ("--model", "a:b", "--input-shape", "8", "--quantization", '{"momentum": 2}'): "QuantConfig.momentum",
    }
    for flags, says in cases.items():
        assert says in refused(capsys, run, "--out", out, *flags)
    assert out.read_text() == "mine"
    assert "is a folder: name the file" in refused(capsys, run, "--out", tmp_path)
    assert "m.onnx/below.onnx cannot be written" in refused(capsys, run, "--out", out / "below.onnx")
    with pytest.raises(qt.InvalidInput, match="unknown; choose one of int8"):
        deploy(load(run), out, qdq="int2")
    with pytest.raises(SystemExit):
        main([str(run), "--out", str(out), "--qdq", "int2"])


def test_few_samples_are_refused(run, tmp_path, capsys):
    write_samples(Samples(IMAGES[:1], IMAGES[:3]), run / "samples.npz")
    assert "got 3 inputs only" in refused(capsys, run, "--out", tmp_path / "m.onnx")
    write_samples(Samples(IMAGES[:1] * np.float32("nan"), IMAGES[:8]), run / "samples.npz")
    assert "not finite" in refused(capsys, run, "--out", tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
