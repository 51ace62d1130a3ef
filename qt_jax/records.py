"""Append and read records, the one currency between runs, vendors and tables: one JSON object per line.

A record says what was run (run, task, model, method, seed, checkpoint), where and how (backend, vendor,
kind, runtime, scheme, bits, calibration), what came out, and with which software, machine and command.
Fractions lie in [0, 1]. Times are milliseconds unless the key says otherwise, sizes are bytes, energies
millijoules. A value that was not measured is null, and `reason` says why.
"""

import errno
import fcntl
import json
import os
import warnings
from io import FileIO
from pathlib import Path
from typing import Any

from qt_jax.errors import InvalidInput

Record = dict[str, Any]
"""One record: key -> value, as JSON has it."""

STATUSES = ("ok", "unavailable", "refused", "crashed", "timeout", "invalid")
"""Values of the key `status`."""

FIELDS = (
    *("run", "task", "model", "method", "seed", "checkpoint"),
    *("backend", "vendor", "kind", "runtime", "scheme", "weight_bits", "activation_bits", "per_channel"),
    *("dynamic", "calibration"),
    *("n", "top1", "top5", "nll", "brier", "ece", "logit_mse", "sqnr_db", "agreement", "miou"),
    *("metric", "value", "reference_value", "larger_is_better", "judged", "not_judged", "fidelity"),
    *("cosine", "worst_sqnr_db", "products", "float_layers", "warnings", "notes"),
    *("latency_ms_p50", "latency_ms_p99", "throughput_ips", "cycles", "energy_mj", "cost", "model_bytes"),
    *("status", "reason", "versions", "cpu", "accelerator", "commit", "date", "command", "seconds"),
)
"""Keys that every record has. Others may be added. The meaning of these is fixed."""


def new_record(**values: Any) -> Record:
    """Return a record with every key of `FIELDS`, null unless given in `values`, and with other given keys.

    >>> record = new_record(scheme="fp32", top1=0.9)
    >>> record["top1"], record["ece"]
    (0.9, None)
    """
    return dict.fromkeys(FIELDS) | values


def append(path: str | Path, record: Record) -> None:
    """Append `record` to the JSON-lines file at `path`, whole or not at all.

    The file is locked, so that writers in several processes take turns. The line goes out in one write and is
    synced to disk. Half a line that a killed writer left at the end is cut off first.

    Raises:
      InvalidInput: `record` holds a NaN, an infinity, or something that JSON cannot express. The file is then
        untouched.
      OSError: The disk is full. The file is then as it was.

    >>> import tempfile; path = os.path.join(tempfile.mkdtemp(), "records.jsonl")
    >>> append(path, {"scheme": "fp32"}); read(path)
    [{'scheme': 'fp32'}]
    """
    try:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"A record for {path} cannot be written: {error}. Use null and a reason for what has no value."
        ) from error
    with open(path, "ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        _end_last_line(file)
        size = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, "No space left for a record", str(path))
        os.fsync(file.fileno())


def _end_last_line(file: FileIO) -> None:
    """Make the file end with a newline: complete a whole record, and cut off half of one."""
    file.seek(0)
    content = file.readall()
    last = content[content.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        file.truncate(len(content) - len(last))
    else:
        file.write(b"\n")


def read(path: str | Path) -> list[Record]:
    """Return the records of the JSON-lines file at `path`. An absent file holds none.

    A line that was cut short by a kill is skipped with a warning that names file and line. Such a line is
    malformed, the last of the file, and without a newline.

    Raises:
      InvalidInput: Another line is malformed. The message names file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number < len(lines):
                raise InvalidInput(
                    f"{path}, line {number} is not a record ({error}): mend or delete that line."
                ) from error
            warnings.warn(f"{path}, line {number} was cut short and is skipped: {line[:60]!r}", stacklevel=2)
        else:
            records.append(record)
    return records
