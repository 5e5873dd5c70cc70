"""How much the moments of layers with few pixels are damped, and that no fit sees what judges."""

from collections.abc import Mapping
from io import StringIO

import pytest
import torch
from calibration.small import CPU, matches_of, random, study_of
from rich.console import Console
from torch import Tensor, nn

import sepconv
from sepconv.calibration.batches import hold_out, read_batches
from sepconv.calibration.fit import Calibration
from sepconv.calibration.layers import ENOUGH_ROWS, RIDGES
from sepconv.calibration.output import OutputError
from sepconv.calibration.refine import Fitted
from sepconv.conversion.costs import counted_costs
from sepconv.factorize.form import Form
from sepconv.factorize.target import RIDGE


class Net(nn.Sequential):
    """Layers with few pixels behind a large stride."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=4, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 16, 3, padding=1),
        )


def smooth(seed: int, count: int) -> Tensor:
    """Images in which pixels are like their neighbours, and channels like one another."""
    x = random(seed, count, 3, 9, 9)
    x = nn.functional.avg_pool2d(x, 3, 1, padding=1) + 0.3 * x.mean(1, keepdim=True)
    return x + random(seed + 1, count, 1, 1, 1)


def factors_of(fitted: Mapping[str, Fitted]) -> list[Tensor]:
    return [part for layer in fitted.values() for part in (layer.factors.dense(), layer.bias)]


FORMS: dict[str, Form | None] = {"2": Form(2), "4": Form(2), "6": Form(3)}


@pytest.mark.parametrize("samples", [8, 16, 40])
def test_with_few_pixels_the_ridge_lowers_the_error_on_others(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: dict[str, list[float]] = {"chosen": [], "fixed": []}
    for seed in range(3):
        data = [smooth(seed, samples)]
        unseen = study_of(Net().eval(), [smooth(seed + 50, 100)])
        for which, ridges in (("chosen", RIDGES), ("fixed", (RIDGE,))):
            monkeypatch.setattr("sepconv.calibration.layers.RIDGES", ridges)
            study = study_of(Net().eval(), data, effort="fast")
            fitted = study.fit(FORMS)
            errors[which].append(unseen.output_error(fitted))
            held = study.output_error(fitted)
            if which == "chosen":
                ours = held
        assert ours <= held, seed
    assert sum(errors["chosen"]) < 0.97 * sum(errors["fixed"])


def ridges_of(study: Calibration) -> dict[str, float]:
    """By layer, what it was fitted with."""
    return {conv.name: study.fits.ridges.get(conv, RIDGE) for conv in study.layers}


def test_only_layers_with_few_pixels_get_another_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    few = study_of(Net().eval(), [smooth(0, 20)], effort="fast")
    few.fit(FORMS)
    for conv in few.layers:
        assert few.responses.pixels(conv) == 9 * 16 < ENOUGH_ROWS * conv.weight[0].numel()
    assert all(ridge > RIDGE for ridge in ridges_of(few).values())
    planned = study_of(Net().eval(), [smooth(0, 20)])
    planned.error_curves(counted_costs(planned.layers, "macs", new_biases=True))
    assert ridges_of(planned) == ridges_of(few), "planning looks at the same moments"
    monkeypatch.setattr("sepconv.calibration.layers.RIDGES", (0.7,))  # which nobody would choose
    many = study_of(Net().eval(), [smooth(0, 330)], effort="fast")
    many.error_curves(counted_costs(many.layers, "macs", new_biases=True))
    many.fit(FORMS)
    enough = {
        conv.name
        for conv in many.layers
        if many.responses.pixels(conv) >= ENOUGH_ROWS * conv.weight[0].numel()
    }
    assert enough == {"2"}
    assert ridges_of(many) == {"2": RIDGE, "4": 0.7, "6": 0.7}


def test_a_1x1_convolution_gets_a_ridge_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=3), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval()
    x = [smooth(0, 10)]
    matches = matches_of(model, x[0][:1], first=False, pointwise=True)
    study = Calibration(model, matches, x, effort="fast")
    study.fit({"2": Form(1, 5)})
    assert list(study.fits.ridges) == study.layers
    assert study.fits.ridges[study.layers[0]] in RIDGES


# Nothing is fitted to what judges


@pytest.mark.parametrize("sizes", [(20,), (6, 7, 9), (1,) * 11], ids=str)
@pytest.mark.parametrize("form", [Form(2), Form(2, 6)], ids=str)
def test_what_judges_changes_no_factor(
    form: Form, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no ridge is chosen and no step is judged."""
    monkeypatch.setattr("sepconv.calibration.layers.RIDGES", (RIDGE,))
    # They are the unit of what the outputs feel; its rounding sends a search to other minima.
    monkeypatch.setattr(OutputError, "variances", [1.0])
    forms = dict.fromkeys(FORMS, form)
    found = []
    for changed in ("nothing", "held", "fitted"):
        data = [smooth(i, size) for i, size in enumerate(sizes)]
        fitted, held = hold_out(read_batches(data, None, CPU))
        for batch in {"nothing": [], "held": held, "fitted": fitted}[changed]:
            some = slice(batch.start, batch.start + batch.samples)
            data[batch.number][some] = 2 * smooth(99, batch.samples) - 1
        study = study_of(Net().eval(), data, effort="fast")
        found.append(factors_of(study.fit(forms)))
    assert all(map(torch.equal, found[0], found[1]))
    assert not any(map(torch.allclose, found[0], found[2]))


def test_the_report_says_which_layers_had_few_pixels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU()).eval()
    x = torch.randn(10, 3, 6, 6)
    small = sepconv.convert(net, x[:1], rank=2, calibration=[x], effort="fast")
    _, second = sepconv.report(small).layers
    assert second.status == "converted"
    assert second.reason == "few pixels"
    assert "few pixels" in str(rendered(sepconv.report(small)))
    many = torch.randn(400, 3, 10, 10)
    report = sepconv.report(sepconv.convert(net, x[:1], rank=2, calibration=[many], effort="fast"))
    assert [layer.reason for layer in report.converted] == [""]


def rendered(report: sepconv.Report) -> str:
    console = Console(width=100, record=True, file=StringIO())
    console.print(report)
    return console.export_text()
