import pytest
from conversion.exactness import BOUNDS, RESOLUTIONS, measure

pytest.importorskip("torchvision", reason="needs torchvision's networks")


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_full_rank_conversion_computes_what_the_original_computes(name: str) -> None:
    for found in measure(name):
        assert found.converted > 0
        assert found.spread > 1e-2, "the outputs hardly depend on the image: nothing is compared"
        assert found.error <= BOUNDS[found.dtype], found
