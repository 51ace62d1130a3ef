"""AQT's quantized training (`aqtp`) in a Linen model, with the parameters of the plain one.

Forward: 8 bits for kernels and inputs, symmetric absmax taken anew in every step, a scale per output channel
of the kernel and one per example (for dense layers per row) of the input. Dense layers multiply int8 with
int32 sums; AQT's convolution rounds to the same integers and multiplies them in the compute type.
Backward: float, by the operands as they were before rounding, which is what `config_v4` does without bits for
dlhs and drhs. (Its default is 8 bits for dlhs, with stochastic rounding; AQT has no such thing for
convolutions.)

AQT's convolution, as of aqtp 0.9.0, is made for inference: differentiated as it stands, its rounding has
gradient zero, for kernel and input alike, and AQT's own example of a convolutional network leaves its
convolutions in float. The backward of convolutions is therefore ours, by the rule of AQT's dense layers.
`nn.ConvTranspose` and `nn.Einsum` stay in float. Depthwise convolutions are JAX's own grouped ones, not the
products that `experiments.models.convolution` puts in their place on CPUs.
"""

from typing import Any

import flax.linen as nn
import jax

from experiments.benchmarks.injected import Injected

BITS, SPATIAL = 8, 2
"""Of the forward; axes of height and width."""


def aqt_model(model: nn.Module) -> Injected:
    """`model` under AQT, with the parameters of the plain one below "model".

    Raises:
      ImportError: AQT is not installed, or not for this jax.
    """
    from aqt.jax.v2 import aqt_conv_general, config

    convolution = aqt_conv_general.make_conv_general_dilated(
        aqt_conv_general.conv_general_dilated_make(SPATIAL, BITS, BITS)
    )
    dense = config.set_context(
        config.config_v4(fwd_bits=BITS, dlhs_bits=None, drhs_bits=None), key=None, train_step=None
    )

    def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *window: Any, **options: Any) -> jax.Array:
        @jax.custom_vjp
        def product(lhs, rhs):
            return convolution(lhs, rhs, *window, **options)

        def backward(operands, gradient):
            def plain(lhs, rhs):
                return jax.lax.conv_general_dilated(lhs, rhs, *window, **options)

            return jax.vjp(plain, *operands)[1](gradient)

        product.defvjp(lambda lhs, rhs: (product(lhs, rhs), (lhs, rhs)), backward)
        return product(lhs, rhs)

    return Injected(model, conv_general_dilated, dense)
