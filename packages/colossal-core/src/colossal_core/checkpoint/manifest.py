"""The manifest: what a checkpoint holds and where. Written last, read first.

`manifest.json` is one JSON object, `{"crc32":"89abcdef","content":{...}}`; the CRC-32 is over the bytes of the content as they stand, so
that a flipped bit anywhere in the file is found. `validate` reads the content as untrusted input.
"""

from __future__ import annotations

import json
import math
import re
import stat
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from colossal_core.checkpoint.dtypes import item_bytes
from colossal_core.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "colossal-checkpoint"
VERSION = 1
"""Raised when an older colossal-core could no longer read what this one writes."""

MAX_MANIFEST_BYTES = 1 << 30
"""Larger manifests are refused unread; 405 billion parameters with AdamW in chunks of 64 MiB need about 15 MB."""

_HEAD = re.compile(rb'\{"crc32":"([0-9a-f]{8})","content":')
_TAIL = b"}\n"


class NewerVersionError(CheckpointError):
    """A checkpoint in a format that this version cannot read. It is never passed over in favour of an older checkpoint."""


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
    return b'{"crc32":"%08x","content":' % zlib.crc32(content) + content + _TAIL


def decode_manifest(data: bytes) -> Manifest:
    """The manifest of `manifest.json`'s bytes, checked against its checksum and then field by field. Errors: CheckpointError."""
    from colossal_core.checkpoint.validate import validate_manifest

    head = _HEAD.match(data)
    if head is None or not data.endswith(_TAIL):
        raise CheckpointError(f"{MANIFEST_NAME} is truncated or is not a manifest")
    content = memoryview(data)[head.end() : len(data) - len(_TAIL)]
    if zlib.crc32(content) != int(head[1], 16):
        raise CheckpointError(
            f"{MANIFEST_NAME} is damaged (checksum {zlib.crc32(content):08x}, expected {head[1].decode()})"
        )
    try:
        found = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} is not JSON: {error}") from error
    version = found.get("version") if isinstance(found, dict) else None
    if type(version) is int and version > VERSION:
        raise NewerVersionError(
            f"{MANIFEST_NAME} is in format version {version}; this colossal-core reads versions up to {VERSION}: "
            "upgrade colossal-core"
        )
    return validate_manifest(found)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in the folder `path`. Data files are not looked at. Errors: CheckpointError."""
    file = path / MANIFEST_NAME
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"checkpoint {path.name}: {MANIFEST_NAME} is not a regular file")
        if status.st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"checkpoint {path.name}: {MANIFEST_NAME} has {status.st_size} bytes, limit {MAX_MANIFEST_BYTES}"
            )
        data = file.read_bytes()
    except OSError as error:
        reason = f"no {MANIFEST_NAME}" if isinstance(error, FileNotFoundError | NotADirectoryError) else str(error)
        raise CheckpointError(f"checkpoint {path.name}: {reason}") from error
    try:
        return decode_manifest(data)
    except CheckpointError as error:
        raise type(error)(f"checkpoint {path.name}: {error}") from error
