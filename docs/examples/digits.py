"""Define the network and the data of the examples in plain Flax, without any quantization."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits


class Net(nn.Module):
    """Classify images of one channel with depthwise-separable convolutions."""

    @nn.compact
    def __call__(self, x, train=False):
        def normed(x, name):
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)(x))

        conv = partial(nn.Conv, use_bias=False)
        x = normed(conv(16, (3, 3), padding=1, name="stem")(x), "stem_norm")
        for i, (width, stride) in enumerate(((32, 1), (64, 2), (64, 1))):
            channels = x.shape[-1]
            depth = conv(channels, (3, 3), stride, 1, feature_group_count=channels, name=f"depth{i}")
            x = normed(depth(x), f"depth_norm{i}")
            x = normed(conv(width, (1, 1), name=f"point{i}")(x), f"point_norm{i}")
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


def data():
    """Return scikit-learn's digits with noise, as a training split and a test split of (images, labels).

    The noise makes the digits harder. Each training image appears four times and each test image five times,
    every time with different noise. Images are float32 (n, 8, 8, 1), labels int32 (n,).
    """
    digits, random = load_digits(), np.random.default_rng(0)
    order = random.permutation(len(digits.target))

    def split(chosen, times):
        images = np.repeat(digits.images[chosen, :, :, None] / 8 - 1, times, axis=0)
        noise = 0.8 * random.standard_normal(images.shape)
        return (images + noise).astype(np.float32), np.repeat(digits.target[chosen], times).astype(np.int32)

    return split(order[:1400], 4), split(order[1400:], 5)
