"""Tokens on disk, and sequences cut from them: documents joined end to end, or one document a sequence.

A token file is a flat array of uint16 (uint32 above 65,536 entries), read through the page cache, never loaded whole. Beside it stand the
documents' starts (int64) and, for held-out text, the bytes of text behind each token (uint16).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colossal_launch.data.documents import Document
from colossal_launch.data.tokenizer import Tokenizer

IGNORED_LABEL = -100
"""The label of a position that is not scored."""

_DOCUMENTS_AT_ONCE = 256
_MOST_BYTES_OF_A_TOKEN = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class TokenCount:
    """What a token file holds. num_tokens includes one end token a document; num_bytes is UTF-8."""

    num_documents: int
    num_tokens: int
    num_bytes: int


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The type of one token on disk."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_tokens(path: Path, documents: Iterable[Document], tokenizer: Tokenizer, *, with_lengths: bool) -> TokenCount:
    """Writes `path`, `path.starts` and, if `with_lengths`, `path.lengths`, document by document. Empty documents are left out."""
    dtype = token_dtype(tokenizer.vocab_size)
    starts, position, num_bytes = [0], 0, 0
    lengths_path = _beside(path, "lengths")
    with path.open("wb") as tokens_file, lengths_path.open("wb") as lengths_file:
        for ids, lengths, size in _encoded(documents, tokenizer, with_lengths):
            tokens_file.write(np.append(ids, tokenizer.eos_id).astype(dtype).tobytes())
            if lengths is not None:
                clipped = np.minimum(np.append(lengths, 0), _MOST_BYTES_OF_A_TOKEN)
                lengths_file.write(clipped.astype(np.uint16).tobytes())
            position += len(ids) + 1
            num_bytes += size
            starts.append(position)
    np.asarray(starts, dtype=np.int64).tofile(_beside(path, "starts"))
    if not with_lengths:
        lengths_path.unlink()
    return TokenCount(len(starts) - 1, position, num_bytes)


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, with_lengths: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    texts = (document.text for document in documents if document.text)
    while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
        if with_lengths:
            for text in batch:
                ids, lengths = tokenizer.encode_with_lengths(text)
                yield ids, lengths, len(text.encode())
        else:
            for text, ids in zip(batch, tokenizer.encode(batch), strict=True):
                yield ids, None, len(text.encode())


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class TextDataset:
    """Sequences of `sequence_length` tokens, by index: `{input_ids, labels[, attention_mask]}`, int64 tensors of shape [L].

    packing: documents are joined and sequence i is tokens [i L, (i + 1) L); the last, shorter piece is left out. Else sequence i is
    document i, cut at L or padded with the end token; padding has label -100 and mask 0. Labels are the inputs, not shifted: the first
    token of a sequence is never scored.
    """

    def __init__(self, path: Path, *, vocab_size: int, eos_id: int, sequence_length: int, packing: bool) -> None:
        self._tokens = _mapped(path, token_dtype(vocab_size))
        self._starts = _mapped(_beside(path, "starts"), np.int64)
        lengths = _beside(path, "lengths")
        self._byte_lengths = _mapped(lengths, np.uint16) if lengths.is_file() else None
        self._eos_id = eos_id
        self.sequence_length = sequence_length
        self.packing = packing

    def __len__(self) -> int:
        return len(self._tokens) // self.sequence_length if self.packing else len(self._starts) - 1

    def _range(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        if self.packing:
            return index * self.sequence_length, (index + 1) * self.sequence_length
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        return start, min(stop, start + self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, stop = self._range(index)
        ids = torch.from_numpy(self._tokens[start:stop].astype(np.int64))
        if self.packing:
            return {"input_ids": ids, "labels": ids.clone()}
        input_ids = torch.full((self.sequence_length,), self._eos_id, dtype=torch.int64)
        labels = torch.full((self.sequence_length,), IGNORED_LABEL, dtype=torch.int64)
        mask = torch.zeros(self.sequence_length, dtype=torch.int64)
        input_ids[: len(ids)] = labels[: len(ids)] = ids
        mask[: len(ids)] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}

    def num_scored_bytes(self, indices: Sequence[int]) -> int:
        """Bytes of text behind the scored tokens of these sequences: all of each but its first token. Only for held-out text."""
        assert self._byte_lengths is not None, "byte lengths are kept for held-out text only"
        total = 0
        for index in indices:
            start, stop = self._range(index)
            total += int(self._byte_lengths[start + 1 : stop].sum(dtype=np.int64))
        return total


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Loss summed over tokens, in nats, as bits for each byte of the text that those tokens stand for."""
    return total_nats / math.log(2) / num_bytes
