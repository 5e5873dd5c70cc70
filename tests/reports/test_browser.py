"""The page in a real Chromium: no errors, nothing fetched, sorting by mouse and keys, any width."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from reports import samples
from reports.chromium import Chromium, installed

pytestmark = pytest.mark.skipif(
    installed() is None, reason="needs a browser: no chromium, chromium-browser or google-chrome"
)
NAMES = "[...document.querySelectorAll('.layers td.name')].map(cell => cell.textContent)"
ORDERS = "[...document.querySelectorAll('th[aria-sort]')].map(e => [e.textContent, e.ariaSort])"
HEAD = "[...document.querySelectorAll('.layers th')].find(e => e.textContent === {!r})"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return samples.report().to_html(tmp_path / "report.html")


def head(title: str) -> str:
    return HEAD.format(title)


def test_the_browser_tells_of_errors_and_requests(browser: Chromium, tmp_path: Path) -> None:
    """Else none would be seen."""
    path = tmp_path / "bad.html"
    path.write_text("<script>console.log('a'); nothing.here</script><img src='missing.png'>")
    browser.open(path)
    told = " ".join(browser.console)
    assert "'a'" in told
    assert "Uncaught" in told
    assert any(address.endswith("missing.png") for address in browser.requests)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 800, 1200])
def test_it_fits_and_asks_for_nothing(
    browser: Chromium, path: Path, width: int, dark: bool
) -> None:
    browser.open(path, width, dark=dark)
    assert browser.console == []
    assert browser.requests == [path.as_uri()]
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js(NAMES) == [layer.name for layer in samples.report().layers]
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert browser.screenshot().startswith(b"\x89PNG")
    figures = "getComputedStyle(document.querySelector('.layers td.number')).display"
    assert (browser.js(figures) == "table-cell") == (width > 640)


def test_a_click_sorts_and_another_turns_it_round(browser: Chromium, path: Path) -> None:
    names = [layer.name for layer in samples.report().layers]
    browser.open(path)
    assert browser.js(ORDERS) == [["#", "ascending"]]
    browser.click(head("time"))
    measured = ["layer2.0.conv2", "layer1.0.conv1", "layer2.0.conv1"]
    rest = [name for name in names if name not in measured]
    assert browser.js(NAMES) == [*measured, *rest], "the largest first, what has none last"
    assert browser.js(ORDERS) == [["time", "descending"]]
    browser.click(head("time"))
    turned = ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2"]
    assert browser.js(NAMES) == [*turned, *rest]
    assert browser.js(ORDERS) == [["time", "ascending"]]
    browser.click(head("layer"))
    assert browser.js(NAMES) == sorted(names)
    browser.click(head("#"))
    assert browser.js(NAMES) == names
    assert browser.console == []


def test_the_keyboard_does_too(browser: Chromium, path: Path) -> None:
    browser.open(path)
    for _ in range(2):
        browser.press("Tab", 9)
    assert browser.js("document.activeElement.closest('th').textContent") == "layer"
    browser.press("Enter", 13, "\r")
    assert browser.js(ORDERS) == [["layer", "ascending"]]
    browser.press(" ", 32, " ")
    assert browser.js(ORDERS) == [["layer", "descending"]]
    assert browser.js(NAMES) == sorted((x.name for x in samples.report().layers), reverse=True)


def test_status_is_told_in_words_and_colours(browser: Chromium, path: Path) -> None:
    browser.open(path)
    colour = "getComputedStyle(document.querySelector('tr.{} .now')).backgroundColor"
    statuses = ("converted", "kept", "skipped")
    assert len({browser.js(colour.format(status)) for status in statuses}) == 3
    cells = browser.js("[...document.querySelectorAll('td.status')].map(e => e.innerText)")
    assert [cell.split()[0] for cell in cells] == [x.status for x in samples.report().layers]


def test_no_script_but_its_own_may_run(browser: Chromium, path: Path) -> None:
    path.write_text(
        path.read_text().replace("</main>", "<script>document.title = 1</script></main>")
    )
    browser.open(path)
    assert browser.js("document.title") == "sepconv report: ResNet"
    assert any("Content Security Policy" in line for line in browser.console)


def test_it_prints_on_white_whatever_the_screen_is(browser: Chromium, path: Path) -> None:
    report = samples.report()
    report.layers.pop()  # a name that no one has, and that cannot be broken
    browser.open(report.to_html(path), 703, dark=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser("Emulation.setEmulatedMedia", media="print", features=[dark])
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.js("document.documentElement.scrollWidth") <= 703
    assert browser.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("width", [375, 1000])
def test_a_notebook_keeps_its_own_look(browser: Chromium, tmp_path: Path, width: int) -> None:
    """The rules of JupyterLab for tables, as far as they would spoil this one, do not."""
    style = (
        ".out { color: rgb(1, 2, 3) } .out:not(.x) td, .out:not(.x) th { text-align: right }"
        " .out table { table-layout: fixed } .out:not(.x) ul { padding-left: 2em }"
    )
    path = tmp_path / "notebook.html"
    path.write_text(
        "<!doctype html><meta name='viewport' content='width=device-width'>"
        f"<style>{style}</style><div class='out'>"
        f"<table id='other'><td>1</td></table>{samples.report()._repr_html_()}</div>"
    )
    browser.open(path, width)
    assert browser.console == []
    assert browser.js("document.querySelectorAll('.sepconv button, script').length") == 0
    look = "(s => getComputedStyle(document.querySelector(s)).{})({!r})"
    assert browser.js(look.format("textAlign", "td.name")) == "left"
    assert browser.js(look.format("paddingLeft", ".cards")) == "0px"
    assert browser.js(look.format("tableLayout", ".layers")) == "auto"
    assert browser.js(look.format("color", ".sepconv")) == "rgb(1, 2, 3)"
    assert browser.js(look.format("textAlign", "#other td")) == "right"
    assert browser.js("document.documentElement.scrollWidth") <= width
