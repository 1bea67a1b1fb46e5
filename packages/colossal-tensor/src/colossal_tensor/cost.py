"""What tensor parallelism sends, in closed form and to the byte (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2).

State and activations need no formula here: the table of a plan counts the local elements of its layouts, and activations are traced with
the plan on the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_comm.ledger import ring_bytes
from colossal_tensor.decided import NAME, Decided, read
from colossal_tensor.layouts import AXIS, Placed
from colossal_tensor.ranges import MOST_MESSAGES
from colossal_tensor.sequence import is_inside_whole

if TYPE_CHECKING:
    import numpy as np

    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.layout import ParameterLayout
    from colossal_core.plan import Plan
    from colossal_tensor.config import TensorConfig
    from colossal_tensor.group import Entry, Exit

Kind = tuple[tuple[str, ...], str, str]
"""Axes, operation and tag of calls, as the ledger has them."""


@dataclass(frozen=True)
class Microbatch:
    """What goes through the model at once: `sequences` of `positions` each. element_bytes: of an activation in the compute format."""

    sequences: int
    positions: int
    element_bytes: int

    def activation(self, features: int) -> int:
        """Bytes of [sequences, positions, features]."""
        return self.sequences * self.positions * features * self.element_bytes


@dataclass(frozen=True)
class Call:
    """One collective of a microbatch over tp. full_bytes: of the sum, or of what is gathered. recomputed: it runs again where the block
    around it is recomputed.
    """

    operation: str
    tag: str
    full_bytes: int
    recomputed: bool = False


def estimate_tensor(table: EstimateTable, profile: HardwareProfile, config: TensorConfig) -> EstimateTable:
    """Adds `bytes_tp` and, for a plan, the buffers of products that gather and scatter. For a plan's table it is exactly what the first
    rank sends along tp and axes made of it, where blocks are eager; for candidates of which nothing but sizes is known, that of blocks
    with attention and a feed-forward layer.
    """
    if table.plan is None or NAME not in table.plan.data:
        return table.adding("bytes_tp", _of_candidates(table, profile, config))
    import numpy as np

    batch = Microbatch(int(table.inputs["micro_size"][0]), table.model.sequence_length, profile.compute_element_bytes)
    count = int(table.inputs["num_microbatches"][0])
    again = bool(table.input("recompute", 0)[0]) or bool(table.plan.decisions.get("recompute"))
    sent = sent_bytes(table.plan, batch, count, profile.kept_gradient_bytes, recompute=again)
    table = table.adding("transient_bytes", np.full(len(table), float(_buffers(read(table.plan), batch))))
    return table.adding("bytes_tp", np.full(len(table), float(sum(sent.values()))))


def sent_bytes(
    plan: Plan, batch: Microbatch, num_microbatches: int, gradient_bytes: int, *, rank: int = 0, recompute: bool = False
) -> Mapping[Kind, int]:
    """Bytes that a rank sends in one step along tp and axes made of it, by axes, operation and tag.

    gradient_bytes: of one gradient element as it is kept. recompute: every block runs forward again in the backward pass. The gradient of
    what enters a group is counted at every entry: where nothing before it is trained (adapters, in the first block) none is sent.
    """
    decided, ranks = read(plan), plan.mesh.size(AXIS)
    found: Counter[Kind] = Counter()
    for call in microbatch_calls(decided, plan.layouts, batch, plan.block_names):
        times = num_microbatches * (2 if recompute and call.recomputed else 1)
        found[(AXIS,), call.operation, call.tag] += times * ring_bytes(call.operation, ranks, call.full_bytes)
    found.update(_once_a_step(plan, rank, gradient_bytes))
    return {kind: size for kind, size in found.items() if size}


def microbatch_calls(
    decided: Decided, layouts: Mapping[str, ParameterLayout], batch: Microbatch, blocks: Sequence[str] = ()
) -> Iterator[Call]:
    """Every collective of the forward and the backward pass of one microbatch."""
    names = {alias: layout for layout in layouts.values() for alias in (layout.full_name, *layout.aliases)}
    counter = _Counter(decided, names, batch)
    yield from counter.groups(blocks)
    yield from counter.vocabulary()
    yield from counter.stream()


class _Counter:
    """The calls of one microbatch."""

    def __init__(self, decided: Decided, layouts: Mapping[str, ParameterLayout], batch: Microbatch) -> None:
        self._plan, self._cutting, self._width = decided.plan, decided.cutting, decided.width
        self._products = frozenset(decided.products)
        self._layouts, self._batch = layouts, batch

    def groups(self, blocks: Sequence[str]) -> Iterator[Call]:
        """Entries and exits. The last sum of a block is not made again: nothing in the block needs it for the backward pass."""
        last = {_block_of(placed.group.name, blocks): placed for placed in self._cutting.placed}
        for placed in self._cutting.placed:
            block = _block_of(placed.group.name, blocks)
            for entry in placed.group.entries:
                yield from self._entry(placed, entry, inside=bool(block))
            for exit_ in placed.group.exits:
                yield from self._exit(placed, exit_, inside=bool(block), is_last=last[block] is placed)

    def _is_cut(self, placed: Placed) -> bool:
        stream = self._plan.stream
        return stream is not None and not is_inside_whole(stream, placed.group.name)

    def _entry(self, placed: Placed, entry: Entry, *, inside: bool) -> Iterator[Call]:
        size = self._batch.activation(self._entering(placed, entry))
        if not self._is_cut(placed):
            yield from [Call("all_reduce", "tensor entry", size)] * len(entry.arguments)
            return
        fused = bool(entry.columns) and self._products.issuperset(entry.columns)
        if fused:
            yield Call("all_gather", "tensor", size, inside)
            yield Call("reduce_scatter", "tensor", size)
            if any(self._is_trained(f"{column}.weight") for column in entry.columns):
                yield Call("all_gather", "tensor", size)  # the whole input again, for the gradients of weights
        for _ in entry.arguments[int(fused) :]:
            yield Call("all_gather", "tensor entry", size, inside)
            yield Call("reduce_scatter", "tensor entry", size)

    def _exit(self, placed: Placed, exit_: Exit, *, inside: bool, is_last: bool) -> Iterator[Call]:
        size = self._batch.activation(self._leaving(placed, exit_))
        again = inside and not is_last
        if exit_.gathers:
            yield Call("all_gather", "tensor exit", size, again)
            if self._is_cut(placed):
                yield Call("all_gather", "tensor exit", size)
        elif not self._is_cut(placed):
            yield Call("all_reduce", "tensor exit", size, again)
        else:
            fused = exit_.module in self._products
            tag = "tensor" if fused else "tensor exit"
            yield Call("reduce_scatter", tag, size, inside if fused else again)
            yield Call("all_gather", tag, size)

    def _entering(self, placed: Placed, entry: Entry) -> int:
        """Features of what enters: what the columns' weights multiply, else those of the stream."""
        cuts = {cut.parameter: cut.dim for cut in placed.group.cuts}
        for module in (*entry.columns, entry.module):
            weight = f"{module}.weight"
            if weight in cuts and len(self._layouts[weight].shape) == 2:
                return self._layouts[weight].shape[1 - cuts[weight]]
        return self._width

    def _leaving(self, placed: Placed, exit_: Exit) -> int:
        """Features of what leaves: what the last weight makes, else those of the stream."""
        weight = f"{exit_.module}.weight"
        for cut in placed.group.cuts:
            if cut.parameter == weight and len(self._layouts[weight].shape) == 2:
                return self._layouts[weight].shape[cut.dim if exit_.gathers else 1 - cut.dim]
        return self._width

    def _is_trained(self, name: str) -> bool:
        return name in self._layouts and self._layouts[name].trainable

    def vocabulary(self) -> Iterator[Call]:
        """The sum of embeddings, the sum of the gradient of the head's input, and the loss's numbers or the gathered logits."""
        vocabulary, batch = self._plan.vocabulary, self._batch
        if vocabulary.embedding:
            features = self._layouts[f"{vocabulary.embedding}.weight"].shape[1]
            yield Call("all_reduce", "embedding", batch.activation(features))
        if not vocabulary.head:
            return
        stream = self._plan.stream
        if stream is None or all(entry.module != vocabulary.head for entry in stream.gathered_at):
            yield Call("all_reduce", "head", batch.activation(self._layouts[f"{vocabulary.head}.weight"].shape[1]))
        if vocabulary.gathered:
            words = len(self._cutting.words) * self._cutting.padded_words
            yield Call("all_gather", "logits", batch.activation(words))
            return
        rows = batch.sequences * batch.positions * max(batch.element_bytes, 4)
        yield Call("all_reduce", "loss", rows)
        yield Call("all_reduce", "loss", 2 * rows)

    def stream(self) -> Iterator[Call]:
        """Where the sequence is cut and made whole."""
        stream = self._plan.stream
        if stream is None:
            return
        size = self._batch.activation(self._width)
        both_ways = sum(len(entry.arguments) for entry in stream.entries) + len(stream.exits)
        yield from [Call("all_gather", "sequence", size)] * both_ways
        for entry in stream.gathered_at:
            for _ in entry.arguments:
                yield Call("all_gather", "head", size)
                yield Call("reduce_scatter", "head", size)
        for entry in stream.whole:
            yield from [Call("all_gather", "whole", size, True)] * len(entry.arguments)
            yield Call("all_gather", "whole", size)


def _buffers(decided: Decided, batch: Microbatch) -> int:
    """Bytes inside the operators of `matmul.py` in the backward pass, which a trace does not see: the whole input and the summand of its
    gradient, and a copy of each where many samples are sent together.
    """
    products = decided.products if decided.plan.stream is not None else ()
    copies = 2 if batch.sequences > MOST_MESSAGES else 1
    return 2 * copies * batch.activation(decided.width) if products else 0


def _block_of(name: str, blocks: Sequence[str]) -> str:
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), "")


def _once_a_step(plan: Plan, rank: int, gradient_bytes: int) -> Counter[Kind]:
    """Gradients of which each rank has a summand, and those of key/value heads that several ranks hold: one all-reduce for each set of
    axes. Where the data axes sum the same shards in the same message it is counted here.
    """
    mesh, coordinate = plan.mesh, plan.mesh.coordinate(rank)
    made_of_tp = {AXIS, *(name for name in mesh.axis_names if name.startswith(f"{AXIS}_"))}
    elements: Counter[tuple[str, ...]] = Counter()
    for layout in plan.layouts.values():
        axes = layout.state.partial
        if layout.trainable and made_of_tp.intersection(axes):
            elements[axes] += math.prod(layout.state.local_shape(coordinate, mesh))
    found: Counter[Kind] = Counter()
    for axes, count in elements.items():
        sent = ring_bytes("all_reduce", mesh.size(axes), count * gradient_bytes)
        found[axes, "all_reduce", "gradient shards"] = sent
    return found


def _of_candidates(table: EstimateTable, profile: HardwareProfile, config: TensorConfig) -> np.ndarray:
    """Activations of A bytes, n ranks, each block with two groups: 8 (n-1)/n A a block, with a cut sequence 2 (n-1)/n A more, because
    entries gather twice; embedding and head 4 (n-1)/n A.
    """
    model, ranks = table.model, table.inputs["tp"]
    elements = table.inputs["micro_size"] * model.sequence_length * model.hidden_size
    blocks = model.num_blocks / table.inputs["pp"]
    of_blocks = blocks * (8 if config.sequence_parallel is False else 10)
    sent: np.ndarray = (ranks - 1) / ranks * (of_blocks + 4) * elements * profile.compute_element_bytes
    whole: np.ndarray = sent * table.inputs["num_microbatches"]
    return whole
