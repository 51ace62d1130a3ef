"""Write the tables and figures of a study from its records.

The same records give the same files, byte for byte. `docs/results/study.md` has some of the tables between
comments: `<!-- paper-cpu cifar10-fast8 main -->` ... `<!-- end -->`.
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import qt_jax as qt
from experiments.configs.methods import BASELINES, FLOAT
from experiments.paper import tables
from experiments.paper.evidence import PUBLISHED, RECOMMENDED, Evidence, read
from experiments.paper.figures import StudyFigure, figures
from qt_jax.diagnosis.toolchains import LAYER_SCHEMES
from qt_jax.files import write_whole

STUDY_PAGE = Path(__file__).parents[2] / "docs" / "results" / "study.md"
"""The page of the documentation that has tables of the study."""

BLOCK = re.compile(r"(<!-- (paper-[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

DIGESTS = "figures.json"
"""For each figure the SHA-256 of its data, of the program that draws it, and of its file."""

COLUMNS = 100
"""Width of paragraphs in Markdown."""

OVER = {BASELINES: FLOAT, "points": RECOMMENDED}
"""The method that the methods of a table are paired with. For other tables it is the published recipe."""

METHODS_NOTE = (
    "`python -m experiments.paper --methods NAME` trains and deploys a method. Minutes are those of one core "
    "for one seed on the first task that has the method. Scores are accuracies in % on that task, as means "
    "over seeds and over the deployments of a group. pt and pc stand for one weight scale per tensor and per "
    "channel."
)

EDGE_NOTE = (
    "Latency is that of batch 1, on a machine that computed another row at the same time: compare numbers "
    "within a column. Energy is a model (Horowitz, ISSCC 2014)."
)

TRAINED_NOTE = (
    "Networks as `experiments.accelerator` has trained and measured them: accuracy on the test images in "
    "%, in float32. Numbers are means ± half the 95 % t-interval over seeds. Six views average the logits of "
    "an image, its mirror image and four shifted ones; an exported graph sees one view. Seconds are those of "
    "one training, without compilation. The spread of reverse pruning and the draws of vendors' grids are "
    "the same for all seeds."
)

LAYER_NOTE = (
    "Numbers are the SQNR in dB of each layer's output, after the activation that is fused with it: "
    "onnxruntime's deployment against the float graph, on validation images. They are means over the seeds "
    "that all methods have."
)


def render(folder: Path, page: Path | None = None) -> list[Path]:
    """Write all tables and figures into the folder of results, and the tables of a page into that page.

    A figure is not drawn again if its data, program and file are as `figures.json` says.

    Returns:
      The files that were written or found to be right.

    Raises:
      InvalidInput: There are no records, or the page asks for a table that they do not give.
    """
    evidence = read(folder)
    if not (evidence.deployed or evidence.trained):
        raise qt.InvalidInput(f"{folder} holds no records of finished rows: run the study first.")
    pictures = figures(evidence)
    texts = pages(evidence, folder.name, list(pictures))
    updated = (
        None if page is None else filled(page.read_text(encoding="utf-8"), blocks(evidence, folder.name))
    )
    for name, text in texts.items():
        write_whole(folder / name, text)
    draw(pictures, folder)
    if updated is not None:
        write_whole(page, updated)
    return [folder / name for name in (*texts, *pictures)]


def pages(evidence: Evidence, study: str, pictures: list[str]) -> dict[str, str]:
    """Return file name -> Markdown.

    Args:
      evidence: The records.
      study: Name of the study, for titles.
      pictures: File names of the figures.

    Before the first deployment there is only the table of the trained networks.
    """
    trained = {}
    if evidence.trained:
        parts = [TRAINED_NOTE, tables.trained(evidence), tables.trained_where(evidence)]
        trained["trained.md"] = _page(f"{study}: trained networks", parts)
    if not evidence.deployed:
        return trained
    found = {
        "accuracy.md": _page(f"{study}: accuracy by backend and scheme", _accuracy(evidence)),
        "quality.md": _page(f"{study}: calibration and fidelity", _quality(evidence)),
        "ablations.md": _page(f"{study}: ablations", _ablations(evidence)),
        "layers.md": _page(f"{study}: SQNR by layer", _layers(evidence)),
        "training.md": _page(f"{study}: training", [tables.training(evidence), *_search(evidence)]),
        "methods.md": _page(f"{study}: methods", [METHODS_NOTE, tables.methods_table(evidence)]),
        **trained,
    }
    edge = {task: tables.edge(evidence, task) for task in evidence.tasks}
    if any(edge.values()):
        parts = [f"## {task}\n\n{table}" for task, table in edge.items() if table]
        found["edge.md"] = _page(f"{study}: speed, energy and cost", [EDGE_NOTE, *parts])
    index = ", ".join(f"[{name.removesuffix('.md')}]({name})" for name in found)
    parts = [f"{tables.cost(evidence)}", f"More: {index}.", tables.LEGEND]
    for task in evidence.tasks:
        parts += [f"## {task}", tables.summary(evidence, task), tables.left_out(evidence, task)]
        parts += [tables.gains(evidence, task), tables.leads(evidence, task), tables.losses(evidence, task)]
        parts += [f"![{name}]({name})" for name in pictures if name.endswith(f"-{task}.png")]
    return {"summary.md": _page(study, parts), **found}


def _page(title: str, parts: list[str]) -> str:
    """Join a title and the parts that are not empty."""
    return "\n\n".join([f"# {title}", *map(wrapped, filter(None, parts))]) + "\n"


def wrapped(part: str) -> str:
    """Wrap a paragraph, and return tables, headings and figures as they are.

    >>> wrapped("word " * 25).count("\\n"), wrapped("| " + "word " * 25).count("\\n")
    (1, 0)
    """
    if part.startswith(("|", "#", "!")):
        return part
    return textwrap.fill(part, COLUMNS, break_long_words=False, break_on_hyphens=False)


def _accuracy(evidence: Evidence) -> list[str]:
    parts = [tables.LEGEND]
    for task in evidence.tasks:
        parts += [f"## {task}", "Accuracy in %.", tables.by_deployment(evidence, task, "accuracy", 100, 2)]
        parts += ["Points over float training, paired by seed.", tables.gain_by_deployment(evidence, task)]
    return parts


def _quality(evidence: Evidence) -> list[str]:
    parts = [tables.LEGEND]
    for task in evidence.tasks:
        parts.append(f"## {task}")
        for key, (title, scale, digits) in tables.QUALITY.items():
            parts += [f"### {task}: {title}", tables.quality(evidence, task, key)]
            parts.append(tables.by_deployment(evidence, task, key, scale, digits))
    return parts


def _ablations(evidence: Evidence) -> list[str]:
    parts = [tables.LEGEND]
    for task in evidence.tasks:
        for table in tables.tables_of(evidence, task):
            if table != BASELINES:
                parts += [f"## {task}: {table}", tables.summary(evidence, task, table)]
                parts.append(tables.gains(evidence, task, table, OVER.get(table, PUBLISHED)))
    return parts


def _layers(evidence: Evidence) -> list[str]:
    parts = [LAYER_NOTE]
    for task in evidence.tasks:
        for scheme in LAYER_SCHEMES:
            parts += [f"## {task}: {scheme}", tables.by_layer(evidence, task, scheme)]
    return parts


def _search(evidence: Evidence) -> list[str]:
    if not evidence.search:
        return ["No learning rate was searched. Every method has the task's rate."]
    return ["## Search", tables.search(evidence)]


def draw(pictures: Mapping[str, StudyFigure], folder: Path) -> None:
    """Draw the figures that have changed, remove those without data, and write all digests."""
    path = folder / DIGESTS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {}
    for name, picture in pictures.items():
        file = folder / name
        present = {
            "data": picture.data_digest,
            "program": picture.program_digest,
            "file": digest(file) if file.exists() else None,
        }
        if before.get(name) != present:
            picture.draw(picture.data, file)
            present["file"] = digest(file)
        now[name] = present
    for name in before.keys() - now.keys():
        (folder / name).unlink(missing_ok=True)
    write_whole(path, json.dumps(now, indent=1, sort_keys=True) + "\n")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def blocks(evidence: Evidence, study: str) -> dict[str, str]:
    """Return name -> Markdown of the tables that a page can have.

    They are the cost, the legend and, for every task, summary and gains of every table.
    """
    found = {f"{study} cost": tables.cost(evidence), f"{study} legend": tables.LEGEND}
    if evidence.trained:
        found[f"{study} trained"] = tables.trained(evidence)
    for task in evidence.tasks:
        found[f"{study} {task} leads"] = tables.leads(evidence, task)
        found[f"{study} {task} losses"] = tables.losses(evidence, task)
        for table in tables.tables_of(evidence, task):
            over = OVER.get(table, PUBLISHED)
            found[f"{study} {task} {table}"] = tables.summary(evidence, task, table)
            found[f"{study} {task} {table} gains"] = tables.gains(evidence, task, table, over)
    return found


def filled(text: str, contents: Mapping[str, str]) -> str:
    """Return `text` with its blocks replaced by `contents`. Blocks of other studies stay.

    Raises:
      InvalidInput: A block of one of these studies has no content.

    >>> filled("<!-- paper-cpu cost -->\\nold\\n<!-- end -->", {"paper-cpu cost": "new"})
    '<!-- paper-cpu cost -->\\n\\nnew\\n\\n<!-- end -->'
    """
    studies = {name.split()[0] for name in contents}

    def replaced(match: re.Match) -> str:
        name = match[2]
        if name.split()[0] not in studies:
            return match[0]
        if name not in contents:
            known = ", ".join(sorted(contents))
            raise qt.InvalidInput(f"the page asks for a table {name!r} that the records do not give: {known}")
        return f"{match[1]}\n{wrapped(contents[name])}\n\n{match[3]}"

    return BLOCK.sub(replaced, text)
