"""What crosses between blocks, and where parameters are read: hand-written models with every peculiarity, and transformers'."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from colossal_core.dataflow import tensors_in, with_tensors
from colossal_core.examine import examine
from colossal_core.flow import Flow, Passed
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches

TOKENS = {"tokens": torch.zeros(2, 3, dtype=torch.long)}
HEAD_LAST = (("embedding", (0,)), ("head", (6,)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


class Stack(nn.Module):
    """An embedding, three blocks and a head. Never called: `spare`. Read without being called, where a test says so: `outer`."""

    def __init__(self, blocks: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.blocks = nn.ModuleList(blocks if blocks is not None else [Block() for _ in range(3)])
        self.outer = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)
        self.head = nn.Linear(4, 16)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def flow_of(model: nn.Module, batch: Mapping[str, Tensor] = TOKENS) -> Flow:
    anatomy = examine(model, batch)
    assert (anatomy.untraced, anatomy.unfollowed) == ("", "")
    assert anatomy.flow is not None
    assert anatomy.flow == copy.deepcopy(anatomy).flow
    return anatomy.flow


def reads(flow: Flow, start: str) -> dict[str, tuple[int, ...]]:
    return {name: positions for name, positions in flow.read if name.startswith(start)}


def crossing(flow: Flow) -> list[list[tuple[str, int]]]:
    """Before every block call but the first: units and numbers of outputs."""
    return [[(each.unit, each.output) for each in flow.crossing(call)] for call in range(1, len(flow.blocks))]


def test_a_stack_hands_on_one_tensor() -> None:
    flow = flow_of(Stack())
    assert flow.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert flow.outside == HEAD_LAST
    assert flow.passed == (
        Passed("embedding", 0, 0, 0, 1),
        Passed("blocks.0", 0, 0, 1, 3),
        Passed("blocks.1", 0, 0, 3, 5),
        Passed("blocks.2", 0, 0, 5, 6),
    )
    assert flow.read == (
        ("embedding.weight", (0,)),
        ("blocks.0.inner.weight", (1,)),
        ("blocks.0.inner.bias", (1,)),
        ("blocks.1.inner.weight", (3,)),
        ("blocks.1.inner.bias", (3,)),
        ("blocks.2.inner.weight", (5,)),
        ("blocks.2.inner.bias", (5,)),
        ("outer.weight", ()),
        ("outer.bias", ()),
        ("spare.weight", ()),
        ("spare.bias", ()),
        ("head.weight", (6,)),
        ("head.bias", (6,)),
    )


def test_the_tiny_model_of_the_kit() -> None:
    model = TinyModel(TinyOptions(num_blocks=3, shared=True, unused=True))()
    batch = {key: value for key, value in TokenBatches()(0, 2).items() if key != "labels"}
    flow = flow_of(model, batch)
    assert flow.outside == (("tokens", (0,)), ("positions", (0,)), ("norm", (6,)), ("head", (6,)))
    assert flow.crossing(0) == ()
    assert crossing(flow) == [[("blocks.0", 0)], [("blocks.1", 0)]]
    assert reads(flow, "tokens") == {"tokens.weight": (0, 6)}
    assert reads(flow, "blocks.0.down") == {"blocks.0.down.weight": (1, 3, 5), "blocks.0.down.bias": (1, 3, 5)}
    assert reads(flow, "spare") == {"spare.weight": (), "spare.bias": ()}


class Skip(Stack):
    def forward(self, tokens: Tensor) -> Any:
        x = first = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x + first)


class SkipBySum(Stack):
    """The skip is of what is computed between units."""

    def forward(self, tokens: Tensor) -> Any:
        x = first = self.embedding(tokens) + self.outer(torch.ones(4))
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "first": first}


def test_a_skip_crosses_everywhere() -> None:
    flow = flow_of(Skip())
    assert flow.passed[0] == Passed("embedding", 0, 0, 0, 6)
    assert crossing(flow) == [[("embedding", 0), ("blocks.0", 0)], [("embedding", 0), ("blocks.1", 0)]]


def test_what_is_computed_between_units_and_returned_is_used_at_the_end_in_its_parts() -> None:
    flow = flow_of(SkipBySum())
    assert flow.passed[:2] == (Passed("embedding", 0, 0, 0, 6), Passed("outer", 0, 0, 0, 6))
    assert flow.outside == (("embedding", (0,)), ("outer", (0,)), ("head", (6,)))


def test_a_tied_embedding_is_read_at_both_ends() -> None:
    model = Stack()
    model.head.weight = model.embedding.weight
    flow = flow_of(model)
    assert reads(flow, "embedding") == {"embedding.weight": (0, 6)}
    assert "head.weight" not in dict(flow.read)


def test_a_repeated_block_has_several_calls() -> None:
    shared, other = Block(), Block()
    flow = flow_of(Stack([shared, other, shared]))
    assert flow.blocks == ("blocks.0", "blocks.1", "blocks.0")
    assert flow.passed[1] == Passed("blocks.0", 0, 0, 1, 3)
    assert flow.passed[3] == Passed("blocks.0", 1, 0, 5, 6)
    assert reads(flow, "blocks.0") == {"blocks.0.inner.weight": (1, 5), "blocks.0.inner.bias": (1, 5)}


class Adding(Block):
    """Changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.inner(x))


class WritesBetween(Stack):
    """A later block's input is written into a buffer that was there before, through a view."""

    def forward(self, tokens: Tensor) -> Any:
        first = self.embedding(tokens)
        both = torch.zeros(2, 3, 8)
        both[..., :4].copy_(first)
        x = first
        for block in self.blocks:
            x = block(x)
        both[..., 4:] += x
        return self.head(both[..., :4] + both[..., 4:])


def test_writing_in_place() -> None:
    assert flow_of(Stack([Adding() for _ in range(3)])) == flow_of(Stack())
    flow = flow_of(WritesBetween())
    assert flow.passed[0] == Passed("embedding", 0, 0, 0, 6)
    assert flow.passed[-1] == Passed("blocks.2", 0, 0, 5, 6)


class Shifted(Block):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y: Tensor = x + self.inner(x) if shift is None else x + self.inner(x) + shift
        return y


class Functional(Stack):
    """`outer.weight` is read in the gap, and the result of that by the last block; `outer` is never called."""

    def forward(self, tokens: Tensor) -> Any:
        shift = self.outer.weight.sum(0).tanh()
        x = self.blocks[1](self.blocks[0](self.embedding(tokens)))
        return self.head(self.blocks[2](x, shift))


def test_a_parameter_read_between_units_is_read_where_its_result_is() -> None:
    flow = flow_of(Functional([Shifted() for _ in range(3)]))
    assert reads(flow, "outer") == {"outer.weight": (0, 5), "outer.bias": ()}
    assert flow.outside == HEAD_LAST
    assert crossing(flow) == [[("blocks.0", 0)], [("blocks.1", 0)]]


@dataclass
class Handed:
    x: Tensor
    count: int
    shift: Tensor


class PassesOn(Block):
    """Returns the shift that it is given, after its own output; the first one makes it."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        shift = self.inner.bias * 2 if shift is None else shift
        return Handed(x + self.inner(x), 1, shift)


class CarriesTwo(Stack):
    def forward(self, tokens: Tensor) -> Any:
        handed = self.blocks[0](self.embedding(tokens))
        for block in self.blocks[1:]:
            handed = block(handed.x, handed.shift)
        return self.head(handed.x + handed.shift)


def test_what_a_block_merely_passes_on_is_its_own_output() -> None:
    flow = flow_of(CarriesTwo([PassesOn() for _ in range(3)]))
    assert crossing(flow) == [[("blocks.0", 0), ("blocks.0", 1)], [("blocks.1", 0), ("blocks.1", 1)]]
    assert [each.used for each in flow.passed] == [1, 3, 3, 5, 5, 6, 6]


class KeepsOriginal(Stack):
    """The embedding is handed through every block, and yet read from the variable that it was first kept in."""

    def forward(self, tokens: Tensor) -> Any:
        first = self.embedding(tokens)
        handed = Handed(first, 0, first)
        for block in self.blocks:
            handed = block(handed.x, handed.shift)
        return self.head(handed.x + first)


def test_a_tensor_passed_on_is_told_from_the_one_given() -> None:
    flow = flow_of(KeepsOriginal([PassesOn() for _ in range(3)]))
    assert flow.passed[0] == Passed("embedding", 0, 0, 0, 6)
    assert flow.passed[-1] == Passed("blocks.2", 0, 0, 5, 6)


class Translator(nn.Module):
    """Two chains: every block of the second reads the first's result."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 4)
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.decoder = nn.ModuleList(Shifted() for _ in range(2))

    def forward(self, tokens: Tensor, target: Tensor) -> Any:
        memory = self.tokens(tokens)
        for block in self.encoder:
            memory = block(memory)
        memory = self.norm(memory)
        x = self.tokens(target)
        for block in self.decoder:
            x = block(x, memory)
        return (x @ self.tokens.weight.T,)


def test_two_chains_are_one_time_line() -> None:
    flow = flow_of(Translator(), {**TOKENS, "target": TOKENS["tokens"]})
    assert flow.blocks == ("encoder.0", "encoder.1", "decoder.0", "decoder.1")
    assert flow.outside == (("tokens", (0, 4)), ("norm", (4,)))
    assert Passed("tokens", 1, 0, 4, 5) in flow.passed
    assert Passed("norm", 0, 0, 4, 7) in flow.passed
    assert reads(flow, "tokens") == {"tokens.weight": (0, 4, 8)}
    assert crossing(flow) == [
        [("encoder.0", 0)],
        [("encoder.1", 0)],
        [("norm", 0), ("decoder.0", 0)],
    ]


class Calls(Block):
    """Calls a module that stands outside the blocks."""

    def __init__(self, outer: nn.Module) -> None:
        super().__init__()
        self.reach = [outer]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reach[0](super().forward(x))
        return y


def test_a_unit_called_inside_a_block_is_read_there_and_makes_nothing() -> None:
    model = Stack()
    model.blocks = nn.ModuleList([Block(), Calls(model.outer), Block()])
    flow = flow_of(model)
    assert flow.outside == HEAD_LAST
    assert reads(flow, "outer") == {"outer.weight": (3,), "outer.bias": (3,)}
    assert [each.unit for each in flow.passed] == ["embedding", "blocks.0", "blocks.1", "blocks.2"]


class LikeInShape(Stack):
    """A mask that is made in the shape of the embedding crosses nothing: it can be made of any tensor of that shape."""

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        shift = torch.ones_like(x) + x.new_zeros(4)
        for block in self.blocks:
            x = block(x, shift)
        return self.head(x)


def test_shapes_are_not_read() -> None:
    assert crossing(flow_of(LikeInShape([Shifted() for _ in range(3)]))) == [[("blocks.0", 0)], [("blocks.1", 0)]]


class Remembers(Block):
    """Leaves a tensor for the others behind everybody's back."""

    def __init__(self, memory: list[Tensor]) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        self.memory.append(self.inner(x))
        return x + self.memory[0]


def test_a_tensor_handed_on_beside_the_output_is_told_and_gives_no_flow() -> None:
    memory: list[Tensor] = []
    model = Stack([Remembers(memory) for _ in range(3)])
    anatomy = examine(model, TOKENS)
    assert anatomy.flow is None
    assert anatomy.unfollowed == "a tensor that blocks.0 makes and does not return is read in blocks.1"


def test_an_input_that_a_block_changes_and_others_read_later_gives_no_flow() -> None:
    anatomy = examine(Skip([Adding() for _ in range(3)]), TOKENS)
    assert anatomy.flow is None
    assert anatomy.unfollowed == "a tensor that blocks.0 makes and does not return is read outside the blocks"


def test_without_a_trace_there_is_no_flow() -> None:
    anatomy = examine(Stack())
    assert anatomy.flow is None
    assert anatomy.unfollowed == anatomy.untraced == "no example batch is known for this class of model"
    alone = examine(nn.Linear(2, 2), {"input": torch.zeros(1, 2)})
    assert (alone.flow, alone.untraced, alone.unfollowed) == (None, "", "no block was found by data flow")


class Pair(NamedTuple):
    left: Tensor
    right: object


def test_other_tensors_in_the_same_places() -> None:
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    kept = object()
    value = {"a": [one, (Pair(two, kept), None)], "b": Handed(three, 5, one), "c": [1, 2]}
    other = tuple(torch.ones(index) for index in range(4))
    made = with_tensors(value, iter(other))
    assert [id(tensor) for tensor in tensors_in(made)] == [id(tensor) for tensor in other]
    assert [id(tensor) for tensor in tensors_in(value)] == [id(tensor) for tensor in (one, two, three, one)]
    assert made["a"][1][0].right is kept
    assert isinstance(made["a"][1][0], Pair)
    assert made["b"].count == 5
    assert made["c"] is value["c"]


NAMED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
SHORT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 64}
CODED = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "vocab_size": 64}
CODED = {**CODED, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
ONE_TENSOR: list[tuple[str, Mapping[str, Any]]] = [
    ("LlamaForCausalLM", {**NAMED, "num_key_value_heads": 2}),
    ("GPT2LMHeadModel", SHORT),
    ("GemmaForCausalLM", {**NAMED, "num_key_value_heads": 2, "head_dim": 8}),
    ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64}),
    ("OPTForCausalLM", {**NAMED, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    ("ViTForImageClassification", {**NAMED, "image_size": 16, "patch_size": 8}),
    ("MixtralForCausalLM", {**NAMED, "num_key_value_heads": 2, "num_local_experts": 4}),
]


def transformers_flow(name: str, settings: Mapping[str, Any]) -> Flow:
    transformers = pytest.importorskip("transformers", reason="core works without transformers; these are its models")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        anatomy = examine(kind(kind.config_class(**settings)))
    assert anatomy.unfollowed == ""
    assert anatomy.flow is not None
    return anatomy.flow


@pytest.mark.parametrize(("name", "settings"), ONE_TENSOR, ids=[row[0] for row in ONE_TENSOR])
def test_blocks_of_transformers_hand_on_one_tensor(name: str, settings: Mapping[str, Any]) -> None:
    flow = transformers_flow(name, settings)
    assert len(flow.blocks) == 3
    assert crossing(flow) == [[(flow.blocks[0], 0)], [(flow.blocks[1], 0)]]
    own = {name: positions for name, positions in flow.read if name.startswith(flow.blocks[1])}
    assert own
    assert set(own.values()) == {(3,)}
    assert not [name for name, positions in flow.read if not positions]


def test_ends_of_gpt2_and_llama() -> None:
    gpt2 = transformers_flow("GPT2LMHeadModel", SHORT)
    ends = (("transformer.wte", (0,)), ("transformer.wpe", (0,)), ("transformer.ln_f", (6,)), ("lm_head", (6,)))
    assert gpt2.outside == ends
    assert reads(gpt2, "transformer.wte") == {"transformer.wte.weight": (0, 6)}
    llama = transformers_flow("LlamaForCausalLM", NAMED)
    assert llama.outside == (("model.embed_tokens", (0,)), ("model.norm", (6,)), ("lm_head", (6,)))
    assert reads(llama, "lm_head") == {"lm_head.weight": (6,)}


def boundaries(flow: Flow) -> Iterator[set[str]]:
    for units in crossing(flow):
        yield {f"{unit}:{output}" for unit, output in units}


def test_t5_carries_its_relative_positions_and_the_encoder_s_result() -> None:
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    flow = transformers_flow("T5ForConditionalGeneration", {**settings, "vocab_size": 64})
    assert flow.blocks == (*(f"encoder.block.{index}" for index in range(2)), *(f"decoder.block.{i}" for i in range(3)))
    memory = "encoder.final_layer_norm:0"
    assert list(boundaries(flow)) == [
        {"encoder.block.0:0", "encoder.block.0:1"},
        {"encoder.block.1:0"},
        {memory, "decoder.block.0:0", "decoder.block.0:1", "decoder.block.0:2"},
        {memory, "decoder.block.1:0", "decoder.block.1:1", "decoder.block.1:2"},
    ]
    assert Passed("encoder.final_layer_norm", 0, 0, 4, 10) in flow.passed
    assert reads(flow, "shared") == {"shared.weight": (0, 4, 10)}
    assert set(reads(flow, "decoder.block.1").values()) == {(7,)}


def test_bart_and_whisper_carry_the_encoder_s_result() -> None:
    bart = transformers_flow("BartForConditionalGeneration", {**CODED, **SPECIAL})
    memory = "model.encoder.layers.1:0"
    assert list(boundaries(bart)) == [
        {"model.encoder.layers.0:0"},
        {memory},
        {memory, "model.decoder.layers.0:0"},
        {memory, "model.decoder.layers.1:0"},
    ]
    sound = {**CODED, **SPECIAL, "max_source_positions": 30, "num_mel_bins": 16}
    whisper = transformers_flow("WhisperForConditionalGeneration", sound)
    memory = "model.encoder.layer_norm:0"
    assert list(boundaries(whisper)) == [
        {"model.encoder.layers.0:0"},
        {"model.encoder.layers.1:0"},
        {memory, "model.decoder.layers.0:0"},
        {memory, "model.decoder.layers.1:0"},
    ]
    assert reads(whisper, "model.decoder.embed_tokens") == {"model.decoder.embed_tokens.weight": (4, 10)}


def test_keys_and_values_that_layers_share_in_secret_give_no_flow() -> None:
    transformers = pytest.importorskip("transformers", reason="core works without transformers; these are its models")
    small = {**NAMED, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    config = transformers.Gemma3nTextConfig(
        **small, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2
    )
    with torch.device("meta"):
        anatomy = examine(transformers.Gemma3nForCausalLM(config))
    assert anatomy.flow is None
    assert anatomy.unfollowed.startswith("a tensor that model.layers.")
