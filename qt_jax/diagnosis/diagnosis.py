"""The whole diagnosis of a network on one choice of bits: what each layer costs, why, and what helps."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx

from qt_jax.diagnosis.advice import (
    Measurement,
    Meter,
    Sensitivity,
    Tell,
    Trial,
    advise,
    kernel_bytes,
    sensitivities,
)
from qt_jax.diagnosis.layers import Activation, Bounds, Kernel, activations, kernels, minmax
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import Ratios, compare
from qt_jax.errors import InvalidInput

SQNR_IMAGES = 512
"""Images that the noise behind each layer is measured on."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
      before: the deployment as it was given.
      after: with all advised remedies.
      floating, whole, mended: measurements of the float graph, of `before` and of `after`.
      kernels, activations: of the float graph, by layer.
      sensitivities: by layer.
      ratios, mended_ratios: SQNR of each layer's output in dB, of `before` and `after`, against the float
        graph of each.
      trials: every remedy that was tried, in order.
    """

    before: Deployment
    after: Deployment
    floating: Measurement
    whole: Measurement
    mended: Measurement
    kernels: Mapping[str, Kernel]
    activations: Mapping[str, Activation]
    sensitivities: Mapping[str, Sensitivity]
    ratios: Ratios
    mended_ratios: Ratios
    trials: list[Trial]

    @property
    def advised(self) -> list[Trial]:
        """The trials that helped."""
        return [trial for trial in self.trials if trial.advised]

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of all kernels, before and after."""
        return kernel_bytes(self.before), kernel_bytes(self.after)


def diagnose(deployment: Deployment, meter: Meter, tell: Tell) -> Diagnosis:
    """The diagnosis of `deployment` on the images of `meter`; `tell` hears of each step as it begins.

    Raises:
      InvalidInput: the graph has no layers, or its output is not `(n, classes)`.
    """
    if not deployment.precisions:
        raise InvalidInput("the graph has no convolution or matrix product with a kernel of its own")
    floating = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float")
    whole = meter.measure(deployment.simulated(), "all")
    found = sensitivities(deployment, meter, tell)
    tell("looking at tensors")
    seen = activations(deployment.model, meter.images, deployment.bounds)
    after, trials = advise(deployment, seen, meter, tell)
    tell("noise behind each layer")
    some = meter.images[:SQNR_IMAGES]
    return Diagnosis(
        before=deployment,
        after=after,
        floating=floating,
        whole=whole,
        mended=meter.measure(after.simulated(), "all, mended"),
        kernels=kernels(deployment.model),
        activations=seen,
        sensitivities=found,
        ratios=compare(deployment.model, {"": deployment.simulated()}, some)[2][""],
        mended_ratios=compare(after.model, {"": after.simulated()}, some)[2][""],
        trials=trials,
    )


def calibrated(model: onnx.ModelProto, calibration: np.ndarray) -> Bounds:
    """The least and largest value of each layer's input on the calibration images `(n, ...)`, float32."""
    return minmax(activations(model, calibration, {}))
