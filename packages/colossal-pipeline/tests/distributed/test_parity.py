"""A model in stages beside one process, in float64: loss, raw gradients, norm, parameters and optimizer states to 1e-12."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from colossal_core.testing import RunSpec

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]

ONE_CHUNK = ("gpipe", "1f1b", "zb-h1", "zb-h2")
TWO_CHUNKS = ("interleaved", "looped-bfs", "zbv", "dualpipev")


@pytest.mark.parametrize("microbatches", [1, 2, 3, 6])
@pytest.mark.parametrize("schedule", [*ONE_CHUNK, *TWO_CHUNKS])
def test_two_ranks(run_of: Run, exact: Exact, schedule: str, microbatches: int) -> None:
    exact(run_of("llama", {"parallel.pipeline": {"size": 2, "schedule": schedule}}, microbatches=microbatches), 2)


@pytest.mark.parametrize("microbatches", [3, 8])
@pytest.mark.parametrize("schedule", ONE_CHUNK)
def test_four_ranks(run_of: Run, exact: Exact, schedule: str, microbatches: int) -> None:
    exact(run_of("llama", {"parallel.pipeline": {"size": 4, "schedule": schedule}}, microbatches=microbatches), 4)


@pytest.mark.parametrize("schedule", TWO_CHUNKS)
def test_eight_stages_on_four_ranks(run_of: Run, exact: Exact, schedule: str) -> None:
    layers = {"num_hidden_layers": 8}
    exact(run_of("llama", {"parallel.pipeline": {"size": 4, "schedule": schedule}}, layers, microbatches=8), 4)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_tied_embeddings(run_of: Run, exact: Exact, schedule: str) -> None:
    """On two ranks a V holds both ends of the model on the first, the others on the first and the last."""
    exact(run_of("gpt2", {"parallel.pipeline": {"size": 2, "schedule": schedule}}), 2)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_encoder_and_decoder(run_of: Run, exact: Exact, schedule: str) -> None:
    exact(run_of("t5", {"parallel.pipeline": {"size": 4, "schedule": schedule}}), 4)
