"""hf:FOLDER: a model that transformers' `save_pretrained` wrote, with its image processor."""

import json
from pathlib import Path
from typing import Any

from sepconv._util import first_line
from sepconv.cli.extras import needed
from sepconv.cli.sources.source import Preprocess, Size, Source, quoted

# Else transformers asks at the terminal whether code that a config names may run.
_SAFELY = {"local_files_only": True, "trust_remote_code": False}


def open_transformers(folder: str, trained: bool) -> Source:
    """A model of transformers in a local folder; nothing is fetched, no code of the folder runs.

    Raises:
        ValueError: The folder holds no such model.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"SOURCE: expected hf:FOLDER with a config.json in it, got {folder!r}")
    transformers = needed("transformers", "zoo")
    names = _architectures(path / "config.json")
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(
            f"SOURCE: expected a config.json with an architecture of transformers "
            f"{transformers.__version__}, got {names}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_SAFELY)
        model = kind.from_pretrained(folder, **_SAFELY) if trained else kind(config)
    except Exception as error:  # whatever transformers makes of damaged files
        raise ValueError(f"SOURCE: hf:{folder}: {first_line(error)}") from error
    name = str(getattr(model, "main_input_name", "pixel_values"))
    source = Source(
        f"hf:{folder}",
        model,
        f"transformers.{names[0]}(transformers.AutoConfig.from_pretrained({quoted(folder)}))",
        "import sepconv, transformers",
        wrap=lambda batch: {name: batch},
    )
    if (path / "preprocessor_config.json").is_file():
        prepare = _prepare(transformers, folder, name)
        own = tuple(prepare(_blank()).shape)

        def preprocessing(size: Size | None) -> Preprocess:
            if size is not None and size != own:
                raise ValueError(
                    f"--input: expected {'x'.join(map(str, own))}, which hf:{folder} states, got "
                    f"{'x'.join(map(str, size))}; with --mean and --std others can be had"
                )
            return prepare

        source.size, source.preprocessing = own, preprocessing
    return source


def _architectures(config: Path) -> list[str]:
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"SOURCE: {config}: expected JSON: {error}") from error
    found = content.get("architectures") if isinstance(content, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else []


def _prepare(transformers: Any, folder: str, name: str) -> Preprocess:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **_SAFELY)
    return lambda image: processor(images=image, return_tensors="pt")[name][0]


def _blank() -> Any:
    """An image, to see what is made of one."""
    return needed("PIL.Image", "images").new("RGB", (256, 256))
