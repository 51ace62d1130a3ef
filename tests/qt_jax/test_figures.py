"""Check that the summary figure has its stated size and is drawn from the numbers it was given."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from qt_jax.records import new_record
from qt_jax.reporting.figures import COLOURS, summary_figure

STEPS = np.arange(100)
LAMBDAS = np.clip((STEPS - 20) / 60, 0, 1) ** 2
RNG = np.random.default_rng(0)
WEIGHTS = {
    "float": {"a": RNG.standard_normal(500), "b": 100 * RNG.standard_t(3, 500)},
    "quant-trim": {"a": RNG.uniform(-1, 1, 500), "dead": np.zeros(4)},
}
HISTORY = [{"epoch": e, "fp32_top1": 0.1 * e, "fake_quant_top1": 0.09 * e} for e in range(1, 6)]
RECORDS = [
    new_record(
        backend="onnxruntime", scheme=scheme, method=method, seed=seed, top1=top1 + seed / 100, status="ok"
    )
    for method, scheme, top1 in [
        ("float", "fp32", 0.80),
        ("float", "int4w-pt-minmax", 0.70),
        ("quant-trim", "fp32", 0.79),
        ("quant-trim", "int4w-pt-minmax", None),
        ("ablation", "fp32", 0.5),
    ]
    for seed in (0, 1)
    if top1 is not None
] + [
    new_record(backend="onnxruntime", scheme="int4w-pt-minmax", method="quant-trim", seed=0, status="crashed")
]


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figure behind the file, to see what was drawn."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (kept.append(self), save(self, *args, **kw))
    )
    return kept


@pytest.mark.parametrize("history", [None, HISTORY])
def test_png_of_the_stated_size_and_not_blank(tmp_path, history, drawn):
    path = tmp_path / "summary.png"
    summary_figure(RECORDS, (STEPS, LAMBDAS), WEIGHTS, path, history)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (1650, 1350))
        assert np.asarray(image.convert("L")).std() > 10
    assert len(drawn[0].axes) == (4 if history else 3)


def test_what_is_drawn_is_what_was_given(tmp_path, drawn):
    summary_figure(RECORDS, (STEPS, LAMBDAS), WEIGHTS, tmp_path / "s.png", HISTORY)
    accuracy, curriculum, validation, weights = (
        next(axes for axes in drawn[0].axes if axes.get_ylabel() == label)
        for label in ("top-1 (%)", "λ", "validation top-1 (%)", "number of weights")
    )
    assert {text.get_text() for text in accuracy.texts} == {"80.5", "70.5", "79.5", "50.5"}
    assert [text.get_text() for text in accuracy.get_legend().texts] == [
        "Quant-Trim",
        "float twin",
        "ablation",
    ]
    x, y = curriculum.lines[0].get_data()
    np.testing.assert_allclose(y, LAMBDAS)
    assert (x[0], x[-1]) == (0, 5)  # in epochs
    np.testing.assert_allclose(validation.lines[0].get_ydata(), [10, 20, 30, 40, 50])
    np.testing.assert_allclose(validation.lines[1].get_ydata(), [9, 18, 27, 36, 45])
    largest = max(np.abs(w).max() / np.sqrt(np.mean(w**2)) for w in WEIGHTS["float"].values())
    assert [text.get_text() for text in weights.get_legend().texts] == [
        f"Quant-Trim: largest |w| {1 / np.sqrt(1 / 3):.1f}",
        f"float twin: largest |w| {largest:.1f}",
    ]


def test_each_method_keeps_its_colour_when_it_stands_alone(tmp_path, drawn):
    only = [record for record in RECORDS if record["method"] == "float"]
    summary_figure(only, (STEPS, LAMBDAS), {"float": WEIGHTS["float"]}, tmp_path / "s.png")
    assert {line.get_color() for line in drawn[0].axes[0].lines} == {COLOURS["float"]}
