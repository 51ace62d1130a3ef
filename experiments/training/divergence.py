"""Detect a diverged run, find the step and the layer where it went wrong, and go back to a checkpoint.

A run without retries left ends with a report of what was found.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

import qt_jax as qt
from experiments import devices
from experiments.configs.training import Config
from experiments.data.augment import normalize
from experiments.training import checkpoints, quantizers
from experiments.training.logs import warn
from experiments.training.program import Program
from experiments.training.state import TrainState
from experiments.training.step import Totals, draw_batch
from qt_jax.files import write_whole
from qt_jax.interception import Call, intercept, is_quant_trim_statistic

LARGEST_LOSS = 1e3
"""Largest mean loss of a sound run, many times that of guessing. A larger or non-finite one is divergence."""

REPORT = "divergence.json"
"""File in the run's folder."""


class Diverged(Exception):
    """Signal that the loss has left all bounds by the step `step`."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss is {loss:g} by step {step}")
        self.step, self.loss = step, loss


def is_sound(loss: float) -> bool:
    """Tell whether training can go on with this loss.

    >>> is_sound(2.3), is_sound(float("nan")), is_sound(1e9)
    (True, False, False)
    """
    return math.isfinite(loss) and loss <= LARGEST_LOSS


def are_finite(tree: Any) -> bool:
    """Tell whether all numbers in a tree of arrays are finite."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def resume(program: Program, manager: ocp.CheckpointManager) -> tuple[TrainState, Totals]:
    """Return the state and the sums of the newest intact checkpoint, or those before the first step.

    Raises:
      InvalidInput: As `checkpoints.restore_latest` does.
    """
    found = checkpoints.restore_latest(manager, program.template, program.mesh)
    return found or (program.first(), devices.replicate(Totals.zero(), program.mesh))


def go_back(
    program: Program, manager: ocp.CheckpointManager, error: Diverged, scale: float, directory: Path
) -> tuple[TrainState, Totals]:
    """Write the report, and return the state from which a diverged run starts again at half its rate.

    Args:
      program: The run.
      manager: Its checkpoints.
      error: Its divergence.
      scale: Factor of the learning rate with which it diverged.
      directory: Folder of the run.

    Raises:
      InvalidInput: No retries are left. The message sums up the report.
    """
    state, totals = resume(program, manager)
    state = state.replace(rate_scale=devices.replicate(np.float32(scale), program.mesh))
    report = find_cause(program, state, error) | {"checkpoint": manager.latest_step()}
    message = write_report(report, directory)
    if scale <= 0.5**program.config.retries:
        raise qt.InvalidInput(
            f"{message}Lower --learning-rate or use a gentler --sched, with another --out. Or let "
            "--retries 3 go back to the last checkpoint and continue at half the learning rate."
        )
    warn(f"{message}Going back; training goes on at {scale / 2:g} of the learning rate.")
    return state.replace(rate_scale=devices.replicate(np.float32(scale / 2), program.mesh)), totals


def find_cause(program: Program, state: TrainState, error: Diverged) -> dict[str, Any]:
    """Repeat the steps from `state` up to the first bad one, and return the report on it."""
    config = program.config

    def order(step: int) -> jax.Array:
        return program.order(step // program.steps_per_epoch)

    def advance(state: TrainState) -> tuple[TrainState, Totals]:
        copy, totals = devices.replicate(devices.on_host((state, Totals.zero())), program.mesh)
        return program.run(copy, totals, program.split, order(int(state.step)), np.int32(1))

    bad = first_bad_step(state, error.step, advance)
    step = int(bad.step)
    draw = jax.jit(
        lambda split, order, step: draw_batch(config, split, order, step),
        out_shardings=devices.replicated(program.mesh),
    )
    images, labels = devices.on_host(draw(program.split, order(step), np.int32(step)))
    batch = normalize(jnp.asarray(images), program.dataset.mean, program.dataset.std)
    lam = float(program.lam(step))
    return {
        "step": step,
        "epoch": step // program.steps_per_epoch + 1,
        "seen_by_step": error.step,
        "lambda": lam,
        "learning_rate": float(program.rate(step)) * float(bad.rate_scale),
        **examine(config, program.model, devices.on_host(bad), batch, labels, lam),
    }


def first_bad_step(
    state: TrainState, until: int, advance: Callable[[TrainState], tuple[TrainState, Totals]]
) -> TrainState:
    """Repeat the steps and return the state at the beginning of the first step whose loss is not sound.

    A step that breaks the parameters shows in the loss of the next step. Then the state before the step that
    broke them is returned.

    Args:
      state: State of a checkpoint, after which the run diverged.
      until: A step by which it had diverged.
      advance: Takes one step and returns the new state with the sums of that step. It must not consume
        its argument.
    """
    before = state
    while int(state.step) < until:
        after, totals = advance(state)
        if not is_sound(float(totals.loss) / max(float(totals.images), 1.0)):
            return state if are_finite(state.params) else before
        before, state = state, after
    return before


def examine(
    config: Config, model: nn.Module, state: TrainState, images: jax.Array, labels: jax.Array, lam: float
) -> dict[str, Any]:
    """Run one training pass over the batch of a bad step, and return what it shows as plain JSON values.

    Args:
      config: Config of the run.
      model: Its network.
      state: State at the beginning of the step.
      images, labels: Normalised batch of the step.
      lam: Lambda of the step.

    Returns:
      `layer`: the first layer, in the order of computation, whose output is not finite, else the one with
      the largest output. `outputs`: by layer, the largest finite |output| and the share that is not finite.
      `gradients`, `parameters`: the paths of those that are not finite. `ranges`: low and high by site.
      `scale`: the scales of the layer's own sites.
    """
    state = jax.tree.map(np.asarray, state)
    classes = model.num_classes if hasattr(model, "num_classes") else int(np.max(labels)) + 1
    targets = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    order: list[str] = []

    def loss_fn(params):
        seen: dict[str, dict[str, jax.Array]] = {}

        def look(call: Call, /, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if call.path and isinstance(output, jax.Array):
                finite = jnp.isfinite(output)
                largest = jnp.max(jnp.where(finite, jnp.abs(output), 0))
                seen[call.path] = {"largest": largest, "broken": 1.0 - jnp.mean(finite, dtype=jnp.float32)}
            return output

        with intercept(look):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, _ = quantizers.training_forward(config, model, variables, images, jnp.float32(lam))
        order[:] = seen
        log_likelihood = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.sum(targets * log_likelihood, -1)), seen

    (loss, outputs), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(state.params)
    outputs = {path: {name: float(value) for name, value in outputs[path].items()} for path in order}
    broken = [path for path, seen in outputs.items() if seen["broken"] > 0]
    layer = broken[0] if broken else max(outputs, key=lambda path: outputs[path]["largest"])
    return {
        "loss": _plain(loss),
        "layer": layer,
        "layer_is_finite": not broken,
        "outputs": outputs,
        "gradients": _broken(gradients),
        "parameters": _broken(state.params),
        "ranges": _ranges(state.batch_stats),
        "scale": _scales(state.batch_stats, layer, quantizers.quantization(config, model, images.shape[1:])),
    }


def _broken(tree: Any) -> list[str]:
    return ["/".join(path) for path, leaf in flatten_dict(tree).items() if not np.isfinite(leaf).all()]


def _ranges(batch_stats: Any) -> dict[str, Any]:
    return {
        "/".join(path): [_plain(x) for x in np.ravel(leaf)]
        for path, leaf in flatten_dict(batch_stats).items()
        if is_quant_trim_statistic(path) and path[-1] in ("low", "high")
    }


def _scales(batch_stats: Any, layer: str, config: qt.QuantConfig) -> dict[str, float | None]:
    """Return the scale of each site of a layer that has ranges, the largest over channels."""
    sites = config.sites(layer)
    specs = {"quant_kernel": sites.weights, "quant_input": sites.inputs, "quant_output": sites.outputs}
    flat, found = flatten_dict(batch_stats), {}
    for site, spec in specs.items():
        path = (*layer.split("/"), site)
        if spec is not None and (*path, "low") in flat:
            scale, _ = qt.quantization_parameters(flat[*path, "low"], flat[*path, "high"], spec)
            found[site] = _plain(np.max(scale))
    return found


def _plain(value: Any) -> float | None:
    """Return a number as JSON has it, null if it is not finite."""
    return float(value) if np.isfinite(value) else None


def write_report(report: Mapping[str, Any], directory: Path) -> str:
    """Write the report into the run's folder, and return a few sentences that sum it up."""
    write_whole(directory / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    worst = report["outputs"][report["layer"]]
    seen = (
        f"whose outputs are the largest, {worst['largest']:.3g}"
        if report["layer_is_finite"]
        else f"the first with outputs that are not finite ({100 * worst['broken']:.3g} %)"
    )
    scales = ", ".join(f"{site} {_shown(value)}" for site, value in report["scale"].items()) or "none"
    kept = report["checkpoint"]
    left = "There is no checkpoint yet. " if kept is None else f"The checkpoint of step {kept} is intact. "
    broken = [f"{len(report[kind])} {kind}" for kind in ("parameters", "gradients") if report[kind]]
    return (
        f"training diverged at step {report['step']} (epoch {report['epoch']}): the loss is "
        f"{_shown(report['loss'])}, lambda {report['lambda']:.3f}, learning rate "
        f"{report['learning_rate']:.3g}. Look at layer {report['layer']}, {seen}; its scales: {scales}"
        + (f"; not finite: {', '.join(broken)}" if broken else "")
        + f". {directory / REPORT} lists all layers. {left}"
    )


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
