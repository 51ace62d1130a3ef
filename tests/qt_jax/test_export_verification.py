"""Check that `verify` finds what was tampered with, and that files appear verified or not at all."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qt_jax.errors import InvalidInput
from qt_jax.export import save, save_verified, storage, to_onnx, verify

IMAGES = jax.random.normal(jax.random.key(0), (7, 6, 6, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding=1, name="conv")(x))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


VARIABLES = Net().init(jax.random.key(1), IMAGES)


@pytest.fixture(scope="module")
def exported():
    return to_onnx(Net().apply, VARIABLES, IMAGES.shape[1:])


@pytest.fixture
def model(exported):
    copy = onnx.ModelProto()
    copy.CopyFrom(exported)
    return copy


def check(model, **options):
    return verify(model, Net().apply, VARIABLES, IMAGES, **options)


def test_summary(model):
    summary = check(model)
    assert summary["operators"] == {"Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert (summary["parameters"], summary["macs"]) == (9 * 12 + 4 + 15, 9 * 12 * 36 + 12)
    assert summary["bytes"] == len(model.SerializeToString())
    assert set(summary["max_difference"]) == {1, 7}


@pytest.mark.parametrize("value", [0.01, np.nan])
def test_a_wrong_weight(model, value):
    bias = numpy_helper.to_array(model.graph.initializer[1]) + np.float32(value)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(bias, model.graph.initializer[1].name))
    with pytest.raises(InvalidInput, match="parity: the outputs differ"):
        check(model)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_the_tolerance_of_large_outputs_is_what_float32_keeps(scale):
    """Outputs of 1e5, of a network barely trained, differ by more than 1e-4 when nothing is wrong."""
    kernel = VARIABLES["params"]["head"]["kernel"] * scale
    large = {"params": VARIABLES["params"] | {"head": VARIABLES["params"]["head"] | {"kernel": kernel}}}
    model = to_onnx(Net().apply, large, IMAGES.shape[1:])
    magnitude = np.max(np.abs(Net().apply(large, IMAGES)))
    limit = max(1e-4, 1e-6 * magnitude)
    for factor, passes in ((0.5, True), (2.0, False)):
        bias = numpy_helper.from_array(np.full(3, factor * limit, np.float32), "head/bias")
        [held] = [tensor for tensor in model.graph.initializer if tensor.name == "head/bias"]
        held.CopyFrom(bias)
        with contextlib.nullcontext() if passes else pytest.raises(InvalidInput, match="parity"):
            verify(model, Net().apply, large, IMAGES)


def test_a_custom_domain(model):
    model.graph.node[1].domain = "com.microsoft"
    with pytest.raises(InvalidInput, match=r'domain: node "Relu" is com.microsoft.Relu'):
        check(model)


def test_a_custom_import(model):
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(InvalidInput, match="imports"):
        check(model)


def test_a_name_that_is_no_path(model):
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "onnx::Conv_12"
    with pytest.raises(InvalidInput, match=r'the weight "onnx::Conv_12" of node "conv"'):
        check(model)


@pytest.mark.parametrize("name", ["", "conv"])
def test_a_node_without_a_name_of_its_own(model, name):
    model.graph.node[1].name = name
    with pytest.raises(InvalidInput, match="names"):
        check(model)


def test_a_graph_that_the_checker_rejects(model):
    model.graph.node[1].attribute.append(helper.make_attribute("slope", 1.0))
    with pytest.raises(InvalidInput, match=r"onnx\.checker"):
        check(model)


def test_another_number_of_classes(model):
    with pytest.raises(InvalidInput, match=r"an output's shape at batch size 1 is \(1, 3\)"):
        verify(model, lambda v, x: Net().apply(v, x)[:, :2], VARIABLES, IMAGES)


ROWS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
NAMES = [None, ["b", "a"], {"a": "b", "b": "a"}, {"a": "p", "b": "q"}, {"a": "b", "b": "z"}]


def entries(_, x):
    return {"a": x + 1, "b": 2 * x}


@pytest.mark.parametrize("names", NAMES)
def test_an_entry_may_have_the_key_of_another(names, tmp_path):
    """Which entry an output is does not follow from its name."""
    model = to_onnx(entries, {}, (5,), output_names=names)
    summary = verify(model, entries, {}, ROWS)
    assert summary["max_difference"] == {1: 0.0, 7: 0.0}
    save_verified(model, tmp_path / "model.onnx", entries, {}, ROWS)
    verify(onnx.load(tmp_path / "model.onnx"), entries, {}, ROWS)


@pytest.mark.parametrize("names", NAMES)
def test_entries_that_are_exchanged_later_are_found(names):
    model = to_onnx(entries, {}, (5,), output_names=names)
    first, second = model.graph.output
    first.name, second.name = second.name, first.name
    verify(model, entries, {}, ROWS)  # another order of the outputs, each of which has its name
    for node in model.graph.node:
        node.output[0] = {first.name: second.name, second.name: first.name}.get(*[node.output[0]] * 2)
    with pytest.raises(InvalidInput, match="parity: the outputs differ"):
        verify(model, entries, {}, ROWS)


def test_inputs_by_name_are_refused():
    """The forward takes its inputs by place, which the graph's names do not tell."""
    model = to_onnx(lambda _, x, y: x - 2 * y, {}, [(5,), (5,)], input_names=["y", "x"])
    with pytest.raises(InvalidInput, match="mapping of 'x', 'y': give a sequence"):
        verify(model, lambda _, x, y: x - 2 * y, {}, {"x": ROWS, "y": ROWS})
    verify(model, lambda _, x, y: x - 2 * y, {}, (ROWS, ROWS[::-1]))


def test_too_few_images(model):
    with pytest.raises(InvalidInput, match="got 7 inputs only"):
        check(model, batch_sizes=(1, 8))


def test_a_file_gets_its_name_once_verified(model, tmp_path):
    path = tmp_path / "run" / "model.onnx"
    summary = save_verified(model, path, Net().apply, VARIABLES, IMAGES)
    assert onnx.load(path) == model
    assert summary["bytes"] == path.stat().st_size
    with pytest.raises(InvalidInput, match="parity"):
        save_verified(model, path, Net().apply, jax.tree.map(lambda x: x + 0.01, VARIABLES), IMAGES)
    assert onnx.load(path) == model
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


def test_a_failure_while_writing_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    save(model, path)
    held = path.read_bytes()

    def full_disk(_, target):
        target.write_bytes(held[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "_write", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(model, path)
    assert path.read_bytes() == held
    assert list(tmp_path.iterdir()) == [path]
