"""The page in a real browser: no error, no request, something to see in every figure, and nothing wider than a telephone.

Screenshots go to the folder in ``SLIMTUNE_ARTIFACTS`` if it is set. ``SLIMTUNE_CHROMIUM`` names the browser if it is none of
the usual ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runs import write_experts, write_run
from slimtune.report.page import report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

USUAL = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
VIEWS = {
    "light-1280": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark-1280": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "light-375": {"viewport": {"width": 375, "height": 812}, "color_scheme": "light"},
    "dark-375": {"viewport": {"width": 375, "height": 812}, "color_scheme": "dark"},
}
MARKS = """() => [...document.querySelectorAll('figure')].map(figure => {
  const marks = [...figure.querySelectorAll('[data-mark]')];
  const drawn = mark => [mark, ...mark.querySelectorAll('*')].some(each => {
    if (!(each instanceof SVGGraphicsElement)) return false;
    const box = each.getBoundingClientRect();
    const style = getComputedStyle(each);
    const seen = each.tagName === 'image' || style.fill !== 'none' || style.stroke !== 'none';
    return box.width + box.height > 1 && seen && style.visibility !== 'hidden';
  });
  const frame = figure.getBoundingClientRect();
  const out = [...figure.querySelectorAll('svg text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.width && (box.left < frame.left || box.right > frame.right);
  });
  return {id: figure.id, out: out.map(text => text.textContent), marks: marks.length, drawn: marks.filter(drawn).length,
          names: [...new Set(marks.map(mark => mark.dataset.mark))]};
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    where = os.environ.get("SLIMTUNE_CHROMIUM") or next(filter(None, map(shutil.which, USUAL)), None)
    if not where:
        pytest.skip("no Chromium: install it (Debian: apt-get install chromium), or name it in SLIMTUNE_CHROMIUM")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=where, args=list(ARGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    long = {"uscode_headings_of_titles.macro_f1": 0.5}
    sizes = {"one": 0.6, "two-of-a-long-name-indeed": 0.7, "three": 0.8}
    runs = [write_run(root / name, keep=keep, seed=seed, changes=long) for seed, (name, keep) in enumerate(sizes.items())]
    many = [
        write_run(root / f"run-of-a-long-name-{index:02}-with-an-end", seed=index, keep=0.3 + index / 20) for index in range(12)
    ]
    alone = {
        "twelve-runs": report(many, root / "twelve-runs.html"),
        "one-run": report([runs[0]], root / "one-run.html"),
        "experts": report([write_experts(root / "experts", layers=8)], root / "experts.html"),
        "several-runs": report(runs, root / "several-runs.html"),
    }
    examples = Path(__file__).parents[2] / "docs" / "reports"
    alone |= {name: report([examples / name], root / f"{name}.html") for name in ("health", "legal")}
    return {**alone, "going-on": report([write_run(root / "going", finished=False)], root / "going-on.html")}


@pytest.mark.parametrize(
    ("name", "view"),
    [
        *(("one-run", view) for view in VIEWS),
        ("several-runs", "light-1280"),
        ("several-runs", "dark-375"),
        ("going-on", "light-375"),
        ("experts", "light-1280"),
        ("experts", "dark-375"),
        ("twelve-runs", "light-375"),
        ("health", "light-1280"),
        ("legal", "dark-375"),
    ],
)
def test_the_page(browser: Any, pages: dict[str, Path], name: str, view: str) -> None:
    page = browser.new_page(**VIEWS[view])
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert told == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= VIEWS[view]["viewport"]["width"]  # type: ignore[index]
    figures = page.evaluate(MARKS)
    assert len(figures) >= {"one-run": 9, "several-runs": 13, "going-on": 4, "experts": 6, "twelve-runs": 10}.get(name, 12)
    for figure in figures:
        assert figure["marks"] > 0, figure
        assert figure["drawn"] == figure["marks"], figure
        assert figure["out"] == [], figure
    _keep(page, f"{name}-{view}")
    page.close()


def test_text_stands_out_from_its_ground_in_light_and_dark(browser: Any, pages: dict[str, Path]) -> None:
    """At least 4.5 to 1 (WCAG AA) for text and for the words in figures; lines of series 3 to 1."""
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(pages["one-run"].as_uri())
        colours = page.evaluate(
            """() => { const read = name => { const it = document.createElement('i'); it.style.color = `var(${name})`;
            document.body.append(it); const found = getComputedStyle(it).color; it.remove(); return found; };
            return Object.fromEntries(['--paper', '--panel', '--ink', '--soft', '--bad', '--accent',
            ...Array.from({length: 10}, (_, n) => `--s${n + 1}`)].map(name => [name, read(name)])) }"""
        )
        light = {name: _luminance(value) for name, value in colours.items()}
        for ground in ("--paper", "--panel"):
            for name in ("--ink", "--soft", "--bad", "--accent"):
                assert _contrast(light[name], light[ground]) >= 4.5, (scheme, name, ground)
            for number in range(1, 11):
                assert _contrast(light[f"--s{number}"], light[ground]) >= 3, (scheme, number, ground)
        assert page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill") == colours["--ink"]
        page.close()


@pytest.mark.parametrize("name", ["one-run", "several-runs", "twelve-runs"])
def test_on_paper_it_is_light_and_nothing_is_cut_off(browser: Any, pages: dict[str, Path], name: str) -> None:
    page = browser.new_page(viewport={"width": 718, "height": 1000})  # A4 without its margins
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(pages[name].as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--s1')") == "#0072b2"
    assert page.evaluate("[...document.querySelectorAll('figure image')].every(it => getComputedStyle(it).filter === 'none')")
    cut = """[...document.querySelectorAll('.scroll, pre')].filter(it => it.clientWidth &&
    (it.scrollWidth > it.clientWidth + 1 || it.scrollHeight > it.clientHeight + 1)).map(it => it.textContent.slice(0, 40))"""
    assert page.evaluate(cut) == []
    page.close()


def test_names_of_runs_cover_nothing_that_is_drawn(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["twelve-runs"].as_uri())
    covered = """key => { const all = document.querySelector('#' + key); const marks = [...all.querySelectorAll('[data-mark]')];
    const low = Math.max(...marks.map(it => it.getBoundingClientRect().bottom));
    const names = [...all.querySelectorAll('text')].filter(it => it.textContent.includes('with-an-end'));
    return [names.length, names.filter(it => it.getBoundingClientRect().top < low).length] }"""
    for key in ("size0", "size1", "loss", "kept", "ppl", "task0"):
        assert page.evaluate(covered, key) == [12, 0], key
    page.close()


def test_a_link_to_a_folded_section_opens_it(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["one-run"].as_uri())
    assert page.locator("details.section[open]").count() == 0
    page.get_by_role("link", name="Validation figures as a table").click()
    page.locator("details.section[open]").wait_for(timeout=5000)
    page.get_by_role("table", name="Validation figures").wait_for(timeout=5000)
    page.close()


def test_names_of_rows_stay_where_a_wide_table_is_scrolled(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(**VIEWS["light-375"])
    page.goto(pages["several-runs"].as_uri())
    place = """() => { const box = document.querySelector('[aria-label="Side by side"]'); box.scrollLeft = 400;
    const name = box.querySelector('tbody th').getBoundingClientRect(); const all = box.getBoundingClientRect();
    const heights = [...box.querySelectorAll('tbody tr')].map(row => row.getBoundingClientRect().height);
    return [box.scrollLeft, name.left - all.left, name.width / all.width, Math.max(...heights)] }"""
    scrolled, left, part, highest = page.evaluate(place)
    assert highest < 120  # a name or an interval in a few lines, not a letter a line
    assert scrolled > 100
    assert abs(left) < 1
    assert part < 0.5
    page.close()


def test_fields_have_a_scale(browser: Any, pages: dict[str, Path]) -> None:
    """Its two words lie within the figure and on nothing else that is written there."""
    for name, keys in (("one-run", ["moving"]), ("several-runs", ["shapes", "agreement"]), ("twelve-runs", ["shapes"])):
        page = browser.new_page()
        page.goto(pages[name].as_uri())
        for key in keys:
            boxes = """key => [...document.querySelectorAll(`#${key} svg text`)].map(text => [text.textContent,
            ...['left', 'right', 'top', 'bottom'].map(side => text.getBoundingClientRect()[side])])"""
            texts = page.evaluate(boxes, key)
            ends = [text for text in texts if text[0] in ("0%", "100%")]
            assert len(ends) == 2, key
            for _, left, right, top, bottom in ends:
                over = [text for text in texts if text[1] < right and text[2] > left and text[3] < bottom and text[4] > top]
                assert len(over) == 1, (key, over)
        page.close()


def test_lines_differ_without_colour(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["several-runs"].as_uri())
    for key, prefix in (("loss", "loss-"), ("kept", "kept-")):
        dashes = page.evaluate(
            f"""() => [...document.querySelectorAll('#{key} [data-mark^="{prefix}"] path')]
            .map(path => getComputedStyle(path).strokeDasharray)"""
        )
        assert len(dashes) == 3
        assert len(set(dashes)) == 3
    page.close()


def test_tables_are_tables_and_figures_have_names(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["one-run"].as_uri())
    assert page.get_by_role("table", name="Tasks, before and after").get_by_role("columnheader").count() == 8
    assert page.get_by_role("table", name="Tasks, before and after").get_by_role("rowheader").count() >= 1
    assert page.get_by_role("img", name="Shape of the model").count() == 1
    figures = page.locator("figure").count()
    assert page.locator("figure svg[role=img][aria-label]").count() == figures
    page.close()


def _keep(page: Any, name: str) -> None:
    folder = os.environ.get("SLIMTUNE_ARTIFACTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"report-{name}.png"), full_page=True)


def _luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
