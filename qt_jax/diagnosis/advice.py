"""Sensitivity of layers, and the remedies that help: each is tried, and kept if more images are right."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from qt_jax.diagnosis.findings import Finding, findings
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.measuring import Measurement, Meter, gains
from qt_jax.diagnosis.remedies import Deployment, Use
from qt_jax.diagnosis.simulation import FLOAT, Precision
from qt_jax.diagnosis.tensors import Activation, kernels

MOST_LAYERS = 3
"""So many layers are given more bits, the most sensitive first."""

Tell = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """One layer rounded alone, and all but this one."""

    alone: Measurement
    all_but: Measurement


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finding whose remedy was tried: what it gave, and whether it is advised."""

    finding: Finding
    result: Measurement
    advised: bool


def sensitivities(deployment: Deployment, meter: Meter, tell: Tell) -> dict[str, Sensitivity]:
    """Layer -> its sensitivity, in the order of the graph; `tell` hears of each layer as it begins."""
    found = {}
    for name, precision in deployment.precisions.items():
        tell(name)
        alone = dataclasses.replace(deployment, precisions={name: precision})
        rest = dataclasses.replace(deployment, precisions={**deployment.precisions, name: FLOAT})
        found[name] = Sensitivity(
            meter.measure(alone.simulated(), f"{name} alone"),
            meter.measure(rest.simulated(), f"all but {name}"),
        )
    return found


def advise(
    deployment: Deployment, activations: Mapping[str, Activation], meter: Meter, tell: Tell
) -> tuple[Deployment, list[Trial]]:
    """The deployment with all remedies that help, and every trial in order.

    First what is wrong with tensors (`findings`), then more bits for the layers that still cost most. A
    remedy is advised if it makes more images right than chance would, on top of those before it.
    """
    trials: list[Trial] = []
    now = meter.measure(deployment.simulated(), "all")
    for finding in findings(kernels(deployment.model), activations, deployment.bounds):
        deployment, now = _tried(finding, deployment, now, meter, trials, tell)
    for finding in _more_bits(deployment, meter, tell):
        deployment, now = _tried(finding, deployment, now, meter, trials, tell)
    return deployment, trials


def _tried(
    finding: Finding,
    deployment: Deployment,
    now: Measurement,
    meter: Meter,
    trials: list[Trial],
    tell: Tell,
) -> tuple[Deployment, Measurement]:
    """Deployment and measurement after a remedy's trial, which is added to `trials`."""
    tell(f"{finding.layer}: {finding.remedy.text}")
    candidate = finding.remedy.apply(deployment)
    result = meter.measure(candidate.simulated(), f"{finding.layer}: {finding.remedy.text}")
    trials.append(Trial(finding, result, gains(now, result)))
    return (candidate, result) if trials[-1].advised else (deployment, now)


def _more_bits(deployment: Deployment, meter: Meter, tell: Tell) -> Iterator[Finding]:
    """For the layers that cost most images when rounded alone: a scale a channel, then twice the bits, then
    floating point."""
    costs = {
        name: meter.measure(
            dataclasses.replace(deployment, precisions={name: precision}).simulated(), f"{name} alone"
        )
        for name, precision in deployment.precisions.items()
    }
    float_top1 = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float").top1
    for name in sorted(costs, key=lambda name: costs[name].top1)[:MOST_LAYERS]:
        drop = 100 * (float_top1 - costs[name].top1)
        if drop <= 0:
            return
        precision = deployment.precisions[name]
        evidence = f"rounded alone it costs {drop:.2f} points"
        if not precision.per_channel:
            one = dataclasses.replace(precision, per_channel=True)
            yield Finding("sensitive layer", name, evidence, Use(name, one))
        if precision.weights is not None:
            more = Precision(2 * precision.weights, 16, per_channel=True)
            yield Finding("sensitive layer", name, evidence, Use(name, more))
        yield Finding("sensitive layer", name, evidence, Use(name, FLOAT))


def kernel_bytes(deployment: Deployment) -> int:
    """Bytes of all kernels on their bits, 4 each for those in floating point; without scales and biases."""
    sizes = {name: kernel.size for name, kernel in kernels(deployment.model).items()}
    bits = {
        name: 32 if (width := deployment.precisions.get(name, FLOAT).weights) is None else width
        for name in layers_of(deployment.model)
    }
    return sum(sizes[name] * bits[name] for name in sizes) // 8
