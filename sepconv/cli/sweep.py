"""`sepconv sweep`: one model at several budgets."""

from argparse import Namespace
from typing import Any

from sepconv.cli.inputs import SAMPLES, batches, example_inputs
from sepconv.cli.result import Result
from sepconv.cli.sources.functions import function
from sepconv.cli.sources.opening import open_source
from sepconv.cli.staging import Staged
from sepconv.sweeps.sweep import sweep


def run(options: Namespace) -> Result:
    """Convert at each budget, and tell what each costs and keeps."""
    with Staged([options.plot]) as staged:
        evaluate = None if options.evaluate is None else function(options.evaluate, "--evaluate")
        source = open_source(options, converted=False)
        data = batches(source, options, "--calibration", options.samples or SAMPLES)
        inputs = example_inputs(source, options.input, data)
        chosen: dict[str, Any] = {} if options.budgets is None else {"budgets": options.budgets}
        found = sweep(
            source.model,
            inputs,
            data,
            evaluate,
            cost=options.cost,
            path=options.keep,
            effort=options.effort,
            seed=options.seed,
            **chosen,
        )
        result = Result({"source": source.name, **found.to_dict()}, [found])
        if options.plot is not None:
            found.plot(staged.path(options.plot))
        result.data["written"] = staged.commit()
    result.shown += [f"wrote {path}" for path in result.data["written"]]
    if not any(point.found for point in found.points):
        result.faults.append("no budget can be reached")
    return result
