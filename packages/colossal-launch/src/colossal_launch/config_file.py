"""Reading a config from a YAML file and changing it by `--set section.key=value`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colossal_core.errors import ConfigError, Problem


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is missing, not YAML, or not a mapping."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            [Problem("CONFIG", "there is no such file", "give the path of a YAML file", str(path))]
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [Problem("CONFIG", f"cannot be read ({error})", "give a readable YAML file", str(path))]
        ) from None
    try:
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        reason = f"is not YAML ({place}{error.problem or error.context})"
        raise ConfigError([Problem("CONFIG", reason, "correct the line", str(path))]) from None
    except yaml.YAMLError as error:
        reason = f"is not YAML ({' '.join(str(error).split())})"
        raise ConfigError([Problem("CONFIG", reason, "correct it", str(path))]) from None
    if not isinstance(data, dict):
        found = type(data).__name__
        raise ConfigError(
            [Problem("CONFIG", f"holds a {found}, not sections", "write `section: {key: value}`", str(path))]
        )
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with each `section.key=value` set; the value is read as YAML (`null`, `[1, 2]`, `1.0e-3`, text).

    Raises: ConfigError for an override without `=`, or through something that is not a section.
    """
    import yaml

    changed = copy.deepcopy(dict(data))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(
                [Problem("--set", "is not section.key=value", "write `--set batch.micro_size=4`", override)]
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError([Problem("--set", "the value is not YAML", "quote it", override)]) from None
        *sections, key = path.split(".")
        target = changed
        for section in sections:
            inner = target.setdefault(section, {})
            if inner is None:
                inner = target[section] = {}
            if not isinstance(inner, dict):
                raise ConfigError(
                    [Problem("--set", f"{section} is {inner!r}, not a section", "set it as a whole", override)]
                )
            target = inner
        target[key] = value
    return changed
