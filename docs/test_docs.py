"""The documentation is true: its Python runs, its configs parse, its links lead somewhere, and what is generated is up to date."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


def blocks(language: str) -> list[object]:
    """The fenced blocks of one language, as pytest parameters named by page and number."""
    found: list[object] = []
    for page in PAGES:
        texts = [text for name, text in FENCE.findall(page.read_text()) if name == language]
        found += [pytest.param(text, id=f"{page.relative_to(ROOT)}-{index}") for index, text in enumerate(texts)]
    return found


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may take `model`, `optimizer` and `dataset` as given, and finds a small `run.yaml` in its folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "documentation"}
    if re.search(r"\bmodel\b", text):
        names |= tool("documentation_names").names(tmp_path)
    exec(compile(text, "documentation", "exec"), names)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_name_only_known_keys(text: str) -> None:
    from colossal_core.config import parse_config

    config = {"batch": {"global_size": 8}, **yaml.safe_load(text)}
    parse_config(config, tool("config_reference").config_class())


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: str(path.name))
def test_example_configs_parse(path: Path) -> None:
    from colossal_core.config import parse_config

    parse_config(yaml.safe_load(path.read_text()), tool("config_reference").config_class())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_config_reference_is_up_to_date() -> None:
    reference = tool("config_reference")
    assert reference.PAGE.read_text() == reference.reference(reference.config_class()), "run nox -s generate"


def test_readme_table_is_up_to_date() -> None:
    works_with = tool("works_with")
    readme = works_with.README.read_text()
    results = json.loads(works_with.RESULTS.read_text())
    assert readme == works_with.with_table(readme, results), "run nox -s generate"


def test_table_of_architectures_is_up_to_date() -> None:
    """And nothing fails in it without a reason, nor has a reason without failing."""
    architectures = tool("architectures")
    results = json.loads(architectures.RESULTS.read_text())
    reasons = json.loads(architectures.REASONS.read_text())
    assert architectures.PAGE.read_text() == architectures.page(results, reasons), "run nox -s architectures"
    left = {architectures.label(row) for row in results["rows"] if not architectures.is_sound(row)}
    assert left == set(reasons)


def test_table_of_what_works_with_what() -> None:
    results = [
        {"row": "zero stage 0", "column": "Llama", "shown": "1e-15"},
        {"row": "zero stage 1", "column": "GPT-2", "shown": "2e-15"},
    ]
    assert tool("works_with").table(results).splitlines() == [
        "| | Llama | GPT-2 |",
        "|---|---|---|",
        "| zero stage 0 | 1e-15 | – |",
        "| zero stage 1 | – | 2e-15 |",
    ]


def test_release_moves_unreleased_lines_under_the_version() -> None:
    import datetime

    release = tool("release")
    before = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- a thing\n\n## [0.1.0] - 2026-01-01\n\n- first\n"
    after = release.released(before, "0.2.0", datetime.date(2026, 2, 3))
    assert release.entry(after, "## [Unreleased]") == ""
    assert release.entry(after, "## [0.2.0]") == "### Added\n\n- a thing"
    assert release.entry(after, "## [0.1.0]") == "- first"
    with pytest.raises(SystemExit) as stopped:
        release.released(after, "0.3.0", datetime.date(2026, 2, 4))
    assert str(stopped.value) == "CHANGELOG.md: nothing under ## [Unreleased]: say there what a user would notice"
