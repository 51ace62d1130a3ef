"""Draw weights and update them, for the tests of reverse pruning."""

import jax
import jax.numpy as jnp
import optax


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def network():
    return {
        "conv": {"kernel": normal(0, 3, 3, 4, 8), "bias": normal(1, 8) * 9},
        "norm": {"scale": normal(2, 8) * 9, "bias": normal(3, 8) * 9},
        "dense": {"kernel": normal(4, 8, 5)},
    }


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def apply(tx, params, state=None, updates=None):
    """One jitted update: the new params and state."""

    @jax.jit
    def step(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    return step(params, state, zeros_like(params) if updates is None else updates)


def momentum_step(tx):
    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: sum(jnp.sum((x - 3.0) ** 2) for x in jax.tree.leaves(p)))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step
