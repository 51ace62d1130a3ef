"""Build the training steps that `experiments.benchmarks.step` compares, from the trainer's own parts.

The variants differ in what wraps the model and in the config. `Unfused`, `WithArithmetic` and `QuantTrimmed`
wrap it; `build` makes all variants of one benchmark. Qwix, AQT and PyTorch are optional: a peer that cannot
be imported is reported as missing.
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import qt_jax as qt
from experiments import models
from experiments.baselines.qwix_qat import qwix_model
from experiments.benchmarks.timing import Variant, peak_bytes
from experiments.configs.training import RECOMMENDED, Config, float_twin, lambda_schedule
from experiments.training.state import TrainState, create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_train_step
from qt_jax.errors import InvalidInput
from qt_jax.interception import Call, intercept, shadowed

IMAGE_SHAPE, MASK_SHAPE, CLASSES = (32, 32, 3), (64, 64, 3), 10
"""Shape of images for classification, for segmentation, and the number of classes of both."""

FP32, UNFUSED, GROUPED = "fp32", "fp32, unfused inputs", "fp32, XLA's grouped convolution"
QUANT_TRIM, PRUNED = "quant-trim", "quant-trim + reverse pruning"
RECIPE = "quant-trim, recommended recipe"
PULL = "quant-trim, a step that prunes"
QWIX, AQT = "qwix", "aqt"
TORCH, TORCH_QAT = "fp32, PyTorch", "PyTorch QAT W8A8"
"""Names of the variants. Those in float begin with "fp32", even where they compute in bfloat16."""

PEERS = ("qwix", "aqt", "torch")
"""Packages of peers."""

AQT_BITS, SPATIAL_AXES = 8, 2
"""Bits of AQT's forward, and its number of spatial axes: height and width."""


def step_config(
    model: str, batch_size: int, dtype: Literal["float32", "bfloat16"], steps_per_dispatch: int = 1
) -> Config:
    """Return the trainer's config with Quant-Trim W8A8 and reverse pruning. Lambda goes from 0 to 1."""
    return Config(
        model=model,
        dataset="composed" if model in models.SEGMENTERS else "cifar10",
        batch_size=batch_size,
        dtype=dtype,
        steps_per_dispatch=steps_per_dispatch,
        reverse_pruning_start=0.0,
        learning_rate=0.01,
    )


def build(
    config: Config, steps: int, packages: Collection[str] = PEERS
) -> tuple[dict[str, Variant], dict[str, tuple[str, str]]]:
    """Build the variants, and return them with the status and the reason of each missing one.

    Args:
      config: Config of Quant-Trim with reverse pruning. Those of the other variants follow from it.
      steps: Steps of the whole training.
      packages: Those of `PEERS` whose steps are built beside ours.
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
        RECIPE: step(
            dataclasses.replace(config, **RECOMMENDED), model, prepare=partial(with_pruning_count, count=1)
        ),
    }
    if config.model.startswith("mobilenet"):
        variants[GROUPED] = step(twin, WithArithmetic(model, jax.lax.conv_general_dilated))
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
        except Exception as error:  # a broken peer costs its own row, not those of the others
            missing[name] = "crashed", f"{package}, {type(error).__name__}: {error}"
    return variants, missing


def compiled_step(
    config: Config,
    model: nn.Module,
    split: Split,
    steps: int,
    prepare: Callable[[TrainState], TrainState] = lambda state: state,
) -> Variant:
    """Compile the trainer's step of a config, and return it with its first state.

    Args:
      config: Config of the run.
      model: Network to train.
      split: Data on the device.
      steps: Steps of the whole training, over which lambda and the learning rate move.
      prepare: As in `Variant`.
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


def random_split(config: Config, image_shape: tuple[int, int, int] | None = None) -> Split:
    """Return two batches of random images, by default of the task's size, with labels or masks."""
    random, n = np.random.default_rng(0), 2 * config.batch_size
    masks = config.model in models.SEGMENTERS
    image_shape = image_shape or (MASK_SHAPE if masks else IMAGE_SHAPE)
    images = random.integers(0, 256, (n, *image_shape), np.uint8)
    if masks:
        return Split(
            jnp.asarray(images), jnp.asarray(random.integers(0, CLASSES, (n, *image_shape[:2]), np.uint8))
        )
    return Split(jnp.asarray(images), jnp.asarray(random.integers(0, CLASSES, n, np.int32)))


def with_pruning_count(state: TrainState, count: int) -> TrainState:
    """Set reverse pruning's counter, which is last in the optimizer's chain, to `count`. At 0 it prunes."""
    *others, pruning = state.opt_state
    return state.replace(opt_state=(*others, pruning._replace(count=jnp.int32(count))))


def _in_torch(model: nn.Module, split: Split, config: Config, *, quantized: bool) -> Variant:
    """Build PyTorch's step and take it once, so that an unsupported one fails here."""
    from experiments.benchmarks.torch_step import torch_step

    images, labels = (np.asarray(rows) for rows in split)
    advance, state = torch_step(model, images, labels, config, quantized=quantized)
    return Variant(advance, advance(state))


def in_float(variant: str) -> bool:
    """Tell whether a variant does not quantize."""
    return variant.startswith(FP32)


def per_channel(variant: str) -> bool | None:
    """Tell whether a variant's weights have a scale per output channel; None where it does not quantize."""
    return None if in_float(variant) else variant in (QWIX, AQT)


class Unfused(nn.Module):
    """Run `model` with the input of every convolution divided by a runtime 1: the stricter FP32 baseline.

    It is the same plain network with one unlucky fusion of XLA's CPU backend broken. The weight gradient of a
    convolution reads its input transposed. XLA:CPU fuses whatever produced that input into the transpose. It
    then computes the residual chain of up to four blocks again, inside a slow loop, which is a quarter of
    ResNet-20's plain step. Anything between the two breaks the chain, including fake quantization. Against
    only the plain step, Quant-Trim would therefore look faster than no quantization at all. Here a division
    by one, which XLA cannot recognise as one, breaks it. Logits and gradients stay the same.
    """

    model: nn.Module

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        one = jnp.maximum(images[0, 0, 0, 0] * 0.0, 1.0)

        def divide(call: Call, /, *args, **kwargs):
            if isinstance(call.module, nn.Conv):
                args = (args[0] / one.astype(args[0].dtype), *args[1:])
            return call(*args, **kwargs)

        with intercept(divide):
            return self.model(images, train=train)


class WithArithmetic(nn.Module):
    """Run `model` with other arithmetic in its layers. Its code and its parameters stay as they are.

    The functions reach `nn.Conv`, `nn.Dense` and `nn.DenseGeneral`, with the projections of attention. They
    do not reach `nn.ConvTranspose` and `nn.Einsum`, which take none.
    """

    model: nn.Module
    conv_general_dilated: Callable
    """Replaces the field of convolutions."""
    dot_general: Callable | None = None
    """Replaces the field of dense layers; None leaves it."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        def inject(call: Call, /, *args, **kwargs):
            fields = {}
            if isinstance(call.module, nn.Conv):
                fields["conv_general_dilated"] = self.conv_general_dilated
            elif self.dot_general is not None and isinstance(call.module, nn.Dense | nn.DenseGeneral):
                fields["dot_general"] = self.dot_general
            with shadowed(call.module, **fields):
                return call(*args, **kwargs)

        with intercept(inject):
            return self.model(images, train=train)


def aqt_model(model: nn.Module) -> WithArithmetic:
    """Return `model` under AQT's quantized training (`aqtp`), with the plain parameters below "model".

    The forward has 8 bits for kernels and inputs, symmetric absmax taken in every step. A kernel has a
    scale per output channel, an input one per example (for dense layers per row). Dense layers multiply int8
    with int32 sums. AQT's convolution rounds to the same integers and multiplies them in the compute type.
    The backward is in float, with the operands as they were before rounding. `config_v4` does that without
    bits for dlhs and drhs. (Its default is 8 bits for dlhs with stochastic rounding, which AQT does not have
    for convolutions.)

    AQT's convolution, as of aqtp 0.9.0, is made for inference. Differentiated as it stands, its rounding has
    gradient zero for kernel and input alike, and AQT's own example of a convolutional network leaves its
    convolutions in float. The backward of convolutions is therefore ours, by the rule of AQT's dense layers.
    `nn.ConvTranspose` and `nn.Einsum` stay in float. Depthwise convolutions are JAX's own grouped ones, not
    the products that replace them on CPUs in `experiments.models.convolution`.

    Raises:
      ImportError: AQT is not installed, or not for this jax.
    """
    from aqt.jax.v2 import aqt_conv_general, config

    convolution = aqt_conv_general.make_conv_general_dilated(
        aqt_conv_general.conv_general_dilated_make(SPATIAL_AXES, AQT_BITS, AQT_BITS)
    )
    dense = config.set_context(
        config.config_v4(fwd_bits=AQT_BITS, dlhs_bits=None, drhs_bits=None), key=None, train_step=None
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

    return WithArithmetic(model, conv_general_dilated, dense)


class QuantTrimmed(nn.Module):
    """Run `model` under `qt.quant_trim`, for configs that the trainer has no flag for.

    The model enters the context by itself, so a trainer that knows nothing of Quant-Trim trains it. The step,
    on which lambda depends, is counted beside the ranges in `batch_stats`.
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
