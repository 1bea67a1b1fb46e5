"""A batch of matrix products that are known to be symmetric."""

from __future__ import annotations

import torch


def symmetric_product(
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    """alpha a b + beta c, [B, M, M], which is symmetric but for rounding; b defaults to a^T.

    a: [B, M, K]. b: [B, K, M]. c: [B, M, M], symmetric. The caller promises the symmetry: of a a^T it is certain, and the product of two
    symmetric matrices that commute, as polynomials of one matrix do, has it too. An implementation may compute one half and mirror it: M (M
    + 1) K / 2 multiply-adds in place of M^2 K.
    """
    other = a.mT if b is None else b
    if c is None:
        product = a @ other
        return product if alpha == 1.0 else product * alpha
    return torch.baddbmm(c, a, other, beta=beta, alpha=alpha)
