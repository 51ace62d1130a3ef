"""Check scatters at known places, such as `x.at[:, 0].set(y)`, in onnxruntime against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify

SHAPE = (4, 5, 3)
PLACES = {
    "entry": np.s_[:, 1],
    "from the end": np.s_[:, -1],
    "block": np.s_[:, 1:3],
    "everything": np.s_[:, :],
    "blocks of two axes": np.s_[:, 1:3, 2:],
    "block and entry": np.s_[:, 1:3, :, 0],
    "entries": np.s_[:, np.array([3, 0])],
    "entries of the last axis": np.s_[..., np.array([2, 0])],
    "all entries": np.s_[:, np.array([2, 0, 3, 1])],
    "rows of a table": np.s_[:, np.array([[3, 0], [1, 2]])],
    "steps": np.s_[:, ::2],
}


def check(forward, shape=SHAPE, opset=17, dtype=np.float32):
    def apply(variables, x):
        return forward(x)

    drawn = np.random.default_rng(0).normal(scale=3.0, size=(3, *shape))
    graph = to_onnx(apply, {}, jax.ShapeDtypeStruct(shape, dtype), opset=opset)
    verify(graph, apply, {}, drawn.astype(dtype), batch_sizes=(1, 3))
    return [node.op_type for node in graph.graph.node]


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("change", ["set", "add", "multiply"])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_places_that_are_known(places, change, opset):
    def forward(x):
        return getattr(x.at[places], change)(jnp.cos(x[places]))

    def numbers(x):
        return x + getattr(x.at[places], change)(2.5)

    def in_ones(x):
        return getattr(jnp.ones((len(x), 4, 5, 3)).at[places], change)(x[places])

    for each in (forward, numbers, in_ones):
        check(each, opset=opset)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
@pytest.mark.parametrize("places", [np.s_[:, 1], np.s_[:, np.array([3, 0])]])
def test_other_types(places, dtype):
    def forward(x):
        changed = x.at[places].set(~x[places] if dtype == np.bool_ else -7)
        return changed.astype(jnp.int32)

    check(forward, dtype=dtype)


def test_a_token_that_is_shifted_in_is_one_pad():
    """The inputs of a decoder are made so."""

    def shifted(x):
        return jnp.zeros_like(x).at[:, 1:].set(x[:, :-1]).at[:, 0].set(9.0)

    assert check(shifted, (6, 2)) == ["Slice", "Pad", "Where"]


def test_a_changed_entry_of_another_leading_axis():
    check(lambda x: jnp.moveaxis(jnp.moveaxis(x, 0, 1).at[1].set(0.5), 1, 0))


def test_dynamic_update_slice_clamps_its_place():
    check(lambda x: jax.lax.dynamic_update_slice(jnp.ones((len(x), 8, 5, 3)), x, (0, 6, 0, 0)))


def test_places_beyond_the_end_are_clipped_where_jax_clips_them():
    check(lambda x: x.at[:, np.array([7])].set(0.0, mode="clip"))


REFUSED = {
    "places beyond the end": (lambda x: x.at[:, np.array([1, 7])].set(0.0), "beyond the end"),
    "one place twice": (lambda x: x.at[:, np.array([1, 1])].add(1.0), "twice"),
    "several axes": (lambda x: x.at[:, np.array([0, 1]), np.array([1, 2])].set(0.0), "several axes"),
    "a place that is computed": (
        lambda x: x.at[:, jnp.argmax(x[0, :, 0, 0])].set(0.0),
        "depend on its inputs",
    ),
    "a slice whose place is computed": (
        lambda x: jax.lax.dynamic_update_slice(x, x[:, :2], (0, jnp.argmax(x[0, :, 0, 0]), 0, 0)),
        "depends on its inputs",
    ),
    "the first input": (lambda x: x.at[0].set(0.0), "part of the batch"),
}


@pytest.mark.parametrize(("forward", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(forward, message):
    with pytest.raises(InvalidInput, match=message):
        check(forward)
