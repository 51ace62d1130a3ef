"""Report on training: metrics as JSON lines and in TensorBoard, a progress bar, and warnings.

One warning tells that the two networks in one checkpoint, plain and fake-quantized, drift apart.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from qt_jax import records
from qt_jax.errors import InvalidInput
from qt_jax.files import write_whole

LARGEST_GAP = 0.05
"""Difference of the accuracies, as a share, by which one network may fall behind the other."""


class TrainingLog:
    """Write one method's rows to metrics.jsonl and to its TensorBoard folder."""

    def __init__(self, directory: Path, method: str, step: int):
        self.path = directory / "metrics.jsonl"
        self.method = method
        drop_after(self.path, method, step)
        self.writer = SummaryWriter(str(directory / "tensorboard" / method), purge_step=step + 1)

    def write(self, step: int, **values) -> None:
        """Append one row and its scalars.

        Raises:
          InvalidInput: The disk does not take them.
        """
        try:
            records.append(self.path, {"method": self.method, "step": step, **values})
        except OSError as error:
            raise InvalidInput(
                f"the row of step {step} cannot be written to {self.path} ({error.strerror or error}). The "
                "newest checkpoint is whole; the same command goes on from it once that is fixed."
            ) from error
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard. Its curves are a copy, so a full disk does not end the run here."""
        try:
            self.writer.close()
        except OSError as error:
            warn(f"TensorBoard's curves are incomplete ({error.strerror})")


def drop_after(path: Path, method: str, step: int) -> None:
    """Remove the lines of `method` that a resumed run will write again. The file is replaced whole."""
    if not path.exists():
        return
    kept = [row for row in records.read(path) if row.get("method") != method or row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def progress_bar(method: str, total: int, done: int, batch_size: int, shown: bool = True) -> tqdm:
    """Return a bar of the images done, with images per second and the time left.

    It stays invisible without a terminal, or unless `shown`.
    """
    return tqdm(
        total=total * batch_size,
        initial=done * batch_size,
        desc=method,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=None if shown else True,
    )


def drift(row: Mapping[str, Any]) -> str | None:
    """Return a warning if the plain and the fake-quantized network drift apart, else None.

    The plain network must not fall behind at lambda > 0: it is exported, and training does not see it then.
    At lambda 0 it is the network that is trained, so that a gap means nothing. The fake-quantized network may
    be behind as long as lambda is not 1.

    Args:
      row: Row of an epoch, with `validation_fp32` and `validation_fake_quant` as shares, `lambda` and
        `epoch`.

    >>> print(drift({"epoch": 9, "validation_fp32": 0.6, "validation_fake_quant": 0.9, "lambda": 1.0}))
    after epoch 9 the FP32 network, which is exported, has collapsed beside...
    >>> drift({"epoch": 9, "validation_fp32": 0.9, "validation_fake_quant": 0.89, "lambda": 1.0}) is None
    True
    """
    if "validation_fake_quant" not in row:
        return None
    plain, quantized = row["validation_fp32"], row["validation_fake_quant"]
    if row["lambda"] > 0.0 and quantized - plain > LARGEST_GAP:
        return (
            f"after epoch {row['epoch']} the FP32 network, which is exported, has collapsed beside its "
            f"fake-quantized twin: {100 * plain:.1f} against {100 * quantized:.1f} % on the validation "
            "split. It relies on clipped ranges that the exported graph does not have. Raise "
            "--activation-quantile, use a gentler --sched, or export with --clips."
        )
    if row["lambda"] == 1.0 and plain - quantized > LARGEST_GAP:
        return (
            f"after epoch {row['epoch']} the fake-quantized network is behind the FP32 one at lambda 1: "
            f"{100 * quantized:.1f} against {100 * plain:.1f} % on the validation split. Use more --bits, a "
            "gentler --sched, more epochs, or --rules for the layers that cost the most accuracy."
        )
    return None


def warn(message: str) -> None:
    """Print a warning on stderr, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
