"""Time one training step, plain, with Quant-Trim, with its peers: `python -m experiments.benchmarks.step`.

The measured step is the trainer's own (`experiments.training.step`): augmentation, forward, backward, SGD
with Nesterov momentum, and statistics. It is one compiled function with donated state, on random CIFAR-shaped
images. The variants take turns, in another order every round. A disturbance of the machine then strikes all
of them, and none always follows the same other one. Parameters and statistics are float32 whatever the
compute type.

Qwix (`QtProvider`, rule `weight_qtype="int8", act_qtype="int8"`) is left at its defaults. It uses symmetric
absmax over the whole tensor. Weights have a scale per output channel, activations one per image, taken in
every step without statistics. The forward convolutions are in int8 with int32 sums, the backward ones in
float32 with the straight-through estimator. Qwix does not see depthwise convolutions where, on CPUs in
float32, `experiments.models.convolution` computes them as products. `variants.aqt_model` describes AQT, and
`experiments.benchmarks.torch_step` PyTorch, plain and with its own fake quantization.

There are two FP32 baselines, because XLA's CPU backend compiles the plain step badly; see `variants.Unfused`.
Quant-Trim's honest cost is its ratio to the faster of the two.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import qt_jax as qt
from experiments import models
from experiments.benchmarks import timing
from experiments.benchmarks.timing import WARM_UP, Variant, measure
from experiments.benchmarks.variants import (
    FP32,
    PEERS,
    PRUNED,
    PULL,
    UNFUSED,
    build,
    in_float,
    per_channel,
    step_config,
)
from qt_jax import records
from qt_jax.command_line import command


@dataclasses.dataclass(frozen=True)
class Options:
    """Time one training step: plain, with Quant-Trim (without and with reverse pruning), with Qwix and AQT,
    and in PyTorch without and with quantization, where these are installed; for MobileNets with XLA's own
    grouped convolution too.

    Example:
        python -m experiments.benchmarks.step --model resnet20 --batch-size 128
    """

    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(models.MODELS | models.SEGMENTERS) + "}")] = (
        "resnet20"
    )
    """Network."""
    batch_size: int = 128
    """Images per step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of every variant; "fp32" in their names then says that nothing is quantized."""
    steps_per_dispatch: int = 1
    """Steps in one compiled loop, which is one round. On CPUs keep 1, as in training."""
    peers: tuple[Literal["qwix", "aqt", "torch"], ...] = PEERS
    """Packages whose steps are timed too."""
    repeats: int = 20
    """Rounds counted, after 3 rounds of warm-up."""
    out: Path | None = None
    """JSON-lines file to which one record for each variant is appended."""


def summarise(times: dict[str, list[float]], every: int, steps: int = 1) -> dict[str, dict[str, float]]:
    """Return `timing.summarise` of each variant but `PULL`, over the two FP32 baselines.

    The numbers of reverse pruning are those of its ordinary steps. With medians, amortised_ms =
    ((every - 1) ordinary + pruning) / every. Of `steps` steps of `PULL`, the first prunes.
    """
    rows = timing.summarise(times, FP32, [name for name in (FP32, UNFUSED) if name in times])
    row = rows[PRUNED]
    pull = steps * rows.pop(PULL)["step_ms_p50"] - (steps - 1) * row["step_ms_p50"]
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
    """Return the rows with what is known of each compiled step, and `peak_ratio` to the memory of fp32."""
    plain = variants[FP32].compiled["peak_bytes"]
    known = {name: variants[name].compiled for name in rows}
    ratios = {name: found["peak_bytes"] / plain if found else None for name, found in known.items()}
    return {name: {**row, **known[name], "peak_ratio": ratios[name]} for name, row in rows.items()}


def to_records(
    options: Options,
    rows: dict[str, dict[str, float]],
    missing: dict[str, tuple[str, str]],
) -> list[records.Record]:
    """Return one record for each variant, measured or not."""
    source = timing.source()
    return [
        records.new_record(
            benchmark="train_step",
            model=options.model,
            batch_size=options.batch_size,
            dtype=options.dtype,
            steps_per_dispatch=options.steps_per_dispatch,
            variant=name,
            repeats=options.repeats,
            weight_bits=None if in_float(name) else 8,
            activation_bits=None if in_float(name) else 8,
            per_channel=per_channel(name),
            status=missing.get(name, ("ok", None))[0],
            reason=missing.get(name, ("ok", None))[1],
            **rows.get(name, {"step_ms_p50": None, "ratio": None}),
            **source,
        )
        for name in (*rows, *missing)
    ]


def table(options: Options, rows: list[records.Record]) -> Table:
    """Return the table for the terminal."""
    shown = Table(
        title=f"One training step: {options.model}, batch {options.batch_size}, {options.dtype}, "
        f"{options.repeats} rounds, {jax.devices()[0].device_kind}",
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
    """Measure, print the table, append the records.

    Raises:
      InvalidInput: The model is unknown, or a count is below 1.
    """
    if options.repeats < 1:
        raise qt.InvalidInput(f"--repeats must be at least 1, got {options.repeats}")
    steps = options.steps_per_dispatch * (WARM_UP + options.repeats)
    config = step_config(options.model, options.batch_size, options.dtype, options.steps_per_dispatch)
    variants, missing = build(config, steps, options.peers)
    with Progress(console=console, transient=True) as progress:
        times = measure(variants, options.repeats, progress)
    rows = with_memory(summarise(times, config.reverse_pruning_every, options.steps_per_dispatch), variants)
    rows = to_records(options, rows, missing)
    console.print(table(options, rows))
    for row in rows if options.out else ():
        records.append(options.out, row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status, as `command` does."""
    return command("experiments.benchmarks.step", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
