"""The manifest: what a checkpoint holds and where. Written last, read first.

`manifest.json` is one JSON object, `{"crc32":"89abcdef","content":{...}}`; the CRC-32 is over the bytes of the content as they stand, so
that a flipped bit anywhere in the file is found. `manifest_file` reads it back, as untrusted input.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from colossal_core.checkpoint.dtypes import item_bytes

MANIFEST_NAME = "manifest.json"
FORMAT = "colossal-checkpoint"
VERSION = 1
"""Raised when an older colossal-core could no longer read what this one writes."""

TAIL = b"}\n"
"""What follows the content."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, row-major and contiguous in a file.

    file: index in the manifest's files. offset: bytes from the start of the file. starts, sizes: the box. crc32: of its bytes.
    """

    file: int
    offset: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    crc32: int

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.starts, self.sizes, strict=True))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: dtype by torch's name, the global shape, and disjoint chunks that cover it."""

    kind: str
    full_name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def title(self) -> str:
        return title(self.kind, self.full_name)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * item_bytes(self.dtype)

    def chunk_bytes(self, chunk: Chunk) -> int:
        return chunk.numel * item_bytes(self.dtype)

    def chunk_title(self, chunk: Chunk) -> str:
        return f"{self.title}{box_text(chunk.starts, chunk.sizes)}"


@dataclass(frozen=True)
class FileEntry:
    """One safetensors file. header_bytes: of the length and the JSON header in front of the data; header_crc32: of those bytes."""

    name: str
    num_bytes: int
    header_bytes: int
    header_crc32: int


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint.

    mesh: sizes of the base axes of the mesh that wrote it. metadata: equal on every rank. rank_metadata: one value for each rank, which
    only the same mesh can take back.
    """

    step: int
    mesh: tuple[int, ...]
    metadata: Mapping[str, Any]
    rank_metadata: tuple[Any, ...]
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    version: int = VERSION

    @cached_property
    def by_name(self) -> dict[tuple[str, str], TensorEntry]:
        return {(tensor.kind, tensor.full_name): tensor for tensor in self.tensors}

    def rank_metadata_for(self, mesh: tuple[int, ...], rank: int) -> Any:
        """What this rank saved of its own, or None where another mesh wrote the checkpoint."""
        return self.rank_metadata[rank] if tuple(mesh) == self.mesh else None


def title(kind: str, full_name: str) -> str:
    return f"{kind} of {full_name}"


def box_text(starts: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """A box as slices: `[0:4, 8:16]`; `[]` of a tensor without dimensions."""
    return "[" + ", ".join(f"{start}:{start + size}" for start, size in zip(starts, sizes, strict=True)) + "]"


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`."""
    content = json.dumps({"format": FORMAT, **asdict(manifest)}, separators=(",", ":")).encode()
    return b'{"crc32":"%08x","content":' % zlib.crc32(content) + content + TAIL
