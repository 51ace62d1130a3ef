"""Train a Linen model under Quant-Trim: fake-quantize its layers, blended by lambda.

`quant_trim` is a context around a forward pass. Every kernel-bearing Linen layer hands its input and its
kernel to the field `promote_dtype` just before it multiplies them. Inside the context that field is shadowed,
for the length of one call, by a function that fake-quantizes both. The rounding is that of
`qt_jax.grid.fake_quant`, and lambda is blended in `qt_jax.grid.blend`. The model's code and its parameters
stay as they are.

Each tensor that is put on a grid is a quantization point. Its range lives in the mutable collection
`batch_stats`, under the layer's own path. A `ForwardPass` holds the points of one pass while it is traced: it
takes all quantiles together when the pass ends. In training, a tensor that enters several layers, such as
that of an attention's queries, keys and values, is put on one grid once, as a vendor's compiler does it.

`attach_statistics` makes the ranges for a checkpoint that has none yet.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.config import QuantConfig, Sites, check_rules_used
from qt_jax.errors import InvalidInput
from qt_jax.grid import QuantSpec, fake_quant, fake_quant_on_drawn_grid, grid_key
from qt_jax.interception import (
    COLLECTION,
    GAIN,
    INPUT,
    KERNEL,
    LAYERS,
    OUTPUT,
    Call,
    intercept,
    is_quant_trim_statistic,
    shadowed,
)
from qt_jax.ranges import Sample, draw, empty_range, ranges, update_range


@dataclasses.dataclass
class Visit:
    """List what one trace inside the context saw.

    Attributes:
      layers: The sites of every layer that was reached, by path.
      outputs: The paths of all modules that were called.
    """

    layers: dict[str, Sites] = dataclasses.field(default_factory=dict)
    outputs: set[str] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def quant_trim(config: QuantConfig, lam: jax.Array | float, *, train: bool) -> Iterator[Visit]:
    """Fake-quantize every layer that is applied inside the context, blended by lambda.

    At every site x_tilde = x + lambda * stop_gradient(x_hat - x) (Quant-Trim, arXiv 2511.15300, progressive
    fake quantization). The grid is that of the range that `batch_stats` holds when the pass begins. What the
    pass observes moves the range when the pass ends, for the next one. The grids are thus known before the
    tensors: rounding fuses with the operation that computes the tensor, and all quantiles are taken together.
    A site that has not observed anything yet, as in the first step, passes its tensor through.

    The body of a lifted transformation, such as nn.scan or nn.remat, counts as a separate pass. So does each
    submodule that is called through a `method=` which is a plain function, not a method of the model.

    Enter the context inside the function that is jitted. Around a function that is already compiled it has no
    effect, and raises. `lam` may be traced, so that a moving lambda costs no recompilation. Attach the
    statistics first: a training step that has to create them returns another tree than it was given, and is
    traced twice.

    Args:
      config: Specs and rules.
      lam: Blend coefficient in [0, 1], a Python float or a scalar array.
      train: True to update the ranges, False to freeze them. Ranges are updated only where `batch_stats` is
        mutable. At least one call inside the context must make it mutable, except during `init`.

    Yields:
      A `Visit` that lists the layers reached, by path.

    Raises:
      InvalidInput: Lambda is out of range, a rule matches no layer, no layer is reached, statistics are
        absent from the variables or have another shape than the config wants, or no range could move
        although `train` is True.

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
    trim = _Trim(config, jnp.asarray(lam, jnp.float32), train)
    with intercept(trim.run_pass, every_method=True), intercept(trim.quantize):
        yield trim.visit
    trim.check()


@dataclasses.dataclass
class _Trim:
    """Handle the calls inside one `quant_trim` context.

    Attributes:
      config, lam, train: As given to `quant_trim`, lambda as a float32 scalar.
      visit: What was seen so far.
      passes: The forward passes that are running, by root scope.
      moved: Whether any range moved.
      frozen_path: Path of a range that was to move in a collection that is not mutable, or None.
    """

    config: QuantConfig
    lam: jax.Array
    train: bool
    visit: Visit = dataclasses.field(default_factory=Visit)
    passes: dict[int, "ForwardPass"] = dataclasses.field(default_factory=dict)
    moved: bool = False
    frozen_path: str | None = None

    def run_pass(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Open a forward pass around the first call within a root scope, and move its ranges at the end."""
        root = _root(call.module)
        if root in self.passes:
            return call(*args, **kwargs)
        running = self.passes[root] = ForwardPass(self.config, self.lam, self.train)
        try:
            outputs = call(*args, **kwargs)
            running.end()
        finally:
            del self.passes[root]
        self.moved = self.moved or bool(running.observed)
        self.frozen_path = self.frozen_path or running.frozen_path
        return outputs

    def quantize(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Run one module with its kernel, its input and its output on their grids, as the config says."""
        module, path = call.module, call.path
        skipped = any(rule.skip and rule.matches(path) for rule in self.config.rules)
        fused = self.config.activations if path in self.config.fused_outputs and not skipped else None
        self.visit.outputs.add(path)
        if not isinstance(module, LAYERS):
            return self._point(module, OUTPUT, call(*args, **kwargs), fused)
        sites = self.visit.layers.setdefault(path, self.config.sites(path))
        promote = module.promote_dtype

        def promote_quantized(inputs: jax.Array, kernel: jax.Array, *rest: Any, **options: Any) -> Any:
            gain = _gain(module, kernel) if self.config.folded else None
            kernel = self._point(module, KERNEL, kernel, _kernel_spec(module, sites.weights), gain)
            inputs = self._point(module, INPUT, inputs, sites.inputs)
            return promote(inputs, kernel, *rest, **options)

        with shadowed(module, promote_dtype=promote_quantized):
            outputs = call(*args, **kwargs)
        return self._point(module, OUTPUT, outputs, sites.outputs or fused)

    def _point(
        self,
        module: nn.Module,
        name: str,
        x: jax.Array,
        spec: QuantSpec | None,
        gain: jax.Array | None = None,
    ) -> jax.Array:
        if spec is None:
            return x
        return self.passes[_root(module)].quantized(module, name, x, spec, gain)

    def check(self) -> None:
        """Raise InvalidInput if the context had no effect, or not the effect that was asked for."""
        if not self.visit.layers:
            raise InvalidInput(
                "quant_trim saw no layer. Enter the context inside the jitted function (around a compiled "
                "one it has no effect), and check that the model uses Linen's Conv, Dense, DenseGeneral or "
                "Einsum."
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


def _root(module: nn.Module) -> int:
    """Return the identity of the root scope of a module that is being called."""
    assert module.scope is not None
    return id(module.scope.root)


def _gain(module: nn.Module, kernel: jax.Array) -> jax.Array:
    """Return the gains that are kept beside a layer's ranges, with the kernel's rank."""
    axis = _feature_axis(module)
    shape = (kernel.shape[axis], *(1,) * (-1 - axis))
    gain = module.variable(COLLECTION, GAIN, jnp.ones, shape, jnp.float32).value
    return jax.lax.stop_gradient(jnp.expand_dims(gain, range(kernel.ndim - gain.ndim)))


def _feature_axis(module: nn.Module) -> int:
    """Return the axis of a kernel's output features: the last, or the last but one if it is transposed."""
    return -2 if getattr(module, "transpose_kernel", False) else -1


def _kernel_spec(module: nn.Module, spec: QuantSpec | None) -> QuantSpec | None:
    """Return the spec of a kernel, with axis -1 read as that of the output features."""
    if spec is not None and spec.axis == -1:
        return dataclasses.replace(spec, axis=_feature_axis(module))
    return spec


class _Shared(NamedTuple):
    """Keep a layer's input and its image on the grid, for the other layers that the input enters."""

    tensor: jax.Array
    image: jax.Array
    leader: nn.Variable


@dataclasses.dataclass
class ForwardPass:
    """Hold the points of one forward pass while it is traced: the calls within one root scope of Flax.

    A lifted transformation (nn.scan, nn.vmap, nn.remat, nn.map_variables) opens a root scope whose values and
    variables end with it. So does an `apply` inside a module. Each is a separate pass.

    Attributes:
      config: Gives momentum, sample size, axis name and seed. The specs come from the caller.
      lam: Blend coefficient, a float32 scalar.
      train: Whether ranges move where `batch_stats` is mutable.
      observed: The ranges that move at the end, each with the sample that its point has drawn.
      shared: Inputs that are on their grids, by identity and spec. Each input is kept, so that no other
        tensor gets its identity.
      leaders: Maps the path of an input's point to the range that it moves: its own, or the range of the
        point whose image it has taken.
      followers: Maps each follower's range to the leader's range, which it copies when the pass ends.
      frozen_path: Path of a range that was to move in a collection that is not mutable, or None.
    """

    config: QuantConfig
    lam: jax.Array
    train: bool
    observed: list[tuple[nn.Variable, Sample]] = dataclasses.field(default_factory=list)
    shared: dict[tuple[int, QuantSpec], _Shared] = dataclasses.field(default_factory=dict)
    leaders: dict[str, nn.Variable] = dataclasses.field(default_factory=dict)
    followers: list[tuple[nn.Variable, nn.Variable]] = dataclasses.field(default_factory=list)
    frozen_path: str | None = None

    def quantized(
        self, module: nn.Module, name: str, x: jax.Array, spec: QuantSpec, gain: jax.Array | None = None
    ) -> jax.Array:
        """Return `x` blended with its image on the grid of its range. In training, also observe `x`.

        In training the first layer that an input enters leads. Other layers of the same spec follow it,
        unless they have had another input before: they take the leader's image, and from then on hold its
        range. With frozen ranges each layer rounds with its own range, which after a step of training is
        the leader's.

        With a gain g the grid is laid over g x, and the result is x + (fake_quant(g x) - g x) / g. It is `x`
        to the bit at lambda = 0, and has the gradient of `fake_quant`.

        Raises:
          InvalidInput: The module has no statistics for this point, or has them in another shape.
        """
        where = "/".join((*module.path, name))
        statistics = _statistics(module, name, where, x, spec)
        trains = self.train and not module.is_initializing()
        moves = trains and module.is_mutable_collection(COLLECTION)
        if trains and not moves:
            self.frozen_path = where
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
        """Move the ranges by what their points have observed."""
        found = ranges([sample for _, sample in self.observed], self.config.axis_name)
        for (statistics, _), (low, high) in zip(self.observed, found, strict=True):
            statistics.value = update_range(statistics.value, low, high, self.config.momentum)
        for statistics, leader in self.followers:
            statistics.value = leader.value


def _statistics(module: nn.Module, name: str, where: str, x: jax.Array, spec: QuantSpec) -> nn.Variable:
    """Return the range of one point, which is empty if it is new."""
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
            f"{expected}: they were made with another axis. Drop them and attach them again."
        )
    return statistics


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
      *inputs, **options: What `model.apply` takes after the variables. Shapes matter, values do not.

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
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"{type(model).__name__} is not a Linen module: qt_jax takes flax.linen modules, which get their "
            "variables in apply. NNX modules are not supported."
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
    foreign = ["/".join(path) for path in missing if not is_quant_trim_statistic(path)]
    if foreign:
        raise InvalidInput(
            f"the variables lack the model's own statistics {', '.join(foreign[:3])}: pass all that "
            "model.init or the checkpoint holds, not only the parameters."
        )
    return {**variables, COLLECTION: unflatten_dict({**present, **missing})}
