"""Write scatters, such as `x.at[:, 0].set(y)`, at places that are known, as joins, pads and gathers.

ONNX's own ScatterND is not among the operators that vendors' compilers share. At known places it is not
needed: a block is joined with what lies beside it, and single entries are taken from a table of the old and
the new ones.
"""

import dataclasses

import numpy as np

from qt_jax.errors import InvalidInput
from qt_jax.export.emission import Emitter, emits
from qt_jax.export.movements import sliced
from qt_jax.export.program import Expression, place

COMBINING = {"scatter": None, "scatter-add": ("Add", 0), "scatter-mul": ("Mul", 1)}
"""Maps a primitive to the operator that combines old and new numbers, and to the number that changes
nothing. None where new numbers replace the old ones."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """Describe the part of an array that a scatter changes: along each axis its start and its size."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def partial(self) -> list[int]:
        """List the axes along which the block is not everything."""
        pairs = zip(self.sizes, self.whole, strict=True)
        return [axis for axis, (size, whole) in enumerate(pairs) if size != whole]

    @property
    def pads(self) -> list[int]:
        """List the numbers of elements before the block along each axis, then those behind it."""
        ends = zip(self.starts, self.sizes, self.whole, strict=True)
        return [*self.starts, *(whole - start - size for start, size, whole in ends)]

    def mask(self) -> np.ndarray:
        """Return which elements lie in the block, with size 1 along the axes where it is everything."""
        shape = [n if axis in self.partial else 1 for axis, n in enumerate(self.whole)]
        mask = np.zeros(shape, bool)
        mask[tuple(slice(self.starts[a], self.starts[a] + self.sizes[a]) for a in range(len(shape)))] = True
        return mask


@emits(*COMBINING)
def _scatter(emitter: Emitter, value: Expression) -> str:
    """Change a block of an array, or the entries at known places along one axis."""
    data, indices, updates = value.operands
    numbers = value.params["dimension_numbers"]
    axes = [int(axis) for axis in numbers.scatter_dims_to_operand_dims]
    if indices.known is None or numbers.operand_batching_dims:
        raise InvalidInput(
            f"the forward writes to places that depend on its inputs{place(value.path)} (a scatter), which "
            "vendors' compilers do not take: compare the indices with jnp.arange, and choose with jnp.where"
        )
    windows = iter(updates.shape[axis] for axis in numbers.update_window_dims)
    sizes = tuple(1 if axis in numbers.inserted_window_dims else next(windows) for axis in range(data.ndim))
    count = int(np.prod(indices.shape[:-1]))
    places = np.asarray(indices.known, np.int64).reshape(count, len(axes))
    room = np.array([data.shape[axis] - sizes[axis] for axis in axes])
    if str(value.params["mode"]).endswith("CLIP"):
        places = np.clip(places, 0, room)
    if np.any((places < 0) | (places > room)):
        raise InvalidInput(
            f"the forward writes beyond the end of an array{place(value.path)}, which JAX leaves out: leave "
            "these places out of the indices"
        )
    if len(places) == 1:
        starts = dict(zip(axes, places[0].tolist(), strict=True))
        block = _Block(tuple(starts.get(axis, 0) for axis in range(data.ndim)), sizes, data.shape)
        return _in_block(emitter, value, updates, block)
    if len(axes) == 1 and sizes[axes[0]] == 1 and len(np.unique(places)) == len(places):
        return _along_axis(emitter, value, axes[0], places.ravel())
    raise InvalidInput(
        f"the forward writes to several places along several axes, or twice to one{place(value.path)} (a "
        "scatter): write along one axis at a time, or multiply by a matrix of zeros and ones"
    )


@emits("dynamic_update_slice")
def _dynamic_update_slice(emitter: Emitter, value: Expression) -> str:
    data, updates, *starts = value.operands
    if any(x.known is None for x in starts):
        raise InvalidInput(
            f"the forward writes a part whose place depends on its inputs{place(value.path)} "
            "(lax.dynamic_update_slice): write at a fixed place, or choose with jnp.where"
        )
    room = [whole - size for whole, size in zip(data.shape, updates.shape, strict=True)]
    found = tuple(int(np.clip(x.known, 0, most)) for x, most in zip(starts, room, strict=True))
    return _in_block(emitter, value, updates, _Block(found, updates.shape, data.shape))


def _in_block(emitter: Emitter, value: Expression, updates: Expression, block: _Block) -> str:
    """Change a block of an array."""
    data = value.operands[0]
    partial, combining = block.partial, COMBINING.get(value.primitive)

    def padded(filling: float) -> str:
        if updates.known is None or updates.origin:
            return _padded(
                emitter, emitter.reshaped(emitter.name(updates), block.sizes), block, filling, value
            )
        pads = list(zip(block.pads[: data.ndim], block.pads[data.ndim :], strict=True))
        known = np.pad(np.reshape(updates.known, block.sizes), pads, constant_values=filling)
        return emitter.constant(known, value.dtype)

    if partial and 0 not in partial and value.dtype != np.bool_:  # the batch is not padded
        if combining is not None:
            operator, neutral = combining
            return emitter.add(operator, [emitter.name(data), padded(neutral)])
        if data.number() is not None:
            return padded(data.number() or 0)
        if len(partial) > 1 or updates.known is not None:
            return emitter.add(
                "Where", [emitter.constant(block.mask(), np.bool_), padded(0), emitter.name(data)]
            )
    new = emitter.reshaped(emitter.name(updates), block.sizes)
    if not partial:
        return new if combining is None else emitter.add(combining[0], [emitter.name(data), new])
    if len(partial) == 1:
        return _joined(emitter, value, new, block)
    raise InvalidInput(
        f"the forward changes a block of the first axis and of others{place(value.path)}: write along one "
        "axis at a time"
    )


def _joined(emitter: Emitter, value: Expression, new: str, block: _Block) -> str:
    """Join a block with what lies before and behind it along its one partial axis."""
    data, combining = value.operands[0], COMBINING.get(value.primitive)
    (axis,) = block.partial
    start, end = block.starts[axis], block.starts[axis] + block.sizes[axis]

    def part(low: int, high: int) -> str:
        ends = [(low, high, 1) if at == axis else (0, size, 1) for at, size in enumerate(data.shape)]
        return sliced(emitter, emitter.name(data), data.shape, ends)

    if combining is not None:
        new = emitter.add(combining[0], [part(start, end), new])
    before, behind = (
        [part(*ends)] if ends[0] < ends[1] else [] for ends in ((0, start), (end, block.whole[axis]))
    )
    return emitter.add("Concat", [*before, new, *behind], axis=axis)


def _along_axis(emitter: Emitter, value: Expression, axis: int, places: np.ndarray) -> str:
    """Change the entries `places` of one axis."""
    data, _, updates = value.operands
    combining, numbers = COMBINING[value.primitive], value.params["dimension_numbers"]
    inserted = numbers.inserted_window_dims
    kept = iter(numbers.update_window_dims)
    window = {at: int(next(kept)) for at in range(data.ndim) if at not in inserted}
    scattered = [at for at in range(updates.ndim) if at not in numbers.update_window_dims]
    order = [at for dim in range(data.ndim) for at in (scattered if dim == axis else [window[dim]])]
    order += [window[axis]] if axis in window else []
    shape = tuple(len(places) if dim == axis else size for dim, size in enumerate(data.shape))
    new = emitter.reshaped(emitter.moved(emitter.name(updates), order), shape)
    table = np.full(data.shape[axis], len(places))
    table[places] = np.arange(len(places))
    others = len(places) < data.shape[axis]
    filling = data.number() if combining is None else combining[1]
    if combining is None and others and (filling is None or value.dtype == np.bool_):
        table = np.where(table < len(places), table + data.shape[axis], np.arange(data.shape[axis]))
        source = emitter.add("Concat", [emitter.name(data), new], axis=axis)
        return emitter.add("Gather", [source, emitter.constant(table)], axis=axis)
    if others:
        block = _Block((0,) * data.ndim, shape, (*shape[:axis], len(places) + 1, *shape[axis + 1 :]))
        new = _padded(emitter, new, block, filling, value)
    found = emitter.add("Gather", [new, emitter.constant(table)], axis=axis)
    return found if combining is None else emitter.add(combining[0], [emitter.name(data), found])


def _padded(emitter: Emitter, new: str, block: _Block, filling: float | None, value: Expression) -> str:
    """Pad a block to the whole array."""
    return emitter.add("Pad", [new, emitter.constant(block.pads), emitter.constant(filling, value.dtype)])
