"""`colossal run`: a training script of one's own on two ranks, with everything that `Booster` promises."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.testing import EXACT, relative_difference

pytest.importorskip("colossal_zero")

Start = Callable[..., "subprocess.Popen[str]"]

LOOP = '''
import json
import sys

import torch
from torch.utils.data import Dataset

from colossal_launch import Booster, launch
from tiny_model import Tiny, loss


class Squares(Dataset):
    """50 samples, so that an epoch does not end with a step; the item says which it is."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        ids = (torch.arange(16) * (index + 1)) % 257
        return {"input_ids": ids, "labels": ids, "which": torch.tensor(index)}


steps, save_to, load_from = int(sys.argv[1]), sys.argv[2], sys.argv[3]
ranks = launch()
torch.manual_seed(3)
booster = Booster({"batch": {"global_size": 8, "micro_size": 2}, "precision": "fp64", "train": {"device": "cpu"}})
model = Tiny(dropout=0.0)
optimizer = torch.optim.AdamW(
    [{"params": list(model.layers.parameters()), "lr": 0.02}, {"params": [*model.embed.parameters(), *model.head.parameters()]}],
    lr=0.01,
)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
trained = booster.boost(model, optimizer, loss_fn=loss, lr_scheduler=scheduler)
seen, called = [], []
loader = booster.dataloader(Squares(), shuffle=True)
trained.on_step(lambda result: called.append(float(result.loss)))
if load_from:
    assert trained.load(load_from).step == 3
for batch in loader:
    seen.append(batch["which"].tolist())
    result = trained.train_step(batch)
    if trained.step == steps:
        break
report = {
    "rank": ranks.rank,
    "losses": called,
    "seen": seen,
    "rates": [group["lr"] for group in optimizer.param_groups],
    "evaluated": float(trained.eval_step(batch).loss),
    "gradient": trained.gradients()["head.weight"].sum(0).tolist(),
    "parameter": trained.full_parameter("layers.0.0.weight").tolist(),
    "same_module": trained.module is model,
}
trained.save(save_to)
with open(f"report-{save_to[5:]}-{ranks.rank}.json", "w") as file:
    json.dump(report, file)
'''


def reports(running: subprocess.Popen[str], name: str) -> list[dict[str, Any]]:
    """What each rank wrote about itself, in rank order; nothing is printed."""
    output, errors = running.communicate(timeout=200)
    assert (running.returncode, output, errors) == (0, "", "")
    return [json.loads(path.read_text()) for path in sorted(Path().glob(f"report-{name}-*.json"))]


def difference(found: list[float], expected: list[float]) -> float:
    return relative_difference(
        torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), floor=1e-3
    )


def test_a_loop_of_ones_own_goes_on_with_another_number_of_ranks(project: Path, colossal: Start) -> None:
    """Two ranks make three steps; one rank goes on from there, as one that had made all six."""
    (project / "loop.py").write_text(LOOP)
    (alone,) = reports(colossal("run", "loop.py", "6", "runs/alone", ""), "alone")
    first, second = reports(colossal("run", "loop.py", "--processes", "2", "3", "runs/two", ""), "two")
    (later,) = reports(colossal("run", "loop.py", "--processes", "1", "6", "runs/later", "runs/two"), "later")
    assert [one + two for one, two in zip(first["seen"], second["seen"], strict=True)] == alone["seen"][:3]
    assert later["seen"] == alone["seen"][3:]
    assert first["losses"] == second["losses"]
    assert difference(first["losses"] + later["losses"], alone["losses"]) <= EXACT
    for name in ("gradient", "parameter"):
        assert difference(later[name], alone[name]) <= EXACT
    assert difference([later["evaluated"]], [alone["evaluated"]]) <= EXACT
    assert later["rates"] == alone["rates"] == [pytest.approx(0.02 * 0.9**6), pytest.approx(0.01 * 0.9**6)]
    assert alone["same_module"]


def test_a_script_that_fails_is_told_in_one_message(
    project: Path, colossal: Start, left_behind: Callable[[], list[int]]
) -> None:
    (project / "broken.py").write_text(
        "import sys, time\nfrom colossal_launch import launch\nranks = launch('cpu')\n"
        "if ranks.rank == 1:\n    raise RuntimeError(f'no data for {sys.argv[1:]}')\ntime.sleep(100)\n"
    )
    running = colossal("run", "broken.py", "--processes", "2", "--lr", "1e-3")
    output, errors = running.communicate(timeout=200)
    assert running.returncode == 1
    assert (output, re.sub(r"pid \d+", "pid N", errors)) == (
        "",
        "error: rank 1 (pid N) failed first: RuntimeError: no data for ['--lr', '1e-3'] (broken.py, line 5)\n"
        "       --debug shows the traceback\n",
    )
    assert left_behind() == []


EXPORT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_launch import Booster, launch

launch("cpu")
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
booster = Booster({"batch": {"global_size": 4}, "parallel": {"zero": {"stage": 1}}, "train": {"device": "cpu"}})
trained = booster.boost(model)
ids = torch.arange(32).view(4, 8) % 64
rank = trained.collectives.rank
for _ in range(2):
    trained.train_step({"input_ids": ids[2 * rank : 2 * rank + 2], "labels": ids[2 * rank : 2 * rank + 2]})
trained.export_hf("exported")
values = {name: trained.full_parameter(name) for name in trained.plan.layouts}
if rank == 0:
    torch.save(values, "values.pt")
"""


def test_a_model_on_the_meta_device_is_trained_and_exported(project: Path, colossal: Start) -> None:
    transformers = pytest.importorskip("transformers")
    (project / "export.py").write_text(EXPORT)
    running = colossal("run", "export.py", "--processes", "2")
    output, errors = running.communicate(timeout=200)
    assert (running.returncode, output, errors) == (0, "", "")
    loaded: nn.Module = transformers.LlamaForCausalLM.from_pretrained(project / "exported")
    values = torch.load(project / "values.pt", weights_only=True)
    assert set(values) == {name for name, _ in loaded.named_parameters()}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, values[name]), name
    assert values["model.embed_tokens.weight"].std() > 0


def test_every_collective_is_timed_between_local_ranks(project: Path, colossal: Start) -> None:
    running = colossal(
        "bench", "comm", "--processes", "2", "--device", "cpu", "--max-bytes", "4096", "--json", "comm.json"
    )
    output, errors = running.communicate(timeout=200)
    assert (running.returncode, errors) == (0, ""), output
    assert "all_reduce" in output
    assert json.loads((project / "comm.json").read_text())
