"""Check the command that exports other people's models, on models defined here."""

import flax.linen as nn
import jax
import pytest
from rich.console import Console

import qt_jax as qt
from experiments import third_party
from experiments.third_party import Case, Options, measure


class Keyword(nn.Module):
    """Take the input by keyword only."""

    @nn.compact
    def __call__(self, *, tokens, train):
        return nn.Dense(3)(nn.Embed(50, 4)(tokens))


class Untraceable(nn.Module):
    """Need the numbers while the module is traced."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x) * float(x.mean())


def test_a_model_is_exported_and_compared():
    row = measure(Case("keyword", Keyword, (5,), {"train": False}, jax.numpy.int32, "tokens"), 17)
    assert row["status"] == "ok"
    assert set(row["max_difference"]) == set(third_party.BATCHES)
    assert row["operators"]["Gather"] == 1


def test_a_model_that_cannot_be_traced_is_a_row_with_the_reason():
    row = measure(Case("untraceable", Untraceable, (3,)), 17)
    assert row["status"] == "refused"
    assert "compute that with numpy" in row["reason"]


def test_a_model_that_cannot_be_built_is_a_row_with_the_reason():
    row = measure(Case("absent", lambda: nn.Dense(features="many"), (3,)), 17)
    assert row["status"] == "not built"
    assert "TypeError" in row["reason"]


def test_missing_sources_say_how_to_get_them(tmp_path):
    with pytest.raises(qt.InvalidInput, match="--help"):
        third_party.run(Options(tmp_path / "absent"), Console(quiet=True))


def test_every_case_is_named_once(tmp_path):
    names = [case.name for case in third_party.cases(tmp_path)]
    assert len(names) == len(set(names)) >= 4
