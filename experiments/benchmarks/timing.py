"""Compiled steps taken in turn and timed; what every benchmark of steps shares.

The look of the benchmarks' figures.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress

from experiments.devices import accelerator
from qt_jax.provenance import provenance
from qt_jax.reporting.figures import save_figure

WARM_UP = 3
"""Rounds that are not counted; the first one compiles what is not compiled yet."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "qwix", "aqtp", "torch")


class Variant(NamedTuple):
    """One way to train: `advance(state) -> state` takes `steps` steps; `prepare`, before, is not timed."""

    advance: Callable[[Any], Any]
    state: Any
    prepare: Callable[[Any], Any] = lambda state: state
    compiled: dict[str, float] = {}  # noqa: RUF012 - of a NamedTuple, never changed
    """peak_bytes and compile_seconds of the step, where XLA says so."""
    steps: int = 1
    """Steps that `advance` takes in one compiled loop."""
    program: Callable[[], str] = str
    """The text of the compiled program, where there is one."""


def measure(
    variants: dict[str, Variant], repeats: int, progress: Progress, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Milliseconds a step of each counted round, by variant; entry i of every list is of the same round.

    The order is drawn anew for each round (the same in every run): what ran before leaves its marks. On two
    cores a short step of JAX's takes 8 % less after one of PyTorch's than after another of JAX's.
    """
    random = np.random.default_rng(0)
    states = {name: variant.state for name, variant in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    task = progress.add_task("compiling", total=(warm_up + repeats) * len(variants))
    for turn in range(warm_up + repeats):
        for name in random.permutation(list(variants)).tolist():
            variant = variants[name]
            progress.update(task, description=f"{'warm-up' if turn < warm_up else 'timing'}: {name}")
            state = jax.block_until_ready(variant.prepare(states[name]))
            start = time.perf_counter()
            states[name] = jax.block_until_ready(variant.advance(state))
            milliseconds = 1e3 * (time.perf_counter() - start) / variant.steps
            if turn >= warm_up:
                times[name].append(milliseconds)
            progress.advance(task)
    progress.remove_task(task)
    return times


def summarise(
    times: dict[str, list[float]], plain: str, baselines: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each variant: step_ms_p50, its quartiles, step_ms_min, and three ratios.

    `ratio` is of the medians to that of `plain`, `ratio_paired` the median of the ratios within each round,
    and `ratio_to_faster` is of the medians to that of the fastest of `baselines`.
    """
    base = times[plain]
    fastest = min(statistics.median(times[name]) for name in baselines)
    return {
        name: {
            "step_ms_p50": statistics.median(mine),
            "step_ms_p25": float(np.quantile(mine, 0.25)),
            "step_ms_p75": float(np.quantile(mine, 0.75)),
            "step_ms_min": min(mine),
            "ratio": statistics.median(mine) / statistics.median(base),
            "ratio_paired": statistics.median(a / b for a, b in zip(mine, base, strict=True)),
            "ratio_to_faster": statistics.median(mine) / fastest,
        }
        for name, mine in times.items()
    }


def peak_bytes(compiled: Any) -> int:
    """What a compiled function needs at its height: its arguments, its outputs, and what lies between."""
    found = compiled.memory_analysis()
    outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return outside + found.temp_size_in_bytes


def source() -> dict[str, Any]:
    """The provenance of a record, with the accelerator if JAX is on one."""
    return provenance(PACKAGES) | {"accelerator": accelerator()}


def finish(figure: Figure, path: Path) -> None:
    """Opens the panels, rules light lines behind what they show, and writes the PNG; replaced if there."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    save_figure(figure, path)
