"""Reference normalisations. Legend: `...` any leading dimensions, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over features, keys or the vocabulary are taken: float64 stays, everything else is
    float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`y = weight * x / sqrt(mean(x^2) + eps)`, the mean over the last dimension (Zhang and Sennrich 2019, equation 4).

    x: [..., D]; weight: [D] or None (ones). Returns [..., D] in x's dtype: the statistic is taken in float32 (float64
    for float64), and the quotient is rounded to x's dtype before it meets the weight, as Llama does.
    """
    wide = x.to(statistics_dtype(x.dtype))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else (weight * y).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias` over the last dimension (Ba, Kiros and Hinton 2016,
    equation 4).

    x: [..., D]; weight, bias: [D] or None. The variance is the biased one. Returns [..., D] in x's dtype.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
