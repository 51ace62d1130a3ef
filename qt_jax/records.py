"""Records: the one currency between runs, vendors and tables. One JSON object a line.

A record says what was run (run, task, model, method, seed, checkpoint), where and how (backend, vendor,
kind, runtime, scheme, bits, calibration), what came out, and with which software, machine and command.
Fractions lie in [0, 1], times are milliseconds unless the key says otherwise, sizes bytes, energies
millijoules. What was not measured is null and `reason` says why.
"""

import fcntl
import json
import os
import warnings
from io import FileIO
from pathlib import Path
from typing import Any

from qt_jax.errors import InvalidInput

Record = dict[str, Any]

STATUSES = ("ok", "unavailable", "refused", "crashed", "timeout", "invalid")

FIELDS = (
    *("run", "task", "model", "method", "seed", "checkpoint"),
    *("backend", "vendor", "kind", "runtime", "scheme", "weight_bits", "activation_bits", "per_channel"),
    *("dynamic", "calibration"),
    *("n", "top1", "top5", "nll", "brier", "ece", "logit_mse", "sqnr_db", "agreement", "miou"),
    *("latency_ms_p50", "latency_ms_p99", "throughput_ips", "cycles", "energy_mj", "cost", "model_bytes"),
    *("status", "reason", "versions", "cpu", "accelerator", "commit", "date", "command", "seconds"),
)
"""The keys every record has. Others may be added; the meaning of these is fixed."""


def new_record(**values: Any) -> Record:
    """A record with every key of `FIELDS`, null unless given in `values`, and the extra keys of `values`.

    >>> record = new_record(scheme="fp32", top1=0.9)
    >>> record["top1"], record["ece"]
    (0.9, None)
    """
    return dict.fromkeys(FIELDS) | values


def append(path: str | Path, record: Record) -> None:
    """Append `record` to the JSON-lines file at `path`, whole or not at all.

    Under a lock on the file, so that writers in several processes take turns, the line goes out in one
    write and is synced to disk. Half a line that a killed writer left at the end is cut off first.

    Raises InvalidInput if `record` holds a NaN, an infinity, or something JSON cannot express; the file
    is then untouched.

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
            raise OSError(f"No space left for a record in {path}: free some and run again.")
        os.fsync(file.fileno())


def _end_last_line(file: FileIO) -> None:
    """Make the file end with a newline: complete a whole record, cut off half of one."""
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
    """The records of the JSON-lines file at `path`; an absent file holds none.

    A line cut short by a kill is skipped with a warning that names file and line. It is recognised as a
    malformed last line without its newline.

    Raises InvalidInput, naming file and line, for any other malformed line.
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
