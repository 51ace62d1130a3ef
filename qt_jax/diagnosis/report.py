"""Diagnose a subject, and write the page, its pictures and its files.

Both commands, `python -m qt_jax.diagnosis` and `python -m experiments.diagnose`, take these settings and end
here.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress as ProgressBar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from qt_jax.backends.arrays import first
from qt_jax.backends.protocol import Backend
from qt_jax.diagnosis import deployed, mixed_precision, page, toolchains
from qt_jax.diagnosis.advice import Progress
from qt_jax.diagnosis.diagnosis import SQNR_IMAGES, Diagnosis, calibrated, diagnose
from qt_jax.diagnosis.figures import write_pictures
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.meter import Meter
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.running import count
from qt_jax.diagnosis.simulation import SIMULATED_SCHEMES, Precision, everywhere
from qt_jax.diagnosis.subject import Criteria, RangeSource, Subject
from qt_jax.errors import InvalidInput
from qt_jax.export.storage import data_path
from qt_jax.files import write_whole, writing
from qt_jax.provenance import provenance

BACKEND_IMAGES = 64
"""Number of images on which toolchains are measured."""

APPLY_IMAGES = 16
"""Number of images on which the mended graph is checked before it is written."""

INTERRUPTED = "Interrupted. What is measured is kept: the same command goes on from here."


@dataclasses.dataclass(frozen=True)
class DiagnosisSettings:
    """Choose the bits to diagnose, the images to judge by, and what to do besides."""

    scheme: Literal[*SIMULATED_SCHEMES] = "int8-pt"  # type: ignore[valid-type]
    """Bits of all layers' weights; one scale per tensor (pt) or output channel (pc). Inputs have 8 bits."""
    ranges: RangeSource = None
    """Grids of layers' inputs: those of MODEL.ranges.json, or minimum and maximum on the calibration images.
    Default: learned where there are any."""
    limit: int | None = None
    """Number of images to judge by, from the first; default: all."""
    output: tuple[str, ...] = ()
    """Names of the outputs to judge. Default: the one that the labels fit, or all without labels."""
    metric: str | None = None
    """Metric of your own that is shown beside the SQNR: module:function of the judged outputs by name and the
    labels."""
    void_label: int | None = None
    """Label of pixels without a class, such as 255."""
    backends: tuple[str, ...] = ()
    """Toolchains on which to measure the noise behind each layer, by the names of `qt_jax.backends list`."""
    max_bytes: int | None = None
    """Propose 4 and 8 bits by layer so that all kernels fit into this many bytes."""
    max_drop: float | None = None
    """Propose as many layers on 4 bits as possible, losing at most this many top-1 points against float."""
    min_sqnr: float | None = None
    """Propose as many layers on 4 bits as possible, leaving the outputs at this SQNR in dB at least."""
    apply: bool = False
    """Write the mended network: float ONNX, ranges, and the QDQ graph on the advised grids."""
    out: Path | None = None
    """Folder for the results. Default: beside what is diagnosed."""

    def __post_init__(self) -> None:
        flags = {"--max-bytes": self.max_bytes, "--max-drop": self.max_drop, "--min-sqnr": self.min_sqnr}
        given = [flag for flag, value in flags.items() if value is not None]
        if len(given) > 1:
            raise InvalidInput(f"{given[0]} and {given[1]} are two budgets: give one.")
        if self.limit is not None and self.limit < 1:
            raise InvalidInput(f"--limit {self.limit}: judge by one image at least.")

    @property
    def criteria(self) -> Criteria:
        """Return what of the network is judged, and by what."""
        return Criteria(self.output, self.metric, self.void_label)

    @property
    def has_budget(self) -> bool:
        """Tell whether a mixed precision is to be proposed."""
        return any(value is not None for value in (self.max_bytes, self.max_drop, self.min_sqnr))


def write_diagnosis(
    subject: Subject,
    settings: DiagnosisSettings,
    backends: Sequence[Backend],
    out: Path,
    console: Console,
    *,
    flags: bool = False,
) -> Diagnosis:
    """Diagnose a subject and write what is found; show it on the console too.

    The page is `out/diagnosis.md`; pictures, measurements and files lie in `out/diagnosis`. The page is
    written after the diagnosis, and once more after each further section that the settings ask for.

    Args:
      subject: Network to diagnose.
      settings: Bits to diagnose, and further sections.
      backends: Toolchains on which the noise behind each layer is measured.
      out: Folder, which is created if it is not there.
      console: Receives the summary, the sections and the progress.
      flags: True if a command line of `experiments.cifar` can use the advice.

    Raises:
      InvalidInput: The network cannot be diagnosed, the budget cannot be kept, or the mended graph cannot be
        written.
    """
    with writing(out):
        folder = out / "diagnosis"
        folder.mkdir(parents=True, exist_ok=True)
        for name in deployed.FILES:  # of an earlier diagnosis
            for path in (folder / name, data_path(folder / name)):
                path.unlink(missing_ok=True)
        return _write(subject, settings, backends, out, console, flags)


def _write(
    subject: Subject,
    settings: DiagnosisSettings,
    backends: Sequence[Backend],
    out: Path,
    console: Console,
    flags: bool,
) -> Diagnosis:
    """Do what `write_diagnosis` says, in a folder that is there."""
    folder = out / "diagnosis"
    precision = SIMULATED_SCHEMES[settings.scheme]
    kept = folder / "measurements.jsonl"
    meter = Meter(subject.samples, subject.reference, kept, subject.task, subject.labels, subject.whole)
    bounds = {**calibrated(subject.model, subject.calibration), **subject.bounds}
    given = Deployment(subject.model, everywhere(layers_of(subject.model), precision), bounds)
    with _shown(console) as progress:
        found = diagnose(given, meter, progress)
    opening = page.opening(found, subject, settings.scheme)
    sections: dict[str, str] = {}
    markdown = partial(
        page.page,
        found,
        opening,
        bounds=subject.bounds_source,
        sqnr_images=min(SQNR_IMAGES, count(subject.samples)),
        pictures=write_pictures(found, folder),
        sections=sections,
        source=provenance(["onnxruntime", "onnx", "numpy"]),
        flags=flags,
    )
    path = out / "diagnosis.md"
    write_whole(path, markdown())
    console.print(Markdown(page.summary(found, opening, flags)))
    console.print(page.terminal_table(found))

    def add(name: str, text: str) -> None:
        sections[name] = text
        write_whole(path, markdown())
        console.print(Markdown(f"## {name}\n\n{text}"))

    final = found.after
    if backends:
        with _shown(console) as progress:
            text = _toolchain_section(backends, precision, subject, folder, progress)
        add("Toolchains", text)
    if settings.has_budget:
        with _shown(console) as progress:
            final, text = _budget_section(settings, found, meter, progress)
        add("Mixed precision", text)
    if settings.apply:
        deployed.write_files(final, folder, first(subject.samples, APPLY_IMAGES), list(subject.reference))
        add("Files", "\n".join(f"- `{folder.name}/{name}`: {text}" for name, text in deployed.FILES.items()))
    console.print(str(path), soft_wrap=True)
    return found


def layer_rows(found: Diagnosis) -> list[Mapping[str, Any]]:
    """Return one row per layer, for --json."""
    advice: dict[str, list[str]] = {}
    for trial in found.advised:
        advice.setdefault(trial.finding.layer, []).append(trial.finding.remedy.text)
    return [
        {
            "layer": name,
            "bits": str(found.before.precisions[name]),
            "top1_alone": item.alone.value if item.alone.counts else None,
            "top1_all_but": item.all_but.value if item.all_but.counts else None,
            "outputs_db_alone": item.alone.sqnr_db,
            "outputs_db_all_but": item.all_but.sqnr_db,
            "sqnr_db": found.ratios.get(name),
            "sqnr_db_after": found.mended_ratios.get(name),
            "saturated": found.activations[name].saturated,
            "zeros": found.activations[name].zeros,
            "dead_channels": found.activations[name].constant.tolist(),
            "advice": advice.get(name, []),
        }
        for name, item in found.sensitivities.items()
    ]


@contextmanager
def _shown(console: Console) -> Iterator[Progress]:
    """Show the step that runs, and its number, for as long as the context lasts."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:.0f}  {task.description}"), TimeElapsedColumn())
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda text: bar.update(task, description=text, advance=1)


def _toolchain_section(
    backends: Sequence[Backend], precision: Precision, subject: Subject, folder: Path, progress: Progress
) -> str:
    """Measure the noise behind each layer on toolchains, and write it as Markdown."""
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
            {name: array[:BACKEND_IMAGES] for name, array in subject.samples.items()},
            backend,
            scheme,
            folder=folder / "toolchains",
            progress=progress,
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


def _budget_section(
    settings: DiagnosisSettings, found: Diagnosis, meter: Meter, progress: Progress
) -> tuple[Deployment, str]:
    """Choose the mixed precision that the budget allows; return the network and its section as Markdown."""
    ranked = mixed_precision.order(found.after, meter, progress)
    if settings.max_bytes is not None:
        chosen = mixed_precision.within_bytes(found.after, ranked, settings.max_bytes)
        asked = f"at most {settings.max_bytes:,} bytes of kernels"
    elif settings.min_sqnr is not None:
        chosen = mixed_precision.within_noise(found.after, ranked, meter, settings.min_sqnr, progress)
        asked = f"outputs at {settings.min_sqnr:g} dB or more"
    else:
        assert settings.max_drop is not None
        max_drop = settings.max_drop / 100
        chosen = mixed_precision.within_drop(
            found.after, ranked, meter, found.floating.score, max_drop, progress
        )
        asked = f"at most {settings.max_drop:g} points lost"
    reached = meter.measure(chosen.simulated(), "mixed precision")
    return chosen, page.budget_section(found, chosen, reached, asked)
