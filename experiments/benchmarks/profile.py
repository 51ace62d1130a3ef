"""Profile a training step by kind of operation: `python -m experiments.benchmarks.profile`.

The trainer's compiled step runs under JAX's profiler. Every event with the name of an instruction of the
compiled program is counted under its kind. The kind comes from the program's text (on CPUs and accelerators),
or from the name, for kernels of a GPU's libraries. Times are summed over threads or streams, so on CPUs the
total is that of all cores. An instruction that was fused from several counts under the heaviest of them.
"""

import dataclasses
import re
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import models
from experiments.benchmarks import timing
from experiments.benchmarks.variants import CLASSES, compiled_step, random_split, step_config
from experiments.configs.training import float_twin
from qt_jax import records
from qt_jax.command_line import command

CONVOLUTION, WEIGHT_GRADIENT = (
    "convolution, forward or gradient of the input",
    "convolution, gradient of the kernel",
)
PRODUCT, TRANSPOSE, SELECTION, ROUNDING, REDUCTION, ELEMENTWISE, OTHER = (
    "matrix product",
    "transposition",
    "quantiles: sub-samples, selection",
    "elementwise, with rounding to a grid",
    "reduction",
    "elementwise",
    "other",
)
KINDS = (
    (SELECTION, r"\b(sort|topk|TopK)\b|\bgather\("),
    (PRODUCT, r"\bdot\(|nvjet|gemm|custom_call_target=\"__cublas"),
    (ROUNDING, r"\bround-nearest-even\("),
    (REDUCTION, r"\breduce\(|\breduce-window\("),
    (TRANSPOSE, r"\btranspose\("),
)
"""Kinds that a word in the text of an instruction, or of what it was fused from, reveals. They are tried in
this order, after convolutions."""
LIBRARY = (
    (WEIGHT_GRADIENT, r"wgrad"),
    (CONVOLUTION, r"dgrad|fprop|conv"),
    (SELECTION, r"topk|stream_executor::cuda::Run"),
    (PRODUCT, r"nvjet|gemm|cublas"),
)
"""Kinds of a GPU's library kernels, by a part of the name."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Profile a training step, plain or with Quant-Trim, by kind of operation.

    Example:
        python -m experiments.benchmarks.profile --model vit --batch-size 64 --quant-trim
    """

    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(models.MODELS | models.SEGMENTERS) + "}")] = (
        "resnet20"
    )
    """Network."""
    batch_size: int = 128
    """Images per step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    quant_trim: bool = False
    """Profile the step with Quant-Trim. No counted step prunes."""
    steps: int = 5
    """Steps under the profiler, after three without it."""
    out: Path | None = None
    """JSON-lines file to which a record is appended."""


def instructions(program: str) -> dict[str, str]:
    """Return the kind of every instruction of a compiled program, by name, from `compiled.as_text()`.

    >>> text = "%f { ROOT %t = f32[2] transpose(%p) }"
    >>> text += chr(10) + "ENTRY %e { %x = f32[2] fusion(%p), calls=%f }"
    >>> instructions(text)["x"]
    'transposition'
    """
    bodies: dict[str, str] = {}
    for header, body in re.findall(r"%?([\w.-]+)[^\n{]*\{(.*?)\}\s*(?=\n\S|\Z)", program, re.DOTALL):
        bodies[header] = body

    def whole(text: str) -> str:
        called = [bodies.get(name, "") for name in re.findall(r"calls=%?([\w.-]+)", text)]
        return text + "".join(map(whole, called))

    lines = re.findall(r"%([\w.-]+) = ([^\n]*)", program)
    return {name: kind(whole(text)) for name, text in lines}


def kind(text: str) -> str:
    """Return the kind of an instruction, from its text and the text of the computations fused into it."""
    found = re.search(
        r"\[([\d,]+)\]\S* convolution\([^\n]*?window=\{size=([\dx]+)[^\n]*?dim_labels=\w+->(\w+)", text
    )
    if found:
        shape, window = ([*map(int, re.split("[,x]", part))] for part in found.groups()[:2])
        places = [size for size, label in zip(shape, found[3], strict=True) if label.isdigit()]
        # The gradient of a kernel is a convolution with a window of the size of an image.
        return WEIGHT_GRADIENT if max(window) > max(places) else CONVOLUTION
    return next((name for name, pattern in KINDS if re.search(pattern, text)), ELEMENTWISE)


def kind_of_event(name: str, stats: dict[str, object], kinds: dict[str, str], on_gpu: bool) -> str | None:
    """Return the kind of an event of the profiler, or None for an event that is not an operation.

    The kind comes from the instruction that the event names, or on a GPU from the name of a library's kernel.
    """
    library = next((found for found, part in LIBRARY if re.search(part, name)), None) if on_gpu else None
    instruction = str(stats.get("hlo_op", name))
    return library or kinds.get(instruction, OTHER if on_gpu else None)


def measured(options: Options) -> tuple[Counter, float]:
    """Return the milliseconds per step by kind, over all threads or streams, and of one step by the clock."""
    config = step_config(options.model, options.batch_size, options.dtype)
    config = dataclasses.replace(config, reverse_pruning=None) if options.quant_trim else float_twin(config)
    model = models.create(config.model, CLASSES, jax.numpy.dtype(config.dtype))
    step = compiled_step(config, model, random_split(config), steps=options.steps + timing.WARM_UP)
    kinds = instructions(step.program())
    state = step.state
    for _ in range(timing.WARM_UP):
        state = jax.block_until_ready(step.advance(state))
    found: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(options.steps):
                state = jax.block_until_ready(step.advance(state))
        (trace,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        for plane in data.planes:
            for line in plane.lines:
                on_gpu = "GPU" in plane.name and "Stream" in line.name
                for event in line.events:
                    name = kind_of_event(event.name, dict(event.stats), kinds, on_gpu)
                    if name is not None:
                        found[name] += event.duration_ns / 1e6 / options.steps
    timed = {"step": step._replace(state=state)}
    (clock,) = timing.measure(timed, options.steps, Progress(disable=True)).values()
    return found, statistics.median(clock)


def run(options: Options, console: Console) -> records.Record:
    """Profile, print the table, append the record."""
    found, milliseconds = measured(options)
    total = sum(found.values())
    what = "Quant-Trim W8A8" if options.quant_trim else "fp32"
    title = (
        f"A training step of {options.model}, batch {options.batch_size}, {options.dtype}, {what}: "
        f"{milliseconds:.1f} ms on {jax.devices()[0].device_kind}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("kind", "ms, all threads", "share"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for name, spent in found.most_common():
        table.add_row(name, f"{spent:.1f}", f"{spent / total:.1%}")
    console.print(table)
    record = records.new_record(
        benchmark="profile",
        model=options.model,
        batch_size=options.batch_size,
        dtype=options.dtype,
        variant=what,
        step_ms_p50=milliseconds,
        kinds_ms={name: spent for name, spent in found.most_common()},
        status="ok",
        **timing.source(),
    )
    if options.out:
        records.append(options.out, record)
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status, as `command` does."""
    return command("experiments.benchmarks.profile", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
