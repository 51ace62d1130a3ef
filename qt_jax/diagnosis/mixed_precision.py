"""Choose which layers get 4-bit weights under a budget of bytes, of accuracy or of noise."""

import dataclasses
from collections.abc import Callable

from qt_jax.diagnosis.advice import Progress, kernel_bytes
from qt_jax.diagnosis.layers import kernel_sizes
from qt_jax.diagnosis.meter import Measurement, Meter
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import FLOAT
from qt_jax.errors import InvalidInput

LOW, HIGH = 4, 8
"""Bits of weights to choose from."""


def order(deployment: Deployment, meter: Meter, progress: Progress) -> list[str]:
    """Sort the layers by the noise that `LOW` bits add for each byte saved, the least first.

    The layers are rounded one at a time. Their noise powers, 10^(-SQNR / 10), are assumed to add up in the
    outputs.
    """
    sizes = kernel_sizes(deployment.model)
    costs = {}
    for name, precision in deployment.precisions.items():
        if precision == FLOAT:
            continue
        progress(f"{name} on {LOW} bits")
        alone = dataclasses.replace(precision, weights=LOW, inputs=None)
        found = meter.measure(
            dataclasses.replace(deployment, precisions={name: alone}).simulated(), f"{name} on {LOW} bits"
        )
        noise = 0.0 if found.sqnr_db is None else 10 ** (-found.sqnr_db / 10)
        costs[name] = noise / sizes[name]
    return sorted(costs, key=costs.__getitem__)


def lowered(deployment: Deployment, names: list[str]) -> Deployment:
    """Give `LOW` bits to the weights of the layers `names`.

    The other layers on integers get `HIGH` bits, or keep what they have if that is more. Layers in floating
    point stay so.
    """
    precisions = {
        name: precision
        if precision == FLOAT
        else dataclasses.replace(
            precision, weights=LOW if name in names else max(HIGH, precision.weights or 0)
        )
        for name, precision in deployment.precisions.items()
    }
    return dataclasses.replace(deployment, precisions=precisions)


def within_bytes(deployment: Deployment, ranked: list[str], most: int) -> Deployment:
    """Put the fewest layers on `LOW` bits with which all kernels fit into `most` bytes.

    Raises:
      InvalidInput: The kernels do not fit even if all layers have `LOW` bits.
    """
    for count in range(len(ranked) + 1):
        candidate = lowered(deployment, ranked[:count])
        if kernel_bytes(candidate) <= most:
            return candidate
    raise InvalidInput(
        f"all kernels on {LOW} bits take {kernel_bytes(lowered(deployment, ranked)):,} bytes, more than the "
        f"budget of {most:,}: give more, or a smaller network"
    )


def within_drop(
    deployment: Deployment,
    ranked: list[str],
    meter: Meter,
    float_score: float,
    max_drop: float,
    progress: Progress,
) -> Deployment:
    """Put as many layers on `LOW` bits as lose no more right images than a fraction `max_drop`.

    Args:
      deployment: Network to choose for.
      ranked: Layers in the order in which they are lowered, from `order`.
      meter: Counts right images.
      float_score: Share of right images of the float graph.
      max_drop: Share of the images that may be lost against it.
      progress: Is called with the name of each step as it begins.

    Raises:
      InvalidInput: All layers on `HIGH` bits lose more, or the meter does not count images.
    """
    if not meter.counts:
        raise InvalidInput(
            "--max-drop counts images that are right, and these are not judged so: say how much noise the "
            "outputs may have, with --min-sqnr 30, or give --max-bytes."
        )
    least = _at_count(deployment, ranked, 0, meter, progress)
    if float_score - least.score > max_drop:
        raise InvalidInput(
            f"all layers on {HIGH} bits lose {100 * (float_score - least.score):.2f} points, over the budget "
            f"of {100 * max_drop:g}: allow more, or mend what the advice names first"
        )
    return _most(deployment, ranked, meter, progress, lambda it: float_score - it.score <= max_drop)


def within_noise(
    deployment: Deployment, ranked: list[str], meter: Meter, min_sqnr: float, progress: Progress
) -> Deployment:
    """Put as many layers on `LOW` bits as leave the outputs an SQNR of `min_sqnr` dB.

    Raises:
      InvalidInput: All layers on `HIGH` bits leave less.
    """

    def kept(found: Measurement) -> bool:
        return found.sqnr_db is None or found.sqnr_db >= min_sqnr

    least = _at_count(deployment, ranked, 0, meter, progress)
    if not kept(least):
        raise InvalidInput(
            f"all layers on {HIGH} bits leave the outputs at {least.sqnr_db:.1f} dB, below the budget of "
            f"{min_sqnr:g}: allow more noise, or mend what the advice names first"
        )
    return _most(deployment, ranked, meter, progress, kept)


def _at_count(
    deployment: Deployment, ranked: list[str], count: int, meter: Meter, progress: Progress
) -> Measurement:
    """Measure the network with the first `count` layers on `LOW` bits."""
    progress(f"{count} of {len(ranked)} layers on {LOW} bits")
    graph = lowered(deployment, ranked[:count]).simulated()
    return meter.measure(graph, f"{count} layers on {LOW} bits")


def _most(
    deployment: Deployment,
    ranked: list[str],
    meter: Meter,
    progress: Progress,
    meets: Callable[[Measurement], bool],
) -> Deployment:
    """Put as many layers on `LOW` bits as a budget allows, which is known to allow none.

    The number is found by bisection over the order `ranked`. This assumes that the loss grows with the number
    of layers.
    """
    good, bad = 0, len(ranked) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        found = _at_count(deployment, ranked, middle, meter, progress)
        good, bad = (middle, bad) if meets(found) else (good, middle)
    return lowered(deployment, ranked[:good])
