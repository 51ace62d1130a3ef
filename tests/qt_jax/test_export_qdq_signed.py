"""Check that onnxruntime as it is by default takes signed activations, at every opset that has them."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import onnxruntime
import pytest

import qt_jax as qt
from qt_jax.export.layout import as_graph

IMAGES = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype(np.float32)
BEHIND = {
    "nothing": lambda x: x,
    "a dense layer for each pixel": lambda x: nn.Dense(3)(x),
    "norm of tokens": lambda x: nn.Dense(3)(nn.LayerNorm()(x.reshape(len(x), -1, 4))),
    "features": lambda x: x.reshape(len(x), -1),
    "an axis more": lambda x: x[:, None],
    "pool": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "norm of a pool": lambda x: nn.LayerNorm()(nn.max_pool(x, (2, 2), (2, 2))),
    "a part": lambda x: nn.gelu(x[:, 1:3]),
    "two outputs": lambda x: (x, x.reshape(len(x), -1)),
    "two parts": lambda x: (x[..., :2], x[..., 2:]),
}


class Images(nn.Module):
    """Put a function behind two convolutions."""

    function: object

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        return self.function(nn.Conv(4, (1, 1), name="second")(x))


@pytest.fixture(scope="module", params=BEHIND)
def net(request):
    """Return the forward of a network, and its variables with ranges."""
    model, config = Images(BEHIND[request.param]), qt.QuantConfig()
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), IMAGES), config, IMAGES)
    with qt.quant_trim(config, 0.0, train=True):
        _, seen = jax.jit(partial(model.apply, mutable=["batch_stats"]))(variables, IMAGES)
    return model.apply, {**variables, **seen}, config


@pytest.mark.parametrize(("opset", "layout"), [(17, "nhwc"), (21, "nchw"), (21, "nhwc")])
def test_signed_activations_load_and_are_the_unsigned_ones(net, opset, layout):
    apply, variables, config = net
    results = []
    for signed in (False, True):
        model = qt.to_qdq(
            apply,
            variables,
            (6, 6, 3),
            config,
            IMAGES,
            opset=opset,
            layout=layout,
            signed=signed,
            check=False,
        )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        exact = onnxruntime.InferenceSession(model.SerializeToString(), options)
        onnxruntime.InferenceSession(model.SerializeToString())  # optimized, as it is by default
        results.append(exact.run(None, {"input": as_graph(IMAGES, layout)}))
    for unsigned, signed in zip(*results, strict=True):
        np.testing.assert_allclose(signed, unsigned, atol=1e-6)
    returned = [as_graph(y, layout) for y in jax.tree.leaves(apply(variables, IMAGES))]
    for found, wanted in zip(results[1], returned, strict=True):
        assert found.shape == wanted.shape
        assert np.linalg.norm(found - wanted) < 0.15 * np.linalg.norm(wanted)
