"""Write a diagnosis as Markdown: first the answer and what to do, then the measurements behind it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from qt_jax.diagnosis import snippets
from qt_jax.diagnosis.advice import MOST_LAYERS, kernel_bytes
from qt_jax.diagnosis.diagnosis import Diagnosis
from qt_jax.diagnosis.layers import unrounded
from qt_jax.diagnosis.meter import ENOUGH_DB, LEAST_GAIN_DB, Measurement
from qt_jax.diagnosis.remedies import Deployment, Use
from qt_jax.diagnosis.simulation import FLOAT
from qt_jax.diagnosis.subject import Subject
from qt_jax.reporting.tables import ABSENT, MINUS, escaped, markdown_table

COUNTED = (
    "A remedy is advised if, on top of those before it, it makes more images right than chance would "
    "(McNemar, two standard deviations)."
)
"""Rule of advice where right images are counted."""

BY_NOISE = (
    "A remedy is advised if, on top of those before it, it raises the SQNR of the outputs over all images by "
    "{least:g} dB or more, and raises that of more images than it lowers (sign test, two standard deviations;"
    " so at least 5 images are needed). From {enough:g} dB on, where the noise is a hundredth of the outputs,"
    " nothing is advised."
)
"""Rule of advice where noise is measured."""

MEASURED = (
    "{what} measured on {n:,} images, in a simulation. Kernels are on symmetric"
    " grids of their largest weight, without the lowest integer ([-7, 7] on 4 bits; onnxruntime's "
    "int4w-narrow has that too, its int4w has [-8, 7]). Inputs of layers are on asymmetric grids of "
    "{bounds}. Sums and pooling are in floating point: a toolchain that rounds them too can lose more, "
    "and --backends measures it.{floating} {rule} Of several for one"
    " layer, the cheapest is advised that is as good as the best but for chance. The SQNR behind a layer "
    "is that of its output, with all layers rounded, on the first {sqnr_images:,} images."
)
"""Last section of the page, with fields for what was measured, on how many images, and how."""

COLUMNS = (
    "max/rms: largest weight over root mean square. dead: output channels with one value on all images. "
    "zeros: share of the input that is zero. saturated: share beyond its grid. {alone} noise: SQNR "
    "behind the layer in dB, and after the advice."
)
"""Meaning of the columns of `layer_table`."""

POINTS_COLUMNS = (
    "alone: points of top-1 with this layer alone rounded; all but it: points that leaving it in float gives "
    "back."
)

DECIBEL_COLUMNS = (
    "alone: SQNR of the outputs in dB with this layer alone rounded; all but it: dB that leaving it in float "
    "gives back."
)

METRIC_TITLES = {"top1": "top-1", "mean_error": "mean error"}
"""Names of metrics in text, where they are not those of records."""


def page(
    found: Diagnosis,
    opening: str,
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
      opening: Title and answer, from `opening`.
      bounds: Source of the input ranges in words, such as "minimum and maximum on 512 images".
      sqnr_images: Number of images on which the noise behind layers was measured.
      pictures: Captions by file name.
      sections: Markdown by heading, for sections after the layers.
      source: Provenance, from `qt_jax.provenance`.
      flags: True if a command line of `experiments.cifar` can use the advice.
    """
    counts = found.floating.counts
    others = ", ".join(f"{count} {kind}" for kind, count in unrounded(found.before.model).items())
    measured = MEASURED.format(
        what="Top-1 and SQNR of the logits are" if counts else "The SQNR of the outputs is",
        n=len(found.floating.by_image),
        bounds=bounds,
        floating=f" So are {others}, whose kernel is no constant of the graph." if others else "",
        rule=COUNTED if counts else BY_NOISE.format(least=LEAST_GAIN_DB, enough=ENOUGH_DB),
        sqnr_images=sqnr_images,
    )
    legend = COLUMNS.format(alone=POINTS_COLUMNS if counts else DECIBEL_COLUMNS)
    parts_by_heading = {
        "What to do": advice_section(found, flags),
        "Layers": layer_table(found) + "\n\n" + legend,
        **sections,
        "Pictures": "\n\n".join(f"![{caption}]({name})" for name, caption in pictures.items()),
        "How it was measured": measured + _source(source),
    }
    parts = [opening, totals(found)]
    parts += [f"## {name}\n\n{text}" for name, text in parts_by_heading.items() if text]
    return "\n\n".join(parts) + "\n"


def opening(found: Diagnosis, subject: Subject, scheme: str) -> str:
    """Write the title, the answer in up to three sentences, what is judged, and warnings, as Markdown.

    Args:
      found: Diagnosis to show.
      subject: What was diagnosed.
      scheme: Name of the bits, such as "int8-pt".
    """
    parts = [f"# {escaped(f'Diagnosis of {subject.name}, {scheme}')}"]
    parts.append(escaped(f"{_loss(found, scheme)} {_culprit(found)} {_gain(found)}"))
    parts.append(escaped(judged(subject)))
    parts += [f"**Warning:** {escaped(text)}" for text in subject.warnings]
    return "\n\n".join(parts)


def judged(subject: Subject) -> str:
    """Write which outputs are judged, by what, and which are not."""
    names = ", ".join(dict.fromkeys([*subject.task.judged, *subject.reference]))
    metric = subject.task.metric
    by = "the SQNR against the float graph"
    by = f"{METRIC_TITLES.get(metric, metric)} and {by}" if metric else by
    text = f"Judged: {names}, by {by}."
    left = [name for name in (*subject.left_out, *subject.task.not_judged) if name not in subject.reference]
    left = list(dict.fromkeys(left))
    return f"{text} Left out: {', '.join(left)} (choose with --output)." if left else text


def _loss(found: Diagnosis, scheme: str) -> str:
    """Say what rounding costs."""
    floating, rounded = found.floating, found.all_rounded
    keep = "do not change" if rounded.sqnr_db is None else f"keep {decibels(rounded.sqnr_db)} dB"
    if floating.counts:
        lost = points(rounded.score - floating.score)
        return (
            f"Rounded to {scheme}, the network is right on {100 * rounded.score:.2f} % of the images, in "
            f"floating point on {100 * floating.score:.2f} % ({lost} points)."
        )
    text = f"Rounded to {scheme}, the outputs {keep}."
    if floating.value is None:
        return text
    return f"{text[:-1]}; the metric goes from {floating.value:.4g} to {rounded.value:.4g}."


def _culprit(found: Diagnosis) -> str:
    """Say which layer costs most."""
    name, item = min(found.sensitivities.items(), key=lambda pair: pair[1].alone.score)
    if item.alone.score >= found.floating.score:
        return "No layer costs anything by itself."
    if item.alone.counts:
        return f"{name} costs most: {points(item.alone.score - found.floating.score)} points by itself."
    return f"Most noise comes in at {name}: rounded alone it leaves {item.alone.score:.1f} dB."


def _gain(found: Diagnosis) -> str:
    """Say what the advice gives."""
    advised = found.advised
    if not advised and found.all_rounded.counts and found.all_rounded.score >= found.floating.score:
        return "No image is lost, and no remedy is needed."
    if not advised and found.all_rounded.is_enough:
        return f"Noise this small ({ENOUGH_DB:g} dB is a hundredth of the outputs) needs no remedy."
    if not advised:
        per_tensor = not any(precision.per_channel for precision in found.before.precisions.values())
        hint = (
            " Try one scale per output channel in all layers, a scheme that ends in -pc."
            if per_tensor
            else ""
        )
        return f"Nothing that was tried at single layers helps by more than chance.{hint}"
    back = gain(found.all_rounded, found.mended).removeprefix("+")
    if len(advised) == 1:
        finding = advised[0].finding
        if isinstance(finding.remedy, Use) and finding.remedy.precision == FLOAT:
            return f"Leaving {finding.layer} in floating point gives {back} back."
        return f"One change at {finding.layer} ({finding.remedy.text}) gives {back} back."
    names = list(dict.fromkeys(trial.finding.layer for trial in advised))
    where = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    where = f"{len(names)} layers" if len(names) > MOST_LAYERS else where
    return f"{len(advised)} changes at {where} give {back} back."


def gain(before: Measurement, after: Measurement) -> str:
    """Write by how much a measurement is better than another, with the unit."""
    if after.counts:
        return f"{points(after.score - before.score)} points"
    if after.sqnr_db is None or before.sqnr_db is None:
        return "all that was lost" if after.sqnr_db is None else "nothing"
    return f"{after.sqnr_db - before.sqnr_db:+.1f} dB".replace("-", MINUS)


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
    if found.floating.counts:
        header = ["", "top-1 %", "against float", "SQNR dB", "bytes of kernels"]
    else:
        metric = [] if found.floating.value is None else ["metric"]
        header = ["", *metric, "SQNR dB", "worst image dB", "cosine", "bytes of kernels"]
    return markdown_table(header, rows)


def _scores(item: Measurement, found: Diagnosis) -> list[str]:
    if item.counts:
        lost = ABSENT if item is found.floating else points(item.score - found.floating.score)
        return [f"{100 * item.score:.2f}", lost, decibels(item.sqnr_db)]
    metric = [] if item.value is None else [f"{item.value:.4g}"]
    return [*metric, decibels(item.sqnr_db), decibels(item.worst_db), f"{item.cosine:.5f}"]


def advice_section(found: Diagnosis, flags: bool) -> str:
    """Write the advised remedies with what each gave, snippets to paste, and what was tried in vain."""
    lines: list[str] = []
    before = found.all_rounded
    for trial in found.advised:
        finding, after = trial.finding, trial.result
        lines.append(
            f"{len(lines) + 1}. **{escaped(finding.layer)}**, {finding.kind}: {escaped(finding.evidence)}. "
            f"Remedy: {escaped(finding.remedy.text)}. "
            f"**{gain(before, after)}**, to {_score(after)}."
        )
        before = after
    text = "\n".join(lines) or escaped(_gain(found))
    return "\n\n".join(part for part in (text, _snippets(found, flags), _in_vain(found)) if part)


def _score(item: Measurement) -> str:
    return f"{100 * item.score:.2f} %" if item.counts else f"{decibels(item.sqnr_db)} dB"


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
        [escaped(trial.finding.layer), escaped(trial.finding.remedy.text), _score(trial.result).split()[0]]
        for trial in found.trials
        if not trial.advised
    ]
    if not rows:
        return ""
    unit = "top-1 %" if found.floating.counts else "SQNR dB"
    return "Tried, and not advised:\n\n" + markdown_table(["layer", "remedy", unit], rows, words=2)


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
    counts = found.floating.counts
    rows = [[*header, "alone" if counts else "alone dB", "all but it", "noise dB", "after dB"]]
    for name, item in found.sensitivities.items():
        known = counts or None not in (item.all_but.sqnr_db, found.all_rounded.sqnr_db)
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
                points(item.alone.score - found.floating.score) if counts else decibels(item.alone.sqnr_db),
                gain(found.all_rounded, item.all_but).split()[0] if known else ABSENT,
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
    loss = f" ({points(reached.score - found.floating.score)} against float)" if reached.counts else ""
    rows = [[escaped(name), str(precision)] for name, precision in chosen.precisions.items()]
    return "\n\n".join(
        [
            f"Asked: {asked}. Proposed, on top of the advice: {_score(reached)}{loss}, "
            f"{kernel_bytes(chosen):,} bytes of kernels.",
            markdown_table(["layer", "bits"], rows, words=2),
            f"```python\n{snippets.config(found.before, chosen)}\n```",
        ]
    ).strip()


def summary(found: Diagnosis, opening: str, flags: bool) -> str:
    """Write the Markdown that a terminal shows before the layers."""
    return f"{opening}\n\n{totals(found)}\n\n{advice_section(found, flags)}"


def points(fraction: float) -> str:
    """Write a difference of top-1 in points, with its sign.

    >>> points(0.0123), points(-0.2)
    ('+1.23', '−20.00')
    """
    return f"{100 * fraction:+.2f}".replace("-", MINUS)


def decibels(value: float | None) -> str:
    """Write an SQNR in dB, or a dash where there is no noise."""
    return ABSENT if value is None else f"{value:.1f}"
