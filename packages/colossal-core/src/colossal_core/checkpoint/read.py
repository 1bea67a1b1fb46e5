"""Reading chunks: only the bytes that are needed, and never without their checksum."""

from __future__ import annotations

import bisect
import io
import itertools
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from colossal_core.checkpoint.dtypes import torch_dtype
from colossal_core.checkpoint.folders import file_bytes
from colossal_core.checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry
from colossal_core.errors import CheckpointError


class ChunkReader:
    """Reads verified chunks of one checkpoint, one file open at a time: ask in the order of (file, offset).

    Host memory: one chunk. What `read` returned is overwritten by the next `read`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._buffer = bytearray()
        self._stack = ExitStack()
        self._open_file = -1
        self._stream: io.FileIO | None = None

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, entry: TensorEntry, chunk: Chunk) -> torch.Tensor:
        """The chunk's elements, of shape `chunk.sizes`, on the host. Errors: CheckpointError naming file, tensor and box."""
        num_bytes = entry.chunk_bytes(chunk)
        found = self._checksum(chunk.file, chunk.offset, num_bytes)
        if found != chunk.crc32:
            raise self._damaged(chunk.file, f"chunk {entry.chunk_title(chunk)}", found, chunk.crc32)
        elements = torch.frombuffer(self._buffer, dtype=torch_dtype(entry.dtype), count=chunk.numel)
        return elements.view(chunk.sizes)

    def verify_header(self, index: int) -> None:
        """Errors: CheckpointError when the header of the file with this index is not what was written."""
        file = self._manifest.files[index]
        found = self._checksum(index, 0, file.header_bytes)
        if found != file.header_crc32:
            raise self._damaged(index, "the header", found, file.header_crc32)

    def _checksum(self, index: int, offset: int, num_bytes: int) -> int:
        """Reads a range of a file into the buffer and returns its CRC-32."""
        stream = self._opened(index)
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        window = memoryview(self._buffer)[:num_bytes]
        stream.seek(offset)
        done = 0
        while done < num_bytes:
            got = stream.readinto(window[done:])
            if not got:
                name = self._manifest.files[index].name
                raise CheckpointError(f"checkpoint {self._path.name}: {name} became shorter while it was read")
            done += got
        return zlib.crc32(window)

    def _opened(self, index: int) -> io.FileIO:
        if self._stream is None or self._open_file != index:
            self._stack.close()
            file = self._manifest.files[index]
            check_file(self._path, file)
            self._stream = self._stack.enter_context(io.FileIO(self._path / file.name, "rb"))
            self._open_file = index
        return self._stream

    def _damaged(self, index: int, what: str, found: int, expected: int) -> CheckpointError:
        name = self._manifest.files[index].name
        return CheckpointError(
            f"checkpoint {self._path.name}: {name}: {what} is damaged (checksum {found:08x}, expected {expected:08x})"
        )


def check_file(path: Path, file: FileEntry) -> None:
    """Errors: CheckpointError when a file is missing or has not its size."""
    size = file_bytes(path / file.name)
    if size is None:
        raise CheckpointError(f"checkpoint {path.name}: {file.name} is missing")
    if size != file.num_bytes:
        kind = "is truncated" if size < file.num_bytes else "is too long"
        raise CheckpointError(f"checkpoint {path.name}: {file.name} {kind} ({size} of {file.num_bytes} bytes)")


class ChunkIndex:
    """A tensor's chunks by where they begin, so that those that meet a box are found without looking at all of them."""

    def __init__(self, entry: TensorEntry) -> None:
        self._chunks = sorted(entry.chunks, key=lambda chunk: chunk.starts[:1])
        self._starts = [chunk.starts[:1] for chunk in self._chunks]
        self._reach = list(itertools.accumulate((chunk.stops[:1] for chunk in self._chunks), max))

    def overlapping(self, starts: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Chunk]:
        """The chunks that share elements with a box."""
        if not starts:
            yield from self._chunks
            return
        stops = tuple(start + size for start, size in zip(starts, sizes, strict=True))
        first = bisect.bisect_right(self._reach, starts[:1])
        last = bisect.bisect_left(self._starts, stops[:1])
        for chunk in self._chunks[first:last]:
            if _meets(chunk, starts, stops):
                yield chunk


def _meets(chunk: Chunk, starts: tuple[int, ...], stops: tuple[int, ...]) -> bool:
    bounds = zip(chunk.starts, chunk.stops, starts, stops, strict=True)
    return all(low < stop and start < high for low, high, start, stop in bounds)
