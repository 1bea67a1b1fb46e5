"""transformers' own tensor and expert plans, in our words. The one place that knows its style names, tried on 5.17.0 and 5.23.0.

A plan maps a name pattern (`*` stands for a number) to the name of a style. Names are added from version to version and a few have changed
what they do (`grouped_gemm` beside `ep_router` in 5.17, beside `ep_dispatch_experts` in 5.23), so each is read as what it does to ONE
tensor or module; what is not known here is kept as `unknown:<name>` and left to whoever reads the plan to report.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

STYLES: Mapping[str, str] = {
    "colwise": "column",
    "colwise_rep": "column_gathered",
    "colwise_gather_output": "column_gathered",
    "rowwise": "row",
    "rowwise_rep": "row_split_input",
    "rowwise_split_input": "row_split_input",
    "packed_colwise": "packed_column",
    "packed_rowwise": "packed_row",
    "embedding_rowwise": "embedding_vocabulary",
    "embedding_colwise": "embedding_hidden",
    "sequence_parallel": "sequence",
    "replicate": "replicated",
    "replicated_with_grad_allreduce": "replicated_partial_gradient",
    "local_params": "local",
    "all_reduce": "sum_output",
    "mla_kv_a_proj": "latent_key_value",
    "moe_tp_experts": "experts_sum_output",
    "moe_identity_expert": "experts_identity",
    "grouped_gemm": "expert_dimension",
    "ep_router": "experts_masked_router",
    "ep_dispatch_experts": "experts_dispatch",
    "megamoe_router": "experts_masked_router",
    "megamoe_experts": "experts_sum_output",
}
"""transformers' style -> ours. column, row: the weight's output or input features are cut; `_gathered`: the output is gathered whole,
`_split_input`: the input arrives whole and is cut; packed: several weights in one. embedding_*: which dimension of the table is cut.
sequence: computed on a part of the sequence. replicated_partial_gradient: whole, but each rank's gradient is a part of the sum.
local: arrives already cut. sum_output: the module's outputs add up. latent_key_value: only the rotary part is shared by heads.
expert_dimension: the leading dimension, one row an expert, is cut. experts_masked_router + experts_sum_output: every rank sees every
token and adds up; experts_dispatch: tokens travel to their expert's rank. experts_identity: an expert that returns its input.
"""

UNKNOWN_PREFIX = "unknown:"


def tensor_plan(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """The model's tensor-parallel plan as (pattern, our style), in its order; empty for a model without one."""
    return _normalised(getattr(model, "tp_plan", None), model)


def expert_plan(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """The model's expert-parallel plan as (pattern, our style), in its order; empty for a model without one."""
    # 5.17 has no such property: its `tp_plan` shows the expert plan instead once expert parallelism is switched on.
    plan = getattr(model, "ep_plan", None)
    return _normalised(plan if plan is not None else getattr(model, "_ep_plan", None), model)


def unknown_styles(plan: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The styles in a normalised plan that this adapter does not know, by transformers' name."""
    styles = (style.removeprefix(UNKNOWN_PREFIX) for _, style in plan if style.startswith(UNKNOWN_PREFIX))
    return tuple(dict.fromkeys(styles))


def is_transformers_model(model: nn.Module) -> bool:
    """Whether the class descends from transformers' `PreTrainedModel`, told without importing transformers."""
    return any(
        parent.__name__ == "PreTrainedModel" and parent.__module__.startswith("transformers.")
        for parent in type(model).__mro__
    )


def _normalised(plan: object, model: nn.Module) -> tuple[tuple[str, str], ...]:
    if not isinstance(plan, Mapping) or not is_transformers_model(model):
        return ()
    return tuple((str(pattern), STYLES.get(str(name), UNKNOWN_PREFIX + str(name))) for pattern, name in plan.items())
