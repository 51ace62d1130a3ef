"""Which quantization-aware training there is beside Quant-Trim, and what each can be combined with."""

from typing import Literal

import qt_jax as qt

Quantizer = Literal["quant-trim", "lsq", "pact", "qwix"]

SCHEDULES: dict[str, tuple[str, ...]] = {
    "lsq": ("constant", "step"),
    "pact": ("constant", "step"),
    "qwix": ("constant",),
}
"""The lambda schedules of the other quantizers: on throughout, or after float training."""


def check_quantizer(
    quantizer: Quantizer,
    *,
    sched: str,
    reverse_pruning: float | None,
    sites: str,
    bits: int,
    activation_bits: int,
) -> None:
    """Raises InvalidInput where a quantizer is given what belongs to Quant-Trim, or what it cannot do.

    >>> check_quantizer("pact", sched="none", reverse_pruning=None, sites="inputs", bits=8, activation_bits=8)
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: --quantizer pact goes with --sched constant or step, ...
    """
    if quantizer == "quant-trim":
        return
    allowed = SCHEDULES[quantizer]
    if sched not in allowed or reverse_pruning is not None or sites != "inputs":
        raise qt.InvalidInput(
            f"--quantizer {quantizer} goes with --sched {' or '.join(allowed)}, --reverse-pruning None and "
            f"--sites inputs, got {sched}, {reverse_pruning} and {sites}: ramps, reverse pruning and output "
            "sites are Quant-Trim's"
        )
    if quantizer == "qwix" and (bits > 8 or activation_bits != 8):
        raise qt.InvalidInput(
            f"--quantizer qwix goes with --bits of 2 to 8 and --activation-bits 8, got {bits} and "
            f"{activation_bits}"
        )


def check_points(quantizer: str, sched: str, **points: bool) -> None:
    """Raises InvalidInput for deployment-aware settings of `Config` without what they need.

    Args:
      points: the fields folded, fused_outputs, vendor_grids, reverse_pruning_folded.
    """
    used = [f"--{name.replace('_', '-')}" for name, value in points.items() if value]
    if used and (quantizer != "quant-trim" or sched == "none"):
        raise qt.InvalidInput(f"{', '.join(used)} need --quantizer quant-trim and a --sched other than none")
    if points["reverse_pruning_folded"] and not points["folded"]:
        raise qt.InvalidInput("--reverse-pruning-folded needs the gains that --folded keeps: give both")
