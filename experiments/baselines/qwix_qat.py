"""Qwix's quantized training (`QtProvider`) around a Linen model, with the parameters of the plain one.

It is left at its defaults: symmetric absmax, taken anew in every step (no statistics are kept), the forward
on integers, the backward in float with the straight-through estimator. It keeps no range, so that a network
trained with it is exported without any and every backend calibrates.
"""

import flax.linen as nn

import qt_jax as qt
from qt_jax.rules import INHERIT


def qwix_model(model: nn.Module, config: qt.QuantConfig | None = None) -> nn.Module:
    """`model` under Qwix's quantized training, for init and apply with the plain model's variables.

    Args:
      model: any Linen module.
      config: gives the bits of kernels (2 to 8; inputs have 8), and the rules. Kernels with an `axis` have
        Qwix's default, a scale per output channel and one per example of their input; without one, one scale
        each for the whole tensors. None: W8A8 with Qwix's default.

    Raises:
      ImportError: Qwix is not installed, or not for this jax.
      InvalidInput: bits that Qwix, or XLA below it, has no integers for; one of a layer's two sites alone.
    """
    import qwix

    from experiments.baselines.qwix_provider import AllWidths

    config = config or qt.QuantConfig(weights=qt.QuantSpec(8, axis=-1))

    def rule(path: str, weights: qt.QuantSpec | None, inputs: qt.QuantSpec | None) -> qwix.QtRule:
        if weights is None and inputs is None:
            return qwix.QtRule(module_path=path)
        if weights is None or inputs is None or weights.bits > 8 or inputs.bits != 8:
            raise qt.InvalidInput(
                f"Qwix puts the kernel of {path!r} on 2 to 8 bits and its input on 8, or leaves both"
            )
        return qwix.QtRule(
            module_path=path,
            weight_qtype=f"int{weights.bits}",
            act_qtype="int8",
            disable_channelwise_axes=weights.axis is None,
        )

    rules = []
    for given in config.rules:
        weights = config.weights if given.weights == INHERIT else given.weights
        inputs = config.activations if given.inputs == INHERIT else given.inputs
        rules.append(rule(given.path, *((None, None) if given.skip else (weights, inputs))))
    rules.append(rule(".*", config.weights, config.activations))
    return qwix.quantize_model(model, AllWidths(rules))
