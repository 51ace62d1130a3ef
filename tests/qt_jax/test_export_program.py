"""Check what is known of the values of a program: their numbers, their leaf, and whether it was moved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.export.emission import emit
from qt_jax.export.program import by_rows, leaves_of, packed_rows, read, walk

KERNEL = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)


def program(forward, variables, *shapes):
    """Read the program of `forward(variables, *inputs)`."""
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read(jax.make_jaxpr(forward)(variables, *specs), leaves_of(variables), lambda value: value)


@pytest.mark.parametrize(
    ("transform", "origin", "moved"),
    [
        (lambda k: k, "params/k", True),
        (lambda k: k.transpose(1, 0, 2), "params/k", True),
        (lambda k: jnp.flip(k, 0).reshape(27)[:, None], "params/k", True),
        (lambda k: k[1], "params/k", False),
        (lambda k: k * 2.0, "params/k", False),
        (lambda k: k - k.mean(), "params/k", False),
        (lambda k: jnp.broadcast_to(k[None], (2, 3, 3, 3)), "params/k", False),
        (lambda k: k.astype(jnp.bfloat16).astype(jnp.float32), "params/k", False),
        (lambda k: k.astype(jnp.int8).astype(jnp.float32), "params/k", False),
        (lambda k: jnp.ones_like(k), "", False),
    ],
)
def test_a_known_value_remembers_its_leaf(transform, origin, moved):
    variables = {"params": {"k": KERNEL}}
    with jax.numpy_rank_promotion("allow"):
        _, (output,) = program(lambda v, x: x.sum() + transform(v["params"]["k"]), variables, (2,))
    (known,) = [x for x in output.operands if x.known is not None]
    assert (known.origin, known.moved) == (origin, moved)
    np.testing.assert_allclose(known.known, transform(jnp.asarray(KERNEL)), rtol=1e-6)


def test_a_step_of_a_scan_has_its_own_part_of_a_stacked_leaf():
    def forward(v, x):
        return jax.lax.scan(lambda c, kernel: (jnp.dot(c, kernel.T), None), x, v["params"]["k"])[0]

    _, (output,) = program(forward, {"params": {"k": KERNEL}}, (2, 3))
    known = [x for x in walk([output]) if x.known is not None and x.ndim == 2]
    assert {(x.origin, x.moved) for x in known} == {(f"params/k[{step}]", True) for step in range(3)}


def test_what_repeats_itself_is_computed_once():
    rows = np.broadcast_to(np.arange(8.0, dtype=np.float32), (5000, 8))
    assert packed_rows(rows).shape == (1, 8)
    doubled = by_rows(np.multiply, [rows, np.float32(2)], rows.shape)
    assert doubled.strides[0] == 0
    np.testing.assert_array_equal(doubled, 2 * rows)


def test_a_program_does_not_name_what_it_does_not_compute():
    """Nothing is emitted for what no output depends on."""
    inputs, outputs = program(lambda v, x: jnp.tanh(x) + 0 * v["a"], {"a": np.float32(1)}, (2, 3))
    emitter, _ = emit(outputs, {id(inputs[0]): "x"})
    assert [node.op_type for node in emitter.nodes].count("Tanh") == 1


def test_boxes_are_opened():
    leaves = leaves_of({"params": {"k": nn.Partitioned(KERNEL, ("a", "b", "c")), "rest": [1.0, (2.0,)]}})
    assert list(leaves) == ["params/k", "params/rest/0", "params/rest/1/0"]
    assert leaves["params/k"] is KERNEL
