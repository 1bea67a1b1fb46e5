"""Text to token numbers: a byte-level BPE trained on the source, plain bytes, or the user's own tokenizer.

Every tokenizer also says how many bytes of text each token stands for, so that a loss in nats can be reported in bits per byte, which
means the same under any vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from colossal_core.errors import ConfigError, Problem

END_OF_TEXT = "<|endoftext|>"
"""The token that ends every document, in vocabularies trained here."""

_SAMPLE_BYTES = 12_000_000
_SAMPLE_DOCUMENT_CHARACTERS = 1 << 16
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "[SEP]", "<end_of_text>")


class Tokenizer(Protocol):
    """Text to tokens. eos_id ends every document; `encode` does not add it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token numbers of each text, as int64."""

    def encode_with_lengths(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers, and the UTF-8 bytes of text that each token stands for; the lengths add up to the bytes of the text."""


class ByteTokenizer:
    """One token a byte, and 256 for the end of a document. Needs nothing."""

    vocab_size = 257
    eos_id = 256

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def encode_with_lengths(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode([text])[0]
        return ids, np.ones(len(ids), dtype=np.int64)


class FastTokenizer:
    """A tokenizer of the `tokenizers` package. Special tokens written out in the text are read as ordinary text."""

    def __init__(self, backend: Any, eos_id: int) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = eos_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_with_lengths(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int64)
        if not len(ids):
            return ids, ids
        widths = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        byte_end = np.concatenate([[0], np.cumsum(1 + (widths > 0x7F) + (widths > 0x7FF) + (widths > 0xFFFF))])
        # Tokens inside one character all report the whole character: its bytes count once, at the first. What a normaliser
        # dropped counts at the token that follows, at the end of the text at the last one.
        ends = np.maximum.accumulate(byte_end[np.asarray([stop for _, stop in encoding.offsets], dtype=np.int64)])
        ends[-1] = byte_end[-1]
        return ids, np.diff(ends, prepend=0)

    def save(self, path: Path) -> None:
        self._backend.save(str(path), pretty=False)


def import_tokenizers(name: str) -> Any:
    """The `tokenizers` package, or the ConfigError that says how to get it and what to use without it. name: the tokenizer wanted."""
    try:
        import tokenizers
    except ImportError:
        reason = "needs the package tokenizers, which is not installed"
        remedy = "pip install 'colossal-launch[hf]', or set data.tokenizer: bytes, which needs nothing"
        raise ConfigError([Problem("data.tokenizer", reason, remedy, name)]) from None
    return tokenizers


def train_bpe(texts: Iterable[str], vocab_size: int, *, eos: str = END_OF_TEXT) -> FastTokenizer:
    """A byte-level BPE (Sennrich et al. 2016 over bytes, as in Radford et al. 2019) trained on the first 12 MB of `texts`.

    The result depends on the texts and the size alone. A small text yields a smaller vocabulary than `vocab_size`.
    """
    tokenizers = import_tokenizers("bpe")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(texts), trainer)
    return FastTokenizer(backend, backend.token_to_id(eos))


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = _SAMPLE_BYTES
    for text in texts:
        part = text[: min(_SAMPLE_DOCUMENT_CHARACTERS, left)]
        left -= len(part)
        yield part
        if left <= 0:
            return


def load_tokenizer(name: str, field: str = "data.tokenizer") -> FastTokenizer:
    """The user's tokenizer: a tokenizer.json, or a folder that holds one. Its end-of-document token is found in the files beside it."""
    tokenizers = import_tokenizers(name)
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    remedy = "give `bpe`, `bytes`, or the path of a tokenizer.json or of its folder"
    if not path.is_file():
        raise ConfigError([Problem(field, f"there is no file {path}", remedy, name)])
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        reason = f"{path} is not a tokenizer ({str(error).splitlines()[0]})"
        raise ConfigError([Problem(field, reason, remedy, name)]) from None
    candidates = [*_configured_ends(path.parent), *_KNOWN_ENDS]
    eos_id = next((found for end in candidates if (found := backend.token_to_id(end)) is not None), None)
    if eos_id is None:
        reason = "no token that ends a document was found"
        remedy = f"name it as eos_token in {path.parent / 'tokenizer_config.json'}"
        raise ConfigError([Problem(field, reason, remedy, name)])
    return FastTokenizer(backend, eos_id)


def _configured_ends(folder: Path) -> list[str]:
    found = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            found += [token] if isinstance(token, str) else []
    return found
