"""The network and the data of the examples: plain Flax, which knows nothing of quantization."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits


class Net(nn.Module):
    """Depthwise-separable convolutions on images of one channel."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x))
        for i, (width, stride) in enumerate(((32, 1), (64, 2), (64, 1))):
            channels = x.shape[-1]
            x = nn.Conv(channels, (3, 3), stride, 1, feature_group_count=channels, name=f"depth{i}")(x)
            x = nn.Conv(width, (1, 1), use_bias=False, name=f"point{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x))
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


def data():
    """Training and test split of scikit-learn's digits: images float32 (n, 8, 8, 1), labels int32 (n,)."""
    digits = load_digits()
    images = (digits.images[..., None] / 8 - 1).astype(np.float32)
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1400], order[1400:]
    return (images[train], labels[train]), (images[test], labels[test])
