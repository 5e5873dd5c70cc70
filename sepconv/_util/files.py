"""Writing files so that a crash leaves the old one whole."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path` and move it there.

    Raises:
        OSError: the folder does not exist or cannot be written to; `path` is unchanged then.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not `tempfile`: its files are for their owner alone, and this one is to be read by others.
    with open(temporary, "xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink()
            raise
