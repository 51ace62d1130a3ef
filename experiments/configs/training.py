"""Define every setting of a training run, and the presets that the two commands start from.

`Config` holds the flags of `python -m experiments.cifar` and `python -m experiments.segmentation`, and
`parse` reads them. `quant_config` and `lambda_schedule` translate them into what `qt_jax` takes.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

import qt_jax as qt
from experiments import devices
from experiments.data import SEGMENTATION
from experiments.models import MODELS, SEGMENTERS
from qt_jax import command_line

Schedule = Literal["quartic", "quartic-only", "linear", "cosine", "step", "constant", "none"]

Quantizer = Literal["quant-trim", "lsq", "pact", "qwix"]

RecipeName = Literal["published", "recommended", "recommended-w4", "neutral", "plain-qat"]

PresetName = Literal["auto", "cpu", "gpu", "smoke"]

DatasetName = Literal[
    "cifar10", "cifar100", "fashion-mnist", "digits", "composed", "oxford-pet", "oxford-pet-128"
]

BASELINE_SCHEDULES: dict[str, tuple[str, ...]] = {
    "lsq": ("constant", "step"),
    "pact": ("constant", "step"),
    "qwix": ("constant",),
}
"""Schedules that each quantizer other than Quant-Trim takes: always on, or on after float training."""

RECOMMENDED: Mapping[str, Any] = {
    "folded": True,
    "activation_quantile": 1.0,
    "reverse_pruning": 0.97,
    "reverse_pruning_folded": True,
    "reverse_pruning_spread": 0.13,
    "reestimate": 10_000,
}
"""Fields in which the recommended recipe differs from the published one."""

NEUTRAL: Mapping[str, Any] = {
    **RECOMMENDED,
    "bits": 4,
    "grids": "conventions",
    "reverse_pruning": 0.99,
    "ema": 0.998,
    "equalize": "learned",
}
"""Fields of the recipe for grids that nobody has named.

All conventions of 4-bit grids are drawn, fewer weights are pulled back, the average of the weights is
deployed, and the channels of its graph are rescaled.
"""

PLAIN_QAT: Mapping[str, Any] = {"sched": "constant", "reverse_pruning": None}
"""Full fake quantization from the first step on, without reverse pruning."""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "published": {},
    "recommended": RECOMMENDED,
    "recommended-w4": {**RECOMMENDED, "bits": 4, "grids": "vendors"},
    "neutral": NEUTRAL,
    "plain-qat": PLAIN_QAT,
}
"""Maps each recipe of `--recipe` to its changes of the defaults."""

FREE_TO_CHANGE = {
    *("compare", "data_dir", "distributed", "out", "preset", "recipe", "remat", "retries"),
    "steps_per_dispatch",
}
"""Fields in which a relaunch may differ. They do not change the numbers, except for rounding."""

QUARTIC_SHARE = 8 / 13
"""Share of the whole ramp that is quartic: from 20 % to 60 % of training, when the ramp ends at 85 %."""

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "steps_per_dispatch"), (1, math.inf)),
    **dict.fromkeys(("reverse_pruning_every", "train_limit", "test_limit"), (1, math.inf)),
    "calibration_size": (1, math.inf),
    **dict.fromkeys(("learning_rate", "weight_decay"), (0, sys.float_info.max)),
    **dict.fromkeys(("regularizer_weight", "sharpness"), (0, sys.float_info.max)),
    **dict.fromkeys(("momentum", "label_smoothing"), (0, 1)),
    **dict.fromkeys(("range_momentum", "reverse_pruning_start"), (0, 1)),
    "ema": (0, 1 - 1e-6),
    "final_rate": (0, 1),
    **dict.fromkeys(("bias_rate", "average_every", "shift"), (0, math.inf)),
    **dict.fromkeys(("weight_quantile", "activation_quantile"), (0.5, 1)),
    **dict.fromkeys(("bits", "activation_bits"), (2, 16)),
    "reverse_pruning_spread": (0, 0.99),
    **dict.fromkeys(("reestimate", "retries"), (0, math.inf)),
}
"""Smallest and largest value of each numeric field. None is always allowed where a field takes it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network with Quant-Trim and its float twin, export both, deploy both at low bits, and compare.

    The same command resumes a run that was interrupted. Finished work is not repeated.

    Example:
        python -m experiments.cifar --preset smoke
    """

    sched: Schedule = "quartic"
    """Lambda schedule. quartic: the paper's three phases (zero, quartic, quadratic, then one);
    quartic-only, linear, cosine: one ramp; step: a jump; constant: one throughout (plain QAT);
    none: no fake quantization (reverse pruning stays on unless it is None too)."""
    quantizer: Quantizer = "quant-trim"
    """Method of quantization-aware training. lsq: learned step sizes; pact: learned clips of activations;
    qwix: Google's Qwix at its defaults. These three need --reverse-pruning None and --sched constant (lsq
    and pact also take step: float training first). They ignore the quantiles, except for pact's signed
    inputs."""
    recipe: RecipeName = "published"
    """Defaults of the flags for quantization and pruning; `--recipe recommended --help` shows those of
    recommended. published: Quant-Trim as in its paper; recommended: grids and pruning where vendors
    quantize; recommended-w4: the same on 4-bit grids, a vendor's at every step; neutral: on all conventions
    of 4-bit grids, with averaged weights and rescaled channels; plain-qat: W8A8 from the first step on,
    without reverse pruning."""
    preset: PresetName = "auto"
    """Defaults of all flags below; `--preset gpu --help` shows those of gpu.
    auto: gpu where JAX finds an accelerator, else cpu;
    smoke: every stage in about two minutes. experiments.cifar then takes the digits of scikit-learn, which
    need no download."""
    compare: bool = True
    """Also train the float twin: same seed and budget, no fake quantization, no reverse pruning."""
    dataset: DatasetName = "cifar10"
    """Data set. The last three are for segmentation, as are the last models."""
    data_dir: Path | None = None
    """Folder or archive that holds the data set. Default: the cache, then a download."""
    out: Path | None = None
    """Folder of the run. Default: runs/DATASET-MODEL-SCHED-SEED (-smoke)."""
    seed: int = 0
    """Seed of the initial parameters, the order of the images and their augmentation."""
    fine_tune: Path | None = None
    """Start from the parameters and batch norm of a finished run's checkpoints, such as
    runs/RUN/checkpoints/float, instead of random ones. The budget stays the same."""

    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(MODELS | SEGMENTERS) + "}")] = "fast"
    """Network to train."""
    epochs: int = 10
    """Passes over the training split."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.2
    """Peak learning rate of SGD with Nesterov momentum."""
    lr_schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    """one-cycle: linear up over a fifth of training, then linear down to --final-rate;
    cosine: 5 % warm-up, then cosine down to zero."""
    final_rate: float = 0.0
    """Share of the peak rate at which one-cycle ends."""
    bias_rate: float = 1.0
    """Learning rate of biases that have no kernel beside them, as in batch norm, in units of the others'."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on kernels, and on the clips of pact."""
    label_smoothing: float = 0.1
    """Share of the label that is spread over all classes."""
    regularizer: Literal["none", "kure", "range"] = "none"
    """Penalty on kernels, a baseline. kure: kurtosis far from that of evenly spread weights; range: the
    largest magnitude of each kernel."""
    regularizer_weight: float = 1.0
    """Factor of the penalty in the loss."""
    sharpness: float = 0.0
    """Radius in which sharpness-aware minimisation (SAM) looks for the steepest loss, a baseline. 0: off.
    A step then takes two gradients."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which is then evaluated and exported. 0: no average.
    The batch norm of training belongs to the parameters: measure it again on the average (--reestimate)."""
    average_every: int = 0
    """Steps between two replacements of the parameters by a moving average of theirs, which is evaluated and
    exported. The average moves less and less. 0: no replacement."""
    frozen: tuple[str, ...] = ()
    """Regular expressions for whole paths of parameters that stay as they are, such as
    --frozen whitening/kernel."""
    shift: int = 4
    """Largest random shift of the images, in pixels."""
    flips: Literal["random", "alternating"] = "random"
    """How images are mirrored, where their classes survive it. random: each with probability 1/2 whenever it
    is drawn; alternating: half of them in even epochs, the other half in odd epochs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Parameters and statistics stay in float32."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, with their gradients added, to save memory.
    Batch norm and ranges then see one part at a time."""
    remat: bool = False
    """Keep only the outputs of convolutions and matmuls for the backward pass, and recompute the rest."""
    steps_per_dispatch: int = 1
    """Steps in one compiled loop. Keep 1 on CPUs, where XLA runs convolutions inside a loop on one thread."""
    retries: int = 0
    """How often a run whose loss diverges may go back to its last checkpoint and halve the learning rate."""
    distributed: str | None = None
    """Train together with other processes: auto on TPU pods, Slurm and Open MPI, else
    ADDRESS:PORT,COUNT,INDEX with the address of process 0. All processes share the folder of the run."""
    train_limit: int | None = None
    """Use at most this many training images."""

    warmup: float = 0.2
    """Fraction of training before lambda leaves zero (for step: before it jumps)."""
    ramp_end: float = 0.85
    """Fraction of training at which lambda reaches one."""
    bits: int = 8
    """Width of the fake-quantized weights."""
    rules: tuple[str, ...] = ()
    """Exceptions for single layers, PATH=BITS or PATH=skip, such as --rules head=skip. PATH is a regular
    expression for the whole path of a layer, BITS the width of its weights; skip leaves the layer in
    floating point. The first match wins."""
    activation_bits: int = 8
    """Width of the fake-quantized activations."""
    sites: Literal["inputs", "outputs"] = "inputs"
    """Where activations are fake-quantized: at the inputs of layers, or at their outputs."""
    per_channel: bool = False
    """Train with one weight scale per output channel."""
    folded: bool = False
    """Quantize each kernel as vendors fold it, with the gain of its batch norm."""
    fused_outputs: bool = False
    """Also fake-quantize the operands of residual sums, and other outputs that vendors requantize."""
    grids: Literal["own", "vendors", "conventions"] = "own"
    """Grid of the weights. own: as --per-channel and --weight-quantile say. The others replace these two,
    have the largest weight as their end, and are drawn at random at every step. vendors: per tensor or per
    channel, full or narrow range; conventions: also those whose last step falls short, and powers of two."""
    weight_quantile: float = 0.999
    """Upper quantile of |w| that sets a weight scale."""
    activation_quantile: float = 0.999
    """Upper quantile of an activation's range. The lower quantile is its complement."""
    range_momentum: float = 0.99
    """Momentum of the moving averages of the ranges."""
    reverse_pruning: float | None = 0.95
    """Quantile of |w| to which reverse pruning pulls kernels back. None: off."""
    reverse_pruning_every: int = 50
    """Steps between two pulls."""
    reverse_pruning_start: float = 0.2
    """Fraction of training before the first pull."""
    reverse_pruning_folded: bool = False
    """Pull back kernels as vendors fold them."""
    reverse_pruning_spread: float = 0.0
    """Share of the threshold over which the bounds of single weights are spread, so that weights do not
    form a plateau."""
    reestimate: int = 0
    """Training images, at least 500, on which the batch norm of the float network is re-estimated after the
    last step. 0: keep the running averages of training."""

    equalize: Literal["none", "ranges", "learned"] = "none"
    """Rescale the channels of the exported graph, which does not change its function, as `qt.equalize` does
    with the method of this name. learned takes some minutes. The float twin is left as it is."""
    calibration_size: int = 512
    """Training images on which the vendor's quantizer is calibrated, and channels are rescaled."""
    test_limit: int | None = None
    """Use at most this many test images."""

    def __post_init__(self):
        models = SEGMENTERS if self.dataset in SEGMENTATION else MODELS
        if self.model not in models:
            raise qt.InvalidInput(
                f"--model {self.model!r} does not suit --dataset {self.dataset}; choose one of "
                f"{', '.join(models)}"
            )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limits = f"at least {low}" if high >= sys.float_info.max else f"from {low} to {high}"
                raise qt.InvalidInput(f"--{name.replace('_', '-')} must be {limits}, got {value}")
        if 0 < self.reestimate < 500:
            raise qt.InvalidInput(f"--reestimate must be 0 or at least 500, got {self.reestimate}")
        if self.reverse_pruning is not None and not 0.0 < self.reverse_pruning <= 1.0:
            raise qt.InvalidInput("--reverse-pruning must lie in (0, 1], or be None to switch it off")
        if self.ema and self.average_every:
            raise qt.InvalidInput("--ema and --average-every are two averages of the parameters: give one")
        names = ("sched", "reverse_pruning", "sites", "bits", "activation_bits")
        check_quantizer(self.quantizer, **{name: getattr(self, name) for name in names})
        names = ("folded", "fused_outputs", "reverse_pruning_folded")
        flags = {name: getattr(self, name) for name in names} | {"grids": self.grids != "own"}
        check_deployment_flags(self.quantizer, self.sched, **flags)
        if self.sharpness and self.quantizer in ("lsq", "pact"):
            raise qt.InvalidInput(
                f"--sharpness would move the ranges that --quantizer {self.quantizer} learns"
            )
        if (self.regularizer == "none" and self.regularizer_weight != 1.0) or not self.regularizer_weight:
            raise qt.InvalidInput("--regularizer-weight is the factor of a --regularizer, and is not 0")
        if self.sharpness and self.accumulate > 1:
            raise qt.InvalidInput("--sharpness takes whole batches: give --accumulate 1 with it")
        if self.batch_size % self.accumulate:
            raise qt.InvalidInput(
                f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}"
            )
        quant_config(self)  # this call and the next refuse settings that contradict each other
        lambda_schedule(self, 1)

    @property
    def averages(self) -> bool:
        """Tell whether a moving average of the parameters is evaluated and exported in their place."""
        return bool(self.ema or self.average_every)

    @property
    def directory(self) -> Path:
        """Return the folder of the run."""
        smoke = "-smoke" if self.preset == "smoke" else ""
        method = self.sched if self.quantizer == "quant-trim" else f"{self.quantizer}-{self.sched}"
        method += "" if self.recipe == "published" else f"-{self.recipe}"
        return self.out or Path("runs") / f"{self.dataset}-{self.model}-{method}-{self.seed}{smoke}"


def check_quantizer(
    quantizer: Quantizer,
    *,
    sched: str,
    reverse_pruning: float | None,
    sites: str,
    bits: int,
    activation_bits: int,
) -> None:
    """Refuse settings of a quantizer that only Quant-Trim has, or that the quantizer does not support.

    Raises:
      InvalidInput: The settings do not go together.

    >>> check_quantizer("pact", sched="none", reverse_pruning=None, sites="inputs", bits=8, activation_bits=8)
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: --quantizer pact goes with --sched constant or step, ...
    """
    if quantizer == "quant-trim":
        return
    allowed = BASELINE_SCHEDULES[quantizer]
    if sched not in allowed or reverse_pruning is not None or sites != "inputs":
        raise qt.InvalidInput(
            f"--quantizer {quantizer} goes with --sched {' or '.join(allowed)}, --reverse-pruning None and "
            f"--sites inputs, got {sched}, {reverse_pruning} and {sites}: ramps, reverse pruning and output "
            "sites are Quant-Trim's"
        )
    if quantizer == "qwix" and (bits > 8 or activation_bits != 8):
        raise qt.InvalidInput(
            f"--quantizer qwix goes with --bits of 2 to 8 and --activation-bits 8, got {bits} and "
            f"{activation_bits}"
        )


def check_deployment_flags(quantizer: str, sched: str, **flags: bool) -> None:
    """Refuse deployment-aware settings of `Config` that lack what they need.

    Args:
      quantizer, sched: Fields of `Config`.
      flags: Whether folded, fused_outputs, grids and reverse_pruning_folded are other than by default.

    Raises:
      InvalidInput: A setting lacks what it needs.
    """
    used = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value]
    if used and (quantizer != "quant-trim" or sched == "none"):
        raise qt.InvalidInput(f"{', '.join(used)} need --quantizer quant-trim and a --sched other than none")
    if flags["reverse_pruning_folded"] and not flags["folded"]:
        raise qt.InvalidInput("--reverse-pruning-folded needs the gains that --folded keeps: give both")


def quant_config(config: Config) -> qt.QuantConfig:
    """Return what `qt.quant_trim` takes in training.

    For another quantizer it describes that quantizer's grid in the same terms.
    """
    activations = qt.QuantSpec(config.activation_bits, symmetric=False, quantile=config.activation_quantile)
    return qt.QuantConfig(
        weights=_weights(config, config.bits),
        activations=activations if config.sites == "inputs" else None,
        outputs=activations if config.sites == "outputs" else None,
        rules=tuple(_rule(text, config) for text in config.rules),
        momentum=config.range_momentum,
        folded=config.folded,
        seed=config.seed,
    )


def _rule(text: str, config: Config) -> qt.Rule:
    """Read a rule that `--rules` spells as PATH=BITS or PATH=skip."""
    path, _, what = text.rpartition("=")
    if path and what == "skip":
        return qt.Rule(path, skip=True)
    if path and what.isdecimal():
        return qt.Rule(path, weights=_weights(config, int(what)))
    raise qt.InvalidInput(
        f"--rules {text!r} is neither PATH=BITS nor PATH=skip, such as head=8 or stem/.*=skip"
    )


def _weights(config: Config, bits: int) -> qt.QuantSpec:
    axis = -1 if config.per_channel else None
    if config.grids != "own":
        return qt.QuantSpec(bits, axis=-1, quantile=1.0, grids=config.grids)
    if config.quantizer == "lsq":  # the paper's grid, [-8, 7] on 4 bits
        return qt.QuantSpec(bits, axis=axis, narrow_range=False, quantile=1.0)
    quantile = 1.0 if config.quantizer == "pact" else config.weight_quantile
    return qt.QuantSpec(bits, axis=axis, quantile=quantile)


def lambda_schedule(config: Config, total_steps: int):
    """Return the schedule `step -> lambda` of `config.sched`."""
    ramp = {"warmup": config.warmup, "end": config.ramp_end}
    joint = config.warmup + (config.ramp_end - config.warmup) * QUARTIC_SHARE
    make = {
        "quartic": partial(qt.schedules.warmup_quartic_quadratic, total_steps, joint=joint, **ramp),
        "quartic-only": partial(qt.schedules.quartic, total_steps, **ramp),
        "linear": partial(qt.schedules.linear, total_steps, **ramp),
        "cosine": partial(qt.schedules.cosine, total_steps, **ramp),
        "step": partial(qt.schedules.step, total_steps, at=config.warmup),
        "constant": partial(qt.schedules.constant, 1.0),
        "none": partial(qt.schedules.constant, 0.0),
    }
    return make[config.sched]()


def float_twin(config: Config) -> Config:
    """Return the config of the same run without Quant-Trim or any other quantizer."""
    return dataclasses.replace(
        config,
        sched="none",
        quantizer="quant-trim",
        reverse_pruning=None,
        folded=False,
        fused_outputs=False,
        grids="own",
        reverse_pruning_folded=False,
        equalize="none",
    )


PRESETS: dict[str, Config] = {
    "cpu": Config(preset="cpu"),
    "gpu": Config(
        preset="gpu",
        model="resnet18",
        epochs=60,
        batch_size=256,
        dtype="bfloat16",
        steps_per_dispatch=50,
        calibration_size=1024,
    ),
    "smoke": Config(
        preset="smoke",
        dataset="digits",
        model="resnet8",
        epochs=50,
        batch_size=64,
        reverse_pruning_every=20,
        train_limit=1300,
        calibration_size=256,
        test_limit=500,
    ),
}
"""Presets of `python -m experiments.cifar`.

smoke trains on every image of scikit-learn's digits, which need no download. Its limits are larger than that
set; they keep the run short when another set is named, such as --dataset cifar10.
"""


SEGMENTATION_PRESETS: dict[str, Config] = {
    "cpu": Config(
        preset="cpu",
        dataset="composed",
        model="unet-small",
        epochs=3,
        batch_size=16,
        learning_rate=0.1,
        label_smoothing=0.0,
        calibration_size=128,
        test_limit=500,
    ),
    "gpu": Config(
        preset="gpu",
        dataset="composed",
        model="unet",
        epochs=60,
        batch_size=64,
        label_smoothing=0.0,
        dtype="bfloat16",
        steps_per_dispatch=20,
    ),
    "smoke": Config(
        preset="smoke",
        dataset="composed",
        model="unet-small",
        epochs=2,
        batch_size=32,
        label_smoothing=0.0,
        train_limit=320,
        calibration_size=16,
        test_limit=50,
        reverse_pruning_every=5,
    ),
}
"""Presets of `python -m experiments.segmentation`."""


def parse(
    arguments: list[str] | None = None,
    presets: Mapping[str, Config] = PRESETS,
    module: str = "experiments.cifar",
    about: str | None = None,
) -> Config:
    """Read the config of a command line: the values of preset and recipe, overridden by the given flags.

    `--distributed` connects the processes before anything asks JAX for devices.

    Args:
      arguments: Flags; None: those of this process.
      presets: Name -> config.
      module: What stands after `python -m`.
      about: What `--help` begins with; None: the docstring of `Config`.

    Raises:
      InvalidInput: The preset or the recipe is unknown, or the processes cannot be connected.
      SystemExit: A flag or choice is unknown, or a value is out of range (status 2). tyro has then printed
        what is allowed. Also raised by `--help` (status 0).
    """
    first = command_line.read_flags(_First, arguments, module, return_unknown_args=True, add_help=False)[0]
    if first.distributed is not None:
        devices.connect(first.distributed)
    preset = first.preset
    if preset == "auto":
        preset = "cpu" if jax.default_backend() == "cpu" else "gpu"
    if preset not in presets:
        raise qt.InvalidInput(f"--preset {preset!r} is unknown; choose auto or one of {', '.join(presets)}")
    if first.recipe not in RECIPES:
        raise qt.InvalidInput(f"--recipe {first.recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    default = dataclasses.replace(presets[preset], recipe=first.recipe, **RECIPES[first.recipe])
    return command_line.parse(Config, arguments, module, about=about, default=default)


@dataclasses.dataclass(frozen=True)
class _First:
    """Hold the flags that decide about the defaults of others, or are needed before JAX sees its devices."""

    preset: str = "auto"
    recipe: str = "published"
    distributed: str | None = None
