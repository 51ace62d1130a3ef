"""Check the table of what a config reaches, and of what it does not and why."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

import qt_jax as qt


class Mixed(nn.Module):
    """Put layers that are reached beside some that are not."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="embed")(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(4, name="lstm"))(x)
        x = nn.Dense(4, name="hidden")(x)
        if tokens.shape[0] > 100:
            x = nn.Dense(4, name="rare")(x)
        return nn.Dense(2, name="head")(x)


def test_coverage_says_what_is_reached_and_why_the_rest_is_not():
    tokens = jnp.zeros((2, 3), jnp.int32)
    variables = Mixed().init(jax.random.key(0), tokens)
    variables["params"]["rare"] = {"kernel": jnp.ones((4, 4))}
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    config = qt.QuantConfig(weights=qt.QuantSpec(4, axis=-1), rules=(qt.Rule("head", skip=True),))
    with console.file:
        rows = {
            row.path: row for row in qt.coverage(Mixed(), variables, tokens, config=config, console=console)
        }
        text = console.export_text()
    assert rows["hidden"].weights == "int4 symmetric per-channel"
    assert rows["hidden"].inputs == "uint8 asymmetric per-tensor" and rows["hidden"].reason == ""
    assert rows["head"].weights == "-" and "rule 'head'" in rows["head"].reason
    assert "look-up" in rows["embed"].reason
    assert "never called" in rows["rare"].reason
    unreached = [row for path, row in rows.items() if "lstm" in path]
    assert unreached and all(
        "multiplies in its own code" in row.reason or row.weights != "-" for row in unreached
    )
    assert "Quant-Trim coverage" in text and "quantized" in text
