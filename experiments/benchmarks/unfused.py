"""The same plain network with one unlucky fusion of XLA's CPU backend broken: the stricter FP32 baseline.

The weight gradient of a convolution reads its input transposed. XLA:CPU fuses whatever produced that input
into the transpose, and so computes the residual chain of up to four blocks again, inside a slow loop: on
ResNet-20 that is a quarter of the plain step. Anything that stands between the two breaks the chain, fake
quantization too, so against the plain step alone Quant-Trim would look faster than no quantization at all.
Here a division by one, which XLA cannot see to be one, does it. Logits and gradients stay the same.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Unfused(nn.Module):
    """`model`, with the input of every convolution divided by a runtime 1."""

    model: nn.Module

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        one = jnp.maximum(images[0, 0, 0, 0] * 0.0, 1.0)

        def divide(call, args, kwargs, context):
            if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
                args = (args[0] / one.astype(args[0].dtype), *args[1:])
            return call(*args, **kwargs)

        with nn.intercept_methods(divide):
            return self.model(images, train=train)
