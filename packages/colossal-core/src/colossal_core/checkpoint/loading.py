"""Loading: every rank fills its own pieces from the chunks that meet them, whichever mesh wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.checkpoint.agreement import all_or_none
from colossal_core.checkpoint.dtypes import dtype_name
from colossal_core.checkpoint.manifest import Chunk, Manifest, TensorEntry, title
from colossal_core.checkpoint.manifest_file import read_manifest
from colossal_core.checkpoint.read import ChunkIndex, ChunkReader
from colossal_core.errors import CheckpointError
from colossal_core.layout import Piece

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.mesh import MeshLayout
    from colossal_core.strategy import RegisteredTensor

_MAX_LISTED = 100


def load(
    path: Path,
    tensors: Iterable[RegisteredTensor],
    collectives: Collectives,
    *,
    strict: bool = True,
    allow_cast: bool = False,
) -> Mapping[str, Any]:
    """Overwrites the local elements of `tensors` with those of the checkpoint in the folder `path`; returns its metadata. Collective.

    tensors: this rank's part, laid out for this mesh, which need not be the one that wrote the checkpoint. Padding is left alone.
    strict: every tensor of any rank is in the checkpoint and the other way round; without it, what only one side has is left alone.
    allow_cast: elements are converted where dtypes differ. Reads only chunks that meet a local piece, each once, in file order, with its
    checksum; host memory: one chunk. Communicates two gathers of bytes over all ranks: what does not fit (one bit a tensor), the outcome.
    Errors: CheckpointError, the same on every rank, listing every tensor that does not fit, before anything is overwritten; or naming the
    damaged chunk, when some of the tensors may have been overwritten.
    """
    wanted = tuple(tensors)
    mesh, rank = collectives.mesh, collectives.rank

    def compare() -> tuple[Manifest, dict[str, Any]]:
        manifest = read_manifest(path)
        problems = _misfits(manifest, wanted, strict=strict, allow_cast=allow_cast)
        return manifest, {"problems": problems, "asked": _asked(manifest, wanted), "num_tensors": len(manifest.tensors)}

    def read() -> tuple[None, None]:
        _read_into(path, manifest, wanted, mesh.coordinate(rank), mesh)
        return None, None

    failure = f"checkpoint {path} was not loaded"
    manifest, reports = all_or_none(collectives, failure, compare)
    problems = list(dict.fromkeys(line for report in reports for line in report["problems"]))
    if strict:
        problems += _extra(manifest, [int(report["asked"], 16) for report in reports])
    if problems:
        raise CheckpointError(_listed(path, problems))
    all_or_none(collectives, failure, read)
    return manifest.metadata


def _misfits(manifest: Manifest, tensors: tuple[RegisteredTensor, ...], *, strict: bool, allow_cast: bool) -> list[str]:
    problems = []
    for tensor in tensors:
        name = title(tensor.kind, tensor.full_name)
        entry = manifest.by_name.get((tensor.kind, tensor.full_name))
        dtype, shape = dtype_name(tensor.local.dtype), tensor.placement.shape
        if entry is None:
            if strict:
                problems.append(f"{name}: not in the checkpoint")
            continue
        if entry.shape != tuple(shape):
            problems.append(f"{name}: shape {list(entry.shape)} in the checkpoint, {list(shape)} in this run")
        if entry.dtype != dtype and not allow_cast:
            problems.append(
                f"{name}: dtype {entry.dtype} in the checkpoint, {dtype} in this run, and conversion was not allowed"
            )
    return problems


def _asked(manifest: Manifest, tensors: tuple[RegisteredTensor, ...]) -> str:
    """One bit for each of the manifest's tensors, in hexadecimal: whether this rank asks for it."""
    names = {(tensor.kind, tensor.full_name) for tensor in tensors}
    bits = "".join("1" if key in names else "0" for key in manifest.by_name)
    return f"{int(bits or '0', 2):x}"


def _extra(manifest: Manifest, asked: list[int]) -> list[str]:
    union = 0
    for bits in asked:
        union |= bits
    last = len(manifest.tensors) - 1
    extra = (entry for index, entry in enumerate(manifest.tensors) if not union >> (last - index) & 1)
    return [f"{entry.title}: in the checkpoint, but not in this run" for entry in extra]


def _listed(path: Path, problems: list[str]) -> str:
    count = "1 tensor does" if len(problems) == 1 else f"{len(problems)} tensors do"
    lines = problems[:_MAX_LISTED]
    if len(problems) > _MAX_LISTED:
        lines.append(f"and {len(problems) - _MAX_LISTED} more")
    return "\n  ".join([f"checkpoint {path} was not loaded: {count} not fit:", *lines])


@dataclass(frozen=True)
class _Want:
    """A local piece that is to take elements out of a chunk."""

    entry: TensorEntry
    chunk: Chunk
    local: torch.Tensor
    piece: Piece


def _read_into(
    path: Path,
    manifest: Manifest,
    tensors: tuple[RegisteredTensor, ...],
    coordinate: Mapping[str, int],
    mesh: MeshLayout,
) -> None:
    by_chunk: dict[tuple[int, int, str, tuple[int, ...]], list[_Want]] = {}
    for tensor in tensors:
        entry = manifest.by_name.get((tensor.kind, tensor.full_name))
        if entry is None:
            continue
        for want in _wants(entry, tensor, tensor.placement.pieces(coordinate, mesh)):
            key = (want.chunk.file, want.chunk.offset, entry.title, want.chunk.starts)
            by_chunk.setdefault(key, []).append(want)
    with ChunkReader(path, manifest) as reader:
        for key in sorted(by_chunk):
            first = by_chunk[key][0]
            elements = reader.read(first.entry, first.chunk)
            for want in by_chunk[key]:
                copy_overlap(elements, want.chunk, want.local, want.piece)


def _wants(entry: TensorEntry, tensor: RegisteredTensor, pieces: tuple[Piece, ...]) -> list[_Want]:
    index = ChunkIndex(entry)
    return [
        _Want(entry, chunk, tensor.local, piece)
        for piece in pieces
        for chunk in index.overlapping(piece.starts, piece.sizes)
    ]


def copy_overlap(elements: torch.Tensor, chunk: Chunk, local: torch.Tensor, piece: Piece) -> None:
    """Copies what a chunk (`elements`) and a local piece have in common into local storage, converting dtype and device."""
    source, target = [], []
    for dim, start in enumerate(piece.starts):
        low = max(start, chunk.starts[dim])
        high = min(start + piece.sizes[dim], chunk.stops[dim])
        source.append(slice(low - chunk.starts[dim], high - chunk.starts[dim]))
        target.append(slice(low - start, high - start))
    with torch.no_grad():
        piece.view(local.detach())[tuple(target)].copy_(elements[tuple(source)])
