"""The presets of the study: their tasks, the methods compared on each, and where each network is deployed.

- cpu: two CPU cores, small networks, short budgets, three seeds, or five. Hours: see
  experiments/results/paper-cpu.
- accelerator: one GPU or TPU, full networks, full budgets, five seeds. Hours; not run yet.
- smoke: every stage on a scrap of data, in minutes.
"""

import dataclasses

import qt_jax as qt
from experiments.configs.methods import BASELINES, METHODS
from experiments.configs.training import PRESETS, SEGMENTATION_PRESETS, Config


@dataclasses.dataclass(frozen=True)
class Target:
    """Schemes of one backend on one of its runtimes."""

    backend: str
    runtime: str
    schemes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and a network, and the methods that are compared on them.

    Attributes:
      name: of the task in records and tables.
      base: the config that methods change: data, network, budget, and else the published recipe.
      methods: names, see `methods_of`.
      main, ablation: where the rows of the main table and all others are deployed.
      replicated: methods that are trained with the preset's `more_seeds`, too.
    """

    name: str
    base: Config
    methods: tuple[str, ...]
    main: tuple[Target, ...]
    ablation: tuple[Target, ...]
    replicated: tuple[str, ...] = ()

    def targets(self, method: str) -> tuple[Target, ...]:
        """Where the network of this method is deployed."""
        return self.main if BASELINES in METHODS[method].tables else self.ablation


@dataclasses.dataclass(frozen=True)
class Preset:
    """A study.

    Attributes:
      name: of the preset; results go to `experiments/results/paper-<name>`.
      seeds: of training, the same for all methods of all tasks.
      more_seeds: for the methods that a task has replicated.
      factors: of the task's learning rate, which `--search` tries for each method.
      search_seed: of the search, not among `seeds`.
      pinned: a row computes on one core, and as many rows at a time as there are cores; else one at a time,
        on the whole machine.
      minutes: that one step of one deployment may take.
    """

    name: str
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    search_seed: int = 1000
    more_seeds: tuple[int, ...] = ()
    pinned: bool = True
    minutes: float = 20.0


def reduced(preset: Preset) -> Preset:
    """A preset on a scrap of its data, to see whether everything runs: its first seed, eight steps a row.

    >>> reduced(Preset("p", (), (0, 1))).name
    'p-reduced'
    """
    scrap = {"epochs": 1, "train_limit": 512, "batch_size": 64, "steps_per_dispatch": 1}
    scrap |= {"reverse_pruning_every": 2, "calibration_size": 32, "test_limit": 100}
    tasks = tuple(
        dataclasses.replace(task, base=dataclasses.replace(task.base, **scrap)) for task in preset.tasks
    )
    return dataclasses.replace(
        preset, name=f"{preset.name}-reduced", tasks=tasks, seeds=preset.seeds[:1], more_seeds=()
    )


def methods_of(*tables: str) -> tuple[str, ...]:
    """The names of the methods of any of these tables, in the order of the registry.

    >>> methods_of("main")[0]
    'float'
    """
    return tuple(name for name, method in METHODS.items() if set(tables) & set(method.tables))


WEIGHTS = ("int4w-pt-minmax", "int4w-pc-minmax", "int4w-narrow-pt-minmax", "int4w-narrow-pc-minmax")
CPU_MAIN = (
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
CPU_BASE = Config(preset="cpu", model="fast8", epochs=5)
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

CPU = Preset(
    name="cpu",
    tasks=(
        Task(
            "cifar10-fast8",
            CPU_BASE,
            tuple(METHODS),
            CPU_MAIN,
            ABLATION,
            ("float", "quant-trim", "recommended"),
        ),
        Task(
            "cifar10-mobilenetv2",
            dataclasses.replace(CPU_BASE, model="mobilenetv2-tiny"),
            DEPTHWISE,
            CPU_MAIN,
            ABLATION,
        ),
        Task(
            "cifar10-vit",
            dataclasses.replace(CPU_BASE, model="vit-tiny", learning_rate=0.05),
            COMPARED,
            CPU_MAIN,
            ABLATION,
        ),
        Task(
            "fashion-fast8",
            dataclasses.replace(CPU_BASE, dataset="fashion-mnist"),
            COMPARED,
            CPU_MAIN,
            ABLATION,
        ),
        Task("composed-unet", SEGMENTATION_PRESETS["cpu"], COMPARED, DENSE, DENSE),
    ),
    seeds=(0, 1, 2),
    more_seeds=(3, 4),
)

GPU_MAIN = (*CPU_MAIN, Target("tensorrt", "gpu", ("int8-pc-minmax",)))
GPU_BASE = PRESETS["gpu"]
BASELINE_METHODS = methods_of("main")
VIT = dataclasses.replace(GPU_BASE, model="vit", learning_rate=0.05, lr_schedule="cosine", epochs=120)

ACCELERATOR = Preset(
    name="accelerator",
    tasks=(
        Task("cifar10-resnet18", GPU_BASE, tuple(METHODS), GPU_MAIN, ABLATION),
        Task(
            "cifar10-mobilenetv2",
            dataclasses.replace(GPU_BASE, model="mobilenetv2"),
            BASELINE_METHODS,
            GPU_MAIN,
            ABLATION,
        ),
        Task("cifar10-vit", VIT, BASELINE_METHODS, GPU_MAIN, ABLATION),
        Task(
            "cifar100-resnet18",
            dataclasses.replace(GPU_BASE, dataset="cifar100"),
            BASELINE_METHODS,
            GPU_MAIN,
            ABLATION,
        ),
        Task("composed-unet", SEGMENTATION_PRESETS["gpu"], BASELINE_METHODS, DENSE, DENSE),
    ),
    seeds=(0, 1, 2, 3, 4),
    pinned=False,
)

SMOKE_TARGETS = (
    Target("onnxruntime", "reference", ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")),
)
SMOKE_BASE = Config(
    preset="cpu",
    dataset="digits",
    model="tiny",
    epochs=2,
    batch_size=64,
    train_limit=256,
    reverse_pruning_every=2,
    calibration_size=16,
    test_limit=100,
)

SMOKE = Preset(
    name="smoke",
    tasks=(
        Task(
            name="digits",
            base=SMOKE_BASE,
            methods=("float", "quant-trim", "recommended", "fine-tuned", "clips", "batch-norm"),
            main=SMOKE_TARGETS,
            ablation=SMOKE_TARGETS[:1],
        ),
    ),
    seeds=(0, 1),
    factors=(0.5, 1.0),
)

STUDIES = {
    "cpu": CPU,
    "accelerator": ACCELERATOR,
    "smoke": SMOKE,
    "accelerator-reduced": reduced(ACCELERATOR),
}


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
      InvalidInput: there is none.

    >>> preset("cpu").seeds
    (0, 1, 2)
    """
    if name not in STUDIES:
        raise qt.InvalidInput(f"--preset {name!r} is unknown; choose one of {', '.join(STUDIES)}")
    return STUDIES[name]
