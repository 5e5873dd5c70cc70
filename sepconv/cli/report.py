"""`sepconv report`: what a saved model was made into."""

from argparse import Namespace
from math import prod
from pathlib import Path

from sepconv.cli.result import Result
from sepconv.cli.sources.opening import check_exists
from sepconv.cli.staging import Staged
from sepconv.reports.conversion import Report
from sepconv.reports.layer import LayerReport
from sepconv.saving.files import read_recipe, read_report
from sepconv.saving.recipe import Recipe

_BOTH = ("before", "after")


def run(options: Namespace) -> Result:
    """Print the report in a file; neither the original nor its code is needed."""
    path = Path(options.file)
    check_exists(options.file)
    with Staged([options.html]) as staged:
        recipe = read_recipe(path)
        told = read_report(path) or _of_recipe(recipe)
        data = {
            "source": recipe.source,
            "sepconv_version": recipe.sepconv_version,
            "report": told.to_dict(),
        }
        result = Result(data, [told])
        result.shown.append(f"made from {recipe.source or 'a model that the file does not name'}")
        if options.html is not None:
            told.to_html(staged.path(options.html))
            result.data["written"] = staged.commit()
            result.shown.append(f"wrote {options.html}")
    return result


def _of_recipe(recipe: Recipe) -> Report:
    """What the recipe alone tells, for a file without a report: the converted layers' weights."""
    layers = [
        LayerReport(
            layer.full_name,
            "converted",
            rank=layer.rank,
            rank_in=layer.rank_in,
            rank_out=layer.rank_out,
            params_before=prod(layer.shape),
            params_after=layer.form.params(layer.shape),
            error=layer.error,
            method=layer.method,
        )
        for layer in recipe.layers
    ]
    before, after = (sum(getattr(x, f"params_{when}") for x in layers) for when in _BOTH)
    return Report(layers, params_before=before, params_after=after)
