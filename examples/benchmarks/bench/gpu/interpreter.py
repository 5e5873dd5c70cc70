"""Whether Triton's interpreter runs with the numpy that is installed: one small kernel tells.

For a process with TRITON_INTERPRET=1.
"""

from typing import Any

import numpy
import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _count_kernel(y_ptr: Any, n: Any) -> None:
    # A loop whose end is an argument: Triton 3.6 makes a Python number of it in a way that numpy
    # 2.4 and later refuse.
    for i in range(n):
        tl.store(y_ptr + i, 1.0)


def obstacle() -> str | None:
    """Why no kernel can be interpreted, in a sentence; None where they can."""
    try:
        _count_kernel[(1,)](torch.zeros(2), 2)
    except Exception as error:
        return (
            f"Triton {triton.__version__}'s interpreter does not run with numpy "
            f"{numpy.__version__} ({error}): install numpy below 2.4, or Triton 3.7 or later"
        )
    return None
