"""Fine-tune float.msgpack with Quant-Trim, and write quant_trimmed.msgpack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import Net, data
from flax import serialization

import qt_jax as qt

(images, labels), (test_images, test_labels) = data()
steps, model = 300, Net()
pruning = qt.reverse_pruning(quantile=0.97, every=10, start=steps // 5, folded=True, spread=0.13)
tx = optax.chain(optax.adam(optax.cosine_decay_schedule(3e-3, steps)), pruning)
with open("float.msgpack", "rb") as file:
    variables = serialization.msgpack_restore(file.read())
lam = qt.schedules.warmup_quartic_quadratic(steps)
activations = qt.QuantSpec(bits=8, symmetric=False, quantile=1.0)
config = qt.QuantConfig(weights=qt.QuantSpec(bits=8), activations=activations, folded=True)
fusion = qt.find_fusion(model, variables, images[:1])
variables = fusion.refresh(qt.attach_statistics(model, variables, config, images[:1]))


@jax.jit
def train_step(variables, opt_state, images, labels, step):
    def loss_fn(params):
        collections = {**variables, "params": params}
        with qt.quant_trim(config, lam(step), train=True):
            logits, new = model.apply(collections, images, train=True, mutable="batch_stats")
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), new

    grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
    updates, opt_state = tx.update(grads, opt_state, variables["params"], **new)
    return fusion.refresh({"params": optax.apply_updates(variables["params"], updates), **new}), opt_state


opt_state, order = tx.init(variables["params"]), np.random.default_rng(1)
for step in range(steps):
    batch = order.choice(len(labels), 128, replace=False)
    variables, opt_state = train_step(variables, opt_state, images[batch], labels[batch], step)

correct = jnp.argmax(model.apply(variables, test_images), -1) == test_labels
print(f"{100 * np.mean(correct):.1f} % of the test images")
with open("quant_trimmed.msgpack", "wb") as file:
    file.write(serialization.to_bytes(variables))
