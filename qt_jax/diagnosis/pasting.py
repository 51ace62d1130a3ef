"""Advice as lines to paste: into a training script, a command line, a vendor's tool."""

from collections.abc import Iterable
from textwrap import indent

from qt_jax.diagnosis.remedies import ClipKernel, Deployment, Remedy
from qt_jax.diagnosis.simulation import FLOAT, Precision


def rules(before: Deployment, after: Deployment) -> list[str]:
    """A `qt.Rule` for each layer whose bits or range differ, as source text.

    A range that reaches further is `quantile=1.0`: in training the range then spans all values.
    """
    found = []
    for name, precision in after.precisions.items():
        moved = after.bounds.get(name) != before.bounds.get(name)
        if precision != before.precisions[name] or moved:
            found.append(_rule(name, precision, moved))
    return found


def listed_rules(before: Deployment, after: Deployment) -> str:
    """Source text that sets `rules` to all of them."""
    return "rules=(\n" + "".join(indent(rule, "    ") + ",\n" for rule in rules(before, after)) + "),"


def _rule(name: str, precision: Precision, moved: bool) -> str:
    if precision == FLOAT:
        return f'qt.Rule("{name}", skip=True)'
    weights = f"qt.QuantSpec(bits={precision.weights}{', axis=-1' if precision.per_channel else ''})"
    quantile = ", quantile=1.0" if moved else ""
    inputs = f"qt.QuantSpec(bits={precision.inputs}, symmetric=False{quantile})"
    return f'qt.Rule(\n    "{name}",\n    weights={weights},\n    inputs={inputs},\n)'


def training(before: Deployment, after: Deployment, remedies: Iterable[Remedy]) -> str:
    """Python for the training script; empty where no advice is about training.

    Args:
      before, after: without and with the advice.
      remedies: those advised.
    """
    parts = []
    if rules(before, after):
        parts.append(
            f"config = qt.QuantConfig(\n    {indent(listed_rules(before, after), '    ').strip()}\n)"
        )
    if any(isinstance(remedy, ClipKernel) for remedy in remedies):
        parts.append("optimizer = optax.chain(optimizer, qt.reverse_pruning(quantile=0.95, every=50))")
    return "\n".join(parts)


def flags(before: Deployment, after: Deployment) -> str:
    """Flags of `experiments.cifar` for the weights; empty where none differ."""
    found = []
    for name, precision in after.precisions.items():
        if precision.weights != before.precisions[name].weights:
            found.append(f"{name}={'skip' if precision == FLOAT else precision.weights}")
    return f"--rules {' '.join(found)}" if found else ""


def vendors(before: Deployment, after: Deployment) -> str:
    """What keeps the layers that need more bits in floating point in tools that know no other way."""
    names = [
        name for name, precision in after.precisions.items() if _wider(precision, before.precisions[name])
    ]
    if not names:
        return ""
    listed = ", ".join(f'"{name}"' for name in names)
    return (
        f"nodes_to_exclude = [{listed}]  # onnxruntime: quantize_static(...)\n"
        f"ignored_scope = nncf.IgnoredScope(names=[{listed}])  # OpenVINO: nncf.quantize(...)"
    )


def _wider(one: Precision, other: Precision) -> bool:
    """Whether `one` has more bits than `other`, at the weights or the input."""
    pairs = ((one.weights, other.weights), (one.inputs, other.inputs))
    return any(a != b and (a is None or (b is not None and a > b)) for a, b in pairs)
