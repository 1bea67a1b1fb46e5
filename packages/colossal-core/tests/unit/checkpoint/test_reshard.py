"""What is saved on one mesh comes back bit for bit on any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from colossal_core.checkpoint import describe, load, read_full, read_manifest, save
from colossal_core.checkpoint import write as write_module
from colossal_core.collectives import Collectives, SingleProcess
from colossal_core.mesh import MeshLayout

RunRanks = Callable[[MeshLayout, Callable[[Collectives], Any]], list[Any]]
METADATA: dict[str, object] = {"position": {"sample": 640}, "loss": float("inf"), "names": ("a", "b")}
READ_BACK = {"position": {"sample": 640}, "loss": float("inf"), "names": ["a", "b"]}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.fixture(params=[(1, 1, 4, 1, 1), (1, 2, 2, 1, 2), (3, 1, 2, 1, 1), (1, 1, 1, 1, 1)], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path: Path, items: Any, lay: Any, run_ranks: RunRanks) -> Path:
    mesh = MeshLayout(request.param)
    paths = run_ranks(mesh, lambda ranks: save(tmp_path, 42, lay(items, ranks), METADATA, ranks, keep=2))
    assert set(paths) == {tmp_path / "step-00000042"}
    return tmp_path / "step-00000042"


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 4, 1, 1), (1, 1, 2, 1, 1), (1, 1, 3, 1, 1), (2, 1, 2, 1, 1), (1, 1, 1, 1, 1), (1, 1, 2, 2, 2)],
    ids=str,
)
def test_every_tensor_comes_back_on_every_mesh(
    saved: Path, sizes: tuple[int, int, int, int, int], items: Any, lay: Any, run_ranks: RunRanks
) -> None:
    def read(ranks: Collectives) -> bool:
        found = lay(items, ranks, blank=True)
        assert load(saved, found, ranks) == READ_BACK
        # The expected tensors start as the same padding, so padding that was overwritten would show.
        return all(same_bits(tensor.local, right.local) for tensor, right in zip(found, lay(items, ranks), strict=True))

    assert all(run_ranks(MeshLayout(sizes), read))


def test_whole_tensors_are_read_and_the_files_are_safetensors(saved: Path, items: Any) -> None:
    for item in items:
        assert same_bits(read_full(saved, item.kind, item.full_name), item.full)
    manifest = read_manifest(saved)
    assert sum(len(tensor.chunks) for tensor in manifest.tensors) > len(items) - 2
    for index, file in enumerate(manifest.files):
        with safe_open(saved / file.name, "pt") as opened:
            keys = set(opened.keys())
            for tensor in manifest.tensors:
                for chunk in (chunk for chunk in tensor.chunks if chunk.file == index):
                    key = tensor.chunk_title(chunk)
                    keys.remove(key)
                    box = tuple(slice(start, stop) for start, stop in zip(chunk.starts, chunk.stops, strict=True))
                    assert same_bits(
                        opened.get_tensor(key), read_full(saved, tensor.kind, tensor.full_name)[box].clone()
                    )
            assert not keys


def test_each_element_is_written_once_by_its_owner(saved: Path) -> None:
    manifest = read_manifest(saved)
    for tensor in manifest.tensors:
        counts = torch.zeros(tensor.shape, dtype=torch.int64)
        for chunk in tensor.chunks:
            counts[tuple(slice(start, stop) for start, stop in zip(chunk.starts, chunk.stops, strict=True))] += 1
        assert bool((counts == 1).all())


def test_large_pieces_are_split_into_chunks_and_files(
    tmp_path: Path, items: Any, lay: Any, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "CHUNK_BYTES", 32)
    monkeypatch.setattr(write_module, "FILE_BYTES", 1000)
    mesh = MeshLayout((1, 1, 2, 1, 2))
    path = run_ranks(mesh, lambda ranks: save(tmp_path, 1, lay(items, ranks), {}, ranks, keep=1))[0]
    manifest = read_manifest(path)
    assert "rank-00000.safetensors" in {file.name for file in manifest.files}
    assert "rank-00000-2.safetensors" in {file.name for file in manifest.files}
    assert max(file.num_bytes - file.header_bytes for file in manifest.files) <= 1000
    assert max(tensor.chunk_bytes(chunk) for tensor in manifest.tensors for chunk in tensor.chunks) <= 32
    for item in items:
        assert same_bits(read_full(path, item.kind, item.full_name), item.full)

    def read(ranks: Collectives) -> bool:
        found = lay(items, ranks, blank=True)
        load(path, found, ranks)
        return all(same_bits(tensor.local, right.local) for tensor, right in zip(found, lay(items, ranks), strict=True))

    assert all(run_ranks(MeshLayout((1, 1, 3, 1, 1)), read))


def test_only_chunks_that_meet_a_local_piece_are_read(
    tmp_path: Path, state_of: Any, lay: Any, run_ranks: RunRanks
) -> None:
    mesh = MeshLayout((1, 1, 4, 1, 1))
    path = run_ranks(mesh, lambda ranks: save(tmp_path, 1, lay(state_of(1), ranks), {}, ranks, keep=1))[0]
    for rank in (2, 3):
        (path / f"rank-{rank:05d}.safetensors").unlink()

    def first_half(ranks: Collectives) -> None:
        if ranks.rank == 0:
            local = lay(state_of(1), ranks, blank=True)
            load(path, local, SingleProcessOf(ranks))
            assert torch.equal(local[0].local, 1000 + torch.arange(12.0))

    run_ranks(MeshLayout((1, 1, 2, 1, 1)), first_half)


class SingleProcessOf(SingleProcess):
    """Rank 0 of a mesh whose other ranks do nothing."""

    def __init__(self, ranks: Collectives) -> None:
        super().__init__(torch.device("cpu"))
        self.mesh = ranks.mesh


def test_dtypes_are_converted_only_when_allowed(tmp_path: Path, state_of: Any, lay: Any) -> None:
    ranks = SingleProcess(torch.device("cpu"))
    path = save(tmp_path, 1, lay(state_of(1), ranks), {}, ranks, keep=1)
    found = lay(state_of(1), ranks, blank=True)
    for tensor in found:
        tensor.local = tensor.local.to(torch.float64)
    load(path, found, ranks, allow_cast=True)
    assert torch.equal(found[0].local, 1000 + torch.arange(24.0, dtype=torch.float64))


def test_parameters_that_need_gradients_are_overwritten_in_place(tmp_path: Path, state_of: Any, lay: Any) -> None:
    ranks = SingleProcess(torch.device("cpu"))
    path = save(tmp_path, 1, lay(state_of(1), ranks), {}, ranks, keep=1)
    found = lay(state_of(1), ranks, blank=True)
    for tensor in found:
        tensor.local = torch.nn.Parameter(tensor.local)
    load(path, found, ranks)
    assert torch.equal(found[0].local.detach(), 1000 + torch.arange(24.0))


def test_what_a_rank_keeps_for_itself_comes_back_on_the_same_mesh_only(
    tmp_path: Path, state_of: Any, lay: Any, run_ranks: RunRanks
) -> None:
    mesh = MeshLayout((1, 1, 2, 1, 1))
    path = run_ranks(
        mesh,
        lambda ranks: save(tmp_path, 1, lay(state_of(1), ranks), {}, ranks, keep=1, rank_metadata={"rank": ranks.rank}),
    )[0]
    manifest = read_manifest(path)
    assert [manifest.rank_metadata_for(mesh.sizes, rank) for rank in range(2)] == [{"rank": 0}, {"rank": 1}]
    assert manifest.rank_metadata_for((1, 2, 1, 1, 1), 0) is None


def test_the_description_is_a_table(tmp_path: Path, state_of: Any, lay: Any, run_ranks: RunRanks) -> None:
    mesh = MeshLayout((1, 1, 2, 1, 1))
    path = run_ranks(mesh, lambda ranks: save(tmp_path, 7, lay(state_of(1), ranks), {}, ranks, keep=1))[0]
    assert describe(path) == (
        "step 7, written by 2 ranks, 2 files, 2 tensors, 192 bytes\n"
        "kind           full name  dtype    shape  chunks  bytes\n"
        "parameter      weight     float32  4x6         2     96\n"
        "adamw.exp_avg  weight     float32  4x6         2     96"
    )
