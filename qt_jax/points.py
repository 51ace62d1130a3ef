"""Hold the quantization points of one forward pass: the ranges they round with, and what moves them.

The range of a point lives in the mutable collection `batch_stats`, under the layer's own path. A pass rounds
with the ranges that it finds. What its points observe moves the ranges when the pass ends, all quantiles
together.

A range belongs to what its layer sees. In training, the layers that one tensor enters, such as the query, key
and value of an attention, share one image and one range, as in a vendor's graph, as long as each of them sees
nothing else in the pass. A layer that is applied to several tensors is marked when its statistics are
attached. It shares with no other layer, and its range holds what it saw of all.

Each lifted body (nn.remat, nn.jit, nn.scan) is traced as a pass of its own. A layer that several bodies reach
keeps in `batch_stats` what the outermost pass has seen so far, so that its range moves once all the same.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope, tracers
from flax.core.scope import Variable

from qt_jax.config import QuantConfig
from qt_jax.errors import InvalidInput
from qt_jax.grid import QuantSpec, fake_quant, fake_quant_on_drawn_grid, grid_key, wide
from qt_jax.interception import COLLECTION, GAIN, INPUT, KERNEL, PASSES, SEVERAL, Call, share_traces
from qt_jax.ranges import Range, Sample, draw, empty_range, hull, hull_over_vmap, lane, ranges, update_range


def root_of(module: nn.Module) -> Scope:
    """Return the root scope of a module that is being called. Each lifted transformation opens one."""
    assert isinstance(module.scope, Scope)
    return module.scope.root


@dataclasses.dataclass
class _Point:
    """Hold what one point of a layer has seen in this pass.

    Attributes:
      scope: Scope of the layer.
      name: Name of the point.
      range: Its range.
      new: Whether the range was made in this pass.
      tensors: The tensors seen, by identity. They are kept, so that no other tensor gets their identity.
      samples: What was drawn of them, if the range moves.
      leader: The point whose image and range this one has taken, or None.
      leads: Whether others have taken its image.
    """

    scope: Scope
    name: str
    range: Variable
    new: bool
    tensors: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    leader: "_Point | None" = None
    leads: bool = False

    @property
    def state(self) -> dict[str, jax.Array] | None:
        """Return what `PASSES` keeps for this point, or None."""
        kept: Any = self.scope.get_variable(COLLECTION, PASSES, {})
        return kept.get(self.name)

    def begun(self) -> Range:
        """Return the range as it was when the outermost pass began."""
        now, state = self.range.value, self.state
        if state is None:
            return now
        return {key: jnp.where(state["open"] > 0, state[f"begun_{key}"], now[key]) for key in now}

    def move(self, low: jax.Array, high: jax.Array, momentum: float) -> None:
        """Move the range by what was seen here, and by other bodies in the outermost pass."""
        begun, state = self.begun(), self.state
        if state is not None:
            opened = state["open"] > 0
            low = jnp.where(opened, jnp.minimum(low, state["seen_low"]), low)
            high = jnp.where(opened, jnp.maximum(high, state["seen_high"]), high)
            kept = {f"begun_{key}": value for key, value in begun.items()}
            self.keep({**kept, "seen_low": low, "seen_high": high, "open": jnp.ones_like(state["open"])})
        self.range.value = update_range(begun, low, high, momentum)

    def keep(self, state: dict[str, jax.Array]) -> None:
        """Replace what `PASSES` keeps for this point."""
        kept: Any = self.scope.get_variable(COLLECTION, PASSES)
        self.scope.put_variable(COLLECTION, PASSES, {**kept, self.name: state})


class _Shared(NamedTuple):
    """Keep the image of a tensor on the grid of the first point that saw it."""

    point: _Point
    image: jax.Array


@dataclasses.dataclass
class ForwardPass:
    """Hold the points of one forward pass while it is traced: the calls within one root scope of Flax.

    A lifted transformation (nn.scan, nn.vmap, nn.remat, nn.map_variables) opens a root scope whose values and
    variables end with it. So does an `apply` inside a module. Each is a separate pass.

    Attributes:
      config: Gives momentum, sample size, axis name and seed. The specs come from the caller.
      lam: Blend coefficient, a float32 scalar.
      train: Whether ranges move where `batch_stats` is mutable.
      trace: The state of JAX's tracing in which the pass was opened.
      lifting: The module around a nested pass that made it, or None. It is named in errors.
      root: The root scope.
      outermost: The pass around all others, which is this one if `lifting` is None.
      reached: How many passes have reached each point, by the path of its layer and by its name, and whether
        its range is new; of the outermost pass.
      arrays: Inputs of the outermost pass and one of its parameters, which tell what JAX maps around it.
      carried: Whether `batch_stats` is mutable in the outermost pass.
      points: The points that were reached, by path.
      drawn: The samples of tensors, by identity and kind of range.
      shared: The images of inputs, by identity and spec.
      frozen_path: Path of a range that was to move in a collection that is not mutable, or None.
    """

    config: QuantConfig
    lam: jax.Array
    train: bool
    trace: Any
    lifting: Call | None
    root: Scope
    outermost: "ForwardPass | None"
    arrays: Sequence[jax.Array]
    carried: bool
    points: dict[str, _Point] = dataclasses.field(default_factory=dict)
    drawn: dict[tuple, Sample] = dataclasses.field(default_factory=dict)
    shared: dict[tuple[int, QuantSpec], _Shared] = dataclasses.field(default_factory=dict)
    frozen_path: str | None = None
    reached: dict[tuple[str, ...], dict[str, tuple[int, bool]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls,
        config: QuantConfig,
        lam: jax.Array,
        train: bool,
        module: nn.Module,
        outer: "ForwardPass | None",
        calls: Sequence[Call],
        arrays: Sequence[jax.Array],
    ) -> "ForwardPass":
        """Open the pass of a module's root scope, inside the outermost pass if there is one.

        Args:
          config, lam, train: As given to `quant_trim`.
          module: The first module that is called in the pass.
          outer: The outermost pass, or None.
          calls: The calls that are running, the outermost first.
          arrays: What the module is called with.
        """
        carried = outer.carried if outer else module.is_mutable_collection(COLLECTION)
        lifting = calls[-1] if outer and calls else None
        if outer is None:
            assert isinstance(module.scope, Scope)
            params = jax.tree.leaves(module.scope.root.variables().get("params", {}))
            floats = [x for x in (*arrays, *params[:1]) if jnp.issubdtype(x.dtype, jnp.number)]
        around = outer.arrays if outer else floats
        trace = tracers.current_trace()
        return cls(config, lam, train, trace, lifting, root_of(module), outer, around, carried)

    @property
    def moves(self) -> bool:
        """Tell whether any range moves when the pass ends."""
        return any(point.samples for point in self.points.values())

    def holds(self, statistics: Range) -> bool:
        """Tell whether a range is among the variables of this pass."""
        own = jax.tree.leaves(self.root.variables().get(COLLECTION, {}))
        return any(leaf is statistics["low"] for leaf in own)

    def quantized(
        self, module: nn.Module, name: str, x: jax.Array, spec: QuantSpec, gain: jax.Array | None = None
    ) -> jax.Array:
        """Return `x` blended with its image on the grid of the range. In training, also observe `x`.

        With a gain g the grid is laid over g x, and the result is x + (fake_quant(g x) - g x) / g. It is `x`
        to the bit at lambda = 0, and has the gradient of `fake_quant`.

        Raises:
          InvalidInput: The module has no statistics for this point, or has them in another shape; or a range
            cannot move.
        """
        where = "/".join((*module.path, name))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InvalidInput(
                f"{where!r} holds {x.dtype} numbers, for which no integer grid exists: leave the layer out "
                f"with qt.Rule({'/'.join(module.path)!r}, skip=True), or the module out of fused_outputs"
            )
        point = self._reached(module, name, where, x, spec)
        trains = self.train and not module.is_initializing()
        moves = trains and module.is_mutable_collection(COLLECTION)
        if trains and not moves:
            if self.outermost and self.carried and self.outermost.holds(point.range.value):
                raise InvalidInput(self._absence(module, where))
            self.frozen_path = self.frozen_path or where
        if moves:
            self._check_trace(where)
        shares = moves and name == INPUT and self._shares(point, where)
        if shares and (found := self.shared.get((id(x), spec))):
            if found.point is not point:
                point.leader, found.point.leads = found.point, True
            return found.image
        with share_traces():
            deployed = x if gain is None else wide(x) * gain
            if moves:
                self._observe(point, name, x, deployed, spec)
            image = self._image(where, deployed, point.begun(), spec, moves)
            if gain is not None:
                delta = (image - deployed) / jnp.where(gain == 0.0, 1.0, gain).astype(image.dtype)
                image = (wide(x) + delta).astype(x.dtype)
        if shares:
            self.shared[id(x), spec] = _Shared(point, image)
        return image

    def _reached(self, module: nn.Module, name: str, where: str, x: jax.Array, spec: QuantSpec) -> _Point:
        """Return the point, with `x` among the tensors that it has seen."""
        point = self.points.get(where)
        if point is None:
            assert isinstance(module.scope, Scope)
            new = not module.scope.has_variable(COLLECTION, name)
            point = _Point(module.scope, name, self._range(module, name, where, x, spec), new)
            self.points[where] = point
        point.tensors[id(x)] = x
        return point

    def _range(self, module: nn.Module, name: str, where: str, x: jax.Array, spec: QuantSpec) -> Variable:
        """Return the range of one point, which is empty if it is new."""
        assert isinstance(module.scope, Scope)
        if not module.is_mutable_collection(COLLECTION) and not module.has_variable(COLLECTION, name):
            raise InvalidInput(self._absence(module, where))
        channels = None if spec.axis is None else x.shape[spec.axis]
        statistics = module.scope.variable(COLLECTION, name, empty_range, channels)
        expected = () if channels is None else (channels,)
        if statistics.value["low"].shape != expected:
            raise InvalidInput(
                f"the statistics of {where!r} have shape {statistics.value['low'].shape}, the config wants "
                f"{expected}: they were made with another axis. Drop them and attach them again."
            )
        return statistics

    def _absence(self, module: nn.Module, where: str) -> str:
        """Say why a point has no range, and what to do."""
        inside = root_of(module).path
        out = f"{'/'.join(inside)}/.*" if 0 < len(inside) < len(module.path) else "/".join(module.path)
        skip = f"leave it out with qt.Rule({out!r}, skip=True)"
        if not self.carried or self.lifting is None:
            return (
                f"no statistics for {where!r} in {COLLECTION!r}. Attach them to a plain checkpoint with "
                "qt.attach_statistics(model, variables, config, input), or pass the collection to apply."
            )
        around, path = type(self.lifting.module).__name__, self.lifting.path
        if path and not inside:
            return (
                f"{where!r} cannot be kept: {path!r} ({around}) applies this layer with variables of its own "
                f"making, which hold no {COLLECTION!r} that changes. Call it as a submodule, or {skip}."
            )
        if isinstance(self.lifting.module, nn.RNN):
            remedy = (
                f'give nn.RNN(cell, variable_axes={{"{COLLECTION}": 0}}), which keeps a range for each step '
                "of sequences of this length"
            )
        else:
            remedy = (
                f'give "{COLLECTION}": 0 among the variable_axes of its nn.scan or nn.vmap, or make it the '
                "carry_variables of its nn.while_loop (nn.WeightNorm and an apply inside a module cannot "
                "carry it)"
            )
        return (
            f"{where!r} cannot be kept: the transformation through which {path or 'the model'!r} ({around}) "
            f"calls it does not carry {COLLECTION!r}, or does not let it change. Either {remedy}, or {skip}."
        )

    def gain(self, module: nn.Module, kernel: jax.Array, axis: int) -> jax.Array:
        """Return the gains that are kept beside a layer's ranges, float32, with the kernel's rank.

        Args:
          module: The layer.
          kernel: Its kernel.
          axis: Axis of the output features, -1 or -2.
        """
        assert isinstance(module.scope, Scope)
        if not module.is_mutable_collection(COLLECTION) and not module.has_variable(COLLECTION, GAIN):
            raise InvalidInput(self._absence(module, "/".join((*module.path, GAIN))))
        shape = (kernel.shape[axis], *(1,) * (-1 - axis))
        gain = module.scope.variable(COLLECTION, GAIN, jnp.ones, shape, jnp.float32).value
        return jax.lax.stop_gradient(jnp.expand_dims(gain, range(kernel.ndim - gain.ndim)))

    def _check_trace(self, where: str) -> None:
        if tracers.current_trace() != self.trace:
            raise InvalidInput(
                f"{where!r} cannot move: its layer is called inside one of JAX's own transformations "
                "(lax.cond, lax.scan, jax.checkpoint, jax.vmap, jax.jit), which Flax does not know of. Use "
                "nn.cond, nn.scan, nn.remat, nn.vmap or nn.jit, with the module as its argument."
            )

    def _shares(self, point: _Point, where: str) -> bool:
        """Tell whether an input may be shared: its layer sees nothing else in this pass.

        Raises:
          InvalidInput: It has been shared, and now its layer sees something else.
        """
        if point.new or point.scope.has_variable(COLLECTION, SEVERAL):
            return False
        if len(point.tensors) == 1:
            return True
        if point.leader or point.leads:
            raise InvalidInput(
                f"the layer of {where!r} sees several tensors in one pass, and its statistics were attached "
                "for one: call qt.attach_statistics again, with the inputs and options of this call. It "
                "keeps what is there."
            )
        self.shared = {key: found for key, found in self.shared.items() if found.point is not point}
        return False

    def _observe(self, point: _Point, name: str, x: jax.Array, deployed: jax.Array, spec: QuantSpec) -> None:
        """Draw a sample of the tensor, unless the point has seen it before."""
        key = (id(x), spec.quantile, spec.symmetric, spec.axis)
        sample = self.drawn.get(key) if deployed is x else None
        if sample is None:
            sample = draw(
                deployed,
                quantile=spec.quantile,
                symmetric=spec.symmetric,
                axis=spec.axis,
                sample_size=self.config.sample_size,
            )
            if deployed is x:
                self.drawn[key] = sample
        if len(point.samples) < len(point.tensors):
            point.samples.append(sample)

    def _image(self, where: str, x: jax.Array, seen: Any, spec: QuantSpec, moves: bool) -> jax.Array:
        """Return `x` blended with its image, or `x` where the range is still empty."""
        lam = jnp.where(seen["count"] > 0, self.lam, jnp.zeros_like(self.lam))
        if spec.grids != "own" and moves:
            key = grid_key(self.config.seed, where, seen["count"])
            return fake_quant_on_drawn_grid(x, seen["low"], seen["high"], spec, lam, key)
        return fake_quant(x, seen["low"], seen["high"], spec, lam)

    def end(self) -> None:
        """Move the ranges by what their points have observed, and mark layers that saw several tensors."""
        moving = [(where, point) for where, point in self.points.items() if point.samples]
        with share_traces():
            bounds = iter(self._bounds(moving))
            outer = None if self.lifting is None else lane(*self.arrays)
            for _, point in moving:
                low, high = hull([next(bounds) for _ in point.samples])
                if outer is not None:
                    average = point.range.value
                    around = {**average, "low": average["low"] + outer}
                    low, high = hull_over_vmap(around, low, high)
                point.move(low, high, self.config.momentum)
        for where, point in self.points.items():
            if point.leader is not None:
                point.range.value = point.leader.range.value
                if point.state is not None and point.leader.state is not None:
                    point.keep(point.leader.state)
            several = where.endswith(INPUT) and len(point.tensors) > 1 and (point.new or not self.train)
            if several and point.scope.is_mutable_collection(COLLECTION):
                point.scope.variable(COLLECTION, SEVERAL, jnp.zeros, (), jnp.int32)

        reached = (self.outermost or self).reached
        for point in self.points.values():
            layer = reached.setdefault(point.scope.path, {})
            times, new = layer.get(point.name, (0, False))
            layer[point.name] = times + 1, new or point.new
        if self.outermost is None and self.root.is_mutable_collection(COLLECTION):
            self._close()

    def _close(self) -> None:
        """End the outermost pass: forget what layers kept of it, and make the place where they need one."""
        for path, points in self.reached.items():
            scope = functools.reduce(lambda scope, name: scope.push(name, reuse=True), path, self.root)
            kept: Any = scope.get_variable(COLLECTION, PASSES, None)
            if kept is not None:
                closed = {
                    name: {**state, "open": jnp.zeros_like(state["open"])} for name, state in kept.items()
                }
                scope.put_variable(COLLECTION, PASSES, closed)
            elif any(times > 1 and (new or not self.train) for times, new in points.values()):
                found: Any = {name: scope.get_variable(COLLECTION, name) for name in points}
                made = {name: unopened(statistics) for name, statistics in found.items() if statistics}
                scope.put_variable(COLLECTION, PASSES, made)

    def _bounds(self, points: Sequence[tuple[str, _Point]]) -> list[tuple[jax.Array, jax.Array]]:
        """Return the robust range of every sample of the points, which are given with their paths.

        Kernels are the same on all devices: their samples are not gathered, for n copies of a sample have
        other quantiles than one.
        """
        kernels = [where.endswith(KERNEL) for where, point in points for _ in point.samples]
        samples = [sample for _, point in points for sample in point.samples]
        if self.config.axis_name is None:
            return ranges(samples)
        alone = iter(ranges([s for s, kernel in zip(samples, kernels, strict=True) if kernel]))
        others = [s for s, kernel in zip(samples, kernels, strict=True) if not kernel]
        try:
            together = iter(ranges(others, self.config.axis_name))
        except NameError as error:
            raise InvalidInput(
                f"QuantConfig.axis_name={self.config.axis_name!r} is not a mapped axis here: it names that "
                "of shard_map or pmap around the whole model; leave it out under plain jit and nn.vmap"
            ) from error
        return [next(alone if kernel else together) for kernel in kernels]


def unopened(statistics: Range) -> dict[str, jax.Array]:
    """Return what `PASSES` keeps of a range while no pass is running."""
    begun = {f"begun_{key}": jnp.zeros_like(value) for key, value in statistics.items()}
    seen = {f"seen_{end}": jnp.zeros_like(statistics[end]) for end in ("low", "high")}
    return {**begun, **seen, "open": jnp.zeros_like(statistics["count"])}
