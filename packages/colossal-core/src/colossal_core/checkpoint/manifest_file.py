"""Reading `manifest.json`: its checksum, its version, then field by field as untrusted input (`validate`)."""

from __future__ import annotations

import json
import re
import stat
import zlib
from pathlib import Path

from colossal_core.checkpoint.manifest import MANIFEST_NAME, TAIL, VERSION, Manifest
from colossal_core.checkpoint.validate import validate_manifest
from colossal_core.errors import CheckpointError

MAX_MANIFEST_BYTES = 1 << 30
"""Larger manifests are refused unread; 405 billion parameters with AdamW in chunks of 64 MiB need about 15 MB."""

_HEAD = re.compile(rb'\{"crc32":"([0-9a-f]{8})","content":')


class NewerVersionError(CheckpointError):
    """A checkpoint in a format that this version cannot read. It is never passed over in favour of an older checkpoint."""


def decode_manifest(data: bytes) -> Manifest:
    """The manifest of `manifest.json`'s bytes, checked against its checksum and then field by field. Errors: CheckpointError."""
    head = _HEAD.match(data)
    if head is None or not data.endswith(TAIL):
        raise CheckpointError(f"{MANIFEST_NAME} is truncated or is not a manifest")
    content = memoryview(data)[head.end() : len(data) - len(TAIL)]
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
