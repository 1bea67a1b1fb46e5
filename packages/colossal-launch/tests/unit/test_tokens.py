"""Tokenizers, token files, sequences, and the bytes behind scored tokens."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from colossal_core.config.sections import DataConfig
from colossal_core.errors import ConfigError
from colossal_launch.data.documents import Document
from colossal_launch.data.packing import TextDataset, bits_per_byte, token_dtype, write_tokens
from colossal_launch.data.preparation import open_text, prepare_text
from colossal_launch.data.tokenizer import ByteTokenizer, FastTokenizer, Tokenizer, load_tokenizer, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n", "naïve 文字 🙂🙂 <|endoftext|> end", "   leading and trailing   "]


def _text_file(folder: Path, num_lines: int = 3000) -> Path:
    path = folder / "a.txt"
    path.write_text("".join(f"line {number} says {number * number % 97} é\n" for number in range(num_lines)))
    return path


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_token_lengths_add_up_to_the_bytes_of_the_text(kind: str) -> None:
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe(TEXTS * 5, 300)
    for text in [*TEXTS, "", "\x00\n\t"]:
        ids, lengths = tokenizer.encode_with_lengths(text)
        assert np.array_equal(ids, tokenizer.encode([text])[0])
        assert len(ids) == len(lengths)
        assert int(lengths.sum()) == len(text.encode())
        assert (lengths >= 0).all()
        assert tokenizer.eos_id not in ids.tolist()
        assert not len(ids) or int(ids.max()) < tokenizer.vocab_size


def test_training_a_vocabulary_twice_gives_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for name in ("a", "b"):
        train_bpe(TEXTS * 20, 320).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_own_tokenizer_folder_and_its_end_token(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    trained = train_bpe(TEXTS, 300, eos="<the end>")
    trained.save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value) == (
        f"data.tokenizer={str(tmp_path)!r}: no token that ends a document was found: "
        f"name it as eos_token in {tmp_path / 'tokenizer_config.json'}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<the end>"}}))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.eos_id, loaded.vocab_size) == (trained.eos_id, trained.vocab_size)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer("nowhere")
    assert str(caught.value) == (
        "data.tokenizer='nowhere': there is no file nowhere: "
        "give `bpe`, `bytes`, or the path of a tokenizer.json or of its folder"
    )


def test_without_the_package_the_alternative_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError) as caught:
        train_bpe(["a"], 300)
    assert str(caught.value) == (
        "data.tokenizer='bpe': needs the package tokenizers, which is not installed: "
        "pip install 'colossal-launch[hf]', or set data.tokenizer: bytes, which needs nothing"
    )


def test_packed_sequences_are_the_joined_documents(tmp_path: Path) -> None:
    path = tmp_path / "t"
    documents = [Document(str(index), text) for index, text in enumerate(["abcde", "", "fgh"])]
    count = write_tokens(path, documents, ByteTokenizer(), with_lengths=True)
    assert (count.num_documents, count.num_tokens, count.num_bytes) == (2, 10, 8)
    packed = TextDataset(path, vocab_size=257, eos_id=256, sequence_length=4, packing=True)
    assert len(packed) == 2
    joined = torch.cat([packed[index]["input_ids"] for index in range(2)])
    assert joined.tolist() == [*b"abcde", 256, *b"fg"]
    assert torch.equal(packed[1]["labels"], packed[1]["input_ids"])
    assert packed.num_scored_bytes([0]) == 3
    assert packed.num_scored_bytes([0, 1]) == 5
    assert bits_per_byte(5 * math.log(2), 5) == 1.0
    with pytest.raises(IndexError, match=r"^sequence 2 of 2$"):
        packed[2]


def test_one_document_a_sequence_is_cut_or_padded(tmp_path: Path) -> None:
    path = tmp_path / "t"
    documents = [Document("a", "abcdefgh"), Document("b", "xy")]
    write_tokens(path, documents, ByteTokenizer(), with_lengths=True)
    padded = TextDataset(path, vocab_size=257, eos_id=256, sequence_length=5, packing=False)
    assert len(padded) == 2
    assert padded[0]["input_ids"].tolist() == [*b"abcde"]
    assert padded[0]["attention_mask"].tolist() == [1] * 5
    assert padded[1]["input_ids"].tolist() == [*b"xy", 256, 256, 256]
    assert padded[1]["labels"].tolist() == [*b"xy", 256, -100, -100]
    assert padded[1]["attention_mask"].tolist() == [1, 1, 1, 0, 0]
    assert padded.num_scored_bytes([0, 1]) == 4 + 1


def test_large_vocabularies_take_four_bytes_a_token() -> None:
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.uint32


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_prepared_text_is_reused_until_something_changes(tmp_path: Path, tokenizer: str) -> None:
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    path = _text_file(tmp_path)
    config = DataConfig(source=str(path), sequence_length=32, tokenizer=tokenizer, vocab_size=300)
    first = prepare_text(config, tmp_path / "data")
    second = prepare_text(config, tmp_path / "data")
    assert (first.cached, second.cached) == (False, True)
    assert open_text(config, tmp_path / "data") == second
    assert (first.tokenizer_file is None) == (tokenizer == "bytes")
    assert first.train_count.num_bytes + first.validation_count.num_bytes == path.stat().st_size
    sample = first.dataset("train", config)[0]["input_ids"]
    assert sample.dtype == torch.int64
    assert int(sample.max()) < first.vocab_size
    changed = config.model_copy(update={"validation": str(path)})
    assert not prepare_text(changed, tmp_path / "data").cached
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.txt", "data"]


def test_too_little_text_is_said_before_training(tmp_path: Path) -> None:
    path = _text_file(tmp_path, num_lines=100)
    config = DataConfig(source=str(path), sequence_length=4096, tokenizer="bytes")
    with pytest.raises(ConfigError) as caught:
        prepare_text(config, tmp_path / "data")
    assert [problem.field for problem in caught.value.problems] == ["data.sequence_length"] * 2
    blank = tmp_path / "one.txt"
    blank.write_text("one line\n")
    with pytest.raises(ConfigError) as caught:
        prepare_text(DataConfig(source=str(blank), sequence_length=4, tokenizer="bytes"), tmp_path / "blank")
    assert str(caught.value) == (
        "data.validation=None: the source is too short to hold any text out: name held-out text of your own"
    )


def test_tokenizer_files_of_two_folders_differ_by_content(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = _text_file(tmp_path)
    trained = train_bpe([path.read_text()], 280)
    assert isinstance(trained, FastTokenizer)
    trained.save(tmp_path / "tokenizer.json")
    config = DataConfig(source=str(path), sequence_length=32, tokenizer=str(tmp_path / "tokenizer.json"))
    first = prepare_text(config, tmp_path / "data")
    train_bpe([path.read_text()], 290).save(tmp_path / "tokenizer.json")
    assert prepare_text(config, tmp_path / "data").fingerprint != first.fingerprint
