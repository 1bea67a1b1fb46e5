"""`rms_norm_fp8`: the norm and its quantisation by rows in one pass.

Bytes a number in bf16: 2 read, 1 written (norm and quantisation apart: 2 + 2 + 2 + 1, and an amax in between). The row is held in registers
from its statistic to its largest result; wider rows (`FORWARD_ROW_BYTES`) stay with the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import norms as reference
from colossal_kernels.builds import Build
from colossal_kernels.fitting import has_fp8, have_one_a_feature, kernels_take
from colossal_kernels.interpreting import interpreted
from colossal_kernels.library import define
from colossal_kernels.norms.config import FP8_PER_WARP, forward_config
from colossal_kernels.row_layout import num_rows, one_a_column, row_starts, with_rows


def rms_norm_fp8(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.rms_norm_fp8`: (y in e4m3, scale [..., 1] float32), no gradient."""
    if not (kernels_take(x, weight) and has_fp8(x) and have_one_a_feature(x, weight) and _held(x)):
        return reference.rms_norm_fp8(x, weight, eps, offset=offset)
    with torch.no_grad():
        y, scale = _RMS_NORM_FP8(x, weight, eps, offset)
    return y, scale


def _held(x: Tensor) -> bool:
    """Whether registers hold a row."""
    return forward_config(x.shape[-1], x.element_size(), FP8_PER_WARP).block >= x.shape[-1]


@triton.jit
def _rounded(x):
    """float32 rounded to what e4m3 can hold, ties to even, as the GPU's conversion does and the interpreter's does not."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = tl.maximum(power, 2.0**-6) * (2.0**-3 * 1.5 * 2.0**23)
    return (x + magic) - magic


@triton.jit
def _kernel(
    x, weight, y, scale, num_rows, num_columns, eps, offset,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    HAS_WEIGHT: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
    places = (rows.to(tl.int64) * num_columns)[:, None] + columns[None, :]
    x_RD = tl.load(x + starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    rstd_R = 1.0 / tl.sqrt(tl.sum(x_RD * x_RD, axis=1) / num_columns + eps)
    y_RD = x_RD * rstd_R[:, None]
    if HAS_WEIGHT:
        weight_1D = one_a_column(weight, columns, columns < num_columns, ROWS)
        y_RD = y_RD * (weight_1D.to(tl.float32) + offset)
    largest_R = tl.max(tl.abs(y_RD), axis=1)
    most_R = tl.full((ROWS,), 448.0, tl.float32)
    scale_R = tl.div_rn(largest_R, most_R)
    tl.store(scale + rows, tl.where(scale_R == 0.0, 1.0, scale_R), mask=rows < num_rows)
    # One division a row: each number's own took longer than memory. The lift keeps the factor finite.
    lift_R = tl.where(largest_R < 2.0**-64, 2.0**64, 1.0)
    factor_R = tl.div_rn(most_R, tl.maximum(largest_R * lift_R, 2.0**-100))
    quotient_RD = (y_RD * lift_R[:, None]) * factor_R[:, None]
    if INTERPRETED:
        quotient_RD = _rounded(quotient_RD)
    tl.store(y + places, quotient_RD.to(y.dtype.element_ty), mask=inside)


def _launch(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, scale = _fake(x, weight, eps, offset)
    rows, columns = num_rows(x), x.shape[-1]
    x, layout = with_rows(x)
    config = forward_config(columns, x.element_size(), FP8_PER_WARP)
    _kernel[(triton.cdiv(rows, config.rows),)](
        x, weight, y, scale, rows, columns, eps, offset, *layout, HAS_WEIGHT=weight is not None,
        INTERPRETED=interpreted(), ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    return y, scale


def _fake(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return y, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_RMS_NORM_FP8 = define(
    "rms_norm_fp8(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)", _launch, _fake
)


def builds() -> tuple[Build, ...]:
    """Of a Llama (4096 features, bf16), and the widest row."""
    types = {
        "x": "*bf16",
        "weight": "*bf16",
        "y": "*fp8e4nv",
        "scale": "*fp32",
        "num_rows": "i32",
        "num_columns": "i32",
    }
    types |= {"eps": "fp32", "offset": "fp32"} | {f"x_{part}_stride": "i32" for part in ("outer", "middle", "inner")}
    aligned = ("num_columns", "x_outer_stride", "x_middle_stride", "x_inner_stride")
    found = []
    for columns in (4096, 32768):
        config = forward_config(columns, 2, FP8_PER_WARP)
        constants = {
            "HAS_WEIGHT": True,
            "INTERPRETED": False,
            "ROWS": config.rows,
            "BLOCK": config.block,
            "x_middle": 1,
            "x_inner": 1,
        }
        found.append(Build(f"rms_norm_fp8 bf16 {columns}", _kernel, types, constants, config.warps, aligned=aligned))
    return tuple(found)
