"""Reference attention. Legend: B sequences, H query heads, K key-value heads, L queries, S keys, D features a head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`softmax(scaling * q k^T + mask) v` (Vaswani et al. 2017, equation 1), grouped queries as Ainslie et al. 2023.

    q: [B, H, L, D]; k: [B, K, S, D]; v: [B, K, S, E] with H a multiple of K (query head h reads key-value head h * K
    // H). mask: broadcastable to [B, H, L, S], bool (True: may be seen) or added to the scores. causal: the queries
    are the last L of the S positions, and none sees a later one; together with a mask both hold. scaling: 1/sqrt(D)
    where None. dropout: probability at which weights are dropped, drawn from torch's own generator. A query that sees
    nothing gives zeros. Returns [B, H, L, E].

    float64 takes the formula as written, without a fused kernel; every other dtype goes to torch's
    `scaled_dot_product_attention`.
    """
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads over {k.shape[1]} key-value heads"
    scale = 1.0 / math.sqrt(q.shape[-1]) if scaling is None else scaling
    if q.dtype == torch.float64:
        return _exact(q, k, v, _joined_mask(q, k, mask, causal), scale, dropout)
    grouped = q.shape[1] != k.shape[1]
    plain_causal = causal and mask is None and q.shape[2] == k.shape[2]
    joined = None if plain_causal else _joined_mask(q, k, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, joined, dropout, plain_causal, scale=scale, enable_gqa=grouped)


def _joined_mask(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor | None:
    if not causal:
        return mask
    num_queries, num_keys = q.shape[2], k.shape[2]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def _exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, dropout: float
) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1]
    k_BHSD, v_BHSE = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = scale * (q @ k_BHSD.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return F.dropout(weights, dropout, training=dropout > 0.0) @ v_BHSE
