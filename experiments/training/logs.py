"""Training metrics: JSON lines, TensorBoard, a progress bar."""

import json
import sys
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from qt_jax.errors import InvalidInput
from qt_jax.reporting import records
from qt_jax.reporting.files import write_whole


def warn(message: str) -> None:
    """Says on stderr, above any progress bar, what the user ought to know; the run goes on."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def drop_after(path: Path, method: str, step: int) -> None:
    """Removes the lines of `method` that a resumed run will write again; the file is replaced whole."""
    if not path.exists():
        return
    kept = [row for row in records.read(path) if row.get("method") != method or row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


class TrainingLog:
    """One method's rows in metrics.jsonl and its TensorBoard folder."""

    def __init__(self, directory: Path, method: str, step: int):
        self.path = directory / "metrics.jsonl"
        self.method = method
        drop_after(self.path, method, step)
        self.writer = SummaryWriter(str(directory / "tensorboard" / method), purge_step=step + 1)

    def write(self, step: int, **values) -> None:
        """Appends one row and its scalars. Raises InvalidInput if the disk does not take them."""
        try:
            records.append(self.path, {"method": self.method, "step": step, **values})
        except OSError as error:
            raise InvalidInput(
                f"the row of step {step} cannot be written to {self.path} ({error.strerror or error}). The "
                "newest checkpoint is whole; the same command goes on from it once that is mended."
            ) from error
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes TensorBoard, whose curves are a copy: a disk that does not take them ends no run."""
        try:
            self.writer.close()
        except OSError as error:
            warn(f"TensorBoard's curves are not complete ({error.strerror})")


def progress_bar(method: str, total: int, done: int, batch_size: int, shown: bool = True) -> tqdm:
    """A bar that counts images and says how many a second and what time is left; none without a terminal,
    or if it is not to be `shown`."""
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
