"""Cutting this rank's share of a step into microbatches, and which global samples they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_core.errors import ColossalError
from colossal_core.mesh import DATA_AXES, SAME_BATCH_AXES, WORLD

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import BatchPlan


def to_device(
    batch: Mapping[str, torch.Tensor], device: torch.device, dtype_of: Callable[[str], torch.dtype]
) -> dict[str, torch.Tensor]:
    """The batch on the device, each floating tensor in the dtype of its key. A copy to a GPU leaves from pinned memory: from any other
    it would first wait for all work on the stream, the last step's.
    """
    moved = {}
    for key, value in batch.items():
        target = dtype_of(key) if value.is_floating_point() else value.dtype
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        moved[key] = value.to(device=device, dtype=target, non_blocking=True)
    return moved


def check_not_empty(batch: Mapping[str, torch.Tensor]) -> None:
    """Raises ColossalError for a batch without a tensor, or with something else than tensors that have a first dimension."""
    if not batch:
        raise ColossalError("batch: is empty: a batch is a mapping of tensors, the forward's keyword arguments")
    values: Mapping[str, object] = batch  # a user's batch may hold anything
    for key, value in values.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            found = "a 0-d tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            message = f"batch.{key}: is {found}: every value is a tensor whose first dimension is the sequences; leave out the rest"
            raise ColossalError(message)


def check_share(batch: Mapping[str, torch.Tensor], plan: BatchPlan) -> None:
    """Raises ColossalError unless every tensor's first dimension is this rank's share of the step."""
    check_not_empty(batch)
    for key, value in batch.items():
        size = value.shape[0]
        if size != plan.share:
            message = (
                f"batch.{key}: has {size} sequences, and this rank's share of batch.global_size={plan.global_size} is {plan.share}: "
                "take batches from booster.dataloader, or change batch.global_size"
            )
            raise ColossalError(message)


def check_same(batch: Mapping[str, torch.Tensor], collectives: Collectives) -> None:
    """Raises ColossalError, on every rank, where ranks that work on the same sequences were given different ones: they would train on a
    mixture of them, and no shape would tell.

    Communication: one gather of 16 bytes over all ranks, where the mesh has such an axis. Synchronises with the host.
    """
    mesh = collectives.mesh
    axes = [axis for axis in SAME_BATCH_AXES if mesh.size(axis) > 1]
    if not axes:
        return
    seen: dict[int, bytes] = {}
    for rank, found in enumerate(collectives.gather_bytes(_digest(batch), WORLD, tag="batch")):
        if seen.setdefault(mesh.flat_index(mesh.coordinate(rank), DATA_AXES), found) != found:
            message = (
                f"batch: ranks that differ only in {' or '.join(axes)} got different sequences: "
                "give them the same batch (booster.dataloader does)"
            )
            raise ColossalError(message)


def _digest(batch: Mapping[str, torch.Tensor]) -> bytes:
    """16 bytes of every key, dtype, shape and value."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(batch.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def cut(batch: Mapping[str, torch.Tensor], index: int, micro_size: int) -> dict[str, torch.Tensor]:
    """The index-th microbatch: views of `micro_size` sequences."""
    return {key: value[index * micro_size : (index + 1) * micro_size] for key, value in batch.items()}


def sample_ids(plan: BatchPlan, data_index: int, microbatch: int, device: torch.device) -> torch.Tensor:
    """Indices within the global batch of a microbatch's sequences: [micro_size] int64. Rank d holds samples [d * share, (d+1) * share)."""
    first = first_sample(plan, data_index, microbatch)
    return torch.arange(first, first + plan.micro_size, device=device)


def first_sample(plan: BatchPlan, data_index: int, microbatch: int) -> int:
    """Index within the global batch of a microbatch's first sequence."""
    return data_index * plan.share + microbatch * plan.micro_size


@dataclass(frozen=True)
class InputCut:
    """Inputs split along one dimension over mesh axes (a sequence over `cp`). dims: the dimension of each batch key that has it.

    chunks: the dimension is `num_chunks` equal chunks; the rank at flat coordinate i over `axes` holds `chunks[i]`, in that order. Two
    chunks a rank, one from each end, balance a causal attention.
    """

    dims: tuple[tuple[str, int], ...]
    axes: tuple[str, ...]
    num_chunks: int
    chunks: tuple[tuple[int, ...], ...]


def take_part(
    batch: Mapping[str, torch.Tensor], cuts: Sequence[InputCut], coordinate: Mapping[str, int], mesh: MeshLayout
) -> dict[str, torch.Tensor]:
    """This rank's part of every key that a cut names; the others as they are. No communication: ranks of `axes` got the same batch.

    Raises: ColossalError when a dimension is not a multiple of the number of chunks.
    """
    found = dict(batch)
    for cut_ in cuts:
        held = cut_.chunks[mesh.flat_index(coordinate, cut_.axes)]
        for key, dim in cut_.dims:
            if key not in found:
                continue
            size = found[key].shape[dim]
            if size % cut_.num_chunks:
                message = (
                    f"batch.{key}: dimension {dim} has {size} elements, which {cut_.num_chunks} chunks over {' x '.join(cut_.axes)} do not "
                    f"divide: pad it to {-(-size // cut_.num_chunks) * cut_.num_chunks}"
                )
                raise ColossalError(message)
            pieces = found[key].chunk(cut_.num_chunks, dim)
            found[key] = torch.cat([pieces[chunk] for chunk in held], dim)
    return found
