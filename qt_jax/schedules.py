"""Schedule lambda, the one coefficient that blends a float network into its fake-quantized self.

Each function takes settings and returns an optax-style schedule `count -> lambda`. `count` is the number of
optimizer steps taken so far: an int or an integer array, traced or not. lambda is float32, of the shape of
`count`, in [0, 1], and never decreases in `count`. 0 is the plain network, 1 is full fake quantization.
Lambda is continuous, except for `step`.

Phase boundaries are fractions of `total_steps`, and are not rounded to whole steps. A phase of length zero is
a jump at its boundary. With `total_steps = 0` every phase has length zero, so that lambda has its final value
at once. Counts are converted to float32, and are exact up to 2^24 steps.

Source: Quant-Trim, arXiv 2511.15300, progressive fake quantization. The paper gives the three phases of
`warmup_quartic_quadratic`. Their boundaries, the value at the joint and the other schedules, which are there
for comparison, are this package's choice.

A new schedule is one more function of this module. In the repository, `lambda_schedule` of
experiments/configs/training.py gives it a name on the command line.
"""

import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from qt_jax.errors import InvalidInput


def warmup_quartic_quadratic(
    total_steps: int, *, warmup: float = 0.2, joint: float = 0.6, end: float = 0.85, joint_value: float = 0.5
) -> optax.Schedule:
    """Return the paper's curriculum: a warm-up at 0, a quartic ramp, a quadratic ramp, then 1.

    With T = `total_steps`, p = (count - warmup T) / ((joint - warmup) T) and
    q = (count - joint T) / ((end - joint) T):

        lambda = 0                                     until warmup T
                 joint_value p^4                       until joint T
                 joint_value + (1 - joint_value) q^2   until end T
                 1                                     afterwards

    The second ramp, like the first, starts with slope 0 and is steepest at its end. The paper calls it
    "quadratic, up to 1". This reading, the boundaries and `joint_value` are this package's choice. In the
    repository, `--sched quartic` selects this function.

    Args:
      total_steps: Number of optimizer steps of the whole training.
      warmup, joint, end: Fractions of `total_steps`, 0 <= warmup <= joint <= end <= 1.
      joint_value: Lambda where the ramps meet, in [0, 1].

    Returns:
      `count -> lambda`, see the module's docstring.

    Raises:
      InvalidInput: A setting is out of its range, or the fractions are out of order.

    >>> schedule = warmup_quartic_quadratic(1000)
    >>> [round(float(schedule(count)), 4) for count in (0, 200, 500, 600, 725, 850, 1000)]
    [0.0, 0.0, 0.1582, 0.5, 0.625, 1.0, 1.0]
    """
    begin, meet, stop = _boundaries(total_steps, warmup=warmup, joint=joint, end=end)
    height = np.float32(_in_unit_interval("joint_value", joint_value))

    def schedule(count: ArrayLike) -> jax.Array:
        # at the end exactly 1: height + (1 - height) rounds to it for every float in [0, 1]
        return height * _progress(count, begin, meet) ** 4 + (1 - height) * _progress(count, meet, stop) ** 2

    return schedule


def _boundaries(total_steps: int, **fractions: float) -> list[np.float32]:
    """Return the fractions as steps, after checking them. Give them in the order in which they occur."""
    try:
        steps = operator.index(total_steps)
    except TypeError:
        steps = -1
    if steps < 0 or isinstance(total_steps, bool):
        raise InvalidInput(f"total_steps must be an int of at least 0, got {total_steps!r}")
    values = [_in_unit_interval(f"{name} (a fraction of total_steps)", f) for name, f in fractions.items()]
    if values != sorted(values):
        given = ", ".join(f"{name}={f!r}" for name, f in fractions.items())
        raise InvalidInput(f"the phases must follow each other, {' <= '.join(fractions)}; got {given}")
    return [np.float32(f * steps) for f in values]


def _in_unit_interval(name: str, value: float) -> float:
    if not isinstance(value, numbers.Real) or not 0.0 <= value <= 1.0:
        raise InvalidInput(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)


def _progress(count: ArrayLike, begin: np.float32, end: np.float32) -> jax.Array:
    """Return the elapsed fraction of the phase [begin, end]: 0 before it, exactly 1 from `end` on."""
    count = jnp.asarray(count, jnp.float32)
    length = end - begin if end > begin else np.float32(1.0)
    return jnp.where(count >= end, jnp.float32(1.0), jnp.clip((count - begin) / length, 0.0, 1.0))


def quartic(total_steps: int, *, warmup: float = 0.2, end: float = 0.85) -> optax.Schedule:
    """Return only the quartic ramp: lambda = p^4, p = (count - warmup T) / ((end - warmup) T).

    T is `total_steps`. Lambda is 0 until `warmup` and 1 from `end` on. In the repository,
    `--sched quartic-only` selects this function. `--sched quartic` selects `warmup_quartic_quadratic`.

    Args:
      total_steps: Number of optimizer steps of the whole training.
      warmup, end: Fractions of `total_steps`, 0 <= warmup <= end <= 1.

    Returns:
      `count -> lambda`, see the module's docstring.

    Raises:
      InvalidInput: As for `warmup_quartic_quadratic`.

    >>> float(quartic(100, warmup=0.0, end=1.0)(50))
    0.0625
    """
    begin, stop = _boundaries(total_steps, warmup=warmup, end=end)
    return lambda count: _progress(count, begin, stop) ** 4


def linear(total_steps: int, *, warmup: float = 0.2, end: float = 0.85) -> optax.Schedule:
    """Return a straight ramp: lambda = p, p = (count - warmup T) / ((end - warmup) T), T = `total_steps`.

    Arguments, result and errors are as for `quartic`.

    >>> float(linear(100, warmup=0.0, end=1.0)(25))
    0.25
    """
    begin, stop = _boundaries(total_steps, warmup=warmup, end=end)
    return lambda count: _progress(count, begin, stop)


def cosine(total_steps: int, *, warmup: float = 0.2, end: float = 0.85) -> optax.Schedule:
    """Return half a cosine wave: lambda = (1 - cos(pi p)) / 2, p = (count - warmup T) / ((end - warmup) T).

    T is `total_steps`. Lambda is computed as sin^2(pi p / 2), which does not cancel near 0. Arguments, result
    and errors are as for `quartic`.

    >>> round(float(cosine(100, warmup=0.0, end=1.0)(25)), 4)
    0.1464
    """
    begin, stop = _boundaries(total_steps, warmup=warmup, end=end)

    def schedule(count: ArrayLike) -> jax.Array:
        progress = _progress(count, begin, stop)
        return jnp.where(progress == 1.0, jnp.float32(1.0), jnp.sin(progress * np.float32(np.pi / 2)) ** 2)

    return schedule


def step(total_steps: int, *, at: float = 0.2) -> optax.Schedule:
    """Return a jump instead of a ramp: lambda = 0 before `at * total_steps`, 1 from then on.

    The default switches where the ramps' warm-up ends, so that a comparison with them isolates the ramp.

    Args:
      total_steps: Number of optimizer steps of the whole training.
      at: Fraction of `total_steps`, in [0, 1].

    Returns:
      `count -> lambda`, see the module's docstring.

    Raises:
      InvalidInput: A setting is out of its range.

    >>> [float(step(100, at=0.5)(count)) for count in (49, 50)]
    [0.0, 1.0]
    """
    (switch,) = _boundaries(total_steps, at=at)
    return lambda count: _progress(count, switch, switch)


def constant(value: float = 1.0) -> optax.Schedule:
    """Return the same lambda at every step: 1 is ordinary quantization-aware training, 0 is float training.

    Args:
      value: Lambda, in [0, 1].

    Returns:
      `count -> lambda`, see the module's docstring.

    Raises:
      InvalidInput: `value` is not in [0, 1].

    >>> float(constant(0.25)(7))
    0.25
    """
    fixed = np.float32(_in_unit_interval("value", value))
    return lambda count: jnp.full(jnp.shape(count), fixed)
