"""The models that are measured: transformers' own classes, and the work of one token in them.

The formula is that of the peers' table: FLOPs a token = 6 N + 12 L h T, with N the weights of matrix products (attention and MLP of every
layer, and the output projection once), L layers, h the hidden size, T the sequence length. Attention is counted whole, recomputation and
padding of the vocabulary are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from colossal_launch.models import WeightSource

PEAK_FLOPS: Mapping[str, float] = {"H200": 989.4e12, "H100": 989.4e12}
"""Dense bf16 by a part of the device's name, from the vendor's data sheets."""


@dataclass(frozen=True)
class Shape:
    """One model. config: keys of transformers' config class. blocks: the list of its layers. counted_vocab: the vocabulary without padding,
    which tokens are drawn from. matmul_weights: N of the formula.
    """

    architecture: str
    config: Mapping[str, Any]
    blocks: str
    num_layers: int
    hidden_size: int
    sequence_length: int
    counted_vocab: int
    matmul_weights: int

    @property
    def flops_per_token(self) -> float:
        return 6.0 * self.matmul_weights + 12.0 * self.num_layers * self.hidden_size * self.sequence_length

    @property
    def formula(self) -> str:
        return (
            f"MFU = tokens/s/GPU x (6 x {self.matmul_weights:,} + 12 x {self.num_layers} x {self.hidden_size} x "
            f"{self.sequence_length}) / peak = tokens/s/GPU x {self.flops_per_token:.5g} / peak"
        )

    def block_names(self) -> list[str]:
        return [f"{self.blocks}.{index}" for index in range(self.num_layers)]


def gpt2(num_layers: int, hidden: int, heads: int, length: int, vocab: int, padded: int) -> Shape:
    """GPT-2 without dropout, its output projection tied to the embedding."""
    config = {
        "n_layer": num_layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_positions": length,
        "vocab_size": padded,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": vocab - 1,
        "eos_token_id": vocab - 1,
    }
    weights = 12 * num_layers * hidden**2 + vocab * hidden
    return Shape("gpt2", config, "transformer.h", num_layers, hidden, length, vocab, weights)


def llama(num_layers: int, hidden: int, feed_forward: int, heads: tuple[int, int], length: int, vocab: int) -> Shape:
    """Llama with its own output projection. heads: of queries, of keys and values."""
    config = {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": length,
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
    }
    attention = 2 * hidden**2 + 2 * hidden * (hidden * heads[1] // heads[0])
    weights = num_layers * (attention + 3 * hidden * feed_forward) + vocab * hidden
    return Shape("llama", config, "model.layers", num_layers, hidden, length, vocab, weights)


def shapes() -> dict[str, Shape]:
    """Every model by its name on the command line."""
    return {
        "gpt2-1.5b": gpt2(48, 1600, 25, 1024, 50257, 50304),
        "llama-8b": llama(32, 4096, 14336, (32, 8), 8192, 128256),
        "llama-8b-4096": llama(32, 4096, 14336, (32, 8), 4096, 128256),
        "llama-1b": llama(20, 2048, 5632, (16, 16), 2048, 32768),
        "tiny": gpt2(3, 32, 4, 32, 61, 64),
        "small-llama": llama(16, 64, 96, (8, 4), 64, 256),
        "tiny-llama": llama(2, 64, 96, (8, 4), 32, 64),
    }


def on_meta(shape: Shape) -> nn.Module:
    """The model with its parameters on the meta device and its buffers real, attention by `scaled_dot_product_attention`."""
    import transformers

    from colossal_launch.models import parameters_on_meta

    auto: Any = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.for_model(shape.architecture, use_cache=False, **shape.config)
    with parameters_on_meta():
        model: nn.Module = auto.from_config(config, attn_implementation="sdpa")
    return model


class Filler:
    """Gives a model on the meta device its first values, one unit after the other: the same for every contestant.

    The values are the library's own (`InitialWeights`, keyed by seed and module name), drawn on `device`.
    """

    def __init__(self, model: nn.Module, blocks: list[str], device: torch.device, seed: int = 0) -> None:
        self._source = initial_weights(model, device, seed)
        self._blocks = blocks
        self._parameters = dict(model.named_parameters())
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, key))
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)

    def fill(self, unit: str) -> None:
        """Puts float32 parameters in the place of one unit's: a block by its name, or everything outside the blocks by the empty name."""
        for name, value in self._source.values(unit, self._blocks):
            parameter = nn.Parameter(value)
            for module, key in self._places[id(self._parameters[name])]:
                module._parameters[key] = parameter

    def units(self) -> Iterator[str]:
        """The blocks, then the rest."""
        yield from self._blocks
        yield ""


def initial_weights(model: nn.Module, device: torch.device, seed: int = 0) -> WeightSource:
    """First values of a model on the meta device, drawn on `device`."""
    from colossal_launch.models import InitialWeights

    return InitialWeights(model, seed, device=device)
