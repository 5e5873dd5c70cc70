"""One model under several budgets: looked at and calibrated once."""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

from sepconv.calibration.effort import Effort, check_effort
from sepconv.conversion.convert import carry_out
from sepconv.conversion.options import Budget, Choice, check_options
from sepconv.conversion.prepare import Prepared, prepare
from sepconv.graph import ExampleInputs
from sepconv.graph.checked import checked_model
from sepconv.graph.state import check_copyable, trainable

Kind = Literal["macs", "params", "latency"]
Evaluate = Callable[[nn.Module], float]

_NOT_FOR_ONE = ("rank", "budget", "inplace", "dryrun", "optimizers")


class Budgets:
    """Converts a model to one budget after the other.

    What does not depend on the budget is done once: the graph, the trial of the model's code, the
    samples' responses and the error that each form of each layer leaves.

    Args:
        model: Never changed.
        example_inputs: As for `sepconv.convert`.
        calibration: As for `sepconv.convert`; read once.
        kind: What the budgets are of.
        only_if_faster: As for `sepconv.convert`.
        effort: Likewise, for each budget.
        seed: Likewise.
        options: Others of `sepconv.convert`.

    Raises:
        ValueError: Something was given that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None,
        calibration: Iterable[Any] | None,
        kind: Kind = "macs",
        *,
        only_if_faster: bool = False,
        effort: Effort = "default",
        seed: int = 0,
        **options: Any,
    ) -> None:
        for name in _NOT_FOR_ONE:
            if name in options:
                raise ValueError(
                    f"{name}: expected none where a model is converted to several budgets, "
                    f"got {options[name]!r}"
                )
        if kind not in get_args(Kind):
            raise ValueError(f"cost: expected {', '.join(get_args(Kind))}, got {kind!r}")
        self._choice, self._kind = Choice.of(**options), kind
        self._faster, self._effort, self._seed = only_if_faster, effort, seed
        check_options(self._choice, self._budget(1.0), example_inputs, only_if_faster)
        check_effort(effort)
        model = checked_model(model)
        check_copyable(model)
        self._model, self._inputs = trainable(model, itself=False), example_inputs
        self._calibrated = None if calibration is None else self._prepared(1.0, calibration)

    def _budget(self, fraction: float) -> Budget:
        return Budget(**{self._kind: fraction})

    @torch.inference_mode(False)  # the results are to be trained, wherever they were made
    def _prepared(self, fraction: float, calibration: Iterable[Any] | None) -> Prepared:
        budget = self._budget(fraction)
        given = (self._model, self._inputs, self._choice, budget, calibration)
        return prepare(*given, self._effort, self._seed)

    @torch.inference_mode(False)
    def convert(self, fraction: float) -> Any:
        """The model within a fraction of its cost; without the warnings that its report repeats.

        Raises:
            UnreachableError: The budget cannot be reached.
        """
        start = time.monotonic()
        ready = self._calibrated or self._prepared(fraction, None)
        if ready.study is not None:
            ready.study.begin()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "convert: the model did not get faster")
            warnings.filterwarnings("ignore", "convert: only_if_faster")
            warnings.filterwarnings("ignore", "convert: the model has probably lost")
            return carry_out(ready, self._budget(fraction), start, self._faster)


def score_of(evaluate: Evaluate, model: nn.Module) -> float:
    """What the caller's measure says of a model.

    Raises:
        ValueError: It is no finite number.
    """
    score = float(evaluate(model))
    if not math.isfinite(score):
        raise ValueError(f"evaluate: expected a finite score, got {score}")
    return score
