"""The methods of the study: a file a method, named as in records, with underscores for dashes."""

import importlib
import pkgutil

from experiments.configs.method import Method

ORDER = (
    *("float", "qat", "qat-delayed", "qat-w4", "qat-w4-folded", "lsq-w4", "pact-w4", "qwix-w4"),
    *("quant-trim", "recommended"),
    *("no-reverse-pruning", "reverse-pruning-only"),
    *("linear", "cosine", "quartic-only", "step"),
    *("p-clip-90", "p-clip-99", "p-clip-999"),
    *("weight-quantile-99", "weight-quantile-100"),
    *("output-sites", "per-channel"),
    *("lsq", "pact", "qwix", "w4a8", "w4a4"),
    *("folded", "folded-spread", "recommended-raw", "recommended-plateau"),
    *("recommended-unpruned", "recommended-running", "recommended-clipped"),
    *("recommended-w4", "recommended-one-grid"),
    "recommended-fused",
    *("fine-tuned", "clips", "batch-norm", "recommended-clips"),
)
"""Of rows in tables; a file that is not named here comes last."""


def _collected() -> dict[str, Method]:
    found = {
        module.name.replace("_", "-"): importlib.import_module(f"{__name__}.{module.name}").METHOD
        for module in pkgutil.iter_modules(__path__)
    }
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return ORDER.index(name) if name in ORDER else len(ORDER), name


METHODS: dict[str, Method] = _collected()
"""Name -> method, in the order of tables."""
