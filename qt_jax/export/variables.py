"""Find the collections of a network in the tree of a checkpoint, by their structure.

People save the variables bare, in a TrainState, in a dictionary of both, or as items of one checkpoint. The
model itself says which leaves a collection has, and of which shapes. `find_variables` looks for these leaves
at every depth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.errors import InvalidInput
from qt_jax.interception import COLLECTION, is_quant_trim_statistic

TreePath = tuple[str, ...]
Shapes = Mapping[TreePath, tuple[int, ...]]

PARAMS = "params"
"""Name of the collection that every network needs."""

BOX = "value"
"""Name under which a parameter is saved that `nn.with_partitioning` has put into a box."""

OPTIMIZERS = ("opt",)
"""Beginnings of the names under which people save the state of an optimizer."""

MOMENTS = frozenset({"mu", "nu", "nu_max", "trace", "acc_grads"})
"""Names that optax gives to trees which look like the parameters."""

LISTED = 6
"""Number of paths that a message lists."""


def find_variables(
    tree: Mapping[str, Any],
    wanted: Mapping[str, Shapes],
    checkpoint: str,
    chosen: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """Find the collections of a model in a checkpoint.

    The parameters are the part of the tree that has all their leaves, outside of optimizers if there is one.
    Every other collection is the part that fits and lies nearest to them. Quant-Trim's statistics are found
    for a model that has none of its own.

    Args:
      tree: Checkpoint from `checkpoints.restore`.
      wanted: Shapes of the leaves of each collection, from `expected_variables`.
      checkpoint: Name of the checkpoint, for messages.
      chosen: Paths in the checkpoint, `/` between names, `.` for the whole. A collection that fits at or
        below one of them is taken from there.

    Returns:
      The collections that were found, the parameters always; and the path of each.

    Raises:
      InvalidInput: The parameters are not there; several parts fit equally well; or a chosen path is not in
        the checkpoint, or holds nothing that fits.

    >>> held = {"step": np.ones(()), "params": {"params": {"head": {"bias": np.zeros(3)}}}}
    >>> find_variables(held, {"params": {("head", "bias"): (3,)}}, "runs/7")[1]
    {'params': 'params/params'}
    """
    leaves = _leaves(tree, boxed=all(path[-1:] != (BOX,) for path in wanted[PARAMS]))
    within = [_chosen(leaves, path, checkpoint) for path in chosen]
    fitting = {collection: _fitting(leaves, shapes) for collection, shapes in wanted.items()}
    if not fitting[PARAMS]:
        raise InvalidInput(_nearest(leaves, wanted[PARAMS], checkpoint))
    if COLLECTION not in wanted:
        fitting[COLLECTION] = _learned(leaves, wanted[PARAMS])
    places = {PARAMS: _choose(PARAMS, fitting.pop(PARAMS), (), within, checkpoint)}
    for collection, parts in fitting.items():
        if parts:
            places[collection] = _choose(collection, parts, places[PARAMS], within, checkpoint)
    for choice in within:
        if not any(_lies_in(place, choice) for place in places.values()):
            raise InvalidInput(
                f"--variables {_name(choice)}: nothing at or below it fits the model; the parameters fit at "
                f"{_name(places[PARAMS])}"
            )
    variables = {collection: unflatten_dict(_below(leaves, place)) for collection, place in places.items()}
    return variables, {collection: _name(place) for collection, place in places.items()}


def expected_variables(init: Callable[..., Any], specs: Sequence[Any]) -> dict[str, Shapes]:
    """Return the shapes of the leaves of each collection that a model makes, by path.

    Args:
      init: `(keys, *inputs) -> variables`, such as `module.init`.
      specs: Specs of the inputs, with batch.

    >>> expected_variables(nn.Dense(2, use_bias=False).init, [np.zeros((1, 3))])
    {'params': {('kernel',): (3, 2)}}
    """
    keys = dict.fromkeys((PARAMS, "dropout"), jax.random.key(0))
    made = nn.meta.unbox(jax.eval_shape(init, keys, *specs))
    found: dict[str, dict[TreePath, tuple[int, ...]]] = {PARAMS: {}}
    for (collection, *path), leaf in flatten_dict(unfreeze(dict(made))).items():
        found.setdefault(collection, {})[tuple(path)] = np.shape(leaf)
    return dict(found)


def single_precision(variables: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Cast floating-point leaves to float32, in which graphs are exported.

    Returns:
      The variables, and what was cast, in words; None if everything is in float32 already.

    >>> single_precision({"params": {"bias": jnp.ones(2, jnp.bfloat16)}})
    ({'params': {'bias': array([1., 1.], dtype=float32)}}, '1 array of bfloat16 is exported as float32')
    """
    cast: dict[str, int] = {}

    def single(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf) if not isinstance(leaf, np.ndarray) else leaf.dtype
        if dtype == np.float32 or not jnp.issubdtype(dtype, jnp.floating):
            return leaf
        cast[str(dtype)] = cast.get(str(dtype), 0) + 1
        return np.asarray(leaf).astype(np.float32)

    result = jax.tree.map(single, dict(variables))
    parts = [f"{n} array{'s' * (n > 1)} of {name}" for name, n in cast.items()]
    several = len(parts) > 1 or any(n > 1 for n in cast.values())
    return (
        result,
        f"{' and '.join(parts)} {'are' if several else 'is'} exported as float32" if parts else None,
    )


def _leaves(tree: Any, boxed: bool, path: TreePath = ()) -> dict[TreePath, Any]:
    """Return the leaves of a checkpoint by path; with `boxed` those in a box stand where the box is."""
    if isinstance(tree, list | tuple):
        tree = {str(index): child for index, child in enumerate(tree)}
    if not isinstance(tree, Mapping):
        return {} if tree is None else {path: tree}
    if boxed and tree.keys() == {BOX}:
        return _leaves(tree[BOX], boxed, path)
    found: dict[TreePath, Any] = {}
    for name, child in tree.items():
        found |= _leaves(child, boxed, (*path, str(name)))
    return found


def _below(leaves: Mapping[TreePath, Any], prefix: TreePath) -> dict[TreePath, Any]:
    """Return the leaves below `prefix`, by the rest of their paths."""
    return {path[len(prefix) :]: leaf for path, leaf in leaves.items() if path[: len(prefix)] == prefix}


def _fitting(leaves: Mapping[TreePath, Any], wanted: Shapes) -> dict[TreePath, bool]:
    """Find the parts of a checkpoint that have all wanted leaves.

    Returns:
      Path of each part -> whether it has no other leaves, save those of Quant-Trim.
    """
    first = next(iter(wanted), None)
    if first is None:
        return {}
    prefixes = [path[: -len(first)] for path in leaves if path[-len(first) :] == first]
    found = {}
    for prefix in prefixes:
        if all(_shape(leaves, (*prefix, *path)) == shape for path, shape in wanted.items()):
            own = [path for path in _below(leaves, prefix) if not is_quant_trim_statistic(path)]
            found[prefix] = len(own) == len(wanted)
    return found


def _learned(leaves: Mapping[TreePath, Any], params: Shapes) -> dict[TreePath, bool]:
    """Find the parts of a checkpoint that hold statistics of Quant-Trim for modules of these parameters.

    Returns:
      As `_fitting` does.
    """
    modules = {path[:depth] for path in params for depth in range(len(path))}
    found = {}
    for path in filter(is_quant_trim_statistic, leaves):
        end = next(depth for depth in range(len(path)) if is_quant_trim_statistic(path[: depth + 1]))
        start = next(depth for depth in range(end + 1) if path[depth:end] in modules)
        found[path[:start]] = True
    inner = {one for one in found for other in found if one != other and _lies_in(one, other)}
    return {place: True for place in found if place not in inner}


def _choose(
    collection: str,
    fitting: Mapping[TreePath, bool],
    near: TreePath,
    within: Sequence[TreePath],
    checkpoint: str,
) -> TreePath:
    """Choose the part that a collection is taken from.

    Args:
      collection: Name of the collection.
      fitting: Parts that fit, from `_fitting`.
      near: TreePath that the part is to be near to.
      within: Paths that the user chose.
      checkpoint: Name of the checkpoint.

    Raises:
      InvalidInput: Several fit equally well.
    """
    pool = [place for place in fitting if any(_lies_in(place, choice) for choice in within)]
    pool = pool or [place for place in fitting if not _of_optimizer(place)] or list(fitting)
    pool = [place for place in pool if fitting[place]] or pool
    nearest = max(_common(place, near) for place in pool)
    pool = [place for place in pool if _common(place, near) == nearest]
    if len(pool) > 1:
        beside = "".join(f"{_name(choice)} " for choice in within)
        raise InvalidInput(
            f"{checkpoint} holds several trees that fit the {collection} of the model: {_listed(pool)}. "
            f"Choose one of them, as in --variables {beside}{_name(pool[-1])}"
        )
    return pool[0]


def _lies_in(place: TreePath, choice: TreePath) -> bool:
    """Tell whether a part is at or below a path."""
    return place[: len(choice)] == choice


def _of_optimizer(path: TreePath) -> bool:
    """Tell whether a part belongs to the state of an optimizer, by the names that people and optax give."""
    return any(name.startswith(OPTIMIZERS) or name in MOMENTS for name in path)


def _common(one: TreePath, other: TreePath) -> int:
    """Return the number of names that two paths begin with."""
    differ = (index for index, names in enumerate(zip(one, other, strict=False)) if names[0] != names[1])
    return next(differ, min(len(one), len(other)))


def _chosen(leaves: Iterable[TreePath], given: str, checkpoint: str) -> TreePath:
    """Return the path that the user chose.

    Raises:
      InvalidInput: It is not in the checkpoint.
    """
    path = tuple(name for name in given.split("/") if name not in ("", "."))
    if not any(leaf[: len(path)] == path for leaf in leaves):
        depth = next(
            d for d in range(len(path)) if not any(leaf[: d + 1] == path[: d + 1] for leaf in leaves)
        )
        held = dict.fromkeys(leaf[: depth + 1] for leaf in leaves if leaf[:depth] == path[:depth])
        raise InvalidInput(f"--variables {given}: {checkpoint} has no such part; it holds {_listed(held)}")
    return path


def _nearest(leaves: Mapping[TreePath, Any], wanted: Shapes, checkpoint: str) -> str:
    """Say what the part that is most like the parameters lacks."""
    alike: dict[TreePath, int] = {}
    for path in leaves:
        for depth in range(len(path)):
            if path[depth:] in wanted:
                alike[path[:depth]] = alike.get(path[:depth], 0) + 1
    message = f"{checkpoint} does not hold the parameters of this model: "
    if not alike:
        held = [path for path in leaves if not _of_optimizer(path)]
        return (
            f"{message}the model makes {_listed(wanted)}; the checkpoint holds {_listed(held)}. Is --model "
            "the network that was saved?"
        )
    prefix = max(alike, key=lambda path: (not _of_optimizer(path), alike[path]))
    shapes = {path: _shape(leaves, (*prefix, *path)) for path in wanted}
    path = next(path for path, shape in shapes.items() if shape != wanted[path])
    name = _name((*prefix, *path))
    if shapes[path] is None:
        return f"{message}it lacks {name}, which the model makes. Do --model and --arguments suit it?"
    advice = "Do --arguments and --input-shape suit it?"
    if all(shape is not None and shape[1:] == wanted[path] for path, shape in shapes.items()):
        advice = "Save one copy in place of one for each device: flax.jax_utils.unreplicate(state)."
    return f"{message}{name} has shape {shapes[path]}, the model makes {wanted[path]}. {advice}"


def _shape(leaves: Mapping[TreePath, Any], path: TreePath) -> tuple[int, ...] | None:
    """Return the shape of a leaf; None if it is not there."""
    return np.shape(leaves[path]) if path in leaves else None


def _name(path: TreePath) -> str:
    """Write a path; the whole checkpoint is `.`."""
    return "/".join(path) or "."


def _listed(paths: Iterable[TreePath]) -> str:
    """List paths, and how many more there are."""
    names = [_name(path) for path in paths]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
