"""A sweep in a folder: each point is kept as soon as it is known, so that a sweep can go on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from sepconv._util import crc32, write_atomically
from sepconv.graph.state import copied
from sepconv.saving.files import load, save
from sepconv.sweeps.point import Point

FILE = "sweep.json"
FORMAT = "sepconv-sweep"


class Folder:
    """The points of one sweep of one model.

    Args:
        path: Made where it does not exist; its parent must.
        model: The original.
        options: What the points depend on, as JSON.

    Raises:
        ValueError: The folder holds something else, or a sweep of something else.
        OSError: It cannot be made or read.
    """

    def __init__(self, path: Path, model: nn.Module, options: Mapping[str, Any]) -> None:
        self._path, self._model = path, model
        self._options = json.loads(json.dumps({**options, "model": _checksum(model)}))
        self.points: dict[float, Point] = {}
        path.mkdir(exist_ok=True)
        if (path / FILE).exists():
            self._read()

    def _read(self) -> None:
        where = self._path / FILE
        try:
            content = json.loads(where.read_text())
            known = content["format"] == FORMAT
            options, points = dict(content["options"]), [*map(Point.from_dict, content["points"])]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected what a sweep wrote, got something else") from error
        if not known:
            raise ValueError(f"{where}: expected what a sweep wrote, got {content['format']!r}")
        for name, value in self._options.items():
            if options.get(name) != value:
                raise ValueError(
                    f"{where}: expected a sweep with {name}={value!r}, got one with "
                    f"{options.get(name)!r}; choose another folder, or remove this one"
                )
        self.points = {p.budget: p for p in points if p.note or self._file(p.budget).is_file()}

    def _file(self, budget: float) -> Path:
        return self._path / f"{self._options['cost']}-{budget:g}.safetensors"

    def add(self, point: Point) -> None:
        """Keep a point, and its model."""
        if point.model is not None:
            save(point.model, self._file(point.budget))
        self.points[point.budget] = point
        content = {
            "format": FORMAT,
            "options": self._options,
            "points": [p.to_dict() for p in self.points.values()],
        }
        write_atomically(self._path / FILE, json.dumps(content, indent=2) + "\n")

    def with_model(self, point: Point) -> Point:
        """A point that was read, with the model that was kept with it."""
        if point.model is not None or not point.found:
            return point
        return replace(point, model=load(self._file(point.budget), lambda: copied(self._model)))


def _checksum(model: nn.Module) -> int:
    """Of all values of its state."""
    total = 0
    for value in model.state_dict().values():
        total = (total * 31 + crc32(value)) % 2**32
    return total
