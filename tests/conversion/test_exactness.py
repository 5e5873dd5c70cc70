import pytest

from examples.studies.exactness import BOUNDS, RESOLUTIONS, measure

pytest.importorskip("torchvision", reason="needs torchvision's networks")

# A plain chain, residual blocks, and depthwise ones with gates; the others take minutes.
QUICK = ("alexnet", "resnet18", "efficientnet_b0")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in RESOLUTIONS]
)
def test_full_rank_conversion_computes_what_the_original_computes(name: str) -> None:
    for found in measure(name):
        assert found.converted > 0
        assert found.spread > 1e-2, "the outputs hardly depend on the image: nothing is compared"
        assert found.error <= BOUNDS[found.dtype], found
