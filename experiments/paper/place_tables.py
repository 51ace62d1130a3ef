"""Tables with a row for every place of deployment: backend, scheme and runtime."""

from collections.abc import Sequence

from experiments.configs.methods import METHODS
from experiments.paper.evidence import FLOAT, PUBLISHED, RECOMMENDED, Evidence
from experiments.paper.statistics import interval, paired, written
from qt_jax.reporting.deployment import Row
from qt_jax.reporting.deployment_tables import escaped, markdown_table
from qt_jax.reporting.tables import ABSENT

EDGE = {
    "latency_ms_p50": ("latency p50, ms", 1, 3),
    "throughput_ips": ("images/s", 1, 0),
    "energy_mj": ("energy, mJ (model)", 1, 4),
    "cost": ("cost, USD for 1M images", 1, 4),
    "model_bytes": ("size, kB", 1e-3, 0),
}


def by_place(evidence: Evidence, task: str, key: str, scale: float, digits: int) -> str:
    """A metric at every place, methods of the main table side by side; how it ended where there is none."""
    methods = evidence.methods(task)
    rows = []
    for place in evidence.places(task, methods):
        cells = []
        for method in methods:
            found = evidence.metric(task, method, place, key)
            ended = {r["status"] for r in evidence.seeds(task, method, place).values()} - {"ok"}
            cells.append(
                written(interval(found.values()), scale, digits)
                if found
                else ", ".join(sorted(ended)) or ABSENT
            )
        rows.append([*map(escaped, place), _images(evidence, task, methods, place), *cells])
    header = ["backend", "scheme", "runtime", "n", *(METHODS[method].title for method in methods)]
    return markdown_table(header, rows, words=3)


def gain_by_place(evidence: Evidence, task: str) -> str:
    """Points of accuracy over float training at every place, paired by seed."""
    methods = [method for method in evidence.methods(task) if method != FLOAT]
    rows = [
        [
            *map(escaped, place),
            *(
                written(
                    paired(evidence.accuracy(task, m, place), evidence.accuracy(task, FLOAT, place)),
                    100,
                    signed=True,
                )
                for m in methods
            ),
        ]
        for place in evidence.places(task, evidence.methods(task))
    ]
    return markdown_table(
        ["backend", "scheme", "runtime", *(METHODS[m].title for m in methods)], rows, words=3
    )


def edge(evidence: Evidence, task: str) -> str | None:
    """Speed, energy, cost and size at every place that has any; the latency of three methods.

    None where no place has.
    """
    methods = [m for m in (FLOAT, PUBLISHED, RECOMMENDED) if m in evidence.methods(task)]
    rows = []
    for place in evidence.places(task, methods):
        cells = []
        for key, (_, scale, digits) in EDGE.items():
            shown = methods if key == "latency_ms_p50" else methods[-1:]
            for method in shown:
                found = evidence.metric(task, method, place, key)
                cells.append(written(interval(found.values()), scale, digits))
        if any(cell != ABSENT for cell in cells[: len(methods)]):
            rows.append([*map(escaped, place), *cells])
    if not rows:
        return None
    header = ["backend", "scheme", "runtime"]
    for key, (title, _, _) in EDGE.items():
        header += [f"{title}, {METHODS[m].title}" for m in methods] if key == "latency_ms_p50" else [title]
    return markdown_table(header, rows, words=3)


def _images(evidence: Evidence, task: str, methods: Sequence[str], place: Row) -> str:
    found = {r["n"] for m in methods for r in evidence.seeds(task, m, place).values() if r.get("n")}
    return ", ".join(map(str, sorted(found))) or ABSENT
