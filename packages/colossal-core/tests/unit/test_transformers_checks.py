"""Questions of transformers' models that wait for the device: asked once where the answer cannot change, and every time where it can."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.transformers_checks import FirstAnswers

transformers: Any = pytest.importorskip("transformers", reason="core works without transformers; these are its models")
masks: Any = pytest.importorskip("transformers.masking_utils")

END = 1


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, attn_implementation="sdpa", **sizes, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


class Packing(nn.Module):
    """A user's model around one of transformers': positions begin anew at every end of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()

    def forward(self, input_ids: torch.Tensor) -> Any:
        index = torch.arange(input_ids.shape[1])
        start = torch.where(input_ids == END, index, 0).cummax(dim=1).values
        return self.inner(input_ids=input_ids, position_ids=index - start, use_cache=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each time that transformers looks for packed sequences."""
    seen: list[int] = []
    look: Callable[..., Any] = masks.find_packed_sequence_indices

    def counted(position_ids: torch.Tensor) -> Any:
        seen.append(1)
        return look(position_ids)

    monkeypatch.setattr(masks, "find_packed_sequence_indices", counted)
    yield seen
    assert masks.find_packed_sequence_indices is counted


def test_a_model_of_transformers_is_asked_once(asked: list[int]) -> None:
    answers, model = FirstAnswers(), tiny_llama()
    for _ in range(3):
        with answers.remembered(model):
            model(input_ids=torch.full((2, 6), 5), use_cache=False)
    assert len(asked) == 1


def test_a_users_model_around_one_is_asked_every_time(asked: list[int]) -> None:
    """The first batch has no end of a text inside a row, the second has: its attention must stay inside each text."""
    answers, model = FirstAnswers(), Packing()
    plain = torch.randint(2, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    packed = plain.clone()
    packed[:, 4] = END
    found = []
    for tokens in (plain, packed):
        with answers.remembered(model):
            found.append(model(tokens).logits)
    assert len(asked) == 2
    torch.testing.assert_close(found[1], model(packed).logits, rtol=0, atol=0)
    torch.testing.assert_close(found[1][:, 4:], model(packed[:, 4:]).logits)


def test_an_exception_leaves_transformers_as_it_was(asked: list[int]) -> None:
    answers, model = FirstAnswers(), tiny_llama()
    warn = transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), answers.remembered(model):
            raise RuntimeError("inside")
    assert transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask is warn
    with answers.remembered(model):
        model(input_ids=torch.full((2, 6), 5), use_cache=False)
    assert len(asked) == 1


def test_threads_do_not_get_each_others_answers(asked: list[int]) -> None:
    """Simulated ranks are threads: one begins while another is inside, and leaves after it."""
    inside, leave = threading.Event(), threading.Event()
    first, model = FirstAnswers(), tiny_llama()

    def other() -> None:
        with FirstAnswers().remembered(model):
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=other)
    with FirstAnswers().remembered(model):
        thread.start()
        assert inside.wait(60)
    leave.set()
    thread.join()
    for _ in range(2):
        with first.remembered(model):
            model(input_ids=torch.full((2, 6), 5), use_cache=False)
    assert len(asked) == 1
