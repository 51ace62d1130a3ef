"""The same model with other arithmetic in its layers, through the fields that Linen has for it."""

from collections.abc import Callable

import flax.linen as nn
import jax


class Injected(nn.Module):
    """`model` with these functions in every layer that takes them; its code and parameters stay as they are.

    Reaches `nn.Conv`, and `nn.Dense` and `nn.DenseGeneral` with the projections of attention; not
    `nn.ConvTranspose` and `nn.Einsum`, which take none.
    """

    model: nn.Module
    conv_general_dilated: Callable
    """In place of what a convolution has."""
    dot_general: Callable | None = None
    """In place of what a dense layer has; None leaves it."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        def inject(call, args, kwargs, context):
            module = context.module
            if context.method_name == "__call__":
                if isinstance(module, nn.Conv):
                    object.__setattr__(module, "conv_general_dilated", self.conv_general_dilated)
                elif self.dot_general is not None and isinstance(module, nn.Dense | nn.DenseGeneral):
                    object.__setattr__(module, "dot_general", self.dot_general)
            return call(*args, **kwargs)

        with nn.intercept_methods(inject):
            return self.model(images, train=train)
