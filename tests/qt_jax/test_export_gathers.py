"""Check entries that are taken by indices, one set for each image, against JAX: equal numbers, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.export import to_onnx, verify

OPSETS = (13, 17, 21)


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def numbers(x):
    return jnp.arange(x.shape[0])


def right(forward, shapes, low, high, opsets=OPSETS, seed=0):
    """Export `forward(x, *indices)` at every opset and compare; return the operators of the last graph."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, *shapes[0])).astype(np.float32)
    indices = [rng.integers(low, high, (3, *shape)).astype(np.int32) for shape in shapes[1:]]
    specs = [jax.ShapeDtypeStruct(shapes[0], np.float32)]
    specs += [jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes[1:]]

    def apply(_, *arrays):
        return forward(*arrays)

    given, shape = ([x, *indices], specs) if indices else (x, specs[0])
    for opset in opsets:
        model = to_onnx(apply, {}, shape, opset=opset, layout="nhwc")
        verify(model, apply, {}, given, batch_sizes=(1, 3), tolerance=0, layout="nhwc")
    return [node.op_type for node in model.graph.node]


UPPER = np.triu_indices(4, 1)
TAKEN = {
    "one of each image": (lambda x, i: x[numbers(x), i], [(5, 4), ()]),
    "one, numbered by numpy": (lambda x, i: x[np.arange(x.shape[0]), i], [(5, 4), ()]),
    "several of each image": (lambda x, i: x[numbers(x)[:, None], i], [(5, 4), (3,)]),
    "at the largest": (lambda x, i: x[numbers(x), i.argmax(-1)], [(5, 4), (5,)]),
    "of the last axis": (lambda x, i: x[numbers(x), :, i], [(3, 5), ()]),
    "along two axes": (lambda x, i, j: x[numbers(x), i, j], [(5, 6, 2), (), ()]),
    "along two axes behind a whole one": (
        lambda x, i, j: x[numbers(x)[:, None], :, i, j],
        [(2, 5, 6), (3,), (3,)],
    ),
    "of a table along two axes": (lambda x, i, j: jnp.eye(5, 6)[i, j] + x, [(), (), ()]),
    "by vmap": (lambda x, i: jax.vmap(lambda a, j: a[j])(x, i), [(5, 4), ()]),
    "by vmap of two axes": (lambda x, i: jax.vmap(jax.vmap(lambda a, j: a[j]))(x, i), [(2, 5, 3), (2,)]),
    "by vmap, channels": (lambda x, i: jax.vmap(lambda a, j: a[:, j])(x, i), [(3, 5), (2,)]),
    "along the axis, for one channel": (lambda x, i: jnp.take_along_axis(x, i[..., None], 1), [(5, 4), (2,)]),
    "at the sorted places": (
        lambda x, i: jnp.take_along_axis(x, jnp.broadcast_to(jnp.array([2, 0, 1]), (x.shape[0], 3)), 1),
        [(4,), ()],
    ),
    "a grid of known places": (lambda x: x[np.ix_(np.arange(x.shape[0]), [0, 2], [1, 3])], [(4, 4)]),
    "the upper triangle": (lambda x: x[:, UPPER[0], UPPER[1]], [(4, 4, 3)]),
    "a known row of known entries": (lambda x: x[:, [0, 3, 1], 2], [(4, 4)]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_entries_of_each_image(name):
    forward, shapes = TAKEN[name]
    right(forward, shapes, -5, 5)


@pytest.mark.parametrize("seed", range(12))
def test_along_any_axis_of_any_shape(seed):
    """`take_along_axis` of random shapes, along a random axis, with sizes of 1 that are repeated."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(2, 6, rng.integers(1, 4)))
    axis = int(rng.integers(len(shape)))
    places = [1 if rng.random() < 0.3 and at != axis else size for at, size in enumerate(shape)]
    places[axis] = int(rng.integers(1, 7))
    size, mode = shape[axis], ("clip", "fill", "promise_in_bounds")[seed % 3]
    low, high = {"clip": (-2 * size, 2 * size), "fill": (-size, size), "promise_in_bounds": (0, size)}[mode]
    right(
        lambda x, i: jnp.take_along_axis(x, i, axis + 1, mode=mode),
        [shape, tuple(places)],
        low,
        high,
        opsets=(13, 21),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(12))
def test_slices_at_a_place_of_each_image(seed):
    """Slices of random sizes and axes, one place for each image. JAX moves those beyond the ends inside."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(2, 6, rng.integers(1, 4)))
    axis = int(rng.integers(len(shape)))
    width = int(rng.integers(1, shape[axis] + 1))

    def cut(x, i):
        return jax.vmap(lambda a, start: jax.lax.dynamic_slice_in_dim(a, start, width, axis))(x, i)

    right(cut, [shape, ()], -8, 8, opsets=(13, 21), seed=seed)


def test_infinities_beside_the_entry_do_not_matter():
    def forward(x, i):
        return jnp.where(x > 0, x, -jnp.inf)[numbers(x), jnp.argmax(x, -1)] + i

    right(forward, [(5,), ()], 0, 1)


def test_integers_are_taken_too():
    right(lambda x, i: jnp.take_along_axis(i, i, 1) + x[:, None].astype(jnp.int32), [(), (5,)], 0, 5)


def test_what_lies_outside_is_an_error_of_the_runtime():
    def apply(_, x, i):
        return x[numbers(x), i]

    specs = [jax.ShapeDtypeStruct((5, 4), np.float32), jax.ShapeDtypeStruct((), np.int32)]
    session = onnxruntime.InferenceSession(to_onnx(apply, {}, specs).SerializeToString())
    with pytest.raises(Exception, match=r"out of bounds|invalid"):
        session.run(None, {"input_0": np.zeros((1, 5, 4), np.float32), "input_1": np.int32([7])})


ORDINARY = jax.ShapeDtypeStruct((5,), np.int32)
REFUSED = {
    "filled up": (
        lambda i: i.at[numbers(i), i[:, 0]].get(mode="fill", fill_value=0, wrap_negative_indices=False),
        "may lie outside",
    ),
    "entries of the batch": (lambda i: i[i[:, 0]], "batch"),
    "the batch from behind": (lambda i: i[numbers(i) - 1], "batch size"),
    "numbered from the batch on": (lambda i: i + (numbers(i) + i.shape[0])[:, None], "batch size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_say_is_refused(name):
    body, says = REFUSED[name]
    with pytest.raises(InvalidInput, match=says):
        to_onnx(lambda _, i: body(i), {}, ORDINARY)


def test_remainders_and_the_smallest():
    """Other steps that make indices: remainders of whole numbers, and the place of the smallest."""
    right(lambda x, i: (i % 4 + i % jnp.array([3, -5, 7])) * 1.0 + x[:, None], [(), (3,)], -20, 20)
    right(lambda x, i: i.argmin(-1) + x.argmin(-1), [(5,), (4,)], -20, 20)
    right(lambda x, i: (i > 0).argmax(-1) + (i > 0).argmin(-1), [(5,), (4,)], -20, 20)
    right(lambda x, i: i.astype(jnp.uint8).argmin(-1), [(5,), (4,)], 0, 20)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32])
def test_indices_of_other_whole_numbers(dtype):
    """ONNX takes no indices but of 32 and 64 bits with a sign."""

    def clipped(_, i):
        return jnp.take(jnp.arange(600.0).reshape(200, 3), i, axis=0, mode="clip")

    indices = np.random.default_rng(0).integers(0, 120, (3, 5)).astype(dtype)
    model = to_onnx(clipped, {}, jax.ShapeDtypeStruct((5,), dtype))
    verify(model, clipped, {}, indices, batch_sizes=(1, 3))
