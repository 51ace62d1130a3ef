"""Check the methods of the study: their order, what they change, and their rows on the page of methods."""

import functools

import pytest

import qt_jax as qt
from experiments.configs.methods import METHODS, Method, config_of
from experiments.configs.study import FIVE_EPOCHS
from experiments.configs.training import Config
from experiments.paper.evidence import read
from experiments.paper.rows import RESULTS
from experiments.paper.tables import methods_table

ORDER = (
    *("float", "qat", "qat-delayed", "qat-w4", "qat-w4-folded", "lsq-w4", "pact-w4", "qwix-w4"),
    *("start", "start-ranges", "start-learned", "float-learned"),
    *("averaged", "kure", "range-restriction", "sam"),
    *("quant-trim", "recommended"),
    *("neutral", "neutral-unscaled", "neutral-unaveraged", "neutral-unpruned"),
    *("neutral-vendors", "neutral-w8"),
    *("no-reverse-pruning", "reverse-pruning-only"),
    *("linear", "cosine", "quartic-only", "step"),
    *("p-clip-90", "p-clip-99", "p-clip-999"),
    *("weight-quantile-99", "weight-quantile-100"),
    *("output-sites", "per-channel"),
    *("lsq", "pact", "qwix", "w4a8", "w4a4"),
    *("folded", "folded-spread", "recommended-raw", "recommended-plateau"),
    *("recommended-unpruned", "recommended-running", "recommended-clipped"),
    *("recommended-w4", "recommended-one-grid"),
    "recommended-fused",
    *("fine-tuned", "clips", "batch-norm", "recommended-clips"),
)
"""Order of rows in the committed tables."""


@functools.cache
def page() -> str:
    """Return the committed page of methods of the study on CPUs."""
    return (RESULTS / "paper-cpu" / "methods.md").read_text()


@functools.cache
def rows() -> dict[str, str]:
    """Return name -> row of the table that the records of the study on CPUs give."""
    lines = methods_table(read(RESULTS / "paper-cpu")).splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def test_every_method_has_its_place_and_its_row():
    assert list(METHODS) == list(ORDER)
    assert list(rows()) == list(FIVE_EPOCHS)
    assert page().count("\n| `") == len(FIVE_EPOCHS)


@pytest.mark.parametrize("name", FIVE_EPOCHS)
def test_the_page_says_command_and_expectation_as_its_records_give_them(name):
    assert "python -m experiments.paper --methods NAME" in page()
    assert rows()[name] in page().splitlines()
    method, about, *expected = [cell.strip() for cell in rows()[name].strip("|").split(" | ")]
    assert method == f"`{name}`" and about == METHODS[name].about and about.endswith(".")
    assert len(expected) == 7 and expected[0] == "cifar10-fast8" and float(expected[1]) >= 1


def test_methods_change_what_they_say():
    base = Config(epochs=5)
    configs = {name: config_of(method, base, 7) for name, method in METHODS.items()}
    assert {config.seed for config in configs.values()} == {7}
    assert (configs["float"].sched, configs["float"].reverse_pruning) == ("none", None)
    assert (configs["qat"].sched, configs["qat"].reverse_pruning) == ("constant", None)
    assert configs["quant-trim"] == config_of(Method("none"), base, 7)
    assert (configs["fine-tuned"].epochs, configs["fine-tuned"].learning_rate) == (2, pytest.approx(0.02))
    assert configs["w4a4"].bits == configs["w4a4"].activation_bits == 4
    assert config_of(METHODS["float"], base, 7, factor=0.5).learning_rate == pytest.approx(0.1)


def test_unknown_field_is_refused():
    with pytest.raises(qt.InvalidInput, match="changes bitts, which Config has not"):
        config_of(Method("typo", changes={"bitts": 4}), Config(), 0)
