"""Writes docs/config.md from the config classes: `python tools/config_reference.py`; a test compares the file with what this makes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_core.config import TrainConfig, build_config_class
from colossal_core.config.tree import ConfigSpec
from colossal_core.plugins import discover

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# The config

Written by `nox -s generate` from the classes that read it; `colossal plan CONFIG` prints what comes of a config.

A config is YAML. Every section but `model`, `data` and `batch` may be left out, and a config handed to `Booster` together with a model
needs none but `batch`. `--set section.key=value` changes one key on the command line. Unknown keys, wrong types and impossible values are
reported together, and nothing is ignored. A section under `parallel` exists when the package that contributes it is installed.
"""


def type_text(schema: dict[str, Any]) -> str:
    """A field's type, from its JSON schema, in the words of YAML."""
    if "anyOf" in schema:
        return " or ".join(type_text(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    words = {
        "string": "text", "integer": "whole number", "number": "number", "boolean": "true or false",
        "object": "mapping", "array": "list", "null": "null",
    }  # fmt: skip
    signs = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {schema[key]:g}" for key, word in signs.items() if key in schema]
    word = words[schema["type"]] if "type" in schema else "any value"
    return f"{word} ({', '.join(bounds)})" if bounds else word


def default_text(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return "{}" if schema.get("type") == "object" else "required"
    return f"`{json.dumps(schema['default'])}`"


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def pages(path: str, schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """The headings and tables of a section and of those inside it."""
    keys, inner = [], []
    for key, field in schema.get("properties", {}).items():
        choices = [field, *field.get("anyOf", [])]
        reference = next((choice["$ref"] for choice in choices if "$ref" in choice), None)
        if reference is not None:
            inner.append((f"{path}.{key}".lstrip("."), definitions[reference.rsplit("/", 1)[1]]))
        else:
            keys.append(
                f"| `{key}` | {type_text(field)} | {default_text(field)} | {cell(field.get('description', ''))} |"
            )
    title = f"## `{path}`" if path else "## Top level"
    about = cell(schema.get("description", "")) if path else "Keys that stand in no section."
    if keys or path:
        yield f"{title}\n\n{about}\n"
    if keys:
        yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *keys]) + "\n"
    for name, section in inner:
        yield from pages(name, section, definitions)


def reference(config_class: type[TrainConfig]) -> str:
    schema = config_class.model_json_schema()
    return "\n".join([HEAD, *pages("", schema, schema.get("$defs", {}))])


def config_class() -> type[TrainConfig]:
    """The config with the sections of this repository's packages; a stranger's section stands at the top level."""
    specs = [spec for spec in discover().strategies() if spec.section.startswith("parallel.")]
    return build_config_class(ConfigSpec(spec.section, spec.config_class) for spec in specs)


if __name__ == "__main__":
    PAGE.write_text(reference(config_class()))
