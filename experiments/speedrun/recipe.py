"""The recipe: how long, how fast, when Quant-Trim sets in."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import qt_jax as qt
from experiments.models.speed_net import SpeedNet


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is made of; the defaults were chosen on a validation split."""

    epochs: float = 13.0
    """Passes over the training images."""
    batch_size: int = 1024
    """Images a step; what is left of an epoch is dropped."""
    learning_rate: float = 1.5
    """Peak, of SGD with Nesterov momentum on the mean loss."""
    momentum: float = 0.85
    """Nesterov momentum."""
    weight_decay: float = 1.3e-3
    """L2 penalty on kernels and, divided by the square of their rate, biases."""
    bias_rate: float = 64.0
    """Learning rate of biases, in units of that of kernels."""
    label_smoothing: float = 0.2
    """Share of the label spread over all classes."""
    shift: int = 2
    """Pixels by which images are moved at most."""
    average_every: int = 5
    """Steps between two pulls of the parameters to their moving average; 0: none."""
    activation: Literal["relu", "gelu"] = "gelu"
    """Nonlinearity."""
    width: float = 1.0
    """Factor of the channels."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type; parameters and statistics stay in float32."""
    quant_trim: bool = True
    """Fake quantization and reverse pruning; without, the float twin."""
    warmup: float = 0.3
    """Fraction of training before lambda leaves zero: plain steps, in which the whitening's bias trains."""
    ramp_end: float = 0.85
    """Fraction of training at which lambda reaches one."""
    weight_quantile: float = 1.0
    """Upper quantile of |w| that sets a weight scale."""
    activation_quantile: float = 1.0
    """Upper quantile of an activation's range; the lower one is its complement."""
    reestimate: int = 8
    """Batches on which batch norm is measured anew at the end, in the float network; 0: none."""
    reverse_pruning: float | None = 0.99
    """Quantile of |w| to which kernels are pulled back in the ramp, every 25 steps; None: off."""

    def model(self, num_classes: int) -> nn.Module:
        """The network."""
        widths = tuple(max(8, round(self.width * features / 8) * 8) for features in (64, 256, 256))
        activation = {"relu": nn.relu, "gelu": nn.gelu}[self.activation]
        return SpeedNet(widths, num_classes, activation=activation, dtype=jnp.dtype(self.dtype))

    def quant_config(self) -> qt.QuantConfig | None:
        """W8A8, or None for the float twin."""
        if not self.quant_trim:
            return None
        return qt.QuantConfig(
            weights=qt.QuantSpec(8, quantile=self.weight_quantile),
            activations=qt.QuantSpec(8, symmetric=False, quantile=self.activation_quantile),
            momentum=0.9,
        )

    def lam(self, total: int) -> optax.Schedule:
        """Lambda by step: the paper's three phases."""
        joint = self.warmup + (self.ramp_end - self.warmup) * 8 / 13
        return qt.schedules.warmup_quartic_quadratic(
            total, warmup=self.warmup, joint=joint, end=self.ramp_end
        )

    def rate(self, total: int) -> optax.Schedule:
        """The learning rate by step: from a fifth of the peak up, then down to 7 % of it."""
        peak = max(1, round(0.23 * total))
        up = optax.linear_schedule(0.2 * self.learning_rate, self.learning_rate, peak)
        down = optax.linear_schedule(self.learning_rate, 0.07 * self.learning_rate, max(1, total - peak))
        return optax.join_schedules([up, down], [peak])

    def optimizer(self, total: int) -> optax.GradientTransformation:
        """SGD, biases at their own rate, the whitening fixed; then reverse pruning."""
        rate = self.rate(total)

        def group(factor: float) -> optax.GradientTransformation:
            return optax.chain(
                optax.add_decayed_weights(self.weight_decay / factor**2),
                optax.sgd(lambda step: factor * rate(step), self.momentum, nesterov=True),
            )

        groups = {"kernel": group(1.0), "bias": group(self.bias_rate), "fixed": optax.set_to_zero()}
        chain = [optax.partition(groups, lambda params: jax.tree_util.tree_map_with_path(_group, params))]
        if self.quant_trim and self.reverse_pruning is not None:
            start = round(self.warmup * total)
            pruned = {"every": 25, "start": start, "mask": lambda path, _: path[-1] == "kernel" != path[0]}
            chain.append(qt.reverse_pruning(self.reverse_pruning, **pruned))
        return optax.chain(*chain)


def _group(path: tuple[Any, ...], _: jax.Array) -> str:
    module, name = (key.key for key in path)
    if module == "whitening":
        return "fixed" if name == "kernel" else "kernel"
    return name
