"""Write advice as snippets to paste into a training script, a command line, or a vendor's tool."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from textwrap import indent

from qt_jax.diagnosis.layers import TAIL, layers_of
from qt_jax.diagnosis.remedies import ClipKernel, Deployment, Remedy
from qt_jax.diagnosis.simulation import FLOAT, Precision


def config(before: Deployment, after: Deployment) -> str:
    """Write a `qt.QuantConfig` as source.

    Its defaults are what most layers have after the advice. Each other layer gets a rule. An input range that
    the advice moved becomes `quantile=1.0`, so that in training it spans all values.
    """
    usual = _usual(after)
    listed = [
        _rule(path, precision, moved)
        for path, (precision, moved) in _by_path(before, after).items()
        if precision != usual or moved
    ]
    rules = "rules=(\n" + "".join(indent(rule, "    ") + ",\n" for rule in listed) + "),\n" if listed else ""
    defaults = f"weights={_weights(usual)},\nactivations={_inputs(usual)},\n"
    return f"config = qt.QuantConfig(\n{indent(defaults + rules, '    ')})"


def training(before: Deployment, after: Deployment, remedies: Iterable[Remedy]) -> str:
    """Write Python for the training script; empty where no advice concerns training."""
    parts = []
    if after.precisions != before.precisions or after.bounds != before.bounds:
        parts.append(config(before, after))
    if any(isinstance(remedy, ClipKernel) for remedy in remedies):
        parts.append(f"optimizer = optax.chain(optimizer, qt.reverse_pruning(quantile={TAIL}, every=50))")
    return "\n".join(parts)


def flags(before: Deployment, after: Deployment) -> str:
    """Write flags of `experiments.cifar` for the bits of weights; empty where no layer differs."""
    usual = _usual(after)
    found = []
    for path, (precision, _) in _by_path(before, after).items():
        if precision.weights != usual.weights:
            found.append(f"{path}={'skip' if precision == FLOAT else precision.weights}")
    channels = " --per-channel" if usual.per_channel else ""
    return f"--bits {usual.weights}{channels} --rules {' '.join(found)}" if found else ""


def vendors(before: Deployment, after: Deployment) -> str:
    """Write what keeps the layers that need more bits in floating point, in tools with no other choice."""
    names = [
        name for name, precision in after.precisions.items() if _wider(precision, before.precisions[name])
    ]
    if not names:
        return ""
    listed = ", ".join(map(json.dumps, names))
    return (
        f"nodes_to_exclude = [{listed}]  # onnxruntime: quantize_static(...)\n"
        f"ignored_scope = nncf.IgnoredScope(names=[{listed}])  # OpenVINO: nncf.quantize(...)"
    )


def _usual(deployment: Deployment) -> Precision:
    """Return the precision that most layers on integers have."""
    count = Counter(precision for precision in deployment.precisions.values() if precision != FLOAT)
    return count.most_common(1)[0][0] if count else Precision(8, 8)


def _by_path(before: Deployment, after: Deployment) -> dict[str, tuple[Precision, bool]]:
    """Return, by Flax path, the precision after the advice and whether the input range has moved.

    A module that is called several times counts by its first layer. A layer without a Flax path is listed by
    the name of its node.
    """
    found: dict[str, tuple[Precision, bool]] = {}
    for name, layer in layers_of(after.model).items():
        kernel = layer.kernel.partition("#")[0]
        path = kernel.removesuffix("/kernel") if kernel.endswith("/kernel") else name
        moved = after.bounds.get(name) != before.bounds.get(name)
        found.setdefault(path, (after.precisions.get(name, FLOAT), moved))
    return found


def _rule(path: str, precision: Precision, moved: bool) -> str:
    pattern = json.dumps(re.escape(path))
    if precision == FLOAT:
        return f"qt.Rule({pattern}, skip=True)"
    settings = f"{pattern},\nweights={_weights(precision)},\ninputs={_inputs(precision, moved)},\n"
    return f"qt.Rule(\n{indent(settings, '    ')})"


def _weights(precision: Precision) -> str:
    return f"qt.QuantSpec(bits={precision.weights}{', axis=-1' if precision.per_channel else ''})"


def _inputs(precision: Precision, moved: bool = False) -> str:
    return f"qt.QuantSpec(bits={precision.inputs}, symmetric=False{', quantile=1.0' if moved else ''})"


def _wider(one: Precision, other: Precision) -> bool:
    """Tell whether `one` has more bits than `other`, for the weights or the input."""
    pairs = ((one.weights, other.weights), (one.inputs, other.inputs))
    return any(a != b and (a is None or (b is not None and a > b)) for a, b in pairs)
