"""Bugs to plant in the kernels: each a small edit of their source, of a kind that has happened."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        name: Of the bug.
        file: In ``kernels/``.
        old: Source text to replace, which must occur exactly once.
        new: What replaces it.
        ops: Which fuzz must notice, as (op, direction); or ("lint", launcher), where nothing short
            of the compiled kernel shows it; or ("tests", file), where the fuzz has no such op.
    """

    name: str
    file: str
    old: str
    new: str
    ops: tuple[tuple[str, str], ...]

    def plant(self, kernels: Path) -> None:
        """Edit a copy of the kernels.

        Raises:
            ValueError: The text is not there, or more than once: the mutant has to be rewritten.
        """
        path = kernels / self.file
        source = path.read_text()
        found = source.count(self.old)
        if found != 1:
            raise ValueError(
                f"mutant {self.name}: expected its text once in {self.file}, found it {found} "
                f"times: {self.old!r}"
            )
        path.write_text(source.replace(self.old, self.new))


DEPTHWISE = (("depthwise", "forward"),)
DEPTHWISE_BACKWARD = (("depthwise", "backward"),)
POINTWISE = (("pointwise", "forward"),)
SEPARABLE = (("separable", "forward"),)
STATISTICS = (("tests", "kernels/test_interpret_statistics.py"),)
LINT = (("lint", "depthwise_fwd"),)

MUTANTS = [
    Mutant("halo_off_by_one", "depthwise.py", "(w < W))[:, None]", "(w <= W))[:, None]", DEPTHWISE),
    Mutant(
        "left_halo_off_by_one",
        "depthwise_rolling.py",
        "(column >= 0)",
        "(column >= -1)",
        DEPTHWISE,
    ),
    Mutant(
        "column_beyond_the_last",
        "depthwise_rolling.py",
        "mask_q &= q + c < Q",
        "mask_q &= q < Q",
        DEPTHWISE,
    ),
    Mutant(
        "lost_input_row",
        "depthwise_rolling.py",
        "(h >= 0) & (h < H)",
        "(h >= 0) & (h < H - 1)",
        DEPTHWISE,
    ),
    Mutant(
        "swapped_stride",
        "depthwise_bwd_weight.py",
        "w = q * CONV.STRIDE_W - CONV.PAD_LEFT",
        "w = q * CONV.STRIDE_H - CONV.PAD_LEFT",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "missing_channel_mask",
        "depthwise_rolling.py",
        "mask_g = offs_g < G",
        "mask_g = offs_g < num_g * BLOCK_C",
        DEPTHWISE,
    ),
    Mutant(
        "missing_pixel_mask",
        "pointwise.py",
        "mask_nq = offs_nq < INNER",
        "mask_nq = offs_nq < num_tiles * BLOCK_NQ",
        POINTWISE,
    ),
    Mutant(
        "wrong_dilation",
        "separable.py",
        "row = r * CONV.DILATION_H",
        "row = r * CONV.DILATION_W",
        SEPARABLE,
    ),
    Mutant("dropped_bias", "pointwise.py", "acc += shift[None, :]", "acc += 0.0", POINTWISE),
    Mutant(
        "bias_of_another_channel",
        "separable.py",
        "(offs_c * CONV.M + m) * bias_dw.stride[0]",
        "(offs_c + m) * bias_dw.stride[0]",
        SEPARABLE,
    ),
    Mutant(
        "stale_accumulator",
        "depthwise_rolling.py",
        "accs = (tl.zeros([BLOCK_NQ, BLOCK_C], ACC),) * COLS + accs[: (R - 1) * COLS]",
        "accs = accs[(R - 1) * COLS :] + accs[: (R - 1) * COLS]",
        DEPTHWISE,
    ),
    Mutant(
        "residual_dropped",
        "separable.py",
        "acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)",
        "acc += 0.0",
        SEPARABLE,
    ),
    Mutant(
        "residual_strides_of_y",
        "pointwise.py",
        "residual_pixels + (offs_nq * stride_r2)[:, None]",
        "residual_pixels + (offs_nq * stride_y2)[:, None]",
        POINTWISE,
    ),
    Mutant(
        "dgrad_without_rotation",
        "depthwise_rolling.py",
        "source = R * S - 1 - tap if INPUT_GRADIENT else tap",
        "source = tap",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "dgrad_parity_ignored",
        "depthwise_bwd_input.py",
        "mask_nq & met & (r < CONV.R)",
        "mask_nq & (r < CONV.R)",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "dgrad_assumes_dense_dy",
        "depthwise_bwd_input.py",
        "(view(dy), taps, view(dx))",
        "(view(dy)._replace(stride=(C * M * P * Q, P * Q, Q, 1)), taps, view(dx))",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "dgrad_of_one_filter_per_channel",
        "depthwise_bwd_input.py",
        "for k in tl.range(CONV.M):",
        "for k in tl.range(1):",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "dw_missing_an_image",
        "depthwise_bwd_weight.py",
        "mask_nq = (n < N) & (tile < num_tiles)",
        "mask_nq = (n < tl.maximum(N - 1, 1)) & (tile < num_tiles)",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "dw_missing_a_split",
        "depthwise_bwd_weight.py",
        "partial.sum(0)",
        "partial[:-1].sum(0)",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "unwritten_tail",
        "depthwise.py",
        "mask_g = offs_g < G",
        "mask_g = offs_g < G // BLOCK_C * BLOCK_C",
        DEPTHWISE,
    ),
    Mutant(
        "lost_channel_tail",
        "pointwise.py",
        "mask_c = first_c + offs_c < C",
        "mask_c = first_c + offs_c < C // BLOCK_C * BLOCK_C",
        POINTWISE,
    ),
    Mutant(
        "padding_bottom_for_top",
        "separable.py",
        '"CONV": conv_constants(M, (R, S), geometry),',
        '"CONV": conv_constants(M, (R, S), geometry)._replace(PAD_TOP=geometry.padding[1]),',
        SEPARABLE,
    ),
    Mutant(
        "channel_multiplier_ignored",
        "depthwise.py",
        "(offs_g // CONV.M * stride_xc)",
        "(offs_g * stride_xc)",
        DEPTHWISE,
    ),
    Mutant(
        "weight_strides_ignored",
        "pointwise.py",
        "View(weight_pw, weight_pw.stride()[:2])",
        "View(weight_pw, (C, 1))",
        POINTWISE,
    ),
    Mutant(
        "nan_swallowed_by_relu",
        "activations.py",
        "y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "y = tl.where(z > 0.0, z, 0.0)",
        DEPTHWISE,
    ),
    Mutant(
        "relu6_without_its_six",
        "activations.py",
        "return tl.minimum(positive, 6.0, propagate_nan=tl.PropagateNan.ALL)",
        "return positive",
        SEPARABLE,
    ),
    Mutant(
        "half_precision_sums",
        "separable.py",
        "            accs = accs[:t] + (acc,) + accs[t + 1 :]  # noqa: RUF005",
        "            acc = acc.to(x.ptr.dtype.element_ty).to(ACC)\n"
        "            accs = accs[:t] + (acc,) + accs[t + 1 :]",
        SEPARABLE,
    ),
    Mutant(
        "bias_gradient_missing_a_split",
        "activation_bwd.py",
        "partial.sum(0)",
        "partial[:1].sum(0)",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "gradient_passes_relu6",
        "activations.py",
        "dz = tl.where((z <= 0.0) | (z >= 6.0), 0.0, dy)",
        "dz = tl.where(z <= 0.0, 0.0, dy)",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "activation_gradient_assumes_strides_of_dy",
        "activation_bwd.py",
        "(view_dy, view_z, view_dz, partial, norm)",
        "(view_dy, view_z and view_z._replace(stride=view_dy.stride), view_dz, partial, norm)",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "activation_gradient_missing_a_tile",
        "activation_bwd.py",
        "mask = (mask_nq & (tile < all_tiles))[:, None] & mask_c[None, :]",
        "mask = (mask_nq & (tile < tl.maximum(all_tiles - 1, 1)))[:, None] & mask_c[None, :]",
        DEPTHWISE_BACKWARD,
    ),
    Mutant(
        "statistics_of_masked_pixels",
        "statistics.py",
        "mean = tl.sum(tl.where(inside, means, 0.0), axis=0)",
        "mean = tl.sum(means, axis=0)",
        STATISTICS,
    ),
    Mutant(
        "statistics_of_a_row_too_many",
        "depthwise_rolling.py",
        "height = tl.minimum(rows, P - first_p)",
        "height = rows",
        STATISTICS,
    ),
    Mutant(
        "variance_without_the_means_distance",
        "statistics.py",
        "squares += m2 + delta * delta * counts[:, None] * share",
        "squares += m2",
        STATISTICS,
    ),
    Mutant(
        "normalised_without_the_weight",
        "normalise.py",
        "    scale = 1.0 / tl.sqrt(variance)\n"
        "    scale *= channel_values(norm.weight, offs_c, mask_c, 1.0, ACC)",
        "    scale = 1.0 / tl.sqrt(variance)",
        STATISTICS,
    ),
    Mutant(
        "int32_offset",
        "depthwise.py",
        "pid = tl.program_id(0).to(tl.int64)",
        "pid = tl.program_id(0)",
        LINT,
    ),
    Mutant(
        "load_without_other",
        "depthwise.py",
        "tl.load(bias.ptr + offs_g * bias.stride[0], mask=mask_g, other=0.0)",
        "tl.load(bias.ptr + offs_g * bias.stride[0], mask=mask_g)",
        LINT,
    ),
]
