"""Train a tiny network for fifty steps in a separate process with its own devices, for test_devices.py.

python parallel_run.py FOLDER NAME COUNT [ADDRESS:PORT,PROCESSES,INDEX] [STOP]: trains on the first COUNT
devices up to step STOP (SIGTERM arrives there) or the end, in FOLDER; the leader writes FOLDER/NAME.npz.

The run computes in float64, in which the order of a sum changes nothing that a grid could round the other
way.
"""

import dataclasses
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices
from experiments.configs.training import PRESETS
from experiments.data import load
from experiments.models.resnet import ResNet
from experiments.training import loop, program
from experiments.training.divergence import are_finite
from experiments.training.step import Split

METHOD = "quant-trim"
CONFIG = dataclasses.replace(
    PRESETS["smoke"],
    dataset="digits",
    train_limit=640,
    batch_size=64,
    epochs=5,
    learning_rate=0.05,
    reverse_pruning_every=5,
    ema=0.9,
)


def flat(tree) -> dict[str, np.ndarray]:
    """Map the path of each leaf to its array."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def in_double(state):
    """Hold the running statistics of batch norm in float64, which Flax makes float32 at first."""

    def cast(path, leaf):
        return leaf.astype(jnp.float64) if path[-1].key in ("mean", "var") else leaf

    return state.replace(batch_stats=jax.tree.map_with_path(cast, state.batch_stats))


@contextmanager
def told_to_end_at(stop: int):
    """Stand in for `loop.watch_signals`: SIGTERM comes in step `stop`."""
    yield lambda step: signal.SIGTERM if step >= stop else None


def main(folder: str, name: str, count: str, where: str = "alone", stop: str = "") -> None:
    jax.config.update("jax_enable_x64", True)
    if where != "alone":
        devices.connect(where)
    if stop:
        loop.watch_signals = lambda: told_to_end_at(int(stop))
    create_state = program.create_state
    program.create_state = lambda *arguments: in_double(create_state(*arguments))
    seen = {}
    row = loop._row

    def watched_row(program, state, *rest):
        seen.update(state=flat(vars(state)), split=program.split)
        return row(program, state, *rest)

    loop._row = watched_row
    dataset = load("digits")
    on = jax.devices()[: int(count)]
    try:
        loop.train(CONFIG, ResNet((1,), width=4, dtype=jnp.float64), dataset, Path(folder), METHOD, on)
    except loop.Interrupted as error:
        print(error)
        return
    assert are_finite(seen["state"])
    own_rows(seen["split"], dataset)
    if devices.is_leader():
        np.savez(Path(folder) / f"{name}.npz", **seen["state"])
    devices.disconnect()


def own_rows(split: Split, dataset) -> None:
    """Check that this process holds its own share of the training images, each row once, and no others."""
    shards = split.images.addressable_shards
    starts = [shard.index[0].start or 0 for shard in shards]
    rows = split.images.shape[0] // jax.device_count() if len(shards) > 1 else split.images.shape[0]
    first = min(starts)
    assert sorted(starts) == list(range(first, first + rows * len(shards), rows)), starts
    for shard in shards:
        start = shard.index[0].start or 0
        want = dataset.train_images[: CONFIG.train_limit][start : start + rows]
        np.testing.assert_array_equal(np.asarray(shard.data), want)
    if jax.process_count() > 1:
        assert rows * len(shards) * jax.process_count() == CONFIG.train_limit


if __name__ == "__main__":
    main(*sys.argv[1:])
