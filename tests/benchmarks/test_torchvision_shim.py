import pytest
import torch

from examples.benchmarks.bench.torchvision_shim import nms

torchvision = pytest.importorskip("torchvision")


def test_nms_keeps_the_best_of_overlapping_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 5]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.8])
    # box 0 overlaps box 1 by 81/119; box 3 overlaps box 1 by 36/114 and stays
    assert nms(boxes, scores, 0.5).tolist() == [1, 3, 2]
    assert nms(boxes, scores, 0.3).tolist() == [1, 2]
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []


def test_torchvision_calls_reach_an_implementation():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.1, 0.2]), 0.5)
    assert kept.tolist() == [1]


@pytest.mark.parametrize("name", ["fcn_resnet50", "ssdlite320_mobilenet_v3_large"])
def test_segmentation_and_detection_models_run(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    with torch.no_grad():
        out = model(torch.rand(1, 3, 96, 96))
    if name == "fcn_resnet50":
        assert out["out"].shape == (1, 21, 96, 96)
    else:
        assert set(out[0]) == {"boxes", "scores", "labels"}
        assert len(out[0]["boxes"]) == len(out[0]["scores"]) > 0
