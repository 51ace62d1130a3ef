"""Check that training folds batch norm into a layer past the same pools as the exporter."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from qt_jax.export import to_onnx
from qt_jax.export.qdq import insert_qdq
from qt_jax.export.ranges import tensor_ranges
from qt_jax.export.verification import fake_quant_forward, parity


@pytest.fixture(autouse=True)
def usual_promotion():
    """Let `nn.avg_pool` divide by a whole number."""
    with jax.numpy_dtype_promotion("standard"):
        yield


CONFIG = qt.QuantConfig(folded=True)
IMAGES = np.random.default_rng(0).normal(size=(24, 8, 8, 3)).astype(np.float32)


class Pooled(nn.Module):
    """Put an operation between a layer and its batch norm."""

    operation: object

    @nn.compact
    def __call__(self, x, train=False):
        x = self.operation(nn.Conv(4, (3, 3), padding="VALID", use_bias=False, name="conv")(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = x.mean(axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x
        return nn.Dense(3, name="head")(x)


def pool(kind, window=(2, 2), strides=(2, 2), **options):
    return functools.partial(kind, window_shape=window, strides=strides, **options)


MOVED = {
    "nothing": lambda x: x,
    "max": pool(nn.max_pool),
    "max, padded": pool(nn.max_pool, (3, 3), (2, 2), padding="SAME"),
    "average": pool(nn.avg_pool),
    "average, padding not counted": pool(
        nn.avg_pool, (3, 3), (1, 1), padding="SAME", count_include_pad=False
    ),
    "mean": lambda x: x.mean((1, 2)),
    "mean, kept": lambda x: x.mean((1, 2), keepdims=True),
    "largest": lambda x: x.max((1, 2)),
    "max of averages": lambda x: nn.avg_pool(x, (2, 2), (2, 2)).max((1, 2)),
    "tokens": lambda x: x.reshape(len(x), -1, 4),
    "height and width exchanged": lambda x: x.swapaxes(1, 2),
}
STAYS = {
    "padding counted": pool(nn.avg_pool, (3, 3), (1, 1), padding="SAME"),
    "sum": lambda x: x.sum((1, 2)),
    "pixels as features": lambda x: x.reshape(len(x), -1),
    "zeros around": lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))),
    "an activation": nn.tanh,
}


def drawn(net, sign=1.0):
    """Draw variables, none of them 0 or 1; the second channel of the batch norm has that sign."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(net.init, jax.random.key(0), IMAGES)
    variables = jax.tree.map(lambda leaf: random.uniform(0.3, 1.2, leaf.shape).astype(np.float32), shapes)
    variables["params"]["conv"]["kernel"] -= 0.7
    variables["params"]["norm"]["scale"][1] *= sign
    return variables


def folds(net, variables):
    """Tell whether the exporter leaves no batch norm."""
    model = to_onnx(net.apply, variables, IMAGES.shape[1:])
    return "BatchNormalization" not in [node.op_type for node in model.graph.node]


def gain_of(variables):
    norm, statistics = variables["params"]["norm"], variables["batch_stats"]["norm"]
    return norm["scale"] / np.sqrt(statistics["var"] + 1e-5)


@pytest.mark.parametrize("name", [*MOVED, *STAYS])
def test_training_folds_what_the_exporter_folds(name):
    net = Pooled((MOVED | STAYS)[name])
    variables = drawn(net)
    attached = qt.attach_statistics(net, variables, CONFIG, IMAGES)
    assert folds(net, attached) == (name in MOVED)
    fusion = qt.find_fusion(net, variables, IMAGES)
    assert fusion.layers == (("conv",) if name in MOVED else ())
    for layer, gain in fusion.gains(variables).items():
        np.testing.assert_allclose(gain, gain_of(variables), rtol=1e-6, err_msg=layer)


@pytest.mark.parametrize(("name", "sign"), [("max", -1.0), ("largest", 0.0), ("mean", -1.0)])
def test_a_maximum_is_passed_by_positive_gains_only(name, sign):
    net = Pooled(MOVED[name])
    variables = drawn(net, sign)
    gains = qt.find_fusion(net, variables, IMAGES).gains(variables)["conv"]
    moves = folds(net, qt.attach_statistics(net, variables, CONFIG, IMAGES))
    assert moves == (name == "mean")
    np.testing.assert_allclose(gains, gain_of(variables) if moves else np.ones(4), rtol=1e-6)


@pytest.mark.parametrize(("name", "sign"), [("max", 1.0), ("max", -1.0), ("average", -1.0)])
def test_the_integers_are_those_of_training(name, sign):
    """The kernel has one scale for the tensor, over its folded weights."""
    net = Pooled(MOVED[name])
    variables = drawn(net, sign)
    fusion = qt.find_fusion(net, variables, IMAGES)
    variables = fusion.refresh(qt.attach_statistics(net, variables, CONFIG, IMAGES))
    with qt.quant_trim(CONFIG, 0.0, train=True):
        _, seen = net.apply(variables, IMAGES, mutable=["batch_stats"])
    variables = jax.tree.map(np.array, fusion.refresh({**variables, **seen}))
    model = to_onnx(net.apply, variables, IMAGES.shape[1:])
    ranges = tensor_ranges(model, variables, CONFIG, IMAGES.transpose(0, 3, 1, 2))
    kernels = [ranges.tensors[kernel] for kernel in ranges.kernels.values()]
    assert {kernel.source for kernel in kernels} == {"learned"}
    assert len(set(kernels[0].scale)) == 1
    exact = insert_qdq(model, ranges, learned_only=True)
    found = parity(exact, fake_quant_forward(net.apply, CONFIG), variables, IMAGES, ranges)["logits"]
    assert found["sqnr_db"] > 60.0 and found["equal_integers"] > 0.97
