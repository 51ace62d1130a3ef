"""Check graphs whose weights stand in a second file: written whole, verified, and read by path."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import save, save_verified, storage, to_onnx, verify
from qt_jax.export.sessions import open_session
from qt_jax.files import ABANDONED

IMAGES = np.random.default_rng(0).normal(size=(7, 6, 6, 3)).astype(np.float32)
PARAMETERS = 600_000_000


class Net(nn.Module):
    features: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.features, (3, 3), padding=1, name="conv")(x))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


VARIABLES = Net().init(jax.random.key(1), IMAGES)


@pytest.fixture(scope="module")
def model():
    return to_onnx(Net().apply, VARIABLES, IMAGES.shape[1:])


@pytest.fixture
def small_limit(monkeypatch):
    """Let a graph of 7 kB count as too large for one file."""
    monkeypatch.setattr(storage, "LARGEST", 5000)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.usefixtures("small_limit")
def test_a_large_graph_is_two_files_that_onnx_and_onnxruntime_read(model, tmp_path):
    path = tmp_path / "run" / "model.onnx"
    summary = save_verified(model, path, Net().apply, VARIABLES, IMAGES)
    assert names(path.parent) == ["model.onnx", "model.onnx.data"]
    assert summary["bytes"] == sum(entry.stat().st_size for entry in path.parent.iterdir())
    assert summary["parameters"] == 27 * 64 + 64 + 64 * 3 + 3
    light = onnx.load(path, load_external_data=False)
    held = {
        tensor.name: tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in light.graph.initializer
    }
    assert held == {"conv/kernel": True, "conv/bias": False, "head/kernel": False, "head/bias": False}
    loaded = onnx.load(path)
    for read, written in zip(loaded.graph.initializer, model.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(read), onnx.numpy_helper.to_array(written))
    del loaded.graph.initializer[:]
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.initializer[:]
    assert loaded == rest
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": IMAGES.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found, Net().apply(VARIABLES, IMAGES), atol=1e-5)


@pytest.mark.usefixtures("small_limit")
def test_a_large_graph_is_verified_and_run_without_a_name(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    summary = verify(model, Net().apply, VARIABLES, IMAGES)
    assert max(summary["max_difference"].values()) < 1e-5 and summary["bytes"] > 7000
    assert open_session(model, optimize=False).get_inputs()[0].name == "input"
    with pytest.raises(InvalidInput, match="parity"):
        verify(model, Net().apply, jax.tree.map(lambda leaf: leaf + 0.01, VARIABLES), IMAGES)
    assert not names(tmp_path)


def test_the_second_file_comes_and_goes_with_the_graph(model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    wide = to_onnx(Net(96).apply, Net(96).init(jax.random.key(0), IMAGES), IMAGES.shape[1:])
    monkeypatch.setattr(storage, "LARGEST", 5000)
    for graph in (model, wide):
        save(graph, path)
        assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
        assert storage.model_sha256(onnx.load(path)) == storage.model_sha256(graph)
    monkeypatch.setattr(storage, "LARGEST", 2_000_000_000)
    save(model, path)
    assert names(tmp_path) == ["model.onnx"] and onnx.load(path) == model


@pytest.mark.usefixtures("small_limit")
def test_a_graph_that_fails_leaves_both_old_files(model, tmp_path):
    path = tmp_path / "model.onnx"
    save(model, path)
    held = [(tmp_path / name).read_bytes() for name in names(tmp_path)]
    changed = jax.tree.map(lambda leaf: leaf + 0.01, VARIABLES)
    with pytest.raises(InvalidInput, match="parity"):
        save_verified(model, path, Net().apply, changed, IMAGES)
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == held


@pytest.mark.usefixtures("small_limit")
def test_no_graph_stands_beside_the_weights_of_another(model, tmp_path, monkeypatch):
    """A kill between the two moves leaves the new weights without a graph."""
    path = tmp_path / "model.onnx"
    save(model, path)
    replace = storage.os.replace

    def killed(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(model, path)
    assert names(tmp_path) == ["model.onnx.data"]


def test_a_folder_that_a_kill_has_left_is_removed(model, tmp_path):
    path = tmp_path / "model.onnx"
    left = tmp_path / "model.onnx.0123456789ab.partial"
    left.mkdir()
    (left / "model.onnx.data").write_bytes(b"half")
    save(model, path)
    assert left.exists()
    old = left.stat().st_mtime - 2 * ABANDONED
    for entry in (*left.iterdir(), left):
        storage.os.utime(entry, (old, old))
    save(model, path)
    assert names(tmp_path) == ["model.onnx"]


def test_the_hash_tells_weights_and_names_apart(model, monkeypatch):
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    for limit in (5000, 10**6):
        monkeypatch.setattr(storage, "LARGEST", limit)
        assert storage.model_sha256(model) != storage.model_sha256(other)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(PARAMETERS // 128, 128, name="embed")(x)
        return nn.Dense(10, name="head")(x.mean(1))


@pytest.mark.slow
def test_a_graph_of_2_4_gigabytes(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((PARAMETERS // 128, 128), np.float32)
    head = {"kernel": rng.standard_normal((128, 10), np.float32), "bias": np.zeros(10, np.float32)}
    variables = {"params": {"embed": {"embedding": table}, "head": head}}
    tokens = rng.integers(0, len(table), (7, 16)).astype(np.int32)
    model = to_onnx(Tokens().apply, variables, jax.ShapeDtypeStruct((16,), np.int32))
    summary = save_verified(model, tmp_path / "model.onnx", Tokens().apply, variables, tokens)
    assert summary["bytes"] > 4 * PARAMETERS
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
