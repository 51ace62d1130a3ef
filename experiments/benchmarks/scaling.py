"""Measure how the cost of Quant-Trim grows with sizes: `python -m experiments.benchmarks.scaling`.

Starting from one residual network, batch and image, one of five sizes is varied at a time: width, depth,
batch, resolution, and the number of elements of a tensor that Quant-Trim's statistics read. At each point the
trainer's step with Quant-Trim W8A8 takes turns with its two FP32 baselines, as in
`experiments.benchmarks.step`, which explains why there are two. The results are the ratio of the medians, the
ratio of the memory that XLA plans for, and the seconds to compile. The figure has one column per varied size
and one row per cost.

Statistics read a sub-sample of constant size, so their share falls as tensors grow. Rounding and clipping are
elementwise; convolutions are not.
"""

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import qt_jax as qt
from experiments.benchmarks import timing
from experiments.benchmarks.timing import Variant, finish
from experiments.benchmarks.variants import (
    CLASSES,
    FP32,
    QUANT_TRIM,
    UNFUSED,
    QuantTrimmed,
    Unfused,
    compiled_step,
    random_split,
)
from experiments.configs.training import Config, float_twin, lambda_schedule, quant_config
from experiments.models.resnet import ResNet
from qt_jax import records
from qt_jax.command_line import command
from qt_jax.records import Record
from qt_jax.reporting.figures import COLOURS, INK, canvas

LABELS = {
    "width": "width (channels)",
    "depth": "depth (layers)",
    "batch_size": "batch (images)",
    "resolution": "resolution (pixels)",
    "sample_size": "sub-sample (elements)",
}
"""Field of `Point` -> label of its axis."""

WARM_UP = 2
"""Rounds that are not counted. Every step is compiled before."""


class Point(NamedTuple):
    """Describe what is timed: a residual network of three stages, its square images, and the sub-sample."""

    width: int = 16
    depth: int = 8
    """Layers: 8, 14, 20, ... for one, two, three, ... blocks per stage."""
    batch_size: int = 64
    resolution: int = 32
    sample_size: int = qt.QuantConfig().sample_size


BASE = Point()

AXES: dict[str, tuple[int, ...]] = {
    "width": (8, 16, 32, 64),
    "depth": (8, 14, 20, 32),
    "batch_size": (16, 32, 64, 128, 256),
    "resolution": (16, 32, 64, 96),
    "sample_size": (256, 1024, 4096, 16384, 65536),
}
"""Field of `Point` -> its values, including that of the base. The other fields are those of the base."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Time training steps with and without Quant-Trim over width, depth, batch, resolution, sample size.

    Relaunching goes on where it was stopped.

    Example:
        python -m experiments.benchmarks.scaling --rounds 5
    """

    rounds: int = 10
    """Rounds counted at each point, after 2 of warm-up."""
    out: Path = Path("runs/scaling")
    """Folder for records.jsonl, one record per point, and scaling.png."""
    fresh: bool = False
    """Measure points again that this commit has already recorded, with as many rounds on this machine."""


def run(options: Options, console: Console) -> None:
    """Measure what is missing, append the records, print the table, draw the figure.

    Raises:
      InvalidInput: A count is below 1.
    """
    if options.rounds < 1:
        raise qt.InvalidInput(f"--rounds must be at least 1, got {options.rounds}")
    options.out.mkdir(parents=True, exist_ok=True)
    path, figure = options.out / "records.jsonl", options.out / "scaling.png"
    rows = {} if options.fresh else finished(path, options.rounds)
    with Progress(console=console, transient=True) as progress:
        whole = progress.add_task("points", total=len(points()))
        for point in points():
            if point not in rows:
                rows[point] = measure(point, options.rounds, progress)
                records.append(path, rows[point])
            progress.advance(whole)
    console.print(table(rows, options.rounds))
    scaling_figure({axis: along(axis, rows) for axis in AXES}, BASE._asdict(), figure)
    console.print(f"{path}, {figure}")


def points() -> list[Point]:
    """Return each point once, axis by axis."""
    found = [BASE._replace(**{axis: value}) for axis, values in AXES.items() for value in values]
    return list(dict.fromkeys(found))


def variants(point: Point, steps: int) -> dict[str, Variant]:
    """Compile both FP32 baselines and Quant-Trim W8A8 at a point."""
    config = Config(batch_size=point.batch_size, reverse_pruning=None, learning_rate=0.01)
    model = ResNet(((point.depth - 2) // 6,) * 3, point.width, CLASSES)
    specs = dataclasses.replace(quant_config(config), sample_size=point.sample_size)
    split = random_split(config, (point.resolution, point.resolution, 3))
    models = {
        FP32: model,
        UNFUSED: Unfused(model),
        QUANT_TRIM: QuantTrimmed(model, specs, lambda_schedule(config, steps)),
    }
    return {name: compiled_step(float_twin(config), model, split, steps) for name, model in models.items()}


def measure(point: Point, rounds: int, progress: Progress) -> records.Record:
    """Measure a point, and return its record: `timing.summarise` of Quant-Trim's step, and the baselines.

    In each round the step is divided by that of the baseline with the smaller median. The keys
    ratio_to_faster_paired, _p25 and _p75 are the median and the quartiles of these ratios.
    """
    steps = WARM_UP + rounds
    timed = variants(point, steps)
    times = timing.measure(timed, rounds, progress, WARM_UP)
    faster = min((FP32, UNFUSED), key=lambda name: statistics.median(times[name]))
    paired = np.divide(times[QUANT_TRIM], times[faster])
    rows = timing.summarise(times, FP32, (FP32, UNFUSED))
    known = {name: variant.compiled for name, variant in timed.items()}
    return records.new_record(
        benchmark="scaling",
        **point._asdict(),
        rounds=rounds,
        status="ok",
        weight_bits=8,
        activation_bits=8,
        **rows[QUANT_TRIM],
        **{
            f"ratio_to_faster_{name}": float(np.quantile(paired, quantile))
            for name, quantile in (("p25", 0.25), ("paired", 0.5), ("p75", 0.75))
        },
        fp32_step_ms_p50=rows[FP32]["step_ms_p50"],
        unfused_step_ms_p50=rows[UNFUSED]["step_ms_p50"],
        **known[QUANT_TRIM],
        fp32_peak_bytes=known[FP32]["peak_bytes"],
        peak_ratio=known[QUANT_TRIM]["peak_bytes"] / known[FP32]["peak_bytes"],
        fp32_compile_seconds=known[FP32]["compile_seconds"],
        unfused_compile_seconds=known[UNFUSED]["compile_seconds"],
        **timing.source(),
    )


def finished(path: Path, rounds: int) -> dict[Point, records.Record]:
    """Return the newest record of each point that was measured with as many rounds under equal conditions.

    These are the machine, the commit and the version of JAX.
    """

    def identity(row: records.Record) -> tuple:
        return row["accelerator"], row["cpu"], row["commit"], row["versions"]["jax"]

    here = identity(timing.source())
    return {
        Point(*(row[field] for field in Point._fields)): row
        for row in records.read(path)
        if row["rounds"] == rounds and identity(row) == here
    }


def along(axis: str, rows: dict[Point, records.Record]) -> list[records.Record]:
    """Return the records of an axis, in its order."""
    return [rows[BASE._replace(**{axis: value})] for value in AXES[axis]]


def table(rows: dict[Point, records.Record], rounds: int) -> Table:
    """Return the table for the terminal, one block per axis."""
    base = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in BASE._asdict().items())
    shown = Table(
        title=f"Quant-Trim's training step and FP32's, {rounds} rounds, {jax.devices()[0].device_kind}",
        caption=f"Otherwise {base}.\n/ faster: Quant-Trim's median to that of the faster FP32 step.\n"
        "paired: median (quartiles) of the ratios within a round.\nmemory, compile: Quant-Trim / FP32.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("varied", no_wrap=True)
    for heading in ("FP32 ms", "unfused ms", "Quant-Trim ms", "/ faster", "paired", "memory", "compile s"):
        shown.add_column(heading, justify="right")
    for axis, values in AXES.items():
        for value, row in zip(values, along(axis, rows), strict=True):
            shown.add_row(
                f"{axis.replace('_', ' ')} {value}",
                *(f"{row[key]:.1f}" for key in ("fp32_step_ms_p50", "unfused_step_ms_p50", "step_ms_p50")),
                f"{row['ratio_to_faster']:.3f}",
                f"{row['ratio_to_faster_paired']:.3f} ({row['ratio_to_faster_p25']:.2f}-"
                f"{row['ratio_to_faster_p75']:.2f})",
                f"{row['peak_ratio']:.3f}",
                f"{row['compile_seconds']:.1f} / {row['fp32_compile_seconds']:.1f}",
                end_section=value == values[-1],
            )
    return shown


def scaling_figure(axes: Mapping[str, Sequence[Record]], base: Mapping[str, int], path: Path) -> None:
    """Write a PNG of the ratio of step times, the ratio of memory, and the seconds to compile.

    Args:
      axes: Name of the varied size -> records in its order.
      base: Sizes from which each is varied. A vertical line marks them.
      path: File, which is replaced if it exists.
    """
    figure = canvas(15, 8.5)
    grid = figure.subplots(3, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, (name, rows) in zip(grid.T, axes.items(), strict=True):
        sizes = [row[name] for row in rows]
        _times(column[0], sizes, rows)
        column[1].plot(sizes, [row["peak_ratio"] for row in rows], "o-", color=COLOURS["quant-trim"])
        _compilation(column[2], sizes, rows)
        for panel in column:
            panel.axvline(base[name], color="0.85", zorder=0)
        column[2].set_xscale("log", base=2)
        column[2].set_xticks(sizes, [str(size) for size in sizes])
        column[2].minorticks_off()
        column[2].set_xlabel(LABELS[name])
    for panel in grid[:2].flat:
        panel.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    grid[0, 0].set_ylabel("step time\nQuant-Trim / faster FP32")
    grid[1, 0].set_ylabel("peak memory\nQuant-Trim / FP32")
    grid[2, 0].set_ylabel("compilation (s)")
    grid[2, 0].set_ylim(bottom=0)
    grid[2, 0].legend(frameon=False, loc="upper left")
    device = axes[next(iter(axes))][0]["accelerator"] or "CPU"
    figure.suptitle(
        f"Cost of Quant-Trim W8A8 over FP32, {device}: medians over rounds, bars from quartile to quartile"
    )
    finish(figure, path)


def _times(panel: Axes, sizes: Sequence[int], rows: Sequence[Record]) -> None:
    middle, low, high = ([row[f"ratio_to_faster_{end}"] for row in rows] for end in ("paired", "p25", "p75"))
    panel.vlines(sizes, low, high, color=COLOURS["quant-trim"], alpha=0.35, linewidth=5)
    panel.plot(sizes, middle, "o-", color=COLOURS["quant-trim"])


def _compilation(panel: Axes, sizes: Sequence[int], rows: Sequence[Record]) -> None:
    for key, label, colour, style in (
        ("compile_seconds", "Quant-Trim", COLOURS["quant-trim"], "o-"),
        ("fp32_compile_seconds", "FP32", COLOURS["float"], "s--"),
    ):
        panel.plot(sizes, [row[key] for row in rows], style, color=colour, label=label)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status, as `command` does."""
    return command("experiments.benchmarks.scaling", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
