"""docs/guides/your_own_model.md: models and training loops written without us."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import optax
import pytest
from flax.training import train_state

import qt_jax as qt
from qt_jax import records

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
GUIDE = ROOT / "docs" / "guides" / "your_own_model.md"
CONFIG = qt.QuantConfig()
LABELS = np.arange(32, dtype=np.int32) % 4


def in_onnxruntime(graph, *inputs):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    [outputs] = session.run(None, {name: np.asarray(x) for name, x in zip(names, inputs, strict=True)})
    return outputs


def test_the_guide_shows_the_difference():
    plain, ours = (
        (EXAMPLES / name).read_text().splitlines() for name in ("fine_tuned.py", "quant_trimmed.py")
    )
    difference = list(difflib.unified_diff(plain, ours, "fine_tuned.py", "quant_trimmed.py", "", "", 1, ""))
    [shown] = re.findall(r"```diff\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert shown.splitlines() == difference, "put this into the guide:\n" + "\n".join(difference)
    added, removed = (sum(line.startswith(sign) for line in difference) - 1 for sign in "+-")
    assert f"{added} lines are new, {removed} of the old ones are gone" in GUIDE.read_text()
    assert added + removed < 40


def test_the_examples_run(tmp_path):
    hidden = ("XLA_FLAGS",)
    variables = {key: value for key, value in os.environ.items() if key not in hidden}
    variables |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def python(*arguments):
        command = [sys.executable, "-W", "error", *map(str, arguments)]
        finished = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    for name in ("plain.py", "fine_tuned.py", "quant_trimmed.py"):
        printed = python(EXAMPLES / name)
        assert float(printed.split(" %")[0]) > 77, printed
    rows = re.findall(r"^(\w+) +([\w-]+) +([\d.]+) %", python(EXAMPLES / "deploy.py"), re.MULTILINE)
    accuracy = {(network, scheme): float(top1) for network, scheme, top1 in rows}
    assert len(accuracy) == 15
    assert accuracy["quant_trimmed", "int4w-pt-minmax"] > accuracy["fine_tuned", "int4w-pt-minmax"] + 2
    data = ("--calibration", "calibration.npz", "--test", "test.npz")
    chosen = ("--backends", "onnxruntime", "--schemes", "int8-pc-minmax", "--runtimes", "reference")
    models = ("fine_tuned.onnx", "quant_trimmed.onnx")
    python("-m", "qt_jax.backends", "run", *models, *data, *chosen, "--out", "vendors")
    found = records.read(tmp_path / "vendors" / "records.jsonl")
    assert [(row["model"], row["scheme"], row["status"]) for row in found] == [
        (name, scheme, "ok")
        for name in ("fine_tuned", "quant_trimmed")
        for scheme in ("fp32", "int8-pc-minmax")
    ]
    assert abs(100 * found[2]["top1"] - accuracy["quant_trimmed", "fp32"]) < 0.06


class Normed(nn.Module):
    """Convolution, batch norm, head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(4, name="head")(x.mean(axis=(1, 2)))


class TrainState(train_state.TrainState):
    batch_stats: dict


def test_a_train_state_trains_as_a_plain_loop_does():
    model, x = Normed(), jax.random.normal(jax.random.key(0), (32, 8, 8, 3))
    lam = qt.schedules.linear(6, warmup=0.0, end=0.5)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), qt.reverse_pruning(0.9, every=2))
    start = qt.attach_statistics(model, model.init(jax.random.key(1), x), CONFIG, x)

    def loss_and_statistics(params, batch_stats, step):
        with qt.quant_trim(CONFIG, lam(step), train=True):
            logits, new = model.apply(
                {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
            )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
        return loss, new["batch_stats"]

    gradient = jax.grad(loss_and_statistics, has_aux=True)

    @jax.jit
    def with_state(state):
        grads, batch_stats = gradient(state.params, state.batch_stats, state.step)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats)

    @jax.jit
    def plain(variables, opt_state, step):
        grads, batch_stats = gradient(variables["params"], variables["batch_stats"], step)
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": batch_stats}, opt_state

    state = TrainState.create(apply_fn=model.apply, tx=tx, **start)
    variables, opt_state = start, tx.init(start["params"])
    for step in range(6):
        state = with_state(state)
        variables, opt_state = plain(variables, opt_state, jnp.int32(step))
    ours = {"params": state.params, "batch_stats": state.batch_stats}
    jax.tree.map(np.testing.assert_array_equal, ours, variables)
    assert int(state.batch_stats["conv"]["quant_kernel"]["count"]) == 6


class Plain(nn.Module):
    """A network without batch norm: it has no `batch_stats` of its own."""

    outputs: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs, name="head")(nn.relu(nn.Dense(32, name="body")(x)))


def trained_plain(tx, steps=4):
    """A `Plain` before and after training with `tx` under Quant-Trim, and its inputs."""
    model, x = Plain(), jax.random.normal(jax.random.key(0), (32, 8))
    start = qt.attach_statistics(model, model.init(jax.random.key(1), x), CONFIG, x)

    @jax.jit
    def step(variables, opt_state):
        def loss_fn(params):
            with qt.quant_trim(CONFIG, 1.0, train=True):
                logits, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    variables, opt_state = start, tx.init(start["params"])
    for _ in range(steps):
        variables, opt_state = step(variables, opt_state)
    return start, variables, x


PARTS = {"body": "frozen", "head": "trained"}
FROZEN = {"body": True, "head": False}


def pruning(**options):
    return qt.reverse_pruning(0.9, every=1, ema=0.0, **options)


def in_the_head(path, leaf):
    return path == ("head", "kernel")


TRAINED = {"trained": optax.sgd(1.0), "frozen": optax.set_to_zero()}
COMPOSITIONS = {
    "inside": optax.multi_transform(
        {"trained": optax.chain(optax.sgd(1.0), pruning()), "frozen": optax.set_to_zero()}, PARTS
    ),
    "before": optax.chain(optax.sgd(1.0), pruning(), optax.masked(optax.set_to_zero(), FROZEN)),
    "masked": optax.chain(optax.multi_transform(TRAINED, PARTS), pruning(mask=in_the_head)),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_frozen_parameters_stay_to_the_bit(name):
    start, variables, _ = trained_plain(COMPOSITIONS[name])
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["body"], start["params"]["body"])
    head = np.abs(variables["params"]["head"]["kernel"])
    assert not np.array_equal(head, np.abs(start["params"]["head"]["kernel"]))
    assert np.sum(head == head.max()) >= 0.05 * head.size  # clipped at the quantile
    ranges = variables["batch_stats"]["body"]["quant_input"]
    assert int(ranges["count"]) == 4  # a frozen layer is quantized as any other


def test_reverse_pruning_after_the_partition_clips_frozen_kernels():
    start, variables, _ = trained_plain(
        optax.chain(optax.multi_transform(TRAINED, PARTS), pruning()), steps=1
    )
    before, after = (np.asarray(tree["params"]["body"]["kernel"]) for tree in (start, variables))
    tau = np.abs(after).max()
    assert tau == pytest.approx(np.quantile(np.abs(before), 0.9), rel=0.01)
    np.testing.assert_array_equal(after, np.clip(before, -tau, tau))


def test_a_model_without_batch_norm():
    start, variables, x = trained_plain(optax.sgd(0.1))
    assert set(start["batch_stats"]["head"]) == {"quant_kernel", "quant_input"}
    low, high = (variables["batch_stats"]["body"]["quant_input"][end] for end in ("low", "high"))
    assert float(low) == pytest.approx(np.quantile(x, 0.001), abs=0.2)
    assert float(high) == pytest.approx(np.quantile(x, 0.999), abs=0.2)
    graph = qt.to_onnx(Plain().apply, {"params": variables["params"]}, (8,))
    body, head = (variables["params"][name] for name in ("body", "head"))
    hidden = np.maximum(x @ body["kernel"] + body["bias"][None], 0)
    np.testing.assert_allclose(
        in_onnxruntime(graph, x), hidden @ head["kernel"] + head["bias"][None], atol=1e-5
    )


def test_ranges_that_could_not_move_are_an_error():
    start, _, x = trained_plain(optax.sgd(0.1), steps=0)
    with (
        pytest.raises(qt.InvalidInput, match=r"could not move .*mutable=\[\"batch_stats\"\]"),
        qt.quant_trim(CONFIG, 1.0, train=True),
    ):
        Plain().apply(start, x)


class TwoInputs(nn.Module):
    """An image and numbers beside it."""

    @nn.compact
    def __call__(self, image, numbers):
        seen = nn.relu(nn.Conv(8, (3, 3), padding=1, name="conv")(image)).mean(axis=(1, 2))
        told = nn.relu(nn.Dense(8, name="numbers")(numbers))
        return nn.Dense(4, name="head")(jnp.concatenate([seen, told], -1))


def test_two_inputs():
    model = TwoInputs()
    image = jax.random.normal(jax.random.key(0), (32, 8, 8, 3))
    numbers = jax.random.normal(jax.random.key(1), (32, 5))
    variables = model.init(jax.random.key(2), image, numbers)
    variables = qt.attach_statistics(model, variables, CONFIG, image, numbers)

    @jax.jit
    def observe(variables):
        with qt.quant_trim(CONFIG, 1.0, train=True) as visit:
            _, new = model.apply(variables, image, numbers, mutable=["batch_stats"])
        assert set(visit.layers) == {"conv", "numbers", "head"}
        return {**variables, **new}

    variables = observe(variables)
    expected = model.apply(variables, image, numbers)
    graph = qt.to_onnx(model.apply, variables, ((8, 8, 3), (5,)), input_names=("image", "numbers"))
    nchw = np.ascontiguousarray(np.asarray(image).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(in_onnxruntime(graph, nchw, numbers), expected, atol=1e-5)

    def packed(variables, x):
        return model.apply(variables, x[:, :192].reshape(-1, 8, 8, 3), x[:, 192:])

    flat = np.concatenate([np.asarray(image).reshape(32, -1), numbers], -1)
    chosen = {"backends": "onnxruntime", "schemes": ["int8-pc-minmax"], "runtimes": ["reference"]}
    with pytest.raises(qt.InvalidInput, match=r"test images lacks the arrays .*'numbers'"):
        qt.evaluate(graph, {"image": nchw, "numbers": numbers}, (nchw, LABELS), **chosen)
    both = {"image": nchw, "numbers": np.asarray(numbers)}
    _, row = qt.evaluate(graph, both, both | {"labels": LABELS}, **chosen)
    assert row["status"] == "ok" and row["sqnr_db"] > 25
    one_input = qt.to_onnx(packed, variables, (197,))
    np.testing.assert_allclose(in_onnxruntime(one_input, flat), expected, atol=1e-5)
    float32, int8 = qt.evaluate(one_input, flat, (flat, LABELS), **chosen)
    assert float32["top1"] == np.mean(np.argmax(expected, -1) == LABELS)
    assert int8["status"] == "ok" and int8["sqnr_db"] > 25


def test_regression_has_fidelity_without_labels():
    model, x = Plain(outputs=1), jax.random.normal(jax.random.key(0), (32, 8))
    variables = model.init(jax.random.key(1), x)
    graph = qt.to_onnx(model.apply, variables, (8,))
    np.testing.assert_allclose(in_onnxruntime(graph, x), model.apply(variables, x), atol=1e-5)
    inputs, nothing = np.asarray(x), np.zeros(32, int)
    schemes = ["int8-pc-minmax", "int4w-pc-minmax"]
    _, *rows = qt.evaluate(
        graph, inputs, (inputs, nothing), backends="onnxruntime", schemes=schemes, runtimes=["reference"]
    )
    power = np.mean(np.square(model.apply(variables, x)))
    for row in rows:
        assert row["sqnr_db"] == pytest.approx(10 * np.log10(power / row["logit_mse"]), abs=0.01)
    found = {row["scheme"]: row["sqnr_db"] for row in rows}
    assert found["int8-pc-minmax"] > found["int4w-pc-minmax"] + 10
