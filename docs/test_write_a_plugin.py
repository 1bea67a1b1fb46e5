"""The guide shows the example as it is: every titled listing is, word for word, a part of the file that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("write-a-plugin.md")
EXAMPLE = PAGE.parents[1] / "examples" / "third-party-strategy"
LISTINGS = re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("name", "text"), LISTINGS, ids=[f"{index}-{name}" for index, (name, _) in enumerate(LISTINGS)]
)
def test_listing_is_part_of_the_example(name: str, text: str) -> None:
    assert text in (EXAMPLE / name).read_text()


def test_guide_shows_every_part_of_the_plugin() -> None:
    assert {name for name, _ in LISTINGS} == {
        "pyproject.toml",
        "src/colossal_ema/config.py",
        "src/colossal_ema/plugin.py",
        "src/colossal_ema/strategy.py",
        "tests/test_conformance.py",
    }
