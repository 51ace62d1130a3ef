"""Test the neutral form of a graph: what is returned, what is refused, and the command."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import qt_jax as qt
from qt_jax.equalization import command
from qt_jax.equalization.learned import objective
from qt_jax.errors import InvalidInput

ROOT = Path(__file__).parents[2]
RESNET8 = ROOT / "experiments" / "results" / "cifar10-resnet8"


def mlp(activation="Relu", widths=(6, 16, 16, 5), seed=0, tail=()):
    """Return a graph of dense layers whose channels differ in size, and samples for it."""
    rng = np.random.default_rng(seed)
    nodes, kernels, name = [], [], "x"
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        spread = np.exp(rng.normal(0, 1.5, fan_out))
        kernels.append((rng.normal(size=(fan_in, fan_out)) * spread).astype(np.float32))
        last = i == len(widths) - 2
        nodes.append(
            helper.make_node("MatMul", [name, f"w{i}"], ["y" if last else f"h{i}"], name=f"dense{i}")
        )
        if not last:
            nodes.append(helper.make_node(activation, [f"h{i}"], [f"r{i}"], name=f"act{i}"))
            name = f"r{i}"
    x, y = (helper.make_tensor_value_info(n, 1, ["n", w]) for n, w in (("x", widths[0]), ("y", widths[-1])))
    tensors = [numpy_helper.from_array(kernel, f"w{i}") for i, kernel in enumerate(kernels)]
    graph = helper.make_graph([*nodes, *tail], "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model, rng.normal(size=(96, widths[0])).astype(np.float32)


def run(model, samples):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: samples})


def rounded(model, samples, kernels):
    """Return the SQNR of the output in dB, in float64, after each kernel is rounded to 4 bits per tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in kernels:
            w = numpy_helper.to_array(tensor).astype(np.float64)
            scale = np.abs(w).max() / 7
            tensor.CopyFrom(
                numpy_helper.from_array((np.round(w / scale) * scale).astype(np.float32), tensor.name)
            )
    exact, found = (np.float64(run(each, samples)[0]) for each in (model, copy))
    return 10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum())


def test_ranges_keep_the_function_and_help_four_bits():
    model, samples = mlp()
    found = qt.equalize(model, samples, method="ranges")
    [before], [after] = run(model, samples), run(found.model, samples)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert found.difference <= 1e-5 and not found.powers_of_two and found.errors == {}
    assert found.freedom.count == 32 and found.factors.shape == (33,) and found.factors[0] == 1
    kernels = {"w0", "w1", "w2"}
    assert rounded(found.model, samples, kernels) > rounded(model, samples, kernels) + 3
    assert [node.name for node in found.model.graph.node] == [node.name for node in model.graph.node]
    assert found.model.graph.input == model.graph.input and found.model.graph.output == model.graph.output
    assert {t.name for t in found.model.graph.initializer} == kernels


def test_the_committed_network_has_one_factor_for_each_channel_of_six_groups():
    samples = np.load(RESNET8 / "samples.npz")["calibration"].transpose(0, 3, 1, 2)
    found = qt.equalize(RESNET8 / "twin.onnx", {"images": samples}, method="ranges")
    assert found.freedom.count == 2 * (16 + 32 + 64)  # a residual stream and the inside of a block, each
    assert found.difference <= 1e-5
    assert dict(found.freedom.pinned) == {"logits": "the graph puts it out"}


@pytest.mark.parametrize("activation", ["Sigmoid", "Tanh", "Softplus"])
def test_a_graph_without_free_channels_is_refused(activation):
    model, samples = mlp(activation)
    with pytest.raises(InvalidInput, match=rf"'h0' keeps its values, because {activation} 'act0' reads it"):
        qt.equalize(model, samples, method="ranges")


def test_a_single_layer_is_refused():
    model, samples = mlp(widths=(3, 4))
    with pytest.raises(InvalidInput, match="No channel of this graph can be rescaled"):
        qt.equalize(model, samples, method="ranges")


def test_outputs_that_feel_rounding_get_powers_of_two():
    """Two channels cancel, so that the output is the rounding of float32, a millionfold."""
    rng = np.random.default_rng(0)
    column = rng.normal(size=(6, 1))
    first = np.concatenate([column, column * (1 + 1e-6), rng.normal(size=(6, 1))], axis=1)
    second = np.float32([[1e6], [-1e6], [1e-3]])
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("LeakyRelu", ["h"], ["r"], name="act", alpha=0.1),
        helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
    ]
    x, y = (helper.make_tensor_value_info(n, 1, ["n", w]) for n, w in (("x", 6), ("y", 1)))
    tensors = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in (("a", first), ("b", second))]
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets, ir_version=9
    )
    samples = rng.normal(size=(64, 6)).astype(np.float32)
    found = qt.equalize(model, samples, method="ranges")
    assert found.powers_of_two and found.difference == 0
    np.testing.assert_array_equal(np.log2(found.factors) % 1, 0)
    np.testing.assert_array_equal(run(found.model, samples)[0], run(model, samples)[0])


def test_an_output_of_integers_is_compared_by_its_choices():
    model, samples = mlp(tail=[helper.make_node("ArgMax", ["y"], ["c"], name="choice", axis=1)])
    model.graph.output.append(helper.make_tensor_value_info("c", 7, ["n", 1]))
    found = qt.equalize(model, samples, method="ranges")
    np.testing.assert_array_equal(run(found.model, samples)[1], run(model, samples)[1])


def test_learned_factors_help_and_keep_the_function():
    model, samples = mlp()
    lines: list[str] = []
    found = qt.equalize(model, samples, steps=60, progress=lines.append)
    assert len(lines) == 60 and found.difference <= 1e-5
    before, after = (objective({name: pair[i] for name, pair in found.errors.items()}) for i in range(2))
    assert after < before - 1  # dB
    kernels = {"w0", "w1", "w2"}
    assert rounded(found.model, samples, kernels) > rounded(model, samples, kernels) + 3


def test_grids_that_are_named_alone_count():
    """What serves 4-bit grids makes an 8-bit one worse here, unless it is named: nothing named gets worse."""
    model, samples = mlp()
    name = "int8-po2-near-pc"
    every, served = (qt.equalize(model, samples, steps=20, grids=grids) for grids in (None, (name,)))
    assert every.errors.keys() == served.errors.keys() and len(every.errors) == 16
    (before, worse), (_, after) = every.errors[name], served.errors[name]
    assert after <= before < worse


def test_wrong_settings_are_refused():
    model, samples = mlp()
    with pytest.raises(InvalidInput, match=r"no grid 'int4'.*int4w-full-pt"):
        qt.equalize(model, samples, grids=("int4",))
    with pytest.raises(InvalidInput, match="no grid is named"):
        qt.equalize(model, samples, grids=())
    with pytest.raises(InvalidInput, match="named twice"):
        qt.equalize(model, samples, grids=("int8-pt", "int8-pt"))
    with pytest.raises(InvalidInput, match="looks at no grid"):
        qt.equalize(model, samples, method="ranges", grids=("int8-pt",))
    with pytest.raises(InvalidInput, match='choose "learned" or "ranges"'):
        qt.equalize(model, samples, method="best")
    with pytest.raises(InvalidInput, match="at least 1"):
        qt.equalize(model, samples, steps=0)
    with pytest.raises(InvalidInput, match="calibration is float32"):
        qt.equalize(model, samples[:, :4], method="ranges")
    with pytest.raises(InvalidInput, match="already quantized"):
        qt.equalize(quantized(model), samples, method="ranges")


def quantized(model):
    """Return the graph with a pair of QuantizeLinear and DequantizeLinear behind its input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    copy.graph.node[0].input[0] = "dequantized"
    copy.graph.node.insert(
        0, helper.make_node("DequantizeLinear", ["q", "scale"], ["dequantized"], name="dq")
    )
    copy.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="q"))
    return copy


@pytest.fixture
def files(tmp_path):
    model, samples = mlp()
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "c.npz", images=samples, labels=np.zeros(len(samples), np.int64))
    return tmp_path


def test_the_command_writes_the_graph_and_says_what_it_did(files, capsys):
    given = [str(files / "model.onnx"), "--calibration", str(files / "c.npz"), "--method", "ranges", "--json"]
    assert command.main(given) == 0
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert row["out"] == str(files / "model.neutral.onnx") and row["factors"] == 32
    assert "32 factors rescale 3 constants" in " ".join(err.split())
    assert "y keeps its values: the graph puts it out" in " ".join(err.split())
    samples = np.load(files / "c.npz")["images"]
    before, after = (
        run(onnx.load(files / name), samples)[0] for name in ("model.onnx", "model.neutral.onnx")
    )
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_the_command_does_not_write_over_its_input(files, capsys):
    path = str(files / "model.onnx")
    assert command.main([path, "--calibration", str(files / "c.npz"), "--out", path]) == 2
    assert "so that the original stays" in capsys.readouterr().err
    assert command.main([path + ".gone", "--calibration", str(files / "c.npz")]) == 2
    assert "is not there" in capsys.readouterr().err


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "qt_jax.equalize", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "python -m qt_jax.equalize model.onnx --calibration c.npz" in done.stdout
    assert "Exit status: 0 done, 2 wrong input" in done.stdout
