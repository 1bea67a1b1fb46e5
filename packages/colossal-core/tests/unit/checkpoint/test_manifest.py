"""The manifest is read as if an enemy had written it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_core.checkpoint import find_latest, load, read_manifest, save
from colossal_core.checkpoint.manifest import Chunk, TensorEntry
from colossal_core.checkpoint.manifest_file import NewerVersionError
from colossal_core.checkpoint.read import ChunkIndex
from colossal_core.collectives import SingleProcess
from colossal_core.errors import CheckpointError


@pytest.fixture
def alone() -> SingleProcess:
    return SingleProcess(torch.device("cpu"))


@pytest.fixture
def path(tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess) -> Path:
    return save(tmp_path, 1, lay(state_of(1), alone), {"seed": 1}, alone, keep=1)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the content and makes the checksum right again."""
    content = json.loads((path / "manifest.json").read_bytes())["content"]
    change(content)
    write_content(path, json.dumps(content).encode())


def write_content(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(b'{"crc32":"%08x","content":' % zlib.crc32(content) + content + b"}\n")


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        function()
    return str(caught.value)


def set_at(*keys: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


CHUNK = ("tensors", 0, "chunks", 0)
WHOLE = "is not a whole number from 0 to 9223372036854775807"
PLAIN = "is not a plain name such as rank-00000.safetensors"
EVIL = {
    "format": (set_at("format", value="other"), "format is not 'colossal-checkpoint'"),
    "extra key": (
        set_at("code", value="import os"),
        "content is not an object of format, version, step, mesh, metadata, rank_metadata, files, tensors",
    ),
    "step": (set_at("step", value=-1), f"step {WHOLE}"),
    "true": (set_at("step", value=True), f"step {WHOLE}"),
    "huge": (set_at("step", value=1 << 63), f"step {WHOLE}"),
    "float": (set_at("step", value=1.0), f"step {WHOLE}"),
    "mesh": (
        set_at("mesh", value=[1, 1, 0, 1, 1]),
        "mesh is not one positive size for each of pp, dp_replicate, dp_shard, cp, tp",
    ),
    "ranks": (set_at("rank_metadata", value=[]), "rank_metadata has 0 items for 1 ranks"),
    "metadata": (set_at("metadata", value=[]), "metadata is not an object"),
    "files": (set_at("files", value={}), "files is not a list"),
    "traversal": (set_at("files", 0, "name", value="../../etc/passwd"), f"files[0].name {PLAIN}"),
    "absolute": (set_at("files", 0, "name", value="/etc/passwd"), f"files[0].name {PLAIN}"),
    "newline": (set_at("files", 0, "name", value="rank-00000.safetensors\n"), f"files[0].name {PLAIN}"),
    "header": (
        set_at("files", 0, "header_bytes", value=1000000),
        "files[0].header_bytes is not a whole number from 0 to 408",
    ),
    "twice": (lambda content: content["files"].append(content["files"][0]), "files names a file twice"),
    "tensor twice": (lambda content: content["tensors"].append(content["tensors"][0]), "tensors names a tensor twice"),
    "control": (
        set_at("tensors", 0, "full_name", value="\x1b[2J"),
        "tensors[0].full_name is not a printable name of at most 4096 characters",
    ),
    "dtype": (
        set_at("tensors", 0, "dtype", value="load"),
        "tensors[0].dtype is not one of float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int64, int32, int16, "
        "int8, uint64, uint32, uint16, uint8, bool",
    ),
    "shape": (set_at("tensors", 0, "shape", value=[1 << 40, 1 << 40]), "tensors[0].shape is too large"),
    "holes": (
        set_at("tensors", 0, "chunks", value=[]),
        "tensors[0] parameter of weight: the chunks hold 0 of 24 elements",
    ),
    "file index": (set_at(*CHUNK, "file", value=1), "tensors[0].chunks[0].file is not a whole number from 0 to 0"),
    "outside file": (
        set_at(*CHUNK, "offset", value=1 << 40),
        "tensors[0].chunks[0] lies outside the data of rank-00000.safetensors",
    ),
    "in header": (
        set_at(*CHUNK, "offset", value=0),
        "tensors[0].chunks[0] lies outside the data of rank-00000.safetensors",
    ),
    "dimensions": (set_at(*CHUNK, "starts", value=[0]), "tensors[0].chunks[0] has not the 2 dimensions of its tensor"),
    "outside": (
        set_at(*CHUNK, "starts", value=[1, 0]),
        "tensors[0].chunks[0] is not a box inside its tensor of shape [4, 6]",
    ),
    "checksum": (
        set_at(*CHUNK, "crc32", value=1 << 32),
        "tensors[0].chunks[0].crc32 is not a whole number from 0 to 4294967295",
    ),
}


@pytest.mark.parametrize("evil", EVIL)
def test_a_field_out_of_bounds_is_named(path: Path, evil: str) -> None:
    change, reason = EVIL[evil]
    rewrite(path, change)
    assert message_of(lambda: read_manifest(path)) == f"checkpoint step-00000001: manifest.json is not valid: {reason}"


def test_json_that_is_too_deep_or_none_at_all_is_refused(path: Path) -> None:
    write_content(path, b"[" * 1000000)
    assert message_of(lambda: read_manifest(path)).startswith("checkpoint step-00000001: manifest.json is not JSON: ")
    write_content(path, b"1" * 10000)
    assert message_of(lambda: read_manifest(path)).startswith("checkpoint step-00000001: manifest.json is not JSON: ")


def test_a_newer_format_is_told_and_never_passed_over(path: Path, alone: SingleProcess) -> None:
    rewrite(path, set_at("version", value=2))
    reason = (
        "checkpoint step-00000001: manifest.json is in format version 2; this colossal-core reads versions up to 1: "
        "upgrade colossal-core"
    )
    with pytest.raises(NewerVersionError) as caught:
        read_manifest(path)
    assert str(caught.value) == reason
    with pytest.raises(NewerVersionError) as caught:
        find_latest(path.parent, alone)
    assert str(caught.value) == f"no checkpoint was taken from {path.parent}: {reason}"


def test_no_checkpoint_at_a_path_is_told(tmp_path: Path) -> None:
    assert message_of(lambda: read_manifest(tmp_path / "step-00000009")) == "checkpoint step-00000009: no manifest.json"
    (tmp_path / "manifest.json").mkdir()
    assert (
        message_of(lambda: read_manifest(tmp_path))
        == f"checkpoint {tmp_path.name}: manifest.json is not a regular file"
    )


def test_chunks_that_overlap_are_noticed(path: Path, state_of: Any, lay: Any, alone: SingleProcess) -> None:
    def overlap(content: dict[str, Any]) -> None:
        whole = content["tensors"][0]["chunks"][0]
        content["tensors"][0]["chunks"] = [{**whole, "starts": [row, 0], "sizes": [2, 6]} for row in (0, 1)]

    rewrite(path, overlap)
    assert message_of(lambda: load(path, lay(state_of(1), alone), alone)) == (
        f"checkpoint {path} was not loaded: checkpoint step-00000001: manifest.json is not valid: tensors[0] parameter of weight: "
        "two chunks hold the same elements"
    )


def test_the_index_finds_the_same_chunks_as_a_search_through_all() -> None:
    boxes = [((row, column), (2 if row else 3, 2)) for row in (0, 3, 5, 7) for column in (0, 2, 4)]
    chunks = tuple(Chunk(0, number, starts, sizes, 0) for number, (starts, sizes) in enumerate(reversed(boxes)))
    index = ChunkIndex(TensorEntry("parameter", "weight", "float32", (9, 6), chunks))
    for low in range(9):
        for high in range(low + 1, 10):
            found = {chunk.offset for chunk in index.overlapping((low, 3), (high - low, 2))}
            rows = set(range(low, high))
            expected = {
                chunk.offset
                for chunk in chunks
                if rows & set(range(chunk.starts[0], chunk.stops[0]))
                and {3, 4} & set(range(chunk.starts[1], chunk.stops[1]))
            }
            assert found == expected
