"""`colossal verify`: transformers models with their dropout active, two ranks beside one process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from colossal_core.errors import ConfigError
from colossal_core.testing import WorkerPool
from colossal_core.testing.verification import ADAMW, SGD, Variant, verify
from colossal_launch.assembly import read_setup
from colossal_launch.cli.verify import verify as run_command
from colossal_launch.verifying import verification_of

pytest.importorskip("transformers", reason="shrinks models of transformers")

CONFIG = """
model: {architecture: llama}
data: {source: stdlib, sequence_length: 32}
batch: {global_size: 4, micro_size: 1}
"""
BATCH = {"batch": {"global_size": 4, "micro_size": 1}}
STAGE_0 = Variant("stage 0", {**BATCH, "parallel.zero": {"stage": 0}, "optimizer": dict(SGD)})
STAGE_1 = Variant("stage 1", {**BATCH, "parallel.zero": {"stage": 1}, "optimizer": dict(ADAMW)})
RECOMPUTED = Variant("stage 1, recomputed", {**STAGE_1.overrides, "recompute": {"mode": "full"}})
FUSED = "a fused attention kernel draws its numbers by microbatch, not by sample"


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool() as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    ("model", "variants", "notes"),
    [
        ("{architecture: llama}", (STAGE_0, STAGE_1), ["LlamaForCausalLM, shrunk to N parameters"]),
        (
            "{architecture: gpt2}",
            (STAGE_1, RECOMPUTED),
            ["GPT2LMHeadModel, shrunk to N parameters", f"attn_pdrop is compared at 0: {FUSED}"],
        ),
        ("{architecture: opt}", (STAGE_1, RECOMPUTED), ["OPTForCausalLM, shrunk to N parameters"]),
        ("{architecture: gemma2}", (STAGE_1,), ["Gemma2ForCausalLM, shrunk to N parameters"]),
        (
            "{architecture: t5}",
            (STAGE_1,),
            ["T5ForConditionalGeneration, shrunk to N parameters", f"T5Attention.dropout is compared at 0: {FUSED}"],
        ),
    ],
)
def test_two_ranks_are_one_process(
    model: str, variants: tuple[Variant, ...], notes: list[str], config: Path, pool: WorkerPool
) -> None:
    found = verification_of(read_setup(config, [f"model={model}"]))
    report = verify(found.spec, 2, variants, pool)
    assert report.passed, report.describe()
    assert [re.sub(r"[\d,]{5,}", "N", note) for note in found.notes] == notes


def test_what_draws_by_microbatch_is_named(config: Path) -> None:
    found = verification_of(read_setup(config, ["model={architecture: bloom, config: {hidden_dropout: 0.1}}"]))
    assert found.notes[-1].startswith(
        "draws random numbers by microbatch, not by sample: transformer.h.0.self_attention: BloomAttention.forward calls "
        "dropout_add; transformer.h.0.mlp: BloomMLP.forward calls dropout_add; "
    )


@pytest.mark.parametrize(("mutant", "status"), [(None, 0), ("mean-of-ranks", 1)])
def test_the_command(
    mutant: str | None,
    status: int,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("colossal_core.testing.default_variants", lambda world_size, model_size, count: (STAGE_1,))
    assert run_command(config, world_size=2, mutant=mutant) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note: LlamaForCausalLM, shrunk to ")
    assert lines[1] == ("stage 1: DIFFERENT" if mutant else "stage 1: same")
    assert lines[2].split() == ["worst", "difference", "limit", "where"]
    kinds = [line.split()[0] for line in lines[3:-2]]
    states = ["adamw.step", "adamw.exp_avg", "adamw.exp_avg_sq", "step.skipped_steps"]
    assert kinds == ["loss", "num_tokens", "skipped", "grad_norm", "gradient", "parameter", *states]
    verdict = "different in stage 1" if mutant else r"the same, worst difference \d\.\de-\d\d"
    assert re.fullmatch(f"2 ranks against one process, 1 variants: {verdict}", lines[-1])


def test_an_unknown_mutant_is_an_error(config: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such planted fault"):
        run_command(config, world_size=2, mutant="nothing")
