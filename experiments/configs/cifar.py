"""Everything `python -m experiments.cifar` can be told, and the presets it starts from."""

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import qt_jax as qt
from experiments.models import MODELS

Schedule = Literal["quartic", "quartic-only", "linear", "cosine", "step", "constant", "none"]
Preset = Literal["auto", "cpu", "gpu", "smoke"]

FREE_TO_CHANGE = {"compare", "data_dir", "out", "preset", "steps_per_dispatch"}
"""Fields in which a relaunch may differ: they do not touch the numbers, save for rounding."""

QUARTIC_SHARE = 8 / 13
"""Share of the whole ramp that is quartic: from 20 % to 60 % of training, when it ends at 85 %."""

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    **dict.fromkeys(("epochs", "batch_size", "steps_per_dispatch", "reverse_pruning_every"), (1, math.inf)),
    **dict.fromkeys(("train_limit", "test_limit", "calibration_size"), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay"), (0, sys.float_info.max)),
    **dict.fromkeys(("momentum", "label_smoothing"), (0, 1)),
    **dict.fromkeys(("range_momentum", "reverse_pruning_start"), (0, 1)),
    "ema": (0, 1 - 1e-6),
    **dict.fromkeys(("weight_quantile", "activation_quantile"), (0.5, 1)),
    **dict.fromkeys(("bits", "activation_bits"), (2, 16)),
}
"""The least and the largest value of numeric fields; None, where a field takes it, is always allowed."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network with Quant-Trim and its float twin, export both, deploy both at low bits, compare.

    Relaunching the same command resumes; finished work is not redone.
    """

    sched: Schedule = "quartic"
    """Lambda schedule. quartic: the paper's three phases (zero, quartic, quadratic, then one);
    quartic-only, linear, cosine: one ramp; step: a jump; constant: one throughout (plain QAT);
    none: no fake quantization (reverse pruning stays, unless that is None too)."""
    preset: Preset = "auto"
    """Defaults for everything below; `--preset gpu --help` shows gpu's.
    auto: gpu where jax sees an accelerator, else cpu;
    smoke: every stage on a scrap of the data, in a minute or two."""
    compare: bool = True
    """Also train the float twin: same seed and budget, no fake quantization, no reverse pruning."""
    dataset: Literal["cifar10", "cifar100", "fashion-mnist", "digits"] = "cifar10"
    """Data set."""
    data_dir: Path | None = None
    """Folder or archive that holds the data set; otherwise the cache, then a download."""
    out: Path | None = None
    """Folder of the run. Default: runs/DATASET-MODEL-SCHED-SEED (-smoke)."""
    seed: int = 0
    """Seeds the initial parameters, the order of the images and their augmentation."""

    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(MODELS) + "}")] = "fast"
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
    """L2 penalty on kernels."""
    label_smoothing: float = 0.1
    """Share of the label spread over all classes."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which is then evaluated and exported; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and statistics stay in float32."""
    steps_per_dispatch: int = 1
    """Steps in one compiled loop. On CPUs keep 1: XLA runs convolutions inside a loop on one thread."""
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
    per_channel: bool = False
    """One weight scale per output channel when training."""
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

    calibration_size: int = 512
    """Training images with which the vendor's quantizer is calibrated."""
    test_limit: int | None = None
    """Use only so many test images."""

    def __post_init__(self):
        if self.model not in MODELS:
            raise qt.InvalidInput(f"--model {self.model!r} is unknown; choose one of {', '.join(MODELS)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limits = f"at least {low}" if high >= sys.float_info.max else f"from {low} to {high}"
                raise qt.InvalidInput(f"--{name.replace('_', '-')} must be {limits}, got {value}")
        if self.reverse_pruning is not None and not 0.0 < self.reverse_pruning <= 1.0:
            raise qt.InvalidInput("--reverse-pruning must lie in (0, 1], or be None to switch it off")
        quant_config(self)  # these two refuse what makes no sense together
        lambda_schedule(self, 1)

    @property
    def directory(self) -> Path:
        """The folder of the run."""
        smoke = "-smoke" if self.preset == "smoke" else ""
        return self.out or Path("runs") / f"{self.dataset}-{self.model}-{self.sched}-{self.seed}{smoke}"


def quant_config(config: Config) -> qt.QuantConfig:
    """What `qt.quant_trim` is given in training."""
    return qt.QuantConfig(
        weights=_weights(config, config.bits),
        activations=qt.QuantSpec(
            config.activation_bits, symmetric=False, quantile=config.activation_quantile
        ),
        rules=tuple(_rule(text, config) for text in config.rules),
        momentum=config.range_momentum,
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
    return qt.QuantSpec(bits, axis=-1 if config.per_channel else None, quantile=config.weight_quantile)


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


def parse(arguments: list[str] | None = None) -> Config:
    """The config of a command line: the preset's values, overridden by the flags given.

    Raises:
      InvalidInput: an unknown preset.
      SystemExit: an unknown flag or choice, or a value out of range (status 2), after tyro has printed what
        it takes instead; `--help` (status 0).
    """
    preset = tyro.cli(_PresetOnly, args=arguments, return_unknown_args=True, add_help=False)[0].preset
    if preset == "auto":
        preset = "cpu" if jax.default_backend() == "cpu" else "gpu"
    if preset not in PRESETS:
        raise qt.InvalidInput(f"--preset {preset!r} is unknown; choose auto or one of {', '.join(PRESETS)}")
    return tyro.cli(Config, args=arguments, default=PRESETS[preset], prog="python -m experiments.cifar")


@dataclasses.dataclass(frozen=True)
class _PresetOnly:
    preset: str = "auto"


def float_twin(config: Config) -> Config:
    """The same run without Quant-Trim."""
    return dataclasses.replace(config, sched="none", reverse_pruning=None)
