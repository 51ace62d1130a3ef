"""The study's tables as Markdown, from its records alone.

Tables with a row for every place of deployment: backend, scheme and runtime.

Tables with a row for every layer: the SQNR of its output in a deployment.
"""

from collections.abc import Callable, Mapping, Sequence

from experiments.configs.methods import BASELINES, METHODS
from experiments.paper.evidence import (
    FLOAT,
    GROUPS,
    PUBLISHED,
    RECOMMENDED,
    Estimate,
    Evidence,
    Seeds,
    common_places,
    interval,
    mean_over,
    paired,
    worst_over,
    written,
)
from qt_jax.reporting.pivot import REFERENCE, Row
from qt_jax.reporting.tables import ABSENT, escaped, markdown_table

QUALITY = {
    "ece": ("ECE, in %", 100, 2),
    "brier": ("Brier score, in %", 100, 2),
    "nll": ("NLL, in nats", 1, 3),
    "logit_mse": ("MSE of the logits against FP32", 1, 4),
    "sqnr_db": ("SQNR of the logits against FP32, in dB", 1, 1),
}
"""Metrics beside accuracy: their titles, their scale and digits."""

WORST = {"worst INT8": ("INT8 pt", "INT8 pc"), "worst INT4": ("INT4 pt", "INT4 pc")}

LEGEND = (
    "Mean ± half the 95 % t-interval over seeds. pt, pc: one weight scale a tensor, a channel. INT8: 8-bit "
    "weights and activations; INT4: 4-bit weights. A group is the mean over all its deployments (backend and "
    "scheme; their number in brackets) that every method of the table has. Worst: the deployment that is "
    "worst for the method, found anew for each seed. Simulators run on fewer images: their accuracy is the "
    "network's FP32 accuracy less what they lose on theirs."
)

Column = Callable[[str], Seeds]


def columns_of(evidence: Evidence, task: str, methods: Sequence[str]) -> dict[str, Column]:
    """The columns of a summary: title -> accuracy of a method by seed."""
    places = {name: common_places(evidence, task, methods, name) for name in GROUPS}
    columns: dict[str, Column] = {}
    for name, mine in places.items():
        if mine:
            columns[name] = lambda method, mine=mine: mean_over(evidence, task, method, mine, "accuracy")
    for name, groups in WORST.items():
        mine = [place for group in groups for place in places[group]]
        if mine:
            columns[name] = lambda method, mine=mine: worst_over(evidence, task, method, mine)
    return columns


def summary(evidence: Evidence, task: str, table: str = BASELINES) -> str:
    """Accuracy in % of the methods of a table: by group, and at the worst place."""
    methods = evidence.methods(task, table)
    columns = columns_of(evidence, task, methods)
    header = ["method"]
    for name in columns:
        counted = name in GROUPS and name != "FP32"
        header.append(f"{name} ({len(common_places(evidence, task, methods, name))})" if counted else name)
    rows = [
        [
            METHODS[method].title,
            *(written(interval(of(method).values()), 100) for of in columns.values()),
            str(len({seed for place in evidence.cells[task][method].values() for seed in place})),
        ]
        for method in methods
    ]
    return markdown_table([*header, "seeds"], rows)


def gains(evidence: Evidence, task: str, table: str = BASELINES, over: str = FLOAT) -> str:
    """By how many points each method leads another, paired by seed, in the columns of `summary`.

    Bold where the whole interval lies above 0.
    """
    methods = evidence.methods(task, table)
    if over not in methods:
        return f"No records of {METHODS[over].title} yet."
    columns = columns_of(evidence, task, methods)
    rows = []
    for method in methods:
        if method == over:
            continue
        cells = [paired(of(method), of(over)) for of in columns.values()]
        rows.append([METHODS[method].title, *map(_in_points, cells)])
    return markdown_table([f"points over {METHODS[over].title}", *columns], rows)


def leads(evidence: Evidence, task: str, of: str = RECOMMENDED) -> str:
    """By how many points one method leads each other method of the main table, as `gains` has them."""
    methods = evidence.methods(task)
    if of not in methods:
        return f"No records of {METHODS[of].title} yet."
    columns = columns_of(evidence, task, methods)
    rows = []
    for method in methods:
        if method != of:
            cells = [paired(column(of), column(method)) for column in columns.values()]
            rows.append([METHODS[method].title, *map(_in_points, cells)])
    return markdown_table([f"{METHODS[of].title} over", *columns], rows)


def losses(evidence: Evidence, task: str) -> str:
    """Points that a method loses against its own FP32 at the place where it loses most, by group."""
    methods = evidence.methods(task)
    groups = {name: common_places(evidence, task, methods, name) for name in GROUPS if name != "FP32"}
    groups = {name: places for name, places in groups.items() if places}
    rows = []
    for method in methods:
        own = evidence.accuracy(task, method, REFERENCE)
        worst = [worst_over(evidence, task, method, places) for places in groups.values()]
        rows.append(
            [METHODS[method].title, *(written(paired(own, found), 100, signed=True) for found in worst)]
        )
    return markdown_table(["largest loss against own FP32, points", *groups], rows)


def left_out(evidence: Evidence, task: str, table: str = BASELINES) -> str:
    """The places that are in no group's mean because some method of the table lacks some seed there."""
    methods = evidence.methods(task, table)
    kept = {place for name in GROUPS for place in common_places(evidence, task, methods, name)}
    trained = {m: set(evidence.seeds(task, m, REFERENCE)) for m in methods}
    absent = {}
    for place in evidence.places(task, methods):
        without = [m for m in methods if set(evidence.accuracy(task, m, place)) != trained[m]]
        if place not in kept and without and len(without) < len(methods):
            absent[" ".join(place)] = ", ".join(METHODS[m].title for m in without)
    told = "; ".join(f"{place} ({names})" for place, names in absent.items())
    return f"In no mean, for want of some method's seeds there: {told}." if told else ""


def _in_points(cell: Estimate | None) -> str:
    text = written(cell, 100, signed=True)
    return f"**{text}**" if cell is not None and cell.positive else text


def quality(evidence: Evidence, task: str, key: str) -> str:
    """A metric of `QUALITY` by group, for the methods of the main table."""
    _, scale, digits = QUALITY[key]
    methods = evidence.methods(task)
    groups = {name: common_places(evidence, task, methods, name) for name in GROUPS}
    groups = {name: mine for name, mine in groups.items() if mine}
    rows = [
        [
            METHODS[method].title,
            *(
                written(interval(mean_over(evidence, task, method, mine, key).values()), scale, digits)
                for mine in groups.values()
            ),
        ]
        for method in methods
    ]
    return markdown_table(["method", *groups], rows)


def training(evidence: Evidence) -> str:
    """What each method was trained with and for how long, means over seeds."""
    rows = []
    by_method: dict[tuple[str, str], list[Mapping]] = {}
    for record in evidence.training:
        by_method.setdefault((record["task"], record["method"]), []).append(record)
    for (task, method), found in by_method.items():
        last = found[0]
        own = {
            name: value for name, value in last["changes"].items() if name not in ("seed", "learning_rate")
        }
        told = ", ".join(f"{name} {value}" for name, value in own.items()) or "the task's own"
        if last["start"] or last["network"]:
            told += f"; from {last['start'] or last['network']}"
        if last["export"] != "plain":
            told += f"; export {last['export']}"
        searched = last["rate_from"] or "not searched"
        validation = [
            written(interval(r[key] for r in found if r.get(key) is not None), 100)
            for key in ("validation_fp32", "validation_fake_quant")
        ]
        minutes = sum(r["training_seconds"] for r in found) / 60 / len(found)
        rate = f"{last['learning_rate']:g} ({searched})"
        rows.append(
            [task, METHODS[method].title, escaped(told), rate, *validation, f"{minutes:.1f}", str(len(found))]
        )
    header = [
        "task",
        "method",
        "changes",
        "learning rate",
        "validation FP32",
        "fake-quantized",
        "minutes",
        "seeds",
    ]
    return markdown_table(header, rows, words=4)


def tables_of(evidence: Evidence, task: str) -> list[str]:
    """The tables of which a task has at least two methods, the main one first."""
    names = dict.fromkeys(table for method in METHODS.values() for table in method.tables)
    return [name for name in names if len(evidence.methods(task, name)) > 1]


def search(evidence: Evidence) -> str:
    """Every trial: accuracies on the validation split, and their mean, by which the rate was chosen."""
    keys = ("fp32", "int4w-pt-minmax", "int4w-pc-minmax", "criterion")
    rows = [
        [
            trial["task"],
            METHODS[trial["method"]].title,
            f"{trial['learning_rate']:g}",
            *(ABSENT if trial[key] is None else f"{100 * trial[key]:.2f}" for key in keys),
        ]
        for trial in evidence.search
    ]
    return markdown_table(["task", "method", "learning rate", *keys], rows, words=2)


def cost(evidence: Evidence) -> str:
    """How many rows there are, what they took, and with which program and on what."""
    hours = sum(record["seconds"] for record in (*evidence.training, *evidence.search)) / 3600
    found = {
        "commit": sorted({_commit(record) for record in evidence.training}),
        "on": sorted({f"{r['cpu']['model']} ({r['device']})" for r in evidence.training}),
        "with": sorted({f"{name} {v}" for r in evidence.training for name, v in r["versions"].items()}),
    }
    told = "; ".join(f"{key} {', '.join(values)}" for key, values in found.items())
    searched = f" and {len(evidence.search)} trials of the search" if evidence.search else ""
    return f"{len(evidence.training)} rows{searched}, {hours:.1f} hours of one core or device; {told}."


def _commit(record: Mapping) -> str:
    """A commit, short, with what it says of changed files."""
    name, dash, dirty = str(record["commit"]).partition("-")
    return name[:12] + dash + dirty


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


TABLES = ("points", "export")
"""Of methods that are compared layer by layer, beside float training: quantization points and exports."""


def layer_sqnr(evidence: Evidence, task: str, scheme: str) -> dict[str, dict[str, list[float]]]:
    """Method -> layer -> SQNR in dB of its output, one for each seed; layers without one are left out.

    Only seeds that all of these methods have: means over different seeds are no comparison.

    Args:
      scheme: of onnxruntime, one of those that structure.jsonl has.
    """
    rows = [r for r in evidence.structure if r["task"] == task and _compared(r["method"])]
    seeds: dict[str, set[int]] = {}
    for record in rows:
        seeds.setdefault(record["method"], set()).add(record["seed"])
    common = set.intersection(*seeds.values()) if seeds else set()
    found: dict[str, dict[str, list[float]]] = {}
    for record in rows:
        mine = found.setdefault(record["method"], {})
        for layer in record["layers"]:
            if record["seed"] in common and layer["sqnr_db"][scheme] is not None:
                mine.setdefault(layer["layer"], []).append(layer["sqnr_db"][scheme])
    return found


def _compared(method: str) -> bool:
    return method == FLOAT or bool(set(TABLES) & set(METHODS[method].tables))


def by_layer(evidence: Evidence, task: str, scheme: str) -> str:
    """A table of `layer_sqnr`: a row a layer, a column a method; means over seeds, and of all layers last."""
    found = layer_sqnr(evidence, task, scheme)
    layers = list(dict.fromkeys(layer for mine in found.values() for layer in mine))
    rows = [[escaped(layer), *(_mean(mine.get(layer, [])) for mine in found.values())] for layer in layers]
    every = ([x for seeds in mine.values() for x in seeds] for mine in found.values())
    rows.append(["**mean of layers**", *map(_mean, every)])
    return markdown_table(["layer", *(METHODS[method].title for method in found)], rows)


def _mean(decibels: list[float]) -> str:
    return f"{sum(decibels) / len(decibels):.1f}" if decibels else ABSENT
