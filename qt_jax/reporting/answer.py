"""Answer in three sentences what deployment costs, where it breaks, and what to do about it.

The sentences follow from records by fixed rules:

- The first two say what INT8 and INT4 cost on a typical toolchain, which is the median of all rows, and in
  the worst row. Rows are those of vendors. Emulated conventions speak only where there is no vendor's row.
- The third names the worst row and the cure. A row suffers if it loses more than `NOTICED` and more than the
  noise of the test images, and breaks if it loses more than `BROKEN`. If one thing separates the rows that
  suffer from all others (the network, the kind of scales, the calibration, the toolchain), that is what to
  change. Otherwise 8 bits are the cure for 4, and layers in float the cure for 8.
- Without labels the same is said in SQNR, with the words of `CLOSENESS`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from qt_jax.records import Record
from qt_jax.reporting.pivot import (
    METHOD_TITLES,
    Column,
    DeploymentTable,
    Metric,
    Row,
    Seeds,
    arrange,
    ended_well,
    harm,
    images,
    is_convention,
    pairs,
    precision,
    statuses,
)
from qt_jax.reporting.statistics import noise_of_drop
from qt_jax.reporting.tables import MINUS, marked

CLOSENESS = (
    (30.0, "as good as float for most tasks"),
    (20.0, "to be checked on the task"),
    (15.0, "likely to cost accuracy"),
    (-math.inf, "likely broken"),
)
"""SQNR in dB from which on outputs are what the words say, as rules of thumb: the task decides."""

NOTICED, BROKEN = 0.01, 0.05
"""Loss above which a row suffers, and above which it breaks. It is a fraction of the float model's
value if the metric is no fraction itself."""

ROUNDING = 1e-9
"""Part of a loss that may come from subtracting fractions."""

NOTICED_SQNR, BROKEN_SQNR = 20.0, 15.0
"""SQNR in dB below which a row suffers, and below which it breaks, where there are no labels."""

DIAGNOSE = "leave the layers in float that the diagnosis names (python -m qt_jax.diagnosis, --float-layers)"
"""What to do where nothing simpler helps."""


FAR = 10.0
"""SQNR in dB below which a row is named even if no decision has changed."""


class RowHarm(NamedTuple):
    """Hold what one row did to one network.

    Attributes:
      column, row: Network and row.
      seeds: Their records.
      harm: As `qt_jax.reporting.pivot.harm` says.
    """

    column: Column
    row: Row
    seeds: Seeds
    harm: float

    def first(self, key: str) -> Any:
        """Return the value under `key` of the first record."""
        return next(iter(self.seeds.values())).get(key)


def answer(records: Sequence[Record]) -> list[str]:
    """Return three sentences: what INT8 costs, what INT4 costs, and where it breaks and what to do.

    Raises:
      InvalidInput: The records cannot be arranged, as `qt_jax.reporting.pivot.arrange` says.

    >>> record = {"backend": "b", "scheme": "s", "status": "ok", "top1": 0.7, "reference_top1": 0.71}
    >>> answer([record | {"weight_bits": 8, "activation_bits": 8}])[0]
    'At INT8 the network loses 1.0 points of top-1 in the only row (b s).'
    """
    deployment = arrange(records)
    advice = _advice(deployment)
    if any(record.get("warnings") for record in records):
        advice = f"Read the warnings first, which put these figures in doubt: {advice}"
    return [_cost(deployment, "INT8"), _cost(deployment, "INT4"), advice]


def warnings_of(records: Iterable[Record], key: str = "warnings") -> list[str]:
    """Return the warnings about models and data that the records hold, each once, or with `key` the "notes".

    Where there are several networks, a warning that not all of them share begins with the network's name.

    >>> warnings_of([{"backend": "b", "scheme": "s", "status": "ok", "warnings": ["At chance."]}])
    ['At chance.']
    """
    records = list(records)
    if not any(record.get(key) for record in records):
        return []
    deployment = arrange(records)
    owners: dict[str, dict[str, None]] = {}
    for column in deployment.columns:
        for record in deployment.records([column]):
            for text in record.get(key) or ():
                owners.setdefault(text, {}).setdefault(deployment.name(column))
    everyone = len(deployment.columns)
    return [
        text if len(names) == everyone else f"{', '.join(names)}: {text}" for text, names in owners.items()
    ]


def closeness(sqnr_db: float) -> str:
    """Return what an SQNR means, in words.

    >>> closeness(28.0)
    'to be checked on the task'
    """
    return next(words for least, words in CLOSENESS if sqnr_db >= least)


def _shared_metric(deployment: DeploymentTable) -> Metric | None:
    """Return the metric of all networks; None, which stands for SQNR, if they differ."""
    found = list(deployment.by_metric())
    return found[0] if len(found) == 1 else None


def _cases(deployment: DeploymentTable, name: str, columns: Iterable[Column] | None = None) -> list[RowHarm]:
    """Return the rows of one precision, the worst last: those of vendors, or else emulated conventions."""
    metric = _shared_metric(deployment)
    chosen = deployment.columns if columns is None else columns
    found = [
        RowHarm(column, row, seeds, value)
        for column in chosen
        for row, seeds in deployment.cells[column].items()
        if precision(seeds) == name and (value := harm(seeds, metric)) is not None
    ]
    vendors = [case for case in found if not is_convention(case.seeds)]
    return sorted(vendors or found, key=lambda case: case.harm)


def _cost(deployment: DeploymentTable, name: str) -> str:
    """Say what one precision costs."""
    cases = _cases(deployment, name)
    if not cases:
        return _absence(deployment, name)
    columns = list(dict.fromkeys(case.column for case in cases))
    if len(columns) == 2:
        pair = next((pair for pair in pairs(deployment) if set(pair) == set(columns)), columns)
        first, second = (_cases(deployment, name, [column]) for column in pair)
        text = (
            f"{_subject(deployment, first)} {_range(deployment, first)}, {_subject(deployment, second)} "
            f"{_range(deployment, second, again=True)}{_contest(deployment, first, second)}"
        )
    else:
        text = f"{_subject(deployment, cases)} {_range(deployment, cases)}"
    return f"At {name}{_conventions(cases)}{_float_layers(cases)} {text}."


def _subject(deployment: DeploymentTable, cases: Sequence[RowHarm]) -> str:
    """Name what the sentence is about: networks, or without a common metric their outputs."""
    columns = {case.column for case in cases}
    outputs = _shared_metric(deployment) is None
    if len(columns) > 1:
        return "the outputs of all networks" if outputs else "any network"
    if len(deployment.columns) == 1:
        return "the outputs" if outputs else "the network"
    name = _name(deployment, cases[0].column)
    return f"the outputs of {name}" if outputs else name


def _name(deployment: DeploymentTable, column: Column) -> str:
    name = deployment.name(column)
    return f"the {name}" if name == METHOD_TITLES["float"] else name


def _contest(deployment: DeploymentTable, ahead: Sequence[RowHarm], behind: Sequence[RowHarm]) -> str:
    """Count in how many rows that both have the first network loses less, and where the other wins most.

    The text is empty for networks of different tasks.
    """
    first, second = ({case.row: case.harm for case in cases} for cases in (ahead, behind))
    both = [row for row in first if row in second]
    if not both or ahead[0].column[:2] != behind[0].column[:2]:
        return ""
    less = sum(first[row] < second[row] for row in both)
    one, other = (_name(deployment, cases[0].column) for cases in (ahead, behind))
    verb, more = "loses less than", "more"
    if _shared_metric(deployment) is None:
        verb, more = "stays closer to float than", "less close"
    lost = [case for case in ahead if case.harm > second.get(case.row, math.inf)]
    lead = max(lost, key=lambda case: case.harm - second[case.row], default=None)
    contrary = "" if lead is None else f", and {more} in {len(lost)}, most so in {_place(deployment, lead)}"
    return f"; {one} {verb} {other} in {_part(less, len(both))}{contrary}"


def _conventions(cases: Sequence[RowHarm]) -> str:
    return " (emulated conventions, no vendor's toolchain)" if is_convention(cases[-1].seeds) else ""


def _float_layers(cases: Sequence[RowHarm]) -> str:
    names = {layer for case in cases for r in case.seeds.values() for layer in r.get("float_layers") or ()}
    return f", with {len(names)} node{'s' * (len(names) > 1)} left in float," if names else ""


def _range(deployment: DeploymentTable, cases: Sequence[RowHarm], again: bool = False) -> str:
    """Say what the typical and the worst of some rows lose.

    Args:
      deployment: Table that holds the rows.
      cases: The rows, the worst last.
      again: Leave out the words that the sentence has already said of another network.
    """
    metric = _shared_metric(deployment)
    if metric is None:
        return _kept(deployment, cases)
    worst = cases[-1]
    where = _place(deployment, worst)
    if _within_noise(deployment, worst):
        where += f"; within the noise of {', '.join(map(str, images(worst.seeds)))} images"
    value = worst.first("reference_value")
    if not metric.fraction and isinstance(value, int | float):
        where += f"; in float it is {value:.{metric.digits}f}"
    numbers = [_number(metric, harm) for harm in (median(case.harm for case in cases), worst.harm)]
    if again and len(cases) > 1:
        return f"{numbers[0] or 'nothing'} and {numbers[1] or 'nothing'} ({where})"
    unit = f" points of {metric.title}" if metric.fraction else f" in {metric.title}"
    typical, last = (f"{number}{unit}" if number else "nothing" for number in numbers)
    if len(cases) == 1:
        return f"loses {last} in the only row ({where})"
    if numbers[1] is None:
        return f"loses nothing in any of {len(cases)} rows"
    last = numbers[1] if numbers[0] else last
    return f"loses {typical} on a typical toolchain and {last} on the worst of {len(cases)} rows ({where})"


def _kept(deployment: DeploymentTable, cases: Sequence[RowHarm]) -> str:
    """Say how close to float the typical and the worst of some rows stay."""
    worst, typical = -cases[-1].harm, -median(case.harm for case in cases)
    where = f"{_place(deployment, cases[-1])}; {_error(worst)}, {closeness(worst)}"
    if len(cases) == 1:
        return f"keep {_decibels(worst)} in the only row ({where})"
    return (
        f"keep {_decibels(typical)} on a typical toolchain ({_error(typical)}, {closeness(typical)}) and "
        f"{_decibels(worst)} on the worst of {len(cases)} rows ({where})"
    )


def _decibels(sqnr_db: float) -> str:
    if math.isinf(sqnr_db):
        return "every value"
    return f"{sqnr_db + 0:.1f} dB".replace("-", MINUS)


def _error(sqnr_db: float) -> str:
    """Say how large an error is beside the signal, as root mean squares."""
    percent = 100 * 10 ** (-sqnr_db / 20)
    if percent >= 100:
        return "errors as large as the signal"
    return f"errors of {percent:.{0 if percent >= 10 else 1 if percent >= 1 else 2}f} % of the signal"


def _place(deployment: DeploymentTable, case: RowHarm) -> str:
    """Name a row, and the network if the sentence is about more than two."""
    name = marked(deployment, case.column, case.row)
    return f"{name}, {deployment.name(case.column)}" if len(deployment.columns) > 2 else name


def _whole(deployment: DeploymentTable, case: RowHarm) -> str:
    """Name a row, and the network if there are several."""
    name = marked(deployment, case.column, case.row)
    return f"{name} of {_name(deployment, case.column)}" if len(deployment.columns) > 1 else name


def _number(metric: Metric, value: float) -> str | None:
    """Write a loss briefly; None for one that is nothing in the digits shown."""
    shown = metric.scale * value
    digits = (1 if shown >= 1 else 2) if metric.fraction else metric.digits
    return f"{shown:.{digits}f}" if round(shown, digits) > 0 else None


def _within_noise(deployment: DeploymentTable, case: RowHarm) -> bool:
    if _shared_metric(deployment) is None:
        return False
    bound = noise_of_drop(deployment, case.column, case.row)
    return bound is not None and case.harm <= bound


def _absence(deployment: DeploymentTable, name: str) -> str:
    """Say that a precision has no row with a number, and what became of those that were tried."""
    tried = [
        seeds
        for column in deployment.columns
        for seeds in deployment.cells[column].values()
        if precision({seed: record | {"products": None} for seed, record in seeds.items()}) == name
    ]
    unknown = f"What {name} costs is not known"
    if not tried:
        return f"{unknown}: no {name} row was run."
    succeeded = [record for seeds in tried for record in seeds.values() if ended_well(record)]
    if not succeeded:
        outcomes = Counter(outcome for seeds in tried for outcome in statuses(seeds))
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        return f"{unknown}: none of its rows ended well ({counts})."
    equal = [
        item["equal"]
        for record in succeeded
        for item in record.get("fidelity") or ()
        if item.get("equal") is not None
    ]
    if not equal:
        return f"{unknown}: its rows have neither a score nor an SQNR."
    return (
        f"At {name} the integer outputs equal those of the float model in {100 * min(equal):.1f} % of their "
        f"elements in the worst of {len(tried)} rows."
    )


def _badness(case: RowHarm) -> tuple[float, float]:
    """Order rows by what they lose, then by their noise."""
    return case.harm, -(case.first("sqnr_db") or 0.0)


def _farthest(groups: Iterable[Sequence[RowHarm]]) -> tuple[RowHarm, float] | None:
    """Return the row with the lowest SQNR, and the SQNR, if that is below `FAR` although labels are right."""
    found = [
        (case, record["sqnr_db"])
        for cases in groups
        for case in cases
        for record in case.seeds.values()
        if record.get("sqnr_db") is not None and record["sqnr_db"] < FAR
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def _advice(deployment: DeploymentTable) -> str:
    """Say where it breaks, and what to do."""
    by_name = {name: _cases(deployment, name) for name in ("INT8", "INT4")}
    measured = {name: cases for name, cases in by_name.items() if cases}
    if not measured:
        return "Where it breaks cannot be said: no INT8 or INT4 row has a score or an SQNR."
    bad = {name: [case for case in cases if _suffers(deployment, case)] for name, cases in measured.items()}
    name = next((name for name in measured if bad[name]), None)
    if name is None:
        worst = max((case for cases in measured.values() for case in cases), key=_badness)
        if (far := _farthest(measured.values())) is not None:
            return (
                f"No loss shows beyond the noise, but {_whole(deployment, far[0])} keeps only "
                f"{_decibels(far[1])} ({_error(far[1])}): look at it on more data before you ship it."
            )
        return (
            f"Nothing breaks at {' or '.join(measured)}, and there is nothing to do: the worst row is "
            f"{_whole(deployment, worst)}, with {_amount(deployment, worst)}."
        )
    good = [case for case in measured[name] if case not in bad[name]]
    where, cure = _cause(deployment, bad[name], good) or _no_cause(deployment, name, bad, good, measured)
    worst = bad[name][-1]
    verb = "breaks" if _suffers(deployment, worst, broken=True) else "suffers"
    if name == "INT8" and bad.get("INT4"):
        where += f", and at INT4 in {_part(len(bad['INT4']), len(measured['INT4']))}"
    return (
        f"It {verb} at {name} {where}, worst in {_whole(deployment, worst)}, "
        f"with {_amount(deployment, worst)}: {cure}."
    )


def _suffers(deployment: DeploymentTable, case: RowHarm, broken: bool = False) -> bool:
    """Tell whether a row loses enough to be named, or so much that it is broken."""
    metric = _shared_metric(deployment)
    if metric is None:
        return -case.harm < (BROKEN_SQNR if broken else NOTICED_SQNR)
    value = case.first("reference_value")
    whole = abs(value) if isinstance(value, int | float) and not metric.fraction else 1.0
    least = (BROKEN if broken else NOTICED) * whole
    return case.harm > least * (1 + ROUNDING) and not _within_noise(deployment, case)


def _amount(deployment: DeploymentTable, case: RowHarm) -> str:
    """Say what a row loses."""
    metric = _shared_metric(deployment)
    if metric is None:
        return f"{_decibels(-case.harm)} ({closeness(-case.harm)})"
    said = _number(metric, case.harm)
    if said is None:
        return "no loss"
    return f"{said} points lost" if metric.fraction else f"{metric.title} worse by {said}"


class Cause(NamedTuple):
    """Describe something that may decide whether a row suffers.

    Attributes:
      read: Returns what it is in a row; None where it cannot be a cause.
      where: Describes the rows in which it is a given value.
      cure: Says how to be as the first of some rows that do not suffer.
    """

    read: Callable[[RowHarm], Any]
    where: Callable[[Any], str]
    cure: Callable[[Sequence[RowHarm]], str]


def _factors(deployment: DeploymentTable) -> list[Cause]:
    """Return what may decide whether a row suffers, the simplest first."""

    def proof(case: RowHarm) -> str:
        return f"{_whole(deployment, case)}, with {_amount(deployment, case)}"

    def recalibrate(good: Sequence[RowHarm]) -> str:
        known = [case for case in good if _calibration(case)]
        return (
            f"calibrate by {_calibration(known[0])}, as in {proof(known[0])}"
            if known
            else f"take {proof(good[0])}"
        )

    return [
        Cause(
            lambda case: case.column,
            lambda column: f"for {_name(deployment, column)}",
            lambda good: f"take {proof(good[0])}",
        ),
        Cause(
            lambda case: None if case.first("per_channel") else "per-tensor",
            lambda scales: f"with {scales} scales",
            lambda good: f"take per-channel scales, as in {proof(good[0])}",
        ),
        Cause(_calibration, lambda method: f"with {method} calibration", recalibrate),
        Cause(
            lambda case: case.row.backend,
            lambda backend: f"on {backend}",
            lambda good: f"take another toolchain, such as {proof(good[0])}, or {DIAGNOSE}",
        ),
    ]


def _calibration(case: RowHarm) -> str | None:
    calibration = case.first("calibration")
    return calibration.get("method") if isinstance(calibration, dict) else None


def _cause(
    deployment: DeploymentTable, bad: Sequence[RowHarm], good: Sequence[RowHarm]
) -> tuple[str, str] | None:
    """Find the one thing that all rows that suffer share and no other row has.

    Returns:
      Where it breaks, and the cure; None if nothing separates the rows.
    """
    if not good:
        return None
    backends = {case.row.backend for case in bad}
    nearest = sorted(good, key=lambda case: (case.row.backend not in backends, _badness(case)))
    for factor in _factors(deployment):
        values = {factor.read(case) for case in bad}
        value = values.pop()
        if not values and value is not None and all(factor.read(case) != value for case in good):
            return f"{factor.where(value)} ({_part(len(bad), len(bad))} of this kind)", factor.cure(nearest)
    return None


def _part(count: int, total: int) -> str:
    """Say how many of some rows.

    >>> _part(1, 1), _part(2, 2), _part(1, 3)
    ('the only row', 'all 2 rows', '1 of 3 rows')
    """
    if count < total:
        return f"{count} of {total} rows"
    return "the only row" if total == 1 else f"all {total} rows"


def _no_cause(
    deployment: DeploymentTable,
    name: str,
    bad: dict[str, list[RowHarm]],
    good: Sequence[RowHarm],
    measured: dict[str, list[RowHarm]],
) -> tuple[str, str]:
    """Say in how many rows it breaks, and what helps in general."""
    count, total = len(bad[name]), len(measured[name])
    where = f"in {_part(count, total)}"
    backends = {case.row.backend for case in bad[name]}
    nearby = [case for case in good if case.row.backend in backends]
    if len(backends) == 1 and nearby and len(nearby) < len(good):
        where += f", {'all ' if count > 1 else ''}on {backends.pop()}"
        return where, f"take {_whole(deployment, nearby[0])} there, with {_amount(deployment, nearby[0])}"
    other = f"take {_whole(deployment, good[0])}, with {_amount(deployment, good[0])}" if good else ""
    eight = "stay at 8 bits" if name == "INT4" and measured.get("INT8") else ""
    return where, ", or ".join(filter(None, (eight, other, "" if eight else DIAGNOSE)))
