"""Whether a choice computes the right thing: checked before anybody times it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import Choice
from sepconv.tuning.inputs import Operands, run_choice


class PoisonedMemory(TorchDispatchMode):
    """New tensors of this thread hold NaN: an element that nobody writes is seen.

    Without it, a wrong candidate may find the right result of the one before in its memory.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (
            func.overloadpacket
            in (
                torch.ops.aten.empty,
                torch.ops.aten.empty_like,
                torch.ops.aten.new_empty,
                torch.ops.aten.empty_strided,
            )
            and made.is_floating_point()
        ):
            made.fill_(float("nan"))
        return made


def is_right(
    problem: Problem, operands: Operands, choice: Choice, expected: tuple[Tensor, ...]
) -> bool:
    """Whether a choice gives exactly `expected`, from integers, in memory full of NaN."""
    with torch.no_grad(), PoisonedMemory():
        results = run_choice(problem, operands, choice)
    return all(torch.equal(y, right) for y, right in zip(results, expected, strict=True))
