"""Check the rules: the first match wins, and a rule that does nothing is an error."""

import pytest

import qt_jax as qt
from qt_jax.config import check_rules_used

PATHS = ["stem", "stage1/conv1", "stage1/conv2", "stage2/conv1", "head"]


def test_first_match_wins_and_the_rest_is_inherited():
    four, eight = qt.QuantSpec(4), qt.QuantSpec(8, axis=-1)
    config = qt.QuantConfig(
        rules=(
            qt.Rule("stage1/conv1", weights=eight),
            qt.Rule("stage1/.*", weights=four, inputs=None),
            qt.Rule("head", skip=True),
        )
    )
    assert config.sites("stage1/conv1").weights == eight
    assert config.sites("stage1/conv1").inputs == config.activations
    assert (config.sites("stage1/conv2").weights, config.sites("stage1/conv2").inputs) == (four, None)
    assert config.sites("head").weights is None and config.sites("head").rule == 2
    assert config.sites("stem") == qt.QuantConfig().sites("anything")
    check_rules_used(config, PATHS)
    hash(config)


def test_a_pattern_must_match_the_whole_path():
    assert not qt.Rule("conv1").matches("stage1/conv1")
    assert qt.Rule(".*conv1").matches("stage1/conv1")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((qt.Rule("stage1/convl"),), r"'stage1/convl' matches no layer; near misses: .*'stage1/conv1'"),
        ((qt.Rule("conv1"),), r"near misses: 'stage1/conv1', 'stage2/conv1'"),
        ((qt.Rule("zzzzzzzz"),), r"near misses: 'head'"),
        ((qt.Rule("stage1/.*"), qt.Rule("stage1/conv1")), r"never used: an earlier rule, 'stage1/\.\*'"),
    ],
)
def test_an_unused_rule_is_an_error_that_names_near_misses(rules, message):
    with pytest.raises(qt.InvalidInput, match=message):
        check_rules_used(qt.QuantConfig(rules=rules), PATHS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qt.Rule("stage(1"), "not a regular expression"),
        (lambda: qt.Rule("stem", weights=4), "weights must be a QuantSpec"),
        (lambda: qt.QuantConfig(weights=8), "weights must be a QuantSpec"),
        (lambda: qt.QuantConfig(rules=("head",)), "tuple of Rule"),
        (lambda: qt.QuantConfig(momentum=1.0), "momentum"),
        (lambda: qt.QuantConfig(sample_size=0), "sample_size"),
        (lambda: qt.QuantConfig(rules=[qt.Rule("stem")]), "tuple"),
    ],
)
def test_bad_configs_are_refused(make, message):
    with pytest.raises(qt.InvalidInput, match=message):
        make()
