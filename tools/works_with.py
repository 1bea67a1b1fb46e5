"""Writes the README's table of what works with what: `python tools/works_with.py`; a test compares the README with what this makes.

docs/works_with.json is written by the tests that prove its cells: a list of `{"row": ..., "column": ..., "shown": ...}`, where `shown` is
what the cell says (`exact`, `1.1e-15`, ...). Rows and columns stand in the order in which they first occur.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "works_with.json"
BEGIN, END = "<!-- works-with: begin -->", "<!-- works-with: end -->"


def table(results: Sequence[dict[str, str]]) -> str:
    """A Markdown table; a pair that no test has shown is a dash."""
    rows = list(dict.fromkeys(result["row"] for result in results))
    columns = list(dict.fromkeys(result["column"] for result in results))
    cells = {(result["row"], result["column"]): result["shown"] for result in results}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {row} | {' | '.join(cells.get((row, column), '–') for column in columns)} |" for row in rows]
    return "\n".join(lines)


def with_table(readme: str, results: Sequence[dict[str, str]]) -> str:
    """The README with the table between its two marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert tail, f"README.md has lost its marks {BEGIN} and {END}"
    return f"{head}{BEGIN}\n{table(results)}\n{END}{tail}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), json.loads(RESULTS.read_text())))
