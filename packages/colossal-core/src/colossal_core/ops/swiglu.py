"""Reference gated activations: `act(gate) * up`, from two tensors or from one that holds both.

Legend: `...` any leading dimensions, F features. `weights`: a factor for each row, [...] in any floating dtype (experts' probabilities).
`overwrite`: an implementation may put the gradients of the arguments where the arguments are, when the backward pass has read them: for a
caller who knows that nobody else reads them. A second backward pass is then torch's error about a changed tensor.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Approximation = Literal["none", "tanh"]
"""Of the Gaussian's distribution function in `gelu`, as torch names it."""


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, *, weights: torch.Tensor | None = None, overwrite: bool = False
) -> torch.Tensor:
    """`silu(gate) * up` with `silu(z) = z * sigmoid(z)` (Shazeer 2020, equation 6, without its matrix products).

    gate, up: the same shape [..., F], any layout; returns that shape.
    """
    del overwrite
    return _weighted(F.silu(gate) * up, weights)


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    approximate: Approximation = "none",
    weights: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """`gelu(gate) * up` (Shazeer 2020, equation 6): with the error function, or Gemma's `tanh` form of it (Hendrycks and Gimpel 2016).

    gate, up: the same shape [..., F], any layout; returns that shape.
    """
    del overwrite
    return _weighted(F.gelu(gate, approximate=approximate) * up, weights)


def packed_swiglu(
    gate_up: torch.Tensor,
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    shift: float = 0.0,
    weights: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """`gate * sigmoid(alpha * gate) * (up + shift)` of the two halves of the last dimension.

    gate_up: [..., 2F]: gate in the first half, up in the second (Phi-3, GLM, transformers' experts), or in turn where `interleaved`
    (gpt-oss). limit: the gate is at most this, and up between its negative and it (gpt-oss: alpha 1.702, limit 7, shift 1). Returns
    [..., F].
    """
    del overwrite
    gate, up = unpacked(gate_up, interleaved=interleaved)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    silu = F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(alpha * gate)
    return _weighted(silu * (up + shift if shift else up), weights)


def packed_geglu(
    gate_up: torch.Tensor,
    *,
    interleaved: bool = False,
    approximate: Approximation = "none",
    weights: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """`geglu` of the two halves of the last dimension. gate_up: [..., 2F], see `packed_swiglu`; returns [..., F]."""
    gate, up = unpacked(gate_up, interleaved=interleaved)
    return geglu(gate, up, approximate=approximate, weights=weights, overwrite=overwrite)


def unpacked(gate_up: torch.Tensor, *, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up, [..., F] each: views."""
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def _weighted(y: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return y if weights is None else (y * weights.unsqueeze(-1)).to(y.dtype)
