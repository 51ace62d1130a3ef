"""`python -m experiments.diagnose RUN_DIR|MODEL.onnx`: which layer costs what, why, and what helps."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import qt_jax as qt
from experiments.diagnosis_subject import Subject, subject_of
from qt_jax.backends.protocol import Backend
from qt_jax.backends.registry import select
from qt_jax.command_line import command, print_rows, terminate_like_interrupt
from qt_jax.diagnosis import deployed, mixed_precision, page, toolchains
from qt_jax.diagnosis import figures as figures
from qt_jax.diagnosis.advice import Meter, Tell
from qt_jax.diagnosis.diagnosis import SQNR_IMAGES, Diagnosis, calibrated, diagnose
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import SCHEMES, Precision, everywhere, logits_of
from qt_jax.export import graph
from qt_jax.export.encodings import write_ranges
from qt_jax.export.graph import save
from qt_jax.files import write_whole
from qt_jax.provenance import provenance
from qt_jax.reporting.figures import save_figure, to_svg
from qt_jax.reporting.run_figures import draw_histogram

BACKEND_IMAGES = 64
APPLY_IMAGES = 16
GOES_ON = "Interrupted. What is measured is kept: the same command goes on from here."


@dataclasses.dataclass(frozen=True)
class Options:
    """Find the layers that cost a network its accuracy on low-bit integers, say why, and try what helps.

    Each layer is rounded alone, and all but it; tensors are looked at for outliers, dead channels and
    saturation; every remedy is tried and advised only if more images are right than by chance. The page,
    its pictures and what was measured go to --out, where the same command goes on after an interruption.

    Example:
        python -m experiments.diagnose experiments/results/cifar10-resnet8 --scheme int4w-pt --out runs/found
    """

    subject: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|MODEL.onnx")]
    """Folder of a finished experiments.cifar, or a float ONNX classifier with one input."""
    scheme: Literal[*SCHEMES] = "int8-pt"  # type: ignore[valid-type]
    """Bits of all layers' weights; one scale a tensor (pt) or an output channel (pc). Inputs have 8 bits."""
    method: str | None = None
    """Of a run: which of its networks, such as "float". Default: the one trained with quantization."""
    ranges: Literal["learned", "minmax"] | None = None
    """Grids of layers' inputs: those of MODEL.ranges.json, or minimum and maximum on the calibration images.
    Default: learned where there are any."""
    split: Literal["validation", "test"] = "validation"
    """Of a run: the images to judge by. Advice chosen on the test set flatters itself."""
    limit: int | None = None
    """Images to judge by, from the first; default: all."""
    calibration: Path | None = None
    """Of a model: .npz with "images", float32 as the model takes them."""
    test: Path | None = None
    """Of a model: .npz with "images" and integer "labels" to judge by, of a validation split at best."""
    backends: tuple[str, ...] = ()
    """Toolchains to ask for the noise behind each layer too, by the names of `qt_jax.backends list`."""
    max_bytes: int | None = None
    """Propose 4 and 8 bits by layer so that all kernels fit into so many bytes."""
    max_drop: float | None = None
    """Propose as many layers on 4 bits as lose no more than so many points of top-1 against float."""
    apply: bool = False
    """Write the mended network: float ONNX, ranges, and the QDQ graph on the advised grids."""
    out: Path | None = None
    """Default: the folder of the run, or MODEL.diagnosis beside the model."""
    data_dir: Path | None = None
    """Folder or archive that holds the data set, as for `experiments.cifar`."""
    json: bool = False
    """Print a JSON line for each layer on stdout, and all text on stderr."""

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_drop is not None:
            raise qt.InvalidInput("--max-bytes and --max-drop are two budgets: give one.")
        if self.limit is not None and self.limit < 1:
            raise qt.InvalidInput(f"--limit {self.limit}: judge by one image at least.")


def run(options: Options, console: Console) -> None:
    """The diagnosis and its page, which then gets what is asked for beside it, section by section."""
    terminate_like_interrupt()
    backends = select(options.backends)
    subject = subject_of(options)
    folder = subject.out / "diagnosis"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("mended.*"):  # of an earlier diagnosis
        path.unlink()
    layers = layers_of(subject.model)
    reference = logits_of(subject.model, subject.images)
    meter = Meter(subject.images, subject.labels, reference, folder / "measurements.jsonl")
    bounds = {**calibrated(subject.model, subject.calibration), **subject.bounds}
    given = Deployment(subject.model, everywhere(layers, SCHEMES[options.scheme]), bounds)
    with _telling(console) as tell:
        found = diagnose(given, meter, tell)
    title, of_run = f"Diagnosis of {subject.name}, {options.scheme}", options.subject.is_dir()
    sections: dict[str, str] = {}
    fixed = {
        "bounds": subject.bounds_source,
        "some": min(SQNR_IMAGES, len(subject.images)),
        "pictures": draw(found, folder),
        "source": provenance(["onnxruntime", "onnx", "numpy"]),
        "flags": of_run,
    }
    path = subject.out / "diagnosis.md"
    write_whole(path, page.page(found, title, **fixed, further=sections))
    console.print(Markdown(page.summary(found, title, of_run)))
    console.print(page.terminal_table(found))
    final = found.after

    def add(name: str, text: str) -> None:
        sections[name] = text
        write_whole(path, page.page(found, title, **fixed, further=sections))
        console.print(Markdown(f"## {name}\n\n{text}"))

    if backends:
        with _telling(console) as tell:
            text = _toolchains(backends, SCHEMES[options.scheme], subject, folder, tell)
        add("Toolchains", text)
    if options.max_bytes is not None or options.max_drop is not None:
        with _telling(console) as tell:
            final, text = _budget(options, found, meter, tell)
        add("Mixed precision", text)
    if options.apply:
        add("Files", apply(final, folder, subject.images[:APPLY_IMAGES]))
    console.print(str(path), soft_wrap=True)
    if options.json:
        print_rows(layer_rows(found))


@contextmanager
def _telling(console: Console) -> Iterator[Tell]:
    """Shows what is being done, and which step it is."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:.0f}  {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=text, advance=1)


def _toolchains(
    backends: Sequence[Backend], precision: Precision, subject: Subject, folder: Path, tell: Tell
) -> str:
    """The noise behind each layer on the toolchains asked for."""
    ratios: dict[str, dict[str, float | None]] = {}
    notes = []
    for backend in backends:
        scheme = toolchains.matching(backend, precision)
        if scheme is None:
            notes.append(f"{backend.name} has no scheme with such weights.")
            continue
        rows = toolchains.by_backend(
            subject.model,
            subject.calibration,
            subject.images[:BACKEND_IMAGES],
            backend,
            scheme,
            folder=folder / "toolchains",
            tell=tell,
        )
        ratios[f"{backend.name} {scheme.name}"] = {
            row["layer"]: row["sqnr_db"] for row in rows if row["status"] == "ok"
        }
        notes += [
            f"{backend.name}, up to {row['layer']}: {row['status']}, {' '.join(row['reason'].split())}"
            for row in rows
            if row["status"] != "ok"
        ]
    costs = {name: toolchains.costliest(subject.model, values) for name, values in ratios.items()}
    listed = "\n".join(f"- {page.escaped(note)}" for note in notes)
    table = page.backend_table(ratios, costs) if ratios else ""
    return "\n\n".join(part for part in (table, listed) if part)


def _budget(options: Options, found: Diagnosis, meter: Meter, tell: Tell) -> tuple[Deployment, str]:
    """The network of mixed precision that the budget allows, and its section."""
    ranked = mixed_precision.order(found.after, meter, tell)
    if options.max_bytes is not None:
        chosen = mixed_precision.within_bytes(found.after, ranked, options.max_bytes)
        asked = f"at most {options.max_bytes:,} bytes of kernels"
    else:
        most = options.max_drop / 100
        chosen = mixed_precision.within_drop(found.after, ranked, meter, found.floating.top1, most, tell)
        asked = f"at most {options.max_drop:g} points lost"
    reached = meter.measure(chosen.simulated(), "mixed precision")
    return chosen, page.budget_section(found, chosen, reached, asked)


def draw(found: Diagnosis, folder: Path) -> dict[str, str]:
    """Writes the pictures, PNG for Markdown and SVG for the run's report; their names and captions."""
    layers = layers_of(found.before.model)
    before, after = (graph.constants(item.model) for item in (found.before, found.after))
    kernels = {
        name: {layer: values[its.kernel].ravel() for layer, its in layers.items()}
        for name, values in (("before", before), ("after", after))
    }
    noise = {"simulated": found.ratios, "after the advice": found.mended_ratios}
    pictures: dict[str, tuple[str, Any]] = {
        "sensitivity": ("What each layer costs", partial(figures.draw_sensitivity, found)),
        "noise": ("Noise behind each layer", partial(figures.draw_noise, noise, list(layers))),
        "tails": (
            "Largest weight over root mean square",
            partial(figures.draw_kernel_tails, *kernels.values()),
        ),
        "ranges": ("Values that each layer reads, and its grid", partial(figures.draw_input_ranges, found)),
    }
    for index, layer in enumerate(layers):
        if not np.array_equal(kernels["before"][layer], kernels["after"][layer]):
            weights = {name: values[layer] for name, values in kernels.items()}
            caption = f"Weights of {layer} over their root mean square, before and after"
            pictures[f"weights-{index}"] = (caption, partial(draw_histogram, weights))
    for name, (_, make) in pictures.items():
        save_figure(make(), folder / f"{name}.png")
        write_whole(folder / f"{name}.svg", to_svg(make, f"diagnosis-{name}") or "")
    return {f"{folder.name}/{name}.png": caption for name, (caption, _) in pictures.items()}


def apply(deployment: Deployment, folder: Path, images: np.ndarray) -> str:
    """Writes the mended network; a list of the files.

    Raises InvalidInput if it cannot be restated at the opset that its bits need, or computes something else
    there on `images`.
    """
    mended = deployed.restated(deployment)
    before, after = (logits_of(item.model, images) for item in (deployment, mended))
    if not np.allclose(before, after, rtol=1e-3, atol=1e-3 * float(np.abs(before).max())):
        opset = mended.model.opset_import[0].version
        raise qt.InvalidInput(f"ONNX restates this graph wrongly at opset {opset}: export it at that opset.")
    save(mended.model, folder / "mended.onnx")
    write_ranges(deployed.ranges_of(mended), folder / "mended.ranges.json")
    save(deployed.quantized(mended), folder / "mended.qdq.onnx")
    said = {
        "mended.onnx": "floating point, for any vendor's own quantizer: kernels are mended in it; bits and "
        "ranges are not, tell the quantizer those",
        "mended.ranges.json": "the advised grid of each kernel and each layer's input",
        "mended.qdq.onnx": "QuantizeLinear and DequantizeLinear on those grids",
    }
    return "\n".join(f"- `{folder.name}/{name}`: {text}" for name, text in said.items())


def layer_rows(found: Diagnosis) -> list[Mapping[str, Any]]:
    """A row a layer for --json."""
    advice: dict[str, list[str]] = {}
    for trial in found.advised:
        advice.setdefault(trial.finding.layer, []).append(trial.finding.remedy.text)
    return [
        {
            "layer": name,
            "bits": str(found.before.precisions[name]),
            "top1_alone": item.alone.top1,
            "top1_all_but": item.all_but.top1,
            "sqnr_db": found.ratios.get(name),
            "sqnr_db_after": found.mended_ratios.get(name),
            "saturated": found.activations[name].saturated,
            "zeros": found.activations[name].zeros,
            "dead_channels": found.activations[name].constant.tolist(),
            "advice": advice.get(name, []),
        }
        for name, item in found.sensitivities.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, as `command` does."""
    return command("experiments.diagnose", Options, run, arguments, interrupted=GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
