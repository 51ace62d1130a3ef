"""Qwix's provider of quantized training, with convolutions on other integers than int8.

Qwix 0.1.8 hands them to `jax.lax.conv_general_dilated` as they are, which refuses int8 inputs beside int4
kernels, and which XLA's CPU backend cannot compile for int4 on both sides.
"""

import jax
import qwix


class AllWidths(qwix.QtProvider):
    """`QtProvider`, whose convolutions on other than int8 compute the same numbers in floating point."""

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
        """The convolution of the dequantized operands, with the straight-through estimator; else Qwix's."""
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
