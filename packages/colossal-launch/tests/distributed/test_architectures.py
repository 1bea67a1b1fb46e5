"""Fifteen causal language models that are as different as possible, each under stages 1 and 3 on two ranks beside one process in float64.

`nox -s architectures` runs all that transformers has.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers", reason="builds models of transformers")
pytest.importorskip("colossal_zero", reason="trains under stages of ZeRO")

from colossal_core.testing import EXACT, WorkerPool
from colossal_launch.architectures import STAGES, check, spec_of
from colossal_launch.models.causal import SmallCausalModel, causal_architectures

SAMPLE = {
    "llama": "grouped queries, untied head",
    "gpt2": "fused projections, tied head, learned positions",
    "bloom": "ALiBi",
    "gptj": "attention and feed-forward in parallel",
    "gpt_bigcode": "one key and value head",
    "gemma2": "two kinds of attention, soft caps, norms after",
    "mixtral": "experts",
    "deepseek_v3": "latent attention, a dense block before blocks of experts, a shared expert",
    "mamba2": "state spaces only",
    "zamba2": "state spaces, and one attention block shared by several layers",
    "qwen3_5_text": "linear attention beside attention",
    "bart": "a decoder with cross attention that nothing reaches",
    "bert": "an encoder made a decoder",
    "gemma3": "the text part of a model that sees, its vision tower unused",
    "hrm_text": "two stacks of blocks that run several times in one pass",
}
"""Architectures, and what no other one of the sample has."""


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(timeout_seconds=60) as running:
        yield running


@pytest.mark.parametrize("architecture", SAMPLE)
def test_stages_are_exact(architecture: str, pool: WorkerPool) -> None:
    found = check(architecture, pool)
    assert found.error == ""
    assert [result.stage for result in found.stages] == list(STAGES)
    assert [result.worst for result in found.stages if not result.passed] == []
    assert all(result.worst.limit <= EXACT for result in found.stages)


def test_what_a_model_does_wrong_is_told_in_a_line(pool: WorkerPool) -> None:
    found = check("lama", pool)
    assert (found.passed, found.facts, found.stages) == (False, None, ())
    assert "the installed transformers has no such architecture" in found.error


def test_models_are_small_and_without_dropout() -> None:
    model = SmallCausalModel("biogpt")()
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert all(module.p == 0.0 for module in model.modules() if type(module).__name__ == "Dropout")


def test_the_run_has_two_microbatches_a_rank() -> None:
    assert spec_of("llama").config["batch"] == {"global_size": 4, "micro_size": 1}


def test_the_list_is_that_of_transformers() -> None:
    found = causal_architectures()
    assert set(SAMPLE) <= set(found)
    assert found == tuple(sorted(found))
