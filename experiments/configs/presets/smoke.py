"""Every stage of the study on a scrap of data: `python -m experiments.paper --preset smoke`, minutes."""

from experiments.configs.cifar import Config
from experiments.configs.preset import Preset, Target, Task

TARGETS = (Target("onnxruntime", "reference", ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")),)
BASE = Config(
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

PRESET = Preset(
    name="smoke",
    tasks=(
        Task(
            name="digits",
            base=BASE,
            methods=("float", "quant-trim", "recommended", "fine-tuned", "clips", "batch-norm"),
            main=TARGETS,
            ablation=TARGETS[:1],
        ),
    ),
    seeds=(0, 1),
    factors=(0.5, 1.0),
)
