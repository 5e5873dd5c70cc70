"""The floor plan: which room may import from which. docs/how-it-works.md shows it."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a room imports from the rooms above it in this list, and from its own.
ROOMS = (
    "kernels",
    "factorize",
    "_version",
    "_util",
    "timing",
    "counting",
    "ops",
    "nn",
    "graph",
    "mobilenet",
    "calibration",
    "reports",
    "tuning",
    "fusion",
    "conversion",
    "saving",
    "sweeps",
    "distillation",
    "cli",
)
# The package's own files: what users import, and the command line.
FACE = ("__init__", "__main__")
MOST_LOOSE_MODULES = 5
MOST_ROOMS = 20
LOOSE = sorted(file.stem for file in (ROOT / "sepconv").glob("*.py") if file.stem not in FACE)
FOLDERS = sorted(
    file.parent.relative_to(ROOT / "sepconv").as_posix()
    for file in (ROOT / "sepconv").glob("**/__init__.py")
    if file.parent.name != "sepconv"
)


def sources() -> Iterator[tuple[str, Path]]:
    """Each file of the package, with its room."""
    for file in sorted((ROOT / "kernels").glob("*.py")):
        yield "kernels", file
    for file in sorted((ROOT / "sepconv").rglob("*.py")):
        room = file.relative_to(ROOT / "sepconv").parts[0].removesuffix(".py")
        if room not in FACE:
            yield room, file


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """Line, module below `sepconv` (empty: the package itself), and whether in a function."""
    tree = ast.parse(source)
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sepconv":
            names = [f"sepconv.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "sepconv":
                yield node.lineno, rest, node in inner


def wrong(room: str, source: str) -> list[str]:
    """What a file of that room must not import, and where."""
    found = []
    for line, module, inner in imports(source):
        target = module.partition(".")[0]
        if target not in ROOMS:
            found.append(f"{line}: the package itself ({module or 'sepconv'})")
        elif ROOMS.index(target) > ROOMS.index(room):
            found.append(f"{line}: {target} from {room}")
        elif inner:
            found.append(f"{line}: {target} inside a function")
    return found


def test_rooms_import_only_from_the_rooms_above_them():
    found = {
        f"{file.relative_to(ROOT)}:{where}"
        for room, file in sources()
        for where in wrong(room, file.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from sepconv.fusion.fuse import fuse", ["1: fusion from ops"]),
        ("from sepconv import nn, timing", ["1: nn from ops"]),
        ("def f():\n    from sepconv import timing", ["2: timing inside a function"]),
        ("import sepconv", ["1: the package itself (sepconv)"]),
        ("import torch\nfrom sepconv.kernels import configs", []),
    ],
)
def test_a_wrong_import_is_seen(source, expected):
    assert wrong("ops", source) == expected


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that import themselves by way of others."""
    found = set()
    for start in graph:
        reached, pending = set[str](), [*graph[start]]
        while pending:
            module = pending.pop()
            if module not in reached:
                reached.add(module)
                pending += graph.get(module, ())
        if start in reached:
            found.add(start)
    return found


def test_no_file_imports_itself_by_way_of_others():
    files = {}
    for room, file in sources():
        parts = file.relative_to(ROOT if room == "kernels" else ROOT / "sepconv").with_suffix("")
        files[".".join(parts.parts).removesuffix(".__init__")] = file
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sepconv."):
                module = (node.module or "").removeprefix("sepconv.")
                for alias in node.names:
                    # A name of a package is a file of it, or something that its face imports.
                    whole = f"{module}.{alias.name}"
                    graph[name].add(whole if whole in files else module)
    assert sum(map(len, graph.values())) > 100
    assert not circles(graph)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}


def test_few_modules_are_loose_and_every_room_is_in_the_plan():
    assert len(LOOSE) <= MOST_LOOSE_MODULES
    assert len(FOLDERS) <= MOST_ROOMS
    assert {*LOOSE, *(folder.partition("/")[0] for folder in FOLDERS)} == set(ROOMS)


def test_the_page_and_its_drawing_show_the_plan():
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    table = page.partition("| room |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == ROOMS
    drawing = (ROOT / "docs" / "images" / "rooms.svg").read_text()
    assert {*re.findall(r">(\w+)</text>", drawing)} >= set(ROOMS) - {"_version"}


def test_every_room_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {f"sepconv.{folder.replace('/', '.')}" for folder in FOLDERS}
    assert set(settings["packages"]) == {"sepconv", *folders}
