"""The folders of a run's checkpoints: their names, how one takes its place at once, and which are removed.

`step-00000042` is complete. `*.tmp` is being written or removed, or was left so by a run that died; it is never read, and the next save
removes it. `step-00000042.old` is a complete checkpoint that another of the same step was about to replace; it counts only where
`step-00000042` is missing, which is the case when a run died between two renames.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from colossal_core.checkpoint.manifest_file import read_manifest
from colossal_core.errors import CheckpointError

_FINAL = re.compile(r"step-([0-9]{8,})(\.old)?")
_LEFTOVER = re.compile(r"step-[0-9]{8,}(\.old)?\.tmp")


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def candidates(directory: Path) -> list[tuple[int, str]]:
    """(step, folder name) of every checkpoint with a final name, newest first; nothing is opened. No directory: none."""
    if not directory.is_dir():
        return []
    found: dict[int, str] = {}
    for entry in sorted(directory.iterdir()):  # a plain name comes before its `.old`
        match = _FINAL.fullmatch(entry.name)
        if match and entry.is_dir():
            found.setdefault(int(match[1]), entry.name)
    return sorted(found.items(), reverse=True)


def start_folder(directory: Path, step: int) -> Path:
    """The empty folder to write into; the directory is made where missing, and leftovers of earlier runs are removed."""
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    folder = directory / f"{step_folder(step)}.tmp"
    folder.mkdir()
    return folder


def remove_leftovers(directory: Path) -> None:
    """Removes what a dead run left half written, and replaced checkpoints whose replacement is in place."""
    for entry in sorted(directory.iterdir()):
        match = _FINAL.fullmatch(entry.name)
        replaced = match is not None and match[2] is not None and (directory / step_folder(int(match[1]))).is_dir()
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry)
        elif replaced:
            _remove(entry)


def commit_folder(folder: Path) -> None:
    """Gives a synced `.tmp` folder its final name. Where there is one of that step, it can be found until the new one takes its place."""
    final = folder.with_name(folder.name.removesuffix(".tmp"))
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        if old.exists():
            _remove(old)
        os.rename(final, old)
    os.rename(folder, final)
    sync_folder(final.parent)


def rotate(directory: Path, keep: int, newest: Path) -> None:
    """Removes the older ones of the complete checkpoints, so that `keep` are left; `newest`, just written, always stays.

    Complete: the manifest is valid and every file has its size. A damaged one is not counted, so that it never pushes out a good one.
    """
    good = 0
    for _, name in candidates(directory):
        folder = directory / name
        if folder == newest:
            good += 1
        elif is_complete(folder):
            good += 1
            if good > keep:
                _remove(folder)
        elif good >= keep:
            _remove(folder)


def is_complete(folder: Path) -> bool:
    """Whether the manifest is valid and every file that it names is there with its size."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return all(file_bytes(folder / file.name) == file.num_bytes for file in manifest.files)


def file_bytes(file: Path) -> int | None:
    """Size of a regular file; None where it is missing or something else (a link, a pipe)."""
    return file.stat(follow_symlinks=False).st_size if file.is_file() and not file.is_symlink() else None


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; a run that dies on the way leaves a `.tmp`, never half a checkpoint."""
    doomed = folder.with_name(f"{folder.name}.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
