"""Quant-Trim as a context around a Linen forward pass: the model's code and parameters stay as they are.

Every kernel-bearing Linen layer hands its input and its kernel to the field `promote_dtype` just before it
multiplies them. Inside the context that field is shadowed, for the length of one call, by a function that
fake-quantizes both. The ranges live in the mutable collection `batch_stats`, under the layer's own path.

One quantization point: its range in `batch_stats`, what it observes, its tensor on the grid.

All points of a forward pass share the pass: quantiles are taken together when it ends, and in training a
tensor that enters several layers, as that of an attention's queries, keys and values does, is put on one grid
once, as a vendor's compiler puts it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.config import QuantConfig, Sites, check_rules_used
from qt_jax.errors import InvalidInput
from qt_jax.grid import QuantSpec, fake_quant, fake_quant_on_drawn_grid, grid_key
from qt_jax.interception import COLLECTION, GAIN, INPUT, KERNEL, LAYERS, OUTPUT, is_range
from qt_jax.ranges import Sample, draw, empty_range, ranges, update_range


class _Shared(NamedTuple):
    """A layer's input on its grid, for the other layers that it enters."""

    tensor: jax.Array
    image: jax.Array
    leader: nn.Variable


@dataclasses.dataclass
class ForwardPass:
    """The points of one forward pass, while it is traced: the calls within one root scope of Flax.

    A lifted transformation (nn.scan, nn.vmap, nn.remat, nn.map_variables) opens a root of its own, whose
    values and variables end with it, and an `apply` inside a module does: each is a pass of its own.

    Attributes:
      config: specs are the caller's; this gives momentum, sizes, seed.
      lam: blend coefficient, float32 scalar.
      train: whether ranges move where `batch_stats` is mutable.
      observed: the ranges that move at the end, each with what its point has seen.
      shared: inputs on their grids, by identity and spec; each is kept, so that no other gets its identity.
      leaders: by path of an input's point the range that it moves: its own, or that of the point whose image
        it has taken.
      followers: the ranges of points of the second kind, each with the one that it becomes at the end.
      held: path of a range that was to move in a collection that is not mutable; None if there is none.
    """

    config: QuantConfig
    lam: jax.Array
    train: bool
    observed: list[tuple[nn.Variable, Sample]] = dataclasses.field(default_factory=list)
    shared: dict[tuple[int, QuantSpec], _Shared] = dataclasses.field(default_factory=dict)
    leaders: dict[str, nn.Variable] = dataclasses.field(default_factory=dict)
    followers: list[tuple[nn.Variable, nn.Variable]] = dataclasses.field(default_factory=list)
    held: str | None = None

    def quantized(
        self, module: nn.Module, name: str, x: jax.Array, spec: QuantSpec, gain: jax.Array | None = None
    ) -> jax.Array:
        """`x` blended with its image on the grid of its range; observes it if training.

        In training the first layer that an input enters leads: others of the same spec, unless they have had
        an input of their own, take its image and from then on hold its range. Frozen, each rounds with its
        own range, which after a step of training is the same.

        With a gain g the grid is laid over g x, and what returns is x + (fake_quant(g x) - g x) / g: `x` to
        the bit at lambda = 0, with the gradient of `fake_quant`.

        Raises:
          InvalidInput: the module has no statistics for it, or of another shape.
        """
        where = "/".join((*module.path, name))
        statistics = _statistics(module, name, where, x, spec)
        trains = self.train and not module.is_initializing()
        moves = trains and module.is_mutable_collection(COLLECTION)
        if trains and not moves:
            self.held = where
        if moves and name == INPUT:
            found = self.shared.get((id(x), spec))
            if found is not None and where not in self.leaders:
                self.leaders[where] = found.leader
                self.followers.append((statistics, found.leader))
                return found.image
            statistics = self.leaders.setdefault(where, statistics)
        seen = statistics.value
        deployed = x if gain is None else x * gain
        if moves:
            whole = name == KERNEL and spec.quantile == 1.0
            sample = draw(
                deployed,
                quantile=spec.quantile,
                symmetric=spec.symmetric,
                axis=spec.axis,
                sample_size=x.size if whole else self.config.sample_size,
            )
            self.observed.append((statistics, sample))
        effective = jnp.where(seen["count"] > 0, self.lam, jnp.zeros_like(self.lam))
        if spec.grids == "vendors" and moves:
            key = grid_key(self.config.seed, where, seen["count"])
            image = fake_quant_on_drawn_grid(deployed, seen["low"], seen["high"], spec, effective, key)
        else:
            image = fake_quant(deployed, seen["low"], seen["high"], spec, effective)
        if gain is not None:
            return x + (image - deployed) / jnp.where(gain == 0.0, 1.0, gain)
        if moves and name == INPUT:
            self.shared.setdefault((id(x), spec), _Shared(x, image, statistics))
        return image

    def end(self) -> None:
        """Moves the ranges."""
        found = ranges([sample for _, sample in self.observed], self.config.axis_name)
        for (statistics, _), (low, high) in zip(self.observed, found, strict=True):
            statistics.value = update_range(statistics.value, low, high, self.config.momentum)
        for statistics, leader in self.followers:
            statistics.value = leader.value


def _statistics(module: nn.Module, name: str, where: str, x: jax.Array, spec: QuantSpec) -> nn.Variable:
    """The range of one point, empty if it is new."""
    if not module.is_mutable_collection(COLLECTION) and not module.has_variable(COLLECTION, name):
        raise InvalidInput(
            f"no statistics for {where!r} in {COLLECTION!r}. Attach them to a plain checkpoint with "
            "qt.attach_statistics(model, variables, config, input), or pass the collection to apply. Under a "
            "transformation that does not lift the collection (nn.WeightNorm, nn.map_variables) the layer "
            "cannot be reached: leave it out with qt.Rule(path, skip=True)."
        )
    channels = None if spec.axis is None else x.shape[spec.axis]
    statistics = module.variable(COLLECTION, name, empty_range, channels)
    expected = () if channels is None else (channels,)
    if statistics.value["low"].shape != expected:
        raise InvalidInput(
            f"the statistics of {where!r} have shape {statistics.value['low'].shape}, the config wants "
            f"{expected}: they were made with another axis. Drop them and attach them anew."
        )
    return statistics


@dataclasses.dataclass
class Visit:
    """What one trace of the context saw: the sites of every layer, by path, and all modules' paths."""

    layers: dict[str, Sites] = dataclasses.field(default_factory=dict)
    outputs: set[str] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def quant_trim(config: QuantConfig, lam: jax.Array | float, *, train: bool) -> Iterator[Visit]:
    """Fake-quantizes every layer that is applied inside the context, blended by lambda.

    At every site x_tilde = x + lambda * stop_gradient(x_hat - x) (Quant-Trim, arXiv 2511.15300, progressive
    fake quantization), on the grid of the range that `batch_stats` holds when the pass begins. What the pass
    observes moves the ranges at its end, for the next one: the grids are known before the tensors, so that
    rounding fuses with what computes them, and all quantiles are taken together. A site without an
    observation yet, as in the first step, passes its tensor through. What a lifted transformation (nn.scan,
    nn.remat) encloses is a pass of its own, and so is each submodule that a `method=` calls which is no
    module's own.

    Enter it inside the function that is jitted: around an already compiled one it has no effect, and
    raises. `lam` may be traced, so a moving lambda costs no recompilation. Attach the statistics first: a
    training step that has to create them returns another tree than it was given, and is traced twice.

    Args:
      config: specs and rules.
      lam: blend coefficient in [0, 1], a Python float or a scalar array.
      train: whether ranges are updated. They are where `batch_stats` is mutable, which it must be somewhere
        in the context, unless `init` is running. With `False` they are frozen.

    Yields:
      A `Visit` that lists the layers reached, by path.

    Raises:
      InvalidInput: lambda out of range; a rule that matches no layer; no layer reached; statistics absent
        from the variables or of another shape than the config's; `train`, and none of them could move.

    >>> model = nn.Dense(2)
    >>> x = jnp.ones((4, 3))
    >>> variables = attach_statistics(model, model.init(jax.random.key(0), x), QuantConfig(), x)
    >>> with quant_trim(QuantConfig(), lam=1.0, train=True):
    ...     y, updated = model.apply(variables, x, mutable=["batch_stats"])
    >>> sorted(updated["batch_stats"])
    ['quant_input', 'quant_kernel']
    """
    if isinstance(lam, (int, float)) and not 0.0 <= lam <= 1.0:
        raise InvalidInput(f"lambda must lie in [0, 1], got {lam}")
    visit, running = Visit(), set()
    lam = jnp.asarray(lam, jnp.float32)
    passes: dict[int, ForwardPass] = {}
    moved, held = False, None

    def intercept(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        nonlocal moved, held
        root = _root(context.module)
        if root in passes:
            return visited(call, args, kwargs, context)
        passes[root] = ForwardPass(config, lam, train)
        try:
            outputs = visited(call, args, kwargs, context)
            passes[root].end()
        finally:
            ended = passes.pop(root)
        moved, held = moved or bool(ended.observed), held or ended.held
        return outputs

    def visited(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module, path = context.module, "/".join(context.module.path)
        inherited = id(module) in running  # a subclass that calls its parent's __call__
        if inherited or context.method_name != "__call__":
            return call(*args, **kwargs)

        def site(name: str, x: jax.Array, spec: QuantSpec | None, gain: jax.Array | None = None) -> jax.Array:
            if spec is None:
                return x
            return passes[_root(module)].quantized(module, name, x, spec, gain)

        skipped = any(rule.skip and rule.matches(path) for rule in config.rules)
        fused = config.activations if path in config.fused_outputs and not skipped else None
        visit.outputs.add(path)
        if not isinstance(module, LAYERS):
            return site(OUTPUT, call(*args, **kwargs), fused)
        sites = visit.layers.setdefault(path, config.sites(path))
        promote = module.promote_dtype

        def promote_quantized(inputs: jax.Array, kernel: jax.Array, *rest: Any, **options: Any) -> Any:
            gain = _gain(module, kernel) if config.folded else None
            kernel = site(KERNEL, kernel, _kernel_spec(module, sites.weights), gain)
            inputs = site(INPUT, inputs, sites.inputs)
            return promote(inputs, kernel, *rest, **options)

        object.__setattr__(module, "promote_dtype", promote_quantized)
        running.add(id(module))
        try:
            outputs = call(*args, **kwargs)
        finally:
            object.__setattr__(module, "promote_dtype", promote)
            running.discard(id(module))
        return site(OUTPUT, outputs, sites.outputs or fused)

    with nn.intercept_methods(intercept):
        yield visit
    if not visit.layers:
        raise InvalidInput(
            "quant_trim saw no layer. Enter the context inside the jitted function (around a compiled one it "
            "has no effect), and check that the model uses Linen's Conv, Dense, DenseGeneral or Einsum."
        )
    if held and not moved:
        raise InvalidInput(
            f"quant_trim(train=True) could not move {held!r}, nor any other range: call model.apply(..., "
            f'mutable=["{COLLECTION}"]) and keep what it returns, or freeze the ranges with train=False'
        )
    check_rules_used(config, visit.layers)
    if unknown := set(config.fused_outputs) - visit.outputs:
        raise InvalidInput(
            f"QuantConfig.fused_outputs names {sorted(unknown)[0]!r}, and no module of that path was called: "
            "take them from qt.find_fusion(model, variables, input).outputs"
        )


def _root(module: nn.Module) -> int:
    """Identity of the root scope of a module that is being called."""
    assert module.scope is not None
    return id(module.scope.root)


def _kernel_spec(module: nn.Module, spec: QuantSpec | None) -> QuantSpec | None:
    """The spec of a kernel, its axis -1 read as that of the output features."""
    if spec is not None and spec.axis == -1:
        return dataclasses.replace(spec, axis=_feature_axis(module))
    return spec


def _feature_axis(module: nn.Module) -> int:
    """The axis of a kernel's output features; a transposed kernel has them in the last but one."""
    return -2 if getattr(module, "transpose_kernel", False) else -1


def _gain(module: nn.Module, kernel: jax.Array) -> jax.Array:
    """The gains kept beside a layer's ranges, of the kernel's rank."""
    axis = _feature_axis(module)
    shape = (kernel.shape[axis], *(1,) * (-1 - axis))
    gain = module.variable(COLLECTION, GAIN, jnp.ones, shape, jnp.float32).value
    return jax.lax.stop_gradient(jnp.expand_dims(gain, range(kernel.ndim - gain.ndim)))


def attach_statistics(
    model: nn.Module, variables: dict[str, Any], config: QuantConfig, *inputs: Any, **options: Any
) -> dict[str, Any]:
    """The variables of a plain checkpoint, with an empty range for every site of the config; gains are 1.

    Nothing is computed: the model is only traced. Parameters and statistics that are there are kept; the
    first training batch fills the new ranges.

    Args:
      model: any Linen module.
      variables: {"params": ..., and other collections} as `model.init` returns them.
      config: specs and rules.
      *inputs, **options: what `model.apply` takes after the variables (shapes matter, values do not).

    Raises:
      InvalidInput: as `quant_trim`, statistics of the model itself are missing, or it is no Linen module.

    >>> model, x = nn.Dense(2), jnp.ones((1, 3))
    >>> attached = attach_statistics(model, model.init(jax.random.key(0), x), QuantConfig(), x)
    >>> int(attached["batch_stats"]["quant_kernel"]["count"])
    0
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"{type(model).__name__} is no Linen module: qt_jax takes flax.linen modules, which get their "
            "variables in apply. An NNX module is none."
        )

    def forward(variables: dict[str, Any]) -> Any:
        with quant_trim(config, 0.0, train=False):
            return model.apply(variables, *inputs, mutable=[COLLECTION], **options)[1]

    wanted = flatten_dict(jax.eval_shape(forward, variables).get(COLLECTION, {}))
    present = flatten_dict(variables.get(COLLECTION, {}))
    missing = {
        path: jnp.full(leaf.shape, 1 if path[-1] == GAIN else 0, leaf.dtype)
        for path, leaf in wanted.items()
        if path not in present
    }
    foreign = ["/".join(path) for path in missing if not is_range(path)]
    if foreign:
        raise InvalidInput(
            f"the variables lack the model's own statistics {', '.join(foreign[:3])}: pass all that "
            "model.init or the checkpoint holds, not the parameters alone."
        )
    return {**variables, COLLECTION: unflatten_dict({**present, **missing})}
