"""Updates that lead weights into [-bound, bound] exactly, in the weights' own dtype."""

import jax
import jax.numpy as jnp


def _wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """float64 if it is among the types, else float32: it holds every value of each of them."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def holding(update: jax.Array, param: jax.Array) -> jax.Array:
    """The update in a type that holds the parameter's values: else no update could move it exactly."""
    return update if update.dtype == param.dtype else update.astype(_wide(update.dtype, param.dtype))


def _round_down(tau: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The largest `dtype` number <= tau, held in tau's own (wider) dtype."""
    kind = jnp.finfo(dtype)
    # not astype: XLA may keep the excess precision of a narrowing cast that is widened again
    nearest = jax.lax.reduce_precision(tau, kind.nexp, kind.nmant)
    narrow = nearest.astype(dtype)
    return jnp.where(nearest > tau, jnp.nextafter(narrow, jnp.zeros_like(narrow)).astype(tau.dtype), nearest)


def project(param: jax.Array, update: jax.Array, tau: jax.Array) -> jax.Array:
    """The update u' for which fl(param + u') lies in [-tau, tau] exactly.

    Only where |p + u| > tau is u replaced, by u' = fl(b - p) with b = +-tau rounded towards zero in the
    parameter's type. Where even so fl(p + u') is beyond b, one step of nextafter towards the inside suffices.
    Proof for b >= 0, the other side being its mirror: u' is one of the two floats next to x = b - p, so if
    p + u' > b then u' > x and its predecessor v satisfies v <= x, hence p + v <= b. Also v >= -p, because -p
    is a float and -p <= x < u'; hence p + v >= 0. Rounding is monotone and b is a float of the parameter's
    type: fl(p + v) lies in [0, b], through however many roundings the sum passes.

    The arithmetic is float32 (float64 for float64) and every rounding to a narrower type explicit, because
    XLA may skip implicit ones. `update` has a dtype that holds every value of `param`'s.
    """
    exact = _wide(update.dtype)
    kind = jnp.finfo(update.dtype)
    bound = _round_down(tau.astype(exact), param.dtype)
    old = param.astype(exact)
    new = old + update.astype(exact)
    target = jnp.clip(new, -bound, bound)
    moved = jax.lax.reduce_precision(target - old, kind.nexp, kind.nmant)
    beyond = jnp.abs(old + moved) > bound
    moved = moved.astype(update.dtype)
    inward = jnp.where(new > 0, -jnp.inf, jnp.inf).astype(update.dtype)
    moved = jnp.where(beyond, jnp.nextafter(moved, inward), moved)
    return jnp.where(jnp.abs(new) > bound, moved, update)
