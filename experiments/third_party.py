"""Export Linen models that others published, unchanged: `python -m experiments.third_party`.

They come from PyPI: three wheels of Linen models, and flax's own source distribution for its examples.
Nothing of them is kept here. `--help` shows the commands that fetch them.
"""

import dataclasses
import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import qt_jax as qt
from qt_jax import records
from qt_jax.command_line import command
from qt_jax.export import to_onnx, verify
from qt_jax.provenance import provenance

BATCHES = (1, 3)
FOLDERS = re.compile(r"/\S*/(?=\w+\.py)")
"""Matches the folders before a file's name. A record must not hold the paths of a machine."""
PACKAGES = ("jax", "flax", "jax2onnx", "onnx", "onnxruntime", "numpy")


@dataclasses.dataclass(frozen=True)
class Options:
    """Export Linen models of other authors and compare each with its JAX forward.

    Example:
        pip install --no-deps --target SOURCES flaxmodels==0.1.3 jax-resnet==0.0.4 jax-models==0.0.5 \\
            h5py==3.16.0 requests==2.34.2 regex==2026.11.15 dill==0.4.1 filelock==4.2.11
        pip download --no-deps --no-binary :all: --no-build-isolation flax==0.12.8 -d SOURCES
        tar xzf SOURCES/flax-0.12.8.tar.gz -C SOURCES
        python -m experiments.third_party --sources SOURCES
    """

    sources: Path
    """Folder that holds the packages."""
    opset: int = 17
    """Version of ai.onnx, 13 to 21."""
    only: str = ""
    """Export only models whose name contains this."""
    out: Path | None = None
    """File to which one JSON line per model is appended."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Describe one model: how to build it, what it takes, and how to call it.

    Attributes:
      name: Name of the model in the table.
      build: Returns the Linen module.
      shape: Shape of the input, without the batch.
      call: Keyword arguments of the call at inference.
      dtype: Type of the input.
      argument: Name of the input where the model takes it by keyword only; otherwise empty.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Any = jnp.float32
    argument: str = ""


def cases(sources: Path) -> list[Case]:
    """List the models, which are built on demand from the packages in `sources`."""

    def package(module: str, name: str, **arguments: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(importlib.import_module(module), name)(**arguments)

    def example(path: str) -> Any:
        file = sources / "flax-0.12.8" / "examples" / path / "models.py"
        spec = importlib.util.spec_from_file_location(f"flax_example_{path}", file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def text_model() -> nn.Module:
        module = example("nlp_seq")
        return module.Transformer(module.TransformerConfig(vocab_size=50, output_vocab_size=12, num_layers=2))

    inference, fixed, images = {"train": False}, {"deterministic": True}, (64, 64, 3)
    head = {"attach_head": True, "num_classes": 10}
    full = {"num_classes": 10, "dtype": jnp.float32}
    models = "jax_models.models"
    return [
        Case("flax imagenet ResNet18", lambda: example("imagenet").ResNet18(**full), images, inference),
        Case("flax imagenet ResNet50", lambda: example("imagenet").ResNet50(**full), images, inference),
        Case("flax ppo ActorCritic", lambda: example("ppo").ActorCritic(num_outputs=6), (84, 84, 4)),
        Case("flax vae Encoder", lambda: example("vae").Encoder(20), (784,)),
        Case("flax vae Decoder", lambda: example("vae").Decoder(), (20,)),
        Case("flax nlp_seq Transformer", text_model, (16,), inference, jnp.int32, "inputs"),
        Case("flaxmodels ResNet18", package("flaxmodels", "ResNet18", pretrained=None), images, inference),
        Case("flaxmodels VGG16", package("flaxmodels", "VGG16", pretrained=None), (224, 224, 3), inference),
        Case("jax-resnet ResNet18", package("jax_resnet", "ResNet18", n_classes=10), images),
        Case("jax-resnet ResNetD50", package("jax_resnet", "ResNetD50", n_classes=10), images),
        Case("jax-resnet ResNeSt50Fast", package("jax_resnet", "ResNeSt50Fast", n_classes=10), images),
        Case(
            "jax-models ConvMixer",
            package(f"{models}.conv_mixer", "ConvMixer", features=64, num_mixer_layers=2, **head),
            (56, 56, 3),
            fixed,
        ),
        Case(
            "jax-models ConvNeXt",
            package(f"{models}.convnext", "ConvNeXt", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), **head),
            images,
            fixed,
        ),
        Case(
            "jax-models MLPMixer",
            package(f"{models}.mlp_mixer", "MLPMixer", patch_size=8, hidden_size=32, **head),
            (32, 32, 3),
            fixed,
        ),
        Case("jax-models PoolFormer", package(f"{models}.poolformer", "S12", **head), images, fixed),
        Case(
            "jax-models Swin",
            package(
                f"{models}.swin_transformer",
                "SwinTransformer",
                emb_dim=24,
                depths=(2, 2),
                num_heads=(2, 4),
                window_size=4,
                **head,
            ),
            images,
            fixed,
        ),
        Case(
            "jax-models SegFormer-B0", package(f"{models}.segformer", "segformer_b0", **head), images, fixed
        ),
    ]


def measure(case: Case, opset: int) -> dict[str, Any]:
    """Export one model and compare it with JAX. A model that fails gives a row with the reason."""
    row: dict[str, Any] = {"model": case.name, "opset": opset, "status": "ok"}
    rng = np.random.default_rng(0)
    largest = (max(BATCHES), *case.shape)
    x = rng.uniform(size=largest) if case.dtype == jnp.float32 else rng.integers(1, 40, largest)
    x = jnp.asarray(x, case.dtype)
    try:
        model = case.build()
        forward = partial(_forward, model, case)
        keys = dict.fromkeys(("params", "dropout", "drop_path"), jax.random.key(0))
        variables = model.init(keys, *_positional(case, x), **_keywords(case, x), **case.call)
    except Exception as error:  # third-party code may raise anything on this version of flax
        return row | {"status": "not built", "reason": f"{type(error).__name__}: {error}"[:300]}
    start = time.perf_counter()
    try:
        graph = to_onnx(forward, variables, jax.ShapeDtypeStruct(case.shape, case.dtype), opset=opset)
        row |= {"seconds": time.perf_counter() - start, "nodes": len(graph.graph.node)}
        return row | verify(graph, forward, variables, x, batch_sizes=BATCHES)
    except qt.InvalidInput as error:
        return row | {"status": "refused", "reason": FOLDERS.sub("", str(error))}


def _positional(case: Case, x: jax.Array) -> tuple[jax.Array, ...]:
    return () if case.argument else (x,)


def _keywords(case: Case, x: jax.Array) -> dict[str, jax.Array]:
    return {case.argument: x} if case.argument else {}


def _forward(model: nn.Module, case: Case, variables: dict[str, Any], x: jax.Array) -> Any:
    return model.apply(variables, *_positional(case, x), **_keywords(case, x), **case.call)


def run(options: Options, console: Console) -> None:
    """Export every chosen model, print the table, and append the records."""
    if not options.sources.is_dir():
        raise qt.InvalidInput(
            f"--sources {options.sources} is not a folder: fill one with the commands of --help"
        )
    sys.path.append(str(options.sources))
    table = Table("model", "nodes", "operators", "largest difference", "s")
    for row in _rows(options):
        console.print(f"{row['model']}: {row['status']}")
        shown = row.get("reason", "")[:200] or ", ".join(
            f"{n} {name}" for name, n in row["operators"].items()
        )
        difference = f"{max(row['max_difference'].values()):.1e}" if row["status"] == "ok" else row["status"]
        nodes, seconds = row.get("nodes"), row.get("seconds")
        table.add_row(
            row["model"],
            "" if nodes is None else str(nodes),
            shown,
            difference,
            "" if seconds is None else f"{seconds:.1f}",
        )
        if options.out is not None:
            records.append(options.out, row | provenance(PACKAGES))
    console.print(table)


def _rows(options: Options) -> Iterator[dict[str, Any]]:
    for case in cases(options.sources):
        if options.only in case.name:
            yield measure(case, options.opset)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does."""
    return command("experiments.third_party", Options, run, arguments, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
