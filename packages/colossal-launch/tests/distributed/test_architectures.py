"""Fifteen causal language models that are as different as possible, each under stages 1 and 3 on two ranks beside one process in float64;
and fifteen models, four of them with other heads, whose matrices two ranks share, and which two ranks run in two stages.

`nox -s architectures` runs all that transformers has.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers", reason="builds models of transformers")
pytest.importorskip("colossal_zero")
pytest.importorskip("colossal_tensor")
pytest.importorskip("colossal_pipeline")

from colossal_core.testing import EXACT, WorkerPool
from colossal_launch.architectures import NUM_RANKS, STAGES, check_pipeline, check_stages, check_tensor, spec_of
from colossal_launch.models.small import SmallBatches, SmallModel, causal_architectures

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

CUT = {
    SmallModel("gpt2"): "transposed weights, query, key and value in one, tied head",
    SmallModel("llama"): "grouped queries, untied head",
    SmallModel("qwen3"): "norms of queries and keys, which are whole on every rank",
    SmallModel("gemma"): "one key and value head at most, a scaled table",
    SmallModel("phi"): "attention and feed-forward in parallel, biases everywhere",
    SmallModel("opt"): "learned positions with an offset, a norm before or after",
    SmallModel("bloom"): "query, key and value of each head side by side, ALiBi",
    SmallModel("falcon"): "one key and value head inside a packed weight",
    SmallModel("deepseek_v3"): "latent attention, experts behind a router, a shared expert",
    SmallModel("mixtral"): "experts",
    SmallModel("olmo2"): "norms over all heads of queries and keys together",
    SmallModel("bert", "masked-lm"): "no causal mask, a head of several layers with a bias",
    SmallModel(
        "vit", "image-classification"
    ): "a picture: no vocabulary, an odd number of positions, the model's own loss",
    SmallModel(
        "t5", "seq2seq-lm"
    ): "an encoder and a decoder, position biases by head that the first block makes for all",
    SmallModel("whisper", "speech-to-text"): "sound, convolutions before the encoder",
}
"""Models whose matrices are cut, and what each is there for."""
CROSSING = {"t5": 4}
"""Tensors that cross where there are several: between T5's encoder and decoder, in front of the second block of the latter. Whisper's
cut, by its balance, lies inside the encoder.
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool() as running:
        yield running


@pytest.mark.parametrize("architecture", SAMPLE)
def test_stages_are_exact(architecture: str, pool: WorkerPool) -> None:
    found = check_stages(SmallModel(architecture), pool)
    assert found.error == ""
    assert [result.stage for result in found.stages] == list(STAGES)
    assert [result.worst for result in found.stages if not result.passed] == []
    assert all(result.worst.limit <= EXACT for result in found.stages)


@pytest.mark.parametrize("model", CUT, ids=lambda model: model.architecture)
def test_half_of_the_matrices_or_more_are_cut_and_exact(model: SmallModel, pool: WorkerPool) -> None:
    found = check_tensor(model, pool)
    assert found.error == ""
    assert found.worst is not None, found.notes
    assert found.passed, found.worst
    assert found.worst.limit <= EXACT
    assert found.share >= 0.5
    assert found.sequence or any("the sequence is not cut" in note for note in found.notes), (
        "and the plan does not say so"
    )


@pytest.mark.parametrize("model", CUT, ids=lambda model: model.architecture)
def test_two_stages_are_exact(model: SmallModel, pool: WorkerPool) -> None:
    found = check_pipeline(model, pool)
    assert found.error == ""
    assert found.worst is not None, found.notes
    assert found.passed, found.worst
    assert found.crossing == CROSSING.get(model.architecture, 1)


def test_what_a_model_does_wrong_is_told_in_a_line(pool: WorkerPool) -> None:
    found = check_stages(SmallModel("lama"), pool)
    assert (found.passed, found.facts, found.stages) == (False, None, ())
    assert "the installed transformers has no such architecture" in found.error
    assert check_tensor(SmallModel("lama"), pool).error == found.error
    assert check_pipeline(SmallModel("lama"), pool).error == found.error


def test_models_are_small_and_without_dropout() -> None:
    model = SmallModel("biogpt")()
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert all(module.p == 0.0 for module in model.modules() if type(module).__name__ == "Dropout")


def test_the_run_has_two_microbatches_a_rank() -> None:
    assert spec_of(SmallModel("llama")).config["batch"] == {"global_size": 2 * NUM_RANKS, "micro_size": 1}
    assert spec_of(SmallModel("llama"), micro_size=2).config["batch"] == {"global_size": 4, "micro_size": 2}


def test_batches_of_other_heads_differ_by_sample_and_step() -> None:
    batches = SmallBatches(SmallModel("vit", "image-classification"))
    first, second = batches(0, 4), batches(1, 4)
    assert {key: tuple(value.shape) for key, value in first.items()} == {"pixel_values": (4, 3, 32, 32), "labels": (4,)}
    pictures = [*first["pixel_values"], *second["pixel_values"]]
    assert len({picture.sum(0).flatten()[:8].tolist().__repr__() for picture in pictures}) == 8
    assert sorted(set(first["labels"].tolist())) == [0, 1]
    assert all(
        bool((value == again).all()) for value, again in zip(first.values(), batches(0, 4).values(), strict=True)
    )


def test_the_list_is_that_of_transformers() -> None:
    found = causal_architectures()
    assert set(SAMPLE) <= set(found)
    assert found == tuple(sorted(found))
