"""Check that a thread which exports and one which trains get what each of them gets alone, bit for bit."""

import threading

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import qt_jax as qt
from qt_jax.export import to_onnx

IMAGE, ROW, SEQUENCE = (6, 6, 3), (6,), (4, 6)
NORM = {"use_running_average": True}


class Written(nn.Module):
    """Call a function of `x` that makes submodules."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


class Standardised(nn.Conv):
    """Centre the kernel when it is read."""

    def param(self, name, *arguments, **options):
        value = super().param(name, *arguments, **options)
        return value - value.mean((0, 1, 2)) if name == "kernel" else value


class ScannedStep(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(6)(x)), None


def scanned(x):
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
    return nn.scan(ScannedStep, **options)()(x, None)[0]


def repeated(x):
    weight = nn.Dense(6, name="weight").variables.get("params", {}).get("kernel", jnp.eye(6))
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ weight), None), nn.Dense(6)(x), None, 4)[0]


def squeezed(x):
    gate = nn.sigmoid(nn.Dense(4)(nn.relu(nn.Dense(2)(x.mean((1, 2))))))
    return nn.Conv(2, (1, 1))(x[..., :1] * gate[:, None, None])


def mixed(x):
    return x + jnp.swapaxes(nn.Dense(4)(jnp.swapaxes(nn.LayerNorm()(x), 1, 2)), 1, 2)


NETWORKS = {
    "conv and batch norm": (lambda x: nn.relu(nn.BatchNorm(**NORM)(nn.Conv(4, (3, 3))(x))), IMAGE),
    "batch norm behind a pool": (
        lambda x: nn.BatchNorm(**NORM)(nn.avg_pool(nn.Conv(4, (3, 3))(x), (2, 2), (2, 2))),
        IMAGE,
    ),
    "batch norm before a layer": (lambda x: nn.Dense(3)(nn.BatchNorm(**NORM)(x)), ROW),
    "residual": (lambda x: x + nn.BatchNorm(**NORM)(nn.Conv(3, (3, 3))(nn.relu(x))), IMAGE),
    "depthwise": (lambda x: nn.Conv(6, (3, 3), feature_group_count=3)(x), IMAGE),
    "transposed": (lambda x: nn.ConvTranspose(2, (2, 2), (2, 2))(x), IMAGE),
    "standardised kernel": (lambda x: Standardised(4, (3, 3))(x), IMAGE),
    "group norm": (lambda x: nn.swish(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x))), IMAGE),
    "squeeze and excite": (squeezed, IMAGE),
    "resized": (lambda x: jax.image.resize(nn.Conv(2, (1, 1))(x), (len(x), 12, 12, 2), "nearest"), IMAGE),
    "flattened": (lambda x: nn.Dense(3)(nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)), IMAGE),
    "concatenated": (lambda x: jnp.concatenate([nn.Conv(2, (1, 1))(x), x], -1), IMAGE),
    "dense": (lambda x: nn.Dense(3)(nn.gelu(nn.Dense(8)(x))), ROW),
    "remat": (lambda x: nn.remat(nn.Dense)(3)(x), ROW),
    "scanned layers": (scanned, ROW),
    "scan in a function": (repeated, ROW),
    "attention": (lambda x: nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x)), SEQUENCE),
    "mixer": (mixed, SEQUENCE),
    "LSTM": (lambda x: nn.RNN(nn.OptimizedLSTMCell(3))(x), SEQUENCE),
    "two GRUs": (
        lambda x: nn.Bidirectional(nn.RNN(nn.GRUCell(3)), nn.RNN(nn.GRUCell(3)))(x),
        SEQUENCE,
    ),
}
"""Twenty networks: a function of the input, and the input's shape without batch."""


class Trained(nn.Module):
    """Hold what an exporter could disturb in another thread: layers, batch norm, a scan and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        first = jnp.zeros((len(x), 4))
        x, _ = jax.lax.scan(
            lambda state, row: (jnp.tanh(state + row), None), first, jnp.moveaxis(x.mean(1), 1, 0)
        )
        return nn.Dense(2)(x)


@jax.numpy_dtype_promotion("standard")
def train(steps=8):
    """Train with Quant-Trim and draw keys; return the variables, the losses, the keys and a scan's result."""
    config, model, optimizer = qt.QuantConfig(), Trained(), optax.adam(1e-2)
    key, first = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(first, (8, 6, 6, 3)), jnp.arange(8) % 2
    variables = model.init(jax.random.key(1), x, False)
    variables = qt.attach_statistics(model, variables, config, x, False)
    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, statistics, state, key):
        def loss(params):
            with qt.quant_trim(config, 0.5, train=True):
                logits, updated = model.apply(
                    {"params": params, "batch_stats": statistics},
                    x,
                    True,
                    mutable=["batch_stats"],
                    rngs={"dropout": key},
                )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), updated["batch_stats"]

        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), statistics, state, value

    losses, keys = [], []
    for _ in range(steps):
        key, dropped, kept = jax.random.split(key, 3)
        params, statistics, state, value = step(params, statistics, state, dropped)
        losses.append(value)
        keys += [jax.random.key_data(each) for each in (dropped, kept)]
    total, _ = jax.lax.scan(lambda carry, row: (carry + row, None), jnp.zeros(2), jnp.ones((300, 2)))
    return jax.device_get((params, statistics, losses, keys, total, np.array(jnp.shape(total))))


@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def exported():
    """Export each network; return the bytes of the graphs."""
    graphs = {}
    for name, (function, shape) in NETWORKS.items():
        net = Written(function)
        variables = net.init(jax.random.key(2), np.ones((1, *shape), np.float32))
        graphs[name] = to_onnx(net.apply, variables, shape).SerializeToString()
    return graphs


def test_twenty_exports_beside_training():
    assert len(NETWORKS) == 20
    trained, graphs = train(), exported()
    stop, runs, errors = threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                runs.append(train())
        except Exception as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        beside = exported()
    finally:
        stop.set()
        worker.join()
    assert not errors, errors
    assert beside == graphs
    assert runs
    keys = np.stack([*trained[3]])
    assert len(np.unique(keys, axis=0)) == len(keys)
    for run in runs:
        chex.assert_trees_all_equal(run, trained)
