"""The report's page in a real browser: offline, in light and dark, narrow and wide, on paper, without scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.report import report
from analysis.report_page import html
from supar_sweep.sweep.status import CellState
from tests.browser import Browser, browser
from tests.report_records import grid, records

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

PHONE, DESKTOP = (390, 844), (1280, 900)
SCREENS = [(*PHONE, False), (*PHONE, True), (*DESKTOP, False), (*DESKTOP, True)]
SECTIONS = ("verdict", "figures", "tables", "lineage", "cost", "failures", "reproduce")
LONG = "RuntimeError: " + "a_very_long_word_without_a_break" * 20


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all that one may hold: each verdict, failures, long words, doubts."""
    plan = grid(provenance={"git_dirty": "abc", "argv": ["supar-sweep run", f"data.paths=[{'x' * 300}.txt]"]})
    first, second, third = list(plan.cells)[:3]
    ends = {
        first: CellState("failed", LONG, 1, "runs/cells/" + "0123456789" * 20),
        second: CellState("diverged", attempts=1),
        third: CellState("missing"),
    }
    found = report(records(plan, ends))
    assert {verdict.answer for verdict in found.verdicts} == {"transfers", "does not transfer", "undecided"}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        # no address but this machine's files
        one.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        yield one


def opened(chromium: Browser, page: Path, width_px: int, height_px: int, **how: Any) -> Browser:
    chromium.show(width_px, height_px, **how)
    chromium.open(page.as_uri())
    return chromium


def test_it_asks_for_nothing_but_itself(chromium: Browser, page: Path) -> None:
    opened(chromium, page, *DESKTOP)
    asked = [url for url in chromium.requests() if not url.startswith("data:image/svg+xml")]
    assert asked == [page.as_uri()]
    assert chromium.complaints() == []


def test_a_request_would_be_seen(chromium: Browser, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text('<img src="https://example.org/a.png">', encoding="utf-8")
    opened(chromium, other, *DESKTOP)
    assert "https://example.org/a.png" in chromium.requests()


def test_its_sections_and_figures_are_there(chromium: Browser, page: Path) -> None:
    opened(chromium, page, *DESKTOP)
    assert chromium.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == list(SECTIONS)
    assert chromium.evaluate("[...document.querySelectorAll('h1')].map(h => h.innerText)") == ["mine"]
    n_headings = chromium.evaluate("[...document.querySelectorAll('section h2')].filter(h => h.innerText).length")
    assert n_headings == len(SECTIONS)
    links = chromium.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert links == list(SECTIONS)
    sizes = chromium.evaluate(
        "[...document.querySelectorAll('figure img')].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.alt])"
    )
    assert len(sizes) == 4  # basins, pareto, curves, study
    assert all(complete and width > 100 and height > 100 and alt for complete, width, height, alt in sizes)


# what stands out of a window of so many pixels, unless it lies in a box that scrolls. Not innerWidth: a phone zooms out
# until everything fits
STANDS_OUT = """
[...document.body.querySelectorAll('*')]
    .filter(e => !e.parentElement.closest('.scroll') && !e.closest('details:not([open]) > :not(summary)'))
    .filter(e => { const b = e.getBoundingClientRect(); return b.width && (b.right > WIDTH + 1 || b.left < -1); })
    .map(e => e.tagName + '.' + e.className + ': ' + e.innerText.slice(0, 60))
"""


@pytest.mark.parametrize(("width_px", "height_px", "dark"), SCREENS)
def test_nothing_overflows(chromium: Browser, page: Path, width_px: int, height_px: int, dark: bool) -> None:
    opened(chromium, page, width_px, height_px, dark=dark)
    for details in ("closed", "open"):
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width_px, details
        assert chromium.evaluate(STANDS_OUT.replace("WIDTH", str(width_px))) == [], details
        chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


def test_an_overflow_would_be_seen(chromium: Browser, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    head = '<!DOCTYPE html><meta name="viewport" content="width=device-width">'
    other.write_text(f"{head}<p style='width:900px'>wide</p>", encoding="utf-8")
    opened(chromium, other, *PHONE)
    assert chromium.evaluate(STANDS_OUT.replace("WIDTH", str(PHONE[0]))) == ["P.: wide"]


# the contrast of every text with what lies behind it; figures are pictures, not text
CONTRASTS = """
(() => {
  const light = c => { const f = c.map(v => (v /= 255, v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4));
                       return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                        if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  return [...document.body.querySelectorAll('*')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .map(e => { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
                return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + ' ' + e.className]; });
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_word_can_be_read(chromium: Browser, page: Path, dark: bool) -> None:
    opened(chromium, page, *DESKTOP, dark=dark)
    chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = chromium.evaluate(CONTRASTS)
    assert len(found) > 100
    # WCAG 2.2, 1.4.3: at least 4.5 to 1
    assert [(name, round(ratio, 2)) for ratio, name in found if ratio < 4.5] == []


def test_it_is_dark_where_the_reader_prefers_that(chromium: Browser, page: Path) -> None:
    def brightness() -> float:
        color = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3

    opened(chromium, page, *DESKTOP)
    assert brightness() > 200
    opened(chromium, page, *DESKTOP, dark=True)
    assert brightness() < 60


def test_on_paper_it_is_black_on_white_and_fits(chromium: Browser, page: Path) -> None:
    opened(chromium, page, 794 - 113, 1123, dark=True, media="print")  # A4 at 96 a inch, less two margins of 15 mm
    assert chromium.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert chromium.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert chromium.evaluate("document.documentElement.scrollWidth") <= 794 - 113
    wide = chromium.evaluate(
        "[...document.querySelectorAll('table, img, pre')].filter(e => !e.closest('details:not([open])'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.innerText.slice(0, 40))"
    )
    assert wide == []
    printed = chromium.pdf()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 3


def test_it_reads_the_same_without_scripts(chromium: Browser, page: Path) -> None:
    opened(chromium, page, *DESKTOP)
    text = chromium.evaluate("document.body.innerText")
    assert "transfers" in text
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened(chromium, page, *DESKTOP)
        assert chromium.evaluate("document.body.innerText") == text
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_what_records_say_is_shown_not_run(chromium: Browser, tmp_path: Path) -> None:
    bad = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">&amp;"
    plan = grid()
    made = records(plan, {next(iter(plan.cells)): CellState("failed", bad, 1, bad)})
    path = tmp_path / "bad.html"
    path.write_text(html(report(replace(made, version=bad, made=bad))), encoding="utf-8")
    opened(chromium, path, *DESKTOP)
    assert chromium.evaluate("document.title") == "Transfer report: mine"
    assert chromium.evaluate("document.querySelectorAll('script').length") == 0
    assert bad in chromium.evaluate("document.querySelector('#failures').innerText")


@pytest.mark.parametrize(("width_px", "height_px"), [PHONE, DESKTOP])
def test_pictures_of_it_for_a_person_to_look_at(
    chromium: Browser, page: Path, tmp_path: Path, width_px: int, height_px: int
) -> None:
    # pytest keeps the folders of its last runs: look at them after a change of the page
    taken = []
    for scheme in ("light", "dark"):
        opened(chromium, page, width_px, height_px, dark=scheme == "dark")
        path = tmp_path / f"report-{width_px}-{scheme}.png"
        chromium.screenshot(path)
        taken.append(path.read_bytes())
    assert all(image.startswith(b"\x89PNG") for image in taken)
    assert taken[0] != taken[1]
