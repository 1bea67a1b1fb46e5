"""AdamW with narrow states and with masters in bf16: each step the wide one, rounded once; reproducible, saved and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_core.config import parse_config
from colossal_core.errors import ConfigError
from colossal_core.gradients import clip_factor
from colossal_core.ops import narrow
from colossal_core.ops.adamw import AdamWSettings, adamw_step
from colossal_core.optimizers import optimizer_problems
from colossal_core.plugins import discover
from colossal_core.precision import precision_of
from colossal_core.rounding import BLOCK, FIRST_MOMENT, SECOND_MOMENT
from colossal_core.trained import Trained

Boosted = Any
BatchOf = Any

KINDS: list[dict[str, Any]] = [
    {"states": "bf16"},
    {"states": "int8"},
    {"masters": "compute"},
    {"masters": "compute", "states": "bf16"},
    {"masters": "compute", "states": "int8"},
]


def config_of(keys: dict[str, Any], precision: str = "bf16") -> dict[str, Any]:
    return {"precision": precision, "optimizer": {"lr": 0.003, **keys}, "scheduler": {"name": "constant"}}


def train(trained: Trained, batch_of: BatchOf, first: int, stop: int) -> list[torch.Tensor]:
    for step in range(first, stop):
        trained.train_step(batch_of(step))
    states = [tensor for _, _, tensor in trained.full_states()]
    return [trained.full_parameter(name) for name in trained.plan.layouts] + states


def spacing(values: torch.Tensor, kind: str, keys: dict[str, Any]) -> torch.Tensor:
    """Distance of the two neighbours between which each float32 value lies in its format: what one rounding may change it by."""
    narrow = keys.get("masters") == "compute" if kind == "parameter" else keys.get("states", "fp32") == "bf16"
    if kind != "parameter" and keys.get("states") == "int8":
        code = SECOND_MOMENT if kind.endswith("exp_avg_sq") else FIRST_MOMENT
        assert values.numel() <= BLOCK, "one block, one scale"
        scale = values.abs().max()
        low = (code.levels * (values.abs() / scale) ** (1 / code.power)).floor().clamp(max=code.levels - 1)
        gap: torch.Tensor = (low + 1).pow(code.power) - low.pow(code.power)
        spaced: torch.Tensor = gap * (scale / code.levels**code.power)
        return spaced
    return (values.abs().clamp(min=1e-37).log2().floor() - 7).exp2() if narrow else torch.zeros_like(values)


@pytest.mark.parametrize("keys", KINDS)
def test_each_step_is_the_wide_one_rounded_once(boosted: Boosted, batch_of: BatchOf, keys: dict[str, Any]) -> None:
    """From what is kept, AdamW's own formula in float64, and then each number to one of its two neighbours. With the rounding right on
    average (`test_rounding.py`), a run is the wide one and noise.
    """
    trained = boosted(config=config_of(keys))
    optimizer, shards = trained._engine.optimizer, trained._engine.state.shards.values()
    changed = 0
    for step in range(6):
        before = kept(trained)
        result = trained.train_step(batch_of(step))
        after = kept(trained)
        clip = clip_factor(result.grad_norm, 1.0).double()
        for shard in shards:
            group = next(g for g in optimizer.param_groups if any(shard.master is master for master in g["params"]))
            betas = group["betas"]
            settings = AdamWSettings(
                **{key: group[key] for key in ("lr", "eps", "weight_decay")}, beta1=betas[0], beta2=betas[1]
            )
            kinds = [(kind, shard.layout.full_name) for kind in ("parameter", "adamw.exp_avg", "adamw.exp_avg_sq")]
            wide = [before[key].double() for key in kinds]
            lists = [[wide[0]], [shard.gradient.double()], [wide[1]], [wide[2]]]
            adamw_step(*lists, settings=settings, step=torch.tensor(step + 1), clip=clip)
            for key, expected in zip(kinds, wide, strict=True):
                allowed = spacing(expected.float(), key[0], keys).double()
                # A few float32 operations; a code's own decoding errs by 2.5e-5 of a spacing.
                allowed = 1.0001 * allowed + 2e-6 * expected.abs().max()
                assert ((after[key].double() - expected).abs() <= allowed).all(), (step, key)
                changed += int((after[key] != before[key]).sum())
    assert changed > 0


def kept(trained: Trained) -> dict[tuple[str, str], torch.Tensor]:
    """Copies of masters and moments, by kind and name, in float32."""
    tensors = trained._tensors()
    return {(tensor.kind, tensor.full_name): tensor.local.detach().float().clone() for tensor in tensors}


@pytest.mark.parametrize("keys", KINDS)
def test_resumes_bit_for_bit(
    boosted: Boosted, batch_of: BatchOf, tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "CHUNK_ELEMENTS", 512)
    saved, resumed = boosted(config=config_of(keys)), boosted(config=config_of(keys))
    train(saved, batch_of, 0, 3)
    saved.save(tmp_path)
    resumed.load(tmp_path)
    ours, theirs = train(resumed, batch_of, 3, 6), train(saved, batch_of, 3, 6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    again = train(boosted(config=config_of(keys)), batch_of, 0, 6)
    torch.testing.assert_close(again, theirs, rtol=0, atol=0)


def test_bytes_of_states_are_those_announced(boosted: Boosted) -> None:
    elements = sum(layout.numel for layout in boosted(config=config_of({})).plan.layouts.values())
    blocks = 4  # one for each parameter: of up to 256 elements, with two scales
    for states, expected in (("fp32", 8 * elements), ("bf16", 4 * elements), ("int8", blocks * (2 * 256 + 8))):
        trained = boosted(config=config_of({"states": states}))
        tensors = trained._engine.optimizer.state_tensors()
        assert sum(state.num_bytes for state in tensors if state.tensor.dim()) == expected


def test_no_float32_copy_is_kept(boosted: Boosted, batch_of: BatchOf) -> None:
    trained = boosted(config=config_of({"masters": "compute"}))
    trained.train_step(batch_of(0))
    for shard in trained._engine.state.shards.values():
        assert shard.master.dtype == torch.bfloat16
        assert shard.gradient is not None
        assert shard.gradient.dtype == torch.float32


def test_fp64_is_wide_whatever_is_asked(boosted: Boosted, batch_of: BatchOf) -> None:
    wide = train(boosted(config=config_of({}, "fp64")), batch_of, 0, 2)
    for keys in KINDS:
        torch.testing.assert_close(train(boosted(config=config_of(keys, "fp64")), batch_of, 0, 2), wide, rtol=0, atol=0)


def test_what_cannot_be_is_refused() -> None:
    plugins = discover([])

    def problems(precision: str, **keys: Any) -> list[str]:
        config = parse_config(
            {"batch": {"global_size": 1}, "precision": precision, "optimizer": keys}, plugins.config_class()
        )
        return [str(problem) for problem in optimizer_problems(config, plugins.optimizers())]

    assert problems("fp16", masters="compute") == [
        "optimizer.masters='compute': masters in fp16 lose updates below 2^-11 of a parameter, and its smallest values to zero: use "
        "precision: bf16, or masters: fp32"
    ]
    assert problems("bf16", name="sgd", states="int8") == [
        "optimizer.states: sgd does not read it: remove it; sgd reads lr, momentum, weight_decay, no_decay"
    ]
    assert problems("bf16", masters="compute", states="int8") == []


def test_precision_of_a_run() -> None:
    plugins = discover([])
    for name, keys, master in (
        ("bf16", {}, torch.float32),
        ("bf16", {"masters": "compute"}, torch.bfloat16),
        ("fp64", {"masters": "compute"}, torch.float64),
        ("fp32", {"masters": "compute"}, torch.float32),
    ):
        config = parse_config(
            {"batch": {"global_size": 1}, "precision": name, "optimizer": keys}, plugins.config_class()
        )
        found = precision_of(config)
        assert found.master == master
        assert found.gradient == (torch.float64 if name == "fp64" else torch.float32)


def test_a_users_optimizer_takes_the_masters_as_they_are(boosted: Boosted) -> None:
    with pytest.raises(ConfigError) as raised:
        boosted(torch.optim.Adam, None, {"precision": "bf16", "optimizer": {"masters": "compute"}})
    assert str(raised.value) == (
        "optimizer.masters: is set beside an optimizer that was handed to boost: set it on the optimizer, and remove it here"
    )
