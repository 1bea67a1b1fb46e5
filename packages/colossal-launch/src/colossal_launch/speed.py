"""Work in a step, and the share of a device's peak that it reaches (MFU, Chowdhery et al. 2022, appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PEAK_FLOPS: Mapping[str, Mapping[str, float]] = {
    "H200": {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12, "fp64": 67e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12, "fp64": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "fp64": 19.5e12},
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1125e12, "fp32": 80e12, "fp64": 40e12},
}
"""Dense peak by a part of the device's name and precision, from the vendor's data sheets (SXM parts)."""


@dataclass(frozen=True)
class WorkPerToken:
    """Floating-point operations of one trained token: 6 P + 12 L h s.

    num_active: P, parameters that a token passes through in matrix products (of experts, those that are chosen; without the embedding
    table unless it is the head too). num_layers: L. hidden_size: h, heads times their size. sequence_length: s. Attention is
    counted whole, not halved for the causal mask. Recomputation is not counted.
    """

    num_active: int
    num_layers: int
    hidden_size: int
    sequence_length: int

    @property
    def flops(self) -> float:
        return 6.0 * self.num_active + 12.0 * self.num_layers * self.hidden_size * self.sequence_length

    @property
    def formula(self) -> str:
        return (
            f"MFU = tokens/s/GPU x (6 x {self.num_active:,} active parameters + 12 x {self.num_layers} layers x "
            f"{self.hidden_size} x {self.sequence_length} tokens) / peak"
        )


def work_per_token(module: nn.Module, config: Any, sequence_length: int) -> WorkPerToken:
    """The work of a model. config: transformers' config, or None (then attention, whose sizes are not known, is not counted)."""
    from torch import nn

    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    heads = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    text = config.get_text_config() if config is not None else None
    chosen, experts = getattr(text, "num_experts_per_tok", None), _num_experts(text)
    share = Fraction(chosen, experts) if chosen and experts else Fraction(1)
    active = 0
    for name, parameter in module.named_parameters():
        if id(parameter) in tables - heads:
            continue
        of_experts = ".experts." in f".{name}." and "shared" not in name
        active += int(parameter.numel() * share) if of_experts else parameter.numel()
    if text is None:
        return WorkPerToken(active, 0, 0, sequence_length)
    num_heads, head_size = getattr(text, "num_attention_heads", 0), getattr(text, "head_dim", None)
    width = num_heads * head_size if head_size and num_heads else getattr(text, "hidden_size", 0)
    return WorkPerToken(active, getattr(text, "num_hidden_layers", 0), width, sequence_length)


def _num_experts(config: Any) -> int | None:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """The dense peak of a device, or None where it is not in the table (a CPU): then no MFU is reported.

    fp32 is measured against TF32's peak where torch lets matrix products use it (some images turn it on by an environment variable).
    """
    import torch

    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return next((rates.get(precision) for part, rates in PEAK_FLOPS.items() if part in device_name), None)
