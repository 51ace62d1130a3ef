"""Check the profile of a step: kinds of instructions and kernels, and the command on a tiny network."""

import jax
import jax.numpy as jnp
import pytest

from experiments import models
from experiments.benchmarks import profile
from experiments.models.resnet import ResNet
from qt_jax import records

CONVOLUTION = "convolution(%p, %q), window={size=%s pad=1_1x1_1}, dim_labels=b01f_01io->b01f"


@pytest.mark.parametrize(
    ("shape", "window", "kind"),
    [
        ("128,32,32,16", "3x3", profile.CONVOLUTION),
        ("8,4,4,512", "3x3", profile.CONVOLUTION),
        ("8,8,8,96", "4x4", profile.CONVOLUTION),
        ("16,3,3,32", "32x32", profile.WEIGHT_GRADIENT),
        ("64,3,3,64", "4x4", profile.WEIGHT_GRADIENT),
        ("64,1,1,64", "8x8", profile.WEIGHT_GRADIENT),
    ],
)
def test_convolutions_are_told_by_their_windows(shape, window, kind):
    text = f"f32[{shape}]{{3,2,1,0}} " + CONVOLUTION.replace("%s", window)
    assert profile.kind(text) == kind


def test_instructions_of_a_compiled_program():
    """Count a fused instruction under the heaviest of its parts."""

    @jax.jit
    def program(x, w):
        y = jnp.round(x) @ w
        return y.T + 1.0, jax.lax.sort(y), jnp.sum(y)

    x = jnp.ones((64, 64))
    kinds = profile.instructions(program.lower(x, x).compile().as_text())
    assert {profile.PRODUCT, profile.SELECTION, profile.ROUNDING} <= set(kinds.values())


@pytest.mark.parametrize(
    ("name", "stats", "kind"),
    [
        ("sm90_xmma_wgrad_indexed", {}, profile.WEIGHT_GRADIENT),
        ("sm90_xmma_dgrad_implicit", {}, profile.CONVOLUTION),
        ("nvjet_sm90_tst", {}, profile.PRODUCT),
        ("loop_fusion_3", {"hlo_op": "loop_fusion.3"}, profile.ROUNDING),
        ("mystery", {}, profile.OTHER),
    ],
)
def test_kernels_of_a_gpu(name, stats, kind):
    assert profile.kind_of_event(name, stats, {"loop_fusion.3": profile.ROUNDING}, on_gpu=True) == kind


def test_what_is_no_operation_is_left_out():
    assert profile.kind_of_event("PjitFunction", {}, {"fusion": profile.ROUNDING}, on_gpu=False) is None


@pytest.mark.parametrize("flag", ["--quant-trim", "--no-quant-trim"])
def test_command_line(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "tiny", lambda num_classes, dtype: ResNet((1,), 4, num_classes, dtype))
    path = tmp_path / "records.jsonl"
    arguments = ["--model", "tiny", "--batch-size", "8", "--steps", "2", "--out", str(path), flag]
    assert profile.main(arguments) == 0
    (row,) = records.read(path)
    assert row["kinds_ms"][profile.WEIGHT_GRADIENT] > 0 and row["step_ms_p50"] > 0
    assert (profile.SELECTION in row["kinds_ms"]) or flag == "--no-quant-trim"
    assert "A training step of tiny" in capsys.readouterr().out
