"""Check the learned grids of repeated layers, and that gains travel with the kernels they are folded into."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

import qt_jax as qt
from qt_jax.errors import InvalidInput
from qt_jax.export import save, to_onnx, to_qdq, verify
from qt_jax.export.clips import clipped_forward, insert_clips, learned_clips
from qt_jax.export.layout import as_graph
from qt_jax.export.learned import learned_encodings
from qt_jax.export.naming import KERNELS, kernel_origins
from qt_jax.export.qdq import insert_qdq
from qt_jax.export.ranges import tensor_ranges
from qt_jax.export.verification import fake_quant_forward, parity

CONFIG = qt.QuantConfig()
BY_CHANNEL = qt.QuantConfig(weights=qt.QuantSpec(axis=-1))
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(24, 4)).astype(np.float32)
SEQUENCES = RNG.normal(size=(24, 3, 4)).astype(np.float32)
IMAGES = RNG.normal(size=(24, 6, 5, 3)).astype(np.float32)


def observed(net, inputs, config=CONFIG):
    """Return drawn variables, none of them 0 or 1, whose ranges have seen one batch."""
    random = np.random.default_rng(1)

    def draw(leaf):
        kernel = random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return np.float32(kernel if leaf.ndim > 1 else random.uniform(0.2, 1.5, leaf.shape))

    variables = jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), inputs))
    variables = qt.attach_statistics(net, variables, config, inputs)
    with qt.quant_trim(config, 0.0, train=True):
        _, seen = jax.jit(partial(net.apply, mutable=["batch_stats"]))(variables, inputs)
    return jax.tree.map(np.array, {**variables, **seen})


def learned_sites_alone(net, variables, inputs, config=CONFIG):
    """Return the parity of the QDQ graph with pairs at the learned sites only."""
    model = to_onnx(net.apply, variables, inputs.shape[1:])
    ranges = tensor_ranges(model, variables, config, as_graph(inputs, "nchw"))
    exact = insert_qdq(model, ranges, learned_only=True)
    (found,) = parity(exact, fake_quant_forward(net.apply, config), variables, inputs, ranges).values()
    return ranges, found


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4, name="dense")(x)), None


class Stack(nn.Module):
    """Scan over `depth` layers, whose parameters are stacked along `axis` or shared."""

    depth: int = 3
    stacked: bool = True
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes = {"params": self.axis, "batch_stats": 0} if self.stacked else {"batch_stats": 0}
        shared = {} if self.stacked else {"variable_broadcast": "params"}
        scan = nn.scan(Block, axes, split_rngs={"params": self.stacked}, length=self.depth, **shared)
        return nn.Dense(1, name="head")(scan(name="layers")(x, None)[0])


@pytest.mark.parametrize("config", [CONFIG, BY_CHANNEL], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers_have_the_range_of_their_step(axis, config):
    net = Stack(axis=axis)
    variables = observed(net, ROWS, config)
    ranges, found = learned_sites_alone(net, variables, ROWS, config)
    assert found["equal_integers"] > 0.99 and found["sqnr_db"] > 60
    seen = variables["batch_stats"]["layers"]["dense"]
    names = ["layers/dense", "layers/dense_1", "layers/dense_2"]
    for step, name in enumerate(names):
        assert ranges.inputs[name].high == (float(seen["quant_input"]["high"][step]),)
        encoding = ranges.tensors[ranges.kernels[name]]
        assert encoding.source == "learned"
        high = np.broadcast_to(seen["quant_kernel"]["high"][step], (4,))
        np.testing.assert_allclose(encoding.high, high, rtol=1e-6)


def test_equal_kernels_of_two_steps_stay_two():
    variables = observed(Stack(), ROWS)
    kernel = variables["params"]["layers"]["dense"]["kernel"]
    kernel[1] = kernel[0]
    model = to_onnx(Stack().apply, variables, (4,))
    steps = [origin.steps for origin in kernel_origins(model).values()]
    assert steps == [(0,), (1,), (2,), ()]


@pytest.mark.parametrize("depth", [1, 3])
def test_layers_that_share_a_kernel_have_an_input_range_for_each_step(depth):
    net = Stack(depth, stacked=False)
    variables = observed(net, ROWS)
    ranges, found = learned_sites_alone(net, variables, ROWS)
    assert found["equal_integers"] > 0.99 and found["sqnr_db"] > 80
    assert len(set(ranges.kernels.values())) == 2 and len(ranges.inputs) == depth + 1


class Nested(nn.Module):
    """Scan over three scans over two layers."""

    @nn.compact
    def __call__(self, x):
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return lift(Block, 2)(name="inner")(x, None)[0], None

        def lift(body, length):
            return nn.scan(body, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=length)

        return nn.Dense(2, name="head")(lift(Inner, 3)(name="outer")(x, None)[0])


def test_a_scan_inside_a_scan_has_the_range_of_both_steps():
    variables = observed(Nested(), ROWS)
    ranges, found = learned_sites_alone(Nested(), variables, ROWS)
    assert found["equal_integers"] > 0.99 and found["sqnr_db"] > 60
    high = variables["batch_stats"]["outer"]["inner"]["dense"]["quant_input"]["high"]
    assert high.shape == (3, 2)
    learned = [encoding.high[0] for name, encoding in ranges.inputs.items() if name != "head"]
    np.testing.assert_array_equal(learned, high.ravel())


def test_the_copies_of_vmap_are_refused_by_name():
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            dense = nn.vmap(nn.Dense, in_axes=None, out_axes=1, axis_size=2, **lifted)
            return dense(3, name="members")(x)

    variables = observed(Ensemble(), ROWS)
    with pytest.raises(InvalidInput, match="'members' has learned a range for each step"):
        to_qdq(Ensemble().apply, variables, (4,), CONFIG, ROWS)


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]
    both_ways: bool = False

    @nn.compact
    def __call__(self, x):
        def rnn(name):
            return nn.RNN(self.cell(4), variable_axes={"batch_stats": 0}, name=name)

        x = nn.Bidirectional(rnn("forward"), rnn("back"))(x) if self.both_ways else rnn("rnn")(x)
        return nn.Dense(3, name="head")(x[:, -1])


CELLS = [(nn.LSTMCell, False), (nn.GRUCell, False), (nn.SimpleCell, True)]


@pytest.mark.parametrize(("cell", "both_ways"), CELLS)
def test_recurrent_cells_have_the_range_of_their_step(cell, both_ways):
    net = Recurrent(cell, both_ways)
    variables = observed(net, SEQUENCES)
    ranges, found = learned_sites_alone(net, variables, SEQUENCES)
    assert found["equal_integers"] > 0.99 and found["sqnr_db"] > 60
    assert len(ranges.inputs) == len(ranges.kernels) and "head" in ranges.inputs


@pytest.mark.parametrize("net", [Stack(), Recurrent(nn.LSTMCell)], ids=["stack", "LSTM"])
def test_clips_of_repeated_layers_are_those_of_their_steps(net):
    inputs = ROWS if isinstance(net, Stack) else SEQUENCES
    variables = observed(net, inputs)

    def halved(path, leaf):
        return leaf / 2 if path[-1].key in ("low", "high") else leaf

    variables = jax.tree_util.tree_map_with_path(halved, variables)
    model = to_onnx(net.apply, variables, inputs.shape[1:])
    clips = learned_clips(model, variables, CONFIG)
    assert len(clips) > 2
    clipped = insert_clips(model, clips)
    verify(clipped, clipped_forward(net.apply, model, clips), variables, inputs)
    with pytest.raises(InvalidInput, match="differ from the JAX forward"):
        verify(clipped, net.apply, variables, inputs)
    assert clipped.metadata_props == model.metadata_props


def test_steps_that_the_graph_does_not_tell_are_refused_by_name():
    net = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    variables = observed(net, ROWS)
    model = to_onnx(net.apply, variables, (4,))
    seen = variables["batch_stats"]
    seen["layers_0"] = jax.tree.map(lambda leaf: np.stack([leaf] * 3), seen["layers_0"])
    with pytest.raises(InvalidInput, match="'layers_0' has learned a range for each step"):
        learned_encodings(model, variables, CONFIG)
    config = qt.QuantConfig(rules=(qt.Rule("layers_0", skip=True),))
    assert set(learned_encodings(model, variables, config)[1]) == {"layers_1"}


def test_a_shared_kernel_with_other_ranges_in_other_steps_is_refused():
    net = Stack(stacked=False)
    variables = observed(net, ROWS)
    model = to_onnx(net.apply, variables, (4,))
    variables["batch_stats"]["layers"]["dense"]["quant_kernel"]["high"][1] *= 2
    with pytest.raises(InvalidInput, match="kernel of 'layers/dense' is one for all steps"):
        learned_encodings(model, variables, CONFIG)


class Local(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvLocal(4, (3, 3), name="local")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_layers_that_share_no_kernel_between_places():
    variables = observed(Local(), IMAGES)
    ranges, found = learned_sites_alone(Local(), variables, IMAGES)
    assert found["equal_integers"] > 0.99 and found["sqnr_db"] > 80
    assert ranges.tensors["local/kernel"].source == "learned"
    config = qt.QuantConfig(weights=qt.QuantSpec(axis=-1))
    variables = observed(Local(), IMAGES, config)
    with pytest.raises(InvalidInput, match='"local/kernel" is a batch of matrices'):
        to_qdq(Local().apply, variables, IMAGES.shape[1:], config, IMAGES)


KINDS = {
    "Conv": partial(nn.Conv, 6, (3, 3), padding=1),
    "grouped": partial(nn.Conv, 6, (3, 3), padding=1, feature_group_count=3),
    "ConvTranspose": partial(nn.ConvTranspose, 6, (3, 2), (2, 2)),
    "points": partial(nn.Dense, 6),
    "flat": partial(nn.Dense, 6),
    "heads": partial(nn.DenseGeneral, (2, 3), axis=(1, 2, 3)),
}


class Folded(nn.Module):
    """Apply one layer of `KINDS` and a batch norm."""

    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "flat":
            x = nn.relu(nn.Conv(3, (3, 3), padding=1, name="conv")(x)).reshape(len(x), -1)
        x = KINDS[self.kind](name="layer")(x)
        x = x.reshape(len(x), 6) if self.kind == "heads" else x
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_of_a_folded_batch_norm_is_carried_in_float64(kind):
    net = Folded(kind)
    variables = observed(net, IMAGES)
    variables["params"]["norm"]["scale"] = np.float32([1.5, -0.7, 0.0, 0.2, 1e-3, 3.0])
    model = to_onnx(net.apply, variables, IMAGES.shape[1:])
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    scale, variance = (variables[a]["norm"][b] for a, b in (("params", "scale"), ("batch_stats", "var")))
    gains = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + 1e-5)
    np.testing.assert_allclose(kernel_origins(model)["layer/kernel"].gain, gains, rtol=1e-9)

    learned = variables["batch_stats"]["layer"]["quant_kernel"]["high"] / 127
    encoding = learned_encodings(model, variables, CONFIG)[0]["layer/kernel"]
    kept = gains != 0
    np.testing.assert_allclose(np.array(encoding.scale)[kept], (learned * np.abs(gains))[kept], rtol=1e-6)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    integers = np.moveaxis(encoding.integers(held["layer/kernel"]), encoding.axis, 0).reshape(6, -1)
    raw = np.clip(np.rint(variables["params"]["layer"]["kernel"].astype(np.float64) / learned), -127, 127)
    trained = raw.reshape(-1, 6).T * np.sign(gains)[:, None]
    np.testing.assert_array_equal(np.sort(integers, axis=1), np.sort(trained, axis=1))


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_the_file_with_its_gains_is_standard(opset, tmp_path):
    net = Folded("Conv")
    variables = observed(net, IMAGES)
    save(to_onnx(net.apply, variables, IMAGES.shape[1:], opset=opset), tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    written = json.loads(session.get_modelmeta().custom_metadata_map[KERNELS])
    assert written["layer/kernel"][0] == "params/layer/kernel" and len(written["layer/kernel"][1]) == 6
    held = onnx.load(tmp_path / "model.onnx")
    assert not any(tensor.metadata_props for tensor in held.graph.initializer)
    assert learned_encodings(held, variables, CONFIG)[0]["layer/kernel"].source == "learned"


def test_the_kernel_of_a_layer_that_transforms_its_parameter_is_ranged_by_itself():
    class Standardized(nn.Conv):
        def param(self, name, *arguments, **options):
            value = super().param(name, *arguments, **options)
            return value / (value.std((0, 1, 2), keepdims=True) + 1e-5) if name == "kernel" else value

    net = Standardized(4, (3, 3), name="layer")
    variables = observed(net, IMAGES)
    model = to_onnx(net.apply, variables, IMAGES.shape[1:])
    kernels, inputs, quantized = learned_encodings(model, variables, CONFIG)
    ((name, encoding),) = kernels.items()
    assert (name, encoding.source) == ("kernel", "folded kernel")
    assert list(quantized.values()) == [name] and quantized.keys() == inputs.keys()


def test_scales_along_another_axis_than_the_output_channels_are_not_taken():
    """The kernel is square, so that the number of scales says nothing."""
    net = nn.Dense(4)
    variables = observed(net, ROWS, BY_CHANNEL)
    model = to_onnx(net.apply, variables, (4,))
    assert learned_encodings(model, variables, BY_CHANNEL)[0]["kernel"].source == "learned"
    variables["params"]["kernel"] = variables["params"]["kernel"].T
    assert learned_encodings(model, variables, BY_CHANNEL)[0]["kernel"].source == "folded kernel"


class Prenormalised(nn.Module):
    """Put a norm before a layer, behind what it does not fold into."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(6, name="first")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(5, name="head")(x)


def test_ranges_that_are_attached_after_the_export_are_not_those_of_a_folded_input():
    """Without ranges the norm folds into the layer behind it, which then reads what stood before the norm."""
    net = Prenormalised()
    variables = observed(net, ROWS)
    plain = {"params": variables["params"], "batch_stats": {"norm": variables["batch_stats"]["norm"]}}
    early = to_onnx(net.apply, plain, (4,))
    assert "BatchNormalization" not in [node.op_type for node in early.graph.node]
    for read in (
        lambda config: tensor_ranges(early, variables, config, ROWS),
        lambda config: learned_clips(early, variables, config),
    ):
        with pytest.raises(InvalidInput, match="'head' does not read what it has learned the range of"):
            read(CONFIG)
        read(qt.QuantConfig(rules=(qt.Rule("head", skip=True),)))
    assert learned_sites_alone(net, variables, ROWS)[1]["sqnr_db"] > 60.0


class Untouched(nn.Module):
    """Put a product beside a layer that Quant-Trim does not reach: with the table of an embedding."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Embed(4, 4, name="table").attend(nn.Dense(4, name="dense")(x))), None


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 1, "batch_stats": 0}
        x, _ = nn.scan(Untouched, axes, split_rngs={"params": True}, length=3)(name="layers")(x, None)
        return nn.Dense(1, name="head")(nn.relu(x))


@pytest.mark.parametrize("skipped", [(), ("layers/dense",)])
def test_clips_beside_repeated_layers_without_ranges(skipped):
    net, config = Half(), qt.QuantConfig(rules=tuple(qt.Rule(path, skip=True) for path in skipped))
    variables = observed(net, ROWS, config)
    model = to_onnx(net.apply, variables, (4,))
    clips = learned_clips(model, variables, config)
    assert clips
    clipped = insert_clips(model, {name: (low / 2, high / 2) for name, (low, high) in clips.items()})
    halved = {name: (low / 2, high / 2) for name, (low, high) in clips.items()}
    verify(clipped, clipped_forward(net.apply, model, halved), variables, ROWS)
    with pytest.raises(InvalidInput, match="parity"):
        verify(clipped, net.apply, variables, ROWS)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_the_gates_of_a_recurrent_cell_are_rounded_in_no_graph(cell):
    """A product of two float operators has no integer kernel to gain, and training does not round it."""
    net = Recurrent(cell)
    variables = observed(net, SEQUENCES)
    model = to_onnx(net.apply, variables, SEQUENCES.shape[1:])
    ranges = tensor_ranges(model, variables, CONFIG, SEQUENCES)
    forward = fake_quant_forward(net.apply, CONFIG)
    (found,) = parity(insert_qdq(model, ranges), forward, variables, SEQUENCES, ranges).values()
    assert found["equal_integers"] == 1.0 and found["sqnr_db"] > 60.0
