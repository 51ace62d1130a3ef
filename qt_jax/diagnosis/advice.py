"""Sensitivity of layers, and the remedies that help: each is tried, and kept if more images are right."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from qt_jax.diagnosis.findings import Finding, findings
from qt_jax.diagnosis.layers import kernel_sizes
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
    remedy is advised if it makes more images right than chance would, on top of those before it; of several
    for one layer the cheapest that is as good as the best but for chance.
    """
    trials: list[Trial] = []
    for finding in findings(kernels(deployment.model), activations, deployment.bounds):
        deployment = _tried([finding], deployment, meter, trials, tell)
    for alternatives in _more_bits(deployment, meter, tell):
        deployment = _tried(alternatives, deployment, meter, trials, tell)
    return deployment, trials


def _tried(
    alternatives: list[Finding], deployment: Deployment, meter: Meter, trials: list[Trial], tell: Tell
) -> Deployment:
    """The deployment after the trial of remedies for one layer, the cheapest first, which go to `trials`."""
    now = meter.measure(deployment.simulated(), "all, so far")
    candidates = [finding.remedy.apply(deployment) for finding in alternatives]
    results = []
    for finding, candidate in zip(alternatives, candidates, strict=True):
        tell(f"{finding.layer}: {finding.remedy.text}")
        what = f"{finding.layer}: {finding.remedy.text}"
        results.append(meter.measure(candidate.simulated(), what))
    best = max(results, key=lambda result: result.top1)
    good = [gains(now, result) and not gains(result, best) for result in results]
    chosen = good.index(True) if any(good) else None
    trials += [
        Trial(finding, result, place == chosen)
        for place, (finding, result) in enumerate(zip(alternatives, results, strict=True))
    ]
    return deployment if chosen is None else candidates[chosen]


def _more_bits(deployment: Deployment, meter: Meter, tell: Tell) -> Iterator[list[Finding]]:
    """For each of the layers that cost most images when rounded alone: a scale a channel, twice the bits of
    weights, 16-bit inputs too, floating point."""
    float_top1 = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float").top1
    costs = {}
    for name, precision in deployment.precisions.items():
        tell(f"{name} alone")
        alone = dataclasses.replace(deployment, precisions={name: precision})
        costs[name] = float_top1 - meter.measure(alone.simulated(), f"{name} alone").top1
    for name in sorted(costs, key=lambda name: -costs[name])[:MOST_LAYERS]:
        if costs[name] <= 0:
            return
        evidence = f"rounded alone it costs {100 * costs[name]:.2f} points"
        yield [
            Finding("sensitive layer", name, evidence, Use(name, precision))
            for precision in wider(deployment.precisions[name])
        ]


def wider(precision: Precision) -> list[Precision]:
    """More precise ones than `precision`, the cheapest first.

    >>> [str(wide) for wide in wider(Precision(4, 8))]
    ['w4a8 pc', 'w8a8 pc', 'w8a16 pc', 'float']
    """
    assert precision.weights is not None
    channels = dataclasses.replace(precision, per_channel=True)
    twice = dataclasses.replace(channels, weights=2 * precision.weights)
    steps = [channels, twice, dataclasses.replace(twice, inputs=16), FLOAT]
    return [step for step in steps if step != precision]


def kernel_bytes(deployment: Deployment) -> int:
    """Bytes of all kernels on their bits, 4 each for those in floating point; without scales and biases."""
    widths = {name: precision.weights for name, precision in deployment.precisions.items()}
    return sum(size * (widths.get(name) or 32) for name, size in kernel_sizes(deployment.model).items()) // 8
