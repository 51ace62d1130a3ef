"""Apply `--quantizer` in training: the one place where Quant-Trim, LSQ, PACT and Qwix differ."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import qt_jax as qt
from experiments.baselines import learned_ranges
from experiments.baselines.lsq import LSQ
from experiments.baselines.pact import ALPHA, PACT
from experiments.baselines.qwix_qat import qwix_model
from experiments.configs.training import Config, quant_config

LEARNED: dict[str, learned_ranges.LearnedQuantizer] = {"lsq": LSQ, "pact": PACT}
"""Quantizers whose ranges are parameters."""

LEARNED_NAMES = {site.parameter for ranges in LEARNED.values() for site in ranges.values()} - {None}
"""Names of those parameters, beside the kernel."""


def keeps_ranges(config: Config) -> bool:
    """Tell whether the checkpoint holds the ranges of `quant_config`, for evaluation and export."""
    return config.sched != "none" and config.quantizer != "qwix"


def quantization(config: Config, model: nn.Module, image_shape: tuple[int, ...]) -> qt.QuantConfig:
    """Return `quant_config`, with the outputs that vendors requantize if the config asks for them."""
    found = quant_config(config)
    if not config.fused_outputs:
        return found
    return dataclasses.replace(found, fused_outputs=fusion(model, image_shape).outputs)


@functools.lru_cache(maxsize=8)
def fusion(model: nn.Module, image_shape: tuple[int, ...]) -> qt.Fusion:
    """Find what a vendor folds and fuses in the model. Only shapes are traced, once for each model."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return qt.find_fusion(model, variables, images, train=False)


def attach(config: Config, model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """Return the variables with all that the quantizer keeps in them, empty until the first batch."""
    if not keeps_ranges(config):
        return variables
    specs = quantization(config, model, images.shape[1:])
    variables = qt.attach_statistics(model, variables, specs, images)
    if config.folded:
        variables = fusion(model, images.shape[1:]).refresh(variables)
    if config.quantizer not in LEARNED:
        return variables
    params, batch_stats = variables["params"], variables["batch_stats"]
    learned = learned_ranges.attach(LEARNED[config.quantizer], params, batch_stats, specs)
    return {**variables, "params": learned}


def training_forward(config: Config, model: nn.Module, variables: Any, images: jax.Array, lam: jax.Array):
    """Return outputs and updated collections of one training pass, plain if the schedule is `none`."""
    options = {"train": True, "mutable": ["batch_stats"]}
    if config.sched == "none":
        return model.apply(variables, images, **options)
    specs = quantization(config, model, images.shape[1:])
    if config.quantizer == "qwix":
        return qwix_model(model, specs).apply(variables, images, **options)
    if config.quantizer in LEARNED:
        with learned_ranges.learn_ranges(LEARNED[config.quantizer], specs, lam):
            return model.apply(variables, images, **options)
    with qt.quant_trim(specs, lam, train=True):
        return model.apply(variables, images, **options)


def quantized_forward(config: Config, model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Return the outputs of the fully fake-quantized network, with statistics frozen."""
    if config.quantizer == "qwix":
        return qwix_model(model, quant_config(config)).apply(variables, images, train=False)
    with qt.quant_trim(quantization(config, model, images.shape[1:]), 1.0, train=False):
        return model.apply(variables, images, train=False)


def initialize_learned(config: Config, params: Any, before: Any, after: Any) -> Any:
    """Return `params` with the learned ranges that the batch between the two `batch_stats` has initialised.

    None stays None.
    """
    if params is None or config.quantizer not in LEARNED:
        return params
    return learned_ranges.initialize(LEARNED[config.quantizer], params, before, after, quant_config(config))


def publish_learned(config: Config, params: Any, batch_stats: Any) -> Any:
    """Return `batch_stats` that hold the ranges of `params`, the parameters that will be deployed."""
    if config.quantizer not in LEARNED:
        return batch_stats
    return learned_ranges.publish(LEARNED[config.quantizer], params, batch_stats, quant_config(config))


def refresh_gains(config: Config, model: nn.Module, params: Any, batch_stats: Any, image_shape: tuple) -> Any:
    """Return `batch_stats` with the gains of its own batch norm, if grids lie over folded kernels."""
    if not config.folded:
        return batch_stats
    return fusion(model, image_shape).refresh({"params": params, "batch_stats": batch_stats})["batch_stats"]


def plain(params: Any) -> Any:
    """Return `params` as the model's own `init` makes them, without learned ranges."""
    flat = flatten_dict(params)
    own = {path: leaf for path, leaf in flat.items() if path[-1] not in LEARNED_NAMES}
    return params if len(own) == len(flat) else unflatten_dict(own)


def is_decayed(path: tuple, _: Any) -> bool:
    """Tell whether the optimizer decays a leaf of the parameters: kernels, and the alpha of PACT."""
    return path[-1].key in ("kernel", ALPHA)
