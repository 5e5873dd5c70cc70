"""`sepconv distill`: train a converted model to answer as the original does."""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

from sepconv.cli.inputs import batches, example_inputs
from sepconv.cli.result import Result
from sepconv.cli.sources.opening import check_exists, open_source
from sepconv.cli.staging import Staged
from sepconv.distillation.distill import distill
from sepconv.saving.files import load, save

# Of the batches, the first few judge and are not trained on: a tenth, where there are that many.
_HELD_OUT, _MOST_HELD_OUT = 0.1, 8


def run(options: Namespace) -> Result:
    """Distill, and save the student with the weights that did best on batches held out."""
    with Staged([options.output, options.log, options.checkpoint]) as staged:
        check_exists(options.student)
        if options.source.endswith(".pt2"):
            raise ValueError(
                "SOURCE: expected a model that can be trained, got an exported program"
            )
        source = open_source(options, converted=False)
        data = batches(source, options, "--data", options.samples)
        inputs = example_inputs(source, options.input, data)
        build = Namespace(**{**vars(options), "weights": None, "untrained": True})
        student = load(options.student, lambda: open_source(build, trained=False).model)
        held_out, rest = _split(data)
        distill(
            student,
            source.model,
            rest,
            options.epochs,
            example_inputs=inputs,
            held_out=held_out,
            loss=options.loss,
            learning_rate=options.learning_rate,
            checkpoint=options.checkpoint,
            log=options.log,
        )
        save(student, staged.path(options.output), source=source.name)
        written = staged.commit()
    line = source.to_load(options.output)
    result = Result({"source": source.name, "written": written, "load": line})
    result.shown += [f"wrote {options.output}", f"in Python: {line}"]
    return result


def _split(data: Iterable[Any]) -> tuple[list[Any] | None, Iterable[Any]]:
    """Batches to judge by, and those to train on; None to judge by where there are too few."""
    count = len(data) if isinstance(data, Sized) else 0
    held = min(int(_HELD_OUT * count), _MOST_HELD_OUT)
    if held == 0:
        return None, data
    return list(islice(data, held)), _Rest(data, held, count)


class _Rest:
    """All but the first batches, each time anew."""

    def __init__(self, data: Iterable[Any], left_out: int, count: int) -> None:
        self._data, self._left_out, self._count = data, left_out, count

    def __len__(self) -> int:
        return self._count - self._left_out

    def __iter__(self) -> Iterator[Any]:
        return islice(self._data, self._left_out, None)
