"""Number formats: what the forward pass computes in, what the optimizer keeps, and fp16's dynamic loss scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from colossal_core.config import TrainConfig

PrecisionName = Literal["fp64", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Precision:
    """compute: dtype of the forward and backward pass. master: dtype of master weights and optimizer states. gradient: dtype in which
    gradients are accumulated over microbatches and kept once they are reduced.

    scaled: whether the loss is scaled dynamically (fp16). throughout: whether every float32 inside the model is lifted to float64
    (fp64, for comparisons: transformers' norms and softmax cast to float32, which would hide anything below 1e-7).
    """

    name: PrecisionName
    compute: torch.dtype
    master: torch.dtype
    gradient: torch.dtype
    scaled: bool = False
    throughout: bool = False


def precision(name: str) -> Precision:
    """The precision by its name in the config."""
    import torch

    table = {
        "fp64": Precision("fp64", torch.float64, torch.float64, torch.float64, throughout=True),
        "fp32": Precision("fp32", torch.float32, torch.float32, torch.float32),
        "bf16": Precision("bf16", torch.bfloat16, torch.float32, torch.float32),
        "fp16": Precision("fp16", torch.float16, torch.float32, torch.float32, scaled=True),
    }
    return table[name]


def precision_of(config: TrainConfig) -> Precision:
    """The precision of a run: by its name, and with masters in the compute dtype where bf16 is trained without float32 masters.

    Gradients are still accumulated and reduced in float32 there. fp32 and fp64 keep no other masters anyhow; fp16 refuses it
    (`optimizer_problems`).
    """
    found = precision(config.precision)
    if found.name == "bf16" and config.optimizer.masters == "compute":
        return replace(found, master=found.compute)
    return found


class LossScale:
    """The dynamic loss scale of fp16, kept on the device: no step waits for it (Micikevicius et al. 2018, section 3.2).

    scale: 0-d float32. It is halved after a step whose gradients overflowed, and doubled after `growth_interval` steps without one.
    """

    def __init__(self, device: torch.device, *, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        import torch

        self.scale = torch.tensor(initial, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.growth_interval = growth_interval

    def update(self, skipped: torch.Tensor) -> None:
        """skipped: 0-d bool, equal on every rank."""
        import torch

        good = torch.where(skipped, 0, self.good_steps + 1)
        grow = good >= self.growth_interval
        factor = torch.where(skipped, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(min=1.0)
        self.good_steps.copy_(torch.where(grow, 0, good))
