"""Take LSQ, PACT and Qwix through the trainer, the checkpoint and the export."""

import dataclasses
import doctest
import importlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import qt_jax as qt
from experiments import models
from experiments.baselines import learned_ranges
from experiments.baselines.lsq import LSQ
from experiments.configs.training import PRESETS, Config, float_twin, lambda_schedule, quant_config
from experiments.data import load
from experiments.pipeline import describe
from experiments.training import loop, quantizers
from experiments.training.program import fine_tune
from experiments.training.state import create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_predict, make_train_step
from qt_jax.export.clips import learned_clips
from qt_jax.export.deploy import deploy
from qt_jax.export.encodings import read_ranges
from qt_jax.export.network import load as load_network
from qt_jax.grid import quantization_parameters

pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")

CONFIG = dataclasses.replace(
    PRESETS["smoke"],
    dataset="digits",
    train_limit=64,
    calibration_size=32,
    batch_size=32,
    epochs=1,
    sched="constant",
    reverse_pruning=None,
    weight_decay=0.5,
)
DIGITS = load("digits")


class Tiny(nn.Module):
    """Apply a convolution, whose input is signed, and a head, whose input is not."""

    width: int = 4
    num_classes: int = 10
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm")(x)
        x = jnp.mean(nn.relu(x), axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


TINY = Tiny()
SPLIT = Split(jnp.asarray(DIGITS.train_images[:64]), jnp.asarray(DIGITS.train_labels[:64]))


def with_quantizer(quantizer: str, **changes) -> Config:
    return dataclasses.replace(CONFIG, quantizer=quantizer, **changes)


def steps(config: Config, count: int, model: nn.Module = TINY):
    """Return the states after 0, 1, ... `count` steps, on the host."""
    tx, lam = optimizer(config, 4), lambda_schedule(config, 4)
    state = create_state(config, model, tx, (8, 8, 1))
    run = make_train_step(config, model, tx, lam, DIGITS.mean, DIGITS.std, 10)
    order, found = epoch_order(config, 64, 0), [jax.tree.map(np.asarray, state)]
    for _ in range(count):
        state, _ = run(state, Totals.zero(), SPLIT, order, jnp.int32(1))
        found.append(jax.tree.map(np.array, state))
    return found


@pytest.mark.parametrize("module", ["baselines.lsq", "baselines.pact", "configs.training"])
def test_docstring_examples(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    with jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(importlib.import_module(f"experiments.{module}"), optionflags=flags)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("per_channel", [False, True])
def test_first_batch_sets_steps_then_they_learn(per_channel):
    config = with_quantizer("lsq", bits=4, per_channel=per_channel, learning_rate=0.0)
    before, after = steps(config, 1)
    kernel = before.params["head"]["kernel"]
    expected = 2 * np.abs(kernel).mean(0 if per_channel else None) / np.sqrt(7)
    np.testing.assert_allclose(after.params["head"]["lsq_kernel"], expected, rtol=1e-5)
    assert after.params["stem"]["lsq_input"] > 0

    _, first, second = steps(dataclasses.replace(config, learning_rate=0.1), 2)
    moved = np.abs(second.params["head"]["lsq_kernel"] - first.params["head"]["lsq_kernel"])
    assert np.all(moved > 0)
    assert np.all(second.params["head"]["lsq_kernel"] > 0)


def test_weight_decay_spares_steps_and_strikes_alpha():
    names = {"kernel": True, "bias": False, "lsq_kernel": False, "lsq_input": False, "pact_input": True}
    zeros = {"head": {name: jnp.zeros(()) for name in names}}
    assert jax.tree_util.tree_map_with_path(quantizers.is_decayed, zeros)["head"] == names
    ones = jax.tree.map(jnp.ones_like, zeros)
    tx = optimizer(dataclasses.replace(CONFIG, learning_rate=1.0), 10)
    moved = tx.update(zeros, tx.init(ones), ones)[0]["head"]
    assert {name: bool(value < 0) for name, value in moved.items()} == names


@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
def test_delayed_start_initialises_when_lambda_leaves_zero(quantizer):
    config = with_quantizer(quantizer, sched="step", warmup=0.5, learning_rate=0.01)
    states = steps(config, 4)
    counts = [int(state.batch_stats["head"]["quant_input"]["count"]) for state in states]
    assert counts == [0, 0, 0, 1, 2]
    name = "lsq_input" if quantizer == "lsq" else "pact_input"
    values = [float(state.params["head"][name]) for state in states]
    assert values[:3] == [0.0] * 3 and values[3] > 0 and values[4] != values[3]
    plain = steps(dataclasses.replace(float_twin(config), learning_rate=0.01), 2)
    for leaf in ("kernel", "bias"):
        np.testing.assert_allclose(
            states[2].params["head"][leaf], plain[2].params["head"][leaf], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
def test_published_ranges_are_those_of_the_deployed_parameters(quantizer):
    config = with_quantizer(quantizer, ema=0.5, learning_rate=0.05)
    state = steps(config, 2)[-1]
    specs = quant_config(config).sites("head")
    found, average = state.batch_stats["head"], state.average["head"]
    if quantizer == "pact":
        assert found["quant_kernel"]["high"] == np.abs(average["kernel"]).max()
        assert found["quant_input"]["high"] == average["pact_input"]
        assert found["quant_input"]["low"] == 0.0
        assert state.batch_stats["stem"]["quant_input"]["low"] < 0.0  # the image keeps its range
    else:
        for site, spec in (("kernel", specs.weights), ("input", specs.inputs)):
            low, high = (found[f"quant_{site}"][end] for end in ("low", "high"))
            scale, zero_point = quantization_parameters(low, high, spec)
            np.testing.assert_allclose(scale, average[f"lsq_{site}"], rtol=1e-6)
            assert float(zero_point) == 0.0
    assert not np.array_equal(average["kernel"], state.params["head"]["kernel"])


@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
def test_evaluation_is_the_training_forward_to_the_bit(quantizer):
    config = with_quantizer(quantizer, bits=4)
    state = steps(config, 2)[-1]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
    quantizer_ranges = quantizers.LEARNED[quantizer]

    @jax.jit
    def training(variables, x):
        """Run the training forward with batch norm and signed ranges frozen."""
        frozen = {
            site: range_._replace(observe=lambda x, seen, spec, config: seen)
            for site, range_ in quantizer_ranges.items()
        }
        with learned_ranges.learn_ranges(frozen, quant_config(config), jnp.float32(1.0)):
            return model_apply(variables, x, mutable=["batch_stats"])[0]

    model_apply = partial(TINY.apply, train=False)
    evaluated = jax.jit(partial(quantizers.quantized_forward, config, TINY))(variables, x)
    np.testing.assert_array_equal(training(variables, x), evaluated)
    assert not np.array_equal(evaluated, model_apply(variables, x))


@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
def test_bfloat16_and_the_loop_keep_every_type(quantizer):
    config = with_quantizer(quantizer, dtype="bfloat16", steps_per_dispatch=2)
    model, tx = TINY.clone(dtype=jnp.bfloat16), optimizer(config, 4)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(lambda: create_state(config, model, tx, (8, 8, 1)))
        run = make_train_step(config, model, tx, lambda_schedule(config, 4), (0.5,), (0.5,), 10)
        totals, order = jax.eval_shape(Totals.zero), jax.eval_shape(lambda: epoch_order(config, 64, 0))
        after, _ = jax.eval_shape(run, state, totals, SPLIT, order, jax.ShapeDtypeStruct((), jnp.int32))
    assert after == state


@pytest.fixture(scope="module", params=["lsq", "pact"])
def trained(request, tmp_path_factory):
    """Return (config, folder, deployed variables) of a run of two steps with a model.json."""
    config, folder = with_quantizer(request.param), tmp_path_factory.mktemp(request.param)
    variables = loop.train(config, TINY, DIGITS, folder, request.param)
    describe(config, DIGITS, f"checkpoints/{request.param}", folder / "model.json")
    return config, folder, variables


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.MODELS, CONFIG.model, Tiny)


def test_deployed_variables_are_the_plain_models(trained):
    _, _, variables = trained
    plain = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert jax.tree.structure(plain["params"]) == jax.tree.structure(variables["params"])
    assert jax.tree.map(np.shape, plain["params"]) == jax.tree.map(np.shape, variables["params"])


def test_exports_carry_the_learned_ranges_and_no_parameter_of_them(trained, tiny, tmp_path):
    config, folder, variables = trained
    network = load_network(folder)
    assert network.config == quant_config(config)
    path = tmp_path / "model.onnx"
    summary = deploy(network, path)
    graph = onnx.load(path)
    assert not [w.name for w in graph.graph.initializer if "lsq" in w.name or "pact" in w.name]
    ranges = read_ranges(summary["ranges"])
    head = variables["batch_stats"]["head"]
    [learned_head] = [ranges.inputs[name] for name, w in ranges.kernels.items() if w.startswith("head")]
    assert learned_head.source == "learned"
    assert learned_head.high == (float(head["quant_input"]["high"]),)

    quantized = deploy(network, tmp_path / "int8.onnx", qdq="int8")
    assert quantized["parity"]["logits"]["top1_agreement"] > 0.9  # LSQ's first steps are coarse

    clips = learned_clips(graph, network.variables, network.config)
    assert (0.0, pytest.approx(float(head["quant_input"]["high"]))) in clips.values()


def test_a_relaunch_goes_on_with_what_was_learned(trained, monkeypatch):
    config, folder, variables = trained
    monkeypatch.setattr(loop, "_run_epoch", None)
    again = loop.train(config, TINY, DIGITS, folder, config.quantizer)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_fine_tuning_starts_from_the_network_and_its_own_ranges(trained, tmp_path):
    config, folder, variables = trained
    source = folder / "checkpoints" / config.quantizer
    tx = optimizer(CONFIG, 4)
    for quantizer in ("quant-trim", "lsq"):
        fresh = create_state(with_quantizer(quantizer, ema=0.5), TINY, tx, (8, 8, 1))
        state = fine_tune(fresh, source)
        assert jax.tree.structure(state) == jax.tree.structure(fresh)
        jax.tree.map(np.testing.assert_array_equal, quantizers.plain(state.params), variables["params"])
        norm = state.batch_stats["norm"]["mean"]
        np.testing.assert_array_equal(norm, variables["batch_stats"]["norm"]["mean"])
        assert int(state.batch_stats["head"]["quant_input"]["count"]) == 0
        jax.tree.map(np.testing.assert_array_equal, state.average, state.params)
    assert fine_tune(fresh, None) is fresh

    tuned = dataclasses.replace(float_twin(CONFIG), fine_tune=source, learning_rate=0.0)
    result = loop.train(tuned, TINY, DIGITS, tmp_path / "run", "float")
    jax.tree.map(np.testing.assert_array_equal, result["params"], variables["params"])


def test_fine_tuning_from_another_network_or_from_nothing_is_refused(trained, tmp_path):
    config, folder, _ = trained
    source = folder / "checkpoints" / config.quantizer
    for other in (Tiny(width=8), nn.Sequential([TINY]), Tiny(num_classes=7)):
        state = jax.eval_shape(
            lambda other=other: create_state(CONFIG, other, optimizer(CONFIG, 4), (8, 8, 1))
        )
        with pytest.raises(qt.InvalidInput, match=r"--fine-tune .*it is another network, or of another"):
            fine_tune(state, source)
    with pytest.raises(qt.InvalidInput, match="no such folder"):
        fine_tune(state, tmp_path / "nothing")


def test_qwix_trains_the_plain_tree_and_keeps_no_range(tmp_path):
    pytest.importorskip("qwix")
    config = with_quantizer("qwix", bits=4)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = loop.train(config, TINY, DIGITS, tmp_path, "qwix")
        plain = TINY.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, plain)
        predict = partial(make_predict, config, TINY, DIGITS.mean, DIGITS.std)
        images = DIGITS.validation_images[:8]
        rounded, exact = (predict(quantized=q)(variables, images) for q in (True, False))
    assert not np.allclose(rounded, exact)
    describe(config, DIGITS, "checkpoints/qwix", tmp_path / "model.json")
    assert '"quantization": null' in (tmp_path / "model.json").read_text()


def test_variables_without_learned_ranges_and_transposed_kernels_are_told():
    x = jnp.ones((1, 4, 4, 2))
    dense, transposed = nn.Dense(2), nn.ConvTranspose(3, (2, 2), transpose_kernel=True)

    def forward(model, variables, config):
        with learned_ranges.learn_ranges(LSQ, config, jnp.float32(1.0)):
            return model.apply(variables, x, mutable=["batch_stats"])

    with pytest.raises(qt.InvalidInput, match=r"no learned range for '/?quant_kernel'.* attach"):
        forward(dense, dense.init(jax.random.key(0), x), qt.QuantConfig())
    config = qt.QuantConfig(weights=qt.QuantSpec(4, axis=-1))
    with pytest.raises(qt.InvalidInput, match="transposed kernel"):
        forward(transposed, transposed.init(jax.random.key(0), x), config)


@pytest.mark.parametrize("quantizer", ["lsq", "pact", "qwix"])
@pytest.mark.parametrize(
    "changes",
    [{"sched": "quartic"}, {"sched": "none"}, {"reverse_pruning": 0.95}, {"sites": "outputs"}],
)
def test_what_belongs_to_quant_trim_is_refused(quantizer, changes):
    with pytest.raises(qt.InvalidInput, match=f"--quantizer {quantizer} goes with --sched constant"):
        with_quantizer(quantizer, **changes)


def test_configs_of_quantizers():
    for changes in ({"sched": "step"}, {"bits": 9}, {"activation_bits": 4}):
        with pytest.raises(qt.InvalidInput, match="--quantizer qwix goes with"):
            with_quantizer("qwix", **changes)
    lsq, pact = (quant_config(with_quantizer(name, bits=4)) for name in ("lsq", "pact"))
    assert lsq.weights.integer_range == (-8, 7) and pact.weights.integer_range == (-7, 7)
    assert float_twin(with_quantizer("lsq")) == float_twin(CONFIG)
    assert with_quantizer("pact", preset="cpu").directory.name == "digits-resnet8-pact-constant-0"
