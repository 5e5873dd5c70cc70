"""`sepconv convert`: a trained model in, the converted one out, and what came of it."""

from argparse import Namespace
from typing import Any

from torch import nn

from sepconv.cli.export import check_exports, write_exports
from sepconv.cli.inputs import SAMPLES, batches, example_inputs
from sepconv.cli.result import Result
from sepconv.cli.sources.opening import open_source
from sepconv.cli.sources.source import Source
from sepconv.cli.staging import Staged
from sepconv.conversion.convert import convert
from sepconv.conversion.options import Budget, UnreachableError
from sepconv.conversion.quality import GOOD, LOST
from sepconv.reports.conversion import Report, report
from sepconv.saving.files import save

_BUDGETS = ("macs", "params", "latency", "error")
_AS_THEY_ARE = (
    *("include", "exclude", "first_conv", "pointwise", "bottleneck"),
    *("only_if_faster", "effort", "seed"),
)


def run(options: Namespace) -> Result:
    """Convert, save, and export as the command line says."""
    if options.output is None and not options.dry_run:
        raise ValueError("-o: expected OUT.safetensors, or --dry-run to write nothing, got neither")
    if options.error is not None and options.data is None:
        raise ValueError("--error: expected --calibration beside it, to know errors by, got none")
    outputs = [options.output, options.report, options.onnx, options.pt2]
    with Staged([] if options.dry_run else outputs) as staged:
        if not options.dry_run:
            check_exports(options)
        source = open_source(options, converted=False)
        data = None if options.data is None else _data(source, options)
        inputs = example_inputs(source, options.input, data)
        try:
            made = convert(
                source.model,
                inputs,
                rank=_rank(options),
                budget=_budget(options),
                calibration=data,
                dryrun=options.dry_run,
                **{name: getattr(options, name) for name in _AS_THEY_ARE},
            )
        except UnreachableError as error:
            return Result({"source": source.name}, faults=[str(error)])
        told = made if options.dry_run else report(made)
        result = Result({"source": source.name, "report": told.to_dict()}, [told])
        result.faults += _faults(told)
        if told.converted and not options.dry_run:
            _write(options, source, made, inputs, staged, result)
    return result


def _write(
    options: Namespace,
    source: Source,
    model: nn.Module,
    inputs: Any,
    staged: Staged,
    result: Result,
) -> None:
    save(model, staged.path(options.output), source=source.name)
    if options.report is not None:
        report(model).to_html(staged.path(options.report))
    write_exports(options, model, inputs, staged, result, source.batch is None)
    result.data["written"] = staged.commit()
    result.data["load"] = source.to_load(options.output)
    result.shown.append(f"wrote {', '.join(result.data['written'])}")
    result.shown.append(f"in Python: {result.data['load']}")


def _data(source: Source, options: Namespace) -> Any:
    return batches(source, options, "--calibration", options.samples or SAMPLES)


def _rank(options: Namespace) -> Any:
    """A rank for all layers, or a mapping of name patterns."""
    if options.rank is None:
        return None
    ranks = dict(options.rank)
    return ranks["*"] if [*ranks] == ["*"] else ranks


def _budget(options: Namespace) -> Budget | None:
    given = {name: getattr(options, name) for name in _BUDGETS}
    given = {name: value for name, value in given.items() if value is not None}
    return Budget(**given) if given else None


def _faults(told: Report) -> list[str]:
    """What a script must not pass over."""
    if not told.converted:
        return [f"nothing was converted: {told.reasons()}"]
    if told.output_error is not None and told.output_error > LOST:
        return [
            f"the result has probably lost its function: the squared error of its outputs is "
            f"{told.output_error:.2f} of their variance; above {LOST:g} little is left, aim at "
            f"{GOOD:g}"
        ]
    return []
