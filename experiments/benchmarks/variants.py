"""The ways to train that `experiments.benchmarks.step` compares, each built from the trainer's own parts."""

import dataclasses
import time
from collections.abc import Callable, Collection
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import models
from experiments.baselines.qwix_qat import qwix_model
from experiments.benchmarks.aqt_qat import aqt_model
from experiments.benchmarks.injected import Injected
from experiments.benchmarks.timing import Variant, peak_bytes
from experiments.benchmarks.unfused import Unfused
from experiments.configs.cifar import Config, float_twin, lambda_schedule
from experiments.training.state import TrainState, create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_train_step
from qt_jax.errors import InvalidInput

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
