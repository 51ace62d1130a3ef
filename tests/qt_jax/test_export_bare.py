"""Check that `python -m qt_jax.export --model` takes the inputs, outputs and checkpoints that people have."""

import json
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.core import freeze
from flax.training import checkpoints, train_state

import qt_jax as qt
from qt_jax.errors import InvalidInput
from qt_jax.export.__main__ import main
from qt_jax.export.bare import from_checkpoint
from qt_jax.export.inputs import Input, parse_inputs
from qt_jax.export.variables import find_variables, single_precision

MODULE = "nets_of_the_bare_export_test"
SOURCE = """
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp


class Net(nn.Module):
    width: int = 3
    dtype: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(2, dtype=self.dtype, name="head")(x)


class Training(Net):
    @nn.compact
    def __call__(self, x, train=True):
        return Net(name="net")(x, train)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.relu(nn.Dense(3, name="in")(x)))


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, ids, mask, deterministic):
        x = nn.Embed(7, 4, name="embed")(ids) * mask[..., None]
        x = nn.Dropout(0.5)(x, deterministic=deterministic)
        return {"logits": nn.Dense(2, name="head")(x.sum(1)), "hidden": (x, 2 * x)}


@flax.struct.dataclass
class Output:
    sample: jax.Array
    loss: jax.Array


class Denoiser(nn.Module):
    @nn.compact
    def __call__(self, sample, time):
        x = nn.Conv(3, (3, 3), padding=1, name="conv")(sample)
        x = x + nn.Dense(3, name="time")(time[:, None].astype(jnp.float32))[:, None, None]
        return Output(x, jnp.mean(x))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + 1, nn.Dense(2, name="out")(x)


class Failing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {}["key"]


class Empty(nn.Module):
    def __call__(self, x):
        return nn.relu(x)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        split = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(2, kernel_init=split, name="out")(x)
"""
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


class State(train_state.TrainState):
    batch_stats: dict


@pytest.fixture(scope="module")
def variables(nets) -> dict:
    """Return variables of `Net` of which no leaf is as it was initialised."""
    made = nets.Net().init(jax.random.key(0), X)
    return jax.tree.map(lambda leaf: leaf + jnp.linspace(0.1, 0.5, leaf.size).reshape(leaf.shape), made)


def save(path: Path, tree) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def given(name: str, *inputs: str, **options) -> list[str]:
    """Return the options of a network: its inputs, and others as JSON or as they are."""
    words = ["--model", f"{MODULE}:{name}"]
    for text in inputs:
        words += ["--input-shape", *text.split()]
    for option, value in options.items():
        words += [f"--{option}", *(value.split() if isinstance(value, str) else [json.dumps(value)])]
    return words


def export(capsys, tmp_path, checkpoint, *words) -> dict:
    """Run a command that succeeds; return the summary."""
    assert main([str(checkpoint), *map(str, words), "--out", str(tmp_path / "m.onnx"), "--json"]) == 0
    printed = capsys.readouterr()
    assert not printed.err and printed.out.count("\n") == 1
    return json.loads(printed.out)


def refused(capsys, tmp_path, checkpoint, *words) -> str:
    """Run a command that is refused; return its one line."""
    assert main([str(checkpoint), *map(str, words), "--out", str(tmp_path / "m.onnx")]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not (tmp_path / "m.onnx").exists()
    return printed.err


def graph_outputs(tmp_path, **inputs) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def trained(variables) -> State:
    """Return a TrainState whose optimizer has two trees that look like the parameters."""
    return State.create(apply_fn=None, tx=optax.adam(1e-3), **variables)


def whole(variables) -> train_state.TrainState:
    """Return a TrainState whose `params` are all that `init` returned."""
    return train_state.TrainState.create(apply_fn=None, params=variables, tx=optax.adam(1e-3))


def managed(path, item) -> Path:
    with ocp.CheckpointManager(path) as manager:
        for step in (9, 10):
            manager.save(step, args=item)
    return path


def composite(variables) -> ocp.args.Composite:
    items = {name: ocp.args.StandardSave(tree) for name, tree in variables.items()}
    return ocp.args.Composite(**items, note=ocp.args.JsonSave({"epoch": 3}))


def by_pytree(path, tree) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def by_flax(path, tree) -> Path:
    for step in (9, 10):
        checkpoints.save_checkpoint(path, tree, step, keep=2)
    unfinished = path / "checkpoint_11.orbax-checkpoint-tmp-12"
    unfinished.mkdir()
    (unfinished / "_METADATA").write_text("{")
    return path


def to_file(path, tree) -> Path:
    path.write_bytes(serialization.to_bytes(tree))
    return path


def to_files(path, tree) -> Path:
    path.mkdir()
    to_file(path / "checkpoint_9", {"step": 9})
    to_file(path / "checkpoint_10", tree)
    return path


NESTINGS = {
    "variables": (lambda path, v: save(path, v), "params"),
    "a TrainState": (lambda path, v: save(path, trained(v)), "params"),
    "a TrainState of all variables": (lambda path, v: save(path, whole(v)), "params/params"),
    "a FrozenDict": (lambda path, v: save(path, whole(freeze(v))), "params/params"),
    "a model": (lambda path, v: save(path, {"model": trained(v)}), "model/params"),
    "a tuple": (lambda path, v: save(path, (v["params"], v["batch_stats"])), "0"),
    "other names": (
        lambda path, v: save(
            path, {"w": v["params"], "s": v["batch_stats"], "o": optax.adam(1).init(v["params"])}
        ),
        "w",
    ),
    "random keys": (lambda path, v: save(path, {"state": v, "rng": jax.random.key(0)}), "state/params"),
    "words": (
        lambda path, v: by_pytree(path, {"net": v, "name": "net", "epoch": 3, "no": None}),
        "net/params",
    ),
    "a managed state": (lambda path, v: managed(path, ocp.args.StandardSave(trained(v))), "params"),
    "items": (lambda path, v: managed(path, composite(v)), "params"),
    "an item": (
        lambda path, v: managed(path, ocp.args.Composite(state=ocp.args.PyTreeSave(trained(v)))),
        "params",
    ),
    "items of one state": (
        lambda path, v: managed(path, composite({"state": trained(v), "config": {"rate": jnp.ones(())}})),
        "state/params",
    ),
    "flax": (lambda path, v: by_flax(path, trained(v)), "params"),
    "msgpack": (lambda path, v: to_file(path, v), "params"),
    "steps of msgpack": (lambda path, v: to_files(path, v), "params"),
    "msgpack of a TrainState": (lambda path, v: to_file(path, whole(v)), "params/params"),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_variables_are_found(name, nets, variables, tmp_path):
    written, place = NESTINGS[name]
    path = written(tmp_path / "checkpoint", variables)
    network = from_checkpoint(path, f"{MODULE}:Net", [Input((4,))], arguments={}, call={"train": False})
    assert network.notes["variables"].startswith(f"params from {place}, batch_stats from ")
    jax.tree.map(
        np.testing.assert_array_equal, dict(network.variables), serialization.to_state_dict(variables)
    )


def test_state_in_any_nesting_is_exported(nets, variables, tmp_path, capsys):
    path = save(tmp_path / "checkpoint", {"model": whole(freeze(variables))})
    summary = export(capsys, tmp_path, path, *given("Net", "4", call={"train": False}))
    assert summary["notes"] == {
        "variables": "params from model/params/params, batch_stats from model/params/batch_stats"
    }
    (found,) = graph_outputs(tmp_path, input=X).values()
    np.testing.assert_allclose(found, nets.Net().apply(variables, X), atol=1e-5)
    assert main([str(path), *given("Net", "4"), "--out", str(tmp_path / "m.onnx")]) == 0
    assert "params from model/params/params" in capsys.readouterr().out


def test_bare_params_and_boxes(nets, tmp_path, capsys):
    """Export the tree below 'params', and parameters that were saved in the boxes of with_partitioning."""
    plain = nets.Plain().init(jax.random.key(1), X)
    path = save(tmp_path / "bare", plain["params"])
    summary = export(capsys, tmp_path, path, *given("Plain", "4"))
    assert summary["notes"]["variables"] == "params from ."
    np.testing.assert_allclose(
        graph_outputs(tmp_path, input=X)["logits"], nets.Plain().apply(plain, X), atol=1e-5
    )
    boxed = nets.Boxed().init(jax.random.key(1), X)
    network = from_checkpoint(
        save(tmp_path / "boxed", boxed), f"{MODULE}:Boxed", [Input((4,))], arguments={}, call={}
    )
    np.testing.assert_array_equal(
        network.variables["params"]["out"]["kernel"], nn.meta.unbox(boxed)["params"]["out"]["kernel"]
    )


def test_averages_are_chosen_by_the_user(nets, variables, tmp_path, capsys):
    average = jax.tree.map(lambda leaf: leaf + 1.0, variables)
    tree = {
        "params": variables["params"],
        "ema_params": average["params"],
        "batch_stats": variables["batch_stats"],
    }
    path, net = save(tmp_path / "one", tree), given("Net", "4")
    error = refused(capsys, tmp_path, path, *net)
    assert "one holds several trees that fit the params of the model: ema_params, params. " in error
    assert "--variables params\n" in error
    export(capsys, tmp_path, path, *net, "--variables", "ema_params")
    wanted = nets.Net().apply({**variables, "params": average["params"]}, X)
    np.testing.assert_allclose(graph_outputs(tmp_path, input=X)["logits"], wanted, atol=1e-5)
    (tmp_path / "m.onnx").unlink()

    path = save(tmp_path / "two", tree | {"ema_batch_stats": average["batch_stats"]})
    error = refused(capsys, tmp_path, path, *net, "--variables", "ema_params")
    assert "several trees that fit the batch_stats of the model: batch_stats, ema_batch_stats" in error
    summary = export(capsys, tmp_path, path, *net, "--variables", "ema_params", "ema_batch_stats")
    assert summary["notes"]["variables"] == "params from ema_params, batch_stats from ema_batch_stats"
    (tmp_path / "m.onnx").unlink()

    path = save(tmp_path / "three", {"now": variables, "ema": average})
    summary = export(capsys, tmp_path, path, *net, "--variables", "ema")
    assert summary["notes"]["variables"] == "params from ema/params, batch_stats from ema/batch_stats"


def test_trees_of_optimizers_are_taken_only_if_asked_for(variables):
    moments = {"opt_state": [{"count": np.ones(()), "mu": variables["params"], "nu": variables["params"]}]}
    wanted = {
        collection: {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree).items()}
        for collection, tree in variables.items()
    }
    _, found = find_variables(variables | moments, wanted, "c")
    assert found == {"params": "params", "batch_stats": "batch_stats"}
    _, found = find_variables(variables | moments, wanted, "c", ["opt_state/0/mu"])
    assert found["params"] == "opt_state/0/mu"
    _, found = find_variables({"optimizer": {"target": variables}}, wanted, "c")
    assert found["params"] == "optimizer/target/params"
    larger = {**variables["params"], "second_head": variables["params"]["head"]}
    _, found = find_variables({"a": variables, "b": {"params": larger}}, wanted, "c")
    assert found["params"] == "a/params", "the tree without further leaves fits better"
    _, found = find_variables({"params": larger, "batch_stats": variables["batch_stats"]}, wanted, "c")
    assert found["params"] == "params", "a model that has dropped a head for inference"


def test_statistics_of_quant_trim_are_found_for_a_model_that_has_none(nets, tmp_path, capsys):
    """Find the ranges beside the parameters, and quantize with several inputs and whole numbers."""
    model, config = nets.Tokens(), qt.QuantConfig()
    ids, mask = np.arange(192).reshape(32, 6).astype(np.int32) % 7, np.ones((32, 6), np.float32)
    variables = qt.attach_statistics(
        model, model.init(jax.random.key(0), ids, mask, True), config, ids, mask, True
    )
    with qt.quant_trim(config, 0.0, train=True):
        _, seen = model.apply(variables, ids, mask, True, mutable=["batch_stats"])
    path = save(tmp_path / "state", {"state": {**variables, **seen}, "old": seen["batch_stats"]})
    arrays = {"ids": ids, "mask": mask}
    np.savez(
        tmp_path / "samples.npz",
        **{f"{part}_{name}": array for name, array in arrays.items() for part in ("calibration", "parity")},
    )
    words = given(
        "Tokens",
        "ids=6:int32",
        "mask=6",
        call={"deterministic": True},
        output="logits",
        samples=str(tmp_path / "samples.npz"),
    )
    summary = export(capsys, tmp_path, path, *words)
    assert summary["notes"]["variables"] == "params from state/params, batch_stats from state/batch_stats"
    assert summary["inputs"] == "real" and summary["ranges"] is not None
    summary = export(capsys, tmp_path, path, *words, "--qdq", "int8")
    assert summary["parity"]["logits"]["sqnr_db"] > 20
    assert summary["layers"][0]["weights"] == "int8 symmetric per-channel"


def test_several_inputs_and_a_chosen_output(nets, tmp_path, capsys):
    ids, mask = np.arange(48).reshape(8, 6).astype(np.int32) % 7, np.ones((8, 6), np.float32)
    model = nets.Tokens()
    variables = model.init(jax.random.key(0), ids, mask, True)
    wanted = model.apply(variables, ids, mask, True)
    path = save(tmp_path / "tokens", variables)
    words = given("Tokens", "6:int32", "6", call={"deterministic": True})
    summary = export(capsys, tmp_path, path, *words)
    assert summary["inputs"] == "random normal and 0 or 1 at random, seed 0"
    found = graph_outputs(tmp_path, input_0=ids, input_1=mask)
    assert [*found] == ["hidden/0", "hidden/1", "logits"]
    np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-5)
    export(capsys, tmp_path, path, *words, "--output", "logits", "hidden/1")
    found = graph_outputs(tmp_path, input_0=ids, input_1=mask)
    assert [*found] == ["logits", "hidden/1"]
    np.testing.assert_allclose(found["hidden/1"], wanted["hidden"][1], atol=1e-5)
    (tmp_path / "m.onnx").unlink()
    named = given("Tokens", "mask=6", "ids=6:int32", call={"deterministic": True}, output="logits")
    export(capsys, tmp_path, path, *named)
    np.testing.assert_allclose(
        graph_outputs(tmp_path, ids=ids, mask=mask)["logits"], wanted["logits"], atol=1e-5
    )
    (tmp_path / "m.onnx").unlink()
    listed = "hidden/0 (1, 6, 4), hidden/1 (1, 6, 4), logits (1, 2)"
    for wrong in ("logit", "hidden"):
        error = refused(capsys, tmp_path, path, *words, "--output", wrong)
        assert f"has no such output; its outputs are {listed}" in error
    error = refused(capsys, tmp_path, path, *words, "--output", "logits", "logits")
    assert f"is given twice: name each output once, of {listed}" in error
    error = refused(capsys, tmp_path, path, *given("Tokens", "6:int32", "6", call={"deterministic": False}))
    assert """InvalidRngError""" in error and """--call '{"train": false}'""" in error
    error = refused(capsys, tmp_path, path, *given("Tokens", "6:int32", call={"deterministic": True}))
    assert "cannot be initialised on inputs of shape (1, 6) int32" in error and "for each input" in error
    error = refused(capsys, tmp_path, path, *given("Tokens", "6", "6", call={"deterministic": True}))
    assert "must be an integer" in error and "a dtype for whole numbers" in error


def test_one_number_in_each_example_and_an_output_without_batch(nets, tmp_path, capsys):
    images, times = np.ones((8, 5, 5, 2), np.float32), np.arange(8, dtype=np.int32)
    variables = nets.Denoiser().init(jax.random.key(0), images, times)
    path = save(tmp_path / "denoiser", variables)
    error = refused(capsys, tmp_path, path, *given("Denoiser", "5 5 2", ":int32"))
    assert "the output loss has shape () for a batch of 1" in error and "--output" in error
    words = given("Denoiser", "sample=5 5 2", "time=:int32", output="sample", layout="nhwc")
    export(capsys, tmp_path, path, *words)
    found = graph_outputs(tmp_path, sample=images, time=times)
    wanted = nets.Denoiser().apply(variables, images, times)
    np.testing.assert_allclose(found["output_sample"], wanted.sample, atol=1e-5)


def test_outputs_of_a_tuple_have_numbers(nets, tmp_path, capsys):
    path = save(tmp_path / "pair", nets.Pair().init(jax.random.key(0), X))
    export(capsys, tmp_path, path, *given("Pair", "4"))
    assert [*graph_outputs(tmp_path, input=X)] == ["output_0", "output_1"]
    export(capsys, tmp_path, path, *given("Pair", "4", output="1"))
    assert graph_outputs(tmp_path, input=X)["output_1"].shape == (8, 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_exported_in_float32(dtype, nets, variables, tmp_path, capsys):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), variables["params"])
    path = save(tmp_path / "half", {**variables, "params": half})
    summary = export(capsys, tmp_path, path, *given("Net", "4"))
    assert summary["notes"]["precision"] == f"6 arrays of {jnp.dtype(dtype)} are exported as float32"
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert types == {onnx.TensorProto.FLOAT}
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    wanted = nets.Net().apply({**variables, "params": single}, X)
    np.testing.assert_allclose(graph_outputs(tmp_path, input=X)["logits"], wanted, atol=1e-5)
    (tmp_path / "m.onnx").unlink()
    error = refused(capsys, tmp_path, path, *given("Net", "4", arguments={"dtype": jnp.dtype(dtype).name}))
    assert "float32" in error


def test_precision_of_other_leaves_is_kept():
    leaves = {"a": np.float64([1.5]), "b": np.int8([1]), "c": np.float32([2])}
    cast, said = single_precision({"params": leaves})
    assert [leaf.dtype for leaf in cast["params"].values()] == [np.float32, np.int8, np.float32]
    assert said == "1 array of float64 is exported as float32"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["32x32x3"], "--input-shape 32x32x3: '32x32x3' is not a whole number above 0"),
        (["8", "0"], "--input-shape 8 0: '0' is not a whole number above 0"),
        (["(8,", "8)"], "'(8,' is not a whole number above 0"),
        (["8:int64"], "'int64' is not a dtype of an input (JAX computes with int32); choose one of float32"),
        (["8:"], "'' is not a dtype of an input"),
        (["8:int32:int8"], "is not sizes without batch"),
        ([], "is not sizes without batch, such as 32 32 3"),
        (["a-b=8"], "'a-b' is not the name of an argument"),
        (["=8"], "'' is not the name of an argument"),
        (["ids="], "ids= has no sizes: one number in each example is written ids=:float32"),
    ],
)
def test_wrong_shapes_are_refused(words, says, tmp_path, capsys):
    net = ("--model", "a:b", "--input-shape", *words)
    assert says in refused(capsys, tmp_path, tmp_path, *net)


def test_inputs_are_named_all_or_none():
    assert parse_inputs([["x=8", "8"], ["t=:bool"]]) == (Input((8, 8), name="x"), Input((), "bool", "t"))
    for given in ([["x=8"], ["8"]], [["x=8"], ["x=8"]]):
        with pytest.raises(InvalidInput, match="give each input a name of its own, or none"):
            parse_inputs(given)


def test_checkpoints_that_do_not_suit_the_model_are_refused(nets, variables, tmp_path, capsys):
    path, net = save(tmp_path / "net", {"state": variables}), given("Net", "4")
    cases = {
        (
            "Net",
            "4",
            "--arguments",
            '{"width": 7}',
        ): "state/params/head/kernel has shape (3, 2), the model makes (7, 2). Do --arguments",
        ("Net", "5"): "state/params/stem/kernel has shape (4, 3), the model makes (5, 3). Do --arguments",
        (
            "Training",
            "4",
        ): "the checkpoint holds state/batch_stats/norm/mean, state/batch_stats/norm/var, state/",
        ("Tokens", "6:int32", "--input-shape", "6", "--call", '{"deterministic": true}'): "it lacks",
        (
            "Failing",
            "4",
        ): f"{MODULE}:Failing cannot be initialised on inputs of shape (1, 4) float32: KeyError: 'key'.",
        ("Empty", "4"): f"{MODULE}:Empty has no parameters",
        ("Net", "4", "--variables", "state/ema"): "--variables state/ema: "
        f"{path} has no such part; it holds state/batch_stats, state/params",
        (
            "Net",
            "4",
            "--variables",
            "state/params/stem",
        ): "nothing at or below it fits the model; the parameters fit at state/params",
    }
    for (name, shape, *more), says in cases.items():
        assert says in refused(capsys, tmp_path, path, *given(name, shape), *more), name
    error = refused(capsys, tmp_path, save(tmp_path / "params", variables["params"]), *net)
    assert "The model has batch_stats (such as norm/mean), which" in error
    assert "lacks, or has in other shapes: save all variables of the model" in error
    error = refused(capsys, tmp_path, save(tmp_path / "other", {"weights": [np.ones(3)]}), *net)
    assert "does not hold the parameters of this model: the model makes" in error
    assert "the checkpoint holds weights/0. Is --model" in error
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    error = refused(capsys, tmp_path, save(tmp_path / "copies", copies), *net)
    assert "params/head/bias has shape (2, 2), the model makes (2,). Save one copy" in error
    (tmp_path / "net.msgpack").write_bytes(b"{words")
    error = refused(capsys, tmp_path, tmp_path / "net.msgpack", *net)
    assert "net.msgpack is a file, and not one of flax.serialization.to_bytes" in error
    (tmp_path / "one.msgpack").write_bytes(b"\x01")
    assert "holds a int, not collections" in refused(capsys, tmp_path, tmp_path / "one.msgpack", *net)


def test_a_forward_of_training_is_refused(nets, tmp_path, capsys):
    path = save(tmp_path / "net", nets.Training().init(jax.random.key(0), X))
    error = refused(capsys, tmp_path, path, *given("Training", "4"))
    assert "ModifyScopeVariableError" in error and """such as --call '{"train": false}'""" in error
    export(capsys, tmp_path, path, *given("Training", "4", call={"train": False}))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "'calibration_0', 'calibration_1', 'parity_0', 'parity_1'"),
        ({"parity_0": np.full((8, 6), 0.5)}, '"parity_0" of '),
        ({"parity_1": np.ones((7, 6))}, "differ in length"),
        ({"calibration_1": np.ones((8, 5))}, "has shape (8, 5) and dtype float64; the model takes numbers"),
        ({"calibration_1": np.full((8, 6), np.nan)}, "not finite"),
        ({"calibration_1": np.full((8, 6), "a")}, "dtype <U1"),
    ],
)
def test_samples_of_several_inputs(arrays, says, nets, tmp_path, capsys):
    ids, mask = np.ones((8, 6), np.int32), np.ones((8, 6), np.float32)
    path = save(tmp_path / "tokens", nets.Tokens().init(jax.random.key(0), ids, mask, True))
    right = {"calibration_0": ids, "calibration_1": mask, "parity_0": ids, "parity_1": mask}
    np.savez(tmp_path / "samples.npz", **(right | arrays if arrays else {}))
    words = given(
        "Tokens", "6:int32", "6", call={"deterministic": True}, samples=str(tmp_path / "samples.npz")
    )
    assert says in refused(capsys, tmp_path, path, *words)


def test_help_shows_an_example_of_each(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for example in (
        "--input-shape 32 32 3 --out",
        "--input-shape 128:int32",
        "--input-shape 32 32 3 --input-shape 5",
        "--input-shape input_ids=128:int32 --input-shape attention_mask=128:int32",
        "--input-shape :float32",
        "--output logits",
        "--variables ema_params",
        "net.msgpack --model",
        "bfloat16",
    ):
        assert example in text
