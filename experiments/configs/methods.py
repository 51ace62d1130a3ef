"""The methods of the study: what each changes in a task's base config, which holds the published recipe.

`python -m experiments.paper --methods NAME ...` trains and deploys single ones. What each takes and scores is
in methods.md beside the tables of the study.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import qt_jax as qt
from experiments.configs.training import Config

BASELINES = "main"
"""The table of the methods that are compared with each other; its rows go through the most backends."""

Export = Literal["plain", "clips", "batch-norm"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the study.

    Attributes:
      title: its name in tables and figures.
      about: what it is, and its source.
      tables: those it is a row of: "main", or ablations such as "schedule".
      changes: fields of `Config` and their values.
      scales: fields of `Config` and what the task's value is multiplied by; counts are rounded, at least 1.
      start: the method whose trained network of the same task and seed training starts from.
      network: the method whose trained network of the same task and seed is deployed, instead of a new one.
      export: plain; clips: learned ranges as Clip nodes; batch-norm: its statistics estimated again on the
        float graph.
      rate: the method whose searched learning rate this one takes; None: its own.
    """

    title: str
    about: str = ""
    tables: tuple[str, ...] = (BASELINES,)
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: str | None = None
    network: str | None = None
    export: Export = "plain"
    rate: str | None = None

    @property
    def needs(self) -> str | None:
        """The method that must be trained before this one."""
        return self.start or self.network


def config_of(method: Method, base: Config, seed: int, factor: float = 1.0) -> Config:
    """The config of `method` on a task.

    Args:
      base: the task's, which is that of the published recipe.
      seed: of the run.
      factor: of the learning rate, from the search.

    Raises:
      InvalidInput: a change that is no field of `Config`, or a value that `Config` refuses.

    >>> config_of(Method("half", scales={"epochs": 0.5}), Config(epochs=10), seed=3).epochs
    5
    """
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted({*method.changes, *method.scales} - known):
        raise qt.InvalidInput(
            f"the method {method.title!r} changes {', '.join(unknown)}, which Config has not: choose among "
            f"{', '.join(sorted(known))}"
        )
    values = {**method.changes, "seed": seed}
    for name, scale in {"learning_rate": 1.0, **method.scales}.items():
        value = values.get(name, getattr(base, name)) * scale
        values[name] = max(1, round(value)) if isinstance(getattr(base, name), int) else value
    values["learning_rate"] *= factor
    return dataclasses.replace(base, **values)


RECOMMENDED: Mapping[str, Any] = {
    "folded": True,
    "activation_quantile": 1.0,
    "reverse_pruning": 0.97,
    "reverse_pruning_folded": True,
    "reverse_pruning_spread": 0.13,
    "reestimate": 10_000,
}
"""What the recommended recipe changes in the published one."""

METHODS: dict[str, Method] = {
    # The methods that are compared with each other.
    "float": Method(
        "float + PTQ",
        about="Float training; the vendor quantizes afterwards (PTQ): what most practitioners do.",
        changes={"sched": "none", "reverse_pruning": None},
    ),
    "qat": Method(
        "plain QAT W8A8",
        about=(
            "Plain quantization-aware training: lambda = 1 throughout, W8A8, no reverse pruning. The "
            "straight-through training of Jacob et al. 2018, arXiv 1712.05877, on raw kernels and "
            "with this package's ranges (quantiles, moving averages); `qat-w4-folded` folds batch "
            "norm and takes extremes, as they do."
        ),
        tables=("main", "bits"),
        changes={"sched": "constant", "reverse_pruning": None},
    ),
    "qat-delayed": Method(
        "QAT, delayed start",
        about=(
            "Quantization-aware training with a delayed start: lambda jumps from 0 to 1 after the "
            "warm-up. Source: the quantization delay of Jacob et al. 2018, arXiv 1712.05877, section "
            "3.1."
        ),
        changes={"sched": "step", "reverse_pruning": None},
    ),
    "qat-w4": Method(
        "plain QAT W4A8",
        about=(
            "Plain quantization-aware training for 4-bit weights: lambda = 1 throughout, W4A8, no "
            "reverse pruning. As `qat`, with the grid on which compilers lose most; batch norm is "
            "measured anew in the float network, as in the recommended recipe, so that this is no "
            "difference between them."
        ),
        tables=("main", "bits"),
        changes={"sched": "constant", "reverse_pruning": None, "bits": 4, "reestimate": 10_000},
    ),
    "qat-w4-folded": Method(
        "plain QAT W4A8, folded",
        about=(
            "Plain quantization-aware training on folded kernels: lambda = 1 throughout, W4A8, ranges "
            "from extremes. The straight-through training of Jacob et al. 2018, arXiv 1712.05877, "
            "with batch norm folded by its running statistics; batch norm is measured anew in the "
            "float network, as in the recommended recipe."
        ),
        tables=("main", "points"),
        changes={
            "sched": "constant",
            "reverse_pruning": None,
            "bits": 4,
            "folded": True,
            "weight_quantile": 1.0,
            "activation_quantile": 1.0,
            "reestimate": 10_000,
        },
    ),
    "lsq-w4": Method(
        "LSQ W4A8",
        about=(
            "LSQ for 4-bit weights and 8-bit activations: learned step sizes. As `lsq`, with the grid "
            "on which compilers lose most; batch norm is measured anew in the float network, as in "
            "the recommended recipe, so that this is no difference between them."
        ),
        tables=("main", "bits"),
        changes={
            "quantizer": "lsq",
            "sched": "constant",
            "reverse_pruning": None,
            "bits": 4,
            "reestimate": 10_000,
        },
    ),
    "pact-w4": Method(
        "PACT W4A8",
        about=(
            "PACT for 4-bit weights and 8-bit activations: learned clips. As `pact`, with the grid on "
            "which compilers lose most; batch norm is measured anew in the float network, as in the "
            "recommended recipe, so that this is no difference between them."
        ),
        tables=("main", "bits"),
        changes={
            "quantizer": "pact",
            "sched": "constant",
            "reverse_pruning": None,
            "bits": 4,
            "reestimate": 10_000,
        },
    ),
    "qwix-w4": Method(
        "Qwix QAT W4A8",
        about=(
            "Qwix for 4-bit weights and 8-bit activations. As `qwix`, with the grid on which "
            "compilers lose most; batch norm is measured anew in the float network, as in the "
            "recommended recipe, so that this is no difference between them."
        ),
        tables=("main", "bits"),
        changes={
            "quantizer": "qwix",
            "sched": "constant",
            "reverse_pruning": None,
            "per_channel": True,
            "bits": 4,
            "reestimate": 10_000,
        },
    ),
    # Quant-Trim as published, and as this project recommends it.
    "quant-trim": Method(
        "Quant-Trim (published)",
        about=(
            "Quant-Trim as published: the three-phase lambda, reverse pruning at 0.95, W8A8, input "
            "sites. Source: arXiv 2511.15300. The base of every task holds this recipe, so that "
            "nothing is changed here."
        ),
        tables=(
            *("main", "reverse-pruning", "schedule", "p-clip", "weight-quantile", "points", "bits", "start"),
            "export",
        ),
    ),
    "recommended": Method(
        "Quant-Trim, recommended",
        about=(
            "The recipe that this project recommends: Quant-Trim where vendors quantize. As "
            "published, but: grids and reverse pruning on the folded kernel; its quantile 0.97, its "
            "bounds spread over one step of INT4 so that no plateau of weights meets the end of a "
            "vendor's grid; activation ranges from the extremes of the sample; batch norm measured "
            "anew in the float network. Chosen on the validation split of CIFAR-10 in some forty "
            'single runs of fast8 (exploration.jsonl); the ablations "points" take its parts away one '
            "by one."
        ),
        tables=("main", "bits", "points", "start", "export"),
        changes=RECOMMENDED,
    ),
    # The published recipe without one of its halves.
    "no-reverse-pruning": Method(
        "no reverse pruning",
        about="Quant-Trim without reverse pruning.",
        tables=("reverse-pruning",),
        changes={"reverse_pruning": None},
        rate="quant-trim",
    ),
    "reverse-pruning-only": Method(
        "reverse pruning alone",
        about="Reverse pruning alone: no fake quantization at any time.",
        tables=("reverse-pruning",),
        changes={"sched": "none"},
        rate="quant-trim",
    ),
    # Other schedules of lambda.
    "linear": Method(
        "linear ramp",
        about="Quant-Trim with another schedule of lambda: linear ramp.",
        tables=("schedule",),
        changes={"sched": "linear"},
        rate="quant-trim",
    ),
    "cosine": Method(
        "cosine ramp",
        about="Quant-Trim with another schedule of lambda: cosine ramp.",
        tables=("schedule",),
        changes={"sched": "cosine"},
        rate="quant-trim",
    ),
    "quartic-only": Method(
        "quartic ramp only",
        about="Quant-Trim with another schedule of lambda: quartic ramp only.",
        tables=("schedule",),
        changes={"sched": "quartic-only"},
        rate="quant-trim",
    ),
    "step": Method(
        "step",
        about="Quant-Trim with another schedule of lambda: step.",
        tables=("schedule",),
        changes={"sched": "step"},
        rate="quant-trim",
    ),
    # Other quantiles of reverse pruning.
    "p-clip-90": Method(
        "p_clip 0.9",
        about="Quant-Trim with reverse pruning at the quantile 0.9 instead of 0.95.",
        tables=("p-clip",),
        changes={"reverse_pruning": 0.9},
        rate="quant-trim",
    ),
    "p-clip-99": Method(
        "p_clip 0.99",
        about="Quant-Trim with reverse pruning at the quantile 0.99 instead of 0.95.",
        tables=("p-clip",),
        changes={"reverse_pruning": 0.99},
        rate="quant-trim",
    ),
    "p-clip-999": Method(
        "p_clip 0.999",
        about="Quant-Trim with reverse pruning at the quantile 0.999 instead of 0.95.",
        tables=("p-clip",),
        changes={"reverse_pruning": 0.999},
        rate="quant-trim",
    ),
    # Other quantiles of weight scales.
    "weight-quantile-99": Method(
        "weight quantile 0.99",
        about=("Quant-Trim with weight scales from the quantile 0.99 of |w| instead of the quantile 0.999."),
        tables=("weight-quantile",),
        changes={"weight_quantile": 0.99},
        rate="quant-trim",
    ),
    "weight-quantile-100": Method(
        "weight quantile 1.0",
        about="Quant-Trim with weight scales from the maximum of |w| instead of the quantile 0.999.",
        tables=("weight-quantile",),
        changes={"weight_quantile": 1.0},
        rate="quant-trim",
    ),
    # Other quantization points.
    "output-sites": Method(
        "output sites",
        about=(
            "Quant-Trim with activations fake-quantized at the outputs of layers instead of their inputs."
        ),
        tables=("points",),
        changes={"sites": "outputs"},
        rate="quant-trim",
    ),
    "per-channel": Method(
        "per-channel weights",
        about="Quant-Trim with one weight scale an output channel in training.",
        tables=("points",),
        changes={"per_channel": True},
        rate="quant-trim",
    ),
    # The other bit widths.
    "lsq": Method(
        "LSQ W8A8",
        about=(
            "LSQ: the step sizes of weights and activations are learned by gradient. Source: Esser et "
            'al. 2020, "Learned step size quantization", arXiv 1902.08153.'
        ),
        tables=("bits",),
        changes={"quantizer": "lsq", "sched": "constant", "reverse_pruning": None},
        rate="lsq-w4",
    ),
    "pact": Method(
        "PACT W8A8",
        about=(
            "PACT: the clipping level of every activation is learned, with an L2 penalty on it. "
            'Source: Choi et al. 2018, "PACT: parameterized clipping activation", arXiv 1805.06085.'
        ),
        tables=("bits",),
        changes={"quantizer": "pact", "sched": "constant", "reverse_pruning": None},
        rate="pact-w4",
    ),
    "qwix": Method(
        "Qwix QAT W8A8",
        about=(
            "Qwix: the peer's quantization-aware training for JAX, exported through our converter. "
            "Source: Qwix, https://github.com/google/qwix."
        ),
        tables=("bits",),
        changes={"quantizer": "qwix", "sched": "constant", "reverse_pruning": None, "per_channel": True},
        rate="qwix-w4",
    ),
    "w4a8": Method(
        "trained W4A8",
        about="Quant-Trim trained for 4-bit weights and 8-bit activations.",
        tables=("bits",),
        changes={"bits": 4},
        rate="quant-trim",
    ),
    "w4a4": Method(
        "trained W4A4",
        about="Quant-Trim trained for 4-bit weights and 4-bit activations.",
        tables=("bits",),
        changes={"bits": 4, "activation_bits": 4},
        rate="quant-trim",
    ),
    # Folded kernels, and the recommended recipe with one part changed.
    "folded": Method(
        "published, folded kernels",
        about=(
            "The published recipe with its grids and its reverse pruning on folded kernels. W8A8, a "
            "hard plateau at the threshold: what folding alone does."
        ),
        tables=("points",),
        changes={"folded": True, "reverse_pruning_folded": True},
        rate="quant-trim",
    ),
    "folded-spread": Method(
        "published, folded and spread",
        about=(
            "The published recipe on folded kernels, with the bounds of reverse pruning spread. What "
            "a plateau of weights does on vendors' grids, seen beside `folded`."
        ),
        tables=("points",),
        changes={"folded": True, "reverse_pruning_folded": True, "reverse_pruning_spread": 0.13},
        rate="quant-trim",
    ),
    "recommended-raw": Method(
        "recommended on raw kernels",
        about=(
            "The recommended recipe with its grids and its reverse pruning on raw kernels, as "
            "published. What looking through batch norm buys."
        ),
        tables=("points",),
        changes={**RECOMMENDED, "folded": False, "reverse_pruning_folded": False},
        rate="recommended",
    ),
    "recommended-plateau": Method(
        "recommended, no spread",
        about=(
            "The recommended recipe with all clipped weights exactly at the threshold. What spreading "
            "their bounds buys."
        ),
        tables=("points",),
        changes={**RECOMMENDED, "reverse_pruning_spread": 0.0},
        rate="recommended",
    ),
    "recommended-unpruned": Method(
        "recommended, no reverse pruning",
        about=(
            "The recommended recipe without reverse pruning. What reverse pruning adds to the right "
            "quantization points."
        ),
        tables=("points",),
        changes={**RECOMMENDED, "reverse_pruning": None, "reverse_pruning_folded": False},
        rate="recommended",
    ),
    "recommended-running": Method(
        "recommended, running averages",
        about=(
            "The recommended recipe with the running averages of batch norm, as training left them. "
            "What measuring batch norm anew in the float network buys."
        ),
        tables=("points",),
        changes={**RECOMMENDED, "reestimate": 0},
        rate="recommended",
    ),
    "recommended-clipped": Method(
        "recommended, quantile 0.999",
        about=(
            "The recommended recipe with the published quantiles of activations. What the tails of "
            "activations cost."
        ),
        tables=("points",),
        changes={**RECOMMENDED, "activation_quantile": 0.999},
        rate="recommended",
    ),
    "recommended-w4": Method(
        "recommended, vendors' W4 grids",
        about=(
            "The recommended recipe on 4-bit grids, at every step a random one of those that vendors "
            "use. What fake quantization at 4 bits adds to kernels that reverse pruning has already "
            "made fit for INT4."
        ),
        tables=("points", "bits"),
        changes={**RECOMMENDED, "bits": 4, "vendor_grids": True},
        rate="recommended",
    ),
    "recommended-one-grid": Method(
        "recommended, one W4 grid",
        about=(
            "The recommended recipe on one 4-bit grid: per tensor, narrow. What drawing a vendor's "
            "grid at every step buys, seen beside `recommended-w4`."
        ),
        tables=("points",),
        changes={**RECOMMENDED, "bits": 4, "weight_quantile": 1.0},
        rate="recommended",
    ),
    "recommended-fused": Method(
        "recommended, fused outputs",
        about=(
            "The recommended recipe with grids at residual sums and outputs, too. What placing "
            "activations' grids where vendors requantize buys."
        ),
        tables=("points",),
        changes={**RECOMMENDED, "fused_outputs": True},
        rate="recommended",
    ),
    # Another start, and other exports of a trained network.
    "fine-tuned": Method(
        "fine-tuned from float",
        about=(
            "Quant-Trim that starts from the float network, at a tenth of its rate, for two fifths of "
            "its epochs. On top of the float budget: what somebody pays who has a float checkpoint "
            "already."
        ),
        tables=("start",),
        scales={"epochs": 0.4, "learning_rate": 0.1},
        start="float",
        rate="quant-trim",
    ),
    "clips": Method(
        "exported with Clip",
        about=(
            "The published recipe's network with its learned activation ranges as Clip nodes in the graph."
        ),
        tables=("export",),
        network="quant-trim",
        export="clips",
        rate="quant-trim",
    ),
    "batch-norm": Method(
        "batch norm re-estimated",
        about="The published recipe's network with batch norm estimated again on the float graph.",
        tables=("export",),
        network="quant-trim",
        export="batch-norm",
        rate="quant-trim",
    ),
    "recommended-clips": Method(
        "recommended, exported with Clip",
        about=(
            "The recommended recipe's network with its learned activation ranges as Clip nodes in the "
            "graph. What the clips buy where training took extremes as ranges."
        ),
        tables=("export",),
        network="recommended",
        export="clips",
        rate="recommended",
    ),
}
"""Name -> method, in the order of tables."""
