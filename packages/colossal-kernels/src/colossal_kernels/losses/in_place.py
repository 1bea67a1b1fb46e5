"""The kernel of losses whose logits only the gradient needs: of each row its loss, and its gradient in the place of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops.cross_entropy import LossTerms
from colossal_kernels.builds import Build
from colossal_kernels.losses.formulas import behind, gradient_of_block, head_of, logarithm, loss_of_row, sums_of_row
from colossal_kernels.losses.rows import has_heads

LONG_ROW_BYTES = 128 * 1024


@dataclass(frozen=True)
class InPlaceConfig:
    """block: columns at a time. stages: loads in flight, and one."""

    block: int
    warps: int
    stages: int


def in_place_config(row_bytes: int) -> InPlaceConfig:
    """A multiprocessor shall hold one program of a long row, and few of others, so that the second read may come from the cache of 50 MB:
    132 rows of 128256 words in bfloat16 are 34 MB.
    """
    return InPlaceConfig(16384, 32, 3) if row_bytes > LONG_ROW_BYTES else InPlaceConfig(4096, 16, 4)


@triton.jit
def _in_place_kernel(
    logits, labels, losses, row_stride, num_columns, ignore_index, z_loss, smoothing,
    SUM: tl.constexpr, Z: tl.constexpr, HEADED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The loss of each row, and its gradient over its logits."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    x = logits + row * row_stride
    head = head_of(x, HEADED)
    x = behind(x, head, HEADED)
    stop = num_columns - head
    columns = tl.arange(0, BLOCK)
    before = tl.arange(0, 8) - 8
    if label != ignore_index:
        is_word = (label >= 0) & (label < num_columns)
        place = label - head
        chosen = tl.load(x + tl.where(is_word, place, -head)).to(tl.float32)
        chosen = tl.where(is_word, chosen, float("nan"))
        largest, found, total = sums_of_row(x, head, 0, stop, SUM, HEADED, BLOCK, STAGES)
        lse = logarithm(found) + largest
        tl.store(losses + row, loss_of_row(lse, chosen, total, num_columns, z_loss, smoothing, SUM, Z))
        # The label's logit has been read before any of the row is written over.
        tl.debug_barrier()
        # What was read last comes first: it is the likeliest to be in the cache still.
        last = stop // BLOCK * BLOCK
        if last < stop:
            _replace(x, last + columns, last + columns < stop, lse, place, z_loss, smoothing, num_columns, Z)
        for back in tl.range(0, last, BLOCK, num_stages=STAGES):
            column = last - BLOCK - back + columns
            x_B = tl.load(x + column).to(tl.float32)
            found_B = gradient_of_block(x_B, column, lse, place, z_loss, smoothing, num_columns, 1.0, Z)
            tl.store(x + column, found_B.to(logits.dtype.element_ty))
        if HEADED:
            inside = (before >= -head) & (before < stop)
            _replace(x, before, inside, lse, place, z_loss, smoothing, num_columns, Z)
    else:
        tl.store(losses + row, 0.0)
        nothing_B = tl.zeros((BLOCK,), tl.float32).to(logits.dtype.element_ty)
        for column in range(0, stop, BLOCK):
            tl.store(x + column + columns, nothing_B, mask=column + columns < stop)
        if HEADED:
            nothing_W = tl.zeros((8,), tl.float32).to(logits.dtype.element_ty)
            tl.store(x + before, nothing_W, mask=(before >= -head) & (before < stop))


@triton.jit
def _replace(x, column, inside, lse, place, z_loss, smoothing, num_columns, Z: tl.constexpr):
    x_B = tl.load(x + column, mask=inside, other=float("-inf")).to(tl.float32)
    found_B = gradient_of_block(x_B, column, lse, place, z_loss, smoothing, num_columns, 1.0, Z)
    tl.store(x + column, found_B.to(x.dtype.element_ty), mask=inside)


def write_losses_and_gradients(logits: Tensor, labels: Tensor, terms: LossTerms, found: Tensor) -> None:
    """Losses [N] into `found`, float32, and the gradient of their sum over the logits; at least one row."""
    num_rows, num_columns = logits.shape
    config = in_place_config(num_columns * logits.element_size())
    _in_place_kernel[(num_rows,)](
        logits, labels, found, logits.stride(0), num_columns, terms.ignore_index, terms.z_loss, terms.smoothing,
        terms.smoothing != 0.0, terms.z_loss != 0.0, has_heads(num_columns, logits),
        config.block, config.stages, num_warps=config.warps,
    )  # fmt: skip


def in_place_builds() -> tuple[Build, ...]:
    """A Llama's vocabulary, with every term and without, a short one, and GPT-2's, which is of any length."""

    def build(name: str, dtype: str, vocabulary: int, *, terms: bool) -> Build:
        types = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32", "row_stride": "i32", "num_columns": "i32"}
        types |= {"ignore_index": "i32", "z_loss": "fp32", "smoothing": "fp32"}
        config = in_place_config(vocabulary * (2 if dtype == "bf16" else 4))
        constants = {
            "SUM": terms,
            "Z": terms,
            "HEADED": vocabulary % 16 != 0,
            "BLOCK": config.block,
            "STAGES": config.stages,
        }
        aligned = () if vocabulary % 16 else ("row_stride", "num_columns")
        return Build(
            f"loss in place{name} {dtype}", _in_place_kernel, types, constants, config.warps, config.stages, aligned
        )

    return (
        build("", "bf16", 128256, terms=False),
        build(", all terms", "bf16", 128256, terms=True),
        build(", all terms", "fp32", 128256, terms=True),
        build(", short", "bf16", 32768, terms=True),
        build(", any length", "bf16", 50257, terms=True),
    )
