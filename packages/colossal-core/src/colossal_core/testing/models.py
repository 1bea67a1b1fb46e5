"""A small causal language model in plain torch, and batches for it: what the suites train, so that nobody needs transformers for them.

Letters in names of tensors: B sequences, L positions, D features, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TinyOptions:
    """Sizes and peculiarities of a `TinyLM`. hidden_size is meant not to divide by the number of ranks.

    tied: the head is the embedding. unused: a parameter that no forward pass reads. frozen: the position table is not trained. shared: all
    blocks have one and the same second projection. routed: each microbatch runs one of two branches, by the parity of its first token.
    """

    vocab_size: int = 53
    hidden_size: int = 18
    num_heads: int = 2
    num_blocks: int = 2
    max_length: int = 12
    dropout: float = 0.1
    tied: bool = True
    unused: bool = False
    frozen: bool = False
    shared: bool = False
    routed: bool = False


class Output(NamedTuple):
    """logits: [B, L, V]."""

    logits: torch.Tensor


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, options: TinyOptions) -> None:
        super().__init__()
        size = options.hidden_size
        self.num_heads, self.head_size = options.num_heads, size // options.num_heads
        self.norm1 = nn.LayerNorm(size)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x_BLD: torch.Tensor, mask_BLL: torch.Tensor) -> torch.Tensor:
        x_BLD = x_BLD + self.dropout(self._attention(self.norm1(x_BLD), mask_BLL))
        added: torch.Tensor = x_BLD + self.dropout(self.down(F.gelu(self.up(self.norm2(x_BLD)))))
        return added

    def _attention(self, x_BLD: torch.Tensor, mask_BLL: torch.Tensor) -> torch.Tensor:
        fused = self.query_key_value(x_BLD)
        # Not `unflatten`, which breaks a graph that is traced in float64.
        heads = fused.view(*fused.shape[:-1], 3, -1, self.head_size)
        query_BHLK, key_BHLK, value_BHLK = heads.permute(2, 0, 3, 1, 4).unbind(0)
        scores_BHLL = query_BHLK @ key_BHLK.transpose(-1, -2) / math.sqrt(self.head_size)
        scores_BHLL = scores_BHLL.masked_fill(~mask_BLL[:, None], -1.0e4)
        mixed: torch.Tensor = self.out((scores_BHLL.softmax(-1) @ value_BHLK).transpose(1, 2).flatten(2))
        return mixed


class TinyLM(nn.Module):
    """Embeddings, blocks, a norm and a head."""

    def __init__(self, options: TinyOptions) -> None:
        super().__init__()
        size = options.hidden_size
        self.tokens = nn.Embedding(options.vocab_size, size)
        self.positions = nn.Embedding(options.max_length, size)
        self.positions.weight.requires_grad_(not options.frozen)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.num_blocks))
        if options.shared:
            for block in self.blocks[1:]:
                block.down = self.blocks[0].down
        self.branches = nn.ModuleList(nn.Linear(size, size) for _ in range(2)) if options.routed else None
        self.spare = nn.Linear(size, 7) if options.unused else None
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, options.vocab_size, bias=False)
        if options.tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Output:
        """input_ids: [B, L]. attention_mask: [B, L], 0 for padding."""
        length = input_ids.shape[1]
        position = torch.arange(length, device=input_ids.device)
        mask_BLL = (position[:, None] >= position[None, :]).expand(input_ids.shape[0], length, length)
        if attention_mask is not None:
            mask_BLL = mask_BLL & attention_mask[:, None, :].bool()
        x_BLD = self.tokens(input_ids) + self.positions(position)
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_BLL)
        if self.branches is not None:
            x_BLD = x_BLD + self.branches[int(input_ids[0, 0]) % 2](x_BLD)
        return Output(self.head(self.norm(x_BLD)))


@dataclass(frozen=True)
class TinyModel:
    """Builds the same `TinyLM` wherever it is called: a builder for `RunSpec.model`."""

    options: TinyOptions = TinyOptions()

    def __call__(self) -> nn.Module:
        return TinyLM(self.options)


@dataclass(frozen=True)
class TokenBatches:
    """Random tokens with padding and ignored labels: a builder for `RunSpec.batch`.

    The later a sequence stands in the batch, the fewer of its labels count, so that ranks and microbatches get different numbers of them.
    """

    vocab_size: int = 53
    length: int = 12
    seed: int = 1

    def __call__(self, step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
        """The global batch of a step: input_ids, attention_mask and labels, each [num_sequences, length] int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        ids = torch.randint(self.vocab_size, (num_sequences, self.length), generator=generator)
        rows = torch.arange(num_sequences)[:, None]
        lengths = self.length - (rows * 3 + step) % (self.length // 2)
        mask = (torch.arange(self.length) < lengths).long()
        ignored = torch.rand(num_sequences, self.length, generator=generator) < rows / (2 * num_sequences)
        labels = ids.masked_fill(ignored | (mask == 0), IGNORED_LABEL)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class RoutedBatches:
    """As `TokenBatches`, the first token of each sequence even in the first half of the batch and odd in the second: with
    `TinyOptions.routed` and one sequence a microbatch, the ranks then use different parameters."""

    tokens: TokenBatches = TokenBatches()

    def __call__(self, step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
        batch = dict(self.tokens(step, num_sequences))
        ids = batch["input_ids"].clone()
        ids[:, 0] = (torch.arange(num_sequences) >= num_sequences // 2).long() + 2
        return {**batch, "input_ids": ids}


def next_token_loss(outputs: Output, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """A user's loss function: the sum of the next tokens' cross-entropies and their number."""
    targets = batch["labels"][:, 1:].reshape(-1)
    logits = outputs.logits[:, :-1].reshape(targets.numel(), -1)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return total, int((targets != IGNORED_LABEL).sum())
