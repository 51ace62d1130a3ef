"""Estimate what an inference costs in energy and money: by counters where they can be read, else by models.

Energy model
    E = MACs (e_mul + e_add) + weight bytes e_DRAM + 2 activation bytes e_SRAM. Every weight is fetched from
    DRAM once per image. Every layer's output is written to a 1 MB SRAM once and read from it once. The
    constants are those of a 45 nm process at 0.9 V, from M. Horowitz, "Computing's energy problem (and what
    we can do about it)", ISSCC 2014:

    - Integer multiplication: 0.2 pJ at 8 bits, taken as proportional to the product of the operands' bits.
    - Integer addition: 0.1 pJ at 32 bits.
    - Float multiply and add: 3.7 + 0.9 pJ at 32 bits, 1.1 + 0.4 pJ at 16 bits.
    - 64 bits from a 1 MB SRAM: 100 pJ. From DRAM: 1.3 nJ, the lower end of the range given.

    The model ranks schemes of one network. It makes no statement about any chip.

Price model
    USD per million inferences = price of an hour / (3600 throughput) x 1e6. The default price is 0.05 USD per
    virtual CPU and hour, a round figure for rented servers, not a quotation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from qt_jax.backends.protocol import Scheme
from qt_jax.export import graph
from qt_jax.export.operators import WEIGHTED, multiply_accumulates

PICOJOULE = 1e-9
"""Millijoules in one picojoule."""
FLOAT_MAC = {32: 3.7 + 0.9, 16: 1.1 + 0.4}
"""Bits -> picojoules of a float multiply and add."""
SRAM_BYTE, DRAM_BYTE = 100 / 8, 1300 / 8
"""Picojoules of one byte."""
MODEL = "model: Horowitz, ISSCC 2014, 45 nm"
COUNTER = "RAPL, all CPU packages, batch 1"
PRICE_PER_CPU_HOUR = 0.05
"""USD."""


@dataclass(frozen=True)
class Work:
    """Count what one image needs, whatever the bits.

    Attributes:
      macs: Multiply-accumulates.
      weights: Elements of kernels.
      activations: Elements of the outputs of layers.
    """

    macs: int
    weights: int
    activations: int


def work(model: onnx.ModelProto) -> Work | None:
    """Count the work of a graph's convolutions and matmuls; None if a shape is unknown.

    >>> import onnx.parser
    >>> graph = 'g (float[b, 3] x) => (float[b, 2] y) <float[3, 2] k = {1,2,3,4,5,6}> { y = MatMul(x, k) }'
    >>> work(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}'))
    Work(macs=6, weights=6, activations=2)
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    macs = multiply_accumulates(inferred)
    if macs is None:
        return None
    shapes = graph.shapes(inferred)
    weighted = [node for node in model.graph.node if node.op_type in WEIGHTED]
    constants = {tensor.name for tensor in model.graph.initializer}
    kernels = {node.input[1] for node in weighted} & constants
    return Work(
        macs,
        weights=sum(math.prod(shapes[name]) for name in kernels),
        activations=sum(math.prod(shapes[node.output[0]][1:]) for node in weighted),
    )


def energy_mj(work: Work, scheme: Scheme) -> float:
    """Return the millijoules of one image by the energy model above.

    >>> layer, int8 = Work(1000, weights=100, activations=10), Scheme("int8", 8, 8, False, "minmax")
    >>> round(energy_mj(layer, int8) / PICOJOULE)  # 300 + 16250 + 250 picojoules
    16800
    """
    bits = max(scheme.weight_bits, scheme.activation_bits)
    mac = 0.2 * scheme.weight_bits * scheme.activation_bits / 64 + 0.1
    stored_only = scheme.calibration is None and not scheme.dynamic and scheme.number_format == "integer"
    float_inputs = scheme.number_format == "block" and scheme.activation_bits == 16
    if stored_only or float_inputs or scheme.number_format == "float":
        mac = FLOAT_MAC[32 if bits > 16 else 16]
    moved = 2 * work.activations * scheme.activation_bits / 8
    fetched = work.weights * scheme.weight_bits / 8
    return PICOJOULE * (work.macs * mac + fetched * DRAM_BYTE + moved * SRAM_BYTE)


def keys(
    clock: Mapping[str, Any],
    work: Work | None,
    scheme: Scheme,
    price_per_hour: float,
) -> dict[str, Any]:
    """Return the record's keys of speed, energy and cost.

    Args:
      clock: The result of the step `time`; empty if it did not run.
      work: Operations and elements of one image; None if a shape is unknown.
      scheme: The scheme, whose bits decide the energy.
      price_per_hour: Price of the machine, in USD.
    """
    found: dict[str, Any] = {name: value for name, value in clock.items() if name != "energy_mj"}
    counted = clock.get("energy_mj")
    if counted is not None:
        found |= {"energy_mj": counted, "energy_source": COUNTER}
    elif work is not None:
        found |= {"energy_mj": energy_mj(work, scheme), "energy_source": MODEL}
    if "throughput_ips" in clock:
        found["cost"] = 1e6 * price_per_hour / (3600 * clock["throughput_ips"])
        found["cost_source"] = (
            f"USD per million inferences at {price_per_hour:g} USD an hour for this machine"
        )
    return found
