"""The presets that `python -m experiments.segmentation` starts from.

Which quantization-aware training there is beside Quant-Trim, and what each can be combined with.

Everything `python -m experiments.cifar` can be told, and the presets it starts from.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import qt_jax as qt
from experiments import devices
from experiments.data import SEGMENTATION
from experiments.models import MODELS, SEGMENTERS
from qt_jax import command_line

Quantizer = Literal["quant-trim", "lsq", "pact", "qwix"]

SCHEDULES: dict[str, tuple[str, ...]] = {
    "lsq": ("constant", "step"),
    "pact": ("constant", "step"),
    "qwix": ("constant",),
}
"""The lambda schedules of the other quantizers: on throughout, or after float training."""


def check_quantizer(
    quantizer: Quantizer,
    *,
    sched: str,
    reverse_pruning: float | None,
    sites: str,
    bits: int,
    activation_bits: int,
) -> None:
    """Raises InvalidInput where a quantizer is given what belongs to Quant-Trim, or what it cannot do.

    >>> check_quantizer("pact", sched="none", reverse_pruning=None, sites="inputs", bits=8, activation_bits=8)
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: --quantizer pact goes with --sched constant or step, ...
    """
    if quantizer == "quant-trim":
        return
    allowed = SCHEDULES[quantizer]
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


def check_points(quantizer: str, sched: str, **points: bool) -> None:
    """Raises InvalidInput for deployment-aware settings of `Config` without what they need.

    Args:
      points: the fields folded, fused_outputs, vendor_grids, reverse_pruning_folded.
    """
    used = [f"--{name.replace('_', '-')}" for name, value in points.items() if value]
    if used and (quantizer != "quant-trim" or sched == "none"):
        raise qt.InvalidInput(f"{', '.join(used)} need --quantizer quant-trim and a --sched other than none")
    if points["reverse_pruning_folded"] and not points["folded"]:
        raise qt.InvalidInput("--reverse-pruning-folded needs the gains that --folded keeps: give both")


Schedule = Literal["quartic", "quartic-only", "linear", "cosine", "step", "constant", "none"]

Preset = Literal["auto", "cpu", "gpu", "smoke"]

DatasetName = Literal[
    "cifar10", "cifar100", "fashion-mnist", "digits", "composed", "oxford-pet", "oxford-pet-128"
]

FREE_TO_CHANGE = {
    *("compare", "data_dir", "distributed", "out", "preset", "remat", "retries", "steps_per_dispatch")
}
"""Fields in which a relaunch may differ: they do not touch the numbers, save for rounding."""

QUARTIC_SHARE = 8 / 13
"""Share of the whole ramp that is quartic: from 20 % to 60 % of training, when it ends at 85 %."""

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "steps_per_dispatch"), (1, math.inf)),
    **dict.fromkeys(("reverse_pruning_every", "train_limit", "test_limit"), (1, math.inf)),
    "calibration_size": (1, math.inf),
    **dict.fromkeys(("learning_rate", "weight_decay"), (0, sys.float_info.max)),
    **dict.fromkeys(("momentum", "label_smoothing"), (0, 1)),
    **dict.fromkeys(("range_momentum", "reverse_pruning_start"), (0, 1)),
    "ema": (0, 1 - 1e-6),
    **dict.fromkeys(("weight_quantile", "activation_quantile"), (0.5, 1)),
    **dict.fromkeys(("bits", "activation_bits"), (2, 16)),
    "reverse_pruning_spread": (0, 0.99),
    **dict.fromkeys(("reestimate", "retries"), (0, math.inf)),
}
"""The least and the largest value of numeric fields; None, where a field takes it, is always allowed."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network with Quant-Trim and its float twin, export both, deploy both at low bits, compare.

    Relaunching the same command resumes; finished work is not redone.

    Example:
        python -m experiments.cifar --preset smoke --dataset digits
    """

    sched: Schedule = "quartic"
    """Lambda schedule. quartic: the paper's three phases (zero, quartic, quadratic, then one);
    quartic-only, linear, cosine: one ramp; step: a jump; constant: one throughout (plain QAT);
    none: no fake quantization (reverse pruning stays, unless that is None too)."""
    quantizer: Quantizer = "quant-trim"
    """Quantization-aware training. lsq: learned step sizes; pact: learned clips of activations; qwix:
    Google's Qwix at its defaults. These three go with --reverse-pruning None and --sched constant
    (lsq and pact also step: float first), and do not use the quantiles (save pact's signed inputs)."""
    preset: Preset = "auto"
    """Defaults for everything below; `--preset gpu --help` shows gpu's.
    auto: gpu where jax sees an accelerator, else cpu;
    smoke: every stage on a scrap of the data, in a minute or two."""
    compare: bool = True
    """Also train the float twin: same seed and budget, no fake quantization, no reverse pruning."""
    dataset: DatasetName = "cifar10"
    """Data set; the last three are of segmentation, for which the last models are."""
    data_dir: Path | None = None
    """Folder or archive that holds the data set; otherwise the cache, then a download."""
    out: Path | None = None
    """Folder of the run. Default: runs/DATASET-MODEL-SCHED-SEED (-smoke)."""
    seed: int = 0
    """Seeds the initial parameters, the order of the images and their augmentation."""
    fine_tune: Path | None = None
    """Start from the parameters and batch norm of a finished run's checkpoints, such as
    runs/RUN/checkpoints/float, in place of random ones. The budget is the same."""

    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(MODELS | SEGMENTERS) + "}")] = "fast"
    """Network."""
    epochs: int = 10
    """Passes over the training split."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float = 0.2
    """Peak learning rate of SGD with Nesterov momentum."""
    lr_schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    """one-cycle: linear up over a fifth of training, linear down to zero;
    cosine: 5 % warm-up, then cosine."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on kernels, and on the clips of pact."""
    label_smoothing: float = 0.1
    """Share of the label spread over all classes."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which is then evaluated and exported; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and statistics stay in float32."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, their gradients added up, to save memory.
    Batch norm and ranges are then of a part."""
    remat: bool = False
    """Keep only the outputs of convolutions and products for the backward pass, compute the rest again."""
    steps_per_dispatch: int = 1
    """Steps in one compiled loop. On CPUs keep 1: XLA runs convolutions inside a loop on one thread."""
    retries: int = 0
    """Times that a run whose loss diverges goes back to its last checkpoint, and on at half the rate."""
    distributed: str | None = None
    """One of several processes that train together: auto on TPU pods, Slurm and Open MPI, else
    ADDRESS:PORT,COUNT,INDEX, with the address of process 0. All share the folder of the run."""
    train_limit: int | None = None
    """Use only so many training images."""

    warmup: float = 0.2
    """Fraction of training before lambda leaves zero (for step: before it jumps)."""
    ramp_end: float = 0.85
    """Fraction of training at which lambda reaches one."""
    bits: int = 8
    """Width of the fake-quantized weights."""
    rules: tuple[str, ...] = ()
    """Exceptions, PATH=BITS or PATH=skip: PATH is a regular expression for the whole path of a layer, BITS
    the width of its weights, skip leaves it in floating point. The first match wins. --rules head=skip"""
    activation_bits: int = 8
    """Width of the fake-quantized activations."""
    sites: Literal["inputs", "outputs"] = "inputs"
    """Where activations are fake-quantized: at the inputs of layers, or at their outputs."""
    per_channel: bool = False
    """One weight scale per output channel when training."""
    folded: bool = False
    """Lay the weights' grids over the kernels as vendors fold them, with the gain of their batch norm."""
    fused_outputs: bool = False
    """Fake-quantize operands of residual sums, and other outputs that vendors requantize, too."""
    vendor_grids: bool = False
    """At every step a random weight grid of those that vendors use, with the largest weight as its end:
    per tensor or per channel, full or narrow range. Takes the place of --per-channel, --weight-quantile."""
    weight_quantile: float = 0.999
    """Upper quantile of |w| that sets a weight scale."""
    activation_quantile: float = 0.999
    """Upper quantile of an activation's range; the lower one is its complement."""
    range_momentum: float = 0.99
    """Momentum of the moving averages of the ranges."""
    reverse_pruning: float | None = 0.95
    """Quantile of |w| to which kernels are pulled back; None: off."""
    reverse_pruning_every: int = 50
    """Steps between two pulls."""
    reverse_pruning_start: float = 0.2
    """Fraction of training before the first pull."""
    reverse_pruning_folded: bool = False
    """Pull back the kernels as vendors fold them."""
    reverse_pruning_spread: float = 0.0
    """Share of the threshold over which the bounds of single weights are spread: no plateau of weights."""
    reestimate: int = 0
    """Training images, at least 500, on which batch norm is measured anew after the last step, in the
    float network; 0: the running averages of training."""

    calibration_size: int = 512
    """Training images with which the vendor's quantizer is calibrated."""
    test_limit: int | None = None
    """Use only so many test images."""

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
        names = ("sched", "reverse_pruning", "sites", "bits", "activation_bits")
        check_quantizer(self.quantizer, **{name: getattr(self, name) for name in names})
        names = ("folded", "fused_outputs", "vendor_grids", "reverse_pruning_folded")
        check_points(self.quantizer, self.sched, **{name: getattr(self, name) for name in names})
        if self.batch_size % self.accumulate:
            raise qt.InvalidInput(
                f"--batch-size {self.batch_size} is no multiple of --accumulate {self.accumulate}"
            )
        quant_config(self)  # these two refuse what makes no sense together
        lambda_schedule(self, 1)

    @property
    def directory(self) -> Path:
        """The folder of the run."""
        smoke = "-smoke" if self.preset == "smoke" else ""
        method = self.sched if self.quantizer == "quant-trim" else f"{self.quantizer}-{self.sched}"
        return self.out or Path("runs") / f"{self.dataset}-{self.model}-{method}-{self.seed}{smoke}"


def quant_config(config: Config) -> qt.QuantConfig:
    """What `qt.quant_trim` is given in training; for another quantizer, its grid in the same terms."""
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
    """The rule that `--rules` spells as PATH=BITS or PATH=skip."""
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
    if config.vendor_grids:
        return qt.QuantSpec(bits, axis=-1, quantile=1.0, grids="vendors")
    if config.quantizer == "lsq":  # the paper's grid, [-8, 7] on 4 bits
        return qt.QuantSpec(bits, axis=axis, narrow_range=False, quantile=1.0)
    quantile = 1.0 if config.quantizer == "pact" else config.weight_quantile
    return qt.QuantSpec(bits, axis=axis, quantile=quantile)


def lambda_schedule(config: Config, total_steps: int):
    """count -> lambda for `config.sched`."""
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
        model="resnet8",
        epochs=2,
        batch_size=64,
        train_limit=1280,
        calibration_size=64,
        test_limit=500,
        reverse_pruning_every=5,
    ),
}


def parse(
    arguments: list[str] | None = None,
    presets: Mapping[str, Config] = PRESETS,
    module: str = "experiments.cifar",
    about: str | None = None,
) -> Config:
    """The config of a command line: the preset's values, overridden by the flags given.

    `--distributed` connects the processes, before anything asks for devices.

    Raises:
      InvalidInput: an unknown preset, or processes that cannot be connected.
      SystemExit: an unknown flag or choice, or a value out of range (status 2), after tyro has printed what
        it takes instead; `--help` (status 0).
    """
    first = command_line.read_flags(_First, arguments, module, return_unknown_args=True, add_help=False)[0]
    if first.distributed is not None:
        devices.connect(first.distributed)
    preset = first.preset
    if preset == "auto":
        preset = "cpu" if jax.default_backend() == "cpu" else "gpu"
    if preset not in presets:
        raise qt.InvalidInput(f"--preset {preset!r} is unknown; choose auto or one of {', '.join(presets)}")
    return command_line.parse(Config, arguments, module, about=about, default=presets[preset])


@dataclasses.dataclass(frozen=True)
class _First:
    """What has to be known before JAX is asked for its devices."""

    preset: str = "auto"
    distributed: str | None = None


def float_twin(config: Config) -> Config:
    """The same run without Quant-Trim, or another quantizer."""
    return dataclasses.replace(
        config,
        sched="none",
        quantizer="quant-trim",
        reverse_pruning=None,
        folded=False,
        fused_outputs=False,
        vendor_grids=False,
        reverse_pruning_folded=False,
    )


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
