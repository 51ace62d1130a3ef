"""Take the open measurements of docs/speed.md, each in a process of its own, after the rows.

A measurement is a command of this project. Its log lies beside the rows. One that has ended well is not taken
again.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.configs.study import Preset
from qt_jax import records

DONE = "measurements.jsonl"
"""One record for each measurement that has ended."""


@dataclasses.dataclass(frozen=True)
class OpenMeasurement:
    """Describe a measurement.

    Attributes:
      name: Its name, also that of its log.
      command: What stands after `python -m`. `{folder}` is replaced by the folder of the preset.
      seconds: How long it takes on an NVIDIA H200, roughly.
    """

    name: str
    command: tuple[str, ...]
    seconds: float

    def command_line(self, folder: Path) -> list[str]:
        """Return the command line."""
        return [sys.executable, "-m", *(part.format(folder=folder) for part in self.command)]


def measurements(preset: Preset) -> list[OpenMeasurement]:
    """Return the measurements in the order of their worth; a reduced preset has them at a reduced size."""
    reduced = preset.name.endswith("-reduced")
    size = ("--batch-size", "8") if reduced else ("--batch-size", "512", "--dtype", "bfloat16")
    step = ("--model", "vit-tiny", "--repeats", "2", "--peers") if reduced else ("--model", "vit-small")
    step += () if reduced else ("--steps-per-dispatch", "10", "--peers", "torch")
    profile = ("--model", "vit-tiny", "--steps", "1") if reduced else ("--model", "vit-small")
    first = preset.tasks[0]
    together = str(min(5, len(preset.seeds) + len(preset.more_seeds)))
    return [
        OpenMeasurement(
            "step-vit",
            ("experiments.benchmarks.step", *step, *size, "--out", "{folder}/step.jsonl"),
            90,
        ),
        OpenMeasurement(
            "profile-vit",
            (
                "experiments.benchmarks.profile",
                *profile,
                *size,
                "--quant-trim",
                "--out",
                "{folder}/profile.jsonl",
            ),
            40,
        ),
        OpenMeasurement(
            "seeds-at-once",
            (
                *("experiments.accelerator", "--preset", preset.name, "--tasks", first.name),
                *("--methods", "float", "--seeds-at-once", together, "--no-measure"),
                *("--runs", "{folder}/seeds-at-once"),
            ),
            60,
        ),
    ]


def pending(preset: Preset, folder: Path) -> list[OpenMeasurement]:
    """Return the measurements that were not taken yet."""
    taken = {record["name"] for record in records.read(folder / DONE) if record["status"] == "ok"}
    return [measurement for measurement in measurements(preset) if measurement.name not in taken]


def take(measurement: OpenMeasurement, folder: Path, seconds: float) -> records.Record:
    """Take a measurement within some seconds, and return its record, which lies in `DONE` then."""
    log = folder / f"{measurement.name}.log"
    status, reason = _run(measurement.command_line(folder), log, seconds)
    record = {"name": measurement.name, "status": status, "reason": reason, "log": log.name}
    records.append(folder / DONE, record)
    return record


def _run(command: Sequence[str], log: Path, seconds: float) -> tuple[str, str | None]:
    """Run a command line with its output in a log, and return status and reason."""
    with open(log, "w") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return "timeout", f"it took more than {seconds:.0f} s"
    return ("ok", None) if code == 0 else ("crashed", f"exit status {code}, see {log.name}")
