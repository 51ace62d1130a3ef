"""The study on two CPU cores: small networks, short budgets, three seeds, or five.

`python -m experiments.paper`. Hours: see experiments/results/paper-cpu.
"""

from dataclasses import replace

from experiments.configs import segmentation
from experiments.configs.cifar import Config
from experiments.configs.methods import METHODS
from experiments.configs.preset import Preset, Target, Task

WEIGHTS = ("int4w-pt-minmax", "int4w-pc-minmax", "int4w-narrow-pt-minmax", "int4w-narrow-pc-minmax")
MAIN = (
    Target(
        "onnxruntime",
        "reference",
        ("int8-pt-minmax", "int8-pc-minmax", "int8-pt-percentile", "int8-s8s8-pt-minmax", *WEIGHTS),
    ),
    Target(
        "openvino",
        "cpu",
        (
            *("int8-pc-sym-mean", "int4w-pt-sym-mean", "int4w-pt-sym-minmax-accurate"),
            *("int4w-pc-sym-mean", "int4w-pc-sym-minmax-accurate"),
        ),
    ),
    Target("litert", "xnnpack", ("int8-pt-minmax",)),
    Target("ryzen-ai", "onnxruntime", ("xint8", "mxfp4e2m1")),
    Target("sophgo", "cmodel", ("bm1688-w4int8",)),
)
ABLATION = (
    Target("onnxruntime", "reference", ("int8-pt-minmax", "int8-pc-minmax", *WEIGHTS)),
    Target("openvino", "cpu", ("int4w-pt-sym-minmax-accurate", "int4w-pc-sym-minmax-accurate")),
)
DENSE = (
    Target("onnxruntime", "reference", ("int8-pt-minmax", *WEIGHTS)),
    Target("openvino", "cpu", ("int4w-pt-sym-minmax-accurate", "int4w-pc-sym-minmax-accurate")),
)
BASE = Config(preset="cpu", model="fast8", epochs=5)
COMPARED = ("float", "qat-w4", "lsq-w4", "quant-trim", "recommended")
"""On the other tasks."""
DEPTHWISE = (
    *COMPARED,
    "folded",
    "recommended-raw",
    "recommended-fused",
    "clips",
    "batch-norm",
    "recommended-clips",
)
"""Where the published quantization points are weakest."""

PRESET = Preset(
    name="cpu",
    tasks=(
        Task("cifar10-fast8", BASE, tuple(METHODS), MAIN, ABLATION, ("float", "quant-trim", "recommended")),
        Task("cifar10-mobilenetv2", replace(BASE, model="mobilenetv2-tiny"), DEPTHWISE, MAIN, ABLATION),
        Task("cifar10-vit", replace(BASE, model="vit-tiny", learning_rate=0.05), COMPARED, MAIN, ABLATION),
        Task("fashion-fast8", replace(BASE, dataset="fashion-mnist"), COMPARED, MAIN, ABLATION),
        Task("composed-unet", segmentation.PRESETS["cpu"], COMPARED, DENSE, DENSE),
    ),
    seeds=(0, 1, 2),
    more_seeds=(3, 4),
)
