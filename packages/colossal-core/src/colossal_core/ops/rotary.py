"""Reference rotary position embedding."""

from __future__ import annotations

from typing import Literal

import torch

Angles = Literal["halves", "neighbours", "once"]
"""Where cos and sin hold the angle of pair i: `halves`: [..., R] at i and again at i + R/2 (Llama); `neighbours`: [..., R] at 2i and
2i + 1 (Cohere); `once`: [..., R/2] at i (gpt-oss)."""


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    angles: Angles = "halves",
    to_halves: bool = False,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys by their positions (Su et al. 2021, equation 34). Per pair: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    q: [B, H, L, D]; k: [B, K, L, D], both in any layout (models pass transposed views of [B, L, H, D]). cos, sin: [B or 1, L, R or R/2]
    with R <= D, see `angles`; only the first R features turn, the others pass. Returns both in their own shape and dtype.

    interleaved: feature 2i is paired with 2i + 1 (Cohere, GLM, GPT-J), else feature i with i + R/2 (Llama). to_halves: interleaved pairs of
    q and k stand as halves in the results (DeepSeek). overwrite: an implementation may put the results where q and k are, and their
    gradients where those of the results are: for a caller who knows that nobody else reads q and k and that each result is read by one
    operation (attention), which makes its gradient anew. Who saved q or k for a backward pass gets torch's error about a changed tensor.
    """
    del overwrite
    turning = cos.shape[-1] * (2 if angles == "once" else 1)
    assert interleaved or not to_halves, "halves they are already"
    assert cos.shape == sin.shape, (cos.shape, sin.shape)
    assert turning % 2 == 0 and turning <= q.shape[-1], (cos.shape, q.shape)
    step, pairs = (2 if angles == "neighbours" else 1), turning // 2
    cos_B1LP, sin_B1LP = (angle[..., ::step][..., :pairs].unsqueeze(1) for angle in (cos, sin))
    layout = (interleaved, interleaved and not to_halves)
    return _turn(q, cos_B1LP, sin_B1LP, layout), _turn(k, cos_B1LP, sin_B1LP, layout)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: tuple[bool, bool]) -> torch.Tensor:
    """interleaved: whether pairs are neighbours in x, and in the result."""
    pairs = cos.shape[-1]
    turning, passing = x[..., : 2 * pairs], x[..., 2 * pairs :]
    first, second = (
        turning.reshape(*turning.shape[:-1], pairs, 2).unbind(-1) if interleaved[0] else turning.chunk(2, dim=-1)
    )
    both = (first * cos - second * sin, second * cos + first * sin)
    turned = (torch.stack(both, dim=-1).flatten(-2) if interleaved[1] else torch.cat(both, dim=-1)).to(x.dtype)
    return torch.cat((turned, passing), dim=-1) if passing.shape[-1] else turned
