"""One training run, from the latest checkpoint to the last step."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import qt_jax as qt
from experiments.configs.cifar import Config, lambda_schedule
from experiments.data import Dataset
from experiments.training import checkpoints
from experiments.training.finishing import finished
from experiments.training.logs import TrainingLog, progress_bar
from experiments.training.state import TrainState, create_state, learning_rate_schedule, optimizer, thresholds
from experiments.training.step import Split, Totals, epoch_order, make_predict, make_train_step
from qt_jax.reporting import provenance

LOG_EVERY = 20
"""Steps between two looks at the loss."""


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the decisions, one an image or one a pixel, whose largest logit is the label's."""
    return float(np.mean(np.argmax(logits, -1) == labels))


def train(config: Config, model: nn.Module, dataset: Dataset, directory: Path, method: str) -> dict[str, Any]:
    """Trains to the last step, resuming from the newest checkpoint, and returns the deployed variables.

    Every epoch ends with a validation of the plain and the fake-quantized network, a row in metrics.jsonl
    and a checkpoint. The same command gives the same parameters to the bit, interrupted or not.

    Raises:
      InvalidInput: the loss is not finite; or the checkpoint is of another model.
    """
    train_images, train_labels = (
        dataset.train_images[: config.train_limit],
        dataset.train_labels[: config.train_limit],
    )
    steps_per_epoch = len(train_images) // config.batch_size
    if steps_per_epoch == 0:
        raise qt.InvalidInput(
            f"--batch-size {config.batch_size} is larger than the training split ({len(train_images)})"
        )
    total = steps_per_epoch * config.epochs
    tx = optimizer(config, total)
    lam = lambda_schedule(config, total)
    state = create_state(config, model, tx, train_images.shape[1:])
    with checkpoints.open_checkpoints(directory / "checkpoints" / method) as manager:
        state = checkpoints.restore_latest(manager, state) or checkpoints.fine_tuned(state, config.fine_tune)
        done = int(state.step)
        if done >= total:
            return jax.tree.map(np.asarray, state.deployed)
        split = Split(jnp.asarray(train_images), jnp.asarray(train_labels))
        run = make_train_step(config, model, tx, lam, dataset.mean, dataset.std, dataset.num_classes)
        predictors = {"fp32": make_predict(config, model, dataset.mean, dataset.std, quantized=False)}
        if config.sched != "none":
            predictors["fake_quant"] = make_predict(config, model, dataset.mean, dataset.std, quantized=True)
        origin = {
            "commit": provenance.commit(),
            "versions": provenance.versions(["jax", "jaxlib", "flax", "optax"]),
            "device": jax.devices()[0].device_kind,
        }
        rate = learning_rate_schedule(config, total)
        with (
            contextlib.closing(TrainingLog(directory, method, done)) as log,
            progress_bar(method, total, done, config.batch_size) as bar,
        ):
            for epoch in range(done // steps_per_epoch, config.epochs):
                started = time.perf_counter()
                state, summary = _run_epoch(config, run, state, split, epoch, steps_per_epoch, lam, bar)
                if epoch + 1 == config.epochs:
                    state = finished(config, dataset, state)
                seconds = time.perf_counter() - started
                for name, predict in predictors.items():
                    logits = predict(state.deployed, dataset.validation_images)
                    summary[f"validation_{name}"] = accuracy(logits, dataset.validation_labels)
                    if logits.ndim == 4:
                        decisions = logits.argmax(-1)
                        overlap = qt.metrics.miou(decisions, dataset.validation_labels, dataset.num_classes)
                        summary[f"validation_miou_{name}"] = overlap
                row = {
                    "epoch": epoch + 1,
                    **summary,
                    "lambda": float(lam(state.step)),
                    "learning_rate": float(rate(state.step)),
                    "tau": thresholds(state.opt_state),
                    "seconds": seconds,
                    "images_per_second": steps_per_epoch * config.batch_size / seconds,
                    "compilations": run._cache_size(),
                    **origin,
                }
                # The row first: a kill between the two has it dropped and written again, never missing.
                log.write(int(state.step), **row)
                checkpoints.save(manager, state)
                bar.write(_epoch_line(method, config.epochs, row))
    return jax.tree.map(np.asarray, state.deployed)


def _run_epoch(config, run, state: TrainState, split: Split, epoch: int, steps_per_epoch: int, lam, bar):
    """The steps of one epoch that are left; returns the state and the mean loss and accuracy."""
    order = epoch_order(config, len(split.images), epoch)
    totals = Totals.zero()
    step = first = epoch * steps_per_epoch
    end = first + steps_per_epoch
    while step < end:
        steps = min(config.steps_per_dispatch, end - step)
        state, totals = run(state, totals, split, order, jnp.int32(steps))
        step += steps
        bar.update(steps * config.batch_size)
        if step == end or (step - first) % max(LOG_EVERY, config.steps_per_dispatch) < steps:
            images = max(float(totals.images), 1.0)
            loss, correct = float(totals.loss) / images, float(totals.correct) / images
            bar.set_postfix(
                {
                    "epoch": f"{epoch + 1}/{config.epochs}",
                    "loss": f"{loss:.3f}",
                    "accuracy": f"{correct:.3f}",
                    "lambda": f"{float(lam(step)):.3f}",
                }
            )
            if not math.isfinite(loss):
                raise _diverged(f"the loss is {loss}", step, epoch)
    if not math.isfinite(optax.tree.norm(state.params)):
        raise _diverged("a parameter is not finite", step, epoch)
    return state, {"loss": loss, "accuracy": correct}


def _diverged(symptom: str, step: int, epoch: int) -> qt.InvalidInput:
    return qt.InvalidInput(
        f"training diverged: {symptom} by step {step}, in epoch {epoch + 1}. The checkpoints of the epochs "
        "before were kept. Lower --learning-rate, or use a gentler --sched, in another --out."
    )


def _epoch_line(method: str, epochs: int, row: dict[str, float]) -> str:
    parts = [f"{method} epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.3f}"]
    parts += [f"lambda {row['lambda']:.3f}", f"validation FP32 {100 * row['validation_fp32']:.2f} %"]
    if "validation_fake_quant" in row:
        parts.append(f"fake-quant {100 * row['validation_fake_quant']:.2f} %")
    return "  ".join([*parts, f"{row['images_per_second']:,.0f} images/s"])
