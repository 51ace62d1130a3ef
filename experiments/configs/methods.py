"""Define the methods of the study: each is a set of changes to a task's base config.

The base config of every task holds the published recipe of Quant-Trim. `python -m experiments.paper --methods
NAME ...` trains and deploys single methods. `methods.md` beside the tables of a study lists all of them with
their training time and their scores.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import qt_jax as qt
from experiments.configs.training import NEUTRAL, PLAIN_QAT, RECOMMENDED, Config

BASELINES = "main"
"""The table of the methods that are compared with each other. Its rows go through the most backends."""

FLOAT = "float"
"""The method without quantization, with which the others are compared and from which fine-tuning starts."""

Export = Literal["plain", "clips", "batch-norm"]


@dataclasses.dataclass(frozen=True)
class Method:
    """Describe one method of the study.

    Attributes:
      title: Its name in tables and figures.
      about: What the method is, with its source, in Markdown.
      tables: The tables it is a row of: "main", or ablations such as "schedule".
      changes: Maps fields of `Config` to the values that replace the task's, or those of `network`.
      scales: Maps fields of `Config` to factors of the task's values. Counts are rounded, to at least 1.
      start: Training starts from the trained network of this method, of the same task and seed.
      network: The trained network of this method, of the same task and seed, is deployed. None is trained.
      starting: That network is the one from which the task's rows start, see `Task.start`.
      export: "plain"; "clips" exports learned ranges as Clip nodes; "batch-norm" estimates the statistics of
        batch norm again on the float graph.
      rate: The method whose searched learning rate this one takes. With None it has a search of its own.
    """

    title: str
    about: str = ""
    tables: tuple[str, ...] = (BASELINES,)
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: str | None = None
    network: str | None = None
    starting: bool = False
    export: Export = "plain"
    rate: str | None = None

    @property
    def needs(self) -> str | None:
        """Return the method that must be trained before this one."""
        return self.start or self.network


def config_of(method: Method, base: Config, seed: int, factor: float = 1.0) -> Config:
    """Return the config of a method on a task.

    Args:
      method: The method.
      base: The task's config, which holds the published recipe.
      seed: Seed of the run.
      factor: Factor of the learning rate, from the search.

    Raises:
      InvalidInput: A change is not a field of `Config`, or `Config` refuses a value.

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


PLAIN: Mapping[str, Any] = {"sched": "none", "reverse_pruning": None}
"""Float training."""

FLOAT_BASELINES = (
    *("start", "start-ranges", "start-learned", "float-learned"),
    *("averaged", "kure", "range-restriction", "sam"),
)
"""Methods without quantization beside `FLOAT`, which only studies of fine-tuning have."""

NEUTRAL_METHODS = (
    *("neutral", "neutral-unscaled", "neutral-unaveraged", "neutral-unpruned"),
    *("neutral-vendors", "neutral-w8"),
)
"""The neutral recipe and its parts, which only studies of fine-tuning have."""

W4: Mapping[str, Any] = {"bits": 4, "reestimate": 10_000}
"""4-bit weights, and batch norm re-estimated in the float network.

The recommended recipe re-estimates batch norm, too, so the 4-bit baselines do not differ from it in this.
"""

METHODS: dict[str, Method] = {
    # Baselines. They are compared with each other and with both recipes of Quant-Trim.
    "float": Method(
        "float + PTQ",
        "Float training; the vendor quantizes afterwards (PTQ). This is what most practitioners do.",
        changes=PLAIN,
    ),
    "qat": Method(
        "plain QAT W8A8",
        "Plain quantization-aware training: lambda = 1 throughout, W8A8, no reverse pruning. It is the "
        "straight-through training of Jacob et al. 2018, arXiv 1712.05877, on raw kernels and with this "
        "package's ranges (quantiles, moving averages), whereas `qat-w4-folded` folds batch norm and takes "
        "extremes, as they do.",
        tables=("main", "bits"),
        changes=PLAIN_QAT,
    ),
    "qat-delayed": Method(
        "QAT, delayed start",
        "Quantization-aware training with a delayed start: lambda jumps from 0 to 1 after the warm-up. "
        "Source: the quantization delay of Jacob et al. 2018, arXiv 1712.05877, section 3.1.",
        changes={"sched": "step", "reverse_pruning": None},
    ),
    # 4-bit weights are the grid on which compilers lose most.
    "qat-w4": Method(
        "plain QAT W4A8",
        "`qat` for 4-bit weights and 8-bit activations, the grid on which compilers lose most. Batch norm "
        "is re-estimated in the float network, as in the recommended recipe.",
        tables=("main", "bits"),
        changes={**PLAIN_QAT, **W4},
    ),
    "qat-w4-folded": Method(
        "plain QAT W4A8, folded",
        "`qat-w4` on folded kernels with ranges from extremes: the straight-through training of Jacob et "
        "al. 2018, arXiv 1712.05877, with batch norm folded by its running statistics. Batch norm is "
        "re-estimated in the float network, as in the recommended recipe.",
        tables=("main", "points"),
        changes={**PLAIN_QAT, **W4, "folded": True, "weight_quantile": 1.0, "activation_quantile": 1.0},
    ),
    "lsq-w4": Method(
        "LSQ W4A8",
        "`lsq` (learned step sizes) for 4-bit weights and 8-bit activations, the grid on which compilers "
        "lose most. Batch norm is re-estimated in the float network, as in the recommended recipe.",
        tables=("main", "bits"),
        changes={"quantizer": "lsq", **PLAIN_QAT, **W4},
    ),
    "pact-w4": Method(
        "PACT W4A8",
        "`pact` (learned clipping levels) for 4-bit weights and 8-bit activations, the grid on which "
        "compilers lose most. Batch norm is re-estimated in the float network, as in the recommended "
        "recipe.",
        tables=("main", "bits"),
        changes={"quantizer": "pact", **PLAIN_QAT, **W4},
    ),
    "qwix-w4": Method(
        "Qwix QAT W4A8",
        "`qwix` for 4-bit weights and 8-bit activations, the grid on which compilers lose most. Batch norm "
        "is re-estimated in the float network, as in the recommended recipe.",
        tables=("main", "bits"),
        changes={"quantizer": "qwix", **PLAIN_QAT, **W4, "per_channel": True},
    ),
    # What float training gives for nothing, or with a penalty. In a task of fine-tuning, `float` trains on
    # like the other methods: it is their fair control.
    "start": Method(
        "float, before fine-tuning",
        "The float network from which the task's rows start, not trained any further.",
        network=FLOAT,
        starting=True,
    ),
    "start-ranges": Method(
        "float, ranges equalized",
        "`start`, with the ranges of its channels equalized in closed form, which does not change its "
        "function. Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1, with all channels of a residual "
        "stream as one.",
        network=FLOAT,
        starting=True,
        changes={"equalize": "ranges"},
    ),
    "start-learned": Method(
        "float, equalized",
        "`start`, with channels rescaled by `qt.equalize`: learned from the errors of simulated grids, "
        "without labels and without training.",
        network=FLOAT,
        starting=True,
        changes={"equalize": "learned"},
    ),
    "float-learned": Method(
        "float + PTQ, equalized",
        "`float`, with channels rescaled by `qt.equalize`.",
        network=FLOAT,
        changes={"equalize": "learned"},
    ),
    "averaged": Method(
        "weight averaging",
        "Float training whose moving average of weights is deployed (decay 0.998), with batch norm measured "
        "anew.",
        changes={**PLAIN, "ema": 0.998, "reestimate": 10_000},
    ),
    "kure": Method(
        "KURE",
        "Float training that draws the kurtosis of every kernel to that of the uniform distribution. Source: "
        "Shkolnik et al. 2020, arXiv 2002.07686.",
        changes={**PLAIN, "regularizer": "kure", "regularizer_weight": 1.0},
    ),
    "range-restriction": Method(
        "range restriction (R2)",
        "Float training that penalises the largest magnitude of every kernel. Source: Kundu et al. 2023, "
        "arXiv 2303.08253, the L-infinity form.",
        changes={**PLAIN, "regularizer": "range", "regularizer_weight": 0.01},
    ),
    "sam": Method(
        "SAM",
        "Float training by sharpness-aware minimisation with the radius 0.05. It takes two gradients at each "
        "step. Source: Foret et al. 2021, arXiv 2010.01412.",
        changes={**PLAIN, "sharpness": 0.05},
    ),
    # Quant-Trim as published, and as this project recommends it.
    "quant-trim": Method(
        "Quant-Trim (published)",
        "Quant-Trim as published: the three-phase lambda, reverse pruning at 0.95, W8A8, and fake "
        "quantization at the inputs of layers. Source: arXiv 2511.15300. It changes nothing, because the "
        "base config of every task holds this recipe.",
        tables=(
            "main",
            "reverse-pruning",
            "schedule",
            "p-clip",
            "weight-quantile",
            "points",
            "bits",
            "start",
            "export",
        ),
    ),
    "recommended": Method(
        "Quant-Trim, recommended",
        "The recipe that this project recommends: Quant-Trim at the points where vendors quantize. It "
        "differs from the published recipe in four ways. Grids and reverse pruning apply to the folded "
        "kernel. Reverse pruning takes the quantile 0.97 and spreads its bounds over one step of INT4, so "
        "that no plateau of weights meets the end of a vendor's grid. Activation ranges are extremes: of a "
        "sample when the committed records were made, of the whole tensor since. Batch norm is "
        "re-estimated in the float network. The recipe was chosen on the validation split of CIFAR-10 in "
        'some forty single runs of fast8 (exploration.jsonl). The ablations "points" take its parts away '
        "one by one.",
        tables=("main", "bits", "points", "start", "export"),
        changes=RECOMMENDED,
    ),
    "neutral": Method(
        "Quant-Trim, neutral",
        "Quant-Trim for grids that nobody has named. It changes four things in the recommended recipe. "
        "Kernels are on 4 bits, on a grid drawn at every step from ten conventions. Reverse pruning takes "
        "the quantile 0.99. A moving average of the weights is deployed. The channels of the exported graph "
        "are rescaled by `qt.equalize`.",
        tables=("main", "parts"),
        changes=NEUTRAL,
    ),
    "neutral-unscaled": Method(
        "neutral, not rescaled",
        "The network of the neutral recipe, exported as it was trained. It shows what rescaling buys.",
        tables=("parts",),
        network="neutral",
        changes={"equalize": "none"},
    ),
    "neutral-unaveraged": Method(
        "neutral, not averaged",
        "The neutral recipe with the last weights in place of their average.",
        tables=("parts",),
        changes={**NEUTRAL, "ema": 0.0},
        rate="neutral",
    ),
    "neutral-unpruned": Method(
        "neutral, no reverse pruning",
        "The neutral recipe without reverse pruning.",
        tables=("parts",),
        changes={**NEUTRAL, "reverse_pruning": None, "reverse_pruning_folded": False},
        rate="neutral",
    ),
    "neutral-vendors": Method(
        "neutral, four grids",
        "The neutral recipe that draws from four grids, full or narrow, per tensor or per channel.",
        tables=("parts",),
        changes={**NEUTRAL, "grids": "vendors"},
        rate="neutral",
    ),
    "neutral-w8": Method(
        "neutral, 8 bits",
        "The neutral recipe with kernels on 8 bits in training.",
        tables=("parts",),
        changes={**NEUTRAL, "bits": 8},
        rate="neutral",
    ),
    # The published recipe without one of its halves.
    "no-reverse-pruning": Method(
        "no reverse pruning",
        "Quant-Trim without reverse pruning.",
        tables=("reverse-pruning",),
        changes={"reverse_pruning": None},
        rate="quant-trim",
    ),
    "reverse-pruning-only": Method(
        "reverse pruning alone",
        "Reverse pruning alone, without fake quantization at any time.",
        tables=("reverse-pruning",),
        changes={"sched": "none"},
        rate="quant-trim",
    ),
    # Other schedules of lambda.
    "linear": Method(
        "linear ramp",
        "Quant-Trim with a linear ramp of lambda.",
        tables=("schedule",),
        changes={"sched": "linear"},
        rate="quant-trim",
    ),
    "cosine": Method(
        "cosine ramp",
        "Quant-Trim with a cosine ramp of lambda.",
        tables=("schedule",),
        changes={"sched": "cosine"},
        rate="quant-trim",
    ),
    "quartic-only": Method(
        "quartic ramp only",
        "Quant-Trim with the quartic ramp of lambda only.",
        tables=("schedule",),
        changes={"sched": "quartic-only"},
        rate="quant-trim",
    ),
    "step": Method(
        "step",
        "Quant-Trim with a step of lambda from 0 to 1.",
        tables=("schedule",),
        changes={"sched": "step"},
        rate="quant-trim",
    ),
    # Other quantiles of reverse pruning.
    "p-clip-90": Method(
        "p_clip 0.9",
        "Quant-Trim with reverse pruning at the quantile 0.9 instead of 0.95.",
        tables=("p-clip",),
        changes={"reverse_pruning": 0.9},
        rate="quant-trim",
    ),
    "p-clip-99": Method(
        "p_clip 0.99",
        "Quant-Trim with reverse pruning at the quantile 0.99 instead of 0.95.",
        tables=("p-clip",),
        changes={"reverse_pruning": 0.99},
        rate="quant-trim",
    ),
    "p-clip-999": Method(
        "p_clip 0.999",
        "Quant-Trim with reverse pruning at the quantile 0.999 instead of 0.95.",
        tables=("p-clip",),
        changes={"reverse_pruning": 0.999},
        rate="quant-trim",
    ),
    # Other quantiles of weight scales.
    "weight-quantile-99": Method(
        "weight quantile 0.99",
        "Quant-Trim with weight scales from the quantile 0.99 of abs(w) instead of 0.999.",
        tables=("weight-quantile",),
        changes={"weight_quantile": 0.99},
        rate="quant-trim",
    ),
    "weight-quantile-100": Method(
        "weight quantile 1.0",
        "Quant-Trim with weight scales from the maximum of abs(w) instead of the quantile 0.999.",
        tables=("weight-quantile",),
        changes={"weight_quantile": 1.0},
        rate="quant-trim",
    ),
    # Other quantization points.
    "output-sites": Method(
        "output sites",
        "Quant-Trim with activations fake-quantized at the outputs of layers instead of their inputs.",
        tables=("points",),
        changes={"sites": "outputs"},
        rate="quant-trim",
    ),
    "per-channel": Method(
        "per-channel weights",
        "Quant-Trim with one weight scale per output channel in training.",
        tables=("points",),
        changes={"per_channel": True},
        rate="quant-trim",
    ),
    # Other bit widths.
    "lsq": Method(
        "LSQ W8A8",
        "LSQ: the step sizes of weights and activations are learned by gradient. Source: Esser et al. "
        '2020, "Learned step size quantization", arXiv 1902.08153.',
        tables=("bits",),
        changes={"quantizer": "lsq", **PLAIN_QAT},
        rate="lsq-w4",
    ),
    "pact": Method(
        "PACT W8A8",
        "PACT: the clipping level of every activation is learned, with an L2 penalty on it. Source: Choi "
        'et al. 2018, "PACT: parameterized clipping activation", arXiv 1805.06085.',
        tables=("bits",),
        changes={"quantizer": "pact", **PLAIN_QAT},
        rate="pact-w4",
    ),
    "qwix": Method(
        "Qwix QAT W8A8",
        "Qwix, the quantization-aware training of a peer library for JAX, exported through our converter. "
        "Source: https://github.com/google/qwix.",
        tables=("bits",),
        changes={"quantizer": "qwix", **PLAIN_QAT, "per_channel": True},
        rate="qwix-w4",
    ),
    "w4a8": Method(
        "trained W4A8",
        "Quant-Trim trained for 4-bit weights and 8-bit activations.",
        tables=("bits",),
        changes={"bits": 4},
        rate="quant-trim",
    ),
    "w4a4": Method(
        "trained W4A4",
        "Quant-Trim trained for 4-bit weights and 4-bit activations.",
        tables=("bits",),
        changes={"bits": 4, "activation_bits": 4},
        rate="quant-trim",
    ),
    # Folded kernels, and the recommended recipe with one part changed.
    "folded": Method(
        "published, folded kernels",
        "The published recipe with its grids and its reverse pruning on folded kernels (W8A8, a hard "
        "plateau at the threshold). It shows what folding alone does.",
        tables=("points",),
        changes={"folded": True, "reverse_pruning_folded": True},
        rate="quant-trim",
    ),
    "folded-spread": Method(
        "published, folded and spread",
        "The published recipe on folded kernels, with the bounds of reverse pruning spread. Beside "
        "`folded` it shows what a plateau of weights does on vendors' grids.",
        tables=("points",),
        changes={"folded": True, "reverse_pruning_folded": True, "reverse_pruning_spread": 0.13},
        rate="quant-trim",
    ),
    "recommended-raw": Method(
        "recommended on raw kernels",
        "The recommended recipe with its grids and its reverse pruning on raw kernels, as published. It "
        "shows what looking through batch norm buys.",
        tables=("points",),
        changes={**RECOMMENDED, "folded": False, "reverse_pruning_folded": False},
        rate="recommended",
    ),
    "recommended-plateau": Method(
        "recommended, no spread",
        "The recommended recipe with all clipped weights exactly at the threshold. It shows what spreading "
        "their bounds buys.",
        tables=("points",),
        changes={**RECOMMENDED, "reverse_pruning_spread": 0.0},
        rate="recommended",
    ),
    "recommended-unpruned": Method(
        "recommended, no reverse pruning",
        "The recommended recipe without reverse pruning. It shows what reverse pruning adds to the right "
        "quantization points.",
        tables=("points",),
        changes={**RECOMMENDED, "reverse_pruning": None, "reverse_pruning_folded": False},
        rate="recommended",
    ),
    "recommended-running": Method(
        "recommended, running averages",
        "The recommended recipe with the running averages of batch norm, as training left them. It shows "
        "what re-estimating batch norm in the float network buys.",
        tables=("points",),
        changes={**RECOMMENDED, "reestimate": 0},
        rate="recommended",
    ),
    "recommended-clipped": Method(
        "recommended, quantile 0.999",
        "The recommended recipe with the published quantiles of activations. It shows what the tails of "
        "activations cost.",
        tables=("points",),
        changes={**RECOMMENDED, "activation_quantile": 0.999},
        rate="recommended",
    ),
    "recommended-w4": Method(
        "recommended, vendors' W4 grids",
        "The recommended recipe on 4-bit grids, at every step a random one of those that vendors use. It "
        "shows what fake quantization at 4 bits adds to kernels that reverse pruning has already made fit "
        "for INT4.",
        tables=("points", "bits"),
        changes={**RECOMMENDED, "bits": 4, "grids": "vendors"},
        rate="recommended",
    ),
    "recommended-one-grid": Method(
        "recommended, one W4 grid",
        "The recommended recipe on one 4-bit grid: per tensor, narrow. Beside `recommended-w4` it shows "
        "what drawing a vendor's grid at every step buys.",
        tables=("points",),
        changes={**RECOMMENDED, "bits": 4, "weight_quantile": 1.0},
        rate="recommended",
    ),
    "recommended-fused": Method(
        "recommended, fused outputs",
        "The recommended recipe with grids at residual sums and outputs, too. It shows what placing the "
        "grids of activations where vendors requantize buys.",
        tables=("points",),
        changes={**RECOMMENDED, "fused_outputs": True},
        rate="recommended",
    ),
    # Another start of training, and other exports of a trained network.
    "fine-tuned": Method(
        "fine-tuned from float",
        "Quant-Trim that starts from the float network, at a tenth of its learning rate, for two fifths of "
        "its epochs. This comes on top of the float budget: it is what those pay who have a float "
        "checkpoint.",
        tables=("start",),
        scales={"epochs": 0.4, "learning_rate": 0.1},
        start="float",
        rate="quant-trim",
    ),
    "clips": Method(
        "exported with Clip",
        "The network of the published recipe, with its learned activation ranges as Clip nodes in the graph.",
        tables=("export",),
        network="quant-trim",
        export="clips",
        rate="quant-trim",
    ),
    "batch-norm": Method(
        "batch norm re-estimated",
        "The network of the published recipe, with batch norm estimated again on the float graph.",
        tables=("export",),
        network="quant-trim",
        export="batch-norm",
        rate="quant-trim",
    ),
    "recommended-clips": Method(
        "recommended, exported with Clip",
        "The network of the recommended recipe, with its learned activation ranges as Clip nodes in the "
        "graph. It shows what the clips buy where training took extremes as ranges.",
        tables=("export",),
        network="recommended",
        export="clips",
        rate="recommended",
    ),
}
"""Maps the name of a method, as on the command line and in records, to the method, in the order of tables."""
