"""Cases that once failed; every run of the fuzz begins with them."""

import math

from fuzz.case import Case, Plant, Tiles
from oracle import Layout

# So far only the oracle was wrong: none of these is a kernel's fault.
FOUND = [
    # The slopes of hardswish and relu6 at NaN differ between the framework's own loops.
    Case(
        "depthwise",
        "backward",
        "float64",
        N=3,
        C=2,
        W=7,
        R=2,
        S=5,
        stride=(3, 5),
        padding=(1, 1, 1, 0),
        activation="hardswish",
        values="normal",
        plant=Plant("weight_dw", 1, -math.inf),
        layout_dy=Layout(expanded=(2, 3)),
    ),
    Case(
        "pointwise",
        "backward",
        W=2,
        K=4,
        bias_pw=True,
        residual=True,
        activation="relu6",
        plant=Plant("x", 0, math.nan),
    ),
    # A call that is to be differentiated stores what goes into its last activation.
    Case(
        "separable",
        "backward",
        "float16",
        N=3,
        W=4,
        K=5,
        S=2,
        bias_pw=True,
        activation="gelu",
        values="normal",
        tiles=Tiles(4, 4, 4, 1, 1, packed=True),
    ),
    # The bound itself overflowed.
    Case(
        "separable",
        "backward",
        "float64",
        C=3,
        W=6,
        K=3,
        R=2,
        padding=(3, 3, 0, 1),
        activation_mid="gelu",
        activation="gelu",
        values="huge",
    ),
    # The backward pass makes the depthwise half again from its stored values.
    Case(
        "separable",
        "backward",
        "float16",
        C=5,
        H=2,
        W=7,
        M=3,
        K=2,
        R=3,
        padding=(0, 1, 0, 0),
        residual=True,
        activation_mid="silu",
        activation="relu",
        values="mixed",
        seed=22,
        layout_dw=Layout(expanded=(2, 3)),
    ),
    # An infinite weight times a gradient that may be zero: any answer is right, stored or not.
    Case(
        "pointwise",
        "backward",
        "bfloat16",
        H=2,
        W=9,
        K=2,
        residual=True,
        activation="relu6",
        seed=42,
        plant=Plant("weight_pw", 1, float("inf")),
        layout_x=Layout(order=(0, 2, 3, 1), margin=2, offset=10),
        layout_pw=Layout(order=(2, 3, 0, 1), margin=1, offset=4),
        layout_residual=Layout(step=2, offset=15),
        layout_dy=Layout(order=(1, 2, 0, 3)),
        tiles=Tiles(4, 4, 2, 0, 2, True),
    ),
]
