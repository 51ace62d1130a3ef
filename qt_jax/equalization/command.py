"""Read the command line of `python -m qt_jax.equalize`, rescale a graph, and say what was done."""

import dataclasses
from pathlib import Path
from typing import Annotated

from qt_jax.errors import InvalidInput, extra

with extra("backends"):
    import tyro
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from qt_jax.backends.arrays import LABELS, read_arrays
    from qt_jax.command_line import command, print_rows, terminate_like_interrupt
    from qt_jax.equalization.neutral import Method, Neutral, equalize
    from qt_jax.export.storage import save

PINNED_SHOWN = 5
"""Number of tensors listed that keep their values."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Rescale the channels of a float ONNX graph without changing its function, so that it rounds better.

    The outputs in floating point stay the same. What changes is what a low-bit compiler makes of the graph.
    Nothing is trained, and no labels are needed: give a few hundred samples of the training split.

    Example:
        python -m qt_jax.equalize model.onnx --calibration c.npz --out neutral.onnx
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL.onnx")]
    """Float ONNX network of any kind."""
    calibration: Path
    """Samples as the model takes them: .npz or a folder of .npy, by the names of the inputs ("images" will do
    for a single one), or one .npy."""
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="NEUTRAL.onnx", help_behavior_hint="(default: beside)")
    ] = None
    """File to write; without it MODEL.neutral.onnx beside the model."""
    method: Method = "learned"
    """How factors are chosen: by the error of simulated grids, in minutes, or from the ranges of weights, in
    seconds."""
    grids: tuple[str, ...] = ()
    """The learned way: only these grids, for who knows the compiler's, such as int4w-full-pt int4w-full-pc;
    without it all grids."""
    steps: int = 400
    """Steps of the learned way, of 32 samples each."""
    seed: int = 0
    """Seed of the learned way."""
    json: bool = False
    """Print a JSON line on stdout, and all text on stderr."""


def run(options: Options, console: Console) -> None:
    """Rescale the graph in the file, write it and print what was done.

    Raises:
      InvalidInput: A file or a setting is wrong, or no channel is free.
    """
    terminate_like_interrupt()
    if not options.model.is_file():
        raise InvalidInput(f"{options.model} is not there: give the path of a float ONNX model.")
    out = options.out or options.model.with_suffix(".neutral.onnx")
    if out.resolve() == options.model.resolve():
        raise InvalidInput("--out names the model itself: give another file, so that the original stays.")
    samples = read_arrays(options.calibration)
    samples.pop(LABELS, None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("comparing grids", total=options.steps if options.method == "learned" else None)
        found = equalize(
            str(options.model),
            samples,
            method=options.method,
            grids=options.grids or None,
            steps=options.steps,
            seed=options.seed,
            progress=lambda text: bar.update(task, advance=1, description=text),
        )
    save(found.model, out)
    show(found, out, console)
    if options.json:
        print_rows([row(found, out)])


def show(found: Neutral, out: Path, console: Console) -> None:
    """Print what was rescaled, what was not, and what simulated grids make of it."""
    rounded = ", rounded to powers of two" if found.powers_of_two else ""
    console.print(
        f"{found.freedom.count} factors{rounded} rescale {len(found.freedom.scaled)} constants. The float "
        f"outputs differ by {found.difference:.1e} of the largest. {found.seconds:.0f} s. Written to {out}."
    )
    if found.errors:
        table = Table(title="SQNR of the outputs on simulated grids, dB", box=box.SIMPLE_HEAD)
        for title in ("grid", "before", "after", "gain"):
            table.add_column(title, justify="left" if title == "grid" else "right")
        for grid, (before, after) in found.errors.items():
            table.add_row(grid, f"{-before:.1f}", f"{-after:.1f}", f"{before - after:+.1f}")
        console.print(table)
    listed = list(found.freedom.pinned.items())
    for name, reason in listed[:PINNED_SHOWN]:
        console.print(f"{name} keeps its values: {reason}.")
    if len(listed) > PINNED_SHOWN:
        console.print(f"{len(listed) - PINNED_SHOWN} other tensors keep theirs for such a reason.")


def row(found: Neutral, out: Path) -> dict[str, object]:
    """Return what was done as one row of JSON."""
    return {
        "out": str(out),
        "factors": found.freedom.count,
        "constants": len(found.freedom.scaled),
        "difference": found.difference,
        "powers_of_two": found.powers_of_two,
        "sqnr_db": {grid: [-before, -after] for grid, (before, after) in found.errors.items()},
        "pinned": dict(found.freedom.pinned),
        "seconds": found.seconds,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, as `command` does."""
    return command("qt_jax.equalize", Options, run, arguments)
