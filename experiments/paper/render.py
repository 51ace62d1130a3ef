"""Tables and figures of a study from its records alone: the same files, byte for byte, for the same records.

`docs/results/study.md` has them between comments: `<!-- paper-cpu cifar10-fast8 main -->` ... `<!-- end -->`.

What the file of a method says that it takes and scores, from records.
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import qt_jax as qt
from experiments.configs.methods import BASELINES, METHODS
from experiments.paper import tables
from experiments.paper.evidence import (
    FLOAT,
    GROUPS,
    PUBLISHED,
    RECOMMENDED,
    Evidence,
    common_places,
    interval,
    mean_over,
    read,
    written,
)
from experiments.paper.figures import Drawable, figures
from qt_jax.diagnosis.toolchains import LAYER_SCHEMES
from qt_jax.files import write_whole

STATED = re.compile(r'Expected time and score:.*?"""', re.DOTALL)

WIDTH = 110


def expectation(evidence: Evidence, method: str) -> str:
    """Minutes of one core and accuracy in %, means over seeds, on the first task that has the method."""
    task = next((task for task in evidence.tasks if method in evidence.cells[task]), None)
    if task is None:
        return "Expected time and score: not run yet."
    seconds = [r["seconds"] for r in evidence.training if (r["task"], r["method"]) == (task, method)]
    scores = []
    for group in GROUPS:
        if places := common_places(evidence, task, [method], group):
            found = interval(mean_over(evidence, task, method, places, "accuracy").values())
            scores.append(f"{group} {written(found and found._replace(half=None), 100, 1)}")
    minutes = round(sum(seconds) / 60 / len(seconds))
    time = "1 minute" if minutes == 1 else f"{minutes} minutes"
    return f"Expected time and score: {time} of one core; on {task}, in %: {', '.join(scores)}."


def state(evidence: Evidence, folder: Path) -> None:
    """Writes it into the docstrings of the methods' files in a folder."""
    for method in METHODS:
        file = folder / f"{method.replace('-', '_')}.py"
        stated = textwrap.fill(expectation(evidence, method), WIDTH) + '\n"""'
        write_whole(file, STATED.sub(lambda _, text=stated: text, file.read_text(), count=1))


OVER = {BASELINES: FLOAT, "points": RECOMMENDED}
"""What the methods of a table are paired with; the published recipe, where nothing is said."""

DIGESTS = "figures.json"
"""For each figure the SHA-256 of its data, of the program that draws it and of its file."""

BLOCK = re.compile(r"(<!-- (paper-[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(folder: Path, page: Path | None = None, methods: Path | None = None) -> list[Path]:
    """Writes all tables and figures into the folder of results, its blocks into a page, and what methods take
    and score into their files in a folder.

    Figures whose data, program and file are as `figures.json` says are left alone.

    Returns the files that were written or found to be right.

    Raises:
      InvalidInput: there are no records, or the page asks for a block that they do not give.
    """
    evidence = read(folder)
    if not evidence.cells:
        raise qt.InvalidInput(f"{folder} holds no records of finished rows: run the study first.")
    pictures = figures(evidence)
    texts = pages(evidence, folder.name, list(pictures))
    front = None if page is None else filled(page.read_text(), blocks(evidence, folder.name))
    for name, text in texts.items():
        write_whole(folder / name, text)
    draw(pictures, folder)
    if front is not None:
        write_whole(page, front)
    if methods is not None:
        state(evidence, methods)
    return [folder / name for name in (*texts, *pictures)]


def draw(pictures: Mapping[str, Drawable], folder: Path) -> None:
    """Draws what has changed, removes figures that there is nothing for any more, and notes all digests."""
    path = folder / DIGESTS
    before = json.loads(path.read_text()) if path.exists() else {}
    now = {}
    for name, picture in pictures.items():
        file = folder / name
        present = {
            "data": picture.digest,
            "program": digest(Path(figures.__file__)),
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
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def pages(evidence: Evidence, study: str, pictures: list[str]) -> dict[str, str]:
    """File name -> Markdown."""
    found = {
        "accuracy.md": _page(f"{study}: accuracy by backend and scheme", _accuracy(evidence)),
        "quality.md": _page(f"{study}: calibration and fidelity", _quality(evidence)),
        "ablations.md": _page(f"{study}: ablations", _ablations(evidence)),
        "layers.md": _page(f"{study}: SQNR by layer", _layers(evidence)),
        "training.md": _page(f"{study}: training", [tables.training(evidence), *_search(evidence)]),
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


EDGE_NOTE = (
    "Latency at batch 1, on a machine that computed another row at the same time: compare within a column. "
    "Energy is a model (Horowitz, ISSCC 2014)."
)

LAYER_NOTE = (
    "SQNR in dB of each layer's output, behind the activation that is fused with it, in onnxruntime's "
    "deployment against the float graph, on validation images; means over the seeds that all methods have."
)


def blocks(evidence: Evidence, study: str) -> dict[str, str]:
    """Name -> Markdown, for a page: a summary and the gains of every table of every task; the cost."""
    found = {f"{study} cost": tables.cost(evidence), f"{study} legend": tables.LEGEND}
    for task in evidence.tasks:
        found[f"{study} {task} leads"] = tables.leads(evidence, task)
        found[f"{study} {task} losses"] = tables.losses(evidence, task)
        for table in tables.tables_of(evidence, task):
            over = OVER.get(table, PUBLISHED)
            found[f"{study} {task} {table}"] = tables.summary(evidence, task, table)
            found[f"{study} {task} {table} gains"] = tables.gains(evidence, task, table, over)
    return found


def filled(text: str, contents: Mapping[str, str]) -> str:
    """`text` with each of its blocks that `contents` speaks of replaced; blocks of other studies stay.

    Raises:
      InvalidInput: a block of one of these studies that there is no content for.

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
        return f"{match[1]}\n{contents[name]}\n\n{match[3]}"

    return BLOCK.sub(replaced, text)


def _accuracy(evidence: Evidence) -> list[str]:
    parts = [tables.LEGEND]
    for task in evidence.tasks:
        parts += [f"## {task}", "Accuracy in %.", tables.by_place(evidence, task, "accuracy", 100, 2)]
        parts += ["Points over float training, paired by seed.", tables.gain_by_place(evidence, task)]
    return parts


def _quality(evidence: Evidence) -> list[str]:
    parts = [tables.LEGEND]
    for task in evidence.tasks:
        parts.append(f"## {task}")
        for key, (title, scale, digits) in tables.QUALITY.items():
            parts += [f"### {task}: {title}", tables.quality(evidence, task, key)]
            parts.append(tables.by_place(evidence, task, key, scale, digits))
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
        return ["No learning rate was searched: every method has the task's own."]
    return ["## Search", tables.search(evidence)]


def _page(title: str, parts: list[str]) -> str:
    return "\n\n".join([f"# {title}", *filter(None, parts)]) + "\n"
