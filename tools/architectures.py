"""Trains every causal language model of transformers, and some others, shrunk, beside one process: `python tools/architectures.py`.

Results are kept in docs/data/architectures.json, row by row, and docs/architectures.md is written from them; a test compares the two.
Rows that were exact, with the same transformers and torch, are not run again. A model that crashes or hangs costs its own row.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_core.testing import WorkerPool
    from colossal_launch.architectures import Checked, PipelineResult, TensorResult
    from colossal_launch.models.small import SmallModel

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
REASONS = ROOT / "docs" / "data" / "architectures_left_out.json"
"""Why a model is not trained here, by architecture, for a reader. A failing one without a reason fails the run."""

COMPARISONS = ("stages", "tensor", "pipeline")

HEAD = """# Every causal language model of transformers

Written by `nox -s architectures`, which runs them all.

Each model is built small from its own config and trained for two steps of AdamW with clipping on two processes, with two microbatches each:
under `parallel.zero`, stages 1 and 3, under `parallel.tensor` with `size: 2`, and under `parallel.pipeline` with `size: 2`. Loss,
gradients, their norm, parameters and optimizer states are then those of one process in float64: the table has the worst relative difference
of them all, rounded up to a power of ten, and the limit is 1e-12.

*Cut* is how much of a model's matrices two ranks share: of the elements of all parameters with two dimensions or more. Tables of
embeddings count where they are the head too; what has no partner is cut by its outputs, which are gathered. *Sequence*: whether
activations between the matrices are cut along the sequence, which is done where it was proven to be the same. *Vocabulary*: whether words
of the head, or of the table, are. *Pipeline 2*: two stages, between which one tensor crosses unless the table says how many. Nothing is
written for an architecture: what is cut is [found and proven](tensor.md#how-groups-are-found), and so is [what
crosses](pipeline.md#how-a-model-is-cut).
"""
WHOLE = """Matrices that no cut was proven for, each by the end of its name, the largest first; and those that this run does not reach
(cross attention without an encoder, a vision tower without pictures)."""
MOST_PATTERNS = 6
COLUMNS = (
    "| architecture | class | parameters | blocks | found by | tied | stage 1 | stage 3 | tensor 2 | cut | sequence | vocabulary "
    "| pipeline 2 |",
    "|---|---|---:|---|---|---|---|---|---|---:|---|---|---|",
)


def label(row: Mapping[str, Any]) -> str:
    """What a row is called on the command line and in the files: its architecture, with its head where that is not a causal one."""
    return f"{row['architecture']}:{row['head']}" if "head" in row else str(row["architecture"])


def row_of(model: SmallModel) -> dict[str, Any]:
    """A row without results."""
    return {"architecture": model.architecture} | ({} if model.head == "causal-lm" else {"head": model.head})


def stage_keys(checked: Checked) -> dict[str, Any]:
    """What stages gave as it is kept: what does not change from run to run."""
    found: dict[str, Any] = {}
    if checked.facts is not None:
        facts = checked.facts
        found |= {"class": facts.class_name, "parameters": facts.parameters, "blocks": list(facts.blocks)}
        found |= {"found_by": facts.found, "tied": facts.tied}
    for result in checked.stages:
        found[f"stage_{result.stage}"] = rounded_up(result.worst.difference)
        if not result.passed:
            found["different"] = f"stage {result.stage}: {result.worst.kind} {result.worst.where}"
    if checked.error:
        found["error"] = checked.error
    return found


def tensor_keys(result: TensorResult) -> dict[str, Any]:
    """What tensor parallelism gave as it is kept. share: rounded down, so that 1.0 is all."""
    if result.error:
        return {"error": result.error}
    found: dict[str, Any] = {"share": math.floor(result.share * 1000) / 1000, "sequence": result.sequence}
    found |= {"vocabulary": result.vocabulary, "notes": list(result.notes)}
    found |= {"whole": list(result.whole), "unused": list(result.unused)}
    if result.worst is not None:
        found["worst"] = rounded_up(result.worst.difference)
        if not result.passed:
            found["different"] = f"{result.worst.kind} {result.worst.where}"
    return found


def pipeline_keys(result: PipelineResult) -> dict[str, Any]:
    """What a pipeline gave as it is kept."""
    if result.error:
        return {"error": result.error}
    if result.worst is None:
        return {"notes": list(result.notes)}
    found: dict[str, Any] = {"worst": rounded_up(result.worst.difference), "crossing": result.crossing}
    return found if result.passed else found | {"different": f"{result.worst.kind} {result.worst.where}"}


def rounded_up(difference: float) -> str:
    """To a power of ten, so that the last bits of a machine do not change the table."""
    if difference == 0.0:
        return "0"
    return f"{10.0 ** math.ceil(math.log10(difference)):.0e}" if math.isfinite(difference) else "not finite"


def is_exact(row: Mapping[str, Any]) -> bool:
    """Under the stages."""
    return "stage_1" in row and "stage_3" in row and "different" not in row and "error" not in row


def is_cut_exactly(row: Mapping[str, Any]) -> bool:
    """Trained with matrices that two ranks share, with the numbers of one process."""
    tensor = row.get("tensor", {})
    return "worst" in tensor and "different" not in tensor and "error" not in tensor


def is_sound(row: Mapping[str, Any]) -> bool:
    """Exact wherever it trains: under tensor parallelism and in a pipeline it may also be refused, with what the plan says of it."""
    parts = [row.get(name, {"error": "was not run"}) for name in ("tensor", "pipeline")]
    return is_exact(row) and not any("different" in part or "error" in part for part in parts)


def page(results: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """The whole page, from the kept results."""
    causal = [row for row in results["rows"] if "head" not in row]
    others = [row for row in results["rows"] if "head" in row]
    exact = [row for row in causal if is_exact(row)]
    versions = f"transformers {results['transformers']}, torch {results['torch']}"
    lines = [
        HEAD,
        f"Data parallelism: {len(exact)} of {len(causal)} are exact ({versions}).",
        "",
        _cut_summary(causal),
        "",
        _staged_summary(causal),
        "",
    ]
    lines += [*COLUMNS, *(_line(row) for row in exact)]
    lines += ["", "## Other heads", "", "The same for models that are no causal language models.", ""]
    lines += [*COLUMNS, *(_line(row) for row in others)]
    lines += ["", "## What stays whole on every rank", "", WHOLE, ""]
    lines += ["| architecture | cut | matrices | not reached | what the plan says |", "|---|---:|---|---|---|"]
    lines += [_whole_line(row) for row in [*exact, *others] if _says_something(row.get("tensor", {}))]
    refused = [row for row in [*exact, *others] if row.get("pipeline", {}).get("notes")]
    lines += ["", "## Refused in a pipeline", "", "| architecture | why |", "|---|---|"]
    lines += [f"| `{label(row)}` | {_escaped('; '.join(row['pipeline']['notes']))} |" for row in refused]
    lines += ["", "## Not in the table", "", "| architecture | why |", "|---|---|"]
    lines += [
        f"| `{label(row)}` | {reasons.get(label(row)) or _unexplained(row)} |" for row in causal if not is_exact(row)
    ]
    return "\n".join(lines) + "\n"


def _cut_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many causal models train exactly with how much of them cut."""
    cut = [row["tensor"] for row in rows if is_cut_exactly(row)]
    wrong = [row for row in rows if "different" in row.get("tensor", {})]
    half = sum(tensor["share"] >= 0.5 for tensor in cut)
    most = sum(tensor["share"] >= 0.95 for tensor in cut)
    whole = sum(tensor["share"] == 1.0 for tensor in cut)
    reached = sum(not tensor["whole"] for tensor in cut)
    sequence = sum(tensor["sequence"] for tensor in cut)
    vocabulary = sum(tensor["vocabulary"] for tensor in cut)
    verdict = (
        "Without dropout, none trains with other numbers than one process" if not wrong else f"{len(wrong)} differ"
    )
    return (
        f"Tensor parallelism: {len(cut)} of {len(rows)} train exactly with matrices cut: {half} with at least half of their elements cut, "
        f"{most} with at least 95 %, {whole} with all ({reached} with all that this run reaches); {sequence} with the sequence cut, "
        f"{vocabulary} with the vocabulary cut. {verdict}."
    )


def _staged_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many causal models train exactly in two stages."""
    found = [row.get("pipeline", {}) for row in rows]
    exact = sum("worst" in part and "different" not in part for part in found)
    refused = sum("notes" in part for part in found)
    wrong = sum("different" in part for part in found)
    verdict = "none trains with other numbers than one process" if not wrong else f"{wrong} differ"
    return f"Pipelines: {exact} of {len(rows)} train exactly in two stages, {refused} are refused with the reason; {verdict}."


def _line(row: Mapping[str, Any]) -> str:
    blocks = " + ".join(map(str, row.get("blocks", ()))) or "none"
    cells = [f"`{row['architecture']}`", row.get("class", ""), f"{row.get('parameters', 0):,}", blocks]
    cells += [row.get("found_by", ""), "yes" if row.get("tied") else ""]
    cells += [_bound(row.get("stage_1", "")), _bound(row.get("stage_3", ""))]
    tensor = row.get("tensor", {"error": "was not run"})
    if "error" in tensor:
        cells += [f"not understood: {_escaped(tensor['error'])}", "", "", ""]
    elif "worst" not in tensor:
        cells += ["nothing is cut", "", "", ""]
    else:
        worst = (
            _bound(tensor["worst"]) if "different" not in tensor else f"**differs**: {_escaped(tensor['different'])}"
        )
        cells += [
            worst,
            _percent(tensor["share"]),
            *("yes" if tensor[key] else "" for key in ("sequence", "vocabulary")),
        ]
    cells.append(_staged(row.get("pipeline", {"error": "was not run"})))
    return f"| {' | '.join(cells)} |"


def _staged(pipeline: Mapping[str, Any]) -> str:
    """The cell of a pipeline."""
    if "error" in pipeline:
        return f"not understood: {_escaped(pipeline['error'])}"
    if "worst" not in pipeline:
        return "refused"
    if "different" in pipeline:
        return f"**differs**: {_escaped(pipeline['different'])}"
    crossing = "" if pipeline["crossing"] == 1 else f" ({pipeline['crossing']})"
    return _bound(pipeline["worst"]) + crossing


def _says_something(tensor: Mapping[str, Any]) -> bool:
    return any(tensor.get(key) for key in ("whole", "unused", "notes"))


def _whole_line(row: Mapping[str, Any]) -> str:
    tensor = row["tensor"]
    cells = [f"`{label(row)}`", _percent(tensor["share"])]
    cells += [", ".join(f"`{pattern}`" for pattern in _shortened(tensor[key])) for key in ("whole", "unused")]
    return f"| {' | '.join([*cells, '; '.join(map(_escaped, tensor['notes']))])} |"


def _shortened(patterns: Sequence[str]) -> list[str]:
    """What is left of some names without what all of them begin and end with, the first few."""
    short = [pattern.removesuffix(".weight").rpartition("*.")[2] for pattern in patterns]
    unique = list(dict.fromkeys(short))
    return unique[:MOST_PATTERNS] + (["..."] if len(unique) > MOST_PATTERNS else [])


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %".replace(".0 %", " %")


def _escaped(text: str) -> str:
    """One line that stands in a cell and is no mark-up."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _bound(shown: str) -> str:
    return shown if shown in ("0", "") else f"< {shown}"


def _unexplained(row: Mapping[str, Any]) -> str:
    text = str(row.get("error") or row.get("different", "was not run"))
    return f"not understood: {_escaped(text)}"


def load() -> dict[str, Any]:
    """The kept results where they are of these versions, else none."""
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    same = all(kept.get(name) == version for name, version in versions.items())
    return {**versions, "rows": kept["rows"] if same else []}


def save(results: dict[str, Any]) -> None:
    """Writes data and page, rows in alphabetical order, other heads last."""
    results["rows"].sort(key=lambda row: ("head" in row, label(row)))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({key: value for key, value in results.items() if key != "rows"})[:-1]
    RESULTS.write_text(f'{head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(results, json.loads(REASONS.read_text(encoding="utf-8"))), encoding="utf-8")


def checked_row(
    model: SmallModel, pool: WorkerPool, comparisons: Sequence[str], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """A row anew; of comparisons that are not asked for, what was kept."""
    from colossal_launch.architectures import check_pipeline, check_stages, check_tensor

    row = row_of(model)
    of_stages = {key: value for key, value in kept.items() if key not in {"tensor", "pipeline", *row}}
    row |= stage_keys(check_stages(model, pool)) if "stages" in comparisons else of_stages
    if "tensor" in comparisons:
        row["tensor"] = tensor_keys(check_tensor(model, pool))
    elif "tensor" in kept:
        row["tensor"] = kept["tensor"]
    if "pipeline" in comparisons:
        row["pipeline"] = pipeline_keys(check_pipeline(model, pool))
    elif "pipeline" in kept:
        row["pipeline"] = kept["pipeline"]
    return row


def verdict(row: Mapping[str, Any]) -> str:
    """A row in a few words, for who watches."""
    tensor = row.get("tensor", {})
    stages = "exact" if is_exact(row) else row.get("error") or row.get("different", "not run")
    cut = tensor.get("error") or tensor.get("different") or ("exact" if is_cut_exactly(row) else "nothing cut")
    staged = _staged(row.get("pipeline", {"error": "was not run"}))
    return f"stages {stages}; tensor {cut}, {_percent(tensor.get('share', 0.0))} cut; pipeline {staged}"


def sweep(
    models: Sequence[SmallModel], results: dict[str, Any], jobs: int, seconds: float, comparisons: Sequence[str]
) -> None:
    """Checks the models, `jobs` at a time, and saves after each one."""
    from colossal_core.testing import WorkerPool

    waiting: queue.SimpleQueue[SmallModel] = queue.SimpleQueue()
    for model in models:
        waiting.put(model)
    saving = threading.Lock()

    def work() -> None:
        with WorkerPool(timeout_seconds=seconds) as pool:
            while True:
                try:
                    model = waiting.get_nowait()
                except queue.Empty:
                    return
                name = label(row_of(model))
                kept: dict[str, Any] = next((row for row in results["rows"] if label(row) == name), {})
                row = checked_row(model, pool, comparisons, kept)
                with saving:
                    results["rows"] = [other for other in results["rows"] if label(other) != name] + [row]
                    save(results)
                    print(f"{name}: {verdict(row)}", flush=True)

    workers = [threading.Thread(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def everything() -> dict[str, SmallModel]:
    """All that the table has, by label."""
    from colossal_launch.architectures import OTHER_HEADS
    from colossal_launch.models.small import SmallModel, causal_architectures

    models = [*(SmallModel(name) for name in causal_architectures()), *OTHER_HEADS]
    return {label(row_of(model)): model for model in models}


def main(arguments: Sequence[str]) -> int:
    """0 where every architecture is exact, or is left out for a reason that is written down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="architectures (llama, bert:masked-lm), separated by commas; run again even where they were exact",
    )
    parser.add_argument(
        "--compare", default=",".join(COMPARISONS), help="stages, tensor, pipeline, separated by commas"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many models at a time, each on two processes")
    parser.add_argument("--seconds", type=float, default=120.0, help="the time limit for each comparison of a model")
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    chosen = parser.parse_args(arguments)
    comparisons = [name for name in COMPARISONS if name in chosen.compare.split(",")]
    results, models = load(), everything()
    results["rows"] = [row for row in results["rows"] if label(row) in models]
    sound = {label(row) for row in results["rows"] if is_sound(row) and not chosen.fresh}
    names = chosen.only.split(",") if chosen.only else [name for name in models if name not in sound]
    sweep([models[name] for name in names], results, chosen.jobs, chosen.seconds, comparisons)
    save(results)
    reasons = json.loads(REASONS.read_text(encoding="utf-8"))
    left = [label(row) for row in results["rows"] if not is_sound(row)]
    unexplained = [name for name in left if name not in reasons]
    causal = [row for row in results["rows"] if "head" not in row]
    print(_cut_summary(causal), _staged_summary(causal), sep="\n")
    print(
        f"{len(results['rows']) - len(left)} of {len(results['rows'])} are exact; not understood: {', '.join(unexplained) or 'none'}"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
