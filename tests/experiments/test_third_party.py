"""Check the command that exports other people's models, on models defined here."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import qt_jax as qt
from experiments import third_party
from experiments.third_party import Options, measure
from experiments.third_party_sources import ABSENT, Argument, Case, image, tokens, without


class Keyword(nn.Module):
    """Take the input by keyword only."""

    @nn.compact
    def __call__(self, *, tokens, train):
        return nn.Dense(3)(nn.Embed(50, 4)(tokens))


class Pair(nn.Module):
    """Take an image and a number, and return two outputs."""

    @nn.compact
    def __call__(self, x, *, time):
        x = nn.Conv(4, (3, 3))(x)
        return x, nn.Dense(2)(x.mean((1, 2)) + time[:, None])


class Untraceable(nn.Module):
    """Need the numbers while the module is traced."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x) * float(x.mean())


def one(case, opset=17):
    (row,) = measure(case, (opset,))
    return row


def test_a_model_is_exported_and_compared_at_every_opset():
    case = Case("keyword", Keyword, (tokens(5, "tokens"),), {"train": False})
    rows = list(measure(case, (13, 21)))
    assert [row["opset"] for row in rows] == [13, 21]
    for row in rows:
        assert row["status"] == "ok"
        assert set(row["max_difference"]) == set(third_party.BATCHES)
        assert row["operators"]["Gather"] == 1
        assert row["largest_output"] > 0


def test_several_inputs_and_a_choice_of_outputs():
    inputs = (image(6), Argument((), jnp.float32, "time"))
    assert one(Case("pair", Pair, inputs, pick=lambda outputs: outputs[1]))["status"] == "ok"
    assert one(Case("pair", Pair, inputs))["status"] == "ok"


def test_a_model_that_cannot_be_traced_is_a_row_with_the_reason():
    row = one(Case("untraceable", Untraceable, (Argument((3,)),)))
    assert row["status"] == "refused"
    assert "test_third_party.py" in row["reason"] and "float(x.mean())" in row["reason"]
    assert "/" not in row["reason"].split("test_third_party.py")[0]


def test_a_model_that_cannot_be_built_is_a_row_with_the_reason():
    row = one(Case("absent", lambda: nn.Dense(features="many"), (Argument((3,)),)))
    assert row["status"] == "not built"
    assert "TypeError" in row["reason"]


@pytest.mark.parametrize(
    ("replaced", "error", "status"),
    [("to_onnx", KeyError("batch"), "crashed"), ("verify", qt.InvalidInput("it differs"), "wrong")],
)
def test_a_defect_of_the_export_is_a_row(monkeypatch, replaced, error, status):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(third_party, replaced, broken)
    row = one(Case("dense", lambda: nn.Dense(2), (Argument((3,)),)))
    assert row["status"] == status
    assert str(error) in row["reason"]


def test_arguments_are_drawn_in_their_range():
    drawn = tokens(200, below=7).draw(np.random.default_rng(0), 3)
    assert drawn.shape == (3, 200) and drawn.dtype == jnp.int32
    assert set(np.unique(drawn)) == set(range(7))
    assert image(4).draw(np.random.default_rng(0), 2).shape == (2, 4, 4, 3)


def test_packages_that_are_missing_are_replaced_for_the_import_alone():
    with without(("a_package_that_is_missing",)):
        import a_package_that_is_missing

        assert a_package_that_is_missing.anything
    with pytest.raises(ModuleNotFoundError):
        import a_package_that_is_missing
    assert "jax" not in ABSENT


def test_missing_sources_say_how_to_get_them(tmp_path):
    with pytest.raises(qt.InvalidInput, match="--help"):
        third_party.run(Options(tmp_path / "absent"), Console(quiet=True))


def test_every_case_is_named_once_and_has_its_sources(tmp_path):
    names = [case.name for case in third_party.cases(tmp_path)]
    assert len(names) == len(set(names)) >= 40
    folders = {name.split()[0] for name in names}
    assert len(folders) >= 10
    assert folders - third_party.COMMITS.keys() == {"transformers", "diffusers"}


def test_constant_leaves_are_moved():
    leaves = {
        "bias": jnp.zeros(3),
        "kernel": jax.random.normal(jax.random.key(0), (3,)),
        "step": jnp.zeros((), int),
    }
    moved = third_party._without_constants(leaves, np.random.default_rng(0))
    assert np.ptp(moved["bias"]) > 0
    np.testing.assert_array_equal(moved["kernel"], leaves["kernel"])
    np.testing.assert_array_equal(moved["step"], leaves["step"])
