"""`python -m experiments.benchmarks.step`: one training step, plain, with Quant-Trim, with Qwix, in PyTorch.

The measured step is the trainer's own (`experiments.training.step`): augmentation, forward, backward, SGD
with Nesterov momentum, statistics; one compiled function with donated state, on random CIFAR-shaped images.
The variants take turns, A B C D E A B C D E ..., so that a disturbance of the machine strikes all of them.

Qwix (`QtProvider`, rule `weight_qtype="int8", act_qtype="int8"`) is left at its defaults: symmetric absmax
over the whole tensor, weights with a scale per output channel, activations with one per image taken anew
in every step (no statistics are kept), the forward convolutions in int8 with int32 sums, the backward ones in
float32 with the straight-through estimator.

There are two FP32 baselines, because XLA's CPU backend compiles the plain step badly; see
`experiments.benchmarks.unfused`. Quant-Trim's honest cost is its ratio to the faster of the two.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import qt_jax as qt
from experiments import models
from experiments.baselines.qwix_qat import qwix_model
from experiments.benchmarks.unfused import Grouped, Unfused
from experiments.command_line import exit_status
from experiments.configs.cifar import Config, float_twin, lambda_schedule
from experiments.training.state import TrainState, create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_train_step
from qt_jax.reporting import records
from qt_jax.reporting.provenance import provenance

WARM_UP = 3
"""Rounds that are not counted; the first one compiles."""
IMAGE_SHAPE, CLASSES = (32, 32, 3), 10
PIPED_WIDTH = 130
"""Characters of the table's lines where no terminal says how many there are."""
MASK_SHAPE = (64, 64, 3)
"""Images of segmentation."""
FP32, UNFUSED, GROUPED, TORCH, QUANT_TRIM, PRUNED, PULL, QWIX = (
    *(
        "fp32",
        "fp32, unfused inputs",
        "fp32, XLA's grouped convolution",
        "fp32, PyTorch",
        "quant-trim",
        "quant-trim + reverse pruning",
        "quant-trim, a step that prunes",
        "qwix",
    ),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Time one training step: plain, with Quant-Trim (without and with reverse pruning), with Qwix QAT, and
    where torch is installed in PyTorch; for MobileNets with XLA's own grouped convolution too."""

    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(models.MODELS | models.SEGMENTERS) + "}")] = (
        "resnet20"
    )
    """Network."""
    batch_size: int = 128
    """Images a step."""
    repeats: int = 20
    """Rounds counted, after 3 rounds of warm-up."""
    out: Path | None = None
    """JSON-lines file to which one record for each variant is appended."""


class Variant(NamedTuple):
    """One way to train: `advance(state) -> state` takes a step; `prepare` comes before it, off the clock."""

    advance: Callable[[Any], Any]
    state: Any
    prepare: Callable[[Any], Any] = lambda state: state
    compiled: dict[str, float] = {}  # noqa: RUF012 - of a NamedTuple, never changed
    """peak_bytes and compile_seconds of the step, where XLA says so."""


def trained(options: Options) -> Config:
    """The trainer's config with Quant-Trim W8A8 and reverse pruning; lambda moves from 0 to 1 as it runs."""
    return Config(
        model=options.model,
        dataset="composed" if options.model in models.SEGMENTERS else "cifar10",
        batch_size=options.batch_size,
        reverse_pruning_start=0.0,
        learning_rate=0.01,
    )


def build(options: Options) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants in the order in which they take turns, and why any that is missing is missing."""
    full = trained(options)
    total = WARM_UP + options.repeats
    model = models.create(options.model, CLASSES)
    random = np.random.default_rng(0)
    n = 2 * options.batch_size
    masks = options.model in models.SEGMENTERS
    shape = MASK_SHAPE if masks else IMAGE_SHAPE
    labels = random.integers(0, CLASSES, (n, *shape[:2]), np.uint8) if masks else None
    split = Split(
        jnp.asarray(random.integers(0, 256, (n, *shape), np.uint8)),
        jnp.asarray(random.integers(0, CLASSES, n, np.int32) if labels is None else labels),
    )

    def variant(config: Config, model: nn.Module, prepare=lambda state: state) -> Variant:
        """The compiled step of a config with its first state."""
        tx = optimizer(config, total)
        lam = lambda_schedule(config, total)
        run = make_train_step(config, model, tx, lam, (0.5,) * 3, (0.25,) * 3, CLASSES)
        order = epoch_order(config, n, 0)
        one = jnp.int32(1)

        state = create_state(config, model, tx, shape)
        started = time.perf_counter()
        compiled = run.lower(state, Totals.zero(), split, order, one).compile()
        seconds = time.perf_counter() - started

        def advance(state):
            return compiled(state, Totals.zero(), split, order, one)[0]

        return Variant(
            advance, state, prepare, {"peak_bytes": peak_bytes(compiled), "compile_seconds": seconds}
        )

    twin = float_twin(full)
    pruned = variant(full, model, partial(with_pruning_count, count=1))
    pull = pruned._replace(
        state=jax.tree.map(jnp.copy, pruned.state), prepare=partial(with_pruning_count, count=0)
    )
    variants = {
        FP32: variant(twin, model),
        UNFUSED: variant(twin, Unfused(model)),
        QUANT_TRIM: variant(dataclasses.replace(full, reverse_pruning=None), model),
        PRUNED: pruned,
        PULL: pull,
    }
    if options.model.startswith("mobilenet"):
        variants[GROUPED] = variant(twin, Grouped(model))
    missing = {}
    try:
        variants[QWIX] = variant(twin, qwix_model(model))
    except ImportError as error:
        missing[QWIX] = f"qwix cannot be imported: {error}"
    try:
        from experiments.benchmarks.torch_step import torch_step

        variants[TORCH] = Variant(
            *torch_step(model, np.asarray(split.images), np.asarray(split.labels), full)
        )
    except ImportError as error:
        missing[TORCH] = f"torch cannot be imported: {error}"
    except KeyError as error:
        missing[TORCH] = f"there is no PyTorch network for {error}"
    return variants, missing


def peak_bytes(compiled: Any) -> int:
    """What a compiled step needs at its height: its arguments, its outputs, and what lies between."""
    found = compiled.memory_analysis()
    outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return outside + found.temp_size_in_bytes


def with_pruning_count(state: TrainState, count: int) -> TrainState:
    """The state with reverse pruning's counter, last in the optimizer's chain, at `count`; 0 is due."""
    *others, pruning = state.opt_state
    return state.replace(opt_state=(*others, pruning._replace(count=jnp.int32(count))))


def measure(variants: dict[str, Variant], repeats: int, progress: Progress) -> dict[str, list[float]]:
    """Milliseconds of each counted step, by variant; entry i of every list is of the same round."""
    states = {name: variant.state for name, variant in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    task = progress.add_task("compiling", total=(WARM_UP + repeats) * len(variants))
    for turn in range(WARM_UP + repeats):
        for name, variant in variants.items():
            progress.update(task, description=f"{'warm-up' if turn < WARM_UP else 'timing'}: {name}")
            state = jax.block_until_ready(variant.prepare(states[name]))
            start = time.perf_counter()
            states[name] = jax.block_until_ready(variant.advance(state))
            milliseconds = 1e3 * (time.perf_counter() - start)
            if turn >= WARM_UP:
                times[name].append(milliseconds)
            progress.advance(task)
    return times


def summarise(times: dict[str, list[float]], every: int) -> dict[str, dict[str, float]]:
    """For each variant but `PULL`: step_ms_p50, its quartiles, step_ms_min, and three ratios.

    `ratio` is of the medians to fp32's, `ratio_paired` the median of the ratios within each round, and
    `ratio_to_faster` is of the medians to that of the faster FP32 baseline. Reverse pruning's
    are of its ordinary steps, and amortised_ms = ((every - 1) ordinary + pruning) / every, of medians.
    """
    base = times[FP32]
    fastest = min(statistics.median(times[name]) for name in (FP32, UNFUSED))
    rows = {
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
    pull, row = rows.pop(PULL)["step_ms_p50"], rows[PRUNED]
    amortised = ((every - 1) * row["step_ms_p50"] + pull) / every
    row |= {
        "pruning_step_ms_p50": pull,
        "every": every,
        "amortised_ms": amortised,
        "amortised_ratio": amortised / rows[FP32]["step_ms_p50"],
    }
    return rows


def with_memory(
    rows: dict[str, dict[str, float]], variants: dict[str, Variant]
) -> dict[str, dict[str, float | None]]:
    """The rows with what is known of each compiled step, and `peak_ratio` to fp32's memory."""
    plain = variants[FP32].compiled["peak_bytes"]
    known = {name: variants[name].compiled for name in rows}
    ratios = {name: found["peak_bytes"] / plain if found else None for name, found in known.items()}
    return {name: {**row, **known[name], "peak_ratio": ratios[name]} for name, row in rows.items()}


def to_records(
    options: Options,
    rows: dict[str, dict[str, float]],
    missing: dict[str, str],
) -> list[records.Record]:
    """One record for each variant, measured or not."""
    device = jax.devices()[0]
    source = provenance(["jax", "jaxlib", "flax", "optax", "qwix", "torch"])
    if device.platform != "cpu":
        source["accelerator"] = device.device_kind
    return [
        records.new_record(
            benchmark="train_step",
            model=options.model,
            batch_size=options.batch_size,
            variant=name,
            repeats=options.repeats,
            weight_bits=None if name.startswith(FP32) else 8,
            activation_bits=None if name.startswith(FP32) else 8,
            per_channel=None if name.startswith(FP32) else name == QWIX,
            status="unavailable" if name in missing else "ok",
            reason=missing.get(name),
            **rows.get(name, {"step_ms_p50": None, "ratio": None}),
            **source,
        )
        for name in (*rows, *missing)
    ]


def table(options: Options, rows: list[records.Record]) -> Table:
    """What the terminal shows."""
    shown = Table(
        title=f"One training step: {options.model}, batch {options.batch_size}, {options.repeats} rounds, "
        f"{jax.devices()[0].device_kind}",
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("variant", no_wrap=True)
    for heading in ("median ms", "quartiles", "/ fp32", "paired", "/ faster fp32", "memory / fp32"):
        shown.add_column(heading, justify="right")
    for row in rows:
        if row["status"] != "ok":
            shown.add_row(row["variant"], row["status"])
            continue
        shown.add_row(
            row["variant"],
            f"{row['step_ms_p50']:.1f}",
            f"{row['step_ms_p25']:.1f}-{row['step_ms_p75']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_paired']:.3f}",
            f"{row['ratio_to_faster']:.3f}",
            f"{row['peak_ratio']:.3f}" if row.get("peak_ratio") else "",
        )
        if "amortised_ms" in row:
            shown.add_row("  a step that prunes", f"{row['pruning_step_ms_p50']:.1f}")
            shown.add_row(
                f"  amortised over {row['every']}",
                f"{row['amortised_ms']:.1f}",
                "",
                f"{row['amortised_ratio']:.3f}",
            )
    reasons = [f"{row['variant']}: {row['reason']}" for row in rows if row["reason"]]
    shown.caption = "\n".join(reasons) or None
    return shown


def run(options: Options, console: Console) -> list[records.Record]:
    """Measures, prints the table, appends the records.

    Raises:
      InvalidInput: an unknown model, or a count below 1.
    """
    if options.repeats < 1:
        raise qt.InvalidInput(f"--repeats must be at least 1, got {options.repeats}")
    variants, missing = build(options)
    with Progress(console=console, transient=True) as progress:
        times = measure(variants, options.repeats, progress)
    rows = with_memory(summarise(times, trained(options).reverse_pruning_every), variants)
    rows = to_records(options, rows, missing)
    console.print(table(options, rows))
    for row in rows if options.out else ():
        records.append(options.out, row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a message about wrong input."""
    prog = "python -m experiments.benchmarks.step"
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return exit_status(lambda: run(tyro.cli(Options, args=arguments, prog=prog), Console(width=width)))


if __name__ == "__main__":
    sys.exit(main())
