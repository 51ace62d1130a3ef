"""Train with a whole recipe: one frozen object that holds all settings, and the functions of a training loop.

A `Recipe` knows the model, the quantization points, the schedule of lambda, the reverse pruning and what
folding does, so that no two of them can contradict each other. `published` and `recommended` make one. All
that it does can also be done with `quant_trim`, `attach_statistics`, `find_fusion` and `reverse_pruning`.

`published` is Quant-Trim as in arXiv 2511.15300. `recommended` is what this package recommends: the grids lie
where vendors quantize.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax import schedules
from qt_jax.batch_norm import reestimate
from qt_jax.config import QuantConfig, Rule
from qt_jax.errors import InvalidInput
from qt_jax.fusion import Fusion, find_fusion
from qt_jax.grid import QuantSpec
from qt_jax.interception import COLLECTION, KERNEL, STEP
from qt_jax.pruning import reverse_pruning
from qt_jax.trim import attach_statistics, quant_trim

Variables = dict[str, Any]
"""Flax collections."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Hold the settings of one training. Every method is a pure function of what it is given.

    The number of steps taken is kept in `batch_stats`, beside the ranges: checkpoints hold it, and a training
    that is resumed goes on with the right lambda.

    Attributes:
      model: The Linen module that is trained.
      config: Quantization points.
      lam: Schedule of lambda, `step -> lambda`.
      pruning: Settings of `reverse_pruning`, by name; None trains without it.
      fusion: What a vendor folds and fuses; None for grids on raw kernels.
      reestimates: Whether `finish` measures batch norm again.
      inputs, options: What `model.apply` takes after the variables in inference. Shapes matter.

    >>> model, x = nn.Dense(2), jnp.ones((4, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> recipe = published(model, variables, x, steps=10)
    >>> variables = recipe.attach(variables)
    >>> tx = optax.chain(optax.sgd(0.1), recipe.reverse_pruning())
    >>> y, new = recipe.apply(variables, x, mutable="batch_stats")
    >>> variables = recipe.advance({**variables, **new})
    >>> int(recipe.step(variables))
    1
    """

    model: nn.Module
    config: QuantConfig
    lam: optax.Schedule
    pruning: Mapping[str, Any] | None
    fusion: Fusion | None
    reestimates: bool
    inputs: tuple[Any, ...]
    options: Mapping[str, Any]

    def attach(self, variables: Mapping[str, Any], **options: Any) -> Variables:
        """Return the variables with an empty range for every point, the gains, and the step 0.

        What is there is kept, so that it does nothing to variables of an interrupted training.

        Args:
          variables: Those of a plain checkpoint, or of an interrupted training.
          **options: What replaces the recipe's options, such as `train=True` with `rngs` for a model that
            uses a layer more often in training.

        Raises:
          InvalidInput: As `attach_statistics`.
        """
        attached = attach_statistics(
            self.model, dict(variables), self.config, *self.inputs, **{**self.options, **options}
        )
        statistics = {STEP: jnp.zeros((), jnp.int32), **attached[COLLECTION]}
        return self._refreshed({**attached, COLLECTION: statistics})

    def step(self, variables: Mapping[str, Any]) -> jax.Array:
        """Return the number of steps that `advance` has counted, an int32 scalar.

        Raises:
          InvalidInput: The variables hold no step.
        """
        try:
            return variables[COLLECTION][STEP]
        except KeyError:
            raise InvalidInput(
                f"the variables hold no {STEP!r} in {COLLECTION!r}: call recipe.attach(variables) before "
                "training, and pass all that apply returned to recipe.advance"
            ) from None

    def apply(self, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Any:
        """Call `model.apply` in training: fake-quantized, blended by the lambda of the step.

        Args:
          variables: From `attach` or `advance`.
          *inputs, **options: As for `model.apply`, with `batch_stats` mutable.

        Returns:
          What `model.apply` returns.
        """
        with self.context(self.step(variables)):
            return self.model.apply(variables, *inputs, **options)

    def quantized(self, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Any:
        """Call `model.apply` for evaluation: fully fake-quantized, with frozen ranges.

        A range that has seen no batch yet leaves its tensor in float.
        """
        with quant_trim(self.config, 1.0, train=False):
            return self.model.apply(variables, *inputs, **options)

    def context(self, step: jax.Array | int) -> Any:
        """Return the `quant_trim` context of one training step, for a loop that counts its own steps."""
        return quant_trim(self.config, self.lam(step), train=True)

    def reverse_pruning(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """Return the optax transformation of the recipe, which comes last in the chain.

        Only what freezes weights comes after it. Kernels that the config leaves in float are not pruned. Pass
        it the new statistics: `tx.update(grads, opt_state, params, **new)` with the collections that
        `apply` has returned.

        Args:
          **changes: Settings of `qt.reverse_pruning` that replace the recipe's, such as `mask`.
        """
        if self.pruning is None:
            return optax.with_extra_args_support(optax.identity())

        def quantized(path: tuple[str, ...], leaf: Any) -> bool:
            return path[-1:] == ("kernel",) and self.config.sites("/".join(path[:-1])).weights is not None

        return reverse_pruning(**{"mask": quantized, **self.pruning, **changes})

    def advance(self, variables: Mapping[str, Any]) -> Variables:
        """Return the variables after an update: the step counted, and the gains those of the new batch norm.

        Call it once for every update of the parameters, on all collections.
        """
        statistics = {**variables[COLLECTION], STEP: self.step(variables) + 1}
        return self._refreshed({**variables, COLLECTION: statistics})

    def _refreshed(self, variables: Mapping[str, Any]) -> Variables:
        return dict(variables) if self.fusion is None else self.fusion.refresh(variables)

    def finish(
        self,
        variables: Mapping[str, Any],
        batches: Iterable[Any],
        *,
        forward: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]] | None = None,
        **options: Any,
    ) -> Variables:
        """Return the variables to deploy.

        If the recipe says so, batch norm is measured again in the float network. Gains and ranges of kernels
        follow. The step is dropped, so that the result can start another training.

        Args:
          variables: After the last `advance`.
          batches: Inputs of the model, or tuples of them, as for inference; see `qt.reestimate_batch_norm`.
          forward: What `qt.reestimate_batch_norm` takes, for a model that needs more than its inputs, such as
            a mapped axis. By default `model.apply` in training mode.
          **options: What `model.apply` takes in training mode, such as `train=True`.

        Raises:
          InvalidInput: The steps were not counted, the network was not quantized in training, batches is an
            array, or as `qt.reestimate_batch_norm`.
        """
        self._check_trained(variables)
        statistics = {name: leaf for name, leaf in variables[COLLECTION].items() if name != STEP}
        variables = {**variables, COLLECTION: statistics}
        if not self.reestimates:
            return variables
        if hasattr(batches, "shape"):
            raise InvalidInput("batches must be a list of batches, got one array: give [images]")

        def apply(variables: Any, batch: Any) -> Any:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            return self.model.apply(variables, *inputs, mutable=[COLLECTION], **options)

        measured = reestimate(forward or apply, variables, batches)
        if self.fusion is None:
            return measured
        return refolder(self.model, self.config, self.fusion, *self.inputs, **self.options)(measured)

    def _check_trained(self, variables: Mapping[str, Any]) -> None:
        step = int(self.step(variables))
        if not np.any(self.lam(np.arange(step + 1))):
            raise InvalidInput(
                f"{step} steps were counted, and lambda is still 0: call recipe.advance on the variables "
                "after every update, and give the recipe the steps of the whole training"
            )
        counts = [leaf for path, leaf in flatten_dict(variables[COLLECTION]).items() if path[-1] == "count"]
        if counts and not any(np.any(count) for count in counts):
            raise InvalidInput(
                "no range has seen a batch: call recipe.apply in training, in place of model.apply, and pass "
                "the collections that it returns to recipe.advance"
            )


def published(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    steps: int,
    bits: int = 8,
    rules: tuple[Rule, ...] = (),
    **options: Any,
) -> Recipe:
    """Return Quant-Trim as published (arXiv 2511.15300).

    Grids lie over raw kernels and over the inputs of layers, with ranges from the quantile 0.999. Reverse
    pruning pulls kernels back to their quantile 0.95, after a warm-up of a fifth of the steps.

    Args:
      model: Any Linen module.
      variables: Its collections. Shapes matter, values do not.
      *inputs, **options: What `model.apply` takes after the variables in inference.
      steps: Number of updates of the whole training.
      bits: Width of the weights.
      rules: Exceptions for single layers.
    """
    del variables  # taken as by `recommended`
    return Recipe(
        model,
        QuantConfig(weights=QuantSpec(bits), rules=rules),
        schedules.warmup_quartic_quadratic(steps),
        pruning={"quantile": 0.95, **_when(steps)},
        fusion=None,
        reestimates=False,
        inputs=_shapes(inputs),
        options=options,
    )


def recommended(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    steps: int,
    bits: int = 8,
    rules: tuple[Rule, ...] = (),
    **options: Any,
) -> Recipe:
    """Return the recipe that this package recommends: Quant-Trim at the points where vendors quantize.

    It differs from `published` in four ways. Grids and reverse pruning apply to the kernels as vendors fold
    them, with the gain of their batch norm. Reverse pruning takes the quantile 0.97 and spreads its bounds,
    so that no plateau of weights meets the end of a grid. The ranges of activations are their extremes. Batch
    norm is measured again at the end, in the float network. Below 8 bits every step draws one of the grids
    that vendors use.

    Args:
      model, variables, *inputs, steps, bits, rules, **options: As for `published`.

    Raises:
      InvalidInput: As `find_fusion`.
    """
    activations = QuantSpec(8, symmetric=False, quantile=1.0)
    weights = QuantSpec(bits, axis=-1, quantile=1.0, grids="vendors") if bits < 8 else QuantSpec(bits)
    return Recipe(
        model,
        QuantConfig(weights=weights, activations=activations, rules=rules, folded=True),
        schedules.warmup_quartic_quadratic(steps),
        pruning={"quantile": 0.97, "spread": 0.13, "folded": True, **_when(steps)},
        fusion=find_fusion(model, variables, *inputs, **options),
        reestimates=True,
        inputs=_shapes(inputs),
        options=options,
    )


def _when(steps: int) -> dict[str, int]:
    """Return when to prune: after the warm-up of lambda, every 50 steps or thirty times in a short run."""
    return {"start": steps // 5, "every": max(1, min(50, steps // 30))}


def _shapes(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs without their values, which a recipe need not keep alive."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf

    return jax.tree.map(shape, inputs)


def refolder(
    model: nn.Module, config: QuantConfig, fusion: Fusion, *inputs: Any, **options: Any
) -> Callable[[Mapping[str, Any]], Variables]:
    """Build a function that returns variables with the gains and kernel ranges that their batch norm implies.

    It is compiled once for all variables of one model. Ranges of activations stay as they are.

    Args:
      model, config, fusion: As in training.
      *inputs, **options: What `model.apply` takes after the variables in inference. Shapes matter.
    """
    kernels = dataclasses.replace(
        config,
        activations=None,
        outputs=None,
        fused_outputs=(),
        axis_name=None,
        rules=tuple(dataclasses.replace(rule, inputs=None, outputs=None) for rule in config.rules),
    )

    @jax.jit
    def observe(variables: Any) -> Any:
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf, inputs
        )
        with quant_trim(kernels, 0.0, train=True):
            return model.apply(variables, *zeros, mutable=[COLLECTION], **options)[1][COLLECTION]

    def refold(variables: Mapping[str, Any]) -> Variables:
        variables = fusion.refresh(variables)
        statistics = flatten_dict(variables[COLLECTION])
        unseen = {
            path: jnp.zeros_like(leaf) if KERNEL in path and path[-1] == "count" else leaf
            for path, leaf in statistics.items()
        }
        observed = flatten_dict(observe({**variables, COLLECTION: unflatten_dict(unseen)}))
        kept = {path: observed[path] if KERNEL in path else leaf for path, leaf in statistics.items()}
        return {**variables, COLLECTION: unflatten_dict(kept)}

    return refold
