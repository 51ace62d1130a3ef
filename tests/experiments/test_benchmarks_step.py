"""Check the benchmark of a training step: its variants, what it computes from times, what it records."""

import io
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from experiments import models
from experiments.benchmarks import step, timing, variants
from experiments.benchmarks.variants import Unfused, WithArithmetic, aqt_model
from qt_jax import records


class Tiny(nn.Module):
    """Apply one convolution, one norm and one head."""

    num_classes: int = 10
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), (4, 4), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))


@pytest.fixture
def promotion():
    """Allow implicit promotion, on which Qwix, AQT and Linen's batch norm in bfloat16 rely."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


qwix_warns = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
"""Of an alias that flax has deprecated and Qwix looks up."""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", Tiny)


def without(monkeypatch, *modules):
    """Make the imports of these packages fail."""
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


TORCH_STEP = "experiments.benchmarks.torch_step"
"""Stands for torch, which tyro looks for as well."""


def alone_and_nested(model, images):
    """Return variables of a model, alone and below "model"."""
    variables = model.init(jax.random.key(1), images)
    return variables, {collection: {"model": tree} for collection, tree in variables.items()}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_summary_in_closed_form():
    times = {
        variants.FP32: [10.0, 20.0, 40.0],
        variants.UNFUSED: [12.0, 16.0, 18.0],
        variants.QUANT_TRIM: [20.0, 24.0, 44.0],
        variants.PRUNED: [22.0, 11.0, 44.0],
        variants.PULL: [70.0, 72.0, 71.0],
        variants.QWIX: [15.0, 30.0, 80.0],
    }
    rows = step.summarise(times, every=50)
    assert list(rows) == [
        variants.FP32,
        variants.UNFUSED,
        variants.QUANT_TRIM,
        variants.PRUNED,
        variants.QWIX,
    ]
    expected = {"step_ms_p50": 20.0, "step_ms_min": 10.0, "ratio": 1.0, "ratio_paired": 1.0}
    quartiles = {"step_ms_p25": 15.0, "step_ms_p75": 30.0}
    assert rows[variants.FP32] == {**expected, **quartiles, "ratio_to_faster": 1.25}
    assert rows[variants.QUANT_TRIM]["ratio_to_faster"] == pytest.approx(24 / 16)
    assert rows[variants.QUANT_TRIM]["ratio"] == pytest.approx(24 / 20)
    assert rows[variants.QUANT_TRIM]["ratio_paired"] == pytest.approx(1.2)
    assert rows[variants.QWIX]["ratio_paired"] == pytest.approx(1.5)
    pruned = rows[variants.PRUNED]
    assert pruned["step_ms_p50"] == 22.0 and pruned["pruning_step_ms_p50"] == 71.0
    assert pruned["amortised_ms"] == pytest.approx((49 * 22 + 71) / 50)
    assert pruned["amortised_ratio"] == pytest.approx((49 * 22 + 71) / 50 / 20)


def test_variants_are_the_trainers_steps(tiny, monkeypatch):
    """Check that only Quant-Trim moves statistics, and that only the step that prunes clips kernels."""
    without(monkeypatch, "qwix", "aqt", TORCH_STEP)
    built, missing = variants.build(variants.step_config("tiny", 4, "float32"), steps=4)
    assert list(missing) == [variants.QWIX, variants.AQT, variants.TORCH, variants.TORCH_QAT]
    status, reason = missing[variants.QWIX]
    assert status == "unavailable" and reason.startswith("qwix cannot be imported: ")
    after = {}
    for name, variant in built.items():
        after[name] = variant.advance(variant.prepare(variant.state))
        assert int(after[name].step) == 1
    assert set(after[variants.FP32].batch_stats) == {"norm"}
    for name in (variants.QUANT_TRIM, variants.PRUNED, variants.PULL):
        assert int(after[name].batch_stats["conv"]["quant_input"]["count"]) == 1
    unpruned, pruned = (jax.tree.leaves(after[n].params) for n in (variants.QUANT_TRIM, variants.PRUNED))
    for a, b in zip(unpruned, pruned, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    plain, unfused = after[variants.FP32].params, after[variants.UNFUSED].params["model"]
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(unfused), strict=True):
        assert a.shape == b.shape
    assert not np.any(jax.tree.leaves(after[variants.PRUNED].opt_state[-1].tau))
    tau = after[variants.PULL].opt_state[-1].tau["conv"]["kernel"]
    assert np.max(np.abs(after[variants.PULL].params["conv"]["kernel"])) <= tau
    assert tau < np.max(np.abs(after[variants.PRUNED].params["conv"]["kernel"]))


def test_each_variant_is_timed_in_turn_after_the_warm_up():
    calls = []

    def variant(name):
        return timing.Variant(lambda state: (calls.append(name), state + 1)[1], 0)

    with Progress(console=Console(file=io.StringIO())) as progress:
        times = timing.measure({"a": variant("a"), "b": variant("b")}, 4, progress)
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == timing.WARM_UP + 4 and {*map(tuple, rounds)} == {("a", "b"), ("b", "a")}
    assert {name: len(mine) for name, mine in times.items()} == {"a": 4, "b": 4}


@qwix_warns
def test_command_line(tiny, promotion, tmp_path, capsys, monkeypatch):
    pytest.importorskip("qwix")
    without(monkeypatch, "aqt", TORCH_STEP)
    path = tmp_path / "records.jsonl"
    arguments = ["--model", "tiny", "--batch-size", "4", "--repeats", "2", "--out", str(path)]
    assert step.main(arguments) == 0
    rows = records.read(path)
    assert [row["variant"] for row in rows] == [
        variants.FP32,
        variants.UNFUSED,
        variants.QUANT_TRIM,
        variants.PRUNED,
        variants.RECIPE,
        variants.QWIX,
        variants.AQT,
        variants.TORCH,
        variants.TORCH_QAT,
    ]
    for row, package in zip(rows[-3:], ("aqt", "torch", "torch"), strict=True):
        assert row["status"] == "unavailable" and f"{package} cannot be imported" in row["reason"]
    assert [row["weight_bits"] for row in rows] == [None, None, 8, 8, 8, 8, 8, None, 8]
    assert [row["per_channel"] for row in rows] == [None, None, False, False, False, True, True, None, False]
    for row in rows[:-3]:
        assert (row["benchmark"], row["model"], row["batch_size"], row["repeats"]) == (
            "train_step",
            "tiny",
            4,
            2,
        )
        assert row["dtype"] == "float32"
        assert row["status"] == "ok" and row["reason"] is None
        assert 0 < row["step_ms_min"] <= row["step_ms_p50"] and row["ratio"] > 0
        assert row["versions"]["jax"] == jax.__version__
        assert row["peak_bytes"] > 0 and row["compile_seconds"] > 0
        assert row["peak_ratio"] == row["peak_bytes"] / rows[0]["peak_bytes"]
    assert rows[3]["every"] == 50 and rows[3]["amortised_ms"] > 0
    assert "amortised over 50" in capsys.readouterr().out


def test_a_missing_variant_is_a_row_with_its_reason():
    options = step.Options()
    missing = {variants.QWIX: ("unavailable", "qwix cannot be imported: no module")}
    rows = step.to_records(options, {}, missing)
    assert [(row["variant"], row["status"], row["step_ms_p50"]) for row in rows] == [
        (variants.QWIX, "unavailable", None)
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(step.table(options, rows))
    assert "unavailable" in console.file.getvalue() and "no module" in console.file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--model", "lenet"], "--model 'lenet' does not suit --dataset cifar10; choose one of fast"),
    ],
)
def test_wrong_input_is_told(capsys, arguments, message):
    assert step.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@qwix_warns
def test_qwix_leaves_the_parameters_as_they_are(tiny, promotion):
    """Train the same parameters with other arithmetic: integer sums in the forward."""
    pytest.importorskip("qwix")
    model = models.create("tiny", 10)
    x = jnp.ones((2, 32, 32, 3))
    plain, quantized = model.init(jax.random.key(0), x), variants.qwix_model(model).init(jax.random.key(0), x)
    assert same(plain, quantized)
    text = str(jax.make_jaxpr(lambda v: variants.qwix_model(model).apply(v, x))(quantized))
    assert "preferred_element_type=int32" in text


def test_aqt_rounds_forward_and_passes_gradients_straight_through(tiny, promotion):
    """Get rounded logits, and gradients near the float network's. AQT's own convolution has none."""
    pytest.importorskip("aqt")
    model = models.create("tiny", 10)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables, nested = alone_and_nested(model, images)
    quantized = aqt_model(model)

    def loss(network, variables):
        return jnp.sum(network.apply(variables, images) ** 2)

    text = str(jax.make_jaxpr(lambda v: quantized.apply(v, images))(nested))
    assert text.count("new_dtype=int8") == 4
    plain, rounded = model.apply(variables, images), quantized.apply(nested, images)
    assert 0 < np.max(np.abs(rounded - plain)) < 0.05 * np.max(np.abs(plain))
    exact = jax.grad(lambda v: loss(model, v))(variables)["params"]
    straight = jax.grad(lambda v: loss(quantized, v))(nested)["params"]["model"]
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(straight), strict=True):
        np.testing.assert_allclose(a, b, atol=0.1 * np.max(np.abs(a)))


def test_bfloat16_computes_in_it_and_keeps_everything_in_float32(promotion):
    for dtype in ("float32", "bfloat16"):
        config = variants.step_config("tiny", 4, dtype)
        model, split = models.create("tiny", 10, jnp.dtype(dtype)), variants.random_split(config, (16, 16, 3))
        variant = variants.compiled_step(config, model, split, steps=4)
        after = variant.advance(variant.state)
        kept = {leaf.dtype.name for leaf in jax.tree.leaves((after.params, after.batch_stats))}
        assert kept == {"float32", "int32"}
        forward = jax.make_jaxpr(model.apply)(after.deployed, jnp.ones((1, 16, 16, 3)))
        assert ("bf16" in str(forward)) == (dtype == "bfloat16")


def test_grouped_convolutions_are_those_of_jax():
    """Replace only the products, whose results are the same up to rounding."""
    model = models.create("mobilenetv2", 10)
    images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    variables, nested = alone_and_nested(model, images)
    grouped = WithArithmetic(model, jax.lax.conv_general_dilated)
    np.testing.assert_allclose(
        grouped.apply(nested, images), model.apply(variables, images), rtol=1e-3, atol=1e-4
    )
    assert "feature_group_count=32" in str(jax.make_jaxpr(grouped.apply)(nested, images))
    assert "feature_group_count=32" not in str(jax.make_jaxpr(model.apply)(variables, images))


def test_the_stricter_baseline_computes_the_same(tiny):
    model, images = models.create("tiny", 10), jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables, nested = alone_and_nested(model, images)
    np.testing.assert_array_equal(Unfused(model).apply(nested, images), model.apply(variables, images))
