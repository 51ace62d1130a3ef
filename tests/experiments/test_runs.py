"""Check that a run's folder belongs to one config, and that a refusal changes nothing in it."""

import dataclasses
import json
from pathlib import Path

import pytest

import qt_jax as qt
from experiments import runs
from experiments.configs.training import FREE_TO_CHANGE, Config

FIELDS = [field.name for field in dataclasses.fields(Config)]


def claim(config: Config) -> None:
    runs.claim(config.directory, config, FREE_TO_CHANGE)


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(out=tmp_path / "parent" / "run", data_dir=tmp_path)


def begin(config: Config) -> None:
    """Claim the folder and leave something of a run in it."""
    claim(config)
    (config.directory / "metrics.jsonl").write_text("{}\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_claim_writes_the_config_once(config):
    claim(config)
    written = json.loads((config.directory / "config.json").read_text())
    assert written.keys() == set(FIELDS)
    assert (written["out"], written["epochs"]) == (str(config.out), config.epochs)
    before = (config.directory / "config.json").stat().st_mtime_ns
    claim(config)
    assert (config.directory / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in config.directory.iterdir()] == ["config.json"]


def test_folder_of_another_config_names_what_differs(config):
    begin(config)
    before = contents(config.directory)
    with pytest.raises(qt.InvalidInput) as error:
        claim(dataclasses.replace(config, epochs=11, sched="linear", compare=False))
    message = str(error.value)
    assert str(config.directory) in message and "another --out" in message
    assert "(sched 'quartic' -> 'linear', epochs 10 -> 11)" in message
    assert contents(config.directory) == before


def test_relaunch_may_change_what_does_not_touch_the_numbers(config):
    begin(config)
    before = contents(config.directory)
    claim(dataclasses.replace(config, compare=False, data_dir=None, preset="cpu", steps_per_dispatch=10))
    assert contents(config.directory) == before


def test_config_of_another_version_is_another_config(config):
    begin(config)
    path = config.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout": None}))
    with pytest.raises(qt.InvalidInput, match="dropout None -> 'absent'"):
        claim(config)


def test_folder_in_which_nothing_was_begun_may_be_claimed_anew(config):
    claim(config)
    corrected = dataclasses.replace(config, batch_size=64)
    claim(corrected)
    assert json.loads((config.directory / "config.json").read_text())["batch_size"] == 64


@pytest.mark.parametrize("name", ["config.json.partial", "config.json.0123456789ab.partial"])
@pytest.mark.parametrize("text", ["", '{"sched": "qua'])
def test_kill_during_the_claim_does_no_harm(config, text, name):
    config.directory.mkdir(parents=True)
    (config.directory / name).write_text(text)
    claim(config)
    assert [path.name for path in config.directory.iterdir()] == ["config.json"]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("content", [b"", b'{"sched": "qua', b"[1]", b"null", b"\xff\xfe"])
def test_damaged_config_is_refused_and_left(config, content, begun):
    begin(config)
    if not begun:
        (config.directory / "metrics.jsonl").unlink()
    (config.directory / "config.json").write_bytes(content)
    before = contents(config.directory)
    with pytest.raises(qt.InvalidInput, match=r"config\.json cannot be read .* another --out"):
        claim(config)
    assert contents(config.directory) == before


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "config.json"])
def test_folder_of_something_else_is_refused_and_left(config, name):
    config.directory.mkdir(parents=True)
    (config.directory / name).write_text('{"architectures": ["other"]}')
    before = contents(config.directory)
    with pytest.raises(qt.InvalidInput, match="another --out"):
        claim(config)
    assert contents(config.directory) == before


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b"])
def test_names_that_orbax_cannot_read_back_are_refused(tmp_path, name):
    with pytest.raises(qt.InvalidInput, match=r"orbax takes for a pattern.* another --out"):
        claim(Config(out=tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_out_that_is_no_folder_is_refused_and_left(config):
    config.directory.parent.mkdir()
    config.directory.write_text("a file")
    with pytest.raises(qt.InvalidInput, match=r"run cannot be the folder of a run .* another --out"):
        claim(config)
    with pytest.raises(qt.InvalidInput, match="Not a directory"):
        claim(dataclasses.replace(config, out=config.directory / "below"))
    assert config.directory.read_text() == "a file"
