"""Make the study's tables as Markdown, from its records.

There are tables with one row per method, one row per deployment (backend, scheme and runtime), one row per
layer, and one row per trial of the search.
"""

from collections.abc import Callable, Mapping, Sequence
from math import fsum
from statistics import fmean

from experiments.configs.methods import BASELINES, FLOAT, METHODS
from experiments.paper.evidence import (
    GROUPS,
    PUBLISHED,
    RECOMMENDED,
    Estimate,
    Evidence,
    SeedValues,
    common_deployments,
    interval,
    mean_over,
    paired,
    worst_over,
    written,
)
from qt_jax.records import Record
from qt_jax.reporting.pivot import REFERENCE, Row
from qt_jax.reporting.tables import ABSENT, escaped, markdown_table

LEGEND = (
    "Numbers are means ± half the 95 % t-interval over seeds. pt and pc stand for one weight scale per "
    "tensor and per channel. INT8 has 8-bit weights and activations, INT4 has 4-bit weights. A group is the "
    "mean over the deployments (backend and scheme; their number is in brackets) that every method of the "
    "table has. Worst is the deployment that is worst for the method, determined for each seed. Simulators "
    "run on fewer images: their accuracy is the network's FP32 accuracy minus what they lose on their own "
    "images."
)

WORST = {"worst INT8": ("INT8 pt", "INT8 pc"), "worst INT4": ("INT4 pt", "INT4 pc")}
"""Columns of a summary beside `GROUPS`: the worst deployment of these groups."""

QUALITY = {
    "ece": ("ECE, in %", 100, 2),
    "brier": ("Brier score, in %", 100, 2),
    "nll": ("NLL, in nats", 1, 3),
    "logit_mse": ("MSE of the logits against FP32", 1, 4),
    "sqnr_db": ("SQNR of the logits against FP32, in dB", 1, 1),
}
"""Metrics beside accuracy: title, factor and digits."""

EDGE = {
    "latency_ms_p50": ("latency p50, ms", 1, 3),
    "throughput_ips": ("images/s", 1, 0),
    "energy_mj": ("energy, mJ (model)", 1, 4),
    "cost": ("cost, USD for 1M images", 1, 4),
    "model_bytes": ("size, kB", 1e-3, 0),
}
"""Metrics of speed and cost: title, factor and digits."""

LAYER_TABLES = ("points", "export")
"""Tables whose methods are compared layer by layer, beside float training."""

SummaryColumn = Callable[[str], SeedValues]
"""Returns the accuracy of a method by seed."""


def summary_columns(evidence: Evidence, task: str, methods: Sequence[str]) -> dict[str, SummaryColumn]:
    """Return the columns of a summary by title: groups of deployments, and the worst deployments."""
    groups = {name: common_deployments(evidence, task, methods, name) for name in GROUPS}
    columns: dict[str, SummaryColumn] = {}
    for name, mine in groups.items():
        if mine:
            columns[name] = lambda method, mine=mine: mean_over(evidence, task, method, mine, "accuracy")
    for name, parts in WORST.items():
        mine = [deployment for part in parts for deployment in groups[part]]
        if mine:
            columns[name] = lambda method, mine=mine: worst_over(evidence, task, method, mine)
    return columns


def summary(evidence: Evidence, task: str, table: str = BASELINES) -> str:
    """Tabulate the accuracy in % of the methods of a table: by group, and at the worst deployment."""
    methods = evidence.methods(task, table)
    columns = summary_columns(evidence, task, methods)
    header = ["method"]
    for name in columns:
        counted = name in GROUPS and name != "FP32"
        size = len(common_deployments(evidence, task, methods, name)) if counted else 0
        header.append(f"{name} ({size})" if counted else name)
    rows = [
        [
            METHODS[method].title,
            *(written(interval(column(method).values()), 100) for column in columns.values()),
            str(len({seed for seeds in evidence.deployed[task][method].values() for seed in seeds})),
        ]
        for method in methods
    ]
    return markdown_table([*header, "seeds"], rows)


def gains(evidence: Evidence, task: str, table: str = BASELINES, over: str = FLOAT) -> str:
    """Tabulate by how many points each method leads another, paired by seed, in the columns of `summary`.

    Numbers are bold where the whole interval lies above 0.
    """
    methods = evidence.methods(task, table)
    if over not in methods:
        return f"No records of {METHODS[over].title} yet."
    columns = summary_columns(evidence, task, methods)
    rows = []
    for method in methods:
        if method != over:
            ahead = [paired(column(method), column(over)) for column in columns.values()]
            rows.append([METHODS[method].title, *map(_in_points, ahead)])
    return markdown_table([f"points over {METHODS[over].title}", *columns], rows)


def leads(evidence: Evidence, task: str, of: str = RECOMMENDED) -> str:
    """Tabulate by how many points one method leads each other method of the main table, as in `gains`."""
    methods = evidence.methods(task)
    if of not in methods:
        return f"No records of {METHODS[of].title} yet."
    columns = summary_columns(evidence, task, methods)
    rows = []
    for method in methods:
        if method != of:
            ahead = [paired(column(of), column(method)) for column in columns.values()]
            rows.append([METHODS[method].title, *map(_in_points, ahead)])
    return markdown_table([f"{METHODS[of].title} over", *columns], rows)


def _in_points(estimate: Estimate | None) -> str:
    """Write an estimate in points, in bold if it is certainly positive."""
    text = written(estimate, 100, signed=True)
    return f"**{text}**" if estimate is not None and estimate.positive else text


def losses(evidence: Evidence, task: str) -> str:
    """Tabulate the points that each method loses against its own FP32 at its worst deployment, by group."""
    methods = evidence.methods(task)
    groups = {name: common_deployments(evidence, task, methods, name) for name in GROUPS if name != "FP32"}
    groups = {name: mine for name, mine in groups.items() if mine}
    rows = []
    for method in methods:
        own = evidence.accuracy(task, method, REFERENCE)
        worst = [worst_over(evidence, task, method, mine) for mine in groups.values()]
        rows.append(
            [METHODS[method].title, *(written(paired(own, found), 100, signed=True) for found in worst)]
        )
    return markdown_table(["largest loss against own FP32, points", *groups], rows)


def left_out(evidence: Evidence, task: str, table: str = BASELINES) -> str:
    """Name the deployments that no mean includes, because some method of the table lacks a seed there."""
    methods = evidence.methods(task, table)
    kept = {mine for name in GROUPS for mine in common_deployments(evidence, task, methods, name)}
    trained = {m: set(evidence.seeds(task, m, REFERENCE)) for m in methods}
    absent = {}
    for deployment in evidence.deployments(task, methods):
        without = [m for m in methods if set(evidence.accuracy(task, m, deployment)) != trained[m]]
        if deployment not in kept and without and len(without) < len(methods):
            absent[" ".join(deployment)] = ", ".join(METHODS[m].title for m in without)
    listed = "; ".join(f"{deployment} ({names})" for deployment, names in absent.items())
    return (
        f"No mean includes these deployments, because methods lack seeds there: {listed}." if listed else ""
    )


def quality(evidence: Evidence, task: str, key: str) -> str:
    """Tabulate a metric of `QUALITY` by group, for the methods of the main table."""
    _, scale, digits = QUALITY[key]
    methods = evidence.methods(task)
    groups = {name: common_deployments(evidence, task, methods, name) for name in GROUPS}
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


def tables_of(evidence: Evidence, task: str) -> list[str]:
    """Return the names of the tables of which a task has at least two methods, the main one first."""
    names = dict.fromkeys(table for method in METHODS.values() for table in method.tables)
    return [name for name in names if len(evidence.methods(task, name)) > 1]


def methods_table(evidence: Evidence) -> str:
    """Tabulate every method that a study has records of: what it is, how long it takes, and what it scores.

    Columns are the name on the command line, what the method is, the first task that has it, the minutes of
    one core for one row of that task, and the accuracy in % by group, as a mean over seeds.
    """
    deployed = {name: task for task in reversed(evidence.tasks) for name in evidence.deployed[task]}
    rows = [
        [f"`{name}`", METHODS[name].about, *_time_and_scores(evidence, deployed[name], name)]
        for name in METHODS
        if name in deployed
    ]
    return markdown_table(["method", "what it is", "task", "minutes", *GROUPS], rows, words=3)


def _time_and_scores(evidence: Evidence, task: str, method: str) -> list[str]:
    """Return task, minutes and scores of a method."""
    seconds = [r["seconds"] for r in evidence.training if (r["task"], r["method"]) == (task, method)]
    scores = []
    for group in GROUPS:
        mine = common_deployments(evidence, task, [method], group)
        found = interval(mean_over(evidence, task, method, mine, "accuracy").values())
        scores.append(written(found and found._replace(half=None), 100, 1))
    return [task, f"{fmean(seconds) / 60:.0f}", *scores]


def training(evidence: Evidence) -> str:
    """Tabulate what each method was trained with and for how long, as means over seeds."""
    by_method: dict[tuple[str, str], list[Record]] = {}
    for record in evidence.training:
        by_method.setdefault((record["task"], record["method"]), []).append(record)
    rows = []
    for (task, method), found in by_method.items():
        first = found[0]
        validation = [
            written(interval(r[key] for r in found if r.get(key) is not None), 100)
            for key in ("validation_fp32", "validation_fake_quant")
        ]
        minutes = fmean(r["training_seconds"] for r in found) / 60
        rate = f"{first['learning_rate']:g} ({first['rate_from'] or 'not searched'})"
        changes = escaped(_changes(first))
        rows.append(
            [task, METHODS[method].title, changes, rate, *validation, f"{minutes:.1f}", str(len(found))]
        )
    header = ["task", "method", "changes", "learning rate", "validation FP32", "fake-quantized"]
    return markdown_table([*header, "minutes", "seeds"], rows, words=4)


def trained(evidence: Evidence) -> str:
    """Tabulate the networks of `experiments.accelerator`: test accuracy, and seconds of training."""
    columns = (("top1", 100), ("top1_fake_quant", 100), ("top1_six_views", 100), ("seconds", 1))
    kinds: dict[tuple[str, str], list[Record]] = {}
    for record in evidence.trained:
        good = kinds.setdefault((record["task"], record["method"]), [])
        good += [record] if record["status"] == "ok" else []
    rows = []
    for (task, method), good in kinds.items():
        found = [interval(r[key] for r in good if r[key] is not None) for key, _ in columns]
        shown = [written(value, scale) for value, (_, scale) in zip(found, columns, strict=True)]
        rows.append([task, METHODS[method].title, *shown, str(len(good))])
    header = ["task", "method", "FP32", "fake-quantized", "six views", "seconds", "seeds"]
    return markdown_table(header, rows, words=2)


def trained_where(evidence: Evidence) -> str:
    """Say on what the networks of `experiments.accelerator` were trained, and which rows failed."""
    machines = sorted({record["accelerator"] or "a CPU" for record in evidence.trained})
    failed: dict[str, list[str]] = {}
    for record in evidence.trained:
        if record["status"] != "ok":
            row = f"{record['task']} {record['method']} {record['seed']}"
            failed.setdefault(f"{record['status']} ({record['reason']})", []).append(row)
    said = [f"Trained on {', '.join(machines)}."]
    return " ".join([*said, *(f"Not trained, {why}: {', '.join(rows)}." for why, rows in failed.items())])


def _changes(record: Mapping) -> str:
    """Describe how the training of a record differs from that of its task."""
    own = {name: value for name, value in record["changes"].items() if name not in ("seed", "learning_rate")}
    text = ", ".join(f"{name} {value}" for name, value in own.items()) or "the task's own"
    if record["start"] or record["network"]:
        text += f"; from {record['start'] or record['network']}"
    if record["export"] != "plain":
        text += f"; export {record['export']}"
    return text


def search(evidence: Evidence) -> str:
    """Tabulate every trial: accuracies on the validation split, and the criterion that chose the rate.

    Of many deployments only FP32 is shown beside the criterion.
    """
    shown = ("fp32", "int4w-pt-minmax", "int4w-pc-minmax")
    keys = [*(key for key in shown if all(key in trial for trial in evidence.search)), "criterion"]
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
    """Say how many rows there are, how long they took, with which program, and on which machine."""
    hours = fsum(record["seconds"] for record in (*evidence.training, *evidence.search)) / 3600
    found = {
        "commit": sorted({_commit(record) for record in evidence.training}),
        "on": sorted({f"{r['cpu']['model']} ({r['device']})" for r in evidence.training}),
        "with": sorted({f"{name} {v}" for r in evidence.training for name, v in r["versions"].items()}),
    }
    listed = "; ".join(f"{key} {', '.join(values)}" for key, values in found.items())
    searched = f" and {len(evidence.search)} trials of the search" if evidence.search else ""
    return f"{len(evidence.training)} rows{searched}, {hours:.1f} hours of one core or device; {listed}."


def _commit(record: Mapping) -> str:
    """Shorten a commit, but keep its mark of changed files."""
    name, dash, dirty = str(record["commit"]).partition("-")
    return name[:12] + dash + dirty


def by_deployment(evidence: Evidence, task: str, key: str, scale: float, digits: int) -> str:
    """Tabulate a metric at every deployment, with one column per method of the main table.

    Where nothing was measured, the table has the status of the deployment.
    """
    methods = evidence.methods(task)
    rows = []
    for deployment in evidence.deployments(task, methods):
        shown = []
        for method in methods:
            found = evidence.metric(task, method, deployment, key)
            failed = {r["status"] for r in evidence.seeds(task, method, deployment).values()} - {"ok"}
            missing = ", ".join(sorted(failed)) or ABSENT
            shown.append(written(interval(found.values()), scale, digits) if found else missing)
        rows.append([*map(escaped, deployment), _images(evidence, task, methods, deployment), *shown])
    header = ["backend", "scheme", "runtime", "n", *(METHODS[method].title for method in methods)]
    return markdown_table(header, rows, words=3)


def _images(evidence: Evidence, task: str, methods: Sequence[str], deployment: Row) -> str:
    """Return the numbers of test images at a deployment."""
    found = {r["n"] for m in methods for r in evidence.seeds(task, m, deployment).values() if r.get("n")}
    return ", ".join(map(str, sorted(found))) or ABSENT


def gain_by_deployment(evidence: Evidence, task: str) -> str:
    """Tabulate points of accuracy over float training at every deployment, paired by seed."""
    methods = [method for method in evidence.methods(task) if method != FLOAT]
    rows = []
    for deployment in evidence.deployments(task, evidence.methods(task)):
        behind = evidence.accuracy(task, FLOAT, deployment)
        gained = [paired(evidence.accuracy(task, m, deployment), behind) for m in methods]
        rows.append([*map(escaped, deployment), *(written(gain, 100, signed=True) for gain in gained)])
    header = ["backend", "scheme", "runtime", *(METHODS[m].title for m in methods)]
    return markdown_table(header, rows, words=3)


def edge(evidence: Evidence, task: str) -> str | None:
    """Tabulate speed, energy, cost and size at every deployment that has any; the latency of three methods.

    The table is None if no deployment has any.
    """
    methods = [m for m in (FLOAT, PUBLISHED, RECOMMENDED) if m in evidence.methods(task)]
    rows = []
    for deployment in evidence.deployments(task, methods):
        shown = []
        for key, (_, scale, digits) in EDGE.items():
            for method in methods if key == "latency_ms_p50" else methods[-1:]:
                found = evidence.metric(task, method, deployment, key)
                shown.append(written(interval(found.values()), scale, digits))
        if any(text != ABSENT for text in shown[: len(methods)]):
            rows.append([*map(escaped, deployment), *shown])
    if not rows:
        return None
    header = ["backend", "scheme", "runtime"]
    for key, (title, _, _) in EDGE.items():
        header += [f"{title}, {METHODS[m].title}" for m in methods] if key == "latency_ms_p50" else [title]
    return markdown_table(header, rows, words=3)


def by_layer(evidence: Evidence, task: str, scheme: str) -> str:
    """Tabulate `layer_sqnr` with one row per layer and one column per method, as means over seeds.

    The last row is the mean of all layers.
    """
    found = layer_sqnr(evidence, task, scheme)
    layers = list(dict.fromkeys(layer for mine in found.values() for layer in mine))
    rows = [[escaped(layer), *(_mean(mine.get(layer, [])) for mine in found.values())] for layer in layers]
    every = ([x for seeds in mine.values() for x in seeds] for mine in found.values())
    rows.append(["**mean of layers**", *map(_mean, every)])
    return markdown_table(["layer", *(METHODS[method].title for method in found)], rows)


def layer_sqnr(evidence: Evidence, task: str, scheme: str) -> dict[str, dict[str, list[float]]]:
    """Return the SQNR in dB of every layer's output: method -> layer -> one value per seed.

    Only seeds that all of these methods have count, because means over different seeds cannot be compared.
    Layers without a value are left out.

    Args:
      evidence: The records.
      task: The task.
      scheme: Scheme of onnxruntime, one of those in structure.jsonl.
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
    """Tell whether a method is compared layer by layer."""
    return method == FLOAT or bool(set(LAYER_TABLES) & set(METHODS[method].tables))


def _mean(decibels: list[float]) -> str:
    return f"{fmean(decibels):.1f}" if decibels else ABSENT
