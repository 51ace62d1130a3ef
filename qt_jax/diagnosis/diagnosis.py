"""Diagnose a network on one choice of bits: what each layer costs, why, and what helps."""

import dataclasses
from collections.abc import Mapping

import onnx

from qt_jax.backends.arrays import first
from qt_jax.backends.protocol import Batch
from qt_jax.diagnosis.advice import (
    Progress,
    Sensitivity,
    Trial,
    advise,
    kernel_bytes,
    sensitivities,
)
from qt_jax.diagnosis.layers import (
    Activation,
    InputBounds,
    Kernel,
    activations,
    kernels,
    minmax,
    unrounded,
)
from qt_jax.diagnosis.meter import Measurement, Meter
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import Ratios, layer_ratios
from qt_jax.errors import InvalidInput

SQNR_IMAGES = 512
"""Number of images on which the noise behind each layer is measured."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Hold what the diagnosis of a network found.

    Attributes:
      before: Deployment as it was given.
      after: Deployment with all advised remedies.
      floating, all_rounded, mended: Measurements of the float graph, of `before` and of `after`.
      kernels, activations: Summaries of the float graph's kernels and activations, by layer.
      sensitivities: Sensitivity of each layer.
      ratios, mended_ratios: SQNR of each layer's output in dB, of `before` and of `after`, each against its
        own float graph.
      trials: Every remedy that was tried, in order.
    """

    before: Deployment
    after: Deployment
    floating: Measurement
    all_rounded: Measurement
    mended: Measurement
    kernels: Mapping[str, Kernel]
    activations: Mapping[str, Activation]
    sensitivities: Mapping[str, Sensitivity]
    ratios: Ratios
    mended_ratios: Ratios
    trials: list[Trial]

    @property
    def advised(self) -> list[Trial]:
        """Return the trials that helped."""
        return [trial for trial in self.trials if trial.advised]

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the bytes of all kernels, before and after."""
        return kernel_bytes(self.before), kernel_bytes(self.after)


def diagnose(deployment: Deployment, meter: Meter, progress: Progress) -> Diagnosis:
    """Diagnose `deployment` on the images of `meter`.

    Args:
      deployment: Network with the bits and input ranges to judge.
      meter: Images to judge by.
      progress: Is called with the name of each step as it begins.

    Raises:
      InvalidInput: The graph has no layers.
    """
    if not deployment.precisions:
        raise InvalidInput(no_layers(deployment.model))
    floating = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float")
    all_rounded = meter.measure(deployment.simulated(), "all")
    found = sensitivities(deployment, meter, progress)
    progress("looking at tensors")
    seen = activations(deployment.model, meter.samples, deployment.bounds)
    after, trials = advise(deployment, seen, meter, progress)
    progress("noise behind each layer")
    some = first(meter.samples, SQNR_IMAGES)
    return Diagnosis(
        before=deployment,
        after=after,
        floating=floating,
        all_rounded=all_rounded,
        mended=meter.measure(after.simulated(), "all, mended"),
        kernels=kernels(deployment.model),
        activations=seen,
        sensitivities=found,
        ratios=layer_ratios(deployment.model, {"": deployment.simulated()}, some)[""],
        mended_ratios=layer_ratios(after.model, {"": after.simulated()}, some)[""],
        trials=trials,
    )


def no_layers(model: onnx.ModelProto) -> str:
    """Say what a layer is, and what a graph without layers holds instead."""
    others = ", ".join(f"{count} {kind}" for kind, count in unrounded(model).items())
    operators = ", ".join(sorted({node.op_type for node in model.graph.node}))
    held = f"{others}, of another kind" if others else f"only {operators}"
    return (
        "This graph has no layer to diagnose. A layer is a Conv, ConvTranspose, Gemm or MatMul whose second "
        f"operand is a float32 constant of the graph; this one has {held}. `python -m qt_jax.backends run` "
        "measures such a network as a whole."
    )


def calibrated(model: onnx.ModelProto, calibration: Batch) -> InputBounds:
    """Return the least and the largest value of each layer's input on the calibration samples.

    Args:
      model: Float graph.
      calibration: Arrays `(n, ...)` by input, or the array of the only input.
    """
    return minmax(activations(model, calibration, {}))
