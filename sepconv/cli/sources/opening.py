"""`open_source`: the model that the command line names."""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from sepconv._util import closest, first_line
from sepconv.cli.arguments import shape
from sepconv.cli.sources.exported import open_exported
from sepconv.cli.sources.functions import open_function
from sepconv.cli.sources.onnx_file import open_onnx
from sepconv.cli.sources.source import Source, as_it_is
from sepconv.cli.sources.transformers_folder import open_transformers
from sepconv.cli.sources.zoos import open_timm, open_torchvision
from sepconv.mobilenet.checkpoints.files import read_tensors
from sepconv.saving.files import load, read_recipe, read_report

Open = Callable[[str, bool], Source]  # a name, and whether its trained weights are wanted

_PREFIXES: dict[str, Open] = {
    "timm": open_timm,
    "torchvision": open_torchvision,
    "hf": open_transformers,
}
_SUFFIXES: dict[str, Open] = {".pt2": open_exported, ".onnx": open_onnx}
_SAVED = ".safetensors"
_ONE_BATCH = re.compile(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})+ b?float[0-9]+")  # as reports say it
_KINDS = (
    "timm:NAME, torchvision:NAME, hf:FOLDER, MODULE:FUNCTION, or a file .pt2, .onnx or .safetensors"
)


def open_source(options: Namespace, *, trained: bool = True, converted: bool = True) -> Source:
    """The model that SOURCE names, in eval mode, on the device that was asked for.

    Args:
        options: Of the command line: `source`, `original`, `weights`, `untrained`, `device`; those
            that a command does not have count as not given.
        trained: Whether trained weights are of use to the command.
        converted: Whether it takes what `sepconv convert` wrote.

    Raises:
        ValueError: There is no such model, or it cannot be had.
        OSError: A file cannot be read.
    """
    given = vars(options)
    weights, original = given.get("weights"), given.get("original")
    device = chosen_device(given.get("device"))
    fetch = trained and not given.get("untrained") and weights is None
    if options.source.endswith(_SAVED):
        if not converted:
            raise ValueError(
                f"SOURCE: expected an original model, got {options.source}, a converted one"
            )
        source = _open_saved(options.source, original)
    else:
        source = _open_original(options.source, fetch)
    if weights is not None:
        _load_weights(source, Path(weights))
    for module in source.model.modules():
        module.training = False  # exported programs refuse `eval()`
    source.model.to(device)
    return source


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; a GPU where there is one, if none was given.

    Raises:
        ValueError: There is none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch has an error of its own for each way in which a device can be missing.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: expected one that works here, got {name!r}: {first_line(error)}"
        ) from error
    return device


def _open_original(named: str, trained: bool) -> Source:
    prefix, colon, rest = named.partition(":")
    if colon and prefix in _PREFIXES:
        return _PREFIXES[prefix](rest, trained)
    suffix = Path(named).suffix
    if suffix in _SUFFIXES:
        check_exists(named)
        return _SUFFIXES[suffix](named, trained)
    if colon:
        near = closest(prefix, _PREFIXES)
        try:
            return open_function(named, trained)
        except ValueError as error:
            raise ValueError(f"{error}{near}") from error
    hint = f", did you mean 'timm:{named}'?" if named.isidentifier() else ""
    raise ValueError(f"SOURCE: expected {_KINDS}, got {named!r}{hint}")


def _open_saved(path: str, original: str | None) -> Source:
    check_exists(path)
    named = original or read_recipe(path).source
    if named is None:
        raise ValueError(
            f"{path}: does not tell what model it was made from; name it: --source SOURCE"
        )
    if original is None and runs_code(named):
        raise ValueError(
            f"{path}: was made from {named}, which may run code and so is opened only where you "
            f"name it: --source {named}"
        )
    source = _open_original(named, trained=False)
    source.model = load(path, lambda: source.model)
    _take_size(source, path)
    return source


def _take_size(source: Source, path: str) -> None:
    """The size of the inputs that the model was converted for, if that was one batch of numbers."""
    told = read_report(path)
    is_batch = source.size is not None or source.wrap is as_it_is
    if told is None or source.example is not None or not is_batch:
        return
    match told.settings.get("example_inputs"):
        case [str(only)] if _ONE_BATCH.fullmatch(only):
            source.size = shape(only.partition(" ")[0])[1:]


def runs_code(named: str) -> bool:
    """Whether opening a SOURCE may run code that comes with it.

    That is a MODULE:FUNCTION; and a .pt2, for `torch.export.load` unpickles and evaluates text.
    """
    prefix, colon, _ = named.partition(":")
    suffix = Path(named).suffix
    if prefix in _PREFIXES and colon:
        return False
    return suffix == ".pt2" or (bool(colon) and suffix not in _SUFFIXES)


def check_exists(path: str) -> None:
    """Raise `ValueError` where a file is missing, with the name nearest to its own."""
    if not Path(path).is_file():
        folder = Path(path).parent
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        raise ValueError(f"{path}: there is no such file{closest(Path(path).name, names)}")


def _load_weights(source: Source, path: Path) -> None:
    """Load a file of weights, alone or as the state_dict in a training checkpoint."""
    check_exists(str(path))
    try:
        state = {name: torch.as_tensor(value) for name, value in read_tensors(path).values.items()}
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"--weights: expected a file of weights: {first_line(error)}") from error
    own = source.model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        first = f"{unknown[0]}{closest(unknown[0], own)}" if unknown else missing[0]
        raise ValueError(
            f"--weights: expected the tensors of the model, got {path}: {len(missing)} of "
            f"{len(own)} are missing and {len(unknown)} are unknown, as {first}"
        )
    wrong = [name for name, value in state.items() if value.shape != own[name].shape]
    if wrong:
        expected, got = own[wrong[0]].shape, state[wrong[0]].shape
        hint = ""
        if source.name.startswith(("timm:", "torchvision:")) and expected[1:] == got[1:]:
            hint = f"; of another number of classes: {source.name},num_classes={got[0]}"
        raise ValueError(f"--weights: {wrong[0]}: expected {list(expected)}, got {list(got)}{hint}")
    source.model.load_state_dict(state)
