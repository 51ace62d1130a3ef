"""Check the networks: published sizes, plain Linen, float32 logits."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import models

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters, by path."""
    model = models.create(name, 10)
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()}


def he_et_al_parameters(n: int) -> int:
    """Count the parameters of the CIFAR ResNet with 6 n + 2 layers by hand: convolutions, batch norms, head.

    Shortcuts have no parameters, as in arXiv 1512.03385, section 4.2.
    """
    convolution = sum(9 * a * b for a, b in [(3, 16), *[(16, 16)] * 2 * n])
    convolution += sum(9 * a * b for a, b in [(16, 32), *[(32, 32)] * (2 * n - 1)])
    convolution += sum(9 * a * b for a, b in [(32, 64), *[(64, 64)] * (2 * n - 1)])
    batch_norm = 2 * (16 + 2 * n * (16 + 32 + 64))
    return convolution + batch_norm + 64 * 10 + 10


@pytest.mark.parametrize(("name", "n", "millions"), [("resnet20", 3, 0.27), ("resnet56", 9, 0.85)])
def test_resnets_have_the_published_size(name, n, millions):
    sizes = {path: np.prod(shape) for path, shape in shapes(name).items()}
    shortcuts = sum(size for path, size in sizes.items() if "shortcut" in path)
    assert sum(sizes.values()) - shortcuts == he_et_al_parameters(n)
    # Projections in place of zero padding: (16 x 32 + 32 x 64) weights and two batch norms.
    assert shortcuts == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(sizes.values()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("name", "depth"), [("resnet8", 8), ("resnet18", 18), ("resnet20", 20), ("resnet56", 56), ("fast", 9)]
)
def test_depth_counts_the_layers_with_a_kernel(name, depth):
    kernels = [path for path in shapes(name) if path.endswith("kernel") and "shortcut" not in path]
    assert len(kernels) == depth


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("classes", [10, 100])
def test_logits_are_float32_one_a_class(name, classes):
    model = models.create(name, classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    logits = jax.eval_shape(model.apply, variables, IMAGES)
    assert (logits.shape, logits.dtype) == ((2, classes), jnp.float32)


@pytest.mark.parametrize("name", models.MODELS)
def test_bfloat16_is_a_compute_type_alone(name):
    model = models.create(name, 10, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # Linen's own BatchNorm mixes the two types
        variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        logits, state = jax.eval_shape(
            lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"]),
            variables,
            IMAGES,
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert logits.dtype == jnp.float32
    assert state["intermediates"]["head"]["__call__"][0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["fast", "resnet8"])
@pytest.mark.parametrize("train", [False, True])
def test_running_statistics_move_in_training_alone(name, train):
    model = models.create(name, 10)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)

    def updated(variables, images):
        return model.apply(variables, images, train=train, mutable=["batch_stats"])[1]

    jaxpr = jax.make_jaxpr(updated)(variables, IMAGES).jaxpr
    passed_through = [statistic in jaxpr.invars for statistic in jaxpr.outvars]
    assert len(passed_through) == len(jax.tree.leaves(variables["batch_stats"]))
    assert not any(passed_through) if train else all(passed_through)


def test_networks_know_nothing_of_quantization():
    for path in Path(models.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "qt_jax" for name in names), path
