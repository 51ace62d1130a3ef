"""Write a diagnosis as Markdown: first what to do, then the measurements behind it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from qt_jax.diagnosis import snippets
from qt_jax.diagnosis.advice import Measurement, kernel_bytes
from qt_jax.diagnosis.diagnosis import Diagnosis
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.reporting.tables import ABSENT, MINUS, escaped, markdown_table

MEASURED = (
    "Top-1 and SQNR of the logits are measured on {n:,} images, in a simulation. Kernels are on symmetric"
    " grids of their largest weight, without the lowest integer ([-7, 7] on 4 bits; onnxruntime's "
    "int4w-narrow has that too, its int4w has [-8, 7]). Inputs of layers are on asymmetric grids of "
    "{bounds}. Sums and pooling are in floating point. A remedy is advised if, on top of those before it,"
    " it makes more images right than chance would (McNemar, two standard deviations). Of several for one"
    " layer, the cheapest is advised that is as good as the best but for chance. The SQNR behind a layer "
    "is that of its output, with all layers rounded, on the first {sqnr_images:,} images."
)
"""Last section of the page, with fields for the number of images and the source of the ranges."""

LEGEND = (
    "max/rms: largest weight over root mean square. dead: output channels with one value on all images. "
    "zeros: share of the input that is zero. saturated: share beyond its grid. alone: points of top-1 "
    "with this layer alone rounded; all but it: points that leaving it in float gives back. noise: SQNR "
    "behind the layer in dB, and after the advice."
)
"""Meaning of the columns of `layer_table`."""


def page(
    found: Diagnosis,
    title: str,
    *,
    bounds: str,
    sqnr_images: int,
    pictures: Mapping[str, str],
    sections: Mapping[str, str],
    source: Mapping[str, Any],
    flags: bool,
) -> str:
    """Write the page of a diagnosis as Markdown.

    Args:
      found: Diagnosis to show.
      title: Title of the page.
      bounds: Source of the input ranges in words, such as "minimum and maximum on 512 images".
      sqnr_images: Number of images on which the noise behind layers was measured.
      pictures: Captions by file name.
      sections: Markdown by heading, for sections after the layers.
      source: Provenance, from `qt_jax.provenance`.
      flags: True if a command line of `experiments.cifar` can use the advice.
    """
    n = len(found.floating.correct)
    parts_by_heading = {
        "What to do": advice_section(found, flags),
        "Layers": layer_table(found) + "\n\n" + LEGEND,
        **sections,
        "Pictures": "\n\n".join(f"![{caption}]({name})" for name, caption in pictures.items()),
        "How it was measured": MEASURED.format(n=n, bounds=bounds, sqnr_images=sqnr_images) + _source(source),
    }
    parts = [f"# {escaped(title)}", totals(found)]
    parts += [f"## {name}\n\n{text}" for name, text in parts_by_heading.items() if text]
    return "\n\n".join(parts) + "\n"


def _source(source: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    machine = (
        f"commit {source['commit']}; {versions}; {source['cpu']['model']}, {source['cpu']['cores']} cores"
    )
    return f"\n\n```text\n{source['command']}\n```\n\n{escaped(machine)}."


def totals(found: Diagnosis) -> str:
    """Write the accuracy in floating point, as deployed, and after the advice, as a Markdown table."""
    before, after = found.sizes
    rows = [
        ["floating point", *_scores(found.floating, found), ABSENT],
        ["simulated", *_scores(found.all_rounded, found), f"{before:,}"],
        ["simulated, after the advice", *_scores(found.mended, found), f"{after:,}"],
    ]
    return markdown_table(["", "top-1 %", "against float", "SQNR dB", "bytes of kernels"], rows)


def _scores(item: Measurement, found: Diagnosis) -> list[str]:
    lost = ABSENT if item is found.floating else points(item.top1 - found.floating.top1)
    return [f"{100 * item.top1:.2f}", lost, decibels(item.sqnr_db)]


def advice_section(found: Diagnosis, flags: bool) -> str:
    """Write the advised remedies with what each gave, snippets to paste, and what was tried in vain."""
    lines: list[str] = []
    before = found.all_rounded
    for trial in found.advised:
        finding, after = trial.finding, trial.result
        lines.append(
            f"{len(lines) + 1}. **{escaped(finding.layer)}**, {finding.kind}: {escaped(finding.evidence)}. "
            f"Remedy: {escaped(finding.remedy.text)}. "
            f"**{points(after.top1 - before.top1)} points**, to {100 * after.top1:.2f} %."
        )
        before = after
    text = "\n".join(lines) or "Nothing that was tried makes more images right than chance would."
    return "\n\n".join(part for part in (text, _snippets(found, flags), _in_vain(found)) if part)


def _snippets(found: Diagnosis, flags: bool) -> str:
    remedies = [trial.finding.remedy for trial in found.advised]
    blocks = {
        "In training with Quant-Trim, where layers have these paths:": (
            "python",
            snippets.training(found.before, found.after, remedies),
        ),
        "On the command line of `experiments.cifar`, the weights alone:": (
            "text",
            snippets.flags(found.before, found.after) if flags else "",
        ),
        "In vendors' quantizers, which then leave these layers in floating point:": (
            "python",
            snippets.vendors(found.before, found.after),
        ),
    }
    return "\n\n".join(
        f"{heading}\n\n```{language}\n{text}\n```" for heading, (language, text) in blocks.items() if text
    )


def _in_vain(found: Diagnosis) -> str:
    rows = [
        [escaped(trial.finding.layer), escaped(trial.finding.remedy.text), f"{100 * trial.result.top1:.2f}"]
        for trial in found.trials
        if not trial.advised
    ]
    if not rows:
        return ""
    return "Tried, and not advised:\n\n" + markdown_table(["layer", "remedy", "top-1 %"], rows, words=2)


def layer_table(found: Diagnosis) -> str:
    """Write one row per layer, as a Markdown table."""
    header, *rows = _by_layer(found)
    return markdown_table(header, [[escaped(row[0]), *row[1:]] for row in rows], words=2)


def terminal_table(found: Diagnosis) -> Table:
    """Make a table of one row per layer for a terminal, without the columns that seldom matter."""
    table = Table(title="Layers", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    header, *rows = _by_layer(found)
    shown = [place for place, name in enumerate(header) if name not in ("weights", "dead", "zeros %")]
    for place in shown:
        table.add_column(header[place], justify="left" if place < 2 else "right", overflow="fold")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(Text(row[place]) for place in shown))
    return table


def _by_layer(found: Diagnosis) -> list[list[str]]:
    header = ["layer", "bits", "weights", "max/rms", "dead", "zeros %", "saturated %"]
    rows = [[*header, "alone", "all but it", "noise dB", "after dB"]]
    for name, item in found.sensitivities.items():
        kernel, activation = found.kernels[name], found.activations[name]
        saturated = activation.saturated
        rows.append(
            [
                name,
                str(found.before.precisions[name]),
                f"{kernel.size:,}",
                f"{kernel.largest / kernel.rms:.1f}" if kernel.rms else ABSENT,
                str(len(activation.constant)),
                f"{100 * activation.zeros:.1f}",
                ABSENT if saturated is None else f"{100 * saturated:.2f}",
                points(item.alone.top1 - found.floating.top1),
                points(item.all_but.top1 - found.all_rounded.top1),
                decibels(found.ratios.get(name)),
                decibels(found.mended_ratios.get(name)),
            ]
        )
    return rows


def backend_table(
    ratios: Mapping[str, Mapping[str, float | None]], costs: Mapping[str, Sequence[str]]
) -> str:
    """Write the SQNR behind each layer in dB on each deployment, and the layers that cost most on it.

    Args:
      ratios: SQNR in dB by deployment and layer.
      costs: Costliest layers of each deployment, the worst first.
    """
    layers = list(dict.fromkeys(layer for values in ratios.values() for layer in values))
    rows = [
        [escaped(layer), *(decibels(values.get(layer)) for values in ratios.values())] for layer in layers
    ]
    table = markdown_table(["layer", *map(escaped, ratios)], rows)
    listed = [
        f"- {escaped(name)}: {', '.join(map(escaped, worst))}" for name, worst in costs.items() if worst
    ]
    return f"{table}\n\nThe layers at which most noise comes in:\n\n" + "\n".join(listed)


def budget_section(found: Diagnosis, chosen: Deployment, reached: Measurement, asked: str) -> str:
    """Write the bits of each layer that a budget allows after the advice, and the accuracy with them.

    Args:
      found: Diagnosis that the proposal builds on.
      chosen: Deployment that is proposed.
      reached: Measurement of `chosen`.
      asked: Budget in words.
    """
    lost = points(reached.top1 - found.floating.top1)
    rows = [[escaped(name), str(precision)] for name, precision in chosen.precisions.items()]
    return "\n\n".join(
        [
            f"Asked: {asked}. Proposed, on top of the advice: {100 * reached.top1:.2f} % ({lost} against "
            f"float), {kernel_bytes(chosen):,} bytes of kernels.",
            markdown_table(["layer", "bits"], rows, words=2),
            f"```python\n{snippets.config(found.before, chosen)}\n```",
        ]
    ).strip()


def summary(found: Diagnosis, title: str, flags: bool) -> str:
    """Write the Markdown that a terminal shows before the layers."""
    return f"# {title}\n\n{totals(found)}\n\n{advice_section(found, flags)}"


def points(fraction: float) -> str:
    """Write a difference of top-1 in points, with its sign.

    >>> points(0.0123), points(-0.2)
    ('+1.23', '−20.00')
    """
    return f"{100 * fraction:+.2f}".replace("-", MINUS)


def decibels(value: float | None) -> str:
    """Write an SQNR in dB, or a dash where there is no noise."""
    return ABSENT if value is None else f"{value:.1f}"
