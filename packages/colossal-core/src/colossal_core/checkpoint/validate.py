"""Reads a manifest's content as untrusted input: every field has its type and its bounds, and nothing else is there.

After this, a chunk is a range inside a plainly named file, a box inside its tensor, and the chunks of a tensor hold each of its
elements once. Whether the file on disk is that large is looked at when it is opened.
"""

from __future__ import annotations

import math
import re
from typing import Any

from colossal_core.checkpoint.dtypes import SAFETENSORS_NAMES
from colossal_core.checkpoint.manifest import FORMAT, MANIFEST_NAME, Chunk, FileEntry, Manifest, TensorEntry, title
from colossal_core.errors import CheckpointError
from colossal_core.mesh import BASE_AXES

_MAX_COUNT = (1 << 63) - 1
_MAX_DIMS = 64
_MAX_NAME_LENGTH = 4096
_FILE_NAME = re.compile(r"rank-[0-9]{5,9}(-[0-9]{1,9})?\.safetensors")


def validate_manifest(found: object) -> Manifest:
    """The manifest, or CheckpointError naming the field at fault."""
    content = _object(
        found, "content", ("format", "version", "step", "mesh", "metadata", "rank_metadata", "files", "tensors")
    )
    if content["format"] != FORMAT:
        raise _fault("format", f"is not {FORMAT!r}")
    version = _count(content["version"], "version")
    mesh = _counts(content["mesh"], "mesh")
    if len(mesh) != len(BASE_AXES) or min(mesh) < 1:
        raise _fault("mesh", f"is not one positive size for each of {', '.join(BASE_AXES)}")
    rank_metadata = tuple(_list(content["rank_metadata"], "rank_metadata"))
    if len(rank_metadata) != math.prod(mesh):
        raise _fault("rank_metadata", f"has {len(rank_metadata)} items for {math.prod(mesh)} ranks")
    if not isinstance(content["metadata"], dict):
        raise _fault("metadata", "is not an object")
    files = tuple(_file(item, f"files[{index}]") for index, item in enumerate(_list(content["files"], "files")))
    if len({file.name for file in files}) != len(files):
        raise _fault("files", "names a file twice")
    tensors = tuple(
        _tensor(item, f"tensors[{index}]", files) for index, item in enumerate(_list(content["tensors"], "tensors"))
    )
    if len({(tensor.kind, tensor.full_name) for tensor in tensors}) != len(tensors):
        raise _fault("tensors", "names a tensor twice")
    step = _count(content["step"], "step")
    return Manifest(step, mesh, content["metadata"], rank_metadata, files, tensors, version)


def _file(found: object, field: str) -> FileEntry:
    item = _object(found, field, ("name", "num_bytes", "header_bytes", "header_crc32"))
    name = item["name"]
    if not isinstance(name, str) or _FILE_NAME.fullmatch(name) is None:
        raise _fault(f"{field}.name", "is not a plain name such as rank-00000.safetensors")
    num_bytes = _count(item["num_bytes"], f"{field}.num_bytes")
    header_bytes = _count(item["header_bytes"], f"{field}.header_bytes", num_bytes)
    return FileEntry(name, num_bytes, header_bytes, _count(item["header_crc32"], f"{field}.header_crc32", 0xFFFFFFFF))


def _tensor(found: object, field: str, files: tuple[FileEntry, ...]) -> TensorEntry:
    item = _object(found, field, ("kind", "full_name", "dtype", "shape", "chunks"))
    kind, full_name = _name(item["kind"], f"{field}.kind"), _name(item["full_name"], f"{field}.full_name")
    dtype, shape = item["dtype"], _counts(item["shape"], f"{field}.shape")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_NAMES:
        raise _fault(f"{field}.dtype", f"is not one of {', '.join(SAFETENSORS_NAMES)}")
    if len(shape) > _MAX_DIMS or math.prod(shape) > _MAX_COUNT:
        raise _fault(f"{field}.shape", "is too large")
    bare = TensorEntry(kind, full_name, dtype, shape, ())
    chunks = tuple(
        _chunk(part, f"{field}.chunks[{index}]", bare, files)
        for index, part in enumerate(_list(item["chunks"], f"{field}.chunks"))
    )
    held = sum(chunk.numel for chunk in chunks)
    if held != math.prod(shape):
        raise _fault(field, f"{title(kind, full_name)}: the chunks hold {held} of {math.prod(shape)} elements")
    if not _disjoint(chunks):
        raise _fault(field, f"{title(kind, full_name)}: two chunks hold the same elements")
    return TensorEntry(kind, full_name, dtype, shape, chunks)


def _disjoint(chunks: tuple[Chunk, ...]) -> bool:
    """Whether no two boxes meet: a sweep along the dimension with most starts, in which the fewest boxes lie side by side."""
    if len(chunks) < 2:
        return True
    num_dims = len(chunks[0].starts)
    if num_dims == 0:
        return False
    dim = max(range(num_dims), key=lambda dim: len({chunk.starts[dim] for chunk in chunks}))
    beside: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.starts[dim]):
        beside = [other for other in beside if other.stops[dim] > chunk.starts[dim]]
        if any(_meet(chunk, other) for other in beside):
            return False
        beside.append(chunk)
    return True


def _meet(one: Chunk, other: Chunk) -> bool:
    bounds = zip(one.starts, one.stops, other.starts, other.stops, strict=True)
    return all(low < stop and start < high for low, high, start, stop in bounds)


def _chunk(found: object, field: str, tensor: TensorEntry, files: tuple[FileEntry, ...]) -> Chunk:
    item = _object(found, field, ("file", "offset", "starts", "sizes", "crc32"))
    file = _count(item["file"], f"{field}.file", len(files) - 1)
    starts, sizes = _counts(item["starts"], f"{field}.starts"), _counts(item["sizes"], f"{field}.sizes")
    offset, crc32 = _count(item["offset"], f"{field}.offset"), _count(item["crc32"], f"{field}.crc32", 0xFFFFFFFF)
    chunk = Chunk(file, offset, starts, sizes, crc32)
    if not len(starts) == len(sizes) == len(tensor.shape):
        raise _fault(field, f"has not the {len(tensor.shape)} dimensions of its tensor")
    if any(stop > size for stop, size in zip(chunk.stops, tensor.shape, strict=True)) or 0 in sizes:
        raise _fault(field, f"is not a box inside its tensor of shape {list(tensor.shape)}")
    if offset < files[file].header_bytes or offset + tensor.chunk_bytes(chunk) > files[file].num_bytes:
        raise _fault(field, f"lies outside the data of {files[file].name}")
    return chunk


def _object(found: object, field: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(found, dict) or set(found) != set(keys):
        raise _fault(field, f"is not an object of {', '.join(keys)}")
    return found


def _list(found: object, field: str) -> list[Any]:
    if not isinstance(found, list):
        raise _fault(field, "is not a list")
    return found


def _count(found: object, field: str, most: int = _MAX_COUNT) -> int:
    if type(found) is not int or not 0 <= found <= most:
        raise _fault(field, f"is not a whole number from 0 to {most}")
    return found


def _counts(found: object, field: str) -> tuple[int, ...]:
    return tuple(_count(item, field) for item in _list(found, field))


def _name(found: object, field: str) -> str:
    if not isinstance(found, str) or not found or len(found) > _MAX_NAME_LENGTH or not found.isprintable():
        raise _fault(field, f"is not a printable name of at most {_MAX_NAME_LENGTH} characters")
    return found


def _fault(field: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{MANIFEST_NAME} is not valid: {field} {reason}")
