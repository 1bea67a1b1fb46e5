"""Reference attention. Legend: B sequences, H query heads, K key-value heads, L queries, S keys, D features a head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from colossal_core.ops.norms import statistics_dtype


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


def merge_attention(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], *, overwrite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over parts of them (Liu et al. 2023, section 3; the merge is Milakov and
    Gimelshein 2018, section 3.1).

        lse = log(sum_i exp(lse_i));  out = sum_i exp(lse_i - lse) out_i

    outputs: at least one, each [B, H, L, D]; lses: as many, each [B, H, L], logsumexp of the scores of the part's keys,
    float32 (float64 for float64). Returns out in the first output's dtype and lse in the first's. A part that a query
    sees nothing of has lse -inf and adds nothing, whatever its output holds; a query that sees nothing at all gives
    zeros and -inf, with zero gradients. overwrite: the result takes the memory of the first output and lse, one step of
    a ring (the first output is best kept in float32 there); not differentiable.
    """
    assert len(outputs) == len(lses) > 0, f"{len(outputs)} outputs, {len(lses)} lses"
    if overwrite:
        with torch.no_grad():
            out, lse = merge_attention(outputs, lses)
            return outputs[0].detach().copy_(out), lses[0].detach().copy_(lse)
    wide = statistics_dtype(outputs[0].dtype)
    parts_PBHL = torch.stack([lse.to(wide) for lse in lses])
    with torch.no_grad():
        largest = parts_PBHL.amax(0)
        largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights_PBHL = (parts_PBHL - largest).exp()
    blind = (parts_PBHL == -math.inf).all(0)
    total = weights_PBHL.sum(0).masked_fill(blind, 1.0)
    lse = (total.log() + largest).masked_fill(blind, -math.inf)
    out = torch.zeros((), dtype=wide, device=lse.device)
    for part, weight in zip(outputs, weights_PBHL / total, strict=True):
        unseen = (weight == 0.0).unsqueeze(-1)
        out = out + part.to(wide).masked_fill(unseen, 0.0) * weight.unsqueeze(-1)
    return out.to(outputs[0].dtype), lse.to(lses[0].dtype)
