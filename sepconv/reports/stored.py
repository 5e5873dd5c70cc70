"""The report of a conversion as text in a file, which may come from anywhere."""

import json
from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from sepconv.reports.conversion import Report
from sepconv.reports.layer import LayerReport

_SCALARS = (bool, int, float, str, NoneType)


def report_to_text(report: Report) -> str:
    """JSON of what the report tells; numbers that JSON does not know are left out."""
    return json.dumps(_finite(report.to_dict()))


def report_from_text(text: str) -> Report:
    """Read what `report_to_text` wrote.

    Every value is checked. What this version of the report does not have is passed over, for a
    later one may have more to tell.

    Raises:
        ValueError: It is no report, or damaged.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"report: expected JSON, got {text[:40]!r}: {error}") from error
    told = _taken(Report, content, "report")
    layers = content.get("layers")
    if not isinstance(layers, list):
        _fail("report: layers", "a list", layers)
    items = [_taken(LayerReport, item, f"report: layers[{i}]") for i, item in enumerate(layers)]
    return Report(layers=[LayerReport(**item) for item in items], **told)


def _taken(kind: type, content: Any, where: str) -> dict[str, Any]:
    """The numbers and words of a data class that are there, each of its type."""
    if not isinstance(content, Mapping):
        _fail(where, "an object", content)
    hints = get_type_hints(kind)
    taken: dict[str, Any] = {}
    for field in fields(kind):
        allowed = _allowed(hints[field.name])
        if allowed is None or field.name not in content:
            continue
        value = content[field.name]
        if not _fits(value, allowed):
            _fail(f"{where}: {field.name}", f"{hints[field.name]}", value)
        taken[field.name] = value
    for name in {"name", "status"} & set(hints):
        if name not in taken:
            _fail(where, f"a {name}", sorted(map(str, content)))
    return taken


def _allowed(hint: Any) -> tuple[Any, ...] | None:
    """Types, or the words of a Literal, that a field may hold; None for what is not looked at."""
    several = get_origin(hint) in (Literal, Union, UnionType)
    options = get_args(hint) if several else (hint,)
    plain = all(option in _SCALARS or get_origin(option) is dict for option in options)
    return options if plain or get_origin(hint) is Literal else None


def _fits(value: Any, allowed: tuple[Any, ...]) -> bool:
    if isinstance(value, float) and not isfinite(value):
        return False
    if type(value) is int and float in allowed:
        return abs(value) < 1 << 63
    if isinstance(value, dict):
        kinds = [get_args(option)[1] for option in allowed if get_origin(option) is dict]
        return any(kind is Any or all(type(v) is kind for v in value.values()) for kind in kinds)
    return type(value) in allowed or (isinstance(value, str) and value in allowed)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _fail(where: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{where}: expected {expected}, got {repr(got)[:80]}")
