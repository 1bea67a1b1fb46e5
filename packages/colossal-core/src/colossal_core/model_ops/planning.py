"""Which ops a model will use: those of which the table has something better than the reference, where the model computes them, and where
a small model of its kind computes the same with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from colossal_core.model_ops.replacing import DATA, HEAD_LOSS, picked_in
from colossal_core.specimen import pattern_of

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.model_ops.proof import Proof
    from colossal_core.model_ops.uses import Uses
    from colossal_core.ops import OpTable
    from colossal_core.plan import PlanDraft

MODEL_OPS = (
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "add_layer_norm",
    "rotary",
    "swiglu",
    "geglu",
    "packed_swiglu",
    "packed_geglu",
    "experts",
    HEAD_LOSS,
)
"""The ops that a model's own code may be made to use. Others are called by core and by strategies themselves."""

REFERENCE = "reference"

ADDING = ("add_rms_norm", "add_layer_norm")


def plan_model_ops(draft: PlanDraft, anatomy: ModelAnatomy, ops: OpTable) -> PlanDraft:
    """The draft with the modules that will call ops of the table as its data, and what was left alone, and why, as its notes.

    Asked last, when everything else is decided: blocks that are compiled keep what an implementation is not meant for, and a head that is
    cut, or whose backward pass is, keeps its logits.
    """
    wanted = tuple(op for op in MODEL_OPS if ops.chosen[op].provider != REFERENCE)
    if not wanted or anatomy.op_uses is None:
        return draft
    if anatomy.specimen is None:
        return draft.with_note(
            "ops: the model's own code is left alone: no small model of its kind can prove the change"
        )
    uses = anatomy.op_uses.found
    proof = _proof(anatomy, wanted)
    found: dict[str, tuple[str, ...]] = {}
    notes = [*proof.left]
    to_compiler: dict[str, None] = {}
    for op in wanted:
        names = [name for name in uses.modules.get(op, ()) if (op, pattern_of(name)) in proof.same]
        compiled = [] if op in ops.inside_compiled else [name for name in names if is_compiled(draft, name)]
        to_compiler.update(dict.fromkeys([op] if compiled else []))
        names = [name for name in names if name not in compiled]
        if op in ADDING:
            names = [name for name in names if _block_of(draft, name)]
        if op == HEAD_LOSS and names:
            why = _head_stays(draft, anatomy, names)
            names, notes = ([], [*notes, f"{op}: {why}"]) if why else (names, notes)
        if names:
            found[op] = tuple(names)
    found = _as_picked(uses, found)
    if to_compiler:
        notes.append(f"left to torch.compile inside compiled blocks: {', '.join(to_compiler)}")
    if uses.left:
        notes.append(f"left as they are: {', '.join(uses.left)}")
    if found:
        draft = draft.with_data(DATA, {op: list(names) for op, names in found.items()})
        counts = (f"{op} in {len(names)}" for op, names in found.items())
        notes.insert(0, f"{', '.join(counts)} modules")
    for note in notes:
        draft = draft.with_note(f"ops: {note}")
    return draft


def _proof(anatomy: ModelAnatomy, wanted: tuple[str, ...]) -> Proof:
    """What is proven of the model's kind; asked of its specimen once."""
    from colossal_core.model_ops.proof import Proof, prove_ops
    from colossal_core.specimen import SpecimenError

    assert anatomy.specimen is not None
    question = ("model_ops", wanted)
    try:
        answers = anatomy.specimen.answers
        if question not in answers:
            answers[question] = prove_ops(anatomy, anatomy.specimen, wanted)
        answer = answers[question]
    except SpecimenError as error:
        return Proof(frozenset(), (f"the model's own code is left alone: {error}",))
    assert isinstance(answer, Proof)
    return answer


def _as_picked(uses: Uses, chosen: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Where two ops could take a place, the one that does."""
    found: dict[str, dict[str, None]] = {}
    for op, names in chosen.items():
        if not any(op in edit.ops for use in uses.methods for edit in use.edits):
            found[op] = dict.fromkeys(names)
    for use in uses.methods:
        for _, op in picked_in(use, uses, chosen):
            found.setdefault(op, {})[use.module] = None
    return {op: tuple(found[op]) for op in MODEL_OPS if op in found}


def _block_of(draft: PlanDraft, name: str) -> str:
    """The block that a module is or lies in, else ""."""
    return next((block for block in draft.block_names if name == block or name.startswith(f"{block}.")), "")


def is_compiled(draft: PlanDraft, name: str) -> bool:
    """Whether a module runs inside a block that torch.compile makes."""
    return _block_of(draft, name) in draft.decisions.get("compile", {})


def _head_stays(draft: PlanDraft, anatomy: ModelAnatomy, names: Iterable[str]) -> str:
    """Why head and loss stay apart, else ""."""
    if anatomy.task == "own-loss" or anatomy.own_loss:
        return "the loss is not core's"
    if draft.config.precision == "fp16":
        return "in fp16 gradients are scaled before they are rounded, and the op makes them before"
    if any(action.kind == "backward_weight" for actions in draft.program.actions for action in actions):
        return "the backward pass of the head is cut in two"
    weights = {f"{name}.weight" for name in names}
    for layout in draft.layouts.values():
        if weights & {layout.full_name, *layout.aliases} and layout.compute.cut_axes:
            return "the head is cut"
    return ""
