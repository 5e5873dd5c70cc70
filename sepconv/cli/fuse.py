"""`sepconv fuse`: lower a model for inference, compare and time both forms, maybe export."""

from argparse import Namespace

from sepconv.cli.export import check_exports, write_exports
from sepconv.cli.inputs import example_inputs
from sepconv.cli.result import Result
from sepconv.cli.sources.opening import open_source
from sepconv.cli.staging import Staged
from sepconv.fusion.fuse import fuse
from sepconv.graph import split_inputs
from sepconv.graph.compare import Check
from sepconv.reports.conversion import report


def run(options: Namespace) -> Result:
    """Fuse, and say what was fused and what it is worth."""
    with Staged([options.onnx, options.pt2]) as staged:
        check_exports(options)
        source = open_source(options)
        inputs = example_inputs(source, options.input)
        args, kwargs = split_inputs(inputs)
        check = Check(source.model, args, kwargs)
        fused = fuse(source.model, inputs)
        told = report(fused)
        result = Result({"source": source.name, "report": told.to_dict()}, [told])
        different = check.difference(fused)
        result.data["compared"] = {"fault": different}
        if different is not None:
            result.faults.append(f"the fused model answers otherwise: {different}")
        else:
            result.shown.append("answers compared: the same but for rounding")
        if told.kept and (options.onnx or options.pt2):
            # What is faster here says nothing of where the exported model will run.
            fused = fuse(source.model, inputs, measure=False)
        write_exports(options, fused, inputs, staged, result, source.batch is None)
        result.data["written"] = staged.commit()
    return result
