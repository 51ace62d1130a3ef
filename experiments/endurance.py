"""Check that a killed run ends like an undisturbed one: `python -m experiments.endurance --kills 50`.

One command of `experiments.cifar` runs twice. The first run is not disturbed. The second is killed by SIGKILL
and relaunched as often as asked. A third of the kills wait until a checkpoint is being written, a third fall
between two checkpoints, and the others fall anywhere from the start of the process. Once training is over,
all kills fall anywhere. At the end both folders hold the same bits, or the exit status is 1.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tqdm import tqdm

import qt_jax as qt
from qt_jax import records
from qt_jax.command_line import Failed, command
from qt_jax.export.network import restore

METHOD = "quant-trim"
RUN = ("--preset", "smoke", "--no-compare", "--test-limit", "50", "--seed", "3")
"""Flags of the run."""
MOMENTS = ("checkpoint", "epoch", "anywhere")
"""When a kill falls: while a checkpoint is written, after one, or at any time."""
POLL = 0.0005
"""Seconds between two looks at the folder."""
LIFE = 12.0
"""Seconds after the start of a process within which a kill at any time falls."""
ROWS = {"metrics.jsonl": ("epoch", "step", "loss", "tau"), "records.jsonl": ("scheme", "top1", "nll")}
"""File -> keys that are compared. Its rows also hold times, which differ."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Kill a short run at random moments, relaunch it each time, and compare its end with an undisturbed one.

    Example:
        python -m experiments.endurance --kills 5 --epochs 20 --seed 1
    """

    kills: int = 50
    """Number of kills."""
    epochs: int = 150
    """Length of the run. The process lives for about one epoch between two kills."""
    seed: int | None = None
    """Seed of the moments, which is printed. Default: drawn at random."""
    out: Path = Path("runs/endurance")
    """Folder of both runs and of log.jsonl. It must not exist yet."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does; 1 if the ends differ."""
    return command(
        "experiments.endurance", Options, run, arguments, failure="the ends differ", soft_wrap=True
    )


def run(options: Options, console: Console) -> None:
    """Carry out both runs, and compare their ends.

    Raises:
      InvalidInput: The folder exists, a process fails that nobody kills, or the run is over before the last
        kill.
      Failed: The ends differ.
    """
    if options.out.exists():
        raise qt.InvalidInput(f"{options.out} is there: name another --out, or delete it")
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    console.print(f"seed {seed}: {options.kills} kills, {options.epochs} epochs, {options.out}")
    options.out.mkdir(parents=True)
    whole, killed = (options.out.absolute() / name for name in ("whole", "killed"))
    finish(launch(whole, options.epochs))
    moments = random.Random(seed)
    for number in tqdm(range(1, options.kills + 1), desc="kills", unit="kill", disable=None):
        row = one_life(killed, options.epochs, moments)
        records.append(options.out / "log.jsonl", {"kill": number, **row})
        if row["moment"] == "none":
            raise qt.InvalidInput(
                f"the run ended before kill {number}: choose more --epochs than {options.epochs}"
            )
    finish(launch(killed, options.epochs))
    differ = list(differences(whole, killed))
    report(records.read(options.out / "log.jsonl"), console)
    if differ:
        raise Failed(f"the ends differ in {', '.join(differ)}")
    console.print("Both runs end alike, bit for bit, in checkpoint, graph, metrics and records.")


def launch(folder: Path, epochs: int) -> subprocess.Popen:
    """Start the command in a new process. All processes share one cache of compiled programs."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((folder.parent / "jax-cache").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | cache
    flags = (*RUN, "--epochs", str(epochs), "--out", str(folder))
    with open(folder.parent / f"{folder.name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.cifar", *flags],
            env=environment,
            cwd=Path(__file__).parents[1],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen) -> None:
    """Wait for a process that nobody kills. Raise InvalidInput if it fails."""
    if process.wait():
        raise qt.InvalidInput(f"a run has ended with status {process.returncode}: see its log in --out")


def one_life(folder: Path, epochs: int, moments: random.Random) -> dict[str, Any]:
    """Launch the command, kill it at a random moment, and return when that was and what is left."""
    started = time.monotonic()
    process = launch(folder, epochs)
    before = newest(folder)
    moment = "anywhere" if trained(folder, epochs) else moments.choice(MOMENTS)
    wait = {"checkpoint": until_written, "epoch": until_epoch, "anywhere": until_any}[moment]
    wait(folder, process, before, moments)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not alive and process.returncode:
        raise qt.InvalidInput(f"a run has ended with status {process.returncode}: see its log in --out")
    partial = sorted(entry.name for entry in steps_folder(folder).glob("*tmp*"))
    return {
        "moment": moment if alive else "none",
        "seconds": round(time.monotonic() - started, 2),
        "step_before": before,
        "step_left": newest(folder),
        "half_written": partial,
        "trained": trained(folder, epochs),
        "graph": (folder / "model.onnx").exists(),
        "records": len((folder / "records.jsonl").read_text().splitlines())
        if (folder / "records.jsonl").exists()
        else 0,
    }


def until_written(folder: Path, process: subprocess.Popen, before: int, moments: random.Random) -> None:
    """Wait until a checkpoint after the first new one is being written, and some milliseconds more."""
    while process.poll() is None and newest(folder) <= before:
        time.sleep(POLL)
    while process.poll() is None and not any(steps_folder(folder).glob("*tmp*")):
        time.sleep(POLL)
    time.sleep(moments.uniform(0.0, 0.03))


def until_epoch(folder: Path, process: subprocess.Popen, before: int, moments: random.Random) -> None:
    """Wait until there is a new checkpoint, and up to half a second more."""
    while process.poll() is None and newest(folder) <= before:
        time.sleep(POLL)
    time.sleep(moments.uniform(0.0, 0.5))


def until_any(folder: Path, process: subprocess.Popen, before: int, moments: random.Random) -> None:
    """Wait for a random time, which may end while the process still imports."""
    end = time.monotonic() + moments.uniform(0.0, LIFE)
    while process.poll() is None and time.monotonic() < end:
        time.sleep(10 * POLL)


def steps_folder(folder: Path) -> Path:
    """Return the folder of a run's checkpoints, with one folder per step."""
    return folder / "checkpoints" / METHOD


def newest(folder: Path) -> int:
    """Return the newest step that has a checkpoint, or -1."""
    try:
        return max(
            (int(entry.name) for entry in steps_folder(folder).iterdir() if entry.name.isdigit()), default=-1
        )
    except FileNotFoundError:
        return -1


def trained(folder: Path, epochs: int) -> bool:
    """Tell whether training is over."""
    rows = records.read(folder / "metrics.jsonl") if newest(folder) > 0 else []
    return any(row["epoch"] == epochs and row["step"] == newest(folder) for row in rows)


def differences(whole: Path, killed: Path) -> Iterator[str]:
    """Name what differs at the ends of two runs: arrays of the last checkpoint, the graph, rows."""
    one, other = (restore(steps_folder(folder)) for folder in (whole, killed))
    if jax.tree.structure(one) != jax.tree.structure(other):
        yield "the checkpoints hold other arrays"
    else:
        for (path, mine), theirs in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
            if not np.array_equal(mine, theirs, equal_nan=True):
                yield f"checkpoint {jax.tree_util.keystr(path, simple=True, separator='/')}"
    if (whole / "model.onnx").read_bytes() != (killed / "model.onnx").read_bytes():
        yield "model.onnx"
    for file, keys in ROWS.items():
        mine, theirs = (
            sorted(json.dumps([row[key] for key in keys]) for row in records.read(folder / file))
            for folder in (whole, killed)
        )
        if mine != theirs:
            yield file


def report(log: list[dict[str, Any]], console: Console) -> None:
    """Print how many kills fell where."""
    where = Counter(
        "a checkpoint half written"
        if row["half_written"]
        else "after training"
        if row["trained"]
        else "before a new checkpoint"
        if row["step_left"] == row["step_before"]
        else "between checkpoints"
        for row in log
    )
    console.print(f"{len(log)} kills: " + ", ".join(f"{count} {name}" for name, count in where.items()))


if __name__ == "__main__":
    sys.exit(main())
