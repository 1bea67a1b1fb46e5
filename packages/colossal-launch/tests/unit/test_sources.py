"""Documents by source name, what is held out, and what is said about text that cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from colossal_core.errors import ConfigError
from colossal_launch.data.sources import FileSource, PieceSource, open_source


def test_standard_library_is_split_by_file_and_leaves_tests_out() -> None:
    source = open_source("stdlib", "text")
    assert isinstance(source, FileSource)
    train = {document.name for document in source.documents("train")}
    held_out = {document.name for document in source.documents("validation")}
    assert "argparse.py" in train | held_out
    assert not train & held_out
    assert len(train | held_out) == len(source.names)
    assert 0.02 < len(held_out) / len(source.names) < 0.09
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in source.names)
    assert source.fingerprint() == open_source("stdlib", "text").fingerprint()


def test_one_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(f"line {number} of the file\n" for number in range(2000))
    path.write_text(text)
    source = open_source(str(path), "text")
    assert isinstance(source, PieceSource)
    assert "".join(document.text for document in source.documents("all")) == text
    names = [document.name for document in source.documents("train")]
    held_out = [document.name for document in source.documents("validation")]
    assert len(held_out) == pytest.approx((len(names) + len(held_out)) / 20, abs=1)
    assert all(document.text.endswith("\n") for document in source.documents("all"))


def test_rows_of_jsonl_and_parquet_are_the_same_documents(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    texts = [f"row {number}" for number in range(45)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "*.parquet"):
        source = open_source(str(tmp_path / name), "body")
        assert [document.text for document in source.documents("all")] == texts
        assert [document.text for document in source.documents("validation")] == ["row 1", "row 21", "row 41"]
        assert len(list(source.documents("train"))) == 42


def test_a_saved_dataset_and_its_own_held_out_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    part = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    part.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": part, "test": datasets.Dataset.from_dict({"text": ["d"]})})
    both.save_to_disk(str(tmp_path / "two"))
    one = open_source(f"datasets:{tmp_path / 'one'}", "text")
    assert [document.text for document in one.documents("train")] == ["a", "c"]
    assert [document.text for document in one.documents("validation")] == ["b"]
    two = open_source(f"datasets:{tmp_path / 'two'}", "text")
    assert [document.text for document in two.documents("train")] == ["a", "b", "c"]
    assert [document.text for document in two.documents("validation")] == ["d"]
    with pytest.raises(ConfigError) as caught:
        open_source(f"datasets:{tmp_path / 'one'}", "body")
    assert str(caught.value) == (
        f"data.text_field='body': datasets:{tmp_path / 'one'} has no such column; it has text: "
        "name the column that holds the text"
    )


def _message(name: str, text_field: str = "text") -> str:
    with pytest.raises(ConfigError) as caught:
        list(open_source(name, text_field).documents("train"))
    return str(caught.value)


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    missing = tmp_path / "missing.txt"
    assert _message(str(missing)) == (
        f"data.source={str(missing)!r}: no such file: "
        "give `stdlib`, `datasets:NAME`, or the path or glob of .txt, .jsonl or .parquet files"
    )
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert _message(str(empty)) == f"data.source={str(empty)!r}: there is no text in it: name files that hold text"
    other = tmp_path / "a.csv"
    other.write_text("a,b")
    assert _message(str(other)) == (
        f"data.source={str(other)!r}: the files are .csv: name files of one kind: .txt, .jsonl or .parquet"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "x", "id": 3}\n')
    assert _message(str(rows)) == (
        f"data.text_field='text': line 1 of {rows} has no such text field; it has body, id: "
        "name the field that holds the text"
    )
    rows.write_text('{"text": "x"\n')
    assert _message(str(rows)) == (
        f"data.source={str(rows)!r}: line 1 is not JSON (Expecting ',' delimiter at column 1): "
        "write one JSON object a line"
    )
    table = tmp_path / "rows.parquet"
    table.write_text("no parquet")
    assert _message(str(table)).startswith(f"data.source={str(table)!r}: not a parquet file (")


@pytest.mark.parametrize(("package", "name"), [("datasets", "datasets:x"), ("pyarrow", "rows.parquet")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    (tmp_path / "rows.parquet").write_text("x")
    monkeypatch.chdir(tmp_path)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert _message(name) == (
        f"data.source={name!r}: needs the package {package}, which is not installed: pip install 'colossal-launch[data]'"
    )
