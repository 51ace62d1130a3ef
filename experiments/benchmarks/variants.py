"""The ways to train that `experiments.benchmarks.step` compares, each built from the trainer's own parts.

The same model with other arithmetic in its layers, through the fields that Linen has for it.

The same plain network with one unlucky fusion of XLA's CPU backend broken: the stricter FP32 baseline.

The weight gradient of a convolution reads its input transposed. XLA:CPU fuses whatever produced that input
into the transpose, and so computes the residual chain of up to four blocks again, inside a slow loop: on
ResNet-20 that is a quarter of the plain step. Anything that stands between the two breaks the chain, fake
quantization too, so against the plain step alone Quant-Trim would look faster than no quantization at all.
Here a division by one, which XLA cannot see to be one, does it. Logits and gradients stay the same.

Quant-Trim inside a model, for quantization configs that the trainer has no flag for.

AQT's quantized training (`aqtp`) in a Linen model, with the parameters of the plain one.

Forward: 8 bits for kernels and inputs, symmetric absmax taken anew in every step, a scale per output channel
of the kernel and one per example (for dense layers per row) of the input. Dense layers multiply int8 with
int32 sums; AQT's convolution rounds to the same integers and multiplies them in the compute type.
Backward: float, by the operands as they were before rounding, which is what `config_v4` does without bits for
dlhs and drhs. (Its default is 8 bits for dlhs, with stochastic rounding; AQT has no such thing for
convolutions.)

AQT's convolution, as of aqtp 0.9.0, is made for inference: differentiated as it stands, its rounding has
gradient zero, for kernel and input alike, and AQT's own example of a convolutional network leaves its
convolutions in float. The backward of convolutions is therefore ours, by the rule of AQT's dense layers.
`nn.ConvTranspose` and `nn.Einsum` stay in float. Depthwise convolutions are JAX's own grouped ones, not the
products that `experiments.models.convolution` puts in their place on CPUs.
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import qt_jax as qt
from experiments import models
from experiments.baselines.qwix_qat import qwix_model
from experiments.benchmarks.timing import Variant, peak_bytes
from experiments.configs.training import Config, float_twin, lambda_schedule
from experiments.training.state import TrainState, create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_train_step
from qt_jax.errors import InvalidInput


class Injected(nn.Module):
    """`model` with these functions in every layer that takes them; its code and parameters stay as they are.

    Reaches `nn.Conv`, and `nn.Dense` and `nn.DenseGeneral` with the projections of attention; not
    `nn.ConvTranspose` and `nn.Einsum`, which take none.
    """

    model: nn.Module
    conv_general_dilated: Callable
    """In place of what a convolution has."""
    dot_general: Callable | None = None
    """In place of what a dense layer has; None leaves it."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        def inject(call, args, kwargs, context):
            module = context.module
            if context.method_name == "__call__":
                if isinstance(module, nn.Conv):
                    object.__setattr__(module, "conv_general_dilated", self.conv_general_dilated)
                elif self.dot_general is not None and isinstance(module, nn.Dense | nn.DenseGeneral):
                    object.__setattr__(module, "dot_general", self.dot_general)
            return call(*args, **kwargs)

        with nn.intercept_methods(inject):
            return self.model(images, train=train)


class Unfused(nn.Module):
    """`model`, with the input of every convolution divided by a runtime 1."""

    model: nn.Module

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        one = jnp.maximum(images[0, 0, 0, 0] * 0.0, 1.0)

        def divide(call, args, kwargs, context):
            if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
                args = (args[0] / one.astype(args[0].dtype), *args[1:])
            return call(*args, **kwargs)

        with nn.intercept_methods(divide):
            return self.model(images, train=train)


class QuantTrimmed(nn.Module):
    """`model` that enters `qt.quant_trim` by itself, so that a trainer who knows nothing of it trains it so.

    The step, on which lambda depends, is counted beside the ranges in `batch_stats`.
    """

    model: nn.Module
    specs: qt.QuantConfig
    lam: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        with qt.quant_trim(self.specs, self.lam(step.value), train=train):
            logits = self.model(images, train=train)
        if train and not self.is_initializing():
            step.value += 1
        return logits


BITS, SPATIAL = 8, 2
"""Of the forward; axes of height and width."""


def aqt_model(model: nn.Module) -> Injected:
    """`model` under AQT, with the parameters of the plain one below "model".

    Raises:
      ImportError: AQT is not installed, or not for this jax.
    """
    from aqt.jax.v2 import aqt_conv_general, config

    convolution = aqt_conv_general.make_conv_general_dilated(
        aqt_conv_general.conv_general_dilated_make(SPATIAL, BITS, BITS)
    )
    dense = config.set_context(
        config.config_v4(fwd_bits=BITS, dlhs_bits=None, drhs_bits=None), key=None, train_step=None
    )

    def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *window: Any, **options: Any) -> jax.Array:
        @jax.custom_vjp
        def product(lhs, rhs):
            return convolution(lhs, rhs, *window, **options)

        def backward(operands, gradient):
            def plain(lhs, rhs):
                return jax.lax.conv_general_dilated(lhs, rhs, *window, **options)

            return jax.vjp(plain, *operands)[1](gradient)

        product.defvjp(lambda lhs, rhs: (product(lhs, rhs), (lhs, rhs)), backward)
        return product(lhs, rhs)

    return Injected(model, conv_general_dilated, dense)


IMAGE_SHAPE, MASK_SHAPE, CLASSES = (32, 32, 3), (64, 64, 3), 10
"""Of classification, of segmentation, of both."""

FP32, UNFUSED, GROUPED = "fp32", "fp32, unfused inputs", "fp32, XLA's grouped convolution"

QUANT_TRIM, PRUNED = "quant-trim", "quant-trim + reverse pruning"

PULL = "quant-trim, a step that prunes"

QWIX, AQT = "qwix", "aqt"

TORCH, TORCH_QAT = "fp32, PyTorch", "PyTorch QAT W8A8"
"""Names of the variants; those in float begin with "fp32", also where they compute in bfloat16."""

PEERS = ("qwix", "aqt", "torch")
"""Packages of peers."""


def random_split(config: Config, image_shape: tuple[int, int, int] | None = None) -> Split:
    """Two batches of random images, by default of the size that the task's have, and labels or masks."""
    random, n = np.random.default_rng(0), 2 * config.batch_size
    masks = config.model in models.SEGMENTERS
    image_shape = image_shape or (MASK_SHAPE if masks else IMAGE_SHAPE)
    images = random.integers(0, 256, (n, *image_shape), np.uint8)
    if masks:
        return Split(
            jnp.asarray(images), jnp.asarray(random.integers(0, CLASSES, (n, *image_shape[:2]), np.uint8))
        )
    return Split(jnp.asarray(images), jnp.asarray(random.integers(0, CLASSES, n, np.int32)))


def compiled_step(
    config: Config,
    model: nn.Module,
    split: Split,
    steps: int,
    prepare: Callable[[TrainState], TrainState] = lambda state: state,
) -> Variant:
    """The trainer's step of a config, compiled, with its first state.

    Args:
      steps: of the whole training, over which lambda and the learning rate move.
      prepare: as `Variant` has it.
    """
    images, shape = len(split.images), split.images.shape[1:]
    mean, std = (0.5,) * shape[-1], (0.25,) * shape[-1]
    tx, lam = optimizer(config, steps), lambda_schedule(config, steps)
    run = make_train_step(config, model, tx, lam, mean, std, CLASSES)
    order, count = epoch_order(config, images, 0), jnp.int32(config.steps_per_dispatch)
    with jax.default_prng_impl("rbg"):  # drawn by threefry, parameters take XLA longer than a small step
        state = create_state(config, model, tx, shape)
    started = time.perf_counter()
    compiled = run.lower(state, Totals.zero(), split, order, count).compile()
    cost = {"compile_seconds": time.perf_counter() - started, "peak_bytes": peak_bytes(compiled)}

    def advance(state: TrainState) -> TrainState:
        return compiled(state, Totals.zero(), split, order, count)[0]

    return Variant(advance, state, prepare, cost, config.steps_per_dispatch, compiled.as_text)


def build(
    config: Config, steps: int, packages: Collection[str] = PEERS
) -> tuple[dict[str, Variant], dict[str, tuple[str, str]]]:
    """The variants in the order in which they take turns; of any that is missing the status and the reason.

    Args:
      config: of Quant-Trim with reverse pruning; the others' follow from it.
      steps: of the whole training.
      packages: those of `PEERS` whose steps are built beside ours.
    """
    model = models.create(config.model, CLASSES, jnp.dtype(config.dtype))
    split = random_split(config)
    step = partial(compiled_step, split=split, steps=steps)
    twin = float_twin(config)
    pruned = step(config, model, prepare=partial(with_pruning_count, count=1))
    pull = pruned._replace(
        state=jax.tree.map(jnp.copy, pruned.state), prepare=partial(with_pruning_count, count=0)
    )
    variants = {FP32: step(twin, model)}
    if jax.default_backend() == "cpu":
        variants[UNFUSED] = step(twin, Unfused(model))
    variants |= {
        QUANT_TRIM: step(dataclasses.replace(config, reverse_pruning=None), model),
        PRUNED: pruned,
        PULL: pull,
    }
    if config.model.startswith("mobilenet"):
        variants[GROUPED] = step(twin, Injected(model, jax.lax.conv_general_dilated))
    peers = {
        QWIX: ("qwix", lambda: step(twin, qwix_model(model))),
        AQT: ("aqt", lambda: step(twin, aqt_model(model))),
        TORCH: ("torch", lambda: _in_torch(model, split, config, quantized=False)),
        TORCH_QAT: ("torch", lambda: _in_torch(model, split, config, quantized=True)),
    }
    missing = {}
    for name, (package, make) in peers.items():
        if package not in packages:
            continue
        try:
            variants[name] = make()
        except ImportError as error:
            missing[name] = "unavailable", f"{package} cannot be imported: {error}"
        except InvalidInput as error:
            missing[name] = "refused", str(error)
        except Exception as error:  # what breaks in a peer costs its own row, not the others'
            missing[name] = "crashed", f"{package}, {type(error).__name__}: {error}"
    return variants, missing


def _in_torch(model: nn.Module, split: Split, config: Config, *, quantized: bool) -> Variant:
    """PyTorch's step, taken once, so that what it cannot do shows here."""
    from experiments.benchmarks.torch_step import torch_step

    images, labels = (np.asarray(rows) for rows in split)
    advance, state = torch_step(model, images, labels, config, quantized=quantized)
    return Variant(advance, advance(state))


def with_pruning_count(state: TrainState, count: int) -> TrainState:
    """The state with reverse pruning's counter, last in the optimizer's chain, at `count`; 0 is due."""
    *others, pruning = state.opt_state
    return state.replace(opt_state=(*others, pruning._replace(count=jnp.int32(count))))


def in_float(variant: str) -> bool:
    """Whether a variant does not quantize."""
    return variant.startswith(FP32)


def per_channel(variant: str) -> bool | None:
    """Whether a variant's weights have a scale per output channel; None where it does not quantize."""
    return None if in_float(variant) else variant in (QWIX, AQT)
