"""Where text comes from, by the name in `data.source`: documents one by one, and which of them are held out.

A source is never read whole: `documents` streams. Held out is one in twenty: files, where there are many; rows, or pieces of a few
files, where there are not. Which ones depends on names and positions alone, so every machine with the same text makes the same cut.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from colossal_core.errors import ConfigError, Problem
from colossal_launch.data.documents import HELD_OUT_ONE_IN, Document, Split, in_split, is_held_out, is_name_held_out
from colossal_launch.data.tables import open_dataset, table_rows

_LARGEST_PIECE_BYTES = 1 << 16
_SMALLEST_PIECE_BYTES = 256
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"})


class Source(Protocol):
    """Text with a held-out part.

    description: one line for the plan. documents: the documents of one split, always in the same order. fingerprint: changes when the text
    does (from names, sizes and times; the text itself is not read).
    """

    @property
    def description(self) -> str: ...

    def documents(self, split: Split) -> Iterator[Document]: ...

    def fingerprint(self) -> str: ...


def _digest(parts: Sequence[object]) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class FileSource:
    """Many text files, split by file. names: paths relative to `root`, sorted."""

    description: str
    root: Path
    names: tuple[str, ...]

    def documents(self, split: Split) -> Iterator[Document]:
        for name in self.names:
            if in_split(is_name_held_out(name), split):
                yield Document(name, (self.root / name).read_text(encoding="utf-8", errors="replace"))

    def fingerprint(self) -> str:
        return _digest([self.description, *((name, (self.root / name).stat().st_size) for name in self.names)])


@dataclass(frozen=True)
class PieceSource:
    """A few text files, cut at line ends into pieces, split by piece.

    The pieces are small enough for two hundred of them, and at most 64 KiB; a line is never cut.
    """

    description: str
    paths: tuple[Path, ...]

    def documents(self, split: Split) -> Iterator[Document]:
        total = sum(path.stat().st_size for path in self.paths)
        piece_bytes = min(max(total // 200, _SMALLEST_PIECE_BYTES), _LARGEST_PIECE_BYTES)
        index = 0
        for path in self.paths:
            with path.open(encoding="utf-8", errors="replace") as lines:
                while text := "".join(lines.readlines(piece_bytes)):
                    if in_split(is_held_out(index), split):
                        yield Document(f"{path.name}#{index}", text)
                    index += 1

    def fingerprint(self) -> str:
        return _digest([(path, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths])


@dataclass(frozen=True)
class RowSource:
    """Rows of .jsonl and .parquet files, split by row; the text is in the field `text_field`."""

    description: str
    paths: tuple[Path, ...]
    text_field: str

    def documents(self, split: Split) -> Iterator[Document]:
        index = 0
        for path in self.paths:
            for text in table_rows(path, self.text_field):
                if in_split(is_held_out(index), split):
                    yield Document(f"{path.name}#{index}", text)
                index += 1

    def fingerprint(self) -> str:
        return _digest(
            [self.text_field, *((path, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths)]
        )


def standard_library() -> FileSource:
    """The running interpreter's own library source (about 600 files, 11 MB), without its tests and without IDLE."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not any(part in _STDLIB_LEFT_OUT for part in parts[:-1]) and path.stat().st_size > 0:
            names.append("/".join(parts))
    version = ".".join(map(str, sys.version_info[:3]))
    return FileSource(f"the standard library of Python {version}", root, tuple(sorted(names)))


def open_source(name: str, text_field: str, field: str = "data.source") -> Source:
    """The source by its name: `stdlib`, `datasets:NAME`, or a path or glob.

    field: the config field that holds the name, for messages.
    Raises ConfigError where it is missing, empty, or needs a package that is not installed.
    """
    if name == "stdlib":
        return standard_library()
    if name.startswith("datasets:"):
        return open_dataset(name, text_field, field)
    return _open_files(name, text_field, field)


def _open_files(name: str, text_field: str, field: str) -> Source:
    paths = _matching_files(name)
    if not paths:
        remedy = "give `stdlib`, `datasets:NAME`, or the path or glob of .txt, .jsonl or .parquet files"
        raise ConfigError([Problem(field, "no such file", remedy, name)])
    suffixes = {path.suffix for path in paths}
    unknown = sorted(suffixes - {".txt", ".jsonl", ".parquet"})
    if unknown or len(suffixes) > 1:
        reason = f"the files are {', '.join(sorted(suffix or 'without a suffix' for suffix in suffixes))}"
        raise ConfigError([Problem(field, reason, "name files of one kind: .txt, .jsonl or .parquet", name)])
    if not any(path.stat().st_size for path in paths):
        raise ConfigError([Problem(field, "there is no text in it", "name files that hold text", name)])
    description = f"{len(paths)} {suffixes.pop()} file{'s' if len(paths) > 1 else ''} of {name}"
    if not description.split()[1].startswith(".txt"):
        return RowSource(description, paths, text_field)
    if len(paths) < HELD_OUT_ONE_IN or not any(is_name_held_out(path.name) for path in paths):
        return PieceSource(description, paths)
    root = _common_folder(paths)
    return FileSource(description, root, tuple(str(path.relative_to(root)) for path in paths))


def _matching_files(name: str) -> tuple[Path, ...]:
    """The files a path, a folder or a glob stands for, sorted."""
    path = Path(name).expanduser()
    if path.is_file():
        return (path,)
    if path.is_dir():
        kinds = (".txt", ".jsonl", ".parquet")
        return tuple(sorted(found for found in path.rglob("*") if found.suffix in kinds and found.is_file()))
    pattern = str(path)
    folder = Path(path.anchor) if path.is_absolute() else Path()
    relative = pattern[len(path.anchor) :] if path.is_absolute() else pattern
    if not any(sign in pattern for sign in "*?["):
        return ()
    return tuple(sorted(found for found in folder.glob(relative) if found.is_file()))


def _common_folder(paths: Sequence[Path]) -> Path:
    common = paths[0].parent
    while not all(path.is_relative_to(common) for path in paths):
        common = common.parent
    return common
