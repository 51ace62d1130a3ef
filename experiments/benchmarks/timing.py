"""Time compiled steps that take turns, and finish figures: shared by the benchmarks of steps."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich.progress import Progress

from experiments.devices import accelerator
from qt_jax.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM_UP = 3
"""Rounds that are not counted. The first one compiles what is not compiled yet."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "qwix", "aqtp", "torch")


class Variant(NamedTuple):
    """Hold one way to train. `advance(state) -> state` takes `steps` steps; `prepare` runs first, untimed."""

    advance: Callable[[Any], Any]
    state: Any
    prepare: Callable[[Any], Any] = lambda state: state
    compiled: dict[str, float] = {}  # noqa: RUF012 - of a NamedTuple, never changed
    """peak_bytes and compile_seconds of the step, where XLA tells them."""
    steps: int = 1
    """Steps that `advance` takes in one compiled loop."""
    program: Callable[[], str] = str
    """The text of the compiled program, where there is one."""


def measure(
    variants: dict[str, Variant], repeats: int, progress: Progress, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Return the milliseconds per step of each counted round, by variant.

    Entry i of every list is of the same round. A new order is drawn for each round (the same in every
    run), because a step depends on what ran before it. On two cores a short step of JAX takes 8 % less time
    after one of PyTorch than after another of JAX.
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
    """Return step_ms_p50, its quartiles, step_ms_min and three ratios for each variant.

    `ratio` is the variant's median to that of `plain`. `ratio_paired` is the median of the ratios within each
    round. `ratio_to_faster` is the variant's median to that of the fastest of `baselines`.
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
    """Return the peak memory of a compiled function: its arguments, its outputs and its temporaries."""
    found = compiled.memory_analysis()
    outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return outside + found.temp_size_in_bytes


def source() -> dict[str, Any]:
    """Return the provenance of a record, with the accelerator if JAX runs on one."""
    return provenance(PACKAGES) | {"accelerator": accelerator()}


def finish(figure: "Figure", path: Path) -> None:
    """Remove the upper and right spines, draw a light grid behind, and write the PNG over any old one."""
    from qt_jax.reporting.figures import save_figure  # matplotlib, which those that only time do without

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    save_figure(figure, path)
