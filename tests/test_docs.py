"""The pages: links that lead somewhere, and every public name in the API."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("sepconv/**/*.md")])
MODULES = {"sepconv": "index", "sepconv.ops": "ops", "sepconv.nn": "nn"}
MODULES |= {"sepconv.mobilenet": "mobilenet"}
# Not documented under this name: what has a page of its own, and a string.
ELSEWHERE = {"sepconv": {"nn", "ops", "__version__"}, "sepconv.ops": {"backend"}}

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What a host of repositories and the site make of headings."""
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(page))
    return {title.strip().replace(" ", "-") for title in kept}


def broken(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    found = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            anchor and "api" not in target.parts and anchor not in anchors(target.read_text())
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "page.md").write_text("# A b\n[a](#a-b) [c](#c) [d](d.md) [e](https://e)\n")
    assert broken(tmp_path / "page.md") == ["#c", "d.md"]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_api(module):
    page = (DOCS / "api" / f"{MODULES[module]}.md").read_text()
    shown = re.findall(r"^::: (\S+)", page, re.MULTILINE)
    # A function with the name of its module is shown by the module's name: sepconv.cost.cost.
    names = [name.rpartition(".")[2] for name in shown]
    assert len(names) == len(set(names))
    assert set(names) == set(import_module(module).__all__) - ELSEWHERE.get(module, set())
    for name in shown:
        place, _, last = name.rpartition(".")
        assert hasattr(import_module(place), last), name
