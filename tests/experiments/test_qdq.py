"""Compare QDQ graphs with the JAX forward on a tiny network with learned ranges."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from rich.console import Console

import qt_jax as qt
from experiments import qdq
from qt_jax.export.network import Deployable, Samples


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding=1, name="stem")(x))
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def network():
    net, config = Net(), qt.QuantConfig()
    images = np.asarray(jax.random.normal(jax.random.key(0), (20, 6, 6, 3)))
    variables = qt.attach_statistics(net, net.init(jax.random.key(1), images), config, images)
    with qt.quant_trim(config, 0.0, train=True):
        _, seen = net.apply(variables, images, mutable=["batch_stats"])
    return Deployable(net.apply, variables | seen, (6, 6, 3), config, Samples(images, images))


def test_every_graph_is_measured_and_shown(network, monkeypatch, tmp_path):
    monkeypatch.setattr(qdq, "load", lambda path: network)
    monkeypatch.setattr(qdq, "GRAPHS", {name: qdq.GRAPHS[name] for name in ("learned sites", "all sites")})
    console = Console(record=True, width=140)
    out = tmp_path / "records.jsonl"
    qdq.run(qdq.Options((tmp_path / "tiny",), out), console)
    rows = {row["graph"]: row for row in qdq.records.read(out)}
    assert rows["JAX itself, batches of 5"]["top1_agreement"] == 1.0
    everywhere = rows["all sites"]
    assert (everywhere["integer_convolutions"], everywhere["integer_products"]) == (1, 1)
    assert everywhere["top1_agreement"] >= 0.9
    assert rows["learned sites"]["sqnr_db"] > 40
    assert "all sites" in console.export_text()


def test_a_float_network_is_refused(network, monkeypatch, tmp_path):
    bare = Deployable(network.apply_fn, network.variables, (6, 6, 3), None, network.samples)
    monkeypatch.setattr(qdq, "load", lambda path: bare)
    with pytest.raises(qt.InvalidInput, match="Quant-Trim"):
        qdq.run(qdq.Options((tmp_path,)), Console(quiet=True))
