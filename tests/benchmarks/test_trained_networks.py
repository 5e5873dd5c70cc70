"""The trained networks of the studies and their scores, on few inputs."""

import math
from pathlib import Path

import pytest
import torch

from examples.studies.networks import NETWORKS, Network, samples

# Of the original, on eight inputs.
LEAST = {"accuracy": 70, "top1": 30, "f1": 90, "within": 90}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
def test_a_trained_network_does_its_task(
    network: Network, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SEPCONV_DATA", str(data_dir))
    count = 2 if network.relative else 8
    model, inputs = network.load(), network.inputs(count)
    assert samples(inputs) == count
    with torch.no_grad():
        assert model(inputs[0][:1]).isfinite().all()
    figure = network.score(model, count)[network.figure]
    if network.relative:
        assert figure == {"error": 0, "psnr": math.inf}[network.figure]
    else:
        assert figure >= LEAST[network.figure]


def test_missing_networks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEPCONV_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="SEPCONV_DATA lacks the trained networks"):
        NETWORKS["realesr"].load()
