"""Train one hardware-neutral FP32 checkpoint for every low-bit compiler: Quant-Trim for JAX and Flax.

`import qt_jax as qt` gives the public names below. Training uses `quant_trim` under a schedule of lambda
(`schedules`), `attach_statistics` and `reverse_pruning`. `to_onnx` exports the result in floating point, and
`to_qdq` on integers. `equalize` rescales the channels of a float graph without changing its function.
`evaluate` runs a graph through vendors' toolchains. Each name is at home in the module that it is imported
from here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qt_jax import metrics, recipes, schedules
    from qt_jax.backends import evaluate
    from qt_jax.batch_norm import reestimate as reestimate_batch_norm
    from qt_jax.config import INHERIT, QuantConfig, Rule
    from qt_jax.equalization.neutral import equalize
    from qt_jax.errors import InvalidInput
    from qt_jax.export import to_onnx, to_qdq
    from qt_jax.fusion import Fusion, find_fusion
    from qt_jax.grid import QuantSpec, blend, dequantize, fake_quant, quantization_parameters, quantize
    from qt_jax.layer_coverage import coverage
    from qt_jax.pruning import reverse_pruning
    from qt_jax.ranges import observe, quantiles, subsample
    from qt_jax.trim import attach_statistics, quant_trim

__version__ = "0.1.0"

_HOMES = {
    "backends": ("evaluate",),
    "config": ("INHERIT", "QuantConfig", "Rule"),
    "equalization.neutral": ("equalize",),
    "errors": ("InvalidInput",),
    "export": ("to_onnx", "to_qdq"),
    "fusion": ("Fusion", "find_fusion"),
    "grid": ("QuantSpec", "blend", "dequantize", "fake_quant", "quantization_parameters", "quantize"),
    "layer_coverage": ("coverage",),
    "pruning": ("reverse_pruning",),
    "ranges": ("observe", "quantiles", "subsample"),
    "trim": ("attach_statistics", "quant_trim"),
}
"""Maps modules to the public names that they hold.

A name is imported on its first use. A command thus loads what it needs: training loads no onnx.
"""

_MODULES = {"batch_norm", "metrics", "recipes", "schedules", *_HOMES} - {"equalization.neutral"}
"""Modules that are attributes of the package from the start."""

__all__ = [
    "INHERIT",
    "Fusion",
    "InvalidInput",
    "QuantConfig",
    "QuantSpec",
    "Rule",
    "attach_statistics",
    "blend",
    "coverage",
    "dequantize",
    "equalize",
    "evaluate",
    "fake_quant",
    "find_fusion",
    "metrics",
    "observe",
    "quant_trim",
    "quantiles",
    "quantization_parameters",
    "quantize",
    "recipes",
    "reestimate_batch_norm",
    "reverse_pruning",
    "schedules",
    "subsample",
    "to_onnx",
    "to_qdq",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"qt_jax.{name}")
    if name == "reestimate_batch_norm":
        name, home = "reestimate", "batch_norm"
    else:
        homes = [module for module, names in _HOMES.items() if name in names]
        if not homes:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = homes[0]
    return getattr(importlib.import_module(f"qt_jax.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
