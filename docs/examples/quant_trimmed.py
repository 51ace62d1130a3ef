"""Fine-tune float.msgpack, and write the result under the name of this file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qt_jax as qt
from digits import Net, data
from flax import serialization

(images, labels), (test_images, test_labels) = data()
steps, model = 300, Net()
with open("float.msgpack", "rb") as file:
    variables = serialization.msgpack_restore(file.read())
recipe = qt.recipes.recommended(model, variables, images[:1], steps=steps)
variables = recipe.attach(variables)
tx = optax.chain(optax.adam(optax.cosine_decay_schedule(3e-3, steps)), recipe.reverse_pruning())


@jax.jit
def train_step(variables, opt_state, images, labels):
    def loss_fn(params):
        collections = {**variables, "params": params}
        logits, new = recipe.apply(collections, images, train=True, mutable="batch_stats")
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), new

    grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
    updates, opt_state = tx.update(grads, opt_state, variables["params"], **new)
    variables = recipe.advance({"params": optax.apply_updates(variables["params"], updates), **new})
    return variables, opt_state


opt_state, order = tx.init(variables["params"]), np.random.default_rng(1)
for _ in range(steps):
    batch = order.choice(len(labels), 128, replace=False)
    variables, opt_state = train_step(variables, opt_state, images[batch], labels[batch])
variables = recipe.finish(variables, np.array_split(images, 8), train=True)

correct = jnp.argmax(model.apply(variables, test_images), -1) == test_labels
print(f"{100 * np.mean(correct):.1f} % of the test images")
with open(f"{Path(__file__).stem}.msgpack", "wb") as file:
    file.write(serialization.to_bytes(variables))
