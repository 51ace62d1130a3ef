"""Quantize a float TFLite file with ai-edge-quantizer, Google's newer quantizer: LiteRT's "aeq" schemes.

Numerics
    The int8 grids are those of TensorFlow's converter. 4-bit weights are symmetric, q = round(w / s) in
    [-8, 7] with s = max|w| / 7, so that -8 never occurs. "octav" clips max|w| to the value c that OCTAV finds
    for each channel (C. Sakr et al., ICML 2022, https://arxiv.org/abs/2206.06501): s = c / 7, and weights
    beyond it saturate, at -8 too. In static schemes only CONV_2D and FULLY_CONNECTED have 4-bit weights.
    Other operators (depthwise convolutions, for example) have 8-bit weights, or stay float if they have no
    int8 kernel. "minmax" takes the extremes of all images. "average" is the tool's default: a moving average
    of each image's extremes that starts with the first image and gives each later one a weight of 0.05, so
    that values beyond it saturate. "dynamic" quantizes inputs to int8 at run time, with 4-bit weights of any
    size in CONV_2D and FULLY_CONNECTED. "stored" only stores 4-bit weights, which a DEQUANTIZE unpacks, and
    computes in float.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qt_jax.backends.protocol import Refused, Scheme

FLOAT = ("litert", "fp32")
"""Backend and scheme of the float TFLite file."""

AVERAGE = "moving average of each image's extremes"

AEQ_SCHEMES = (
    Scheme("int8-aeq-pc-minmax", 8, 8, True, "minmax", source=FLOAT),
    Scheme("int8-aeq-pc-average", 8, 8, True, AVERAGE, source=FLOAT),
    Scheme("int4w-aeq-pc-minmax", 4, 8, True, "minmax", source=FLOAT),
    Scheme("int4w-aeq-pt-minmax", 4, 8, False, "minmax", source=FLOAT),
    Scheme("int4w-aeq-octav-pc-minmax", 4, 8, True, "minmax", source=FLOAT),
    Scheme("int4w-aeq-dynamic", 4, 8, True, dynamic=True, source=FLOAT),
    Scheme("int4w-aeq-octav-dynamic", 4, 8, True, dynamic=True, source=FLOAT),
    Scheme("int4w-aeq-stored", 4, 32, True, source=FLOAT),
    Scheme("int4w-aeq-octav-stored", 4, 32, True, source=FLOAT),
)
"""What ai-edge-quantizer makes of the float file."""


def quantize_file(model: Path, samples: Iterable[Mapping[str, np.ndarray]], scheme: Scheme) -> bytes:
    """Return the TFLite file that ai-edge-quantizer makes of the float one for a scheme.

    Args:
      model: The float TFLite file.
      samples: Calibration samples, each a batch of one for every input, by the names of the file's signature.
        Only a scheme with calibration reads them.
      scheme: One of `AEQ_SCHEMES`.

    Raises:
      Refused: The quantizer does not take the graph.
    """
    from ai_edge_quantizer import calibrator, quantizer, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    _fill(manager, scheme)
    ranges = None
    try:
        tool = quantizer.Quantizer(str(model), manager.get_quantization_recipe())
        if scheme.calibration:
            update = qsv_utils.min_max_update
            if scheme.calibration == AVERAGE:
                update = qsv_utils.moving_average_update
            tracer = calibrator.Calibrator(str(model), num_threads=1, qsv_update_func=update)
            tracer.calibrate({"serving_default": list(samples)}, manager)
            ranges = tracer.get_model_qsvs()
        return bytes(tool.quantize(ranges, enable_progress_report=False).quantized_model)
    except (RuntimeError, ValueError, KeyError) as error:
        raise Refused(f"ai-edge-quantizer: {str(error).strip()[:500]}") from error


def _fill(manager: Any, scheme: Scheme) -> None:
    """Give ai-edge-quantizer's recipe what a scheme asks for."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    algorithms = algorithm_manager.AlgorithmName
    octav = "-octav-" in scheme.name
    algorithm = algorithms.OCTAV if octav else algorithms.MIN_MAX_UNIFORM_QUANT
    granularity = qtyping.QuantGranularity["CHANNELWISE" if scheme.per_channel else "TENSORWISE"]
    operations = qtyping.TFLOperationName
    everything = (".*", operations.ALL_SUPPORTED)
    if scheme.dynamic:
        manager.add_dynamic_config(*everything, scheme.weight_bits, granularity, algorithm)
    elif not scheme.calibration:
        manager.add_weight_only_config(*everything, scheme.weight_bits, granularity, algorithm)
    else:
        manager.add_static_config(*everything, scheme.activation_bits, 8, granularity)
        if scheme.weight_bits == 4:
            for operation in (operations.CONV_2D, operations.FULLY_CONNECTED):
                manager.add_static_config(".*", operation, scheme.activation_bits, 4, granularity, algorithm)
