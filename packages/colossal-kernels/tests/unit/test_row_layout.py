"""Rows of any leading dimensions by three strides, and addresses beyond 2^31."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from colossal_kernels.row_layout import RowLayout, row_layout, row_starts, with_rows

BASE = torch.arange(720.0).view(2, 3, 4, 5, 6)
VIEWS = {
    "contiguous": BASE,
    "one row": BASE[0, 0, 0, 0],
    "heads before tokens": BASE[0].transpose(0, 1),
    "a slice of features": BASE[..., 1:3],
    "transposed with a slice": BASE[:, 0].transpose(1, 2)[..., :2],
    "three strides": BASE[:, :, ::2, ::2],
    "expanded": torch.arange(6.0).expand(3, 4, 6),
}


@triton.jit  # type: ignore[untyped-decorator]
def _starts(  # type: ignore[no-untyped-def]
    out, count, middle, inner, outer_stride, middle_stride, inner_stride, BLOCK: tl.constexpr
):
    rows = tl.arange(0, BLOCK)
    starts = row_starts(rows, middle, inner, outer_stride, middle_stride, inner_stride)
    tl.store(out + rows, starts, mask=rows < count)


def starts_of(layout: RowLayout, count: int) -> torch.Tensor:
    out = torch.empty(count, dtype=torch.int64)
    _starts[(1,)](out, count, *layout, BLOCK=triton.next_power_of_2(count))
    return out


@pytest.mark.parametrize("name", VIEWS)
def test_rows_are_found_where_they_are(name: str) -> None:
    view = VIEWS[name]
    layout = row_layout(view)
    assert layout is not None
    starts = starts_of(layout, view[..., 0].numel()) + view.storage_offset()
    flat = torch.as_strided(view, (view.untyped_storage().nbytes() // 4,), (1,), 0)
    assert torch.equal(flat[starts], view[..., 0].reshape(-1))


def test_what_three_strides_cannot_say_is_copied() -> None:
    for view in (BASE.permute(3, 2, 1, 0, 4), BASE.transpose(-1, -2)):
        assert row_layout(view) is None
        copy, layout = with_rows(view)
        assert copy.is_contiguous() and torch.equal(copy, view) and layout == (1, 1, view.shape[-1], 0, 0)


def test_addresses_pass_two_to_the_thirty_first() -> None:
    layout = RowLayout(middle=1, inner=1, outer_stride=(1 << 31) - 16, middle_stride=0, inner_stride=0)
    assert starts_of(layout, 3).tolist() == [0, (1 << 31) - 16, (1 << 32) - 32]
    layout = RowLayout(middle=1, inner=2, outer_stride=1 << 33, middle_stride=0, inner_stride=1 << 30)
    assert starts_of(layout, 4).tolist() == [0, 1 << 30, 1 << 33, (1 << 33) + (1 << 30)]
