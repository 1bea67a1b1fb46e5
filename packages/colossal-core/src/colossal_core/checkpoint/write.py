"""One rank's part of a checkpoint: the pieces that it owns, streamed into its own safetensors files.

The safetensors format is written here rather than through its library, which needs all tensors of a file in memory at once: eight bytes
of length, a JSON header, then the data without gaps. So at most one chunk is copied to the host at a time, and the checksum of each is
taken on its way to the disk. Chunks are ordered by falling item size, which aligns them all.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.checkpoint.dtypes import SAFETENSORS_NAMES, dtype_name, item_bytes
from colossal_core.checkpoint.manifest import Chunk, FileEntry, TensorEntry
from colossal_core.errors import CheckpointError
from colossal_core.layout import Piece

if TYPE_CHECKING:
    from colossal_core.mesh import MeshLayout
    from colossal_core.strategy import RegisteredTensor

CHUNK_BYTES = 64 << 20
"""Most bytes in one chunk: what is copied to the host at a time, and what a reader of any part of it reads and checks."""

FILE_BYTES = 2 << 30
"""A rank's data is spread over files of at most this size."""

FILE_CHUNKS = 100_000
"""Most chunks in a file: a safetensors header has a limit of 100 MB."""


@dataclass(frozen=True)
class OwnedTensor:
    """A tensor of which this rank writes `pieces`, each small enough to be a chunk. There may be none: the flat range may be empty."""

    entry: TensorEntry
    local: torch.Tensor
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.numel for piece in self.pieces) * item_bytes(self.entry.dtype)


def owned_tensors(
    tensors: Iterable[RegisteredTensor], coordinate: Mapping[str, int], mesh: MeshLayout
) -> tuple[OwnedTensor, ...]:
    """What this rank writes. Errors: CheckpointError for a dtype that cannot be saved or a tensor given twice."""
    found: dict[tuple[str, str], OwnedTensor] = {}
    for tensor in tensors:
        entry = TensorEntry(tensor.kind, tensor.full_name, dtype_name(tensor.local.dtype), tensor.placement.shape, ())
        key = (tensor.kind, tensor.full_name)
        if entry.dtype not in SAFETENSORS_NAMES:
            raise CheckpointError(f"{entry.title}: dtype {entry.dtype} is not one of {', '.join(SAFETENSORS_NAMES)}")
        if key in found:
            raise CheckpointError(f"{entry.title} is given twice")
        if tensor.placement.owns(coordinate):
            most = max(1, CHUNK_BYTES // item_bytes(entry.dtype))
            whole = tensor.placement.pieces(coordinate, mesh)
            pieces = tuple(part for piece in whole for part in split_piece(piece, most))
            found[key] = OwnedTensor(entry, tensor.local.detach(), pieces)
    return tuple(found.values())


def split_piece(piece: Piece, most: int) -> Iterator[Piece]:
    """The piece in boxes of at most `most` elements, cut along its outer dimensions."""
    if piece.numel <= most:
        yield piece
        return
    dim = next(dim for dim, size in enumerate(piece.sizes) if size > 1)
    row = piece.numel // piece.sizes[dim]
    step = max(1, most // row)
    for start in range(0, piece.sizes[dim], step):
        starts, sizes = list(piece.starts), list(piece.sizes)
        starts[dim] += start
        sizes[dim] = min(step, piece.sizes[dim] - start)
        part = Piece(piece.offset + start * piece.strides[dim], piece.strides, tuple(starts), tuple(sizes))
        yield from split_piece(part, most)


@dataclass(frozen=True)
class RankTable:
    """What one rank has written: its files, and its tensors with the chunks that it holds (file indices within `files`)."""

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> RankTable:
        """Takes what `to_json` of another rank of this run returned."""
        tensors = []
        for item in found["tensors"]:
            chunks = tuple(
                Chunk(part["file"], part["offset"], tuple(part["starts"]), tuple(part["sizes"]), part["crc32"])
                for part in item["chunks"]
            )
            tensors.append(TensorEntry(item["kind"], item["full_name"], item["dtype"], tuple(item["shape"]), chunks))
        return RankTable(tuple(FileEntry(**item) for item in found["files"]), tuple(tensors))


_Job = tuple[int, Piece]


def write_rank_files(folder: Path, rank: int, tensors: tuple[OwnedTensor, ...]) -> RankTable:
    """Writes and syncs this rank's files, none where it owns nothing. Host memory: one chunk beyond tensors that are already there."""
    jobs = [(index, piece) for index, tensor in enumerate(tensors) for piece in tensor.pieces]
    jobs.sort(key=lambda job: -item_bytes(tensors[job[0]].entry.dtype))
    files = []
    chunks: list[list[Chunk]] = [[] for _ in tensors]
    for number, part in enumerate(_split_files(jobs, tensors)):
        name = f"rank-{rank:05d}.safetensors" if number == 0 else f"rank-{rank:05d}-{number}.safetensors"
        entry, written = _write_file(folder / name, number, part, tensors)
        files.append(entry)
        for (index, _), chunk in zip(part, written, strict=True):
            chunks[index].append(chunk)
    entries = (replace(tensor.entry, chunks=tuple(found)) for tensor, found in zip(tensors, chunks, strict=True))
    return RankTable(tuple(files), tuple(entries))


def _split_files(jobs: list[_Job], tensors: tuple[OwnedTensor, ...]) -> Iterator[list[_Job]]:
    part: list[_Job] = []
    total = 0
    for index, piece in jobs:
        size = piece.numel * item_bytes(tensors[index].entry.dtype)
        if part and (total + size > FILE_BYTES or len(part) == FILE_CHUNKS):
            yield part
            part, total = [], 0
        part.append((index, piece))
        total += size
    if part:
        yield part


def _write_file(
    file: Path, number: int, jobs: list[_Job], tensors: tuple[OwnedTensor, ...]
) -> tuple[FileEntry, list[Chunk]]:
    header = _header(jobs, tensors)
    chunks = []
    with open(file, "xb") as stream:
        stream.write(header)
        offset = len(header)
        for index, piece in jobs:
            data = _host_bytes(piece.view(tensors[index].local))
            stream.write(data)
            chunks.append(Chunk(number, offset, piece.starts, piece.sizes, zlib.crc32(data)))
            offset += data.nbytes
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(file.name, offset, len(header), zlib.crc32(header)), chunks


def _header(jobs: list[_Job], tensors: tuple[OwnedTensor, ...]) -> bytes:
    """The length and JSON header of a safetensors file; a chunk's key is its kind, full name and box."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for index, piece in jobs:
        entry = tensors[index].entry
        chunk = Chunk(0, 0, piece.starts, piece.sizes, 0)
        stop = offset + entry.chunk_bytes(chunk)
        found[entry.chunk_title(chunk)] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": list(piece.sizes),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _host_bytes(view: torch.Tensor) -> memoryview:
    """The row-major bytes of a view; no copy where it is contiguous on the host."""
    flat = view.contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data
