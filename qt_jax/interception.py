"""Intercept the calls of a Linen model: what all interceptors of this project share.

An interceptor is a handler that `intercept` runs around every `__call__` of every module inside its context.
The handler decides what to call the module with and what to return. The model's code and its parameters stay
as they are. `shadowed` replaces a field of a module for the length of one call.

JAX keeps the traces of jitted functions, and knows nothing of interceptors. `intercept` therefore sets a
value that is part of the key of JAX's trace cache, and new for every context. A function that was jitted
elsewhere is traced anew inside the context, and one that is traced inside does not stay intercepted outside.

The module also names what the interceptors agree on: the layers that Quant-Trim reaches, and the names under
which the ranges live in `batch_stats`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Concatenate

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext

from qt_jax.errors import InvalidInput

LAYERS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
"""Layers that are reached. The projections of Linen's attention are `DenseGeneral`."""

COLLECTION = "batch_stats"
"""Name of the mutable collection that holds the ranges."""

KERNEL, INPUT, OUTPUT = "quant_kernel", "quant_input", "quant_output"
"""Names of the ranges beside a layer's other statistics. Each range is {"low", "high", "count"}."""

GAIN = "quant_gain"
"""Name of the gains with which folding will multiply a layer's kernel: float32 `(channels,)`, or
`(channels, 1)` where the features are the kernel's last axis but one."""


SEVERAL = "quant_several"
"""Name of the mark of a layer that is applied to several tensors in one pass: an int32 zero. Such a layer
shares its grid with no other layer."""

PASSES = "quant_passes"
"""Name of what a layer that several lifted bodies reach keeps of the pass that is running, for each point:
"begun_low", "begun_high" and "begun_count" of the range as the pass began, "seen_low" and "seen_high", and
"open", an int32 that is 1 while it holds something."""

STEP = "quant_step"
"""Name of the number of updates that a `Recipe` has counted: an int32 scalar at the top of the collection."""


def is_quant_trim_statistic(path: tuple[str, ...]) -> bool:
    """Tell whether a leaf of `batch_stats` at this path is Quant-Trim's: a range, a gain, a mark or a step.

    >>> is_quant_trim_statistic(("head", "quant_input", "low")), is_quant_trim_statistic(("norm", "mean"))
    (True, False)
    """
    return not {KERNEL, INPUT, OUTPUT, GAIN, SEVERAL, PASSES, STEP}.isdisjoint(path)


@dataclasses.dataclass(frozen=True)
class Call:
    """Hold one call of a module while a handler decides about it. Calling it runs the module's method.

    Attributes:
      module: The module that is called, bound to its variables.
      method: The method, bound to the module.
    """

    module: nn.Module
    method: Callable[..., Any]

    @property
    def path(self) -> str:
        """Return the module's path in the model, such as "encoder/block1/conv"; "" is the model itself."""
        return "/".join(self.module.path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method with these arguments, and return what it returns."""
        return self.method(*args, **kwargs)


Handler = Callable[Concatenate[Call, ...], Any]
"""`handler(call, *args, **kwargs) -> outputs`, with the arguments that the module was called with."""


@contextlib.contextmanager
def intercept(handler: Handler, *, every_method: bool = False) -> Iterator[None]:
    """Run `handler` in place of every module's `__call__` inside the context.

    A subclass may call the `__call__` that it inherits. The handler runs once, around the outer call. Of
    nested contexts the inner one's handler is closest to the module.

    Jitted functions are traced anew in every context, submodules under `nn.jit` among them, and arithmetic
    outside of jit is compiled anew. Enter a context inside a jitted function, or around a whole loop. What
    was compiled ahead of time (`jax.jit(f).lower(...).compile()`) cannot be intercepted.

    Args:
      handler: Must return the module's outputs, as a rule those of `call(*args, **kwargs)`. Make its first
        parameter positional-only if a module may have a keyword `call`.
      every_method: Run the handler around all methods of all modules, inherited ones included.

    >>> def double(call, *args, **kwargs):
    ...     return 2 * call(*args, **kwargs) if isinstance(call.module, nn.Dense) else call(*args, **kwargs)
    >>> import jax.numpy as jnp
    >>> variables = {"params": {"kernel": jnp.full((1, 1), 3.0), "bias": jnp.ones(1)}}
    >>> with intercept(double):
    ...     nn.Dense(1).apply(variables, jnp.ones((1, 1))).item()
    8.0
    """
    running: set[int] = set()

    def intercepted(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        call = Call(context.module, method)
        if every_method:
            return handler(call, *args, **kwargs)
        inherited = id(call.module) in running
        if inherited or context.method_name != "__call__":
            return call(*args, **kwargs)
        running.add(id(call.module))
        try:
            return handler(call, *args, **kwargs)
        finally:
            running.discard(id(call.module))

    with _trace_key(object()), nn.intercept_methods(intercepted):
        yield


_trace_key = jax.make_user_context(None)
"""Part of the key of JAX's trace cache: another object for every `intercept`, None outside of all."""


def share_traces() -> contextlib.AbstractContextManager[None]:
    """Let JAX keep the traces of what runs inside, for all contexts. No module may be called inside.

    Arithmetic outside of jit would else be compiled anew in every `intercept`.
    """
    return _trace_key(None)


def shapes_of(forward: Callable[..., Any], variables: Any, inputs: Any) -> Any:
    """Return the shapes of `forward(variables, inputs)`, which is traced, not run.

    Args:
      forward: Takes any trees.
      variables: Tree of arrays, or of their shapes.
      inputs: Tree of arrays or their shapes (`jax.ShapeDtypeStruct`). What is neither, such as True or None,
        reaches `forward` as it is.
    """
    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten(inputs)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def traced(variables: Any, arrays: dict[int, Any]) -> Any:
        return forward(variables, tree.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.eval_shape(traced, variables, arrays)


def require_linen(model: object) -> None:
    """Raise InvalidInput unless the model is a Linen module, and name the module inside a wrapper.

    >>> require_linen(lambda x: x)
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: function is not a Linen module: ...
    """
    if isinstance(model, nn.Module):
        return
    inner = getattr(model, "module", None)
    remedy = (
        f"Pass its Linen module, the attribute `module` ({type(inner).__name__})."
        if isinstance(inner, nn.Module)
        else "NNX modules are not supported."
    )
    raise InvalidInput(
        f"{type(model).__name__} is not a Linen module: qt_jax takes flax.linen modules, which get their "
        f"variables in apply. {remedy}"
    )


@contextlib.contextmanager
def shadowed(module: nn.Module, **fields: Any) -> Iterator[None]:
    """Give fields of a module other values inside the context, although modules are frozen.

    >>> layer = nn.Dense(2)
    >>> with shadowed(layer, features=5):
    ...     layer.features
    5
    >>> layer.features
    2
    """
    before = {name: getattr(module, name) for name in fields}
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
