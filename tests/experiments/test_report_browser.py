"""Open the report in a real browser: nothing is missing or fetched, nothing sticks out, a click sorts."""

import importlib.util
from pathlib import Path

import pytest

from experiments.run_summary import write_report

RUN = Path(__file__).parents[2] / "experiments" / "results" / "cifar10-resnet8"
SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
BROWSER = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BROWSER)

pytestmark = pytest.mark.skipif(BROWSER.PROGRAM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = BROWSER.Browser(tmp_path_factory.mktemp("profile"))
    page.show(1280)
    page.open(write_report(RUN, tmp_path_factory.mktemp("report") / "report.html"))
    yield page
    page.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(browser, width, dark):
    browser.show(width, dark=dark)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.body.getBoundingClientRect().width") <= width
    wide = browser.value(
        "[...document.querySelectorAll('main > *')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert wide == 0


def test_text_and_drawings_stand_out_in_the_light_and_in_the_dark(browser):
    luminance = (
        "(c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(v => v / 255)"
        ".map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);"
        " return .2126 * r + .7152 * g + .0722 * b })"
    )
    inks = (
        "getComputedStyle(document.body).color",
        "getComputedStyle([...document.querySelectorAll('text')].find(t => t.textContent == 'loss')).fill",
        "getComputedStyle(document.querySelector('[style*=\"var(--blue)\"]')).stroke",
        "getComputedStyle(document.querySelector('[style*=\"var(--orange)\"]')).stroke",
    )
    papers = []
    for dark in (False, True):
        browser.show(1280, dark=dark)
        paper = browser.value(f"{luminance}(getComputedStyle(document.body).backgroundColor)")
        papers.append(paper)
        for ink, least in zip(inks, (7, 7, 3, 3), strict=True):
            found = browser.value(f"{luminance}({ink})")
            low, high = sorted((paper, found))
            assert (high + 0.05) / (low + 0.05) >= least, (dark, ink)
    assert papers[0] > 0.9 and papers[1] < 0.05


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_round(browser):
    table = "[...document.querySelectorAll('table')].find(t => t.tHead.textContent.includes('max/rms'))"
    values = f"[...{table}.tBodies[0].rows].map(r => parseFloat(r.cells[2].textContent))"
    browser.value(f"{table}.tHead.rows[0].cells[2].click()")
    up = browser.value(values)
    assert up == sorted(up) and len(up) == 10
    browser.value(f"{table}.tHead.rows[0].cells[2].click()")
    assert browser.value(values) == up[::-1]


def test_the_contents_stay_in_sight_and_lead_to_their_section(browser):
    for width in (390, 1280):
        browser.show(width)
        browser.value("document.querySelector('nav a[href=\"#vendors\"]').click()")
        top = browser.value("document.querySelector('#vendors').getBoundingClientRect().top")
        bottom = browser.value("document.querySelector('nav').getBoundingClientRect().bottom")
        assert browser.value("document.querySelector('nav').getBoundingClientRect().top") == 0
        assert 0 <= top <= 100 and (width == 1280 or top >= bottom - 15)


def test_paper_shows_everything(browser, tmp_path):
    browser.send("Emulation.setEmulatedMedia", media="print")
    browser.show(680)
    browser.send("Emulation.setEmulatedMedia", media="print")
    cut = browser.value(
        "[...document.querySelectorAll('.scroll, figure')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    browser.send("Emulation.setEmulatedMedia", media="")
    assert cut == 0
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_the_console_is_silent_and_nothing_is_fetched(browser):
    browser.value("0")
    assert browser.troubles == []
