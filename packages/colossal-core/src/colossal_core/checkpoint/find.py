"""Finding the newest checkpoint that is complete and undamaged, and saying what is wrong with those that are newer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.checkpoint.agreement import all_or_none
from colossal_core.checkpoint.folders import candidates, file_bytes
from colossal_core.checkpoint.manifest import (
    MANIFEST_NAME,
    Chunk,
    Manifest,
    TensorEntry,
)
from colossal_core.checkpoint.manifest_file import NewerVersionError, read_manifest
from colossal_core.checkpoint.read import ChunkReader, check_file
from colossal_core.errors import CheckpointError

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint to go on from. skipped: one message for each newer one that cannot be used, newest first."""

    path: Path
    manifest: Manifest
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.manifest.step


def find_latest(directory: Path, collectives: Collectives) -> FoundCheckpoint | None:
    """The newest complete and undamaged checkpoint in `directory`, the same on every rank; None where there are none.

    Every byte of it is read and compared with its checksum, each rank reading a part. Folders that end in `.tmp` are not looked at.
    Communicates gathers of bytes over all ranks: the list of folders, then one finding for each checkpoint looked at.
    Errors: CheckpointError, the same on every rank, when there are checkpoints and not one can be used (to start anew over them would lose
    them), or when the newest is in a format newer than this version reads.
    """
    failure = f"no checkpoint was taken from {directory}"
    listed = candidates(directory) if collectives.rank == 0 else []
    _, lists = all_or_none(collectives, failure, lambda: (None, listed))
    faults: list[str] = []
    for step, name in lists[0]:
        path = directory / name

        def look(path: Path = path, step: int = step) -> tuple[Manifest | None, dict[str, Any]]:
            return _look(path, step, collectives.rank, collectives.mesh.world_size)

        manifest, findings = all_or_none(collectives, failure, look)
        found = tuple(dict.fromkeys(finding["fault"] for finding in findings if finding["fault"]))
        if any(finding["newer"] for finding in findings):
            raise NewerVersionError(f"{failure}: {found[0]}")
        if not found:
            assert manifest is not None
            return FoundCheckpoint(path, manifest, tuple(f"{fault}: using step {step}" for fault in faults))
        faults.append("; ".join(found))
    if faults:
        raise CheckpointError("\n  ".join([f"{failure}: none can be used; move them away to start anew:", *faults]))
    return None


def _look(path: Path, step: int, rank: int, world_size: int) -> tuple[Manifest | None, dict[str, Any]]:
    """This rank's finding about a checkpoint: the manifest and the files as a whole, and this rank's share of the checksums."""
    try:
        manifest = read_manifest(path)
        _check_files(path, manifest, step)
        _verify_share(path, manifest, rank, world_size)
    except (CheckpointError, OSError) as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        fault = f"step {step} incomplete (no {MANIFEST_NAME})" if missing else str(error)
        return None, {"fault": fault, "newer": isinstance(error, NewerVersionError)}
    return manifest, {"fault": "", "newer": False}


def _check_files(path: Path, manifest: Manifest, step: int) -> None:
    if manifest.step != step:
        raise CheckpointError(f"checkpoint {path.name}: {MANIFEST_NAME} is that of step {manifest.step}")
    present = sum(file_bytes(path / file.name) is not None for file in manifest.files)
    if present < len(manifest.files):
        raise CheckpointError(f"step {step} incomplete ({present} of {len(manifest.files)} files)")
    for file in manifest.files:
        check_file(path, file)


def _verify_share(path: Path, manifest: Manifest, rank: int, world_size: int) -> None:
    """Reads this rank's share of all chunks, cut by bytes in file order, and the headers of every world_size-th file."""
    with ChunkReader(path, manifest) as reader:
        for index in range(rank, len(manifest.files), world_size):
            reader.verify_header(index)
        for entry, chunk in _share(manifest, rank, world_size):
            reader.read(entry, chunk)


def _share(manifest: Manifest, rank: int, world_size: int) -> Iterator[tuple[TensorEntry, Chunk]]:
    ordered = sorted(
        ((entry, chunk) for entry in manifest.tensors for chunk in entry.chunks),
        key=lambda pair: (pair[1].file, pair[1].offset),
    )
    total = sum(entry.chunk_bytes(chunk) for entry, chunk in ordered)
    done = 0
    for entry, chunk in ordered:
        if done * world_size // total == rank:
            yield entry, chunk
        done += entry.chunk_bytes(chunk)
