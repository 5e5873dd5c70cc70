"""Files that a command writes: all of them are there in the end, or none."""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from sepconv._util import closest


class Staged:
    """Collects files under temporary names beside their own, and moves all of them at once.

    Args:
        paths: Of the files that may be written; None for those that were not asked for.

    Raises:
        ValueError: A folder of theirs does not exist, or one is a folder itself.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Staged([f"{folder}/a.txt"]) as files:
        ...     _ = files.path(f"{folder}/a.txt").write_text("hello")
        ...     _ = files.commit()
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """

    def __init__(self, paths: Iterable[str | None]) -> None:
        self._staged: dict[Path, Path] = {}
        for path in map(Path, filter(None, paths)):
            folder = path.parent
            if not folder.is_dir():
                near = folder.parent.iterdir() if folder.parent.is_dir() else ()
                names = [other.name for other in near if other.is_dir()]
                raise ValueError(
                    f"{path}: there is no folder {str(folder)!r}{closest(folder.name, names)}"
                )
            if path.is_dir():
                raise ValueError(f"{path}: expected a file, got a folder")
            if not os.access(folder, os.W_OK):
                raise ValueError(f"{path}: the folder {str(folder)!r} cannot be written to")

    def __enter__(self) -> "Staged":
        return self

    def path(self, final: str) -> Path:
        """Where to write what is to become `final`."""
        path = Path(final)
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
        self._staged[path] = temporary
        return temporary

    def drop(self, final: str) -> None:
        """Leave a file out that was written."""
        self._staged.pop(Path(final)).unlink(missing_ok=True)

    def commit(self) -> list[str]:
        """Give all files their names; those names."""
        for final, temporary in self._staged.items():
            os.replace(temporary, final)
        written = [str(final) for final in self._staged]
        self._staged.clear()
        return written

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for temporary in self._staged.values():
            temporary.unlink(missing_ok=True)
