"""Diagnose a network on one choice of bits: what each layer costs, why, and what helps."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx

from qt_jax.diagnosis.advice import (
    Measurement,
    Meter,
    Progress,
    Sensitivity,
    Trial,
    advise,
    kernel_bytes,
    sensitivities,
)
from qt_jax.diagnosis.layers import Activation, InputBounds, Kernel, activations, kernels, minmax
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import Ratios, compare
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
      InvalidInput: The graph has no layers, or its output is not `(n, classes)`.
    """
    if not deployment.precisions:
        raise InvalidInput("the graph has no convolution or matrix product with a kernel of its own")
    floating = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float")
    all_rounded = meter.measure(deployment.simulated(), "all")
    found = sensitivities(deployment, meter, progress)
    progress("looking at tensors")
    seen = activations(deployment.model, meter.images, deployment.bounds)
    after, trials = advise(deployment, seen, meter, progress)
    progress("noise behind each layer")
    some = meter.images[:SQNR_IMAGES]
    return Diagnosis(
        before=deployment,
        after=after,
        floating=floating,
        all_rounded=all_rounded,
        mended=meter.measure(after.simulated(), "all, mended"),
        kernels=kernels(deployment.model),
        activations=seen,
        sensitivities=found,
        ratios=compare(deployment.model, {"": deployment.simulated()}, some)[2][""],
        mended_ratios=compare(after.model, {"": after.simulated()}, some)[2][""],
        trials=trials,
    )


def calibrated(model: onnx.ModelProto, calibration: np.ndarray) -> InputBounds:
    """Return the least and the largest value of each layer's input on the calibration images.

    Args:
      model: Float graph with one input.
      calibration: float32 `(n, ...)`, as the graph takes them.
    """
    return minmax(activations(model, calibration, {}))
