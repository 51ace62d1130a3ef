"""The deployments that QDQ export offers, as changes to the config of training."""

import dataclasses
from typing import TypeVar

from qt_jax.errors import InvalidInput
from qt_jax.fake_quant import QuantSpec
from qt_jax.rules import QuantConfig, Rule, Site

MODES = {"int8": (8, 8), "int4": (4, 8), "int16-act": (8, 16)}
"""Mode -> bits of weights and of activations."""


Chosen = TypeVar("Chosen", Site, Site | str)


def deployed_config(config: QuantConfig, mode: str) -> QuantConfig:
    """`config` with every spec on the bits of `mode`; what is in floating point stays so.

    The learned ranges do not depend on bits: only the grids laid over them change. `quant_trim` with this
    config is the JAX forward that the graph of the mode stands for.

    Raises:
      InvalidInput: an unknown mode.

    >>> deployed_config(QuantConfig(rules=(Rule("head", skip=True),)), "int4").weights.bits
    4
    """
    if mode not in MODES:
        raise InvalidInput(f"QDQ mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    weight_bits, activation_bits = MODES[mode]

    def on(bits: int, site: Chosen) -> Chosen:
        return dataclasses.replace(site, bits=bits) if isinstance(site, QuantSpec) else site

    def rule(rule: Rule) -> Rule:
        return dataclasses.replace(
            rule,
            weights=on(weight_bits, rule.weights),
            inputs=on(activation_bits, rule.inputs),
            outputs=on(activation_bits, rule.outputs),
        )

    return dataclasses.replace(
        config,
        weights=on(weight_bits, config.weights),
        activations=on(activation_bits, config.activations),
        outputs=on(activation_bits, config.outputs),
        rules=tuple(map(rule, config.rules)),
    )
