"""Optimizers that were built before a conversion, brought up to date."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer


def check_optimizers(optimizers: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Return the optimizers as a list.

    Raises:
        ValueError: Something else than an optimizer is among them.
    """
    if optimizers is None:
        return []
    if isinstance(optimizers, Optimizer):
        return [optimizers]
    listed = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for optimizer in listed:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"optimizers: expected torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
    return listed


def update_optimizers(
    optimizers: Iterable[Optimizer],
    successors: Mapping[int, list[nn.Parameter]],
    names: Mapping[int, str],
) -> None:
    """Put the new parameters in the place of the old ones, group by group.

    Args:
        optimizers: Their groups and states are changed in place.
        successors: By `id` of an old parameter, what took its place. A single successor of the
            same shape inherits the optimizer's state; factors of a dense weight start afresh.
        names: By `id` of a new parameter, for optimizers that were given named ones.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            updated: dict[int, nn.Parameter] = {}
            for old in group["params"]:
                for new in successors.get(id(old), [old]):
                    updated[id(new)] = new
            if "param_names" in group:
                old_names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
                group["param_names"] = [names.get(p) or old_names[p] for p in updated]
            group["params"] = list(updated.values())
        for old in list(optimizer.state):
            new = successors.get(id(old))
            if new is None:
                continue
            state = optimizer.state.pop(old)
            if len(new) == 1 and new[0].shape == old.shape:
                optimizer.state[new[0]] = state
