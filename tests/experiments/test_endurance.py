"""Check that what a kill leaves behind is enough: the relaunched command ends as the undisturbed one."""

import json
import shutil

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from experiments import endurance
from qt_jax import records


@pytest.mark.slow
def test_kill_9_at_random_points(tmp_path):
    """Run `python -m pytest -m slow tests/experiments/test_endurance.py`, about two minutes on two cores.

    The moments are drawn anew on every call and printed with their seed; `python -m experiments.endurance`
    kills fifty times.
    """
    out = tmp_path / "out"
    assert endurance.main(["--kills", "5", "--epochs", "12", "--out", str(out)]) == 0
    log = records.read(out / "log.jsonl")
    assert [row["kill"] for row in log] == [1, 2, 3, 4, 5]


@pytest.fixture
def ends(tmp_path):
    """Write the folders of two runs that have ended alike."""
    folder = tmp_path / "whole"
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "checkpoints" / endurance.METHOD / "8", {"a": jnp.arange(4.0), "b": jnp.ones(2)})
    (folder / "model.onnx").write_bytes(b"graph")
    for file, keys in endurance.ROWS.items():
        (folder / file).write_text(json.dumps(dict.fromkeys(keys, 1)) + "\n")
    shutil.copytree(folder, tmp_path / "killed")
    return folder, tmp_path / "killed"


def test_ends_alike_do_not_differ(ends):
    assert list(endurance.differences(*ends)) == []


def test_every_difference_is_named(ends):
    whole, killed = ends
    shutil.rmtree(killed / "checkpoints")
    with ocp.StandardCheckpointer() as writer:
        other = {"a": jnp.arange(4.0), "b": jnp.full(2, 1 + 2.0**-23)}
        writer.save(killed / "checkpoints" / endurance.METHOD / "8", other)
    (killed / "model.onnx").write_bytes(b"another")
    (killed / "records.jsonl").write_text("")
    assert list(endurance.differences(whole, killed)) == ["checkpoint b", "model.onnx", "records.jsonl"]


def test_a_folder_that_is_there_is_refused(tmp_path, capsys):
    assert endurance.main(["--out", str(tmp_path)]) == 2
    assert "is there: name another --out" in capsys.readouterr().err
