"""The page as text: everything is told, everything is escaped, nothing is asked for elsewhere."""

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from reports import samples

import sepconv


class Read(HTMLParser):
    """The visible text, the tags with their attributes, and whether all that opens is closed."""

    EMPTY = ("meta", "link", "wbr", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture
def page(tmp_path: Path) -> str:
    return samples.report().to_html(tmp_path / "report.html").read_text()


@pytest.mark.parametrize("whole", [True, False])
def test_every_name_reason_total_and_setting_is_told(page: str, whole: bool) -> None:
    report = samples.report()
    told = Read(page if whole else report._repr_html_()).text
    for layer in report.layers:
        assert layer.name in told
        assert f"{layer.status}" in told
        assert layer.reason in told
    for total in report.totals():
        assert all(part in told for part in (total.label, total.text, total.ratio, total.remark))
    assert "3.6 ms > 72 ms" in told
    assert "20x SLOWER" in told
    assert "on cpu, 2 threads" in told
    for setting in ("macs = 0.5", "layer4.*", "1x3x64x64 float32", "only_if_faster"):
        assert setting in told
    for made in ("83 s", "2.13.0", "at level graph"):
        assert made in told
    assert "rank" in told
    assert "None" not in told


def test_names_and_reasons_are_escaped(page: str) -> None:
    for html in (page, samples.report()._repr_html_()):
        assert samples.HOSTILE not in html
        assert "<script>alert" not in html
        assert escape(samples.HOSTILE) in html
        scripts = [tag for tag, _ in Read(html).tags if tag == "script"]
        assert len(scripts) == (1 if html is page else 0)


def test_it_asks_for_nothing_elsewhere(page: str) -> None:
    for html in (page, samples.report()._repr_html_()):
        assert not re.search(r"https?:|url\(|@import|//[a-z]", html)
        for _, attributes in Read(html).tags:
            assert "src" not in attributes
            assert attributes.get("href", "data:,") == "data:,"


def test_bars_are_as_long_as_what_they_stand_for(page: str) -> None:
    row = page[page.index('data-value="layer1.0.conv1"') :]
    row = row[: row.index("</tr>")]
    widths = [float(width) for width in re.findall(r'style="width:([0-9.]+)%"', row)]
    most = 118_013_952
    macs = [100 * 2_390_000 / most, 100 * 9_437_184 / most]
    times = [100 * 4e-4 / 64e-3, 100 * 1e-3 / 64e-3]
    assert widths == pytest.approx([*macs, *times], abs=0.006)
    slower = page[page.index('data-value="layer2.0.conv2"') :]
    assert '<span class="bar more"' in slower[: slower.index("</tr>")]
    assert '<b class="worse">32x</b>' in slower[: slower.index("</tr>")]


def test_reasons_are_counted_with_their_share_of_the_work(page: str) -> None:
    told = Read(page).text
    share = f"{118_013_952 / 336_000_000:.0%}"
    for reason in ("first convolution", "1x1", "not faster"):
        assert f"{reason}1{share} of the MACs" in told


def test_columns_of_what_is_not_known_are_left_out(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3))
    told = Read(sepconv.convert(net, dryrun=True).to_html(tmp_path / "plan.html").read_text()).text
    assert "sepconv plan: Sequential" in told
    for column in ("MACs", "time", "output share", "one forward"):
        assert column not in told


def test_a_report_of_nothing_is_a_page(tmp_path: Path) -> None:
    path = sepconv.Report().to_html(tmp_path / "empty.html")
    assert "0 of 0" in Read(path.read_text()).text


def test_a_number_that_is_none_does_not_sort_as_one(tmp_path: Path) -> None:
    report = samples.report()
    report.layers[1].error = float("nan")
    html = report.to_html(tmp_path / "nan.html").read_text()
    assert 'data-value="nan"' not in html


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = samples.report().to_html(str(tmp_path / "a.html"))
    assert path == tmp_path / "a.html"
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(FileNotFoundError):
        samples.report().to_html(tmp_path / "nowhere" / "a.html")


def test_rules_for_a_notebook_are_for_its_own_elements(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    rules = re.sub(r"/\*.*?\*/", "", style, flags=re.S)
    depth, outer = 0, ""
    for letter in rules:  # what stands outside of every brace
        depth += (letter == "{") - (letter == "}")
        outer += letter if depth == 0 else ""
    selectors = [line.strip() for line in outer.replace("}", "\n").splitlines() if line.strip()]
    allowed = ("<style>", ".sepconv-page", ".sepconv.sepconv.sepconv", "@page", "@media")
    assert all(selector.startswith(allowed) for selector in selectors)
