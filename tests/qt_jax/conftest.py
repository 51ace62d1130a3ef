"""Share nets around one step, variables as training leaves them, and graphs made by hand, among the tests."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qt_jax.export import to_onnx, verify
from qt_jax.export.graph import ORIGIN

SHAPE = (9, 8, 3)


class Exported(NamedTuple):
    """Hold a graph, the variables it was made from, the result of `verify`, and its inputs."""

    model: onnx.ModelProto
    variables: dict[str, Any]
    summary: dict[str, Any]
    inputs: tuple[np.ndarray, ...]

    @property
    def operators(self) -> dict[str, int]:
        return self.summary["operators"]


class Body(nn.Module):
    """Apply a 3x3 convolution to 4 channels, then `body`, a mean over height and width, and a head.

    The mean is left out where `body` leaves no height and width.
    """

    body: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.body(nn.Conv(4, (3, 3), padding=1, name="stem")(x))
        x = jnp.mean(x, axis=(1, 2)) if x.ndim == 4 else x
        return nn.Dense(5, name="head")(x)


def randomised(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Draw variables as training leaves them: no statistic, scale or bias is 0 or 1."""
    rng = np.random.default_rng(2)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kernel = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        values = kernel if len(leaf.shape) > 1 else rng.uniform(0.1, 1.5, leaf.shape)
        return values.astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(1), *inputs))


def draw_inputs(specs: list[Any], batch: int) -> tuple[np.ndarray, ...]:
    """Draw normal numbers for a shape, and whole numbers in [0, 8) for a spec of integers."""
    rng = np.random.default_rng(3)

    def draw(spec: Any) -> np.ndarray:
        shape, dtype = getattr(spec, "shape", spec), getattr(spec, "dtype", np.float32)
        if np.issubdtype(dtype, np.integer):
            return rng.integers(0, 8, (batch, *shape)).astype(dtype)
        return rng.normal(size=(batch, *shape)).astype(dtype)

    return tuple(draw(spec) for spec in specs)


def export(
    model: nn.Module,
    *specs: Any,
    batch_sizes: tuple[int, ...] = (1, 7),
    tolerance: float = 1e-4,
    **options: Any,
) -> Exported:
    """Call `to_onnx`, then `verify` in the same layout."""
    specs = specs or (SHAPE,)
    inputs = draw_inputs(specs, max(batch_sizes))
    variables = randomised(model, *inputs)
    given = specs[0] if len(specs) == 1 else list(specs)
    exported = to_onnx(model.apply, variables, given, check=False, **options)
    summary = verify(
        exported,
        model.apply,
        variables,
        inputs,
        batch_sizes=batch_sizes,
        tolerance=tolerance,
        layout=options.get("layout", "nchw"),
    )
    return Exported(exported, variables, summary, inputs)


def export_body(body: Callable[[jax.Array], jax.Array], *specs: Any, **options: Any) -> Exported:
    """Call `export` on a `Body`."""
    return export(Body(body), *specs, **options)


def build(
    nodes: list[tuple[str, str, str, dict]],
    constants: dict[str, Any],
    input_shape: list[int | str],
    output_rank: int = 2,
    opset: int = 17,
) -> onnx.ModelProto:
    """Make a model from `input` to `output`; a node is (operator, inputs, outputs, attributes).

    A constant that is called after a leaf (`params/stem/kernel`) stems from it.
    """
    made = [
        helper.make_node(operator, inputs.split(" ") if inputs else [], outputs.split(), **attributes)
        for operator, inputs, outputs, attributes in nodes
    ]
    described = [helper.make_tensor_value_info("input", TensorProto.FLOAT, input_shape)]
    output = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * output_rank)]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    for tensor in initializers:
        if tensor.name.startswith(("params/", "batch_stats/")):
            tensor.metadata_props.add(key=ORIGIN, value=tensor.name)
    graph = helper.make_graph(made, "main_graph", described, output, initializers)
    opsets = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(opsets)
    return helper.make_model(graph, opset_imports=opsets, ir_version=version)


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Compute the first output by onnxruntime, which leaves the graph as it is."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": images})[0]


def check_equal(before: onnx.ModelProto, after: onnx.ModelProto, images: np.ndarray) -> None:
    """Check that both graphs are valid and give the same numbers."""
    onnx.checker.check_model(after, full_check=True)
    found, wanted = (run(model, images) for model in (after, before))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="session", name="export")
def _export():
    return export


@pytest.fixture(scope="session", name="export_body")
def _export_body():
    return export_body


@pytest.fixture(scope="session", name="build")
def _build():
    return build


@pytest.fixture(scope="session", name="check_equal")
def _check_equal():
    return check_equal


@pytest.fixture(scope="module")
def nets(request, tmp_path_factory):
    """Write the module of a user's project, which can be imported while the tests of a file run.

    Its name is the `MODULE` of that file, and its content the `SOURCE`.
    """
    name, folder = request.module.MODULE, tmp_path_factory.mktemp("project")
    (folder / f"{name}.py").write_text(request.module.SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module(name)
        sys.modules.pop(name)
