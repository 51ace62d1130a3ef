"""Trace forwards, also those that turn arrays into Python numbers where no input or variable reaches them.

Many networks compute the rates of drop path so: `[rate.item() for rate in jnp.linspace(0.0, 0.1, depth)]`.
JAX cannot trace that, for it traces constants too. It is traced once more, with constants computed meanwhile.
"""

import os
import traceback
from collections.abc import Callable
from typing import Any

import flax
import jax
from jax.extend.core import ClosedJaxpr

from qt_jax.errors import InvalidInput

NUMBER_NEEDED = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
"""Errors of JAX for an array that is turned into numbers while it is traced."""

LIBRARIES = tuple(os.path.dirname(file or "") + os.sep for file in (jax.__file__, flax.__file__, __file__))
"""Folders whose lines are not the model's."""


def trace(apply_fn: Callable[..., Any], *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """Trace a forward.

    Returns:
      The program, and the pytree of the shapes that it returns.

    Raises:
      InvalidInput: It turns an array that depends on an input or a variable into a number. The message names
        the line.
    """
    return _tried_twice(lambda forward: jax.make_jaxpr(forward, return_shape=True)(*arguments), apply_fn)


def compiled(apply_fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return the compiled forward, which is traced as `trace` does; `options` are those of `jax.jit`."""
    plain, folded = jax.jit(apply_fn, **options), jax.jit(_folding(apply_fn), **options)

    def call(*arguments: Any) -> Any:
        return _tried_twice(lambda forward: (plain if forward is apply_fn else folded)(*arguments), apply_fn)

    return call


def _tried_twice(run: Callable[[Callable[..., Any]], Any], apply_fn: Callable[..., Any]) -> Any:
    """Run something on a forward; where a number is asked for, on the one that computes constants."""
    try:
        return run(apply_fn)
    except NUMBER_NEEDED:
        try:
            return run(_folding(apply_fn))
        except NUMBER_NEEDED as error:
            raise _untraceable(error) from error


def _folding(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that computes at once what depends on no argument."""

    def forward(*arguments: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return apply_fn(*arguments)

    return forward


def _untraceable(error: Exception) -> InvalidInput:
    """Make the error for a forward that turns an array into a number, with the line that does."""
    lines = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith(LIBRARIES)]
    last = lines[-1] if lines else None
    where = f" in {last.filename}, line {last.lineno}: `{last.line}`" if last else ""
    return InvalidInput(
        f"the model cannot be traced, by jax.jit either{where}. An array that depends on the inputs or the "
        "variables is turned into a Python number there, by float(), int(), .item() or if: choose with "
        "jnp.where, or compute it with numpy, outside JAX"
    )
