"""Train a Linen model under Quant-Trim: fake-quantize its layers, blended by lambda.

`quant_trim` is a context around a forward pass. Every kernel-bearing Linen layer hands its input and its
kernel to the field `promote_dtype` just before it multiplies them. Inside the context that field is shadowed,
for the length of one call, by a function that fake-quantizes both. The rounding is that of
`qt_jax.grid.fake_quant`, and lambda is blended in `qt_jax.grid.blend`. The model's code and its parameters
stay as they are.

Each tensor that is put on a grid is a quantization point; `qt_jax.points` holds the points of one pass.
`attach_statistics` makes the ranges for a checkpoint that has none yet.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.config import QuantConfig, Sites, check_rules_used
from qt_jax.errors import InvalidInput
from qt_jax.grid import QuantSpec
from qt_jax.interception import (
    COLLECTION,
    GAIN,
    INPUT,
    KERNEL,
    LAYERS,
    OUTPUT,
    PASSES,
    Call,
    intercept,
    is_quant_trim_statistic,
    require_linen,
    shadowed,
    shapes_of,
)
from qt_jax.points import ForwardPass, root_of, unopened

CANNOT_CARRY = (
    "a lifted transformation of the model cannot carry the ranges, scalars that are made by a first pass: "
    f'give it variable_axes={{"{COLLECTION}": 0}}, not variable_carry, variable_broadcast or another axis'
)
"""What is said of nn.scan, nn.RNN and others that take `batch_stats` along in another way."""

_entered = contextvars.ContextVar("quant_trim is entered", default=False)


@dataclasses.dataclass
class Visit:
    """List what one trace inside the context saw.

    Attributes:
      layers: The sites of every layer that was reached, by path. A subclass of a layer that multiplies in
        code of its own, and not in that of Linen, is not reached.
      outputs: The paths of all modules that were called.
      lifted: The paths of the layers that were reached inside a lifted transformation.
    """

    layers: dict[str, Sites] = dataclasses.field(default_factory=dict)
    outputs: set[str] = dataclasses.field(default_factory=set)
    lifted: set[tuple[str, ...]] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def quant_trim(config: QuantConfig, lam: jax.Array | float, *, train: bool) -> Iterator[Visit]:
    """Fake-quantize every layer that is applied inside the context, blended by lambda.

    At every site x_tilde = x + lambda * stop_gradient(x_hat - x) (Quant-Trim, arXiv 2511.15300, progressive
    fake quantization). The grid is that of the range that `batch_stats` holds when the pass begins. What the
    pass observes moves the range when the pass ends, for the next one. The grids are thus known before the
    tensors: rounding fuses with the operation that computes the tensor, and all quantiles are taken together.
    A site that has not observed anything yet, as in the first step, passes its tensor through.

    A range belongs to what one layer sees. If it sees several tensors in one pass, its range holds the robust
    ranges of all, and moves once. This holds inside lifted transformations, such as nn.scan or nn.remat, too.
    A submodule that is called through a `method=` which is a plain function, not a method of the model,
    counts as a separate pass.

    Enter the context inside the function that is jitted: around it, the function is traced anew, and compiled
    once more, each time the context is entered. `lam` may be traced, so that a moving lambda costs no
    recompilation. Attach the statistics first: a training step that has to create them returns another tree
    than it was given, and is traced twice.

    Args:
      config: Specs and rules.
      lam: Blend coefficient in [0, 1], a Python float or a scalar array. A traced one is clipped to [0, 1].
      train: True to update the ranges, False to freeze them. Ranges are updated only where `batch_stats` is
        mutable. At least one call inside the context must make it mutable, except during `init`.

    Yields:
      A `Visit` that lists the layers reached, by path.

    Raises:
      InvalidInput: Lambda is out of range, a rule matches no layer, no layer is reached, a layer is complex,
        statistics are absent from the variables or have another shape than the config wants, no range could
        move although `train` is True, a layer is called inside one of JAX's own transformations, or the
        context is entered inside another one.

    >>> model = nn.Dense(2)
    >>> x = jnp.ones((4, 3))
    >>> variables = attach_statistics(model, model.init(jax.random.key(0), x), QuantConfig(), x)
    >>> with quant_trim(QuantConfig(), lam=1.0, train=True):
    ...     y, updated = model.apply(variables, x, mutable=["batch_stats"])
    >>> sorted(updated["batch_stats"])
    ['quant_input', 'quant_kernel']
    """
    if jnp.ndim(lam) != 0:
        raise InvalidInput(f"lambda must be one number, got an array of shape {jnp.shape(lam)}")
    if not isinstance(lam, jax.core.Tracer) and not 0.0 <= float(lam) <= 1.0:
        raise InvalidInput(f"lambda must lie in [0, 1], got {lam}")
    if _entered.get():
        raise InvalidInput(
            "quant_trim is entered inside quant_trim, which would round every layer twice: leave the outer "
            "context first (attach_statistics enters one, too)"
        )
    trim = _Trim(config, jnp.clip(jnp.asarray(lam, jnp.float32), 0.0, 1.0), train)
    token = _entered.set(True)
    try:
        with intercept(trim.run_pass, every_method=True), intercept(trim.quantize):
            yield trim.visit
    finally:
        _entered.reset(token)
    trim.check()


@dataclasses.dataclass
class _Trim:
    """Handle the calls inside one `quant_trim` context.

    Attributes:
      config, lam, train: As given to `quant_trim`, lambda as a float32 scalar.
      visit: What was seen so far.
      passes: The forward passes that are running, by root scope, the outermost first.
      calls: The calls of modules that are running, the outermost first.
      moved: Whether any range moved.
      frozen_path: Path of a range that was to move in a collection that is not mutable, or None.
    """

    config: QuantConfig
    lam: jax.Array
    train: bool
    visit: Visit = dataclasses.field(default_factory=Visit)
    passes: dict[int, ForwardPass] = dataclasses.field(default_factory=dict)
    calls: list[Call] = dataclasses.field(default_factory=list)
    moved: bool = False
    frozen_path: str | None = None

    def run_pass(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Open a forward pass around the first call within a root scope, and move its ranges at the end."""
        root = id(root_of(call.module))
        if root in self.passes:
            return call(*args, **kwargs)
        outer = next(iter(self.passes.values()), None)
        arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, jax.Array)]
        running = ForwardPass.open(self.config, self.lam, self.train, call.module, outer, self.calls, arrays)
        self.passes[root] = running
        try:
            outputs = call(*args, **kwargs)
            running.end()
        except ValueError as error:
            if "data dependency on the scan body" in str(error) and not isinstance(error, InvalidInput):
                raise InvalidInput(CANNOT_CARRY) from error
            raise
        finally:
            del self.passes[root]
        if outer is not None:
            self.visit.lifted |= {point.scope.path for point in running.points.values()}
        self.moved = self.moved or running.moves
        self.frozen_path = self.frozen_path or running.frozen_path
        return outputs

    def quantize(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Run one module with its kernel, its input and its output on their grids, as the config says."""
        self.calls.append(call)
        try:
            return self._quantized(call, *args, **kwargs)
        finally:
            self.calls.pop()

    def _quantized(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        module, path = call.module, call.path
        skipped = any(rule.skip and rule.matches(path) for rule in self.config.rules)
        fused = self.config.activations if path in self.config.fused_outputs and not skipped else None
        running = self.passes[id(root_of(module))]  # a compact method gives the model another root scope
        self.visit.outputs.add(path)
        if not isinstance(module, LAYERS):
            outputs = call(*args, **kwargs)
            if fused is not None and not isinstance(outputs, jax.Array):
                raise InvalidInput(
                    f"QuantConfig.fused_outputs names {path!r}, which returns a {type(outputs).__name__}, "
                    "not an array: name the modules that make its parts, as qt.find_fusion(...).outputs does"
                )
            return _point(running, module, OUTPUT, outputs, fused)
        sites, promote, promoted = self.config.sites(path), module.promote_dtype, False

        def promote_quantized(inputs: Any, kernel: Any, *rest: Any, **options: Any) -> Any:
            nonlocal promoted
            promoted = True
            self.visit.layers[path] = sites
            if not isinstance(inputs, jax.Array):  # by identity, arrays tell which layers share one
                inputs = jnp.asarray(inputs)
            if sites.inputs is not None and not jnp.issubdtype(inputs.dtype, jnp.inexact):
                # Whole numbers have no grid of fractions: take the type in which the layer computes.
                inputs = inputs.astype(module.dtype or kernel.dtype)
            folded = self.config.folded and sites.weights is not None
            gain = running.gain(module, kernel, _feature_axis(module)) if folded else None
            kernel = _point(running, module, KERNEL, kernel, _kernel_spec(module, sites.weights), gain)
            inputs = _point(running, module, INPUT, inputs, sites.inputs)
            return promote(inputs, kernel, *rest, **options)

        with shadowed(module, promote_dtype=promote_quantized):
            outputs = call(*args, **kwargs)
        return _point(running, module, OUTPUT, outputs, (sites.outputs if promoted else None) or fused)

    def check(self) -> None:
        """Raise InvalidInput if the context had no effect, or not the effect that was asked for."""
        if not self.visit.layers:
            raise InvalidInput(
                "quant_trim saw no layer. Call the model inside the context, not a function that was "
                "compiled ahead of time, and check that it uses Linen's Conv, Dense, DenseGeneral or Einsum."
            )
        if self.frozen_path and not self.moved:
            raise InvalidInput(
                f"quant_trim(train=True) could not move {self.frozen_path!r}, nor any other range: call "
                f'model.apply(..., mutable=["{COLLECTION}"]) and keep what it returns, or freeze the ranges '
                "with train=False"
            )
        check_rules_used(self.config, self.visit.layers)
        if unknown := set(self.config.fused_outputs) - self.visit.outputs:
            raise InvalidInput(
                f"QuantConfig.fused_outputs names {sorted(unknown)[0]!r}, and no module of that path was "
                "called: take them from qt.find_fusion(model, variables, input).outputs"
            )


def _point(
    running: ForwardPass,
    module: nn.Module,
    name: str,
    x: jax.Array,
    spec: QuantSpec | None,
    gain: jax.Array | None = None,
) -> jax.Array:
    return x if spec is None else running.quantized(module, name, x, spec, gain)


def _feature_axis(module: nn.Module) -> int:
    """Return the axis of a kernel's output features: the last, or the last but one if it is transposed."""
    return -2 if getattr(module, "transpose_kernel", False) else -1


def _kernel_spec(module: nn.Module, spec: QuantSpec | None) -> QuantSpec | None:
    """Return the spec of a kernel, with axis -1 read as that of the output features."""
    if spec is not None and spec.axis == -1:
        return dataclasses.replace(spec, axis=_feature_axis(module))
    return spec


def attach_statistics(
    model: nn.Module, variables: dict[str, Any], config: QuantConfig, *inputs: Any, **options: Any
) -> dict[str, Any]:
    """Add an empty range for every site of the config to the variables of a plain checkpoint. Gains are 1.

    The model is only traced, and nothing is computed. Parameters and statistics that are there are kept. The
    first training batch fills the new ranges.

    Args:
      model: Any Linen module.
      variables: {"params": ..., and other collections} as `model.init` returns them.
      config: Specs and rules.
      *inputs, **options: What `model.apply` takes after the variables. Shapes matter, values do not, and
        `jax.ShapeDtypeStruct` will do.

    Returns:
      The variables with the ranges in `batch_stats`.

    Raises:
      InvalidInput: As for `quant_trim`; or statistics of the model itself are missing; or the model is not a
        Linen module.

    >>> model, x = nn.Dense(2), jnp.ones((1, 3))
    >>> attached = attach_statistics(model, model.init(jax.random.key(0), x), QuantConfig(), x)
    >>> int(attached["batch_stats"]["quant_kernel"]["count"])
    0
    """
    require_linen(model)

    wanted = flatten_dict(_statistics_of(model, variables, config, inputs, options))
    present = flatten_dict(variables.get(COLLECTION, {}))
    missing = {
        path: jnp.full(leaf.shape, 1 if path[-1] == GAIN else 0, leaf.dtype)
        for path, leaf in wanted.items()
        if path not in present
    }
    foreign = ["/".join(path) for path in missing if not is_quant_trim_statistic(path)]
    if foreign:
        raise InvalidInput(
            f"the variables lack the model's own statistics {', '.join(foreign[:3])}: pass all that "
            "model.init or the checkpoint holds, not only the parameters."
        )
    return {**variables, COLLECTION: unflatten_dict({**present, **missing})}


def _statistics_of(
    model: nn.Module,
    variables: dict[str, Any],
    config: QuantConfig,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the shapes of all that `batch_stats` holds after a pass under Quant-Trim."""

    def plain(variables: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
        return model.apply(variables, *inputs, **{**options, "mutable": [COLLECTION]})[1]

    lifted: set[tuple[str, ...]] = set()

    def forward(variables: dict[str, Any], inputs: tuple[Any, ...], *, train: bool = False) -> Any:
        with quant_trim(config, 0.0, train=train) as visit:
            outputs = plain(variables, inputs)
        lifted.update(visit.lifted)
        return outputs

    def initialize(_: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
        rngs = {"params": jax.random.key(0), **options.get("rngs", {})}
        rest = {name: value for name, value in options.items() if name not in ("rngs", "mutable")}
        with quant_trim(config, 0.0, train=False):
            return model.init(rngs, *inputs, **rest)

    try:
        return shapes_of(forward, variables, inputs).get(COLLECTION, {})
    except AssertionError as error:
        shapes_of(plain, variables, inputs)  # lets an assertion of the model's own pass
        raise InvalidInput(CANNOT_CARRY) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        # The branches of nn.cond and nn.switch make different ranges, except in init, which runs them all.
        try:
            made = flatten_dict(shapes_of(initialize, variables, inputs).get(COLLECTION, {}))
            made = {path: leaf for path, leaf in made.items() if is_quant_trim_statistic(path)}
            statistics = unflatten_dict({**made, **flatten_dict(variables.get(COLLECTION, {}))})
            attached = {**variables, COLLECTION: statistics}
            train = config.axis_name is None
            shapes_of(functools.partial(forward, train=train), attached, inputs)
            # A body of nn.while_loop runs more than once, and what its layers see belongs to one pass.
            for layer in lifted:
                for name in (KERNEL, INPUT, OUTPUT):
                    range_ = {
                        end: made[*layer, name, end]
                        for end in ("low", "high", "count")
                        if (*layer, name, end) in made
                    }
                    if range_:
                        made |= {(*layer, PASSES, name, k): leaf for k, leaf in unopened(range_).items()}
        except Exception:
            shapes_of(plain, variables, inputs)
            raise InvalidInput(CANNOT_CARRY) from error
        return unflatten_dict(made)
