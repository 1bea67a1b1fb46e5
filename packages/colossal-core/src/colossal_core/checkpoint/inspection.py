"""Looking into a checkpoint from one process: a whole tensor, for export, and a table of everything, for people."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from colossal_core.checkpoint.dtypes import torch_dtype
from colossal_core.checkpoint.manifest import title
from colossal_core.checkpoint.manifest_file import read_manifest
from colossal_core.checkpoint.read import ChunkReader
from colossal_core.errors import CheckpointError


def read_full(path: Path, kind: str, full_name: str) -> torch.Tensor:
    """One tensor of the checkpoint in the folder `path`, whole, on the host, its checksums verified. Errors: CheckpointError."""
    manifest = read_manifest(path)
    entry = manifest.by_name.get((kind, full_name))
    if entry is None:
        kinds = ", ".join(dict.fromkeys(tensor.kind for tensor in manifest.tensors)) or "none"
        raise CheckpointError(f"checkpoint {path.name}: {title(kind, full_name)} is not there; kinds that are: {kinds}")
    full = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    with ChunkReader(path, manifest) as reader:
        for chunk in sorted(entry.chunks, key=lambda chunk: (chunk.file, chunk.offset)):
            box = tuple(slice(start, stop) for start, stop in zip(chunk.starts, chunk.stops, strict=True))
            full[box].copy_(reader.read(entry, chunk))
    return full


def describe(path: Path) -> str:
    """A table of a checkpoint's tensors, one a row, from its manifest alone. Errors: CheckpointError."""
    manifest = read_manifest(path)
    rows = [("kind", "full name", "dtype", "shape", "chunks", "bytes")]
    rows += [
        (
            tensor.kind,
            tensor.full_name,
            tensor.dtype,
            "x".join(map(str, tensor.shape)) or "scalar",
            f"{len(tensor.chunks):,}",
            f"{tensor.num_bytes:,}",
        )
        for tensor in manifest.tensors
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column > 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    total = sum(tensor.num_bytes for tensor in manifest.tensors)
    head = (
        f"step {manifest.step}, written by {math.prod(manifest.mesh)} ranks, {len(manifest.files)} files, "
        f"{len(manifest.tensors)} tensors, {total:,} bytes"
    )
    return "\n".join([head, *lines])
