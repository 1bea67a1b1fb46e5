"""What cannot be cut is refused while planning, with the whole message; what only a batch can show, in the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from colossal_core.errors import ColossalError, ConfigError
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import prepare, share_of_step, start

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]

LAYERS = "model.layers.*"


@dataclass(frozen=True)
class Case:
    """tensor: keys of the section beside the size."""

    message: str
    size: int = 2
    tensor: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "llama"
    sections: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "a mode that is not there": Case(
        "parallel.tensor.mode='2d': is not there yet: only matrices cut in one dimension are: use 1d",
        tensor={"mode": "2d"},
    ),
    "heads that three cannot share": Case(
        "parallel.tensor.size=3: model.layers.0.self_attn has 4 heads and 2 key/value heads, which 3 ranks cannot share: "
        "use 2 or 4, or a rule `replicate` for it",
        3,
    ),
    "more ranks than heads": Case(
        "parallel.tensor.size=8: transformer.h.0.attn has 4 heads, which 8 ranks cannot share: "
        "use 4, or a rule `replicate` for it",
        8,
        kind="gpt2",
    ),
    "a sequence that does not divide": Case(
        "data.sequence_length=13: is not divided by parallel.tensor.size=2, over which the sequence is cut: "
        "use 12 or set parallel.tensor.sequence_parallel: false",
        tensor={"sequence_parallel": True},
        sections={"data": {"sequence_length": 13}},
    ),
    "a rule that matches nothing": Case(
        f"parallel.tensor.rules='{LAYERS}.self_attn.k_prj: column': `{LAYERS}.self_attn.k_prj` matches no module with a "
        f"weight: did you mean `{LAYERS}.self_attn.k_proj`? Name a module with a weight, relative to the model",
        tensor={"rules": {f"{LAYERS}.self_attn.k_prj": "column"}},
    ),
    "a rule for a part of a group": Case(
        f"parallel.tensor.rules='{LAYERS}.self_attn.k_proj: replicate': leaves {LAYERS}.self_attn.k_proj half sharded: it "
        f"belongs together with {LAYERS}.self_attn.o_proj, {LAYERS}.self_attn.q_proj, {LAYERS}.self_attn.v_proj: "
        "give rules for all of them, or leave this one out",
        tensor={"rules": {f"{LAYERS}.self_attn.k_proj": "replicate"}},
    ),
    "a column without a row": Case(
        f"parallel.tensor.rules='{LAYERS}.mlp.down_proj: column': leaves {LAYERS}.mlp.down_proj half sharded: "
        "give rules for all of them, or leave this one out",
        tensor={"rules": {f"{LAYERS}.mlp.down_proj": "column"}},
    ),
    "nothing left to be cut": Case(
        "parallel.tensor: no matrix of LlamaForCausalLM could be cut: the rules leave every one whole: "
        "give other parallel.tensor.rules, or use size: 1",
        tensor={"rules": {LAYERS: "replicate", "lm_head": "replicate"}},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_cannot_be_cut_is_explained(run_of: Run, case: Case) -> None:
    spec = run_of(case.kind, {"parallel.tensor": {"size": case.size, **case.tensor}, **case.sections})
    with pytest.raises(ConfigError) as raised:
        prepare(spec, case.size)
    assert str(raised.value) == case.message


def test_a_model_without_an_example_batch_is_explained(run_of: Run) -> None:
    """Of a model in plain torch nothing is known but its code."""
    from colossal_core.examine import examine
    from colossal_core.mesh import MeshLayout
    from colossal_core.testing.models import TinyModel
    from colossal_tensor.config import TensorConfig
    from colossal_tensor.strategy import TensorStrategy

    spec = run_of("llama", {"parallel.tensor": {"size": 2}})
    strategy = TensorStrategy(TensorConfig(size=2))
    (problem,) = strategy.check(prepare(spec, 2).config, examine(TinyModel()()), MeshLayout((1, 1, 1, 1, 2)))
    assert str(problem) == (
        "parallel.tensor: no matrix of TinyLM could be cut: no small model of this kind can be made: "
        "give model.example_batch: give parallel.tensor.rules, or use size: 1"
    )


def broken_step(collectives: Collectives, spec: RunSpec) -> str:
    trained = start(spec, collectives)
    try:
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    except ColossalError as error:
        return str(error)
    return ""


def own_batch(collectives: Collectives, spec: RunSpec) -> list[str]:
    """What ranks of `tp` are told that bring sequences of their own, in training and evaluation; then nothing, with the same."""
    trained = start(spec, collectives)
    same, own = (share_of_step(spec, trained.plan, 0, step) for step in (0, 1 + collectives.rank))
    told = []
    for step, batch in [(trained.train_step, own), (trained.eval_step, own), (trained.train_step, same)]:
        try:
            step(batch)
        except ColossalError as error:
            told.append(str(error))
    return told


def test_ranks_with_different_sequences_are_told(pool: WorkerPool, run_of: Run) -> None:
    message = "batch: ranks that differ only in tp got different sequences: give them the same batch (booster.dataloader does)"
    spec = run_of("llama", {"parallel.tensor": {"size": 2}})
    assert pool.run(2, own_batch, spec) == [[message, message]] * 2


def test_a_batch_that_does_not_divide_is_explained(pool: WorkerPool, run_of: Run) -> None:
    spec = run_of("llama", {"parallel.tensor": {"size": 2}})
    spec = replace(spec, batch=TokenBatches(96, 13))
    expected = (
        "batch: a sequence of 13 positions is not divided by parallel.tensor.size=2: "
        "pad it to 14, or set parallel.tensor.sequence_parallel: false; to generate, load what export_hf writes"
    )
    assert pool.run(2, broken_step, spec) == [expected, expected]
