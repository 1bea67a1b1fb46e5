"""From `data` in the config to token files in the run's folder: once, by one process; every rank then opens the same files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_core.errors import ConfigError, Problem
from colossal_launch.data.documents import Document, Split
from colossal_launch.data.packing import TextDataset, TokenCount, write_tokens
from colossal_launch.data.sources import Source, open_source
from colossal_launch.data.tokenizer import ByteTokenizer, FastTokenizer, Tokenizer, load_tokenizer, train_bpe

if TYPE_CHECKING:
    from colossal_core.config import DataConfig

_FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PreparedText:
    """Text as tokens on disk. folder: holds `tokenizer.json` (none for bytes), the token files and the manifest.

    fingerprint: of the source, the tokenizer and the settings that decide the tokens. cached: nothing had to be done.
    """

    folder: Path
    description: str
    fingerprint: str
    vocab_size: int
    eos_id: int
    train_count: TokenCount
    validation_count: TokenCount
    cached: bool = False

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json that exported models carry; None for bytes."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    def dataset(self, split: Split, config: DataConfig) -> TextDataset:
        """The sequences of a split, `train` or `validation`."""
        return TextDataset(
            self.folder / f"{split}.tokens",
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            sequence_length=config.sequence_length,
            packing=config.packing,
        )


def prepare_text(config: DataConfig, folder: Path) -> PreparedText:
    """Reads the source, trains the tokenizer and writes the tokens into `folder`, unless they are there already.

    One process calls it; it needs no group. Written aside and renamed, so a process that dies leaves nothing half done.
    Raises ConfigError with every problem of `data`.
    """
    source = open_source(config.source, config.text_field)
    held_out = open_source(config.validation, config.text_field, "data.validation") if config.validation else None
    fingerprint = _fingerprint(config, source, held_out)
    known = _read_manifest(folder, fingerprint)
    if known is None:
        aside = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
        aside.mkdir(parents=True)
        try:
            _write(config, source, held_out, fingerprint, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        written = _read_manifest(folder, fingerprint)
        assert written is not None, f"{folder} was written and cannot be read"
        known = replace(written, cached=False)
    _check_enough(known, config)
    return known


def open_text(config: DataConfig, folder: Path) -> PreparedText:
    """What `prepare_text` left in `folder`: for the other ranks, after it has returned on one."""
    source = open_source(config.source, config.text_field)
    held_out = open_source(config.validation, config.text_field, "data.validation") if config.validation else None
    known = _read_manifest(folder, _fingerprint(config, source, held_out))
    if known is None:
        reason = f"{folder} holds no tokens for it: the text changed while workers started, or this host does not see the run's folder"
        raise ConfigError(
            [Problem("data.source", reason, "start again with a folder that every host sees", config.source)]
        )
    return known


def kept_text(folder: Path) -> PreparedText | None:
    """What lies in a run's folder, whatever has become of the source since; None where there is nothing whole."""
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    return _read_manifest(folder, json.loads(path.read_text(encoding="utf-8"))["fingerprint"])


def _fingerprint(config: DataConfig, source: Source, held_out: Source | None) -> str:
    parts: list[object] = [_FORMAT, source.fingerprint(), held_out and held_out.fingerprint(), config.tokenizer]
    if config.tokenizer == "bpe":
        parts.append(config.vocab_size)
    elif config.tokenizer != "bytes":
        path = Path(config.tokenizer).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        parts.append(hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "missing")
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _documents(source: Source, held_out: Source | None, split: Split) -> Iterator[Document]:
    if held_out is None:
        return source.documents(split)
    return held_out.documents("all") if split == "validation" else source.documents("all")


def _write(config: DataConfig, source: Source, held_out: Source | None, fingerprint: str, folder: Path) -> None:
    tokenizer: Tokenizer
    if config.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        if config.tokenizer == "bpe":
            trained = train_bpe(
                (document.text for document in _documents(source, held_out, "train")), config.vocab_size
            )
        else:
            trained = load_tokenizer(config.tokenizer)
        trained.save(folder / "tokenizer.json")
        # Read back: the tokens then depend on the file alone, whoever encodes with it later.
        tokenizer = _reopened(trained, folder)
    counts: dict[str, object] = {
        split: asdict(
            write_tokens(
                folder / f"{split}.tokens",
                _documents(source, held_out, split),
                tokenizer,
                with_lengths=split == "validation",
            )
        )
        for split in _SPLITS
    }
    manifest: dict[str, object] = {
        "fingerprint": fingerprint,
        "description": source.description,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        **counts,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


_SPLITS: tuple[Split, ...] = ("train", "validation")


def _reopened(trained: FastTokenizer, folder: Path) -> FastTokenizer:
    import tokenizers

    return FastTokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), trained.eos_id)


def _read_manifest(folder: Path, fingerprint: str) -> PreparedText | None:
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["fingerprint"] != fingerprint:
        return None
    return PreparedText(
        folder=folder,
        description=manifest["description"],
        fingerprint=fingerprint,
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        train_count=TokenCount(**manifest["train"]),
        validation_count=TokenCount(**manifest["validation"]),
        cached=True,
    )


def _check_enough(text: PreparedText, config: DataConfig) -> None:
    """Raises ConfigError where a part has not one sequence."""
    problems = []
    parts = (("train", "data.source", config.source), ("validation", "data.validation", config.validation))
    for split, field, value in parts:
        count = text.train_count if split == "train" else text.validation_count
        if count.num_bytes == 0:
            what = (
                "there is no text in it"
                if split == "train" or value
                else "the source is too short to hold any text out"
            )
            remedy = "name a source with text" if split == "train" else "name held-out text of your own"
            problems.append(Problem(field, what, remedy, value))
        elif len(text.dataset("train" if split == "train" else "validation", config)) == 0:
            whole = "the text" if split == "train" else "the held-out text"
            reason = f"{whole} has {count.num_tokens} tokens, not one sequence"
            remedy = f"at most {count.num_tokens}, or more text"
            problems.append(Problem("data.sequence_length", reason, remedy, config.sequence_length))
    if problems:
        raise ConfigError(problems)
