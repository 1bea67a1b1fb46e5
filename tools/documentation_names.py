"""What the documentation's Python takes as given: a model, its optimizer, a dataset, and a small `run.yaml`."""

from __future__ import annotations

from pathlib import Path

CONFIG = """batch: {global_size: 4}
train: {device: cpu, num_steps: 2}
checkpoint: {directory: runs/mine}
"""


def names(folder: Path) -> dict[str, object]:
    """Writes `run.yaml` into `folder` and returns a small Llama with its optimizer and eight sequences of 16 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    (folder / "run.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 64, (8, 16))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3), "dataset": dataset}
