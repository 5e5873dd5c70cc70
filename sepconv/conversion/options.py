"""What a user may ask for: a budget, ranks, and which convolutions; and the checks of it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from sepconv._util import closest
from sepconv.factorize import Form, is_finite
from sepconv.graph import Match, Skipped, SkipReason
from sepconv.nn import SeparableConv2d

Rank = int | Form | Literal["full"]
RankChoice = Rank | Mapping[str, Rank | None] | None
FilterFn = Callable[[nn.Module, str], bool]

FIRST_SHARE = 0.1  # of the model's multiply-adds, from which on a budget plans a first convolution

_KINDS = ("macs", "params", "latency", "error")


class UnreachableError(ValueError):
    """A budget below what the cheapest forms of a model cost."""


@dataclass(frozen=True)
class Budget:
    """One limit on the converted model; give exactly one.

    Args:
        macs: Multiply-adds, as a fraction (0, 1] of the **whole** original model's.
        params: Parameters, likewise.
        latency: Measured time on the model's device, likewise, of both models as `sepconv.fuse`
            leaves them.
        error: The largest squared error of the converted model's outputs that is allowed, over
            their variance from input to input, predicted on the calibration batches, in (0, 1].

    Raises:
        ValueError: None or several are given, or one is outside (0, 1].

    Example:
        >>> Budget(macs=0.5).kind, Budget(macs=0.5).fraction
        ('macs', 0.5)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _KINDS}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            names = ", ".join(_KINDS)
            raise ValueError(f"Budget: expected exactly one of {names}, got {given or 'none'}")
        name, value = next(iter(given.items()))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"Budget: expected {name} in (0, 1], got {value!r}")

    @property
    def kind(self) -> str:
        """Which cost is limited: `macs`, `params`, `latency` or `error`."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The limit itself."""
        return float(getattr(self, self.kind))


@dataclass(frozen=True)
class Choice:
    """Which convolutions take part and what they may become; as `sepconv.convert` is given them."""

    rank: RankChoice = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    filter_fn: FilterFn | None = None
    first_conv: bool | None = None
    bottleneck: bool | None = None
    pointwise: bool | None = None

    @staticmethod
    def of(
        include: Iterable[str] | None = None, exclude: Iterable[str] | None = None, **others: Any
    ) -> "Choice":
        """With patterns that can be read more than once.

        Raises:
            ValueError: A pattern is not a string.
        """
        patterns = as_patterns(include, "include"), as_patterns(exclude, "exclude")
        return Choice(include=patterns[0], exclude=patterns[1], **others)


def check_options(
    choice: Choice, budget: object, example_inputs: object, only_if_faster: bool
) -> None:
    """Raise `ValueError` for options that contradict each other or lack what they need."""
    for name in ("first_conv", "bottleneck", "pointwise"):
        flag = getattr(choice, name)
        if flag is not None and not isinstance(flag, bool):
            raise ValueError(f"{name}: expected True, False or None, got {flag!r}")
    if choice.filter_fn is not None and not callable(choice.filter_fn):
        raise ValueError(
            f"filter_fn: expected a function (module, name) -> bool, got {choice.filter_fn!r}"
        )
    if budget is not None and not isinstance(budget, Budget):
        raise ValueError(f"budget: expected a sepconv.Budget, got {budget!r}")
    if choice.rank is not None and budget is not None:
        raise ValueError("rank, budget: expected one of them, got both")
    if example_inputs is None:
        if budget is not None and budget.kind != "params":
            raise ValueError(f"example_inputs: expected some, to know {budget.kind} by, got None")
        if only_if_faster:
            raise ValueError("example_inputs: expected some, to measure latency with, got None")


def check_finite(matches: Iterable[Match]) -> None:
    """Raise `ValueError` for a convolution whose weight has a NaN or an infinity."""
    for conv in matches:
        if not is_finite(conv.weight):
            raise ValueError(f"model: expected finite weights, got NaN or Inf in {conv.name}")


def check_rank(rank: object, where: str = "rank") -> None:
    """Raise `ValueError` unless `rank` is an int of at least 1, a `Form` or "full"."""
    if isinstance(rank, Form) or (rank == "full" and isinstance(rank, str)):
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f'{where}: expected an int of at least 1, a sepconv.Form or "full", got {rank!r}'
        )


def first_from(first_conv: bool | None, budget: Budget | None, macs: int | None) -> float:
    """The multiply-adds from which on a first convolution of the network takes part.

    Args:
        first_conv: What the caller wants: True all, False none, None by their share of the cost.
        budget: To plan for; where there is none, only a caller who wants them gets them.
        macs: Multiply-adds of the whole model, None if not known.
    """
    if first_conv is None and budget is not None and macs:
        return FIRST_SHARE * macs
    return 0.0 if first_conv else math.inf


def as_patterns(given: Iterable[str] | None, where: str) -> tuple[str, ...] | None:
    """Name patterns to read more than once; a string is one.

    Raises:
        ValueError: One is not a string.
    """
    if given is None:
        return None
    if isinstance(given, str):
        return (given,)
    found = tuple(given)
    for pattern in found:
        if not isinstance(pattern, str):
            raise ValueError(f"{where}: expected name patterns, got {pattern!r}")
    return found


def wants_pointwise(rank: object, pointwise: bool | None) -> bool:
    """Whether 1x1 convolutions may take part: they are asked for, or a mapping may name some."""
    if pointwise is None and isinstance(rank, Mapping):
        return any(_splits(value) for value in rank.values())
    return pointwise is True


def _splits(rank: object) -> bool:
    """Whether a rank asked for makes two of a 1x1 convolution."""
    return isinstance(rank, Form) and rank.rank_in is not None


def select(
    model: nn.Module,
    found: Sequence[Match | Skipped],
    rank: RankChoice,
    include: Iterable[str] | None,
    exclude: Iterable[str] | None,
    filter_fn: FilterFn | None,
    first_macs: float,
    pointwise: bool | None = None,
) -> tuple[dict[str, Rank | None], list[Match | Skipped]]:
    """Apply the caller's choices.

    A pattern matches a name, or the name of a module that the convolution is in; `*`, `?` and
    `[...]` are wildcards. The first convolution of the network takes part when it has at least
    `first_macs` multiply-adds or when it is named exactly, without wildcards. A 1x1 convolution
    takes part when `pointwise` is set or when a mapping of ranks names it so, and then not with a
    rank that leaves it as it is.

    Returns:
        The rank asked for by name (None: left to the planner), and `found` with the
        convolutions that were chosen away turned into `Skipped`.

    Raises:
        ValueError: A pattern matches no convolution; a rank is not an int >= 1 or "full".
    """
    include, exclude = as_patterns(include, "include"), as_patterns(exclude, "exclude")
    # An earlier conversion's layers count, so that the same call may be made twice.
    names = [conv.name for conv in found]
    names += [name for name, m in model.named_modules() if isinstance(m, SeparableConv2d)]
    for where, given in (("include", include or ()), ("exclude", exclude or ())):
        _require_matches(where, given, names)
    if isinstance(rank, Mapping):
        _require_matches("rank", rank, names)
        for pattern, value in rank.items():
            if value is not None:
                check_rank(value, f"rank[{pattern!r}]")
    elif rank is not None:
        check_rank(rank)

    named = {*(include or ()), *(rank if isinstance(rank, Mapping) else ())}
    ranks: dict[str, Rank | None] = {}
    chosen: list[Match | Skipped] = []
    for conv in found:
        if isinstance(conv, Skipped):
            chosen.append(conv)
            continue
        wanted: Rank | None = rank if not isinstance(rank, Mapping) else _look_up(rank, conv.name)
        if conv.is_pointwise and not _takes_pointwise(conv.name, rank, wanted, pointwise):
            chosen.append(conv.skipped(SkipReason.POINTWISE))
            continue
        out = (
            (include is not None and not _matches_any(include, conv.name))
            or _matches_any(exclude or (), conv.name)
            or (isinstance(rank, Mapping) and wanted is None)
            or (filter_fn is not None and not filter_fn(_module_of(model, conv), conv.name))
        )
        first = conv.first and conv.dense_macs < first_macs and conv.name not in named
        if out or first:
            reason = SkipReason.EXCLUDED if out else SkipReason.FIRST
            chosen.append(conv.skipped(reason))
        else:
            ranks[conv.name] = wanted
            chosen.append(conv)
    return ranks, chosen


def _takes_pointwise(
    name: str, rank: RankChoice, wanted: Rank | None, pointwise: bool | None
) -> bool:
    """Whether a 1x1 convolution takes part: asked for, and at a rank that changes it."""
    named = isinstance(rank, Mapping) and name in rank
    asked = pointwise or (pointwise is None and named)
    return bool(asked) and (rank is None or _splits(wanted))


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _matches_any(patterns: Iterable[str], name: str) -> bool:
    return any(_matches(p, name) for p in patterns)


def _require_matches(where: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise ValueError(
                f"{where}: no convolution matches {pattern!r}{closest(pattern, names)}"
            )


def _look_up(ranks: Mapping[str, Rank | None], name: str) -> Rank | None:
    """An exact name goes before patterns, an earlier pattern before a later one."""
    if name in ranks:
        return ranks[name]
    return next((value for pattern, value in ranks.items() if _matches(pattern, name)), None)


def _module_of(model: nn.Module, conv: Match) -> nn.Module:
    """What `filter_fn` is shown: the convolution, or the module whose forward makes the call."""
    return conv.module if conv.module is not None else model.get_submodule(conv.owner or "")
