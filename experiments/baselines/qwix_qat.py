"""Train a Linen model under Qwix's quantized training (`QtProvider`), with the parameters of the plain model.

Qwix is left at its defaults: symmetric absmax, taken in every step without statistics, the forward on
integers, and the backward in float with the straight-through estimator. It keeps no range, so a network that
was trained with it is exported without ranges, and every backend calibrates.

Qwix is an optional dependency. It is imported only where it is used.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

import qt_jax as qt
from qt_jax.config import INHERIT


def qwix_model(model: nn.Module, config: qt.QuantConfig | None = None) -> nn.Module:
    """Return `model` under Qwix's quantized training, for init and apply with the plain model's variables.

    Args:
      model: Any Linen module.
      config: Gives the bits of kernels (2 to 8; inputs have 8) and the rules. Kernels with an `axis` get
        Qwix's default, one scale per output channel and one per example of their input. Without an `axis`,
        each whole tensor has one scale. None stands for W8A8 with Qwix's default.

    Raises:
      ImportError: Qwix is not installed, or not for this jax.
      InvalidInput: Qwix, or XLA below it, has no integers for these bits, or only one of a layer's two sites
        is to be quantized.
    """
    import qwix

    config = config or qt.QuantConfig(weights=qt.QuantSpec(8, axis=-1))
    rules = []
    for given in config.rules:
        weights = config.weights if given.weights == INHERIT else given.weights
        inputs = config.activations if given.inputs == INHERIT else given.inputs
        rules.append(_rule(given.path, *((None, None) if given.skip else (weights, inputs))))
    rules.append(_rule(".*", config.weights, config.activations))
    return qwix.quantize_model(model, _provider_class()(rules))


def _rule(path: str, weights: qt.QuantSpec | None, inputs: qt.QuantSpec | None) -> Any:
    """Return Qwix's rule (`qwix.QtRule`) for the layers at a path."""
    import qwix

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


@functools.cache
def _provider_class() -> type:
    """Return Qwix's provider of quantized training, with convolutions on integers other than int8.

    Qwix 0.1.8 passes such integers to `jax.lax.conv_general_dilated` as they are. That refuses int8 inputs
    beside int4 kernels, and XLA's CPU backend cannot compile int4 on both sides.
    """
    import qwix

    class AllWidths(qwix.QtProvider):
        """Compute convolutions on integers other than int8 in floating point, with the same numbers."""

        def conv_general_dilated(
            self,
            lhs: jax.Array,
            rhs: jax.Array,
            window_strides,
            padding,
            lhs_dilation=None,
            rhs_dilation=None,
            dimension_numbers=None,
            **options,
        ) -> jax.Array:
            """Convolve the dequantized operands, with the straight-through estimator. Leave int8 to Qwix."""
            window = (window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers)
            rule = self._get_current_rule_and_op_id("conv_general_dilated", only_rule=True)[0]
            if rule is None or rule.weight_qtype is None or rule.weight_qtype == rule.act_qtype == "int8":
                return super().conv_general_dilated(lhs, rhs, *window, **options)
            layout = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)

            def fake_quant(x: jax.Array, qtype: str, axis: int) -> jax.Array:
                axes = () if rule.disable_channelwise_axes else (axis,)
                quantized = qwix.quantize(jax.lax.stop_gradient(x), qtype, channelwise_axes=axes)
                return qwix.dequantize(quantized) + (x - jax.lax.stop_gradient(x))

            lhs = fake_quant(lhs, rule.act_qtype, layout.lhs_spec[0])
            rhs = fake_quant(rhs, rule.weight_qtype, layout.rhs_spec[0])
            return jax.lax.conv_general_dilated(lhs, rhs, *window, **options)

    return AllWidths
