"""What `--quantizer` means in training: the one place where Quant-Trim, LSQ, PACT and Qwix differ."""

import dataclasses
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

LEARNED: dict[str, learned_ranges.Quantizer] = {"lsq": LSQ, "pact": PACT}
"""The quantizers whose ranges are parameters."""

LEARNED_NAMES = {site.parameter for ranges in LEARNED.values() for site in ranges.values()} - {None}
"""What those parameters are called, beside the kernel."""


def keeps_ranges(config: Config) -> bool:
    """Whether the checkpoint holds ranges: those of `quant_config`, for evaluation and export."""
    return config.sched != "none" and config.quantizer != "qwix"


def quantization(config: Config, model: nn.Module, image_shape: tuple[int, ...]) -> qt.QuantConfig:
    """`quant_config`, with the outputs that vendors requantize if they are asked for."""
    found = quant_config(config)
    if not config.fused_outputs:
        return found
    return dataclasses.replace(found, fused_outputs=fusion(model, image_shape).outputs)


def fusion(model: nn.Module, image_shape: tuple[int, ...]) -> qt.Fusion:
    """What a vendor folds and fuses of the model; only shapes are traced."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return qt.find_fusion(model, variables, images, train=False)


def attach(config: Config, model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """The variables with all that the quantizer keeps in them, empty until the first batch."""
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
    """Outputs and updated collections of one training pass; a plain pass if the schedule is `none`."""
    options = {"train": True, "mutable": ["batch_stats"]}
    if config.sched == "none":
        return model.apply(variables, images, **options)
    specs = quantization(config, model, images.shape[1:])
    if config.quantizer == "qwix":
        return qwix_model(model, specs).apply(variables, images, **options)
    if config.quantizer in LEARNED:
        with learned_ranges.learned_ranges(LEARNED[config.quantizer], specs, lam):
            return model.apply(variables, images, **options)
    with qt.quant_trim(specs, lam, train=True):
        return model.apply(variables, images, **options)


def quantized_forward(config: Config, model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Outputs of the fully fake-quantized network, with statistics frozen."""
    if config.quantizer == "qwix":
        return qwix_model(model, quant_config(config)).apply(variables, images, train=False)
    with qt.quant_trim(quantization(config, model, images.shape[1:]), 1.0, train=False):
        return model.apply(variables, images, train=False)


def started(config: Config, params: Any, before: Any, after: Any) -> Any:
    """`params` with the learned ranges that the batch between the two `batch_stats` set; None stays None."""
    if params is None or config.quantizer not in LEARNED:
        return params
    return learned_ranges.started(LEARNED[config.quantizer], params, before, after, quant_config(config))


def published(config: Config, params: Any, batch_stats: Any) -> Any:
    """`batch_stats` that hold the ranges of `params`, the parameters that will be deployed."""
    if config.quantizer not in LEARNED:
        return batch_stats
    return learned_ranges.published(LEARNED[config.quantizer], params, batch_stats, quant_config(config))


def with_gains(config: Config, model: nn.Module, params: Any, batch_stats: Any, image_shape: tuple) -> Any:
    """`batch_stats` with the gains of its own batch norm, if grids lie over folded kernels."""
    if not config.folded:
        return batch_stats
    return fusion(model, image_shape).refresh({"params": params, "batch_stats": batch_stats})["batch_stats"]


def plain(params: Any) -> Any:
    """`params` as the model's own `init` has them, without learned ranges."""
    flat = flatten_dict(params)
    own = {path: leaf for path, leaf in flat.items() if path[-1] not in LEARNED_NAMES}
    return params if len(own) == len(flat) else unflatten_dict(own)


def is_decayed(path: tuple, _: Any) -> bool:
    """Whether the optimizer decays a leaf of the parameters: kernels, and the alpha of PACT."""
    return path[-1].key in ("kernel", ALPHA)
