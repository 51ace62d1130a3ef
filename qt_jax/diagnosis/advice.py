"""Measure how sensitive each layer is, try remedies, and advise those that help by more than chance."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from qt_jax.diagnosis.layers import Activation, kernel_sizes, kernels
from qt_jax.diagnosis.meter import Measurement, Meter, is_significant_gain
from qt_jax.diagnosis.remedies import Deployment, Finding, Use, findings
from qt_jax.diagnosis.simulation import FLOAT, Precision

MOST_LAYERS = 3
"""Number of layers for which more bits are tried, the most sensitive first."""

Progress = Callable[[str], object]
"""Is called with the name of each step as the step begins."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Hold the measurements with only one layer rounded, and with all layers but this one rounded."""

    alone: Measurement
    all_but: Measurement


@dataclasses.dataclass(frozen=True)
class Trial:
    """Hold a finding whose remedy was tried, the measurement with it, and whether it is advised."""

    finding: Finding
    result: Measurement
    advised: bool


def sensitivities(deployment: Deployment, meter: Meter, progress: Progress) -> dict[str, Sensitivity]:
    """Return the sensitivity of each layer, in the order of the graph.

    `progress` is called with the name of each layer as its measurement begins.
    """
    found = {}
    for name, precision in deployment.precisions.items():
        progress(name)
        alone = dataclasses.replace(deployment, precisions={name: precision})
        rest = dataclasses.replace(deployment, precisions={**deployment.precisions, name: FLOAT})
        found[name] = Sensitivity(
            meter.measure(alone.simulated(), f"{name} alone"),
            meter.measure(rest.simulated(), f"all but {name}"),
        )
    return found


def advise(
    deployment: Deployment, activations: Mapping[str, Activation], meter: Meter, progress: Progress
) -> tuple[Deployment, list[Trial]]:
    """Try remedies; return the deployment with all that help, and every trial in order.

    The remedies of `findings` are tried first. Then more bits are tried for the layers that still cost most.
    A remedy is advised if, on top of those before it, it helps by more than chance (`is_significant_gain`).
    Of several remedies for one layer, the cheapest is advised that is as good as the best but for chance.
    More bits are not tried where the outputs have `meter.ENOUGH_DB`.
    """
    trials: list[Trial] = []
    for finding in findings(kernels(deployment.model), activations, deployment.bounds):
        deployment = _tried([finding], deployment, meter, trials, progress)
    for alternatives in _more_bits(deployment, meter, progress):
        if meter.measure(deployment.simulated(), "all, so far").is_enough:
            break
        deployment = _tried(alternatives, deployment, meter, trials, progress)
    return deployment, trials


def _tried(
    alternatives: list[Finding], deployment: Deployment, meter: Meter, trials: list[Trial], progress: Progress
) -> Deployment:
    """Try alternative remedies for one layer, the cheapest first, and append the trials to `trials`.

    Returns:
      The deployment with the advised remedy, or as it was if none is advised.
    """
    now = meter.measure(deployment.simulated(), "all, so far")
    candidates = [finding.remedy.apply(deployment) for finding in alternatives]
    results = []
    for finding, candidate in zip(alternatives, candidates, strict=True):
        label = f"{finding.layer}: {finding.remedy.text}"
        progress(label)
        results.append(meter.measure(candidate.simulated(), label))
    best = max(results, key=lambda result: result.score)
    good = [is_significant_gain(now, result) and not is_significant_gain(result, best) for result in results]
    chosen = good.index(True) if any(good) else None
    trials += [
        Trial(finding, result, place == chosen)
        for place, (finding, result) in enumerate(zip(alternatives, results, strict=True))
    ]
    return deployment if chosen is None else candidates[chosen]


def _more_bits(deployment: Deployment, meter: Meter, progress: Progress) -> Iterator[list[Finding]]:
    """Yield the precisions of `wider` for each of the layers that cost most when rounded by themselves."""
    floating = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float")
    found = {}
    for name, precision in deployment.precisions.items():
        progress(f"{name} alone")
        alone = dataclasses.replace(deployment, precisions={name: precision})
        found[name] = meter.measure(alone.simulated(), f"{name} alone")
    for name in sorted(found, key=lambda name: found[name].score)[:MOST_LAYERS]:
        if found[name].score >= floating.score:
            return
        evidence = f"rounded alone it {_cost(found[name], floating)}"
        yield [
            Finding("sensitive layer", name, evidence, Use(name, precision))
            for precision in wider(deployment.precisions[name])
        ]


def _cost(alone: Measurement, floating: Measurement) -> str:
    """Write what a layer costs."""
    if alone.counts:
        return f"costs {100 * (floating.score - alone.score):.2f} points"
    return f"leaves the outputs at {alone.score:.1f} dB"


def wider(precision: Precision) -> list[Precision]:
    """Return more precise precisions than `precision`, the cheapest first.

    These are one scale per channel, then twice the bits of weights, then 16-bit inputs too, then floating
    point.

    >>> [str(wide) for wide in wider(Precision(4, 8))]
    ['w4a8 pc', 'w8a8 pc', 'w8a16 pc', 'float']
    """
    assert precision.weights is not None
    channels = dataclasses.replace(precision, per_channel=True)
    twice = dataclasses.replace(channels, weights=2 * precision.weights)
    steps = [channels, twice, dataclasses.replace(twice, inputs=16), FLOAT]
    return [step for step in steps if step != precision]


def kernel_bytes(deployment: Deployment) -> int:
    """Return the bytes of all kernels on their bits, without scales and biases.

    A weight in floating point takes 4 bytes.
    """
    widths = {name: precision.weights for name, precision in deployment.precisions.items()}
    return sum(size * (widths.get(name) or 32) for name, size in kernel_sizes(deployment.model).items()) // 8
