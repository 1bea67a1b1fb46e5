"""A section of one of our packages that is not there: the message says whether the package is missing, or does not bring it."""

from __future__ import annotations

import pytest

from colossal_core.config import ConfigSpec, Section, build_config_class, parse_config
from colossal_core.errors import ConfigError


class SizeConfig(Section):
    """A section as colossal-tensor brings one."""

    size: int = 1
    """Ranks."""


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ([], "parallel.expert: needs the package colossal-tensor, which is not installed: pip install colossal-tensor"),
        (["parallel.tensor"], "parallel.expert: the installed colossal-tensor does not bring this section: remove it"),
        (
            ["parallel.zero"],
            "parallel.expert: needs the package colossal-tensor, which is not installed: pip install colossal-tensor",
        ),
    ],
    ids=["nothing", "its package", "another package"],
)
def test_section_that_is_not_there(installed: list[str], message: str) -> None:
    config_class = build_config_class(ConfigSpec(section, SizeConfig) for section in installed)
    with pytest.raises(ConfigError) as raised:
        parse_config({"batch": {"global_size": 8}, "parallel": {"expert": {"size": 2}}}, config_class)
    assert str(raised.value) == message
