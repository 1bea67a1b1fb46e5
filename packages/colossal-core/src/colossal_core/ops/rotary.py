"""Reference rotary position embedding."""

from __future__ import annotations

import torch


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys by their positions (Su et al. 2021, equation 34), feature i paired with i + R/2, as
    Llama does.

    q: [B, H, L, D]; k: [B, K, L, D]; cos, sin: [B or 1, L, R] with R <= D and both halves of the last dimension alike;
    only the first R features turn, the others pass. Per pair: `(a, b) -> (a cos - b sin, b cos + a sin)`. Returns both
    in their own shape and dtype.
    """
    assert cos.shape == sin.shape, (cos.shape, sin.shape)
    assert cos.shape[-1] <= q.shape[-1], (cos.shape, q.shape)
    cos_B1LR, sin_B1LR = cos.unsqueeze(1), sin.unsqueeze(1)
    return _turn(q, cos_B1LR, sin_B1LR), _turn(k, cos_B1LR, sin_B1LR)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turning, passing = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return torch.cat((turned, passing), dim=-1) if passing.shape[-1] else turned
