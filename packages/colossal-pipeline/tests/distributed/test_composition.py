"""A pipeline beside every other axis and treatment of blocks, each compared with one process in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from colossal_core.testing import RunSpec

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]

WHOLE, SPLIT = "1f1b", "zb-h1"
COMPILED = {"enabled": True, "backend": "aot_eager"}


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("schedule", [WHOLE, SPLIT])
def test_recomputed_blocks(run_of: Run, exact: Exact, schedule: str, recompute: str) -> None:
    overrides = {"parallel.pipeline": {"size": 2, "schedule": schedule}, "recompute": {"mode": recompute}}
    exact(run_of("llama", overrides), 2)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_compiled_blocks(run_of: Run, exact: Exact, schedule: str) -> None:
    overrides = {
        "parallel.pipeline": {"size": 2, "schedule": schedule},
        "compile": COMPILED,
    }
    exact(run_of("llama", overrides), 2)


@pytest.mark.parametrize(
    ("schedule", "recompute"), [("zb-h1", "none"), ("zb-h1", "selective"), ("zbv", "none"), ("zbv", "full")]
)
def test_compiled_blocks_in_two_parts(run_of: Run, exact: Exact, schedule: str, recompute: str) -> None:
    """Each has two backward graphs, of which the second runs when the schedule says so."""
    overrides = {
        "parallel.pipeline": {"size": 2, "schedule": schedule},
        "compile": COMPILED,
        "recompute": {"mode": recompute},
    }
    exact(run_of("llama", overrides), 2)


def test_compiled_blocks_of_which_some_are_frozen(run_of: Run, exact: Exact) -> None:
    """Nothing flows back into the first block that is trained: it leaves all to its weight part."""
    overrides = {"parallel.pipeline": {"size": 2, "schedule": SPLIT}, "compile": COMPILED}
    exact(run_of("llama", overrides, frozen=("model.embed_tokens", "model.layers.0", "model.layers.2.mlp")), 2)


def test_compiled_blocks_with_dropout(run_of: Run, exact: Exact) -> None:
    """What a microbatch has drawn is part of its own call of a block, of which several are under way."""
    overrides = {"parallel.pipeline": {"size": 2, "schedule": SPLIT}, "compile": COMPILED}
    exact(run_of("gpt2", overrides, {"resid_pdrop": 0.3}), 2)


@pytest.mark.parametrize(
    "frozen", [("model.embed_tokens",), ("model.embed_tokens", "model.layers.0", "model.layers.1")]
)
@pytest.mark.parametrize("schedule", [WHOLE, SPLIT])
def test_frozen_parameters(run_of: Run, exact: Exact, schedule: str, frozen: tuple[str, ...]) -> None:
    """With a whole stage frozen no gradient goes back to it."""
    exact(run_of("llama", {"parallel.pipeline": {"size": 2, "schedule": schedule}}, frozen=frozen), 2)


@pytest.mark.parametrize("blocks", [[1, 3], [3, 1]])
def test_stages_given_by_the_user(run_of: Run, exact: Exact, blocks: list[int]) -> None:
    exact(run_of("llama", {"parallel.pipeline": {"size": 2, "blocks": blocks}}), 2)


@pytest.mark.parametrize("optimizer", ["sgd"])
def test_optimizers(run_of: Run, exact: Exact, optimizer: str) -> None:
    exact(run_of("llama", {"parallel.pipeline": {"size": 2}}, optimizer=optimizer), 2)
