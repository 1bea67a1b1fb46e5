"""Reference normalisations. Legend: `...` any leading dimensions, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LARGEST_E4M3 = 448.0
"""The largest number of `torch.float8_e4m3fn`."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over features, keys or the vocabulary are taken: float64 stays, everything else is
    float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, offset: float = 0.0) -> torch.Tensor:
    """`y = (offset + weight) * x / sqrt(mean(x^2) + eps)`, the mean over the last dimension (Zhang and Sennrich 2019, equation 4).

    x: [..., D]; weight: [D] or None (the factor is 1); offset: 1 where the weight is kept as its distance from 1, as Gemma does. Returns
    [..., D] in x's dtype: the statistic is taken in float32 (float64 for float64). Without an offset the quotient is rounded to x's dtype
    before it meets the weight, as Llama does; with one the product is taken before the only rounding, as Gemma does.
    """
    normal = _normal(x, eps)
    if weight is None:
        return normal.to(x.dtype)
    if offset:
        return (normal * (offset + weight.to(normal.dtype))).to(x.dtype)
    return (weight * normal.to(x.dtype)).to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *, offset: float = 0.0
) -> torch.Tensor:
    """`y = (offset + weight) * (x - mean(x)) / sqrt(var(x) + eps) + bias` over the last dimension (Ba, Kiros and Hinton 2016,
    equation 4).

    x: [..., D]; weight, bias: [D] or None; offset: 1 where the weight is kept as its distance from 1, as Nemotron does; it does nothing
    without a weight. The variance is the biased one. Returns [..., D] in x's dtype.
    """
    factor = offset + weight if offset and weight is not None else weight
    return F.layer_norm(x, (x.shape[-1],), factor, bias, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, *, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual addition and the norm after it: `sum = x + residual`, `y = rms_norm(sum)`.

    x, residual: [..., D] alike. Returns y and the sum, both [..., D]; the norm is that of the rounded sum. Gradients may arrive at both.
    """
    total = x + residual
    return rms_norm(total, weight, eps, offset=offset), total


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual addition and the norm after it: `sum = x + residual`, `y = layer_norm(sum)`.

    x, residual: [..., D] alike. Returns y and the sum, both [..., D]; the norm is that of the rounded sum. Gradients may arrive at both.
    """
    total = x + residual
    return layer_norm(total, weight, bias, eps, offset=offset), total


@torch.no_grad()
def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` quantised row by row: `y = round(norm / scale)` with `scale = max|norm| / 448`, 1 for a row of zeros.

    x: [..., D]. Returns y: [..., D] in `float8_e4m3fn`, and scale: [..., 1] float32, which `torch._scaled_mm` takes as scales of rows;
    `y * scale` is the norm. The norm is rounded once, to 8 bits. Forward only: torch would round a gradient that arrives at an 8-bit tensor
    to 8 bits as well, so none passes. Who needs one takes the quantisation for the identity (straight-through): the gradient at `y * scale`
    goes through `rms_norm` of the same arguments.
    """
    normal = _normal(x, eps)
    if weight is not None:
        normal = normal * (offset + weight.to(normal.dtype))
    scale = normal.abs().amax(-1, keepdim=True) / LARGEST_E4M3
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (normal / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scale.float()


def _normal(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps)` in the dtype of statistics."""
    wide = x.to(statistics_dtype(x.dtype))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
