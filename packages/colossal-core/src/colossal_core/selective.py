"""Which outputs of a block are worth keeping: measured once, then decided by floating-point operations per byte.

Keeping the outputs of the operations that cost most for their bytes, and computing all others again, is selective activation
recomputation (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"), here for any block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from colossal_core._torch_private import OpOverload, TorchDispatchMode, is_view_op, packet_of
from colossal_core.dataflow import tensors_in


@dataclass(frozen=True)
class Operation:
    """One call of an operator in a block's forward pass. ordinal: how many calls of the same operator came before. flops: of this call;
    output_bytes: what keeping its outputs takes.
    """

    op: OpOverload
    ordinal: int
    flops: int
    output_bytes: int

    @property
    def flops_per_byte(self) -> float:
        return self.flops / max(self.output_bytes, 1)


@dataclass(frozen=True)
class BlockTrace:
    """What one forward pass of a block did. operations: the expensive ones, in order. activation_bytes: what autograd keeps of it for the
    backward pass when nothing is recomputed, beyond the block's parameters and inputs. num_calls: of every operator that was called.
    """

    operations: tuple[Operation, ...]
    activation_bytes: int
    num_calls: tuple[tuple[OpOverload, int], ...]


@dataclass(frozen=True)
class Decision:
    """The calls whose outputs are kept, as (operator, ordinal), and the operators of which every call is kept."""

    calls: frozenset[tuple[OpOverload, int]]
    whole_operators: frozenset[OpOverload]
    kept_bytes: int


def decide(trace: BlockTrace, memory_budget: float) -> Decision:
    """Keeps operations in descending order of FLOPs per byte, earlier ones first, as long as they fit the budget.

    memory_budget: share of `trace.activation_bytes`, in [0, 1].
    """
    left = math.floor(memory_budget * trace.activation_bytes)
    calls = set()
    kept_bytes = 0
    for operation in sorted(trace.operations, key=lambda operation: -operation.flops_per_byte):
        if kept_bytes + operation.output_bytes <= left:
            calls.add((operation.op, operation.ordinal))
            kept_bytes += operation.output_bytes
    kept = Counter(op for op, _ in calls)
    whole = frozenset(op for op, count in trace.num_calls if kept[op] == count)
    return Decision(frozenset(calls), whole, kept_bytes)


class Policy:
    """A decision as torch asks for it, for one forward pass and its recomputation: calls of an operator are told apart by counting."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision
        self._counts: Counter[tuple[OpOverload, bool]] = Counter()

    def __call__(self, context: Any, op: OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
        key = (op, bool(context.is_recompute))
        ordinal = self._counts[key]
        self._counts[key] += 1
        keep = (op, ordinal) in self._decision.calls
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def trace_block(forward: Callable[[], object], block: nn.Module, inputs: Iterable[Tensor]) -> BlockTrace:
    """Runs `forward` once, with gradients recorded and thrown away, and measures it.

    The block must run on its real device: which attention kernel is chosen depends on it. Memory: one block's activations.
    """
    known = {_storage(tensor) for tensor in (*block.parameters(), *block.buffers(), *inputs)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, _identity),
        torch.enable_grad(),
        OperationRecorder() as recorder,
    ):
        outputs = forward()
    del outputs
    return BlockTrace(tuple(recorder.operations), sum(saved.values()), tuple(recorder.counts.items()))


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator with a flop formula below autograd: where selective checkpointing will meet it again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.counts: Counter[OpOverload] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        ordinal = self.counts[func]
        self.counts[func] += 1
        flops = 0 if is_view_op(func) else _flops(func, args, kwargs, out)
        if flops:
            output_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(out))
            self.operations.append(Operation(func, ordinal, flops, output_bytes))
        return out


def _flops(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> int:
    """Floating-point operations of one call, by torch's formula; for attention kernels without one, those of its two products."""
    packet = packet_of(op)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    name = str(packet).rpartition(".")[2]
    if name.startswith("_scaled_dot_product") and len(args) >= 3:
        query, key, value = args[:3]  # [B, H, S, D]
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return int(2 * pairs * (query.shape[-1] + value.shape[-1]))
    if name == "_grouped_mm":
        rows, weights = args[:2]  # [T, D] x [E, D, F]: every row meets one expert
        return int(2 * math.prod(rows.shape) * weights.shape[-1])
    return 0
