"""Rows of text from .jsonl and .parquet files and from any dataset of the `datasets` package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from colossal_core.errors import ConfigError, Problem
from colossal_launch.data.documents import Document, Split, in_split, is_held_out

_PARQUET_BATCH_ROWS = 1024


def table_rows(path: Path, text_field: str) -> Iterator[str]:
    """The text of each row of a .jsonl or .parquet file, in order. Raises ConfigError where a row has no such field."""
    return _parquet_rows(path, text_field) if path.suffix == ".parquet" else _jsonl_rows(path, text_field)


def _jsonl_rows(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"line {number} is not JSON ({error.msg} at column {error.colno})"
                raise ConfigError([Problem("data.source", reason, "write one JSON object a line", str(path))]) from None
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                found = sorted(row) if isinstance(row, dict) else [type(row).__name__]
                reason = f"line {number} of {path} has no such text field; it has {', '.join(found) or 'none'}"
                raise ConfigError(
                    [Problem("data.text_field", reason, "name the field that holds the text", text_field)]
                )
            yield row[text_field]


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError([_missing_package("data.source", str(path), "pyarrow")]) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = f"not a parquet file ({str(error).splitlines()[0]})"
        raise ConfigError(
            [Problem("data.source", reason, "name .parquet files that pyarrow can read", str(path))]
        ) from None
    if text_field not in table.schema_arrow.names:
        reason = f"{path} has no such column; it has {', '.join(table.schema_arrow.names)}"
        raise ConfigError([Problem("data.text_field", reason, "name the column that holds the text", text_field)])
    for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=[text_field]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _missing_package(field: str, value: str, package: str) -> Problem:
    return Problem(
        field, f"needs the package {package}, which is not installed", "pip install 'colossal-launch[data]'", value
    )


@dataclass(frozen=True)
class TableSource:
    """A dataset of the `datasets` package. train, held_out: its splits; held_out None: one row in twenty of `train`."""

    description: str
    train: Any
    held_out: Any
    text_field: str
    fingerprint_text: str

    def documents(self, split: Split) -> Iterator[Document]:
        if split == "validation" and self.held_out is not None:
            for index, row in enumerate(self.held_out):
                yield Document(f"validation#{index}", row[self.text_field])
            return
        for index, row in enumerate(self.train):
            if self.held_out is not None or in_split(is_held_out(index), split):
                yield Document(f"train#{index}", row[self.text_field])

    def fingerprint(self) -> str:
        return self.fingerprint_text


def open_dataset(name: str, text_field: str, field: str) -> TableSource:
    """A dataset by `datasets:NAME[?key=value&...]`: a folder of `save_to_disk`, or whatever `load_dataset` takes, with its arguments."""
    try:
        import datasets
    except ImportError:
        raise ConfigError([_missing_package(field, name, "datasets")]) from None
    address, _, query = name.removeprefix("datasets:").partition("?")
    arguments = dict(parse_qsl(query))
    split_name = arguments.pop("split", None)
    folder = Path(address).expanduser()
    try:
        if folder.is_dir() and any((folder / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(address, **arguments)
    except Exception as error:
        reason = f"the datasets package cannot load it ({type(error).__name__}: {str(error).splitlines()[0]})"
        remedy = "name a dataset of the Hub, a folder of save_to_disk, or a builder (datasets:json?data_files=a.jsonl)"
        raise ConfigError([Problem(field, reason, remedy, name)]) from None
    train, held_out = _splits(loaded, split_name, field, name)
    if text_field not in train.column_names:
        reason = f"{name} has no such column; it has {', '.join(train.column_names)}"
        raise ConfigError([Problem("data.text_field", reason, "name the column that holds the text", text_field)])
    prints = "".join(part._fingerprint for part in (train, held_out) if part is not None)
    return TableSource(f"the dataset {address}", train, held_out, text_field, f"{name}{text_field}{prints}")


def _splits(loaded: Any, split_name: str | None, field: str, name: str) -> tuple[Any, Any]:
    """The training split and the held-out one (None where the dataset brings none)."""
    if not isinstance(loaded, Mapping):
        return loaded, None
    wanted = split_name or ("train" if "train" in loaded else next(iter(loaded)))
    if wanted not in loaded:
        reason = f"there is no split {wanted}; there are {', '.join(loaded)}"
        raise ConfigError([Problem(field, reason, "name one of them: ?split=NAME", name)])
    held_out = next((loaded[split] for split in ("validation", "test") if split in loaded and split != wanted), None)
    return loaded[wanted], held_out
