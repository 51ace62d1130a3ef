"""Export Linen models that others published, unchanged: `python -m experiments.third_party`.

They come from eleven repositories at pinned commits and from two packages of PyPI. Nothing of them is kept
here. `--help` shows the commands that fetch them.
"""

import dataclasses
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
from experiments.third_party_models import cases
from experiments.third_party_sources import Case
from qt_jax import records
from qt_jax.command_line import Failed, command
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
        clone() {
          git clone -q https://github.com/$1 SOURCES/${1#*/} && git -C SOURCES/${1#*/} checkout -q $2
        }
        clone google/flax 18f8f311c275d57f46d95e41b15aa97b454754c0
        clone google-research/vision_transformer c6de1e5378c9831a8477feb30994971bdc409e46
        clone google-research/big_vision 0127fb6b337ee2a27bf4e54dea79cff176527356
        clone google-research/nested-transformer 59c0d6aa1a0526fbca15507a172f3dc110f52a3c
        clone google-research/scenic 4a38d475ee89cb821078c0e2bf2065ee030e1535
        clone google-research/vmoe 942a78bc81d2e63199f0933733582ddae0715416
        clone DarshanDeshpande/jax-models 0d59f478fa00a456460e1b25d2594464e8861b6e
        clone matthias-wright/flaxmodels 09bc77215032375d124e3f1eba828dd89c80a850
        clone n2cholas/jax-resnet 5b00735aa0a68ec239af4a728ad4a596c1b551f6
        clone rwightman/efficientnet-jax 06d7ed6cdb252d191d262e0f50464451ee952200
        clone patil-suraj/vqgan-jax 10ef240f8ace869e437f3c32d14898f61512db12
        pip install --no-deps --target SOURCES/pip transformers==4.57.6 diffusers==0.35.2 \\
            huggingface_hub==0.36.2 tokenizers==0.22.2 safetensors==0.8.0 hf-xet==1.8.0 \\
            importlib_metadata==10.2.0 ml_collections==1.1.0 regex==2026.11.19 requests==2.34.2 \\
            urllib3==2.8.0 idna==3.20 charset-normalizer==3.5.3 h5py==3.16.0 dill==0.4.1
        python -m experiments.third_party --sources SOURCES
    """

    sources: Path
    """Folder that holds the repositories and the packages."""
    opsets: tuple[int, ...] = (13, 17, 21)
    """Versions of ai.onnx, 13 to 21."""
    only: str = ""
    """Export only models whose name contains this."""
    out: Path | None = None
    """File to which one JSON line per model and opset is appended."""


COMMITS = dict(re.findall(r"clone \S+/(\S+) ([0-9a-f]{40})", Options.__doc__ or ""))
"""Folder of each repository in the sources -> its commit."""


def measure(case: Case, opsets: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Export one model at each opset and compare it with JAX. A failure gives a row with the reason."""
    row: dict[str, Any] = {"model": case.name, "origin": _origin(case)}
    rng = np.random.default_rng(0)
    values = [each.draw(rng, max(BATCHES)) for each in case.inputs]
    try:
        model = case.build()
        single = [value[:1] for value in values]
        keys = dict.fromkeys(("params", "dropout", "drop_path"), jax.random.key(0))
        variables = _compiled(partial(_initial, model, case), keys, *single)
        variables = _without_constants(variables, rng)
        forward = partial(_forward, model, case)
        outputs = jax.tree.leaves(_compiled(forward, variables, *single))
        row["largest_output"] = max(float(abs(output).max()) for output in outputs)
    except Exception as error:  # third-party code may raise anything on this version of flax
        reason = f"{type(error).__name__}: {error}"[:300]
        yield from (row | {"opset": opset, "status": "not built", "reason": reason} for opset in opsets)
        return
    for opset in opsets:
        yield row | {"opset": opset} | _measure_opset(case, forward, variables, values, opset)


def _measure_opset(
    case: Case, forward: Callable[..., Any], variables: Any, values: list[jax.Array], opset: int
) -> dict[str, Any]:
    """Return what becomes of one model at one opset."""
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in case.inputs]
    row: dict[str, Any] = {"status": "ok"}
    start = time.perf_counter()
    try:
        graph = to_onnx(
            forward, variables, shapes if len(shapes) > 1 else shapes[0], opset=opset, layout=case.layout
        )
    except qt.InvalidInput as error:
        return row | {"status": "refused", "reason": FOLDERS.sub("", str(error))}
    except Exception as error:  # a defect of the export, which must not hide the other models
        reason = FOLDERS.sub("", f"{type(error).__name__}: {error}")[:600]
        return row | {"status": "crashed", "reason": reason}
    row |= {"seconds": time.perf_counter() - start, "nodes": len(graph.graph.node)}
    given = values if len(values) > 1 else values[0]
    try:
        return row | verify(graph, forward, variables, given, batch_sizes=BATCHES, layout=case.layout)
    except qt.InvalidInput as error:
        return row | {"status": "wrong", "reason": str(error)}


def _origin(case: Case) -> str:
    """Return the repository of a model and its commit."""
    folder = case.name.split()[0]
    return f"{folder}@{COMMITS[folder][:9]}" if folder in COMMITS else folder


def _compiled(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, compiled as a whole where it can be traced."""
    try:
        return jax.jit(call)(*arguments)
    except jax.errors.ConcretizationTypeError:
        return call(*arguments)


def _initial(model: nn.Module, case: Case, keys: Any, *values: jax.Array) -> Any:
    positional, named = _arguments(case, values)
    return model.init(keys, *positional, **named, **case.call)


def _without_constants(variables: Any, rng: np.random.Generator) -> Any:
    """Move the leaves that a model starts with alike, such as zeros, which would hide the layers behind."""

    def moved(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.size == 0 or leaf.min() < leaf.max():
            return leaf
        return leaf + jnp.asarray(rng.uniform(0.0, 0.2, leaf.shape), leaf.dtype)

    return jax.tree.map(moved, variables)


def _arguments(case: Case, values: Any) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Return the inputs that are given by place, and those that are given by keyword."""
    pairs = list(zip(case.inputs, values, strict=True))
    return [value for each, value in pairs if not each.name], {
        each.name: value for each, value in pairs if each.name
    }


def _forward(model: nn.Module, case: Case, variables: Any, *values: jax.Array) -> Any:
    positional, named = _arguments(case, values)
    return case.pick(model.apply(variables, *positional, **named, **case.call))


def run(options: Options, console: Console) -> None:
    """Export every chosen model, print the table, and append the records.

    Raises:
      Failed: An export ended in an exception that is not one of its refusals, or its numbers are wrong.
    """
    if not options.sources.is_dir():
        raise qt.InvalidInput(
            f"--sources {options.sources} is not a folder: fill one with the commands of --help"
        )
    sources = options.sources.resolve()
    sys.path.insert(0, str(sources / "pip"))
    sys.path.extend(str(sources / folder) for folder in COMMITS)
    table = Table(
        "model", "opset", "status", "nodes", "Transposes", "s", "largest difference", "of", "reason"
    )
    failed = []
    for row in (
        row for case in cases(sources) if options.only in case.name for row in measure(case, options.opsets)
    ):
        console.print(f"{row['model']}, opset {row['opset']}: {row['status']}")
        table.add_row(*_cells(row))
        if row["status"] in ("crashed", "wrong"):
            failed.append(f"{row['model']} at opset {row['opset']}")
        if options.out is not None:
            records.append(options.out, row | provenance(PACKAGES))
    console.print(table)
    if failed:
        raise Failed(f"the export crashed or its numbers are wrong: {', '.join(failed)}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row of the table."""
    ok = row["status"] == "ok"
    return (
        row["model"],
        str(row["opset"]),
        row["status"],
        str(row.get("nodes", "")),
        str(row["operators"].get("Transpose", 0)) if ok else "",
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{max(row['max_difference'].values()):.1e}" if ok else "",
        f"{row['largest_output']:.1e}" if ok else "",
        row.get("reason", "")[:200],
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does."""
    return command("experiments.third_party", Options, run, arguments, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
