"""What ops replace in transformers' architectures, were there a faster implementation of each: `python tools/model_ops.py llama gpt2`.

Small models of the architectures (all of them without arguments) are planned with a twin of every op; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from colossal_core.model_ops.replacing import DATA
from colossal_core.testing import RunSpec
from colossal_core.testing.op_twins import twins
from colossal_core.testing.parity import prepare
from colossal_launch.models.small import SmallBatches, SmallModel, causal_architectures


@dataclass(frozen=True)
class Found:
    """Of one architecture: modules by op, those of them that attend, what was left and why, and what went wrong."""

    architecture: str
    modules: dict[str, int]
    num_attention: int
    notes: tuple[str, ...]
    error: str = ""

    def count(self, *ops: str) -> int:
        return sum(self.modules.get(op, 0) for op in ops)


def found_in(model: SmallModel) -> Found:
    """The plan of one small model in one process."""
    config = {"batch": {"global_size": 2}, "precision": "fp64"}
    spec = RunSpec(config, model, SmallBatches(model), plugins="", extra_ops=twins)
    try:
        prepared = prepare(spec, 1)
    except Exception as error:  # whatever a model of transformers raises
        return Found(model.architecture, {}, 0, (), f"{type(error).__name__}: {error}".splitlines()[0])
    plan = prepared.plan
    chosen: dict[str, list[str]] = dict(plan.data.get(DATA, {}))  # type: ignore[arg-type]
    attention = sum(type(one).__name__.endswith("Attention") for one in prepared.model.modules())
    notes = tuple(note for note in plan.notes if note.startswith("ops: "))[1 if chosen else 0 :]
    return Found(model.architecture, {op: len(names) for op, names in chosen.items()}, attention, notes)


def lines(results: Sequence[Found]) -> Iterator[str]:
    yield f"{'architecture':<22} norms  sums  rotary of attention  gates  experts  head"
    for one in results:
        norms, sums = one.count("rms_norm", "layer_norm"), one.count("add_rms_norm", "add_layer_norm")
        gates = one.count("swiglu", "geglu", "packed_swiglu", "packed_geglu")
        yield (
            f"{one.architecture:<22} {norms:>5} {sums:>5} {one.count('rotary'):>7} of {one.num_attention:<9} {gates:>6} "
            f"{one.count('experts'):>8} {one.count('linear_cross_entropy'):>5}  {one.error or '; '.join(one.notes)}"
        )
    good = [one for one in results if not one.error]
    kinds = {
        "norms": ("rms_norm", "layer_norm"),
        "norms with their sum": ("add_rms_norm", "add_layer_norm"),
        "rotary": ("rotary",),
        "gates": ("swiglu", "geglu", "packed_swiglu", "packed_geglu"),
        "experts": ("experts",),
        "head and loss": ("linear_cross_entropy",),
    }
    yield f"of {len(good)}: " + ", ".join(
        f"{kind} {sum(one.count(*ops) > 0 for one in good)}" for kind, ops in kinds.items()
    )


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="model types; none: every causal language model")
    parser.add_argument("--json", type=Path, help="also write the results there")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    results = []
    for name in given.architectures or causal_architectures():
        results.append(found_in(SmallModel(name)))
        print(f"{name} ...", file=sys.stderr, flush=True)
    print("\n".join(lines(results)))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
