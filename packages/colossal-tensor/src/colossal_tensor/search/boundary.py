"""Where the blocks begin and end: the vocabulary at the ends of the model, and the stream between them."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from colossal_tensor.group import Entry, Exit, Stream, TensorPlan, Vocabulary
from colossal_tensor.search.trace import STREAM

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_tensor.search.laboratory import Laboratory


def vocabularies(anatomy: ModelAnatomy, *, whole_logits: bool, whole: Set[str] = frozenset()) -> Iterator[Vocabulary]:
    """Ways to cut the embedding and the head by words, the most first. whole: weights that stay whole, and those tied to them."""
    kept = {name for fact in anatomy.parameters if whole & set(fact.names) for name in fact.names}
    embedding = anatomy.embeddings[0] if anatomy.embeddings else ""
    head = anatomy.heads[0] if anatomy.heads else ""
    embedding, head = ("" if f"{module}.weight" in kept else module for module in (embedding, head))
    ends = dict.fromkeys([(embedding, head), ("", head), (embedding, "")])
    for table, product in ends:
        if table or product:
            if product and not whole_logits:
                yield Vocabulary(table, product)
            yield Vocabulary(table, product, gathered=bool(product))


def streams(lab: Laboratory, plan: TensorPlan) -> Iterator[Stream]:
    """Ways to cut the sequence between groups: from the first block of each chain to the head, or to the last block."""
    chains = [chain for chain in lab.anatomy.chains if chain.names[0] in lab.setting.trace.calls]
    entries = tuple(Entry(chain.names[0], _stream_of(lab, chain.names[0])) for chain in chains)
    if not entries or not all(entry.arguments for entry in entries):
        return
    lasts = tuple(Exit(chain.names[-1]) for chain in chains)
    whole = uncut_modules(lab, plan)
    if plan.vocabulary.head:
        yield Stream(entries, (), (Entry(plan.vocabulary.head),), whole)
        if len(lasts) > 1:
            yield Stream(entries, lasts[:-1], (Entry(plan.vocabulary.head),), whole)
    yield Stream(entries, lasts[-1:], (), whole)
    if len(lasts) > 1:
        yield Stream(entries, lasts, (), whole)


def uncut_modules(lab: Laboratory, plan: TensorPlan) -> tuple[Entry, ...]:
    """The parts of blocks with matrix products of which no group cuts one, by pattern, with what they are given of the stream."""
    names = lab.setting.names
    groups = [group for group in plan.groups if not any(exit_.gathers for exit_ in group.exits)]
    cut = {cut.parameter for group in groups for cut in group.cuts}
    found: dict[str, tuple[str, ...]] = {}
    for block in lab.anatomy.blocks:
        for child, _ in lab.setting.model.get_submodule(block).named_children():
            part = f"{block}.{child}"
            pattern = names.pattern(part)
            if any(parameter.startswith(f"{pattern}.") for parameter in cut):
                continue
            arguments = _stream_of(lab, part)
            if arguments and any(weight.startswith(f"{part}.") for weight in lab.weights):
                found[pattern] = arguments
    return tuple(Entry(pattern, arguments) for pattern, arguments in found.items())


def _stream_of(lab: Laboratory, block: str) -> tuple[str, ...]:
    """The arguments of a block that run along the sequence: those of the shape of its first one."""
    given = [argument for argument in lab.setting.trace.arguments if argument.module == block and argument.floating]
    stream = [argument for argument in given if STREAM in argument.sources and len(argument.shape) > 2]
    return tuple(dict.fromkeys(argument.key for argument in stream if argument.shape == stream[0].shape))
