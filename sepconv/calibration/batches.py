"""Calibration data as a caller has it, turned into arguments of the model's forward."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from sepconv.graph import ExampleInputs, split_inputs

MAX_SAMPLES = 4096  # far beyond what helps; keeps an endless generator from hanging
HELD_OUT, MOST_HELD_OUT = 1 / 5, 128  # share of the samples that nothing is fitted to; at most


class Batch(NamedTuple):
    """Positional and keyword arguments of one forward.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        number: Of the batch that the caller gave.
        start: Of these samples in it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int = 0
    start: int = 0

    def tensors(self) -> list[Tensor]:
        """Every tensor among them."""
        return [v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]

    def _first(self) -> Any:
        """What holds the samples: the first tensor that has a dimension, or list of tensors."""
        for value in (*self.args, *self.kwargs.values()):
            if _is_list_of_tensors(value):
                return value
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and tensor.dim():
                    return tensor
        return None

    @property
    def samples(self) -> int:
        """How many there are: a tensor's first dimension, or a list's tensors."""
        first = self._first()
        return 1 if first is None else len(first)

    @property
    def listed(self) -> bool:
        """Whether the samples come as a list of tensors, which may differ in size."""
        return isinstance(self._first(), list)

    def part(self, start: int, n: int) -> "Batch":
        """At most n samples from `start` on."""
        total, listed = self.samples, self.listed

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[start : start + n] if value.dim() and len(value) == total else value
            if not listed:
                return tree_map_only(Tensor, cut, value)
            splits = isinstance(value, list) and len(value) == total
            return value[start : start + n] if splits else value

        return self._changed(cut)._replace(start=self.start + start)

    def mirrored(self) -> "Batch":
        """The same with images [N, 3, H, W], or a list of [3, H, W], flipped left to right.

        Not those of other numbers of channels: they may be spectrograms or written lines.
        """
        listed = self.listed

        def flip(value: Any) -> Any:
            dims = 3 if listed and isinstance(value, list) else 4
            return tree_map_only(Tensor, lambda t: t.flip(-1) if _is_image(t, dims) else t, value)

        return self._changed(flip)

    def _changed(self, change: Callable[[Any], Any]) -> "Batch":
        kwargs = {key: change(value) for key, value in self.kwargs.items()}
        return self._replace(args=tuple(map(change, self.args)), kwargs=kwargs)

    def parts(self, n: int) -> "list[Batch]":
        """All samples, n at a time."""
        return [self.part(start, n) for start in range(0, self.samples, n)]


def _is_image(t: Tensor, dims: int) -> bool:
    return t.dim() == dims and t.shape[-3] == 3 and t.is_floating_point()


def check_iterable(batches: Any, name: str) -> None:
    """Raise `ValueError` for a single batch in the place of many."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise ValueError(
            f"{name}: expected an iterable of batches, such as a DataLoader or a list of "
            f"tensors, got {type(batches).__name__}"
        )


def read_batch(
    given: Any, example_inputs: ExampleInputs | None, device: torch.device, where: str
) -> Batch:
    """One batch as `read_batches` reads them.

    Raises:
        ValueError: It is of another kind, empty, or not finite; `where` says which it is.
    """
    batch = _arguments(given, example_inputs, where)
    _check(batch, where)
    return Batch(*tree_map_only(Tensor, partial(_moved, device=device), (batch.args, batch.kwargs)))


def read_batches(
    calibration: Iterable[Any], example_inputs: ExampleInputs | None, device: torch.device
) -> list[Batch]:
    """The model's inputs from an iterable of unlabelled or labelled batches.

    A batch is a tensor, a sequence or a dict. Of a sequence the first entries are taken, as many
    as `example_inputs` has (one, where that is a tensor or None): the images of `(x, y)`. Of a
    dict the keys of `example_inputs` are taken where that is a dict, else all.

    A list of tensors as an input is one sample for each, as detection models take images of
    different sizes: the first entry of `(images, targets)`. Where `example_inputs` has a list for
    this input, `([image, image],)`, the batch's may be a tuple too, as collation makes it; and
    where that is the only input, a sequence of tensors is the list itself, without targets. In
    any other case a sequence of tensors is `(x, y)`.

    The inputs are kept, for they are run through the model once per layer; what the model makes
    of them is not.

    Raises:
        ValueError: No batch came; a batch is of another kind, empty, or not finite.
    """
    check_iterable(calibration, "calibration")
    batches: list[Batch] = []
    samples = 0
    for index, given in enumerate(calibration):
        batch = read_batch(given, example_inputs, device, f"calibration: batch {index}")
        batches.append(batch._replace(number=index))
        samples += batch.samples
        if samples >= MAX_SAMPLES:
            warnings.warn(
                f"calibration: {samples} samples are enough; the rest is not read", stacklevel=5
            )
            break
    if not batches:
        raise ValueError(
            "calibration: expected at least one batch, got none (a generator gives its batches "
            "only once)"
        )
    return batches


def joined(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """The same, those that follow each other and are alike in one batch of at most so many samples.

    Alike: one tensor each, of samples of one shape.
    """
    found: list[list[Batch]] = []
    for batch in batches:
        last = found[-1] if found else []
        fits = sum(b.samples for b in last) + batch.samples <= samples
        if last and fits and _alike(last[-1], batch):
            last.append(batch)
        else:
            found.append([batch])
    return [group[0] if len(group) == 1 else _one(group) for group in found]


def _alike(one: Batch, other: Batch) -> bool:
    pair = [(b.args[0].shape[1:], b.args[0].dtype) for b in (one, other) if _is_a_tensor(b)]
    return len(pair) == 2 and pair[0] == pair[1]


def _is_a_tensor(batch: Batch) -> bool:
    args = batch.args
    return len(args) == 1 and not batch.kwargs and isinstance(args[0], Tensor) and args[0].dim() > 1


def _one(group: Sequence[Batch]) -> Batch:
    return group[0]._replace(args=(torch.cat([batch.args[0] for batch in group]),))


def hold_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The samples to fit to, and those to judge by: the last ones of each batch.

    A fifth, at most `MOST_HELD_OUT`; of batches of one sample every fifth. Neither is empty: a
    single sample is both.
    """
    total = sum(batch.samples for batch in batches)
    if total == 1:
        return list(batches), list(batches)
    wanted = max(1, min(MOST_HELD_OUT, round(HELD_OUT * total)))
    fitted: list[Batch] = []
    held: list[Batch] = []
    seen = taken = 0
    for batch in batches:
        seen += batch.samples
        count = min(wanted * seen // total - taken, batch.samples)
        taken += count
        rest = batch.samples - count
        if rest:
            fitted.append(batch.part(0, rest))
        if count:
            held.append(batch.part(rest, count))
    return fitted, held


def _arguments(given: Any, example_inputs: ExampleInputs | None, where: str) -> Batch:
    if isinstance(given, Tensor):
        return Batch((given,), {})
    if isinstance(given, Mapping):
        wanted = example_inputs if isinstance(example_inputs, Mapping) else given
        missing = [str(key) for key in wanted if key not in given]
        if missing:
            raise ValueError(f"{where}: expected the keys of example_inputs, {missing} are missing")
        return Batch((), {str(key): given[key] for key in wanted})
    if isinstance(given, tuple | list):
        args, _ = split_inputs(example_inputs)
        wants_list = [isinstance(example, list) for example in args] or [False]
        if wants_list == [True] and all(isinstance(item, Tensor) for item in given):
            given = (given,)
        if len(given) < len(wants_list):
            raise ValueError(f"{where}: expected {len(wants_list)} inputs, got {len(given)}")
        pairs = zip(given, wants_list, strict=False)
        return Batch(tuple(list(v) if w and isinstance(v, tuple) else v for v, w in pairs), {})
    raise ValueError(f"{where}: expected a tensor, tuple, list or dict, got {type(given).__name__}")


def _check(batch: Batch, where: str) -> None:
    tensors = batch.tensors()
    if not tensors:
        raise ValueError(f"{where}: expected a tensor among the inputs, got none")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ValueError(f"{where}: expected samples, got shape {list(tensor.shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: expected finite values, got NaN or Inf")


def _is_list_of_tensors(value: Any) -> bool:
    full = isinstance(value, list) and len(value) > 0
    return full and all(isinstance(item, Tensor) for item in value)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the model's device, without history, and fit to be differentiated through."""
    moved = tensor.detach().to(device)
    return moved.clone() if moved.is_inference() else moved
