"""Choose which layers get 4-bit weights under a budget of bytes or of accuracy."""

import dataclasses

from qt_jax.diagnosis.advice import Meter, Progress, kernel_bytes
from qt_jax.diagnosis.layers import kernel_sizes
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import FLOAT
from qt_jax.errors import InvalidInput

LOW, HIGH = 4, 8
"""Bits of weights to choose from."""


def order(deployment: Deployment, meter: Meter, progress: Progress) -> list[str]:
    """Sort the layers by the noise that `LOW` bits add for each byte saved, the least first.

    The layers are rounded one at a time. Their noise powers, 10^(-SQNR / 10), are assumed to add up in the
    logits.
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
    float_top1: float,
    max_drop: float,
    progress: Progress,
) -> Deployment:
    """Put as many layers on `LOW` bits as lose no more than `max_drop` (a fraction) against `float_top1`.

    The number is found by bisection over the order `ranked`. This assumes that the loss grows with the number
    of layers.

    Raises:
      InvalidInput: All layers on `HIGH` bits lose more.
    """

    def drop(count: int) -> float:
        progress(f"{count} of {len(ranked)} layers on {LOW} bits")
        graph = lowered(deployment, ranked[:count]).simulated()
        return float_top1 - meter.measure(graph, f"{count} layers on {LOW} bits").top1

    if (least := drop(0)) > max_drop:
        raise InvalidInput(
            f"all layers on {HIGH} bits lose {100 * least:.2f} points, over the budget of "
            f"{100 * max_drop:g}: allow more, or mend what the advice names first"
        )
    good, bad = 0, len(ranked) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if drop(middle) <= max_drop else (good, middle)
    return lowered(deployment, ranked[:good])
