"""What stage 3 gathers while the optimizer still runs is right whatever comes next: bit for bit what a gather at its use would bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch

from colossal_core import moments
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import share_of_step, start
from colossal_zero.publication import Publication

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.trained import Trained

BETWEEN = ("nothing", "evaluation", "own pass", "gradients", "save", "broken off", "load", "export")
"""What a run does after each of its steps but the last."""


def spec_of(zero: Mapping[str, Any], optimizer: str = "adamw", *, frozen: bool = False) -> RunSpec:
    """The learning rate differs from step to step; each rank has several microbatches."""
    config = {
        "batch": {"global_size": 8, "micro_size": 1},
        "precision": "fp64",
        "optimizer": {"name": optimizer, "lr": 0.01, "max_grad_norm": 0.1},
        "scheduler": {"name": "linear", "warmup_steps": 5},
        "train": {"num_steps": 30},
        "parallel": {"zero": {"bucket_bytes": 9000, **zero}},
    }
    options = TinyOptions(num_blocks=3, tied=False, unused=True, frozen=frozen, dropout=0.1)
    return RunSpec(config, TinyModel(options), TokenBatches(), task="causal-lm")


class Journey:
    """One run: what it has computed, and how many parameters were whole after each step."""

    def __init__(self, collectives: Collectives, spec: RunSpec, directory: str) -> None:
        self._spec, self._rank, self._directory = spec, collectives.rank, directory
        self.trained: Trained = start(spec, collectives)
        self.state: Any = self.trained._engine.state
        self.values: list[torch.Tensor] = []
        self.whole: list[int] = []

    def share(self) -> dict[str, torch.Tensor]:
        return share_of_step(self._spec, self.trained.plan, self._rank, self.trained.step)

    def step(self) -> None:
        result = self.trained.train_step(self.share())
        self.values += [result.loss, result.grad_norm]
        self.whole.append(self.check())

    def check(self) -> int:
        """Whatever is whole holds what the masters hold. How many parameters are."""
        self.state.wait_published()
        whole = [bucket for bucket in self.state._buckets if bucket._compute.untyped_storage().nbytes()]
        pairs = [pair for bucket in whole for pair in zip(bucket.layouts, bucket.parameters, strict=True)]
        for layout, parameter in pairs:
            assert torch.equal(parameter.detach(), self.trained.full_parameter(layout.full_name)), layout.full_name
        return len(pairs)

    def between(self, what: str) -> None:
        if what == "evaluation":
            self.values.append(self.trained.eval_step(self.share()).loss)
        elif what == "own pass":
            inputs = {key: value for key, value in self.share().items() if key != "labels"}
            self.values.append(self.trained.module(**inputs).logits.detach())
        elif what == "gradients":
            self.values += self.trained.gradients().values()
        elif what == "save":
            self.trained.save(self._directory)
        elif what == "broken off":
            self.break_off()
        elif what == "export":
            self.values += self.parameters()
        if what in ("broken off", "load"):
            assert self.trained.load(self._directory) is not None

    def parameters(self) -> list[torch.Tensor]:
        return [self.trained.full_parameter(name) for name in self.trained.plan.layouts]

    def break_off(self) -> None:
        """A step ends as soon as the optimizer has brought up to date what is carried early, or with the optimizer."""
        publication = self.state._publication
        updated = publication.updated

        def fail(masters: Sequence[torch.nn.Parameter] = ()) -> None:
            updated(masters)
            if not masters or len(publication.refreshed) == len(publication._buckets):
                raise InterruptedError

        patch = pytest.MonkeyPatch()
        patch.setattr(publication, "updated", fail)
        patch.setattr(self.state, "publish", fail)
        with pytest.raises(InterruptedError):
            self.trained.train_step(self.share())
        patch.undo()


def travelled(
    collectives: Collectives, spec: RunSpec, directory: str, early: bool
) -> tuple[list[torch.Tensor], list[int]]:
    """All values of a run whose optimizer says after every single master that it is done with it. early: False: nothing is carried then."""
    patch = pytest.MonkeyPatch()
    patch.setattr(moments, "PORTION_ELEMENTS", 1)
    if not early:
        patch.setattr(Publication, "updated", lambda publication, masters: None)
    try:
        journey = Journey(collectives, spec, directory)
        for what in BETWEEN:
            journey.step()
            journey.between(what)
        journey.step()
    finally:
        patch.undo()
    return [*journey.values, *journey.parameters()], journey.whole


CASES = [
    pytest.param(spec_of({"stage": 1}), 2, id="stage 1"),
    *(
        pytest.param(spec_of({"stage": 3, "keep_parameters": keep}), 2, id=keep)
        for keep in ("use", "microbatch", "step")
    ),
    pytest.param(spec_of({"stage": 3, "prefetch": 0}, frozen=True), 2, id="frozen, nothing ahead"),
    pytest.param(spec_of({"stage": 3, "replicate": 2}), 4, id="hybrid"),
    pytest.param(spec_of({"stage": 3}, "muon"), 2, id="muon"),
]


@pytest.mark.parametrize(("spec", "num_ranks"), CASES)
def test_whatever_comes_next(pool: WorkerPool, spec: RunSpec, num_ranks: int, tmp_path: Any) -> None:
    early = pool.run(num_ranks, travelled, spec, str(tmp_path / "early"), True)
    late = pool.run(num_ranks, travelled, spec, str(tmp_path / "late"), False)
    for (values, whole), (wanted, none_whole) in zip(early, late, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(values, wanted, strict=True))
        if spec.config["parallel"]["zero"]["stage"] == 3:
            assert min(whole) == max(whole) > 0
            assert set(none_whole) == {0}
