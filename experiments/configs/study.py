"""Define the presets of the study: their tasks, the methods compared on each, and the deployments.

- cpu: two CPU cores, small networks, short budgets, three or five seeds. It takes hours; the results are in
  experiments/results/paper-cpu.
- accelerator: one GPU or TPU, full networks, full budgets, five seeds. It takes hours and was not run yet.
- smoke: every stage on a scrap of data, in minutes.
- accelerator-reduced: the rows of accelerator on a scrap of the data.
"""

import dataclasses

import qt_jax as qt
from experiments.configs.methods import BASELINES, METHODS
from experiments.configs.training import PRESETS, SEGMENTATION_PRESETS, Config


@dataclasses.dataclass(frozen=True)
class Target:
    """Name the schemes of one backend on one of its runtimes."""

    backend: str
    runtime: str
    schemes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Describe a data set, a network, and the methods that are compared on them.

    Attributes:
      name: Name of the task in records and tables.
      base: The config that methods change: data, network, budget, and otherwise the published recipe.
      methods: Names of methods, see `methods_of`.
      main: Where the rows of the main table are deployed.
      ablation: Where all other rows are deployed.
      replicated: Methods that are also trained with the preset's `more_seeds`.
    """

    name: str
    base: Config
    methods: tuple[str, ...]
    main: tuple[Target, ...]
    ablation: tuple[Target, ...]
    replicated: tuple[str, ...] = ()

    def targets(self, method: str) -> tuple[Target, ...]:
        """Return where the network of a method is deployed."""
        return self.main if BASELINES in METHODS[method].tables else self.ablation


@dataclasses.dataclass(frozen=True)
class Preset:
    """Describe a study.

    Attributes:
      name: Name of the preset. Its results go to `experiments/results/paper-<name>`.
      tasks: The tasks.
      seeds: Seeds of training, the same for all methods of all tasks.
      factors: Factors of the task's learning rate, which `--search` tries for each method.
      search_seed: Seed of the search, which is not among `seeds`.
      more_seeds: Further seeds for the methods that a task replicates.
      pinned: True: a row computes on one core, and as many rows run at a time as there are cores. False: one
        row runs at a time, on the whole machine.
      minutes: Time limit of one step of one deployment.
    """

    name: str
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    search_seed: int = 1000
    more_seeds: tuple[int, ...] = ()
    pinned: bool = True
    minutes: float = 20.0


def preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
      InvalidInput: No preset has this name.

    >>> preset("cpu").seeds
    (0, 1, 2)
    """
    if name not in STUDIES:
        raise qt.InvalidInput(f"--preset {name!r} is unknown; choose one of {', '.join(STUDIES)}")
    return STUDIES[name]


def methods_of(*tables: str) -> tuple[str, ...]:
    """Return the names of the methods of any of these tables, in the order of `METHODS`.

    >>> methods_of("main")[0]
    'float'
    """
    return tuple(name for name, method in METHODS.items() if set(tables) & set(method.tables))


def reduced(preset: Preset) -> Preset:
    """Return a preset that checks that everything runs: the first seed, eight steps per row, little data.

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


# Deployments.

INT4_WEIGHTS = ("int4w-pt-minmax", "int4w-pc-minmax", "int4w-narrow-pt-minmax", "int4w-narrow-pc-minmax")

OPENVINO_INT4 = Target("openvino", "cpu", ("int4w-pt-sym-minmax-accurate", "int4w-pc-sym-minmax-accurate"))

MAIN = (
    Target(
        "onnxruntime",
        "reference",
        ("int8-pt-minmax", "int8-pc-minmax", "int8-pt-percentile", "int8-s8s8-pt-minmax", *INT4_WEIGHTS),
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
"""Deployments of classifiers in the main table."""

GPU_MAIN = (*MAIN, Target("tensorrt", "gpu", ("int8-pc-minmax",)))
"""Deployments of classifiers in the main table on a machine with a GPU."""

ABLATION = (
    Target("onnxruntime", "reference", ("int8-pt-minmax", "int8-pc-minmax", *INT4_WEIGHTS)),
    OPENVINO_INT4,
)
"""Deployments of classifiers in all other tables."""

DENSE = (Target("onnxruntime", "reference", ("int8-pt-minmax", *INT4_WEIGHTS)), OPENVINO_INT4)
"""Deployments of segmentation networks."""

SMOKE_TARGETS = (
    Target("onnxruntime", "reference", ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")),
)

# Presets.

FEW_METHODS = ("float", "qat-w4", "lsq-w4", "quant-trim", "recommended")
"""Methods that the preset cpu compares on tasks other than its first."""

DEPTHWISE_METHODS = (
    *FEW_METHODS,
    "folded",
    "recommended-raw",
    "recommended-fused",
    "clips",
    "batch-norm",
    "recommended-clips",
)
"""Methods on depthwise convolutions, where the published quantization points are weakest."""

CPU_BASE = Config(preset="cpu", model="fast8", epochs=5)
CPU = Preset(
    name="cpu",
    tasks=(
        Task(
            name="cifar10-fast8",
            base=CPU_BASE,
            methods=tuple(METHODS),
            main=MAIN,
            ablation=ABLATION,
            replicated=("float", "quant-trim", "recommended"),
        ),
        Task(
            name="cifar10-mobilenetv2",
            base=dataclasses.replace(CPU_BASE, model="mobilenetv2-tiny"),
            methods=DEPTHWISE_METHODS,
            main=MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar10-vit",
            base=dataclasses.replace(CPU_BASE, model="vit-tiny", learning_rate=0.05),
            methods=FEW_METHODS,
            main=MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="fashion-fast8",
            base=dataclasses.replace(CPU_BASE, dataset="fashion-mnist"),
            methods=FEW_METHODS,
            main=MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="composed-unet",
            base=SEGMENTATION_PRESETS["cpu"],
            methods=FEW_METHODS,
            main=DENSE,
            ablation=DENSE,
        ),
    ),
    seeds=(0, 1, 2),
    more_seeds=(3, 4),
)

GPU_BASE = PRESETS["gpu"]
MAIN_METHODS = methods_of(BASELINES)
ACCELERATOR = Preset(
    name="accelerator",
    tasks=(
        Task(
            name="cifar10-resnet18",
            base=GPU_BASE,
            methods=tuple(METHODS),
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar10-mobilenetv2",
            base=dataclasses.replace(GPU_BASE, model="mobilenetv2"),
            methods=MAIN_METHODS,
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar10-vit",
            base=dataclasses.replace(
                GPU_BASE, model="vit", learning_rate=0.05, lr_schedule="cosine", epochs=120
            ),
            methods=MAIN_METHODS,
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar100-resnet18",
            base=dataclasses.replace(GPU_BASE, dataset="cifar100"),
            methods=MAIN_METHODS,
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="composed-unet",
            base=SEGMENTATION_PRESETS["gpu"],
            methods=MAIN_METHODS,
            main=DENSE,
            ablation=DENSE,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    pinned=False,
)

SMOKE = Preset(
    name="smoke",
    tasks=(
        Task(
            name="digits",
            base=Config(
                preset="cpu",
                dataset="digits",
                model="tiny",
                epochs=2,
                batch_size=64,
                train_limit=256,
                reverse_pruning_every=2,
                calibration_size=16,
                test_limit=100,
            ),
            methods=("float", "quant-trim", "recommended", "fine-tuned", "clips", "batch-norm"),
            main=SMOKE_TARGETS,
            ablation=SMOKE_TARGETS,
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
"""Maps the name of a preset, as on the command line, to the preset."""
