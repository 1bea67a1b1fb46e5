"""The kernel of losses whose logits only the gradient needs: of each row its loss, and its gradient in the place of its logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops.cross_entropy import LossTerms
from colossal_kernels.builds import Build
from colossal_kernels.losses.formulas import LARGEST, gradient_of_block, grown, logarithm, loss_of_row

IN_PLACE_BLOCK, IN_PLACE_WARPS, IN_PLACE_STAGES = 8192, 16, 3
"""Both in one program, of which a multiprocessor holds one: 132 rows of 128256 words in bfloat16 are 34 MB, so that the second read may
come from the cache of 50 MB."""
WHOLE_BLOCK = 32768
"""The longest row that a program keeps in registers, and reads once."""


@triton.jit
def _in_place_kernel(
    logits, labels, losses, row_stride, num_columns, ignore_index, z_loss, smoothing,
    WHOLE: tl.constexpr, SUM: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The loss of each row, and its gradient over its logits. WHOLE: the row fits into a block and is read once."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    x = logits + row * row_stride
    columns = tl.arange(0, BLOCK)
    if label != ignore_index:
        is_word = (label >= 0) & (label < num_columns)
        chosen = tl.load(x + tl.where(is_word, label, 0)).to(tl.float32)
        chosen = tl.where(is_word, chosen, float("nan"))
        largest = tl.full((), -LARGEST, tl.float32)
        sums_B = tl.zeros((BLOCK,), tl.float32)
        total_B = tl.zeros((BLOCK,), tl.float32)
        if WHOLE:
            inside = columns < num_columns
            x_B = tl.load(x + columns, mask=inside, other=float("-inf")).to(tl.float32)
            largest, sums_B = grown(largest, sums_B, x_B)
            if SUM:
                total_B += tl.where(inside, x_B, 0.0)
        else:
            for column in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
                inside = column + columns < num_columns
                x_B = tl.load(x + column + columns, mask=inside, other=float("-inf")).to(tl.float32)
                largest, sums_B = grown(largest, sums_B, x_B)
                if SUM:
                    total_B += tl.where(inside, x_B, 0.0)
        lse = logarithm(tl.sum(sums_B, axis=0)) + largest
        tl.store(
            losses + row, loss_of_row(lse, chosen, tl.sum(total_B, axis=0), num_columns, z_loss, smoothing, SUM, Z)
        )
        # The label's logit has been read before any of the row is written over.
        tl.debug_barrier()
        if WHOLE:
            found_B = gradient_of_block(x_B, columns, lse, label, z_loss, smoothing, num_columns, Z)
            tl.store(x + columns, found_B.to(logits.dtype.element_ty), mask=inside)
        else:
            for column in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
                inside = column + columns < num_columns
                x_B = tl.load(x + column + columns, mask=inside, other=float("-inf")).to(tl.float32)
                found_B = gradient_of_block(x_B, column + columns, lse, label, z_loss, smoothing, num_columns, Z)
                tl.store(x + column + columns, found_B.to(logits.dtype.element_ty), mask=inside)
    else:
        tl.store(losses + row, 0.0)
        nothing_B = tl.zeros((BLOCK,), tl.float32).to(logits.dtype.element_ty)
        for column in range(0, num_columns, BLOCK):
            tl.store(x + column + columns, nothing_B, mask=column + columns < num_columns)


def write_losses_and_gradients(logits: Tensor, labels: Tensor, terms: LossTerms, found: Tensor) -> None:
    """Losses [N] into `found`, float32, and the gradient of their sum over the logits; at least one row."""
    num_rows, num_columns = logits.shape
    whole = num_columns <= WHOLE_BLOCK
    block = triton.next_power_of_2(num_columns) if whole else IN_PLACE_BLOCK
    _in_place_kernel[(num_rows,)](
        logits, labels, found, logits.stride(0), num_columns, terms.ignore_index, terms.z_loss, terms.smoothing,
        whole, terms.smoothing != 0.0, terms.z_loss != 0.0, block, IN_PLACE_STAGES, num_warps=in_place_warps(block, whole=whole),
    )  # fmt: skip


def in_place_warps(block: int, *, whole: bool) -> int:
    return min(max(block // 1024, 1), 32) if whole else IN_PLACE_WARPS


def in_place_builds(dtype: str, block: int, *, whole: bool) -> tuple[Build, ...]:
    types = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32", "row_stride": "i32", "num_columns": "i32"}
    types |= {"ignore_index": "i32", "z_loss": "fp32", "smoothing": "fp32"}
    constants = {"WHOLE": whole, "SUM": True, "Z": True, "BLOCK": block, "STAGES": IN_PLACE_STAGES}
    name = f"loss in place {dtype} {block}" + (" whole" if whole else "")
    aligned = ("row_stride", "num_columns")
    return (
        Build(name, _in_place_kernel, types, constants, in_place_warps(block, whole=whole), IN_PLACE_STAGES, aligned),
    )
