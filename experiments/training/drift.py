"""The watch over the two networks in one checkpoint: the plain one, and the same fake-quantized."""

from collections.abc import Mapping
from typing import Any

LARGEST_GAP = 0.05
"""Share of the decisions by which one network may fall behind the other."""


def drift(row: Mapping[str, Any]) -> str | None:
    """What to tell the user if the plain and the fake-quantized network drift apart, else None.

    The plain one must never fall behind: it is what is exported, and training at lambda > 0 does not see it.
    The fake-quantized one may be behind as long as lambda is not 1.

    Args:
      row: of an epoch, with `validation_fp32`, `validation_fake_quant` as shares, `lambda` and `epoch`.

    >>> print(drift({"epoch": 9, "validation_fp32": 0.6, "validation_fake_quant": 0.9, "lambda": 1.0}))
    after epoch 9 the FP32 network, which is exported, has collapsed beside...
    >>> drift({"epoch": 9, "validation_fp32": 0.9, "validation_fake_quant": 0.89, "lambda": 1.0}) is None
    True
    """
    if "validation_fake_quant" not in row:
        return None
    plain, quantized = row["validation_fp32"], row["validation_fake_quant"]
    if quantized - plain > LARGEST_GAP:
        return (
            f"after epoch {row['epoch']} the FP32 network, which is exported, has collapsed beside its "
            f"fake-quantized twin: {100 * plain:.1f} against {100 * quantized:.1f} % on the validation "
            "split. It leans on clipped ranges that the exported graph does not have: raise "
            "--activation-quantile, use a gentler --sched, or export with --clips."
        )
    if row["lambda"] == 1.0 and plain - quantized > LARGEST_GAP:
        return (
            f"after epoch {row['epoch']} the fake-quantized network is behind the FP32 one at lambda 1: "
            f"{100 * quantized:.1f} against {100 * plain:.1f} % on the validation split. More --bits, a "
            "gentler --sched, more epochs, or --rules for the layers that cost most would help."
        )
    return None
