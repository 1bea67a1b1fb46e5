"""Saving: every rank writes what it owns, the first one writes the manifest and gives the folder its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.checkpoint.agreement import all_or_none
from colossal_core.checkpoint.folders import (
    commit_folder,
    remove_leftovers,
    rotate,
    start_folder,
    step_folder,
    sync_folder,
)
from colossal_core.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry, encode_manifest
from colossal_core.checkpoint.validate import validate_manifest
from colossal_core.checkpoint.write import OwnedTensor, RankTable, owned_tensors, write_rank_files
from colossal_core.errors import CheckpointError

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.strategy import RegisteredTensor

_SPACE_FACTOR = 1.1
_CONSEQUENCE = "; training can go on, earlier checkpoints are kept"


def save(
    directory: Path,
    step: int,
    tensors: Iterable[RegisteredTensor],
    metadata: Mapping[str, object],
    collectives: Collectives,
    *,
    keep: int,
    rank_metadata: object = None,
) -> Path:
    """Saves a checkpoint of `step` and returns its folder, the same path on every rank. Collective over all ranks.

    directory: of all checkpoints of the run, seen by every rank. tensors: this rank's part of all that is to be saved, quiescent while
    this runs. metadata: JSON values, equal on every rank (the first rank's is written); floats may be infinite or NaN. rank_metadata: a
    JSON value of this rank's own (random state), which only the same mesh can take back. keep: how many of the newest checkpoints stay.

    Writes: one copy of every element in all, each rank what its placements say it owns, then syncs. Host memory: one chunk of at most
    64 MiB. Communicates four gathers of bytes over all ranks: bytes to write, the tables of chunks (about 130 bytes a chunk), two outcomes.
    Errors: CheckpointError, the same on every rank, when any rank fails or the space does not suffice; nothing of the new checkpoint is
    then left, and training can go on. Or when only the removal of older checkpoints failed, which it says.
    """
    assert keep >= 1, keep
    failure = f"checkpoint of step {step} was not saved in {directory}"
    mesh, rank = collectives.mesh, collectives.rank
    final = directory / step_folder(step)
    folder = final.with_name(f"{final.name}.tmp")

    def prepare() -> tuple[tuple[OwnedTensor, ...], dict[str, int]]:
        _plain_json(metadata, "metadata")  # refused before anything is written
        owned = owned_tensors(tensors, mesh.coordinate(rank), mesh)
        if rank == 0:
            start_folder(directory, step)
        num_bytes = sum(tensor.num_bytes for tensor in owned)
        return owned, {"step": step, "num_bytes": num_bytes, "free_bytes": _free_bytes(directory)}

    def write() -> tuple[None, dict[str, Any]]:
        table = write_rank_files(folder, rank, owned)
        return None, {**table.to_json(), "rank_metadata": _plain_json(rank_metadata, "rank_metadata")}

    def commit() -> tuple[None, None]:
        if rank == 0:
            tables = [RankTable.from_json(item) for item in written]
            rank_values = tuple(item["rank_metadata"] for item in written)
            plain = _plain_json(metadata, "metadata")
            manifest = _merge(Manifest(step, mesh.sizes, plain, rank_values, (), ()), tables)
            _write_manifest(folder, manifest)
            commit_folder(folder)
        return None, None

    def clean() -> tuple[None, None]:
        if rank == 0:
            remove_leftovers(directory)
            rotate(directory, keep, final)
        return None, None

    try:
        owned, reports = all_or_none(collectives, failure, prepare, consequence=_CONSEQUENCE)
        _check_reports(reports, directory, failure)
        _, written = all_or_none(collectives, failure, write, consequence=_CONSEQUENCE)
        all_or_none(collectives, failure, commit, consequence=_CONSEQUENCE)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    remaining = f"checkpoint of step {step} was saved in {directory}, but older ones were not removed"
    all_or_none(collectives, remaining, clean)
    return final


def _check_reports(reports: list[Any], directory: Path, failure: str) -> None:
    steps = sorted({report["step"] for report in reports})
    if len(steps) > 1:
        raise CheckpointError(f"checkpoint was not saved in {directory}: ranks are at different steps {steps}")
    total = sum(report["num_bytes"] for report in reports)
    free = reports[0]["free_bytes"]  # measured after the first rank has removed leftovers
    if free < _SPACE_FACTOR * total:
        raise CheckpointError(
            f"{failure}: no space left: need {_size_text(_SPACE_FACTOR * total)} ({_SPACE_FACTOR} times the data), "
            f"have {_size_text(free)}: free some space or set checkpoint.directory to another disk{_CONSEQUENCE}"
        )


def _free_bytes(directory: Path) -> int:
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _size_text(num_bytes: float) -> str:
    return f"{num_bytes:.0f} bytes" if num_bytes < 1e5 else f"{num_bytes / 1e6:.1f} MB"


def _merge(empty: Manifest, tables: list[RankTable]) -> Manifest:
    """One manifest of all ranks' tables. Errors: CheckpointError where ranks disagree about a tensor or leave elements unwritten."""
    files: list[FileEntry] = []
    tensors: dict[tuple[str, str], TensorEntry] = {}
    for table in tables:
        for entry in table.tensors:
            chunks = tuple(replace(chunk, file=chunk.file + len(files)) for chunk in entry.chunks)
            first = tensors.setdefault((entry.kind, entry.full_name), replace(entry, chunks=()))
            if (first.dtype, first.shape) != (entry.dtype, entry.shape):
                here, there = (f"{item.dtype} {list(item.shape)}" for item in (first, entry))
                raise CheckpointError(f"{entry.title} is {here} on one rank and {there} on another")
            tensors[entry.kind, entry.full_name] = replace(first, chunks=first.chunks + chunks)
        files += table.files
    return replace(empty, files=tuple(files), tensors=tuple(tensors.values()))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes and syncs the manifest, last of the folder's files, after reading back that it would be accepted."""
    data = encode_manifest(manifest)
    validate_manifest(json.loads(data)["content"])
    with open(folder / MANIFEST_NAME, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def _plain_json(value: object, path: str) -> Any:
    """The value as dicts, lists and plain values. Refused: other types, and keys that are not strings, which JSON would change."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{path}: the key {key!r} is not a string, so JSON cannot hold it")
        return {key: _plain_json(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if value is not None and type(value) not in (bool, int, float, str):
        raise CheckpointError(f"{path}: a {type(value).__name__} is not a JSON value")
    return value
