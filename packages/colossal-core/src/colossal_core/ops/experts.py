"""Reference operations of a mixture of experts: choose, sort, bring together, multiply, bring back. None of them drops a token.

Letters: N tokens, K choices of a token, E experts, D features, F hidden features of an expert, M rows of all experts together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from colossal_core.ops.norms import statistics_dtype


def route(logits: torch.Tensor, top_k: int, *, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` experts of each token and their weights: `p = softmax(logits)`, the largest K of p, divided by their sum if `normalize`
    (Shazeer et al. 2017, equations 3 to 5, without noise; Mixtral and gpt-oss normalise, Qwen3-MoE and OLMoE as their configuration says).

    logits: [N, E]. Returns weights [N, K], float32 (float64 for float64 logits), the largest first, and experts [N, K], int64. Of equal
    logits the lower index comes first. Differentiable with respect to the logits through the weights. Not served: scores by sigmoid, a
    bias that enters the choice alone, choices within groups of experts (DeepSeek-V3), and noise.
    """
    assert 0 < top_k <= logits.shape[-1], f"top {top_k} of {logits.shape[-1]} experts"
    wide = logits.to(statistics_dtype(logits.dtype))
    experts = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if normalize:
        return torch.softmax(wide.gather(1, experts), dim=-1), experts
    return torch.softmax(wide, dim=-1).gather(1, experts), experts


def num_rows(num_choices: int, num_experts: int, multiple: int) -> int:
    """M: how many rows the experts' inputs may take together, known without asking the device."""
    if num_choices == 0 or multiple == 1:
        return num_choices
    return -(-(num_choices + num_experts * (multiple - 1)) // multiple) * multiple


def expert_order(
    experts: torch.Tensor, num_experts: int, *, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each choice goes when all are sorted by expert, in their own order within an expert (a stable counting sort).

    experts: [N, K] integers; a choice of an expert outside 0..E-1 gets no row. multiple: every expert's number of rows is filled up to a
    multiple of this (8 or 16 for products in fp8). Returns, all int32 on experts' device:
    order [M], M = N * K (`multiple` 1) or the most that filling up can need: the choice n * K + k that row holds, -1 where it holds none;
    inverse [N, K]: the row of each choice, or -1; offsets [E + 1]: expert e has the rows from offsets[e] to offsets[e + 1], and
    offsets[1:] is what `torch.nn.functional.grouped_mm` takes. The host never waits.
    """
    assert multiple >= 1 and num_experts >= 1, f"multiple {multiple}, {num_experts} experts"
    flat = experts.reshape(-1).to(torch.int64)
    assert num_rows(len(flat), num_experts, multiple) < 1 << 31, "rows are counted in int32"
    inside = (flat >= 0) & (flat < num_experts)
    kept = flat.where(inside, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, kept, torch.ones_like(kept))
    filled = (counts[:-1] + multiple - 1) // multiple * multiple
    offsets = torch.cat([filled.new_zeros(1), filled.cumsum(0)])
    choices = kept.sort(stable=True).indices
    by_expert = kept[choices]
    rank = torch.arange(len(kept), device=flat.device) - (counts.cumsum(0) - counts)[by_expert]
    rows = offsets[by_expert] + rank
    order = torch.full((num_rows(len(flat), num_experts, multiple),), -1, dtype=torch.int64, device=flat.device)
    order[rows] = choices.where(inside[choices], -1)
    inverse = torch.empty_like(kept)
    inverse[choices] = rows.where(inside[choices], -1)
    return order.to(torch.int32), inverse.view(experts.shape).to(torch.int32), offsets.to(torch.int32)


def expert_permute(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`y[r] = x[order[r] // K]`: every expert's inputs side by side. x: [N, D]; order, inverse: of `expert_order`. Returns [M, D]; rows
    without a choice are zero. The gradient of a token is the sum over its rows, in the order of its choices.
    """
    tokens = order.clamp(min=0).to(torch.int64) // inverse.shape[1]
    return x[tokens].masked_fill((order < 0).unsqueeze(1), 0.0)


def expert_unpermute(
    y: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`x[n] = sum over k of weights[n, k] * y[inverse[n, k]]`: the experts' outputs back at their tokens, summed in float32.

    y: [M, D]; order, inverse: of `expert_order`; weights: [N, K] in any floating dtype, or None (ones). Returns [N, D] in y's dtype. A
    choice without a row adds nothing.
    """
    assert inverse.dim() == 2 and order.dim() == 1, f"order {tuple(order.shape)}, inverse {tuple(inverse.shape)}"
    rows = y[inverse.clamp(min=0).to(torch.int64)].masked_fill((inverse < 0).unsqueeze(2), 0.0)
    wide = rows.to(statistics_dtype(y.dtype))
    if weights is not None:
        wide = wide * weights.to(wide.dtype).unsqueeze(2)
    return wide.sum(1).to(y.dtype)


def grouped_matmul(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each expert's rows times its matrix: `y[r] = x[r] @ weights[e]` for offsets[e] <= r < offsets[e + 1].

    x: [M, D]; weights: [E, D, F], of any strides; offsets: [E + 1] int32 from 0 on. Returns [M, F]. Rows from offsets[E] on belong to no
    expert: zero here, anything in an implementation that does not touch them. Waits for the device.
    """
    stops = [int(stop) for stop in offsets.tolist()]
    assert len(stops) == len(weights) + 1 and stops[-1] <= len(x), f"offsets {stops} of {tuple(weights.shape)}"
    parts = [x[stops[e] : stops[e + 1]] @ weights[e] for e in range(len(weights))]
    return torch.cat([*parts, x.new_zeros(len(x) - stops[-1], weights.shape[-1])])


def experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """A layer of gated experts, whole: `sum over k of weights[n, k] * down[e] (silu(gate[e] x[n]) * (up[e] x[n]))`, e = chosen[n, k].

    x: [N, D]; gate_up: [E, 2F, D], the gate's rows before those of the product with it; down: [E, D, F]: both as transformers keeps
    them. chosen: [N, K] integers (one outside 0..E-1 adds nothing: another rank has that expert); weights: [N, K], any floating dtype.
    Returns [N, D] in x's dtype. Not served: biases, other activations, gate and product interleaved (gpt-oss).
    """
    order, inverse, offsets = expert_order(chosen, len(gate_up))
    rows = expert_permute(x, order, inverse)
    gate, up = grouped_matmul(rows, gate_up.transpose(1, 2), offsets).chunk(2, dim=-1)
    y = grouped_matmul(F.silu(gate) * up, down.transpose(1, 2), offsets)
    return expert_unpermute(y, order, inverse, weights)
